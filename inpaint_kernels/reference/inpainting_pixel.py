"""Hole, valid and total variation of the composite in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from .hole_valid import hole_valid
from .total_variation import total_variation


def inpainting_pixel(
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    normalize: str,
    tv_region: str,
    tv_penalty: str,
    tv_normalize: str | None,
    mask_is: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(hole, valid, tv), unweighted; tv is that of the composite."""
    hole, valid = hole_valid(
        pred, target, mask, penalty="l1", param=0.0, normalize=normalize, mask_is=mask_is
    )
    tv = total_variation(
        pred,
        mask,
        target=target,
        region=tv_region,
        penalty=tv_penalty,
        normalize=tv_normalize,
        mask_is=mask_is,
    )
    return hole, valid, tv
