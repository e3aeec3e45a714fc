"""Triton kernels of the batch a feature trunk reads: every image read once, every part written once.

    stacked[p N + n] = scale * part_p(pred, target, mask)_n + shift, channels replicated or in reverse order
    grad_pred = sum over the parts of scale * weight of pred * grad[p N + n], grad_target likewise

An image whose weight in a part is exactly 0 is selected away, not multiplied. Saved for backward: the mask.
One launch each way. The parts are compiled in, the constants of the channels are parameters of the launch.
Bytes an element (float32, C channels, float32 mask of one channel, the parts raw, composite, target): forward
8 + 4/C read and 12 written; backward to pred 8 + 4/C read and 4 written; a gradient that nobody needs is not read.
Work split and addressing: `pixel_tile.py`, cut over the images. In channels_last the channel changes from element to
element, and a swap reads element by element; what is written goes in whole rows.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .pixel_tile import layer_place, load_weight, step_start

# Times that the code of one part stands in a kernel, for a channel each: more would take the compiler minutes.
MAX_WRITTEN_OUT = 24


class Stack(NamedTuple):
    """What both kernels are compiled for beside the tile."""

    SHARES: tuple[str, ...]  # of pred and target in the first part, in the second, ...
    PARTS: int
    CONSTANTS: int  # of the channels: all or one
    SWAP: bool  # whether the channels are reversed
    REPEATS: int  # of an image's channel in the stacked batch
    PIXEL: int  # neighbours that are the channels of one pixel, 1 in NCHW


@triton.constexpr_function
def share_of(STACK, INDEX):
    """Triton 3.6 cannot pass a string out of a tuple on to a function."""
    return STACK.SHARES[INDEX]


@triton.jit
def add_share(total, value, weight, STACK: tl.constexpr, INDEX: tl.constexpr):
    """Adds the share of an image in a part. The map is linear: backward, the part's gradient has the same share."""
    SHARE: tl.constexpr = share_of(STACK, INDEX)
    if SHARE == "all":
        total += value
    elif SHARE != "none":
        if SHARE == "rest":
            weight = 1.0 - weight
        total += tl.where(weight != 0, weight * value, 0.0)
    return total


@triton.jit
def pick(values, index, COUNT: tl.constexpr):
    """values[index] of a tuple, for an index that is known on the GPU alone."""
    value = values[0]
    for i in tl.static_range(1, COUNT):
        value = tl.where(index == i, values[i], value)
    return value


