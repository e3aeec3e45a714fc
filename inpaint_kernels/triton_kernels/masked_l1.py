"""Triton kernels of the masked pixel losses.

    d = pred - target;  S_n = sum w * penalty(d) over sample n (elements with w == 0 are selected away)
    loss = sum_n scale_n * S_n;  grad_pred = grad * scale_n * w * penalty'(d),  grad_target = -grad_pred

Saved for backward: l1 keeps 2 sign bits an element, the other penalties re-read pred and target.
Forward: one streaming pass, each program stores the sums of its tile; then one small launch adds them up.
`reduction="none"` stores w * penalty(d) instead and needs no second stage. Backward: one pass.
Bytes an element (float32, C channels, float32 mask of one channel): forward 8 + 4/C, and 1/4 for the signs;
l1 backward 1/4 + 4/C read and 4 written for each gradient.
Work split and addressing: `pixel.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import pixel, plan
from .pixel import (
    apply_signs,
    load_weight,
    pack_signs,
    penalty_grad,
    penalty_value,
    program_place,
    step_start,
    tile_rows,
)

# A size that happens to be 1 or divisible by 16 must not cost another compilation.
_SIZES = ["length", "groups", "channels", "tiles", "chunks"]


@triton.jit(do_not_specialize=[*_SIZES, "sums_stride"])
def forward_kernel(
    pred_ptr,  # [samples, channels, length]
    target_ptr,  # [samples, channels, length]
    mask_ptr,  # see `load_weight`; None for MASK "none"
    out_ptr,  # MAP: [samples, channels, length], else sums [1 or 2, samples, tiles, chunks]
    signs_ptr,  # [samples, channels, groups] int16, or None
    length,
    groups,
    channels,
    tiles,
    chunks,
    stride_n,
    stride_c,
    sums_stride,
    param,  # of the penalty
    PENALTY: tl.constexpr,
    MASK: tl.constexpr,
    CHANNELS: tl.constexpr,
    MAP: tl.constexpr,
    WEIGHTS: tl.constexpr,
    SIGNS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sample, first, tile = program_place(tiles, chunks, BLOCK_C, STEPS)
    rows, group, element, inside = tile_rows(length, groups, tile, WHOLE, BLOCK_C, BLOCK_G, WIDTH)
    row_c, row_p, row_inside = rows
    loss_sum = tl.zeros(element.shape, tl.float32)
    weight_sum = tl.zeros(element.shape, tl.float32)
    if MASK == "plane" or MASK == "interleaved":
        weight = load_weight(
            mask_ptr, stride_n, stride_c, sample, first, tile, rows, inside, MASK, CHANNELS, BLOCK_G
        )
    for step in tl.static_range(STEPS):
        channel = first + step * BLOCK_C
        group_start, element_start = step_start(
            length, groups, channels, sample, channel, tile, WHOLE, BLOCK_G
        )
        valid_c = row_c < channels - channel
        exists = inside & valid_c
        if MASK == "channel":
            weight = load_weight(
                mask_ptr, stride_n, stride_c, sample, channel, tile, rows, exists, MASK, CHANNELS, BLOCK_G
            )
        pred = tl.load(pred_ptr + element_start + element, mask=exists, other=0.0).to(tl.float32)
        target = tl.load(target_ptr + element_start + element, mask=exists, other=0.0).to(tl.float32)
        d = pred - target
        value = penalty_value(d, PENALTY, param)
        if MASK == "none":
            counted = exists
            value = tl.where(exists, value, 0.0)
        else:
            # Select, not only multiply: NaN and Inf under weight 0 do not count.
            counted = exists & (weight != 0)
            value = tl.where(counted, weight * value, 0.0)
        if MAP:
            tl.store(out_ptr + element_start + element, value, mask=exists)
        else:
            loss_sum += value
        if WEIGHTS:
            weight_sum += tl.where(exists, weight, 0.0)
        if SIGNS:
            first_row = row_p % (8 // WIDTH) == 0
            tl.store(
                signs_ptr + group_start + group,
                pack_signs(d, counted),
                mask=row_inside & valid_c & first_row,
            )
    if not MAP:
        program = tl.program_id(0)
        tl.store(out_ptr + program, tl.sum(loss_sum))
        if WEIGHTS:
            tl.store(out_ptr + sums_stride + program, tl.sum(weight_sum))


@triton.jit(do_not_specialize=[*_SIZES, "scale_stride"])
def backward_kernel(
    grad_ptr,  # [], or MAP: [samples, channels, length]
    scale_ptr,  # [N, 1], or None
    signs_ptr,  # [samples, channels, groups] int16 for l1, else None
    mask_ptr,  # see `load_weight`; None for MASK "none"
    pred_ptr,  # [samples, channels, length], None for l1
    target_ptr,  # [samples, channels, length], None for l1
    grad_pred_ptr,  # [samples, channels, length] or None
    grad_target_ptr,  # [samples, channels, length] or None
    length,
    groups,
    channels,
    tiles,
    chunks,
    stride_n,
    stride_c,
    scale_stride,
    param,  # of the penalty
    PENALTY: tl.constexpr,
    MASK: tl.constexpr,
    CHANNELS: tl.constexpr,
    MAP: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sample, first, tile = program_place(tiles, chunks, BLOCK_C, STEPS)
    rows, group, element, inside = tile_rows(length, groups, tile, WHOLE, BLOCK_C, BLOCK_G, WIDTH)
    row_c, _, row_inside = rows
    if MAP:
        coefficient = 1.0
    else:
        coefficient = tl.load(grad_ptr).to(tl.float32)
        if scale_ptr is not None:
            coefficient *= tl.load(scale_ptr + sample * scale_stride)
    if MASK == "plane" or MASK == "interleaved":
        weight = load_weight(
            mask_ptr, stride_n, stride_c, sample, first, tile, rows, inside, MASK, CHANNELS, BLOCK_G
        )
    for step in tl.static_range(STEPS):
        channel = first + step * BLOCK_C
        group_start, element_start = step_start(
            length, groups, channels, sample, channel, tile, WHOLE, BLOCK_G
        )
        valid_c = row_c < channels - channel
        exists = inside & valid_c
        if MASK == "channel":
            weight = load_weight(
                mask_ptr, stride_n, stride_c, sample, channel, tile, rows, exists, MASK, CHANNELS, BLOCK_G
            )
        value = tl.zeros(element.shape, tl.float32) + coefficient
        if MAP:
            value *= tl.load(grad_ptr + element_start + element, mask=exists, other=0.0).to(tl.float32)
        if MASK != "none":
            value *= weight
        if PENALTY == "l1":
            word = tl.load(signs_ptr + group_start + group, mask=row_inside & valid_c, other=0)
            value = apply_signs(word, value)
        else:
            pred = tl.load(pred_ptr + element_start + element, mask=exists, other=0.0).to(tl.float32)
            target = tl.load(target_ptr + element_start + element, mask=exists, other=0.0).to(tl.float32)
            value *= penalty_grad(pred - target, PENALTY, param)
            if MASK != "none":
                value = tl.where(weight != 0, value, 0.0)
        if grad_pred_ptr is not None:
            tl.store(
                grad_pred_ptr + element_start + element, value.to(grad_pred_ptr.dtype.element_ty), mask=exists
            )
        if grad_target_ptr is not None:
            tl.store(
                grad_target_ptr + element_start + element,
                (-value).to(grad_target_ptr.dtype.element_ty),
                mask=exists,
            )


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
    size = pred.shape
    n, numel = size[0], pred.numel()
    device = pred.device
    is_map = reduction == "none"
    channels_last = plan.is_channels_last(pred)
    if is_map:
        scale = torch.empty(0, dtype=torch.float32, device=device)
        out = plan.empty_image(pred, size, channels_last, torch.float32)
    else:
        make = torch.empty if numel else torch.zeros
        scale = make((n, 1), dtype=torch.float32, device=device)
        out = make((), dtype=torch.float32, device=device)
    signs = plan.empty_signs(pred, size, channels_last) if save_signs else plan.no_signs(pred)
    if numel == 0:
        return out, scale, signs
    if reduction == "sum":
        normalize = "sum"
    elif mask is None:
        # Every element weighs 1: all three normalisations divide by the number of elements.
        normalize = "image"
    weights = not is_map and normalize in ("mask", "sample")
    pred, target = plan.in_layout(pred, channels_last), plan.in_layout(target, channels_last)
    ready = plan.prepare_mask(mask, size, channels_last)
    work, kind = plan.make_plan(size, channels_last, ready, save_signs, per_sample=False)
    with plan.on_device(pred):
        sums = out
        if not is_map:
            sums = torch.empty((2 if weights else 1) * work.programs, dtype=torch.float32, device=device)
        forward_kernel[(work.programs,)](
            pred,
            target,
            ready.tensor,
            sums,
            signs.view(torch.int16) if save_signs else None,
            *work[:5],
            ready.stride_n,
            ready.stride_c,
            work.programs,
            param,
            penalty,
            kind,
            size[1] if kind == "interleaved" else 1,
            is_map,
            weights,
            save_signs,
            *work[5:9],
            plan.stores_width(out) if is_map else plan.loads_width(pred, target),
            num_warps=work.warps,
        )
        if not is_map:
            pixel.launch_finalise(
                sums, out, out, scale, work.samples, work.programs // work.samples, numel, normalize
            )
    return out, scale, signs


def backward(
    grad: Tensor,  # [], or [N, C, H, W] for reduction "none"
    scale: Tensor,  # [N, 1], or [0]
    signs: Tensor | None,  # uint8, l1 only
    mask: Tensor | None,  # [H, W] or [N|1, C|1, H, W]
    pred: Tensor | None,  # [N, C, H, W], not l1
    target: Tensor | None,  # [N, C, H, W], not l1
    size: Any,
    channels_last: bool,
    pred_dtype: torch.dtype,
    target_dtype: torch.dtype,
    penalty: str,
    param: float,
    need_pred: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_pred, grad_target) of `ops/masked_l1.py`."""
    grad_pred, grad_target = plan.empty_gradients(
        grad, size, channels_last, pred_dtype, target_dtype, need_pred, need_target
    )
    if grad_pred.numel() + grad_target.numel() == 0:
        return grad_pred, grad_target
    # The gradient of a summed map is one number expanded to the image: read it as such.
    is_map = grad.ndim != 0 and any(grad.stride())
    if is_map:
        grad = plan.in_layout(grad, channels_last)
    if pred is not None and target is not None:
        pred, target = plan.in_layout(pred, channels_last), plan.in_layout(target, channels_last)
    l1 = penalty == "l1"
    # A 0/1 mask adds nothing to the signs, which are 0 where it is 0; its sample's scale still matters.
    known = l1 and mask is not None and mask.dtype == torch.bool
    ready = plan.prepare_mask(None if known else mask, size, channels_last)
    work, kind = plan.make_plan(size, channels_last, ready, signs=l1, per_sample=known)
    with plan.on_device(grad):
        backward_kernel[(work.programs,)](
            grad,
            scale if scale.numel() else None,
            signs.view(torch.int16) if signs is not None else None,
            ready.tensor,
            pred,
            target,
            grad_pred if need_pred else None,
            grad_target if need_target else None,
            *work[:5],
            ready.stride_n,
            ready.stride_c,
            scale.stride(0),
            param,
            penalty,
            kind,
            size[1] if kind == "interleaved" else 1,
            is_map,
            *work[5:9],
            plan.stores_width(grad_pred, grad_target),
            num_warps=work.warps,
        )
    return grad_pred, grad_target
