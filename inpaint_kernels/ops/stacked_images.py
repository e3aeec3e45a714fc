"""What a feature trunk reads: prediction, composite and truth, normalised, written as one batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..reference import stacked_images as reference
from ..reference._common import masked_input
from ..reference.hole_valid import region_weights
from . import _checks, _pixel

PARTS = reference.PARTS
# The most parts, and the most channels with constants of their own, that a Triton kernel takes: it writes out each.
MOST_ON_TRITON = 8


def _channels(image: Tensor, scale: Sequence[float], shift: Sequence[float]) -> int:
    channels: int = image.shape[1]
    return max(channels, len(scale), len(shift))


def _fake(
    backend: str,
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    parts: Sequence[int],
    scale: Sequence[float],
    shift: Sequence[float],
    swap: bool,
    mask_is_hole: bool,
) -> Tensor:
    n, _, h, w = pred.shape
    return _pixel.empty_image(
        pred,
        (len(parts) * n, _channels(pred, scale, shift), h, w),
        _pixel.is_channels_last(pred),
        torch.promote_types(pred.dtype, target.dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pred, target, mask, parts, scale, _, swap, mask_is_hole = inputs
    _pixel.save(ctx, pred, target, (parts, scale, swap, mask_is_hole), mask)


def _backward(ctx: Any, op: Any, needs: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None
    (mask,) = ctx.saved_tensors
    needs = needs[:2]
    if op is not None:
        found = op(grad, mask, *ctx.image, *ctx.options, *needs)
        return found[0] if needs[0] else None, found[1] if needs[1] else None
    # The op is linear: its gradient written in torch is differentiable in `grad`, and constant in the images.
    parts, scale, swap, mask_is_hole = ctx.options
    size, _, pred_dtype, target_dtype = ctx.image
    value = grad.to(torch.float64 if torch.float64 in (pred_dtype, target_dtype) else torch.float32)
    if scale:
        value = value * torch.tensor(scale, dtype=value.dtype, device=value.device).view(1, -1, 1, 1)
    if swap:
        value = value.flip(1)
    if value.shape[1] != size[1]:
        value = value.sum(1, keepdim=True)
    sums: list[Tensor | None] = [None, None]
    hole = valid = None
    if mask is not None:
        hole, valid = region_weights(value, value, mask, "hole" if mask_is_hole else "valid")
    for part, image in zip(parts, value.split(size[0]), strict=True):
        name = PARTS[part]
        shares: tuple[Tensor | None, Tensor | None]
        if name == "composite":
            assert hole is not None and valid is not None
            shares = masked_input(image, hole), masked_input(image, valid)
        else:
            share = image
            if name.startswith("hole_"):
                assert hole is not None
                share = masked_input(image, hole)
            shares = (share, None) if name.endswith("raw") else (None, share)
        for i, share_of in enumerate(shares):
            before = sums[i]
            if share_of is not None:
                sums[i] = share_of if before is None else before + share_of
    zero = torch.zeros(size, dtype=value.dtype, device=value.device)
    pred_grad, target_grad = (zero if found is None else found for found in sums)
    return (
        pred_grad.to(pred_dtype) if needs[0] else None,
        target_grad.to(target_dtype) if needs[1] else None,
    )


_op = _library.Op(
    "stacked_images",
    schema="(Tensor pred, Tensor target, Tensor? mask, int[] parts, float[] scale, float[] shift, bool swap, "
    "bool mask_is_hole) -> Tensor",
    backward_schema=f"(Tensor grad, Tensor? mask, {_pixel.IMAGE}, int[] parts, float[] scale, bool swap, "
    "bool mask_is_hole, bool need_pred, bool need_target) -> (Tensor, Tensor)",
    outputs=1,
    fake=_fake,
    backward_fake=_pixel.gradients_fake(0, 2),
    save=_save,
    backward=_backward,
    # CUDA kernels would be no faster than Triton's: all that this op does is stream through memory.
    backends=("cpu", "triton"),
)


def serving(backend: str | None) -> str | None:
    """The backend with which an op on another backend calls this one, which has no CUDA kernels."""
    return None if backend == "cuda" else backend


def _constants(name: str, value: Sequence[float] | float | None, channels: int) -> list[float]:
    """None, one or all of the channels' constants."""
    if value is None:
        return []
    if isinstance(value, (int, float)):
        return [_checks.check_number(name, value)] if channels else []
    try:
        given = list(value)
    except TypeError:
        raise TypeError(
            f"{name} must be a number or a sequence of numbers, got {type(value).__name__}"
        ) from None
    found = [_checks.check_number(f"{name}[{i}]", item) for i, item in enumerate(given)]
    if not found or (channels != 1 and len(found) != channels):
        raise ValueError(f"{name} has {len(found)} entries, pred has {channels} channels")
    return found


