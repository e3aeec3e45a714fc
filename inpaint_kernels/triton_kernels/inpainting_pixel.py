"""Hole, valid and total variation of the composite in Triton: launchers of the kernels in `pairs_*.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import pairs_backward, pairs_forward, pixel_forward, plan


def forward(
    pred: Tensor,  # [N, C, H, W]
    target: Tensor,  # [N, C, H, W]
    mask: Tensor,  # [H, W] or [N|1, C|1, H, W]
    hole_weight: float,
    valid_weight: float,
    tv_weight: float,
    normalize: str,
    tv_region: str,
    tv_normalize: str,
    mask_is_hole: bool,
    save_signs: bool,
) -> tuple[Tensor, ...]:
    """(total, hole, valid, tv, scale, tv_scale, signs) of `ops/inpainting_pixel.py`."""
    size, n = pred.shape, pred.shape[0]
    make = torch.empty if pred.numel() else torch.zeros
    total, hole, valid, tv = (make((), dtype=torch.float32, device=pred.device) for _ in range(4))
    scale = make((n, 2), dtype=torch.float32, device=pred.device)
    tv_scale = make(2, dtype=torch.float32, device=pred.device)
    channels_last = plan.is_channels_last(pred)
    signs = pairs_forward.empty_signs(pred, 6, channels_last, save_signs)
    if pred.numel():
        with plan.on_device(pred):
            sums = pairs_forward.launch_forward(
                pred,
                target,
                mask,
                signs if save_signs else None,
                channels_last,
                tv_region,
                "l1",
                mask_is_hole,
                losses=True,
                weights=normalize in ("mask", "sample"),
                region_sum=tv_normalize == "mask",
            )
            # It reads the first sums alone.
            firsts = 0, sums.shape[1]
            pixel_forward.launch_finalize(sums, (hole, valid), scale, firsts, (pred.numel(),), normalize, n)
            weights = hole_weight, valid_weight, tv_weight
            pairs_forward.launch_finalize(
                sums, tv, tv_scale, (total, hole, valid), weights, size, tv_normalize
            )
    return total, hole, valid, tv, scale, tv_scale, signs


def backward(
    grad_total: Tensor | None,  # []
    grad_hole: Tensor | None,  # []
    grad_valid: Tensor | None,  # []
    grad_tv: Tensor | None,  # []
    scale: Tensor,  # [N, 2]
    tv_scale: Tensor,  # [2]
    signs: Tensor,  # uint8
    mask: Tensor,  # [H, W] or [N|1, C|1, H, W]
    size: Any,
    channels_last: bool,
    pred_dtype: torch.dtype,
    target_dtype: torch.dtype,
    hole_weight: float,
    valid_weight: float,
    tv_weight: float,
    tv_region: str,
    mask_is_hole: bool,
    need_pred: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_pred, grad_target) of `ops/inpainting_pixel.py`."""
    return pairs_backward.launch_backward(
        (grad_total, grad_hole, grad_valid, grad_tv),
        scale,
        tv_scale,
        signs,
        mask,
        None,
        None,
        size,
        channels_last,
        pred_dtype,
        target_dtype,
        True,
        tv_region,
        "l1",
        mask_is_hole,
        need_pred,
        need_target,
        (hole_weight, valid_weight, tv_weight),
    )
