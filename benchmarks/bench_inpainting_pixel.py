"""Pixel terms of the partial-convolution objective: 6 hole + valid + 0.1 total variation of the composite.

The plain formula is the published one as training scripts write it: masked L1 terms, the composite, the hole
dilated by a 3x3 maximum without gradient, differences of neighbours weighed by the product of their dilated holes.
The rewrite compares once, adds up hole and valid by one weight and dilates by shifted maxima, which torch.compile
can fuse.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import Benchmark, Bytes, Case, Formula, Terms, image_inputs

HOLE_WEIGHT, VALID_WEIGHT, TV_WEIGHT = 6.0, 1.0, 0.1


def _region(case: Case) -> str:
    return str(case.options.get("tv_region", "dilated_hole"))


def dilate(hole: Tensor) -> Tensor:
    with torch.no_grad():
        return F.max_pool2d(hole, 3, stride=1, padding=1)


def shifted_maxima(hole: Tensor) -> Tensor:
    with torch.no_grad():
        rows = F.pad(hole, (0, 0, 1, 1))
        rows = torch.maximum(torch.maximum(rows[..., :-2, :], rows[..., 1:-1, :]), rows[..., 2:, :])
        rows = F.pad(rows, (1, 1))
        return torch.maximum(torch.maximum(rows[..., :-2], rows[..., 1:-1]), rows[..., 2:])


def total_variation(image: Tensor, region: Tensor | None) -> Tensor:
    down = (image[..., 1:, :] - image[..., :-1, :]).abs()
    across = (image[..., 1:] - image[..., :-1]).abs()
    if region is None:
        return down.mean() + across.mean()
    down = down * (region[..., 1:, :] * region[..., :-1, :])
    across = across * (region[..., 1:] * region[..., :-1])
    return (down.sum() + across.sum()) / image.numel()


def eager(case: Case) -> Formula:
    def formula(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        hole = F.l1_loss((1 - mask) * pred, (1 - mask) * target)
        valid = F.l1_loss(mask * pred, mask * target)
        composite = mask * target + (1 - mask) * pred
        region = dilate(1 - mask) if _region(case) == "dilated_hole" else None
        tv = total_variation(composite, region)
        return (HOLE_WEIGHT * hole + VALID_WEIGHT * valid + TV_WEIGHT * tv,)

    return formula


def rewrite(case: Case) -> Formula:
    def formula(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        weight = HOLE_WEIGHT + (VALID_WEIGHT - HOLE_WEIGHT) * mask
        pixel = (weight * (pred - target).abs()).mean()
        composite = torch.lerp(pred, target, mask)
        region = shifted_maxima(1 - mask) if _region(case) == "dilated_hole" else None
        return (pixel + TV_WEIGHT * total_variation(composite, region),)

    return formula


def fused(case: Case, backend: str) -> Formula:
    import inpaint_kernels as ik

    def formula(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        terms = ik.inpainting_pixel_loss(pred, target, mask, tv_region=_region(case), backend=backend)
        return (terms.total,)

    return formula


def minimum_bytes(case: Case) -> Bytes:
    """Forward reads pred, target and the one-channel mask; backward writes the gradient and reads the mask.

    What passes from one to the other is 6 sign bits an element.
    """
    image = case.numel * case.dtype.itemsize
    mask = image // case.shape[1]
    signs = 3 * case.numel // 4
    return Bytes(2 * image + mask + signs, image + mask + signs)


LARGE = (8, 3, 512, 512)
HUGE = (16, 3, 512, 512)

BENCHMARK = Benchmark(
    op="inpainting_pixel",
    cases=[
        Case(LARGE, "dilated"),
        Case(LARGE, "dilated", dtype=torch.bfloat16),
        Case((1, 3, 64, 64), "dilated", quick=True),
        Case(LARGE, "dilated-channels-last", layout="channels_last"),
        Case(LARGE, "whole-image", options={"tv_region": "image"}),
        Case(HUGE, "dilated", devices=("cuda",)),
        Case(HUGE, "dilated", dtype=torch.bfloat16, devices=("cuda",)),
    ],
    make_inputs=image_inputs,
    eager=eager,
    rewrite=rewrite,
    fused=fused,
    minimum_bytes=minimum_bytes,
    # float32: sums of millions of elements; bfloat16: the plain formula rounds every intermediate to 8 bits, and the
    # gradient of a pixel is a sum of five terms.
    tolerances={torch.float32: 1e-5, torch.bfloat16: 2.0**-5},
)
