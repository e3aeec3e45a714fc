"""Hole and valid pixel losses in plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from ._common import accumulate_dtype
from .masked_l1 import reduce_map, weighted_map


def region_weights(pred: Tensor, target: Tensor, mask: Tensor, mask_is: str) -> tuple[Tensor, Tensor]:
    """(hole, valid) weights in the accumulation dtype."""
    mask = mask.to(accumulate_dtype(pred, target))
    return (1 - mask, mask) if mask_is == "valid" else (mask, 1 - mask)


def hole_valid(
    pred: Tensor, target: Tensor, mask: Tensor, penalty: str, param: float, normalize: str, mask_is: str
) -> tuple[Tensor, Tensor]:
    """(hole, valid) losses; arguments as `ops/hole_valid.py`."""
    hole, valid = (
        reduce_map(weighted_map(pred, target, weight, penalty, param), weight, normalize)
        for weight in region_weights(pred, target, mask, mask_is)
    )
    return hole, valid
