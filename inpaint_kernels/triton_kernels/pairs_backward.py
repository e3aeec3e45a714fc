"""Backward Triton kernel over neighbouring pixels, of total_variation and inpainting_pixel.

    grad x = sum over the pairs that end in a pixel - sum over those that begin in it, of c * w * penalty'(difference)
    grad_pred = hole * grad x, grad_target = valid * grad x; with hole and valid losses +- (c_hole * hole + c_valid *
    valid) * sign(pred - target); without a composite grad_image = grad x

l1 reads the packed signs of `pairs_forward.py`, l2 the images again. One pass: a row is finished when the pairs that
end in the one below it are known. Bytes an element (float32, C channels, float32 mask of one channel): l1 1/2 or 3/4
of signs and 4/C of mask read, 4 written for each gradient. Work split and addressing: `pairs_tile.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .pairs_tile import (
    NO_WEIGHTS,
    after_edge,
    ahead,
    behind,
    load_image,
    load_mask,
    load_signs,
    load_signs_before,
    make_plan,
    reach,
    region_values,
    row_stride,
    tile_place,
    unpacked_sizes,
    wider,
)
from .pixel_tile import apply_signs, penalty_grad, region_weights


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
def square_gradient(d, weight, coefficient):
    """What pairs of difference d send to their second pixel for l2."""
    return tl.where(weight != 0, coefficient * weight * penalty_grad(d, "l2", 0.0), 0.0)


@triton.jit
def backward_kernel(
    grad_total_ptr,  # [] or None
    grad_hole_ptr,  # [] or None
    grad_valid_ptr,  # [] or None
    grad_tv_ptr,  # [] or None
    scale_ptr,  # [N, 2], or None: no losses
    tv_scale_ptr,  # [2]
    signs_ptr,  # [samples, channels, height, planes, groups] uint8 for l1, else None
    mask_ptr,  # [H, W] or [N|1, C|1, H, W], or None
    pred_ptr,  # [samples, channels, height, width], None for l1
    target_ptr,  # [samples, channels, height, width], None for l1 and where there is no composite
    grad_pred_ptr,  # [samples, channels, height, width] or None
    grad_target_ptr,  # [samples, channels, height, width] or None
    sizes,  # see `Plan`
    stride_n,  # of the mask
    stride_c,
    weights,  # of hole, valid and tv in the total
    PENALTY: tl.constexpr,
    COMPOSITE: tl.constexpr,
    TILE: tl.constexpr,
):
    STEPS: tl.constexpr = TILE.STEPS
    STEP: tl.constexpr = TILE.STEP
    sizes = unpacked_sizes(sizes)
    height, _, groups, _, _, _ = sizes
    top, top_row, group, place, mask_offset, mask_place = tile_place(sizes, stride_n, stride_c, TILE)
    sample, start, at, edge, inside, _, _ = place
    AFTER: tl.constexpr = after_edge(STEP, STEP, TILE.WIDTH)
    stride = row_stride(sizes, 1, TILE.WHOLE)
    image_start = top_row * stride + start
    if mask_ptr is not None:
        mask_ptr += mask_offset
    PLANES: tl.constexpr = 4 if scale_ptr is None else 6
    if PENALTY == "l1":
        sign_stride = groups.to(tl.int64) * PLANES
        signs_ptr += top_row * sign_stride + group
    else:
        pred_ptr += image_start
        if target_ptr is not None:
            target_ptr += image_start
    images = pred_ptr, target_ptr

    grad_tv = upstream(grad_tv_ptr, grad_total_ptr, weights[2])
    down_factor = grad_tv * tl.load(tv_scale_ptr)
    across_factor = grad_tv * tl.load(tv_scale_ptr + 1)
    if scale_ptr is not None:
        scale_ptr += sample * 2
        hole_factor = upstream(grad_hole_ptr, grad_total_ptr, weights[0]) * tl.load(scale_ptr)
        valid_factor = upstream(grad_valid_ptr, grad_total_ptr, weights[1])
        valid_factor *= tl.load(scale_ptr + 1)

    zeros = tl.zeros(at.shape, tl.float32)
    # What the row above hands down: its region, its image, and its gradient but for the pairs that begin there.
    has_above = inside[1] & (top > 0) & (top <= height)
    mask_above = load_mask(mask_ptr, mask_place, place, -1, has_above, TILE)[1]
    widest_above = mask_above
    if TILE.REGION == "dilated_hole":
        far_above = reach(mask_ptr, mask_place, place, sizes, top, -2, TILE)
        near = reach(mask_ptr, mask_place, place, sizes, top, -1, TILE)
        last = reach(mask_ptr, mask_place, place, sizes, top, 0, TILE)
        near = wider(near, last, TILE)
        widest_above = wider(far_above, near, TILE)[1]
    first_above = region_values(widest_above, has_above, TILE)[0]
    image_above, gradient_above = zeros, zeros
    if PENALTY == "l2":
        image_above = load_image(images, at - stride, has_above, mask_above, TILE)[0]
    # One row more than the chunk has: a row is finished when the one below it is there.
    for step in range(STEPS + 1):
        exists = top + step < height
        exists_above = (top + step > 0) & (top + step <= height)
        before, here, after = load_mask(mask_ptr, mask_place, place, step, exists, TILE)
        if TILE.REGION == "dilated_hole":
            below = reach(mask_ptr, mask_place, place, sizes, top, step + 1, TILE)
            widest = wider(near, below, TILE)
            near, last = wider(last, below, TILE), below
        else:
            widest = before, here, after
        first_before = region_values(widest[0], inside[0] & exists, TILE)[0]
        first, second = region_values(widest[1], inside[1] & exists, TILE)
        second_after = region_values(widest[2], inside[2] & exists, TILE)[1]
        weight_left = behind(first, first_before, TILE) * second
        weight_right = first * ahead(second, second_after, TILE)
        weight_upper = first_above * second
        if PENALTY == "l1":
            if TILE.REGION == "image":
                # A pair without a sign does not exist, and the others weigh 1.
                weight_left, weight_right, weight_upper = zeros + 1.0, zeros + 1.0, zeros + 1.0
            byte_ptr = signs_ptr + step * sign_stride
            byte_above_ptr = byte_ptr - sign_stride
            kept, kept_above = (group < groups) & exists, (group < groups) & exists_above
            word_left = load_signs_before(byte_ptr, group, groups, kept, TILE)
            word_right = load_signs(byte_ptr, groups, kept)
            word_upper = load_signs(byte_above_ptr + 2 * groups, groups, kept_above)
            left = apply_signs(word_left, weight_left * across_factor)
            right = apply_signs(word_right, weight_right * across_factor)
            upper = apply_signs(word_upper, weight_upper * down_factor)
        else:
            offset = step * stride
            image_before = load_image(images, offset + edge - STEP, inside[0] & exists, before, TILE)[0]
            image = load_image(images, offset + at, inside[1] & exists, here, TILE)[0]
            image_after = load_image(images, offset + edge + AFTER, inside[2] & exists, after, TILE)[0]
            left = square_gradient(image - behind(image, image_before, TILE), weight_left, across_factor)
            right = square_gradient(ahead(image, image_after, TILE) - image, weight_right, across_factor)
            upper = square_gradient(image - image_above, weight_upper, down_factor)
            image_above = image
        to_pred = gradient_above - upper
        gradient_above = left - right + upper
        first_above = first

        written = inside[1] & (step > 0) & exists_above
        if COMPOSITE:
            weight = load_mask(mask_ptr, mask_place, place, step - 1, exists_above, TILE)[1]
            hole, valid = region_weights(weight, TILE.HOLE)
            to_target = tl.where(valid != 0, valid * to_pred, 0.0)
            to_pred = tl.where(hole != 0, hole * to_pred, 0.0)
            if scale_ptr is not None:
                word = load_signs(byte_above_ptr + 4 * groups, groups, kept_above)
                coefficient = tl.where(hole != 0, hole * hole_factor, 0.0)
                coefficient += tl.where(valid != 0, valid * valid_factor, 0.0)
                pixel = apply_signs(word, coefficient)
                to_pred += pixel
                to_target -= pixel
        above_start = image_start + (step - 1) * stride
        if grad_pred_ptr is not None:
            to_pred = to_pred.to(grad_pred_ptr.dtype.element_ty)
            tl.store(grad_pred_ptr + above_start + at, to_pred, mask=written)
        if grad_target_ptr is not None:
            to_target = to_target.to(grad_target_ptr.dtype.element_ty)
            tl.store(grad_target_ptr + above_start + at, to_target, mask=written)


def launch_backward(
    grads: tuple[Tensor | None, ...],  # of total, hole, valid and tv, each []
    scale: Tensor | None,  # [N, 2], or None: no losses
    tv_scale: Tensor,  # [2]
    signs: Tensor | None,  # uint8, l1 only
    mask: Tensor | None,  # [H, W] or [N|1, C|1, H, W]
    pred: Tensor | None,  # [N, C, H, W], l2 only
    target: Tensor | None,  # [N, C, H, W], l2 only
    size: Any,
    channels_last: bool,
    pred_dtype: torch.dtype,
    target_dtype: torch.dtype,
    composite: bool,
    region: str,
    penalty: str,
    mask_is_hole: bool,
    need_pred: bool,
    need_target: bool,
    weights: tuple[float, float, float] = NO_WEIGHTS,  # of hole, valid and tv in the total
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
        # Every pair that has a sign weighs 1.
        region = "image"
    if region == "image" and not composite:
        mask = None
    ready = plan.prepare_mask(mask, size, channels_last)
    width = plan.stores_width(grad_pred, grad_target)
    work = make_plan(size, channels_last, ready, width, region, mask_is_hole)
    with plan.on_device(tv_scale):
        backward_kernel[(work.programs,)](
            *grads,
            None if scale is None else scale.contiguous(),
            tv_scale.contiguous(),
            signs,
            ready.tensor,
            pred,
            target,
            grad_pred if need_pred else None,
            grad_target if need_target else None,
            work.sizes,
            ready.stride_n,
            0 if channels_last else ready.stride_c,
            weights,
            penalty,
            composite,
            work.tile,
            num_warps=work.warps,
        )
    return grad_pred, grad_target
