"""Backward kernel of the pixel losses: the gradients of input and target."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, repeat
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .pixel_tile import (
    Pair,
    apply_signs,
    kernel_tensors,
    layer_place,
    load_weight,
    penalty_grad,
    region_weights,
    step_start,
    tile_of,
    unpacked,
)


@triton.jit
def backward_layer(
    program,
    grads,  # of each region [] or None; MAP: [samples, channels, length]
    scale_ptr,  # [samples, regions] if PER_SAMPLE, else [1], or None
    tensors,  # input, target, mask, signs, grad_input, grad_target; see `kernel_tensors`
    sizes,  # see `plan.Layer`
    param,
    PENALTY: tl.constexpr,
    HOLE: tl.constexpr,  # of two regions, whether the mask is 1 in the hole; None for one
    MAP: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    TILES: tl.constexpr,
    LAYER: tl.constexpr,
):
    TILE: tl.constexpr = tile_of(TILES, LAYER)
    MASK: tl.constexpr = TILE.MASK
    SHARED: tl.constexpr = TILE.SHARED
    STEPS: tl.constexpr = TILE.STEPS
    PREDICTIONS: tl.constexpr = TILE.PREDICTIONS
    grad_ptr, grad_2_ptr = grads
    input_ptr, target_ptr, mask_ptr, signs_ptr, grad_input_ptr, grad_target_ptr = tensors
    counts, place, inner = layer_place(program, sizes, TILE)
    length, groups, channels, samples, stride_n, stride_c = counts
    mask = mask_ptr, stride_n, stride_c
    sample, first, tile = place
    rows, group, element, inside = inner
    row_c, _, row_inside = rows
    if PER_SAMPLE and scale_ptr is not None:
        scale_ptr += sample * (1 if HOLE is None else 2)
    if grad_ptr is not None and not MAP:
        factor = tl.load(grad_ptr).to(tl.float32)
        if scale_ptr is not None:
            factor *= tl.load(scale_ptr)
    if grad_2_ptr is not None:
        factor_2 = tl.load(grad_2_ptr).to(tl.float32) * tl.load(scale_ptr + 1)
    if SHARED and (MASK == "plane" or MASK == "interleaved"):
        weight = load_weight(mask, sample, first, tile, rows, inside, TILE)
    for step in tl.static_range(STEPS):
        channel = first + step * TILE.BLOCK_C
        valid_c = row_c < channels - channel
        exists = inside & valid_c
        if signs_ptr is None:
            _, start = step_start(length, groups, channels, sample, channel, tile, TILE)
            target = tl.load(target_ptr + start + element, mask=exists, other=0.0).to(tl.float32)
        for prediction in tl.static_range(PREDICTIONS):
            at = sample + prediction * samples
            group_start, start = step_start(length, groups, channels, at, channel, tile, TILE)
            if MASK != "none" and (not SHARED or (prediction == 0 and MASK == "channel")):
                weight = load_weight(mask, at, channel, tile, rows, exists, TILE)
            if MAP:
                factor = tl.load(grad_ptr + start + element, mask=exists, other=0.0).to(tl.float32)
            value = tl.zeros(element.shape, tl.float32)
            if MASK == "none":
                value += factor
                counted = exists
            elif HOLE is None:
                value += factor
                value *= weight
                counted = weight != 0
            else:
                hole, valid = region_weights(weight, HOLE)
                counted = value != 0
                if grad_ptr is not None:
                    value += tl.where(hole != 0, factor * hole, 0.0)
                    counted = counted | (hole != 0)
                if grad_2_ptr is not None:
                    value += tl.where(valid != 0, factor_2 * valid, 0.0)
                    counted = counted | (valid != 0)
            if signs_ptr is not None:
                word = tl.load(signs_ptr + group_start + group, mask=row_inside & valid_c, other=0)
                value = apply_signs(word, value)
            else:
                d = tl.load(input_ptr + start + element, mask=exists, other=0.0).to(tl.float32) - target
                # A NaN in a region that sends no gradient must not reach the other one's as 0 * NaN.
                value = tl.where(counted, value * penalty_grad(d, PENALTY, param), 0.0)
            if grad_input_ptr is not None:
                dtype = grad_input_ptr.dtype.element_ty
                tl.store(grad_input_ptr + start + element, value.to(dtype), mask=exists)
            if grad_target_ptr is not None:
                dtype_2 = grad_target_ptr.dtype.element_ty
                tl.store(grad_target_ptr + start + element, (-value).to(dtype_2), mask=exists)


@triton.jit
def backward_kernel(
    grads,  # of each region, see `backward_layer`
    scale_ptr,  # [rows, regions] or None
    layers,  # the tensors of each, see `kernel_tensors`
    firsts,  # first program of each layer, see `plan.packed`
    sizes,  # of each layer, see `plan.Layer`
    param,  # of the penalty
    PENALTY: tl.constexpr,
    HOLE: tl.constexpr,  # of two regions, whether the mask is 1 in the hole; None for one
    MAP: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    TILES: tl.constexpr,  # of each layer, see `plan.Tile`
    NUMBERS: tl.constexpr,  # first row of each layer in scale
    LAYERS: tl.constexpr,
):
    program = tl.program_id(0)
    for layer in tl.static_range(LAYERS):
        first = unpacked(firsts[layer])
        if (program >= first) & (program < unpacked(firsts[layer + 1])):
            at = program - first
            rows = scale_ptr if scale_ptr is None else scale_ptr + NUMBERS[layer]
            size, tensors = sizes[layer], layers[layer]
            backward_layer(
                at, grads, rows, tensors, size, param, PENALTY, HOLE, MAP, PER_SAMPLE, TILES, layer
            )


def launch_backward(
    pairs: Sequence[Pair],
    grads: Sequence[Tensor | None],  # [] of each region, or [N, C, H, W] of a map
    scale: Tensor,  # [rows, regions]; empty for a map
    penalty: str,
    param: float,
    *,
    mask_is_hole: bool | None = None,  # of two regions
    per_sample: bool = True,  # a row of `scale` is a sample, not a layer
    numbers: Sequence[int] = (0,),  # first row of each layer
) -> None:
    """Fills the gradients of the pairs."""
    l1 = penalty == "l1"
    images: list[Any] = [p.grad_target if p.grad_input is None else p.grad_input for p in pairs]
    last = [plan.is_channels_last(x) for x in images]
    # The gradient of a summed map is one number expanded to the image: read it as such.
    grad = grads[0]
    is_map = grad is not None and grad.ndim != 0 and any(grad.stride())
    if grad is not None and is_map:
        grads = [plan.in_layout(grad, last[0])]
    elements = max(x.numel() // x.shape[0] * p.batch for x, p in zip(images, pairs, strict=True))
    layers = []
    for x, p, c in zip(images, pairs, last, strict=True):
        width = plan.stores_width(*(g for g in (p.grad_input, p.grad_target) if g is not None))
        # A 0/1 mask adds nothing to the signs of one region, which are 0 where it is 0; the scale of its sample does.
        known = l1 and mask_is_hole is None and p.mask is not None and p.mask.dtype == torch.bool
        mask, apart = None if known else p.mask, per_sample and p.mask is not None
        layers.append(plan.make_layer(x.shape, p.batch, c, mask, l1, width, elements, apart))
    firsts = (0, *accumulate(layer.programs for layer in layers))
    with plan.on_device(scale):
        backward_kernel[(firsts[-1],)](
            (*grads, None)[:2],
            scale.contiguous() if scale.numel() else None,
            tuple(map(kernel_tensors, pairs, layers, last, repeat(True))),
            plan.packed(firsts),
            tuple(layer.sizes for layer in layers),
            param,
            penalty,
            mask_is_hole,
            is_map,
            per_sample,
            tuple(layer.tile for layer in layers),
            tuple(numbers),
            len(layers),
            num_warps=layers[0].warps,
        )


def image_backward(
    grads: Sequence[Tensor | None],  # [] of each region, or [N, C, H, W] of a map
    scale: Tensor,  # [N, regions], or [0]
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
    mask_is_hole: bool | None,  # of two regions
    need_pred: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_pred, grad_target) of a loss on images."""
    needed = plan.empty_gradients(
        scale, size, channels_last, pred_dtype, target_dtype, need_pred, need_target
    )
    if any(g.numel() for g in needed):
        pair = Pair(size[0], pred, target, mask, signs, *(g if g.numel() else None for g in needed))
        launch_backward([pair], grads, scale, penalty, param, mask_is_hole=mask_is_hole)
    return needed
