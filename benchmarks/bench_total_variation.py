"""Total variation of the whole image, mean over the pairs of each axis, and of a composite in its dilated hole.

The plain formula is the one of naoto0804/pytorch-inpainting-with-partial-conv and of most others: shifted slices,
their absolute difference, its mean. There is no faster one to write for the whole image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bench_inpainting_pixel import dilate, shifted_maxima, total_variation
from .harness import Benchmark, Bytes, Case, Formula, Terms, image_inputs


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Tensor | None]:
    inputs = image_inputs(case, device, generator)
    return inputs if case.variant == "composite-dilated" else {"pred": inputs["pred"]}


def eager(case: Case) -> Formula:
    def whole(pred: Tensor) -> Terms:
        return (total_variation(pred, None),)

    def dilated(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return (total_variation(mask * target + (1 - mask) * pred, dilate(1 - mask)),)

    return dilated if case.variant == "composite-dilated" else whole


def rewrite(case: Case) -> Formula | None:
    def dilated(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return (total_variation(torch.lerp(pred, target, mask), shifted_maxima(1 - mask)),)

    return dilated if case.variant == "composite-dilated" else None


def fused(case: Case, backend: str) -> Formula:
    import inpaint_kernels as ik

    def whole(pred: Tensor) -> Terms:
        return (ik.total_variation_loss(pred, backend=backend),)

    def dilated(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return (ik.total_variation_loss(pred, mask, target=target, region="dilated_hole", backend=backend),)

    return dilated if case.variant == "composite-dilated" else whole


def minimum_bytes(case: Case) -> Bytes:
    """Forward reads the images and the mask and writes 4 sign bits an element; backward writes the gradient."""
    image = case.numel * case.dtype.itemsize
    signs = case.numel // 2
    if case.variant == "composite-dilated":
        mask = image // case.shape[1]
        return Bytes(2 * image + mask + signs, image + mask + signs)
    return Bytes(image + signs, image + signs)


LARGE = (8, 3, 512, 512)
HUGE = (16, 3, 512, 512)

BENCHMARK = Benchmark(
    op="total_variation",
    cases=[
        Case(LARGE, "whole"),
        Case(LARGE, "whole", dtype=torch.bfloat16),
        Case((1, 3, 64, 64), "whole", quick=True),
        Case(LARGE, "whole-channels-last", layout="channels_last"),
        Case(LARGE, "composite-dilated"),
        Case(HUGE, "whole", devices=("cuda",)),
        Case(HUGE, "composite-dilated", devices=("cuda",)),
    ],
    make_inputs=make_inputs,
    eager=eager,
    rewrite=rewrite,
    fused=fused,
    minimum_bytes=minimum_bytes,
    # float32: sums of millions of elements; bfloat16: the plain formula rounds every intermediate to 8 bits.
    tolerances={torch.float32: 1e-5, torch.bfloat16: 2.0**-6},
)
