"""The objectives of the methods outside their trunks: all of `bench_objective` but the network itself.

In place of the network stands one that costs nothing: it returns feature maps of the network's sizes that lie ready,
takes their gradients and gives back a gradient of the images that lies ready. What is left are the images that the
trunk reads, the pixel terms, feature distances, Gram matrices and the adversarial term on logits that lie ready,
forward and backward. The cases "without trunk" leave the terms on features out and show what a call costs the host.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .bench_objective_pconv_terms import Network, read
from .harness import Benchmark, Bytes, Case, Formula, Terms
from .methods import BARE, built, layer_shape, method_inputs, method_of, outputs_of, total


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Tensor | None]:
    n, c, h, w = case.shape
    method = method_of(case)
    inputs = method_inputs(case, device, generator)

    def positive(channels: int, step: int) -> Tensor:
        shape = (n, channels, h // step, w // step)
        return torch.randn(shape, generator=generator, device=device).clamp_(min=0)

    for place, layers in enumerate(method.passes):
        for layer in layers:
            channels, step = layer_shape(method.net, layer)
            # Channels of the target by turns half and four times as large: no entry of Gram matrices is near a tie.
            scale = torch.where(torch.arange(channels, device=device) % 2 == 0, 0.5, 4.0).view(1, -1, 1, 1)
            inputs[f"map_{layer}"] = positive(channels, step).to(case.dtype).requires_grad_()
            inputs[f"truth_{layer}"] = (positive(channels, step) * scale).to(case.dtype)
        back = torch.randn(n, c, h, w, generator=generator, device=device) / case.numel
        inputs[f"back{place}"] = back.to(case.dtype)
    inputs["sink"] = torch.zeros(1, device=device, dtype=case.dtype)
    return inputs


class _Ready:
    """The network that costs nothing: by turns asked for a prediction and for the truth, or the other way around."""

    def __init__(
        self, inputs: dict[str, Tensor], passes: Sequence[tuple[str, ...]], truth_first: bool
    ) -> None:
        self.inputs, self.passes, self.truth_first = inputs, passes, truth_first
        self.calls: dict[tuple[str, ...], int] = {}

    def __call__(self, images: Tensor, layers: Sequence[str]) -> Any:
        key = tuple(layers)
        call = self.calls.get(key, 0)
        self.calls[key] = call + 1
        if (call % 2 == 0) == self.truth_first:
            read(images, self.inputs["sink"])
            return [self.inputs[f"truth_{layer}"] for layer in key]
        maps = [self.inputs[f"map_{layer}"] for layer in key]
        back = self.inputs[f"back{list(self.passes).index(key)}"]
        return list(Network.apply(images, back, self.inputs["sink"], *maps))


def eager(case: Case) -> Formula:
    method = method_of(case)

    def formula(**inputs: Any) -> Terms:
        outputs = outputs_of(inputs)
        trunk = _Ready(inputs, method.passes, truth_first=False)
        return (method.formula(trunk, inputs, outputs),)

    return formula


def fused(case: Case, backend: str) -> Formula:
    import inpaint_kernels as ik

    method = method_of(case)
    layers = [layer for each in method.passes for layer in each]

    class Ready(ik.features.FrozenTrunk):
        ready: _Ready

        def forward(self, images: Tensor, layers: Sequence[str] | None = None) -> list[Tensor]:
            maps: list[Tensor] = self.ready(images, layers or self.names)
            return maps

    @functools.cache
    def objective(heads: tuple[Tensor, ...]) -> Any:
        if not layers:
            return built(case, backend, None, None, heads)
        trunk = Ready(
            torch.nn.Sequential(*(torch.nn.Identity() for _ in layers)), list(map(str, range(len(layers))))
        )
        trunk.names = layers
        return built(case, backend, None, trunk, heads)

    def formula(**inputs: Any) -> Terms:
        outputs = outputs_of(inputs)
        loss = objective(tuple(outputs["heads"]))
        if layers:
            loss.trunk.ready = _Ready(inputs, method.passes, truth_first=True)
        return (total(loss, inputs, outputs),)

    return formula


def minimum_bytes(case: Case) -> Bytes:
    """Forward reads the images and the maps of prediction and truth and writes the images of each pass.

    Backward reads the maps again, for the Gram matrices, and writes their gradients.
    """
    method, size = method_of(case), case.dtype.itemsize
    n, _, h, w = case.shape
    shapes = [layer_shape(method.net, layer) for each in method.passes for layer in each]
    maps = n * sum(channels * (h // step) * (w // step) for channels, step in shapes) * size
    image = case.numel * size
    return Bytes(2 * image * (1 + len(method.passes)) + 2 * maps, 2 * image + 2 * maps)


TIMED = ("ctn", "transcnn-hae", "mat", "cmt", "coordfill", "edge-connect")

BENCHMARK = Benchmark(
    op="objective_terms",
    cases=[
        *(Case((4, 3, 256, 256), name, options={"method": name}) for name in TIMED),
        Case((1, 3, 64, 64), "ctn", options={"method": "ctn"}, quick=True),
        *(Case((1, 3, 64, 64), name, options={"method": name}) for name in BARE),
    ],
    make_inputs=make_inputs,
    eager=eager,
    fused=fused,
    minimum_bytes=minimum_bytes,
    # Sums of millions of elements.
    tolerances={torch.float32: 2e-5},
)