def stacked_images(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    parts: Sequence[str] = ("raw", "composite", "target"),
    scale: Sequence[float] | float | None = None,
    shift: Sequence[float] | float | None = None,
    swap_channels: bool = False,
    mask_is: str = "valid",
    backend: str | None = None,
) -> Tensor:
    """Prediction, composite and truth as one normalised batch for a single pass through a feature trunk.

    Every part is written once, as ``scale * part + shift``, in one pass over the images; the backward sums the
    gradients of all parts in one pass.

    Args:
        pred: images (N, C, H, W); float16, bfloat16, float32 or float64, any strides. NCHW and channels_last are
            read in place, other strides through a copy.
        target: as `pred` in shape and device; its dtype may differ, a differing layout is copied.
        mask: 1 = known, 0 = hole; shapes and dtypes as `hole_valid_loss`. Needed by all parts but "raw", "target".
        parts: what the batch consists of, in the order of torch.cat: "raw" = pred, "composite" = pred in the hole and
            target elsewhere, "target", and for methods that mask their style images "hole_raw" and "hole_target",
            which are 0 outside of the hole.
        scale, shift: a number, or one for each channel; None = 1 and 0. A single channel is replicated to as many
            channels as either has.
        swap_channels: reverse the order of the channels (RGB to BGR and back), before `scale` and `shift`.
        mask_is: "valid", or "hole" for a mask that is 1 inside the hole (flipped inside the kernel, for free).
        backend: None (automatic), "reference", "cpu" or "triton"; this op has no CUDA kernels. Triton takes up to 8
            parts and lists for up to 8 channels; with None more of them run on "reference".

    Returns:
        (len(parts) * N, C, H, W), in the wider dtype of the images and the layout of `pred`, computed in float32
        (float64 for float64 images).

    Differentiable in `pred` and `target`, any number of times (the operation is linear). If `mask` requires a
    gradient the differentiable reference runs instead of a kernel. Only `mask` is kept for the gradient. What lies
    under weight 0 is ignored, even NaN.

    Raises:
        TypeError: an argument is no tensor or has a dtype not listed above.
        ValueError: shapes or devices disagree, the mask is missing, or an option is unknown.
        RuntimeError: the `backend` asked for cannot run, with the reason.

    Liu et al., "Image Inpainting for Irregular Holes Using Partial Convolutions", 2018: raw and composite images are
    both compared with the truth in the feature space of a VGG16.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> pred, target, mask = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4), torch.ones(2, 1, 4, 4)
        >>> ik.stacked_images(pred, target, mask, scale=(4.4, 4.5, 4.4), shift=-2.0).shape
        torch.Size([6, 3, 4, 4])
    """
    _checks.check_images(pred, target)
    if isinstance(parts, str) or not isinstance(parts, Sequence):
        raise TypeError(f"parts must be a sequence of strings, got {parts!r}")
    if not parts:
        raise ValueError(f"parts is empty, expected a sequence of {', '.join(map(repr, PARTS))}")
    for part in parts:
        _checks.check_choice("parts", part, PARTS)
    _checks.check_choice("mask_is", mask_is, ("valid", "hole"))
    masked = [part for part in parts if part not in ("raw", "target")]
    if not masked:
        mask = None
    elif mask is None:
        raise ValueError(f"mask is missing: parts {', '.join(map(repr, masked))} need it")
    else:
        mask = _checks.check_mask(mask, pred)
    scales = _constants("scale", scale, pred.shape[1])
    shifts = _constants("shift", shift, pred.shape[1])
    if scales and shifts and len(scales) != len(shifts):
        if not isinstance(scale, (int, float)) and not isinstance(shift, (int, float)):
            raise ValueError(f"scale has {len(scales)} entries, shift has {len(shifts)}")
        channels = max(len(scales), len(shifts))
        scales, shifts = (value * channels if len(value) == 1 else value for value in (scales, shifts))
    return checked_images(
        pred,
        target,
        mask,
        parts=parts,
        scale=scales,
        shift=shifts,
        swap=bool(swap_channels),
        mask_is=mask_is,
        backend=backend,
    )


def checked_images(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    *,
    parts: Sequence[str],
    scale: list[float],
    shift: list[float],
    swap: bool,
    mask_is: str,
    backend: str | None,
) -> Tensor:
    """`stacked_images` of arguments that fit each other; no constants are an empty list."""
    chosen = _op.choose(backend, (pred, target, mask), pred.dtype, target.dtype, mask=mask)
    if chosen == "triton" and max(len(parts), len(scale), len(shift)) > MOST_ON_TRITON:
        if backend is not None:
            raise RuntimeError(
                f"backend 'triton' takes at most {MOST_ON_TRITON} parts, and scale and shift for as many "
                "channels; use backend=None"
            )
        chosen = "reference"
    if chosen == "reference":
        dtype = _pixel.accumulate(pred, target)
        return reference.stacked_images(
            pred,
            target,
            mask,
            parts=parts,
            scale=torch.tensor(scale, dtype=dtype, device=pred.device) if scale else None,
            shift=torch.tensor(shift, dtype=dtype, device=pred.device) if shift else None,
            swap=swap,
            mask_is=mask_is,
        )
    images: Tensor = _op(
        chosen,
        _pixel.needs_grad(pred, target),
        pred,
        target,
        mask,
        [PARTS.index(part) for part in parts],
        scale,
        shift,
        swap,
        mask_is == "hole",
    )
    return images