@triton.jit
def reverse(counts, tile, inner, STACK: tl.constexpr, TILE: tl.constexpr):
    """(channel, offset) of the elements of a tile, counted from its first, and the offset on the side with the
    channels reversed, where there are such sides.
    """
    length, groups, _, _, _, _ = counts
    rows, _, element, _ = inner
    row_c, row_p, _ = rows
    WIDTH: tl.constexpr = TILE.WIDTH
    PIXEL: tl.constexpr = STACK.PIXEL
    other = element
    if PIXEL > 1:
        start = tile * (TILE.BLOCK_G * 8)
        # Not `%`: Triton's interpreter has none of an int by a constexpr.
        position = (
            (start - start // PIXEL * PIXEL).to(tl.int32) + row_p * WIDTH + tl.arange(0, WIDTH)[None, :]
        )
        channel = position - position // PIXEL * PIXEL
        if STACK.SWAP:
            other = element + (PIXEL - 1 - 2 * channel)
    elif TILE.BLOCK_C > 1:
        channel = row_c
        if STACK.SWAP:
            channel = -row_c
            # Written as a multiple of 16, which is how the compiler knows that wide accesses are aligned.
            other = element - row_c * (groups * 16 if TILE.WHOLE else length * 2)
    else:
        channel = 0
    return channel, other


@triton.jit
def stacked_start(counts, part, sample, channel, repeat, tile, STACK: tl.constexpr, TILE: tl.constexpr):
    """(channel, offset) in the stacked batch of the first element of an image's tile."""
    length, groups, channels, samples, _, _ = counts
    out = channel + repeat
    if STACK.SWAP and STACK.PIXEL == 1:
        out = channels - 1 - channel
    sample = samples.to(tl.int64) * part + sample
    _, start = step_start(length, groups, channels * STACK.REPEATS, sample, out, tile, TILE)
    return out, start


@triton.jit
def forward_kernel(
    pred_ptr,  # [samples, channels, length], None where no part shows it
    target_ptr,  # likewise
    mask_ptr,  # see `load_weight`; None for MASK "none"
    stacked_ptr,  # [parts, samples, channels * REPEATS, length]
    scale,  # of every channel of `stacked`, or one for all
    shift,
    sizes,  # see `plan.Layer`
    STACK: tl.constexpr,
    TILE: tl.constexpr,
):
    STEPS: tl.constexpr = TILE.STEPS
    PARTS: tl.constexpr = STACK.PARTS
    REPEATS: tl.constexpr = STACK.REPEATS
    CONSTANTS: tl.constexpr = STACK.CONSTANTS
    counts, place, inner = layer_place(tl.program_id(0), sizes, TILE)
    length, groups, channels, _, stride_n, stride_c = counts
    sample, first, tile = place
    rows, _, element, inside = inner
    row_c, _, _ = rows
    mask = mask_ptr, stride_n, stride_c
    place_c, other = reverse(counts, tile, inner, STACK, TILE)
    stacked_element = element if STACK.PIXEL > 1 else other
    image_element = other if STACK.PIXEL > 1 else element
    weight = 0.0
    if TILE.MASK == "plane" or TILE.MASK == "interleaved":
        weight = load_weight(mask, sample, first, tile, rows, inside, TILE)
    for step in tl.static_range(STEPS):
        channel = first + step * TILE.BLOCK_C
        _, start = step_start(length, groups, channels, sample, channel, tile, TILE)
        exists = inside & (row_c < channels - channel)
        if TILE.MASK == "channel":
            weight = load_weight(mask, sample, channel, tile, rows, exists, TILE)
        pred = 0.0
        if pred_ptr is not None:
            pred = tl.load(pred_ptr + start + image_element, mask=exists, other=0.0).to(tl.float32)
        target = 0.0
        if target_ptr is not None:
            target = tl.load(target_ptr + start + image_element, mask=exists, other=0.0).to(tl.float32)
        for part in tl.static_range(PARTS):
            value = tl.zeros(element.shape, tl.float32)
            value = add_share(value, pred, weight, STACK, 2 * part)
            value = add_share(value, target, weight, STACK, 2 * part + 1)
            for repeat in tl.static_range(REPEATS):
                out, start = stacked_start(counts, part, sample, channel, repeat, tile, STACK, TILE)
                c = out + place_c
                stacked = value * pick(scale, c, CONSTANTS) + pick(shift, c, CONSTANTS)
                stacked = stacked.to(stacked_ptr.dtype.element_ty)
                tl.store(stacked_ptr + start + stacked_element, stacked, mask=exists)


@triton.jit
def backward_kernel(
    grad_ptr,  # [parts, samples, channels * REPEATS, length]
    mask_ptr,  # see `load_weight`; None for MASK "none"
    grad_pred_ptr,  # [samples, channels, length] or None
    grad_target_ptr,  # [samples, channels, length] or None
    scale,  # of every channel of `grad`, or one for all
    sizes,  # see `plan.Layer`
    STACK: tl.constexpr,  # the share of an image whose gradient nobody wants is "none"
    TILE: tl.constexpr,
):
    STEPS: tl.constexpr = TILE.STEPS
    PARTS: tl.constexpr = STACK.PARTS
    REPEATS: tl.constexpr = STACK.REPEATS
    CONSTANTS: tl.constexpr = STACK.CONSTANTS
    counts, place, inner = layer_place(tl.program_id(0), sizes, TILE)
    length, groups, channels, _, stride_n, stride_c = counts
    sample, first, tile = place
    rows, _, element, inside = inner
    row_c, _, _ = rows
    mask = mask_ptr, stride_n, stride_c
    place_c, other = reverse(counts, tile, inner, STACK, TILE)
    if STACK.SWAP and STACK.PIXEL > 1:
        place_c = STACK.PIXEL - 1 - place_c
    weight = 0.0
    if TILE.MASK == "plane" or TILE.MASK == "interleaved":
        weight = load_weight(mask, sample, first, tile, rows, inside, TILE)
    for step in tl.static_range(STEPS):
        channel = first + step * TILE.BLOCK_C
        exists = inside & (row_c < channels - channel)
        if TILE.MASK == "channel":
            weight = load_weight(mask, sample, channel, tile, rows, exists, TILE)
        to_pred = tl.zeros(element.shape, tl.float32)
        to_target = tl.zeros(element.shape, tl.float32)
        for part in tl.static_range(PARTS):
            if share_of(STACK, 2 * part) != "none" or share_of(STACK, 2 * part + 1) != "none":
                for repeat in tl.static_range(REPEATS):
                    out, start = stacked_start(counts, part, sample, channel, repeat, tile, STACK, TILE)
                    grad = tl.load(grad_ptr + start + other, mask=exists, other=0.0).to(tl.float32)
                    grad *= pick(scale, out + place_c, CONSTANTS)
                    to_pred = add_share(to_pred, grad, weight, STACK, 2 * part)
                    to_target = add_share(to_target, grad, weight, STACK, 2 * part + 1)
        _, start = step_start(length, groups, channels, sample, channel, tile, TILE)
        if grad_pred_ptr is not None:
            to_pred = to_pred.to(grad_pred_ptr.dtype.element_ty)
            tl.store(grad_pred_ptr + start + element, to_pred, mask=exists)
        if grad_target_ptr is not None:
            to_target = to_target.to(grad_target_ptr.dtype.element_ty)
            tl.store(grad_target_ptr + start + element, to_target, mask=exists)


def _shares(parts: list[int], mask_is_hole: bool, need_pred: bool, need_target: bool) -> tuple[str, ...]:
    """The weight of pred and of target in every part: 0, 1, the mask, or 1 - the mask."""
    hole, valid = ("mask", "rest") if mask_is_hole else ("rest", "mask")
    # In the order of `reference/stacked_images.py`: raw, composite, target, hole_raw, hole_target.
    pred, target = ("all", hole, "none", hole, "none"), ("none", valid, "all", "none", hole)
    return tuple(
        share[part] if needed else "none"
        for part in parts
        for share, needed in ((pred, need_pred), (target, need_target))
    )


def _plan(
    size: Any,
    channels_last: bool,
    mask: Tensor | None,
    shares: tuple[str, ...],
    out_channels: int,
    constants: int,
    swap: bool,
    width: int,
) -> tuple[plan.Layer, Stack]:
    """Work split and compiled settings that both kernels share."""
    parts, repeats = len(shares) // 2, out_channels // size[1]
    # Every part of every channel of a step is written out.
    steps = max(1, min(MAX_WRITTEN_OUT // (parts * repeats), plan.MAX_STEPS))
    layer = plan.make_layer(
        size,
        size[0],
        channels_last,
        mask if "mask" in shares or "rest" in shares else None,
        signs=False,
        width=width,
        elements=math.prod(size),
        per_sample=True,
        channels_apart=True,
        max_steps=steps,
    )
    pixel = size[1] if channels_last else 1
    return layer, Stack(shares, parts, constants, swap and size[1] > 1, repeats, pixel)


def forward(
    pred: Tensor,  # [N, C, H, W]
    target: Tensor,  # [N, C, H, W]
    mask: Tensor | None,  # [H, W] or [N|1, C|1, H, W]
    parts: list[int],
    scale: list[float],
    shift: list[float],
    swap: bool,
    mask_is_hole: bool,
) -> Tensor:
    """The stacked batch of `ops/stacked_images.py`."""
    n, c, h, w = pred.shape
    channels = max(c, len(scale), len(shift))
    channels_last = plan.is_channels_last(pred)
    dtype = torch.promote_types(pred.dtype, target.dtype)
    out = plan.empty_image(pred, (len(parts) * n, channels, h, w), channels_last, dtype)
    if out.numel() == 0:
        return out
    if swap and channels_last and mask is not None and mask.ndim == 4 and mask.shape[1] > 1:
        # Read along with the stacked batch, whose channels are the other way round.
        mask = mask.flip(1)
    constants = max(len(scale), len(shift), 1)
    shares = _shares(parts, mask_is_hole, True, True)
    layer, stack = _plan(
        pred.shape, channels_last, mask, shares, channels, constants, swap, plan.stores_width(out)
    )
    with plan.on_device(pred):
        forward_kernel[(layer.programs,)](
            plan.in_layout(pred, channels_last) if set(shares[::2]) != {"none"} else None,
            plan.in_layout(target, channels_last) if set(shares[1::2]) != {"none"} else None,
            layer.mask,
            out,
            _constants(scale, 1.0, constants),
            _constants(shift, 0.0, constants),
            layer.sizes,
            stack,
            layer.tile,
            num_warps=layer.warps,
        )
    return out


def backward(
    grad: Tensor,  # [parts N, channels, H, W]
    mask: Tensor | None,  # [H, W] or [N|1, C|1, H, W]
    size: Any,
    channels_last: bool,
    pred_dtype: torch.dtype,
    target_dtype: torch.dtype,
    parts: list[int],
    scale: list[float],
    swap: bool,
    mask_is_hole: bool,
    need_pred: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_pred, grad_target) of `ops/stacked_images.py`."""
    grad_pred, grad_target = plan.empty_gradients(
        grad, size, channels_last, pred_dtype, target_dtype, need_pred, need_target
    )
    if grad_pred.numel() + grad_target.numel() == 0:
        return grad_pred, grad_target
    constants = max(len(scale), 1)
    shares = _shares(parts, mask_is_hole, need_pred, need_target)
    width = plan.stores_width(grad_pred, grad_target)
    layer, stack = _plan(size, channels_last, mask, shares, grad.shape[1], constants, swap, width)
    with plan.on_device(grad):
        backward_kernel[(layer.programs,)](
            plan.in_layout(grad, channels_last),
            layer.mask,
            grad_pred if need_pred else None,
            grad_target if need_target else None,
            _constants(scale, 1.0, constants),
            layer.sizes,
            stack,
            layer.tile,
            num_warps=layer.warps,
        )
    return grad_pred, grad_target


def _constants(values: list[float], otherwise: float, count: int) -> tuple[float, ...]:
    """`count` constants from none, one or all of them."""
    return tuple(values) if len(values) == count else (values[0] if values else otherwise,) * count
