"""Forward Triton kernels over neighbouring pixels, of total_variation and inpainting_pixel.

    x = hole * pred + valid * target, or the image itself;  across, down = the next pixel, the one below - this one
    sum_across, sum_down = sum of w * penalty(difference), w from the region at the two pixels of a pair
    hole, valid = as `hole_valid.py`, from the same pass

A weight of 0 selects away instead of multiplying. Saved for backward: l1 keeps 2 sign bits for each of across, down
and pred - target, l2 nothing. One pass, in which each program stores its sums; then one small launch adds up hole and
valid (`pixel_forward`) and one the rest. The composite is never written: a row of it lives in registers until
the next one is there. Bytes an element (float32, C channels, float32 mask of one channel): 8 + 4/C read, 1/2 or 3/4
of signs written; a chunk's rows and the one below are read once from memory or from the cache of second level.
Work split and addressing: `pairs_tile.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .pairs_tile import (
    after_edge,
    ahead,
    load_image,
    load_mask,
    make_plan,
    reach,
    region_values,
    row_stride,
    store_signs,
    tile_place,
    unpacked_sizes,
    wider,
)
from .pixel_tile import penalty_value, region_weights


@triton.jit
def forward_kernel(
    pred_ptr,  # [samples, channels, height, width]
    target_ptr,  # [samples, channels, height, width], or None: no composite
    mask_ptr,  # [H, W] or [N|1, C|1, H, W], or None
    sums_ptr,  # [sums, samples, blocks, tiles], see `launch_forward`
    signs_ptr,  # [samples, channels, height, planes, groups] uint8, or None
    sizes,  # see `Plan`
    stride_n,  # of the mask
    stride_c,
    PENALTY: tl.constexpr,
    LOSSES: tl.constexpr,
    WEIGHTS: tl.constexpr,
    REGION_SUM: tl.constexpr,
    TILE: tl.constexpr,
):
    STEPS: tl.constexpr = TILE.STEPS
    sizes = unpacked_sizes(sizes)
    height, _, groups, _, _, _ = sizes
    top, top_row, group, place, mask_offset, mask_place = tile_place(sizes, stride_n, stride_c, TILE)
    _, start, at, edge, inside, _, _ = place
    AFTER: tl.constexpr = after_edge(TILE.STEP, TILE.STEP, TILE.WIDTH)
    stride = row_stride(sizes, 1, TILE.WHOLE)
    pred_ptr += top_row * stride + start
    if target_ptr is not None:
        target_ptr += top_row * stride + start
    images = pred_ptr, target_ptr
    if mask_ptr is not None:
        mask_ptr += mask_offset
    PLANES: tl.constexpr = 6 if LOSSES else 4
    if signs_ptr is not None:
        sign_stride = groups.to(tl.int64) * PLANES
        signs_ptr += top_row * sign_stride + group

    zeros = tl.zeros(at.shape, tl.float32)
    nothing = tl.zeros([at.shape[0], 1], tl.float32)
    across_sum, down_sum, region_sum = nothing, nothing, nothing
    hole_sum, valid_sum, hole_weight, valid_weight = nothing, nothing, nothing, nothing
    # Nothing weighs anything above the top row: the pair that ends in it belongs to the chunk above.
    image_above, first_above = zeros, zeros
    if TILE.REGION == "dilated_hole":
        last = reach(mask_ptr, mask_place, place, sizes, top, 0, TILE)
        near = reach(mask_ptr, mask_place, place, sizes, top, -1, TILE)
        near = wider(near, last, TILE)
    # One row more than the chunk has: it only ends pairs.
    for step in range(STEPS + 1):
        exists = top + step < height
        own = exists & (step < STEPS)
        before, here, after = load_mask(mask_ptr, mask_place, place, step, exists, TILE)
        if TILE.REGION == "dilated_hole":
            below = reach(mask_ptr, mask_place, place, sizes, top, step + 1, TILE)
            widest = wider(near, below, TILE)
            near, last = wider(last, below, TILE), below
        else:
            widest = before, here, after
        first, second = region_values(widest[1], inside[1] & exists, TILE)
        second_after = region_values(widest[2], inside[2] & exists, TILE)[1]
        offset = step * stride
        image, d = load_image(images, offset + at, inside[1] & exists, here, TILE)
        image_after = load_image(images, offset + edge + AFTER, inside[2] & exists, after, TILE)[0]

        weight = tl.where(own, first * ahead(second, second_after, TILE), 0.0)
        across = tl.where(weight != 0, ahead(image, image_after, TILE) - image, 0.0)
        across_sum += tl.sum(weight * penalty_value(across, PENALTY, 0.0), axis=1, keep_dims=True)
        weight = first_above * second
        down = tl.where(weight != 0, image - image_above, 0.0)
        down_sum += tl.sum(weight * penalty_value(down, PENALTY, 0.0), axis=1, keep_dims=True)
        if REGION_SUM:
            region_sum += tl.sum(tl.where(own, first, 0.0), axis=1, keep_dims=True)
        if LOSSES:
            d = tl.where(own, d, 0.0)
            hole, valid = region_weights(here, TILE.HOLE)
            hole_sum += tl.sum(hole * tl.where(hole != 0, tl.abs(d), 0.0), axis=1, keep_dims=True)
            valid_sum += tl.sum(valid * tl.where(valid != 0, tl.abs(d), 0.0), axis=1, keep_dims=True)
            if WEIGHTS:
                hole_weight += tl.sum(tl.where(inside[1] & own, hole, 0.0), axis=1, keep_dims=True)
                valid_weight += tl.sum(tl.where(inside[1] & own, valid, 0.0), axis=1, keep_dims=True)
        if signs_ptr is not None:
            byte_ptr = signs_ptr + step * sign_stride
            byte_above_ptr = byte_ptr - sign_stride + 2 * groups
            stored = (group < groups) & own
            store_signs(byte_ptr, groups, across, stored)
            store_signs(byte_above_ptr, groups, down, (group < groups) & (step > 0) & (top + step <= height))
            if LOSSES:
                store_signs(byte_ptr + 4 * groups, groups, d, stored)
        image_above, first_above = image, first

    sums_ptr += tl.program_id(0)
    sums_stride = tl.num_programs(0).to(tl.int64)
    if LOSSES:
        # In the order of `pixel_forward.finalize_kernel`.
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
        tl.store(sums_ptr + sums_stride * 2, tl.sum(region_sum))


@triton.jit(do_not_specialize=["first", "programs", "pairs_down", "pairs_across", "numel"])
def finalize(
    sums_ptr,  # [first + 2 or 3, programs]: down, across, summed region if needed, behind sums that are not read here
    tv_ptr,  # []
    scale_ptr,  # [2]
    total_ptr,  # [] or None
    hole_ptr,  # [] or None
    valid_ptr,  # [] or None
    weights,  # of hole, valid and tv in the total
    first,
    programs,
    pairs_down,
    pairs_across,
    numel,
    NORMALIZE: tl.constexpr,
    COLS: tl.constexpr,
):
    """Adds the partial sums; writes total variation, d tv / d (sum down, sum across), and the total of all terms."""
    programs = programs.to(tl.int64)
    sums_ptr += first * programs
    col = tl.arange(0, COLS)
    down = tl.zeros([COLS], tl.float64)
    across = tl.zeros([COLS], tl.float64)
    region = tl.zeros([COLS], tl.float64)
    for start in range(0, programs, COLS):
        at = start + col
        inside = at < programs
        down += tl.load(sums_ptr + at, mask=inside, other=0.0).to(tl.float64)
        across += tl.load(sums_ptr + programs + at, mask=inside, other=0.0).to(tl.float64)
        if NORMALIZE == "mask":
            region += tl.load(sums_ptr + 2 * programs + at, mask=inside, other=0.0).to(tl.float64)
    if NORMALIZE == "pairs":
        count_down = pairs_down.to(tl.float64)
        count_across = pairs_across.to(tl.float64)
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


def empty_signs(like: Tensor, planes: int, channels_last: bool, save: bool) -> Tensor:
    """Packed signs (uint8, 1-D) of `ops/_pairs.py`; the same size in both layouts, empty if none are kept."""
    n, c, h, w = like.shape
    allocated = n * c * h * planes * triton.cdiv(w, 8) if save else 0
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
    *,
    losses: bool,
    weights: bool,
    region_sum: bool,
) -> Tensor:
    """Partial sums [sums, programs]: hole and valid (`losses`), each with its `weights`; down, across, region."""
    pred = plan.in_layout(pred, channels_last)
    if target is not None:
        target = plan.in_layout(target, channels_last)
    ready = plan.prepare_mask(mask, pred.shape, channels_last)
    row = plan.loads_width(pred, pred if target is None else target)
    work = make_plan(pred.shape, channels_last, ready, row, region, mask_is_hole)
    count = losses * 2 * (1 + weights) + 2 + region_sum
    sums = torch.empty((count, work.programs), dtype=torch.float32, device=pred.device)
    forward_kernel[(work.programs,)](
        pred,
        target,
        ready.tensor,
        sums,
        signs,
        work.sizes,
        ready.stride_n,
        0 if channels_last else ready.stride_c,
        penalty,
        losses,
        weights,
        region_sum,
        work.tile,
        num_warps=work.warps,
    )
    return sums


def launch_finalize(
    sums: Tensor,  # see `launch_forward`
    tv: Tensor,  # []
    scale: Tensor,  # [2]
    terms: tuple[Tensor | None, Tensor | None, Tensor | None],  # total, hole, valid, each []
    weights: tuple[float, float, float],
    size: Any,
    normalize: str,
) -> None:
    """Second stage of the total variation, and of the total of all terms."""
    n, c, h, w = size
    count, programs = sums.shape
    cols, warps = (1024, 4) if programs <= 1024 else (4096, 16)
    finalize[(1,)](
        sums,
        tv,
        scale,
        *terms,
        weights,
        count - (3 if normalize == "mask" else 2),
        programs,
        n * c * (h - 1) * w,
        n * c * h * (w - 1),
        n * c * h * w,
        normalize,
        cols,
        num_warps=warps,
    )
