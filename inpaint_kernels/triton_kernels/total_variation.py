"""Total variation in Triton: launchers of the kernels in `pairs_*.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import pairs_backward, pairs_forward, pairs_tile, plan


def forward(
    image: Tensor,  # [N, C, H, W]
    target: Tensor | None,  # [N, C, H, W]
    mask: Tensor | None,  # [H, W] or [N|1, C|1, H, W]
    region: str,
    penalty: str,
    normalize: str,
    mask_is_hole: bool,
    save_signs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(tv, scale, signs) of `ops/total_variation.py`."""
    make = torch.empty if image.numel() else torch.zeros
    tv = make((), dtype=torch.float32, device=image.device)
    scale = make(2, dtype=torch.float32, device=image.device)
    channels_last = plan.is_channels_last(image)
    signs = pairs_forward.empty_signs(image, 4, channels_last, save_signs)
    if image.numel():
        with plan.on_device(image):
            sums = pairs_forward.launch_forward(
                image,
                target,
                mask,
                signs if save_signs else None,
                channels_last,
                region,
                penalty,
                mask_is_hole,
                losses=False,
                weights=False,
                region_sum=normalize == "mask",
            )
            pairs_forward.launch_finalize(
                sums, tv, scale, (None, None, None), pairs_tile.NO_WEIGHTS, image.shape, normalize
            )
    return tv, scale, signs


def backward(
    grad: Tensor,  # []
    scale: Tensor,  # [2]
    *image_and_settings: Any,  # the arguments of `pairs_backward.launch_backward` from `signs` to `need_target`
) -> tuple[Tensor, Tensor]:
    """(grad_image, grad_target) of `ops/total_variation.py`."""
    return pairs_backward.launch_backward((None, None, None, grad), None, scale, *image_and_settings)
