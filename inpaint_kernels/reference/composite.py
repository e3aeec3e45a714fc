"""Composite of prediction and truth, and the regions it is made of, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .masked_l1 import accumulate_dtype


def region_map(mask: Tensor, mask_is: str, dtype: torch.dtype) -> Tensor:
    """1 inside the hole."""
    mask = mask.to(dtype)
    return 1 - mask if mask_is == "valid" else mask


def dilate(hole: Tensor) -> Tensor:
    """Maximum over the 3x3 neighbourhood, which ends at the border of the image: (..., H, W)."""
    if hole.numel() == 0:
        return hole
    planes = hole.reshape(-1, 1, *hole.shape[-2:])
    return F.max_pool2d(planes, 3, stride=1, padding=1).reshape(hole.shape)


def composite(pred: Tensor, target: Tensor, mask: Tensor, *, mask_is: str) -> Tensor:
    """hole * pred + (1 - hole) * target in the wider dtype of the two; exactly one of them where hole is 0 or 1."""
    dtype = accumulate_dtype(pred, target)
    hole = region_map(mask, mask_is, dtype)
    p, t = pred.to(dtype), target.to(dtype)
    inside, outside = hole == 1, hole == 0
    # NaN under a weight of 0 must neither reach the sum nor, as 0 * NaN, the gradient of a mask.
    zero = torch.zeros((), dtype=dtype, device=p.device)
    mixed = hole * torch.where(outside, zero, p) + (1 - hole) * torch.where(inside, zero, t)
    return mixed.to(torch.promote_types(pred.dtype, target.dtype))
