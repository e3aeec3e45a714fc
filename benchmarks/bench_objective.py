"""The whole generator loss of each method, on a trunk with random weights; logits and features of critics lie ready.

The plain formula is the one that was released (`examples/published`): one trunk pass for every image and term.
`ik-plain` is our objective, `ik-chunk1` the one that streams single samples. Almost all of the time goes into the
convolutions.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .harness import Benchmark, Bytes, Case, Formula, Terms, randomize
from .methods import METHODS, built, method_inputs, method_of, outputs_of, total


@functools.cache
def _trunk(net: str, layers: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> Any:
    """With weights that let features neither vanish nor grow, the same for every device and dtype."""
    import inpaint_kernels as ik

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = getattr(ik.features, net)(layers, weights=None, preprocess="none", channels_last=None)
        randomize(trunk.features)
    return trunk.to(device, dtype)


def trunk_of(case: Case, device: torch.device, dtype: torch.dtype) -> Any:
    method = method_of(case)
    return _trunk(method.net, tuple(layer for each in method.passes for layer in each), device, dtype)


def eager(case: Case) -> Formula:
    method = method_of(case)

    def formula(**inputs: Any) -> Terms:
        outputs = outputs_of(inputs)
        pred = inputs["pred"]
        network = trunk_of(case, pred.device, pred.dtype)

        def trunk(images: Tensor, layers: Sequence[str]) -> list[Tensor]:
            places = dict(zip(network.names, network.taps, strict=True))
            wanted = [places[layer] for layer in layers]
            maps = {}
            for place, layer in network.features.named_children():
                images = layer(images)
                if place in wanted:
                    maps[place] = images
                if len(maps) == len(wanted):
                    break
            return [maps[place] for place in wanted]

        return (method.formula(trunk, inputs, outputs),)

    return formula


def fused(case: Case, variant: str) -> Formula:
    chunk = None if variant == "plain" else int(variant.removeprefix("chunk"))

    @functools.cache
    def objective(device: torch.device, dtype: torch.dtype, heads: tuple[Tensor, ...]) -> Any:
        return built(case, None, chunk, trunk_of(case, device, dtype), heads)

    def formula(**inputs: Any) -> Terms:
        outputs = outputs_of(inputs)
        pred = inputs["pred"]
        loss = objective(pred.device, pred.dtype, tuple(outputs["heads"]))
        return (total(loss, inputs, outputs),)

    return formula


# Timed at a smaller size: their terms are those of the others.
RELATIVES = ("lama", "edge-connect", "aot-gan")

BENCHMARK = Benchmark(
    op="objective",
    cases=[
        *(
            Case(
                (2, 3, 128, 128) if name in RELATIVES else (4, 3, 256, 256),
                name,
                # These read the deepest layers: eager's own gradient is up to 9.1e-3 off for MAT, 5.9e-3 for
                # TransCNN-HAE.
                options={"method": name, **({"tolerance": 1e-2} if name in ("mat", "transcnn-hae") else {})},
            )
            for name in METHODS
        ),
        Case((2, 3, 64, 64), "transcnn-hae", options={"method": "transcnn-hae"}, quick=True),
    ],
    make_inputs=method_inputs,
    eager=eager,
    fused=fused,
    minimum_bytes=lambda case: Bytes(0, 0),
    # As in bench_perceptual: rounding moves features across kinks.
    tolerances={torch.float32: 5e-3},
    variants=("plain", "chunk1"),
    heavy=True,
    compiled=False,
)
