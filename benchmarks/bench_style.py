"""L1 distance of Gram matrices, the style term of partial convolution and its descendants.

The plain formula is the published one: `bmm / (c * h * w)` of prediction and target in every step, then
`F.l1_loss`, summed over layers. The rewrite folds the scale into the product, and its backward uses that the
gradient of an L1 distance of two symmetric matrices is symmetric: one product instead of two and an addition.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import Benchmark, Bytes, Case, Formula, Terms, feature_inputs, layers


def _gram(features: Tensor) -> Tensor:
    n, c, h, w = features.shape
    flat = features.view(n, c, h * w)
    return torch.bmm(flat, flat.transpose(1, 2)) / (c * h * w)


def eager(case: Case) -> Formula:
    count = len(layers(case))

    def formula(**maps: Tensor) -> Terms:
        loss = F.l1_loss(_gram(maps["input0"]), _gram(maps["target0"]))
        for i in range(1, count):
            loss = loss + F.l1_loss(_gram(maps[f"input{i}"]), _gram(maps[f"target{i}"]))
        return (loss,)

    return formula


class _GramL1(torch.autograd.Function):
    """mean |s x x^T - goal|, with the gradient 2 s sign(...) x / count from one product."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, goal: Tensor) -> Tensor:
        n, c, h, w = features.shape
        flat = features.reshape(n, c, h * w)
        scale = 1.0 / (c * h * w)
        difference = torch.baddbmm(goal, flat, flat.transpose(1, 2), beta=-1.0, alpha=scale)
        ctx.save_for_backward(torch.sign(difference), features)
        ctx.factor = 2 * scale / difference.numel()
        return difference.abs().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        signs, features = ctx.saved_tensors
        flat = features.reshape(*features.shape[:2], -1)
        out = torch.bmm(signs * (grad * ctx.factor), flat)
        return out.view(features.shape), None


def rewrite(case: Case) -> Formula:
    count = len(layers(case))

    def goal(features: Tensor) -> Tensor:
        n, c, h, w = features.shape
        flat = features.reshape(n, c, h * w)
        empty = flat.new_empty((n, c, c))
        return torch.baddbmm(empty, flat, flat.transpose(1, 2), beta=0.0, alpha=1.0 / (c * h * w))

    def formula(**maps: Tensor) -> Terms:
        loss: Tensor = _GramL1.apply(maps["input0"], goal(maps["target0"]))
        for i in range(1, count):
            loss = loss + _GramL1.apply(maps[f"input{i}"], goal(maps[f"target{i}"]))
        return (loss,)

    return formula


def fused(case: Case, backend: str) -> Formula:
    import inpaint_kernels as ik

    count = len(layers(case))

    def formula(**maps: Tensor) -> Terms:
        inputs, targets = ([maps[f"{name}{i}"] for i in range(count)] for name in ("input", "target"))
        return (ik.style_loss(inputs, targets, penalty="l1", normalize="chw", backend=backend),)

    return formula


def minimum_bytes(case: Case) -> Bytes:
    """Forward reads both maps, backward reads the input and writes its gradient; C x C signs pass in between.

    Where channels are many the arithmetic takes longer than this traffic.
    """
    n, size = case.shape[0], case.dtype.itemsize
    maps = sum(n * c * h * w * size for c, h, w in layers(case))
    signs = sum(n * c * c // 4 for c, _, _ in layers(case))
    return Bytes(2 * maps + signs, 2 * maps + signs)


RELU1 = (4, 64, 256, 256)
POOLS = {"vgg16": True}

BENCHMARK = Benchmark(
    op="style",
    cases=[
        Case(RELU1, "l1"),
        Case(RELU1, "l1", dtype=torch.bfloat16),
        Case((4, 128, 128, 128), "l1"),
        Case((4, 256, 64, 64), "l1"),
        Case((4, 512, 32, 32), "l1"),
        Case((4, 3, 256, 256), "vgg16 pool1-3", options=POOLS),
        Case((1, 64, 8, 8), "l1", quick=True),
        Case((16, 3, 512, 512), "vgg16 pool1-3", options=POOLS, devices=("cuda",)),
        Case((16, 3, 512, 512), "vgg16 pool1-3", torch.bfloat16, options=POOLS, devices=("cuda",)),
    ],
    make_inputs=feature_inputs,
    eager=eager,
    rewrite=rewrite,
    fused=fused,
    minimum_bytes=minimum_bytes,
    # float32: products over up to 65536 pixels; bfloat16: the plain formula rounds the matrices to 8 bits.
    tolerances={torch.float32: 2e-5, torch.bfloat16: 2.0**-6},
)
