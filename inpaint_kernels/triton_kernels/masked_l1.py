"""Launchers of the masked pixel losses: the kernels of `pixel_*.py` on one layer and one region.

`reduction="none"` stores w * penalty(d) instead of sums and needs no second stage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import pixel_backward, pixel_forward, plan
from .pixel_tile import Pair


def forward(
    pred: Tensor,  # [N, C, H, W]
    target: Tensor,  # [N, C, H, W]
    mask: Tensor | None,  # [H, W] or [N|1, C|1, H, W]
    penalty: str,
    param: float,
    reduction: str,
    normalize: str,
    save_signs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, scale, signs) of `ops/masked_l1.py`."""
    n, channels_last = pred.shape[0], plan.is_channels_last(pred)
    if reduction == "none":
        scale = torch.empty(0, dtype=torch.float32, device=pred.device)
        out = plan.empty_image(pred, pred.shape, channels_last, torch.float32)
    else:
        make = torch.empty if pred.numel() else torch.zeros
        scale = make((n, 1), dtype=torch.float32, device=pred.device)
        out = make((), dtype=torch.float32, device=pred.device)
    signs = plan.empty_signs(pred, pred.shape, channels_last, save_signs)
    if pred.numel():
        normalize = "sum" if reduction == "sum" else normalize
        pair = Pair(n, pred, target, mask, signs if save_signs else None)
        pixel_forward.launch_forward([pair], [out], scale, penalty, param, normalize, samples=n)
    return out, scale, signs


def backward(
    grad: Tensor,  # [], or [N, C, H, W] for reduction "none"
    *image_and_settings: Any,  # the arguments of `pixel_backward.image_backward` without `grads`, `mask_is_hole`
) -> tuple[Tensor, Tensor]:
    """(grad_pred, grad_target) of `ops/masked_l1.py`."""
    settings = list(image_and_settings)
    # `mask_is_hole`: there is one region.
    settings.insert(-2, None)
    return pixel_backward.image_backward([grad], *settings)
