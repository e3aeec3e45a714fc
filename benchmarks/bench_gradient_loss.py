"""Gradient loss: differences of neighbours in the composite against those in the truth, for a hole and its ring.

The plain formula is what a training script writes: the composite, its differences minus those of the target, pairs
weighed by the region, which pooling over 11x11 pixels dilates and erodes without gradient. The rewrite takes the
differences of ``hole * (pred - target)`` and its maxima by doubling, which torch.compile can fuse.

In float32 alone: rounded to bfloat16, the difference of differences of the plain formula has a wrong sign where it is
small.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import Benchmark, Bytes, Case, Formula, Terms, image_inputs

RING = 5


def pooled(hole: Tensor) -> Tensor:
    return F.max_pool2d(hole, 2 * RING + 1, stride=1, padding=RING)


def doubled(hole: Tensor) -> Tensor:
    """`pooled` by maxima of neighbours, of pairs of them and so on."""
    largest = F.pad(hole, (RING,) * 4, value=-torch.inf)
    for _ in range(2):
        size = 1
        while size < 2 * RING + 1:
            step = min(size, 2 * RING + 1 - size)
            largest = torch.maximum(largest[..., :-step, :], largest[..., step:, :])
            size += step
        largest = largest.mT
    return largest


def mean_of_pairs(down: Tensor, across: Tensor, region: Tensor) -> Tensor:
    with torch.no_grad():
        by_down, by_across = region[..., 1:, :] * region[..., :-1, :], region[..., 1:] * region[..., :-1]
        count = down.shape[1] * (by_down.sum() + by_across.sum())
    return ((by_down * down.abs()).sum() + (by_across * across.abs()).sum()) / count


def eager(case: Case) -> Formula:
    def formula(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        hole = 1 - mask
        with torch.no_grad():
            region = (hole + pooled(hole) + pooled(-hole)).clamp(0, 1)
        composite = mask * target + hole * pred
        down = (composite[..., 1:, :] - composite[..., :-1, :]) - (target[..., 1:, :] - target[..., :-1, :])
        across = (composite[..., 1:] - composite[..., :-1]) - (target[..., 1:] - target[..., :-1])
        return (mean_of_pairs(down, across, region),)

    return formula


def rewrite(case: Case) -> Formula:
    def formula(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        hole = 1 - mask
        with torch.no_grad():
            region = (hole + doubled(hole) + doubled(-hole)).clamp(0, 1)
        d = hole * (pred - target)
        return (mean_of_pairs(d[..., 1:, :] - d[..., :-1, :], d[..., 1:] - d[..., :-1], region),)

    return formula


def fused(case: Case, backend: str) -> Formula:
    import inpaint_kernels as ik

    def formula(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return (ik.gradient_loss(pred, target, mask, ring=RING, backend=backend),)

    return formula


def minimum_bytes(case: Case) -> Bytes:
    """Forward reads pred, target and the one-channel mask; backward writes the gradient and reads the mask.

    What passes from one to the other is 4 sign bits an element.
    """
    image = case.numel * case.dtype.itemsize
    mask = image // case.shape[1]
    signs = case.numel // 2
    return Bytes(2 * image + mask + signs, image + mask + signs)


LARGE = (8, 3, 512, 512)

BENCHMARK = Benchmark(
    op="gradient_loss",
    cases=[
        Case(LARGE, "ring"),
        Case((1, 3, 64, 64), "ring", quick=True),
        Case(LARGE, "ring-channels-last", layout="channels_last"),
        Case((16, 3, 512, 512), "ring", devices=("cuda",)),
    ],
    make_inputs=image_inputs,
    eager=eager,
    rewrite=rewrite,
    fused=fused,
    minimum_bytes=minimum_bytes,
    tolerances={torch.float32: 1e-5},  # sums of millions of elements
)
