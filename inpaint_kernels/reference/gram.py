"""Gram matrices in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .masked_l1 import accumulate_dtype


def gram_scale(normalize: str, channels: int, pixels: int) -> float:
    """Factor of F F^T: 1/(C H W) for "chw", 1/(H W) for "hw", 1 for "none"; 1 where that would divide by zero."""
    count = {"chw": channels * pixels, "hw": pixels, "none": 1}[normalize]
    return 1.0 / count if count else 1.0


def gram_matrix(features: Tensor, *, normalize: str) -> Tensor:
    """(N, C, C) Gram matrices of (N, C, H, W) features, float32 (float64 for float64)."""
    x = features.to(accumulate_dtype(features)).flatten(2)
    with torch.autocast(features.device.type, enabled=False):
        return torch.bmm(x, x.mT) * gram_scale(normalize, x.shape[1], x.shape[2])
