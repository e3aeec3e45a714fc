"""Triton kernels of the hole and valid pixel losses: both regions from one pass over the images.

    d = pred - target;  v = mask (or 1 - mask), h = 1 - v
    hole = sum_n scale_n0 * sum h * penalty(d),  valid = sum_n scale_n1 * sum v * penalty(d)
    grad_pred = (grad_hole * scale_n0 * h + grad_valid * scale_n1 * v) * penalty'(d), grad_target = -grad_pred

An element counts in a region only where its weight there is not exactly 0 (select, not only multiply).
Saved for backward: l1 keeps 2 sign bits an element (of every element: each lies in some region), the other
penalties re-read pred and target. Bytes an element: as `masked_l1.py`, for both terms together.
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

_SIZES = ["length", "groups", "channels", "tiles", "chunks"]


@triton.jit
def region_weights(weight, HOLE: tl.constexpr):
    """(hole, valid) weights from a mask that is 1 in the hole (HOLE) or on known pixels."""
    if HOLE:
        hole = weight
        valid = 1.0 - weight
    else:
        hole = 1.0 - weight
        valid = weight
    return hole, valid


@triton.jit(do_not_specialize=[*_SIZES, "sums_stride"])
def forward_kernel(
    pred_ptr,  # [samples, channels, length]
    target_ptr,  # [samples, channels, length]
    mask_ptr,  # see `load_weight`
    sums_ptr,  # [2 regions, 1 or 2, samples, tiles, chunks]
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
    HOLE: tl.constexpr,
    MASK: tl.constexpr,
    CHANNELS: tl.constexpr,
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
    hole_sum = tl.zeros(element.shape, tl.float32)
    valid_sum = tl.zeros(element.shape, tl.float32)
    hole_weight = tl.zeros(element.shape, tl.float32)
    valid_weight = tl.zeros(element.shape, tl.float32)
    if MASK != "channel":
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
        hole, valid = region_weights(weight, HOLE)
        pred = tl.load(pred_ptr + element_start + element, mask=exists, other=0.0).to(tl.float32)
        target = tl.load(target_ptr + element_start + element, mask=exists, other=0.0).to(tl.float32)
        d = pred - target
        value = penalty_value(d, PENALTY, param)
        hole_sum += tl.where(exists & (hole != 0), hole * value, 0.0)
        valid_sum += tl.where(exists & (valid != 0), valid * value, 0.0)
        if WEIGHTS:
            hole_weight += tl.where(exists, hole, 0.0)
            valid_weight += tl.where(exists, valid, 0.0)
        if SIGNS:
            first_row = row_p % (8 // WIDTH) == 0
            tl.store(
                signs_ptr + group_start + group,
                pack_signs(d, exists),
                mask=row_inside & valid_c & first_row,
            )
    program = tl.program_id(0)
    tl.store(sums_ptr + program, tl.sum(hole_sum))
    if WEIGHTS:
        tl.store(sums_ptr + sums_stride + program, tl.sum(hole_weight))
        tl.store(sums_ptr + sums_stride.to(tl.int64) * 2 + program, tl.sum(valid_sum))
        tl.store(sums_ptr + sums_stride.to(tl.int64) * 3 + program, tl.sum(valid_weight))
    else:
        tl.store(sums_ptr + sums_stride + program, tl.sum(valid_sum))


@triton.jit(do_not_specialize=[*_SIZES, "scale_stride_n", "scale_stride_region"])
def backward_kernel(
    grad_hole_ptr,  # [] or None
    grad_valid_ptr,  # [] or None
    scale_ptr,  # [N, 2]
    signs_ptr,  # [samples, channels, groups] int16 for l1, else None
    mask_ptr,  # see `load_weight`
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
    scale_stride_n,
    scale_stride_region,
    param,  # of the penalty
    PENALTY: tl.constexpr,
    HOLE: tl.constexpr,
    MASK: tl.constexpr,
    CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sample, first, tile = program_place(tiles, chunks, BLOCK_C, STEPS)
    rows, group, element, inside = tile_rows(length, groups, tile, WHOLE, BLOCK_C, BLOCK_G, WIDTH)
    row_c, _, row_inside = rows
    scale_ptr += sample * scale_stride_n
    if grad_hole_ptr is not None:
        factor_hole = tl.load(grad_hole_ptr).to(tl.float32) * tl.load(scale_ptr)
    if grad_valid_ptr is not None:
        factor_valid = tl.load(grad_valid_ptr).to(tl.float32) * tl.load(scale_ptr + scale_stride_region)
    if MASK != "channel":
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
        hole, valid = region_weights(weight, HOLE)
        coefficient = tl.zeros(element.shape, tl.float32)
        counted = coefficient != 0
        if grad_hole_ptr is not None:
            coefficient += tl.where(hole != 0, factor_hole * hole, 0.0)
            counted = counted | (hole != 0)
        if grad_valid_ptr is not None:
            coefficient += tl.where(valid != 0, factor_valid * valid, 0.0)
            counted = counted | (valid != 0)
        if PENALTY == "l1":
            word = tl.load(signs_ptr + group_start + group, mask=row_inside & valid_c, other=0)
            value = apply_signs(word, coefficient)
        else:
            pred = tl.load(pred_ptr + element_start + element, mask=exists, other=0.0).to(tl.float32)
            target = tl.load(target_ptr + element_start + element, mask=exists, other=0.0).to(tl.float32)
            # A NaN in a region that sends no gradient must not reach the other one's as 0 * NaN.
            value = tl.where(counted, coefficient * penalty_grad(pred - target, PENALTY, param), 0.0)
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
    mask: Tensor,  # [H, W] or [N|1, C|1, H, W]
    penalty: str,
    param: float,
    normalize: str,
    mask_is_hole: bool,
    save_signs: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hole, valid, scale, signs) of `ops/hole_valid.py`."""
    size = pred.shape
    n, numel = size[0], pred.numel()
    device = pred.device
    make = torch.empty if numel else torch.zeros
    hole = make((), dtype=torch.float32, device=device)
    valid = make((), dtype=torch.float32, device=device)
    scale = make((n, 2), dtype=torch.float32, device=device)
    channels_last = plan.is_channels_last(pred)
    signs = plan.empty_signs(pred, size, channels_last) if save_signs else plan.no_signs(pred)
    if numel == 0:
        return hole, valid, scale, signs
    pred, target = plan.in_layout(pred, channels_last), plan.in_layout(target, channels_last)
    ready = plan.prepare_mask(mask, size, channels_last)
    work, kind = plan.make_plan(size, channels_last, ready, save_signs, per_sample=True)
    weights = normalize in ("mask", "sample")
    with plan.on_device(pred):
        sums = torch.empty((4 if weights else 2) * work.programs, dtype=torch.float32, device=device)
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
            mask_is_hole,
            kind,
            size[1] if kind == "interleaved" else 1,
            weights,
            save_signs,
            *work[5:9],
            plan.loads_width(pred, target),
            num_warps=work.warps,
        )
        pixel.launch_finalise(
            sums, hole, valid, scale, work.samples, work.programs // work.samples, numel, normalize
        )
    return hole, valid, scale, signs


