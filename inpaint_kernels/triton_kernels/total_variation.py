"""Total variation in Triton: launchers of the kernels in `pairs_*.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import pairs_backward, pairs_forward, plan

# There is no total that the term would enter.
_NO_WEIGHTS = (0.0, 0.0, 0.0)


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
    signs = pairs_forward.empty_signs(image, 4, channels_last) if save_signs else None
    if image.numel():
        with plan.on_device(image):
            sums = pairs_forward.launch_forward(
                image,
                target,
                mask,
                signs,
                channels_last,
                region,
                penalty,
                mask_is_hole,
                losses=False,
                weights=False,
                region_sum=normalize == "mask",
            )
            pairs_forward.launch_finalise(
                sums, tv, scale, (None, None, None), _NO_WEIGHTS, image.shape, normalize
            )
    return tv, scale, plan.no_signs(image) if signs is None else signs


def backward(
    grad: Tensor,  # []
    scale: Tensor,  # [2]
    signs: Tensor | None,  # uint8, l1 only
    mask: Tensor | None,  # [H, W] or [N|1, C|1, H, W]
    image: Tensor | None,  # [N, C, H, W], not l1
    target: Tensor | None,  # [N, C, H, W], not l1
    size: Any,
    channels_last: bool,
    image_dtype: torch.dtype,
    target_dtype: torch.dtype,
    composite: bool,
    region: str,
    penalty: str,
    mask_is_hole: bool,
    need_image: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_image, grad_target) of `ops/total_variation.py`."""
    return pairs_backward.launch_backward(
        (None, None, None, grad),
        None,
        scale,
        signs,
        mask,
        image,
        target,
        size,
        channels_last,
        image_dtype,
        target_dtype,
        composite,
        _NO_WEIGHTS,
        region,
        penalty,
        mask_is_hole,
        need_image,
        need_target,
    )
