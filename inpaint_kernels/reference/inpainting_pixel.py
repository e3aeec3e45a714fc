"""Hole, valid and total variation of the composite in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from .hole_valid import hole_valid
from .total_variation import total_variation


def inpainting_pixel(
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    normalize: str,
    tv_region: str,
    tv_penalty: str,
    tv_normalize: str | None,
    mask_is: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(hole, valid, tv), unweighted; tv is that of the composite."""
    hole, valid = hole_valid(pred, target, mask, "l1", 0.0, normalize, mask_is)
    tv = total_variation(pred, mask, tv_region, tv_penalty, tv_normalize, mask_is, target)
    return hole, valid, tv
