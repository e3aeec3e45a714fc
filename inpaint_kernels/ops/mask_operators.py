"""What an objective does to a mask besides weighing with it; plain PyTorch, once a step and without gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import total_variation as reference
from . import _checks

RESIZE_MODES = ("nearest", "bilinear", "bilinear_aligned", "adaptive_max", "area")


def _checked(mask: Tensor) -> Tensor:
    """The mask without its graph, an integer one as bool."""
    mask = _checks.binary(mask)
    if mask.ndim not in (2, 4):
        raise ValueError(
            f"mask must have shape (H, W), (N, 1, H, W) or (N, C, H, W), got {tuple(mask.shape)}"
        )
    return mask.detach()


def _floating(mask: Tensor) -> Tensor:
    """In a dtype that pooling and interpolation know, and that holds every value of the mask's."""
    return mask if mask.dtype == torch.float64 else mask.to(torch.float32)


def dilate_mask(mask: Tensor, radius: int = 1) -> Tensor:
    """The largest value of the ``(2 * radius + 1)^2`` neighbourhood, which ends at the border of the image.

    What is 1 grows: a hole where the mask is 1 inside it, the known region where the mask is 1 there.

    Args:
        mask: (H, W), (N, 1, H, W) or (N, C, H, W); floating, bool or an integer (nonzero counts as 1).
        radius: in pixels, 0 or more.

    Returns:
        As `mask` in shape and dtype. Differentiable in nothing: a mask is data.

    Raises:
        TypeError: `mask` is no tensor or has another dtype, or `radius` is no integer.
        ValueError: `mask` has another number of dimensions, or `radius` is negative.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> ik.dilate_mask(torch.tensor([[0, 0, 0, 1]], dtype=torch.bool))
        tensor([[False, False,  True,  True]])
    """
    checked = _checked(mask)
    _checks.check_count("radius", radius, 0)
    return reference.dilate(_floating(checked), radius).to(mask.dtype, copy=True)


def resized(mask: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """`resize_mask` of arguments that were checked, with the mask's graph, in the dtype it is computed in."""
    planes = _floating(mask).reshape(-1, 1, *mask.shape[-2:])
    sides = size[0], size[1]
    if mode == "adaptive_max":
        planes = F.adaptive_max_pool2d(planes, sides)
    elif mode == "area":
        planes = F.adaptive_avg_pool2d(planes, sides)
    elif mode == "nearest":
        planes = F.interpolate(planes, sides, mode=mode)
    else:
        planes = F.interpolate(planes, sides, mode="bilinear", align_corners=mode == "bilinear_aligned")
    return planes.reshape(*mask.shape[:-2], *sides)


def resize_mask(mask: Tensor, size: int | Sequence[int], mode: str = "nearest") -> Tensor:
    """The mask at another resolution, that of a feature map or of a critic's logits.

    Args:
        mask: (H, W), (N, 1, H, W) or (N, C, H, W); floating, bool or an integer (nonzero counts as 1).
        size: (H', W'), or one number for both.
        mode: "nearest" and "bilinear" as torch.nn.functional.interpolate; "bilinear_aligned" = with
            ``align_corners=True``; "adaptive_max" = the largest value each output pixel covers; "area" = the mean.

    Returns:
        `mask` with the last two dimensions replaced by `size`, in the same dtype; where fractions arise ("bilinear",
        "bilinear_aligned", "area"), in float32 for a bool or integer mask. Differentiable in nothing: a mask is data.

    Raises:
        TypeError: `mask` is no tensor or has another dtype, or `size` is made of other things than integers.
        ValueError: `mask` has another number of dimensions or is empty, `size` is no pair of positive numbers, or
            `mode` is unknown.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> mask = torch.tensor([[0, 0, 1, 0]], dtype=torch.uint8)
        >>> ik.resize_mask(mask, (1, 2))
        tensor([[0, 1]], dtype=torch.uint8)
        >>> ik.resize_mask(mask, (1, 2), "area")
        tensor([[0.0000, 0.5000]])
    """
    checked = _checked(mask)
    _checks.check_choice("mode", mode, RESIZE_MODES)
    sides = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(sides) != 2:
        raise ValueError(f"size must be a number or (H, W), got {size!r}")
    for side in sides:
        _checks.check_count("size", side, 1)
    if mask.shape[-1] == 0 or mask.shape[-2] == 0:
        raise ValueError(f"mask has no pixel to resize, got shape {tuple(mask.shape)}")
    dtype = mask.dtype
    if not dtype.is_floating_point and mode not in ("nearest", "adaptive_max"):
        dtype = torch.float32
    return resized(checked, sides, mode).to(dtype)


def binarize_mask(mask: Tensor, threshold: float = 0.5) -> Tensor:
    """1 where the mask is greater than the threshold, else 0.

    Args:
        mask: (H, W), (N, 1, H, W) or (N, C, H, W); floating, bool or an integer (nonzero counts as 1).
        threshold: 0 for the loaders that count every value above 0.

    Returns:
        As `mask` in shape and dtype. Differentiable in nothing: a mask is data.

    Raises:
        TypeError: `mask` is no tensor or has another dtype, or `threshold` is no number.
        ValueError: `mask` has another number of dimensions, or `threshold` is not finite.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> ik.binarize_mask(torch.tensor([[0.2, 0.5, 0.8]]))
        tensor([[0., 0., 1.]])
    """
    checked = _checked(mask)
    return (checked > _checks.check_number("threshold", threshold)).to(mask.dtype)


def invert_mask(mask: Tensor) -> Tensor:
    """``1 - mask``: known and hole change places.

    Args:
        mask: (H, W), (N, 1, H, W) or (N, C, H, W); floating, bool or an integer (nonzero counts as 1).

    Returns:
        As `mask` in shape and dtype. Differentiable in nothing: a mask is data.

    Raises:
        TypeError: `mask` is no tensor or has another dtype.
        ValueError: `mask` has another number of dimensions.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> ik.invert_mask(torch.tensor([[0.0, 0.25, 1.0]]))
        tensor([[1.0000, 0.7500, 0.0000]])
    """
    checked = _checked(mask)
    return 1 - checked if checked.dtype.is_floating_point else (checked == 0).to(mask.dtype)
