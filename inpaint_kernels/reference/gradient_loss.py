"""Gradient loss in plain PyTorch: differences of neighbours in a composite against those in the truth."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import accumulate_dtype, masked_input, safe_divide
from .hole_valid import region_weights
from .masked_l1 import weighted_map
from .total_variation import dilate, pair_weights


def region_map(hole: Tensor, region: str, ring: int) -> Tensor:
    """The value of every pixel, two of which are multiplied to the weight of a pair; for a region other than "image".

    `hole`: 1 in the hole, 0 where pixels are known.
    """
    if region == "ring":
        # The largest of -hole is minus the smallest of hole, to which erosion takes it.
        largest, minus_smallest = dilate(torch.stack((hole, -hole)), ring)
        return (hole + largest + minus_smallest).clamp(0, 1)
    return dilate(hole) if region == "dilated_hole" else hole


def pairs(image: Tensor, region: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """(weight of the vertical pairs, of the horizontal pairs, sum of both broadcast to the channels of `image`).

    Without a region map every pair weighs 1.
    """
    if region is None:
        count = image[..., 1:, :].numel() + image[..., 1:].numel()
        return None, None, torch.full((), count, dtype=image.dtype, device=image.device)
    down, across, _ = pair_weights(region, "hole")
    repeats = image.numel() // region.numel() if region.numel() else 0
    # Row by row: the bits of a single sum over all would depend on the number of threads.
    by_down, by_across = (weight.sum(-1).sum(-1).sum() for weight in (down, across))
    return down, across, (by_down + by_across) * repeats


def gradient_loss(
    pred: Tensor, target: Tensor, mask: Tensor | None, region: str, ring: int, penalty: str, mask_is: str
) -> tuple[Tensor, Tensor]:
    """(loss, summed weights of the pairs); arguments as `ops/gradient_loss.py`."""
    dtype = accumulate_dtype(pred, target)
    d = pred.to(dtype) - target.to(dtype)
    weights: Tensor | None = None
    if mask is not None:
        hole, _ = region_weights(pred, target, mask, mask_is)
        # composite - target, exactly 0 on known pixels. A difference of the two would lose digits, and be NaN where
        # the target is.
        d = masked_input(d, hole)
        if region != "image":
            weights = region_map(hole, region, ring)
    down, across, summed = pairs(d, weights)
    # The difference of two neighbours in the composite minus that in the target is the difference of d.
    vertical = weighted_map(d[..., 1:, :], d[..., :-1, :], down, penalty, 0.0)
    horizontal = weighted_map(d[..., 1:], d[..., :-1], across, penalty, 0.0)
    return safe_divide(vertical.sum() + horizontal.sum(), summed), summed
