"""The demo's U-Net of partial convolutions, one step, from the library's layers and from NVIDIA's.

The plain network has the same convolutions and activations and no masks.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bench_partial_conv import nvidia
from .harness import Benchmark, Bytes, Case, Formula, Terms, image_inputs
from .machine import ROOT


class _Nvidia(nn.Conv2d):
    """NVIDIA's layer with an activation after it."""

    def __init__(
        self, *args: Any, multi_channel: bool = False, activation: str = "none", **kwargs: Any
    ) -> None:
        self.slope, self.activation = kwargs.pop("negative_slope", 0.0), activation
        self.multi_channel = multi_channel
        super().__init__(*args, **{k: v for k, v in kwargs.items() if k not in ("mask_input", "return_mask")})

    def activate(self, x: Tensor) -> Tensor:
        if self.activation == "relu":
            return F.relu(x)
        return F.leaky_relu(x, self.slope) if self.activation == "leaky_relu" else x

    def forward(self, input: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        assert self.bias is not None
        stride, padding = self.stride[0], int(self.padding[0])
        output, new_mask = nvidia(input, self.weight, self.bias, mask, self.multi_channel, stride, padding)
        return self.activate(output), new_mask


class _Plain(_Nvidia):
    """Only the convolution; the mask is thinned out to the output's size."""

    def forward(self, input: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        output = self.activate(nn.Conv2d.forward(self, input))
        return output, mask[:, :1, :: self.stride[0], :: self.stride[1]]


@functools.lru_cache
def _network(kind: str) -> nn.Module:
    folder = str(ROOT / "examples")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from model import PartialConvUNet

    class Nvidia(PartialConvUNet):
        def join_masks(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
            return torch.cat([known.expand_as(features) for features, known in parts], 1)

    class Plain(PartialConvUNet):
        def join_masks(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
            return parts[1][1]

    if kind == "nvidia":
        return Nvidia(layer=_Nvidia)
    if kind == "plain":
        return Plain(layer=_Plain)
    import inpaint_kernels as ik

    return PartialConvUNet(layer=functools.partial(ik.nn.PartialConv2d, backend=kind))


def _formula(kind: str) -> Formula:
    def formula(image: Tensor, mask: Tensor, **parameters: Tensor) -> Terms:
        named = {name.replace("__", "."): value for name, value in parameters.items()}
        return (torch.func.functional_call(_network(kind), named, (image, mask)),)

    return formula


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Tensor | None]:
    images = image_inputs(case, device, generator)
    upstream = torch.randn(case.shape, generator=generator, device=device).to(case.dtype)
    inputs: dict[str, Tensor | None] = {
        "image": images["target"],
        "mask": images["mask"],
        "upstream": upstream,
    }
    for name, parameter in _network("plain").named_parameters():
        value = parameter.detach().to(device, case.dtype)
        if name == "last.weight":
            # It begins as 0, through which no gradient passes.
            value = torch.randn(value.shape, generator=generator, device=device).to(case.dtype) / 10
        inputs[name.replace(".", "__")] = value.clone().requires_grad_()
    return inputs


BENCHMARK = Benchmark(
    op="partial_conv_unet",
    cases=[
        Case((4, 3, 128, 128), "width 32"),
        Case((1, 3, 64, 64), "width 32", quick=True),
        Case((16, 3, 256, 256), "width 32", devices=("cuda",)),
    ],
    make_inputs=make_inputs,
    eager=lambda case: _formula("nvidia"),
    baseline=lambda case: _formula("plain"),
    fused=lambda case, backend: _formula(backend),
    minimum_bytes=lambda case: Bytes(0, 0),
    # Rounding moves features across the kinks of ten layers; seen: 2e-3 for a bias, of NVIDIA's formula.
    tolerances={torch.float32: 5e-3},
    heavy=True,
    compiled=False,
    layer=True,
)