def backward(
    grad_hole: Tensor | None,  # []
    grad_valid: Tensor | None,  # []
    scale: Tensor,  # [N, 2]
    signs: Tensor | None,  # uint8, l1 only
    mask: Tensor,  # [H, W] or [N|1, C|1, H, W]
    pred: Tensor | None,  # [N, C, H, W], not l1
    target: Tensor | None,  # [N, C, H, W], not l1
    size: Any,
    channels_last: bool,
    pred_dtype: torch.dtype,
    target_dtype: torch.dtype,
    penalty: str,
    param: float,
    mask_is_hole: bool,
    need_pred: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_pred, grad_target) of `ops/hole_valid.py`; a region without gradient contributes nothing."""
    grad_pred, grad_target = plan.empty_gradients(
        scale, size, channels_last, pred_dtype, target_dtype, need_pred, need_target
    )
    if grad_pred.numel() + grad_target.numel() == 0:
        return grad_pred, grad_target
    if pred is not None and target is not None:
        pred, target = plan.in_layout(pred, channels_last), plan.in_layout(target, channels_last)
    ready = plan.prepare_mask(mask, size, channels_last)
    work, kind = plan.make_plan(size, channels_last, ready, signs=penalty == "l1", per_sample=True)
    with plan.on_device(scale):
        backward_kernel[(work.programs,)](
            grad_hole,
            grad_valid,
            scale,
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
            scale.stride(1),
            param,
            penalty,
            mask_is_hole,
            kind,
            size[1] if kind == "interleaved" else 1,
            *work[5:9],
            plan.stores_width(grad_pred, grad_target),
            num_warps=work.warps,
        )
    return grad_pred, grad_target
