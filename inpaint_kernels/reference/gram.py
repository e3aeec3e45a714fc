"""Gram matrices in plain PyTorch."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from ._common import accumulate_dtype


def gram_scale(normalize: str, channels: int, pixels: int) -> float:
    """Factor of F F^T: 1/(C H W) for "chw", 1/(H W) for "hw", else 1; 1 where that would divide by zero."""
    count = {"chw": channels * pixels, "hw": pixels}.get(normalize, 1)
    return 1.0 / count if count else 1.0


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """No autocast for what is computed on the device of x; meta tensors and others know none."""
    kind = x.device.type
    # Where there is none anyway, asking and entering a context would be what a small call costs.
    available = kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)
    if not available or not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def gram_matrix(features: Tensor, *, normalize: str) -> Tensor:
    """(N, C, C) Gram matrices of (N, C, H, W) features, float32 (float64 for float64)."""
    x = features.to(accumulate_dtype(features)).flatten(2)
    with without_autocast(x):
        return torch.bmm(x, x.mT) * gram_scale(normalize, x.shape[1], x.shape[2])
