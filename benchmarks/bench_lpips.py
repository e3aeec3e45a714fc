"""Distance of LPIPS over the maps it reads of AlexNet and of VGG16.

The plain formula is that of the lpips package: every map divided by its norm over the channels, the squared
difference through a 1x1 convolution with the layer's weights, the mean over the pixels, layer by layer. The rewrite
multiplies the square out: five sums over the channels, which one pass over both maps can take, so that nothing of a
map's size is written but the gradient.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import Benchmark, Bytes, Case, Formula, Terms, feature_inputs, layers

EPS = 1e-10


def _normalized(features: Tensor) -> Tensor:
    return features / (torch.sqrt(torch.sum(features**2, dim=1, keepdim=True)) + EPS)


def distance(maps: dict[str, Tensor]) -> Terms:
    """Of the maps input0, target0 with weights0, and so on."""
    total: Tensor | None = None
    for i in range(len(maps) // 3):
        difference = (_normalized(maps[f"input{i}"]) - _normalized(maps[f"target{i}"])) ** 2
        weight = maps[f"weights{i}"].view(1, -1, 1, 1)
        layer = F.conv2d(difference, weight).mean([2, 3], keepdim=True)
        total = layer if total is None else total + layer
    assert total is not None
    return (total.mean(),)


def eager(case: Case) -> Formula:
    return lambda **maps: distance(maps)


def _multiplied_out(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    w = weights.view(1, -1, 1, 1)
    r, s = (1.0 / ((t * t).sum(1).sqrt() + EPS) for t in (x, y))
    wx = w * x
    squares = (wx * x).sum(1) * r * r - 2.0 * (wx * y).sum(1) * r * s + (w * y * y).sum(1) * s * s
    return squares.mean()


def rewrite(case: Case) -> Formula:
    count = len(layers(case))

    def formula(**maps: Tensor) -> Terms:
        terms = [
            _multiplied_out(maps[f"input{i}"], maps[f"target{i}"], maps[f"weights{i}"]) for i in range(count)
        ]
        loss = terms[0]
        for term in terms[1:]:
            loss = loss + term
        return (loss,)

    return formula


def fused(case: Case, backend: str) -> Formula:
    import inpaint_kernels as ik

    count = len(layers(case))

    def formula(**maps: Tensor) -> Terms:
        inputs, targets, weights = (
            [maps[f"{name}{i}"] for i in range(count)] for name in ("input", "target", "weights")
        )
        return (ik.lpips_distance(inputs, targets, weights, backend=backend),)

    return formula


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Tensor | None]:
    inputs = feature_inputs(case, device, generator)
    for i, (channels, _, _) in enumerate(layers(case)):
        inputs[f"weights{i}"] = torch.rand(channels, generator=generator, device=device).to(case.dtype)
    return inputs


def minimum_bytes(case: Case) -> Bytes:
    """Forward reads both maps, backward reads them again and writes the gradient of one."""
    maps = sum(case.shape[0] * c * h * w * case.dtype.itemsize for c, h, w in layers(case))
    return Bytes(2 * maps, 3 * maps)


ALEXNET, VGG16 = {"net": "alexnet", "least_side": 64}, {"net": "vgg16", "least_side": 64}

BENCHMARK = Benchmark(
    op="lpips",
    cases=[
        Case((8, 3, 256, 256), "alexnet", options=ALEXNET),
        Case((2, 3, 256, 256), "vgg16", options=VGG16),
        Case((8, 3, 256, 256), "alexnet channels_last", layout="channels_last", options=ALEXNET),
        Case((8, 3, 256, 256), "alexnet", torch.bfloat16, options=ALEXNET),
        Case((1, 3, 64, 64), "alexnet", options=ALEXNET, quick=True),
        Case((16, 3, 256, 256), "vgg16", options=VGG16, devices=("cuda",)),
        Case((16, 3, 256, 256), "vgg16", torch.bfloat16, options=VGG16, devices=("cuda",)),
    ],
    make_inputs=make_inputs,
    eager=eager,
    rewrite=rewrite,
    fused=fused,
    minimum_bytes=minimum_bytes,
    # float32: the rewrite's differences of sums; bfloat16: the plain formula rounds every intermediate to 8 bits.
    tolerances={torch.float32: 2e-5, torch.bfloat16: 2.0**-4},
)
