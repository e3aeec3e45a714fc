"""Triton kernels over neighbouring pixels, shared by total_variation and inpainting_pixel.

    x = hole * pred + valid * target, or the image itself;  across = x right of a pixel - x, down = x below - x
    sum_across, sum_down = sum of w * penalty(difference), w from the region at the two pixels of a pair
    grad x = sum over the pairs that end in a pixel - sum over those that begin in it, of c * w * penalty'(difference)
    grad_pred = hole * grad x, grad_target = valid * grad x;  with the losses: +- (c_hole * hole + c_valid * valid)
    * sign(pred - target), see `hole_valid.py`

A weight of 0 selects away instead of multiplying. Saved for backward: l1 keeps 2 sign bits for each of across, down
and pred - target; l2 re-reads the images. Forward: one pass, each program stores its sums; then one small launch for
hole and valid (`pixel.finalise`) and one for the rest. Backward: one pass. The composite is never written.
Bytes an element (float32, C channels, float32 mask of one channel): forward 8 + 4/C, and 1/2 or 3/4 for the signs;
l1 backward 1/2 or 3/4 + 4/C read and 4 written for each gradient. Work split and addressing: `pairs_tile.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .hole_valid import region_weights
from .pairs_tile import (
    HERE,
    LEFT,
    RIGHT,
    in_row,
    load_image,
    load_signs,
    load_signs_before,
    make_plan,
    mask_columns,
    mask_row,
    region_value,
    row_stride,
    store_signs,
    strip_place,
    weigh_pair,
)
from .pixel import apply_signs, penalty_grad, penalty_value


@triton.jit(do_not_specialize=["sizes", "sums_stride"])
def forward_kernel(
    pred_ptr,  # [samples, channels, height, width]
    target_ptr,  # [samples, channels, height, width], or None: no composite
    mask_ptr,  # see `mask_columns`, or None
    sums_ptr,  # [sums, samples, blocks, tiles], see `sums_of`
    signs_ptr,  # [samples, channels, height, planes, groups] uint8, or None
    sizes,
    strides,  # of the mask: sample, channel
    sums_stride,
    REGION: tl.constexpr,
    PENALTY: tl.constexpr,
    HOLE: tl.constexpr,
    LOSSES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    REGION_SUM: tl.constexpr,
    STEP: tl.constexpr,
    SHARED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    height, _, groups, channels, _, _ = sizes
    sample, channel, top, place = strip_place(sizes, BLOCK_S, BLOCK_G, STEPS, WIDTH)
    start, x, group, group_begins = place
    stride, mask_stride = row_stride(sizes, 1, WHOLE), row_stride(sizes, SHARED, WHOLE)
    first_row = (sample * channels + channel) * height + top
    pred_ptr += first_row * stride + start + x
    if target_ptr is not None:
        target_ptr += first_row * stride + start + x
    if mask_ptr is not None:
        mask_start, column = mask_columns(place, SHARED)
        mask_ptr += sample * strides[0] + channel * strides[1] + top * mask_stride + mask_start + column
    PLANES: tl.constexpr = 6 if LOSSES else 4
    if signs_ptr is not None:
        signs_ptr += first_row * (PLANES * groups) + start // 8 + group
    inside, has_right = in_row(place, sizes, 0, WHOLE), in_row(place, sizes, STEP, WHOLE)
    group_begins = group_begins & (start // 8 + group < groups)

    across_sum = tl.zeros(x.shape, tl.float32)
    down_sum = tl.zeros(x.shape, tl.float32)
    region_sum = tl.zeros(x.shape, tl.float32)
    hole_sum = tl.zeros(x.shape, tl.float32)
    valid_sum = tl.zeros(x.shape, tl.float32)
    hole_weight = tl.zeros(x.shape, tl.float32)
    valid_weight = tl.zeros(x.shape, tl.float32)
    above = mask_row(mask_ptr, -1, mask_stride, place, sizes, top, REGION, HOLE, STEP, SHARED, WHOLE)
    row = mask_row(mask_ptr, 0, mask_stride, place, sizes, top, REGION, HOLE, STEP, SHARED, WHOLE)
    below = mask_row(mask_ptr, 1, mask_stride, place, sizes, top, REGION, HOLE, STEP, SHARED, WHOLE)
    region = region_value(above, row, below, HERE, REGION, HOLE)
    image, d = load_image(pred_ptr, target_ptr, 0, inside & (top < height), row[HERE], HOLE)
    for step in tl.static_range(STEPS):
        exists = inside & (top + step < height)
        exists_right = has_right & (top + step < height)
        exists_below = inside & (top + step + 1 < height)
        far_below = mask_row(
            mask_ptr, step + 2, mask_stride, place, sizes, top, REGION, HOLE, STEP, SHARED, WHOLE
        )
        region_right = region_value(above, row, below, RIGHT, REGION, HOLE)
        region_below = region_value(row, below, far_below, HERE, REGION, HOLE)
        image_right, _ = load_image(
            pred_ptr, target_ptr, step * stride + STEP, exists_right, row[RIGHT], HOLE
        )
        image_below, d_below = load_image(
            pred_ptr, target_ptr, (step + 1) * stride, exists_below, below[HERE], HOLE
        )
        across, down = image_right - image, image_below - image
        weight, counted_across = weigh_pair(region, region_right, exists_right, REGION)
        across_sum += tl.where(counted_across, weight * penalty_value(across, PENALTY, 0.0), 0.0)
        weight, counted_down = weigh_pair(region, region_below, exists_below, REGION)
        down_sum += tl.where(counted_down, weight * penalty_value(down, PENALTY, 0.0), 0.0)
        if REGION_SUM:
            region_sum += tl.where(exists, region, 0.0)
        if LOSSES:
            hole, valid = region_weights(row[HERE], HOLE)
            hole_sum += tl.where(exists & (hole != 0), hole * tl.abs(d), 0.0)
            valid_sum += tl.where(exists & (valid != 0), valid * tl.abs(d), 0.0)
            if WEIGHTS:
                hole_weight += tl.where(exists, hole, 0.0)
                valid_weight += tl.where(exists, valid, 0.0)
        if signs_ptr is not None:
            byte_ptr = signs_ptr + step * PLANES * groups
            stored = group_begins & (top + step < height)
            store_signs(byte_ptr, groups, stored, across, counted_across)
            store_signs(byte_ptr + 2 * groups, groups, stored, down, counted_down)
            if LOSSES:
                store_signs(byte_ptr + 4 * groups, groups, stored, d, exists)
        above, row, below = row, below, far_below
        region, image, d = region_below, image_below, d_below

    sums_ptr += tl.program_id(0)
    sums_stride = sums_stride.to(tl.int64)
    if LOSSES:
        # As `pixel.finalise` reads them.
        tl.store(sums_ptr, tl.sum(hole_sum))
        if WEIGHTS:
            sums_ptr += sums_stride
            tl.store(sums_ptr, tl.sum(hole_weight))
        sums_ptr += sums_stride
        tl.store(sums_ptr, tl.sum(valid_sum))
        sums_ptr += sums_stride
        if WEIGHTS:
            tl.store(sums_ptr, tl.sum(valid_weight))
            sums_ptr += sums_stride
    tl.store(sums_ptr, tl.sum(down_sum))
    tl.store(sums_ptr + sums_stride, tl.sum(across_sum))
    if REGION_SUM:
        tl.store(sums_ptr + 2 * sums_stride, tl.sum(region_sum))


@triton.jit
def upstream(grad_ptr, grad_total_ptr, weight):
    """Gradient sent to a term, directly and through the total it enters with `weight`."""
    value = 0.0
    if grad_ptr is not None:
        value += tl.load(grad_ptr).to(tl.float32)
    if grad_total_ptr is not None:
        value += tl.load(grad_total_ptr).to(tl.float32) * weight
    return value


@triton.jit
def pair_signs(word, first, second, coefficient, REGION: tl.constexpr, like):
    """What the pairs of packed signs send to their second pixel; without a sign that is 0."""
    weight, _ = weigh_pair(first, second, True, REGION)
    return apply_signs(word, tl.zeros(like.shape, tl.float32) + coefficient * weight)


@triton.jit
def pair_gradient(d, first, second, coefficient, exists, REGION: tl.constexpr, PENALTY: tl.constexpr):
    """What pairs of difference d send to their second pixel."""
    weight, counted = weigh_pair(first, second, exists, REGION)
    return tl.where(counted, coefficient * weight * penalty_grad(d, PENALTY, 0.0), 0.0)


@triton.jit(do_not_specialize=["sizes", "scale_strides"])
def backward_kernel(
    grad_total_ptr,  # [] or None
    grad_hole_ptr,  # [] or None
    grad_valid_ptr,  # [] or None
    grad_tv_ptr,  # [] or None
    scale_ptr,  # [N, 2], or None: no losses
    tv_scale_ptr,  # [2]
    signs_ptr,  # [samples, channels, height, planes, groups] uint8 for l1, else None
    mask_ptr,  # see `mask_columns`, or None
    pred_ptr,  # [samples, channels, height, width], None for l1
    target_ptr,  # [samples, channels, height, width], None for l1 and where there is no composite
    grad_pred_ptr,  # [samples, channels, height, width] or None
    grad_target_ptr,  # [samples, channels, height, width] or None
    sizes,
    strides,  # of the mask: sample, channel
    scale_strides,  # of scale: sample, region; of tv_scale
    weights,  # of hole, valid and tv in the total
    REGION: tl.constexpr,
    PENALTY: tl.constexpr,
    HOLE: tl.constexpr,
    COMPOSITE: tl.constexpr,
    STEP: tl.constexpr,
    SHARED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    height, _, groups, channels, _, _ = sizes
    sample, channel, top, place = strip_place(sizes, BLOCK_S, BLOCK_G, STEPS, WIDTH)
    start, x, group, _ = place
    stride, mask_stride = row_stride(sizes, 1, WHOLE), row_stride(sizes, SHARED, WHOLE)
    first_row = (sample * channels + channel) * height + top
    at = first_row * stride + start + x
    if mask_ptr is not None:
        mask_start, column = mask_columns(place, SHARED)
        mask_ptr += sample * strides[0] + channel * strides[1] + top * mask_stride + mask_start + column
    group += start // 8
    PLANES: tl.constexpr = 4 if scale_ptr is None else 6
    inside, has_right = in_row(place, sizes, 0, WHOLE), in_row(place, sizes, STEP, WHOLE)
    has_left = inside & in_row(place, sizes, -STEP, WHOLE)

    grad_tv = upstream(grad_tv_ptr, grad_total_ptr, weights[2])
    down_factor = grad_tv * tl.load(tv_scale_ptr)
    across_factor = grad_tv * tl.load(tv_scale_ptr + scale_strides[2])
    if scale_ptr is not None:
        scale_ptr += sample * scale_strides[0]
        hole_factor = upstream(grad_hole_ptr, grad_total_ptr, weights[0]) * tl.load(scale_ptr)
        valid_factor = upstream(grad_valid_ptr, grad_total_ptr, weights[1])
        valid_factor *= tl.load(scale_ptr + scale_strides[1])

    far_above = mask_row(mask_ptr, -2, mask_stride, place, sizes, top, REGION, HOLE, STEP, SHARED, WHOLE)
    above = mask_row(mask_ptr, -1, mask_stride, place, sizes, top, REGION, HOLE, STEP, SHARED, WHOLE)
    row = mask_row(mask_ptr, 0, mask_stride, place, sizes, top, REGION, HOLE, STEP, SHARED, WHOLE)
    below = mask_row(mask_ptr, 1, mask_stride, place, sizes, top, REGION, HOLE, STEP, SHARED, WHOLE)
    region_above = region_value(far_above, above, row, HERE, REGION, HOLE)
    region = region_value(above, row, below, HERE, REGION, HOLE)
    has_above = (top > 0) & (top < height)
    if PENALTY == "l1":
        group_inside = group < groups
        signs_ptr += first_row * (PLANES * groups) + group
        word = load_signs(signs_ptr - (PLANES - 2) * groups, groups, group_inside & has_above)
        upper = pair_signs(word, region_above, region, down_factor, REGION, x)
    else:
        pred_ptr += at
        if target_ptr is not None:
            target_ptr += at
        image_above, _ = load_image(pred_ptr, target_ptr, -stride, inside & has_above, above[HERE], HOLE)
        image, _ = load_image(pred_ptr, target_ptr, 0, inside & (top < height), row[HERE], HOLE)
        upper = pair_gradient(
            image - image_above, region_above, region, down_factor, inside & has_above, REGION, PENALTY
        )
    for step in tl.static_range(STEPS):
        own = top + step < height
        far_below = mask_row(
            mask_ptr, step + 2, mask_stride, place, sizes, top, REGION, HOLE, STEP, SHARED, WHOLE
        )
        region_left = region_value(above, row, below, LEFT, REGION, HOLE)
        region_right = region_value(above, row, below, RIGHT, REGION, HOLE)
        region_below = region_value(row, below, far_below, HERE, REGION, HOLE)
        if PENALTY == "l1":
            byte_ptr = signs_ptr + step * PLANES * groups
            stored = group_inside & own
            word = load_signs_before(byte_ptr, group, groups, stored, STEP)
            left = pair_signs(word, region_left, region, across_factor, REGION, x)
            word = load_signs(byte_ptr, groups, stored)
            right = pair_signs(word, region, region_right, across_factor, REGION, x)
            word = load_signs(byte_ptr + 2 * groups, groups, stored)
            lower = pair_signs(word, region, region_below, down_factor, REGION, x)
        else:
            exists_left, exists_right = has_left & own, has_right & own
            exists_below = inside & (top + step + 1 < height)
            image_left, _ = load_image(
                pred_ptr, target_ptr, step * stride - STEP, exists_left, row[LEFT], HOLE
            )
            image_right, _ = load_image(
                pred_ptr, target_ptr, step * stride + STEP, exists_right, row[RIGHT], HOLE
            )
            image_below, _ = load_image(
                pred_ptr, target_ptr, (step + 1) * stride, exists_below, below[HERE], HOLE
            )
            left = pair_gradient(
                image - image_left, region_left, region, across_factor, exists_left, REGION, PENALTY
            )
            right = pair_gradient(
                image_right - image, region, region_right, across_factor, exists_right, REGION, PENALTY
            )
            lower = pair_gradient(
                image_below - image, region, region_below, down_factor, exists_below, REGION, PENALTY
            )
            image = image_below
        to_pred = left - right + upper - lower
        if COMPOSITE:
            hole, valid = region_weights(row[HERE], HOLE)
            to_target = tl.where(valid != 0, valid * to_pred, 0.0)
            to_pred = tl.where(hole != 0, hole * to_pred, 0.0)
            if scale_ptr is not None:
                word = load_signs(byte_ptr + 4 * groups, groups, stored)
                weight = tl.where(hole != 0, hole_factor * hole, 0.0)
                d = apply_signs(word, weight + tl.where(valid != 0, valid_factor * valid, 0.0))
                to_pred += d
                to_target -= d
        if grad_pred_ptr is not None:
            tl.store(
                grad_pred_ptr + at + step * stride,
                to_pred.to(grad_pred_ptr.dtype.element_ty),
                mask=inside & own,
            )
        if grad_target_ptr is not None:
            tl.store(
                grad_target_ptr + at + step * stride,
                to_target.to(grad_target_ptr.dtype.element_ty),
                mask=inside & own,
            )
        above, row, below = row, below, far_below
        region, upper = region_below, lower


@triton.jit(do_not_specialize=["first", "programs", "pairs_down", "pairs_across", "numel"])
def finalise(
    sums_ptr,  # [first + 2 or 3, programs]: down, across, summed region if needed behind what is not read here
    tv_ptr,  # []
    scale_ptr,  # [2]
    total_ptr,  # [] or None
    hole_ptr,  # []
    valid_ptr,  # []
    weights,  # of hole, valid and tv in the total
    first,
    programs,
    pairs_down,
    pairs_across,
    numel,
    NORMALIZE: tl.constexpr,
    COLS: tl.constexpr,
):
    """Adds the partial sums; writes total variation, d tv / d (sum down, sum across), and the total."""
    sums_ptr += first.to(tl.int64) * programs
    col = tl.arange(0, COLS)
    down = tl.zeros([COLS], tl.float64)
    across = tl.zeros([COLS], tl.float64)
    region = tl.zeros([COLS], tl.float64)
    for start in range(0, programs, COLS):
        at = (start + col).to(tl.int64)
        inside = start + col < programs
        down += tl.load(sums_ptr + at, mask=inside, other=0.0).to(tl.float64)
        across += tl.load(sums_ptr + programs + at, mask=inside, other=0.0).to(tl.float64)
        if NORMALIZE == "mask":
            region += tl.load(sums_ptr + programs.to(tl.int64) * 2 + at, mask=inside, other=0.0).to(
                tl.float64
            )
    if NORMALIZE == "pairs":
        count_down, count_across = pairs_down.to(tl.float64), pairs_across.to(tl.float64)
    elif NORMALIZE == "mask":
        count_down = tl.sum(region)
        count_across = count_down
    else:
        count_down = numel.to(tl.float64)
        count_across = count_down
    # Nothing counted means loss 0 and gradient 0, never 0 / 0.
    scale_down = tl.where(count_down == 0, 0.0, 1.0 / tl.where(count_down == 0, 1.0, count_down))
    scale_across = tl.where(count_across == 0, 0.0, 1.0 / tl.where(count_across == 0, 1.0, count_across))
    tv = tl.sum(down) * scale_down + tl.sum(across) * scale_across
    tl.store(tv_ptr, tv.to(tl.float32))
    tl.store(scale_ptr, scale_down.to(tl.float32))
    tl.store(scale_ptr + 1, scale_across.to(tl.float32))
    if total_ptr is not None:
        total = tl.load(hole_ptr) * weights[0] + tl.load(valid_ptr) * weights[1] + tv * weights[2]
        tl.store(total_ptr, total.to(tl.float32))


def empty_signs(like: Tensor, planes: int, channels_last: bool) -> Tensor:
    """Packed signs (uint8, 1-D) of `ops/_pairs.py`; the same size in both layouts."""
    n, c, h, w = like.shape
    allocated = n * c * h * planes * ((w + 7) // 8)
    if channels_last and w % 8:
        # Whole rows need less padding than the rows of planes: the rest of the buffer is not written.
        return torch.zeros(allocated, dtype=torch.uint8, device=like.device)
    return torch.empty(allocated, dtype=torch.uint8, device=like.device)


def launch_forward(
    pred: Tensor,  # [N, C, H, W]
    target: Tensor | None,  # [N, C, H, W]
    mask: Tensor | None,  # [H, W] or [N|1, C|1, H, W]
    signs: Tensor | None,  # uint8
    channels_last: bool,
    region: str,
    penalty: str,
    mask_is_hole: bool,
    losses: bool,
    weights: bool,
    region_sum: bool,
) -> Tensor:
    """Partial sums [hole, valid, each with its `weights` behind it, for `losses`; down, across, region; programs]."""
    pred = plan.in_layout(pred, channels_last)
    if target is not None:
        target = plan.in_layout(target, channels_last)
    ready = plan.prepare_mask(mask, pred.shape, channels_last)
    work = make_plan(
        pred.shape,
        channels_last,
        ready,
        any(t is not None and t.dtype == torch.float32 for t in (pred, target)),
    )
    count = losses * 2 * (1 + weights) + 2 + region_sum
    sums = torch.empty((count, work.programs), dtype=torch.float32, device=pred.device)
    forward_kernel[(work.programs,)](
        pred,
        target,
        ready.tensor,
        sums,
        signs,
        work.sizes,
        (ready.stride_n, ready.stride_c),
        work.programs,
        region,
        penalty,
        mask_is_hole,
        losses,
        weights,
        region_sum,
        *work[1:8],
        num_warps=work.warps,
    )
    return sums


def launch_finalise(
    sums: Tensor,  # see `launch_forward`
    tv: Tensor,  # []
    scale: Tensor,  # [2]
    terms: tuple[Tensor, Tensor, Tensor] | None,  # total, hole, valid, each []
    weights: tuple[float, float, float],
    size: Any,
    normalize: str,
) -> None:
    """Second stage of the total variation, and of the total of all terms."""
    n, c, h, w = size
    region_sum = normalize == "mask"
    count, programs = sums.shape
    cols, warps = (1024, 4) if programs <= 1024 else (4096, 16)
    finalise[(1,)](
        sums,
        tv,
        scale,
        *(terms or (None, None, None)),
        weights,
        count - 2 - region_sum,
        programs,
        n * c * (h - 1) * w,
        n * c * h * (w - 1),
        n * c * h * w,
        normalize,
        cols,
        num_warps=warps,
    )


def launch_backward(
    grads: tuple[Tensor | None, ...],  # of total, hole, valid, tv: each []
    scale: Tensor | None,  # [N, 2]
    tv_scale: Tensor,  # [2]
    signs: Tensor | None,  # uint8, l1 only
    mask: Tensor | None,  # [H, W] or [N|1, C|1, H, W]
    pred: Tensor | None,  # [N, C, H, W], not l1
    target: Tensor | None,  # [N, C, H, W], not l1
    size: Any,
    channels_last: bool,
    pred_dtype: torch.dtype,
    target_dtype: torch.dtype,
    composite: bool,
    weights: tuple[float, float, float],
    region: str,
    penalty: str,
    mask_is_hole: bool,
    need_pred: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_pred, grad_target)."""
    grad_pred, grad_target = plan.empty_gradients(
        tv_scale, size, channels_last, pred_dtype, target_dtype, need_pred, need_target
    )
    if grad_pred.numel() + grad_target.numel() == 0:
        return grad_pred, grad_target
    if pred is not None:
        pred = plan.in_layout(pred, channels_last)
    if target is not None:
        target = plan.in_layout(target, channels_last)
    if penalty == "l1" and mask is not None and mask.dtype == torch.bool:
        # Pairs with a sign weigh 1.
        region = "image"
    if region == "image" and not composite:
        mask = None
    ready = plan.prepare_mask(mask, size, channels_last)
    work = make_plan(size, channels_last, ready, plan.stores_width(grad_pred, grad_target) == 4)
    with plan.on_device(tv_scale):
        backward_kernel[(work.programs,)](
            *grads,
            scale,
            tv_scale,
            signs,
            ready.tensor,
            pred,
            target,
            grad_pred if need_pred else None,
            grad_target if need_target else None,
            work.sizes,
            (ready.stride_n, ready.stride_c),
            (*(scale.stride() if scale is not None else (0, 0)), tv_scale.stride(0)),
            weights,
            region,
            penalty,
            mask_is_hole,
            composite,
            *work[1:8],
            num_warps=work.warps,
        )
    return grad_pred, grad_target
