"""Launchers of the hole and valid pixel losses: the kernels of `pixel_*.py` on one layer and two regions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import pixel_backward, pixel_forward, plan
from .pixel_tile import Pair


def forward(
    pred: Tensor,  # [N, C, H, W]
    target: Tensor,  # [N, C, H, W]
    mask: Tensor,  # [H, W] or [N|1, C|1, H, W]
    penalty: str,
    param: float,
    normalize: str,
    mask_is_hole: bool,
    save_signs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hole, valid, scale, signs) of `ops/hole_valid.py`."""
    n = pred.shape[0]
    make = torch.empty if pred.numel() else torch.zeros
    hole, valid = (make((), dtype=torch.float32, device=pred.device) for _ in range(2))
    scale = make((n, 2), dtype=torch.float32, device=pred.device)
    signs = plan.empty_signs(pred, pred.shape, plan.is_channels_last(pred), save_signs)
    if pred.numel():
        pair = Pair(n, pred, target, mask, signs if save_signs else None)
        pixel_forward.launch_forward(
            [pair], [hole, valid], scale, penalty, param, normalize, mask_is_hole=mask_is_hole, samples=n
        )
    return hole, valid, scale, signs


def backward(
    grad_hole: Tensor | None,  # []
    grad_valid: Tensor | None,  # []
    *image_and_settings: Any,  # the arguments of `pixel_backward.image_backward` without `grads`
) -> tuple[Tensor, Tensor]:
    """(grad_pred, grad_target) of `ops/hole_valid.py`; a region without gradient contributes nothing."""
    return pixel_backward.image_backward([grad_hole, grad_valid], *image_and_settings)
