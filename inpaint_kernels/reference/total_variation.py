"""Total variation in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import accumulate_dtype, is_differentiated, safe_divide
from .composite import composite
from .hole_valid import region_weights
from .masked_l1 import weighted_map


def dilate(hole: Tensor, radius: int = 1) -> Tensor:
    """Maximum over the square neighbourhood, 3x3 for radius 1, which ends at the border of the image: (..., H, W).

    That of the rows, then that of the columns: 2 (2 r + 1) comparisons a pixel instead of (2 r + 1)^2. In this order
    the gradient at ties goes to the first of the square's pixels, as that of one pooling of the square does.
    """
    if hole.numel() == 0:
        return hole
    if hole.device.type == "cpu" and not is_differentiated(hole):
        return _dilate_doubling(hole, radius)
    size = 2 * radius + 1
    planes = hole.reshape(-1, 1, *hole.shape[-2:])
    rows = F.max_pool2d(planes, (1, size), stride=1, padding=(0, radius))
    return F.max_pool2d(rows, (size, 1), stride=1, padding=(radius, 0)).reshape(hole.shape)


def _dilate_doubling(hole: Tensor, radius: int) -> Tensor:
    """`dilate` by maxima of neighbours, then of pairs, of fours and so on: 2 log2(2 r + 1) comparisons a pixel, which
    the CPU makes of many pixels at once, where pooling takes them one by one. A gradient would be split at ties."""
    largest = F.pad(hole, (radius,) * 4, value=-torch.inf)
    for _ in range(2):  # down, then across
        size = 1
        while size < 2 * radius + 1:
            step = min(size, 2 * radius + 1 - size)
            largest = torch.maximum(largest[..., :-step, :], largest[..., step:, :])
            size += step
        largest = largest.mT
    return largest


def pair_weights(hole: Tensor, region: str) -> tuple[Tensor, Tensor, Tensor]:
    """(weight of the vertical pairs, of the horizontal pairs, region map) for a region other than "image"."""
    if region == "dilated_hole":
        hole = dilate(hole)
    top, left = hole[..., :-1, :], hole[..., :-1]
    if region == "first_pixel":
        return top, left, hole
    return top * hole[..., 1:, :], left * hole[..., 1:], hole


def total_variation(
    image: Tensor,
    mask: Tensor | None,
    region: str,
    penalty: str,
    normalize: str | None,
    mask_is: str,
    target: Tensor | None = None,
) -> Tensor:
    """Scalar: penalty of the differences of neighbours, summed down and across with the weights of `region`.

    With `target`, of the composite of `image` and `target`, formed in the accumulation dtype.
    `normalize`: "pairs" = mean over the pairs of each axis, the two means added; "image" = both sums over numel;
    "mask" = each axis' sum over the summed region map (broadcast over channels), the two added; None = "pairs" for
    the whole image, else "image".
    """
    dtype = accumulate_dtype(image) if target is None else accumulate_dtype(image, target)
    x = image.to(dtype)
    if target is not None:
        assert mask is not None
        x = composite(x, target.to(dtype), mask, mask_is=mask_is)
    if x.numel() == 0:
        return x.sum()
    down: Tensor | None = None
    across: Tensor | None = None
    summed = torch.full((), x.numel(), dtype=dtype, device=x.device)
    if region != "image":
        assert mask is not None
        down, across, weight = pair_weights(region_weights(x, x, mask, mask_is)[0], region)
        summed = weight.expand(x.shape).sum()
    vertical = weighted_map(x[..., 1:, :], x[..., :-1, :], down, penalty, 0.0)
    horizontal = weighted_map(x[..., 1:], x[..., :-1], across, penalty, 0.0)
    if normalize is None:
        normalize = "pairs" if region == "image" else "image"
    if normalize == "mask":
        return safe_divide(vertical.sum(), summed) + safe_divide(horizontal.sum(), summed)
    if normalize == "image":
        return (vertical.sum() + horizontal.sum()) / x.numel()
    # An image of one row has no vertical pair: 0 / 1, not 0 / 0.
    return vertical.sum() / max(vertical.numel(), 1) + horizontal.sum() / max(horizontal.numel(), 1)
