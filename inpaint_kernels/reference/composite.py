"""Composite of prediction and truth in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import accumulate_dtype, masked_input
from .hole_valid import region_weights


def composite(pred: Tensor, target: Tensor, mask: Tensor, *, mask_is: str) -> Tensor:
    """hole * pred + valid * target in the wider dtype of the two; exactly one of them where the mask is 0 or 1."""
    dtype = accumulate_dtype(pred, target)
    hole, valid = region_weights(pred, target, mask, mask_is)
    mixed = masked_input(pred.to(dtype), hole) + masked_input(target.to(dtype), valid)
    return mixed.to(torch.promote_types(pred.dtype, target.dtype))
