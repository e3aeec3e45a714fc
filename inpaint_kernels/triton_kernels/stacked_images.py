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

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .pixel_tile import load_weight, program_place, step_start, tile_rows

# Times that the code of one part stands in a kernel, for a channel each: more would take the compiler minutes.
MAX_WRITTEN_OUT = 24

# A size that happens to be 1 or divisible by 16 must not cost another compilation.
_SIZES = ["length", "groups", "channels", "tiles", "chunks", "samples"]


@triton.jit
def add_share(total, value, weight, SHARES: tl.constexpr, INDEX: tl.constexpr):
    """Adds what a part shows of an image. The map is linear: backward, what a part's gradient sends to it.

    The tuple and an index: Triton 3.6 cannot pass a string out of a tuple on to a function.
    """
    SHARE: tl.constexpr = SHARES[INDEX]
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
    found = values[0]
    for i in tl.static_range(1, COUNT):
        found = tl.where(index == i, values[i], found)
    return found


@triton.jit
def reverse(
    length,
    groups,
    tile,
    rows,  # three [ROWS, 1], see `tile_rows`
    element,  # [ROWS, WIDTH]
    SWAP: tl.constexpr,
    PIXEL: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """(channel, offset) of the elements of a tile, counted from its first, and the offset on the side with the
    channels reversed, where there are such sides.

    PIXEL: neighbours that are the channels of one pixel, 1 in NCHW.
    """
    row_c, row_p, _ = rows
    WIDTH: tl.constexpr = element.shape[1]
    other = element
    if PIXEL > 1:
        start = tile * (BLOCK_G * 8)
        # Not `%`: Triton's interpreter has none of an int by a constexpr.
        place = (start - start // PIXEL * PIXEL).to(tl.int32) + row_p * WIDTH + tl.arange(0, WIDTH)[None, :]
        channel = place - place // PIXEL * PIXEL
        if SWAP:
            other = element + (PIXEL - 1 - 2 * channel)
    elif BLOCK_C > 1:
        channel = row_c
        if SWAP:
            channel = -row_c
            # Written as a multiple of 16, which is how the compiler knows that wide accesses are aligned.
            other = element - row_c * (groups * 16 if WHOLE else length * 2)
    else:
        channel = 0
    return channel, other


@triton.jit
def stacked_start(
    length,
    groups,
    channels,
    samples,
    part,
    sample,
    channel,
    copy,
    tile,
    SWAP: tl.constexpr,
    COPIES: tl.constexpr,
    PIXEL: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """(channel, offset) in the stacked batch of the first element of an image's tile."""
    out = channel + copy
    if SWAP and PIXEL == 1:
        out = channels - 1 - channel
    sample = samples.to(tl.int64) * part + sample
    _, start = step_start(length, groups, channels * COPIES, sample, out, tile, WHOLE, BLOCK_G)
    return out, start


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    pred_ptr,  # [samples, channels, length], None where no part shows it
    target_ptr,  # likewise
    mask_ptr,  # see `load_weight`; None for MASK "none"
    stacked_ptr,  # [parts, samples, channels * COPIES, length]
    scale,  # of every channel of `stacked`, or one for all
    shift,
    length,
    groups,
    channels,
    tiles,
    chunks,
    samples,
    stride_n,
    stride_c,
    SHARES: tl.constexpr,  # of pred and target in the first part, in the second, ...
    PARTS: tl.constexpr,
    CONSTANTS: tl.constexpr,
    SWAP: tl.constexpr,
    COPIES: tl.constexpr,
    PIXEL: tl.constexpr,
    MASK: tl.constexpr,
    CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sample, first, tile = program_place(tl.program_id(0), tiles, chunks, BLOCK_C, STEPS)
    rows, _, element, inside = tile_rows(length, groups, tile, WHOLE, BLOCK_C, BLOCK_G, WIDTH)
    row_c, _, _ = rows
    mask = mask_ptr, stride_n, stride_c
    place, other = reverse(length, groups, tile, rows, element, SWAP, PIXEL, WHOLE, BLOCK_C, BLOCK_G)
    stacked_element = element if PIXEL > 1 else other
    image_element = other if PIXEL > 1 else element
    weight = 0.0
    if MASK == "plane" or MASK == "interleaved":
        weight = load_weight(mask, sample, first, tile, rows, inside, MASK, CHANNELS, BLOCK_G)
    for step in tl.static_range(STEPS):
        channel = first + step * BLOCK_C
        _, start = step_start(length, groups, channels, sample, channel, tile, WHOLE, BLOCK_G)
        exists = inside & (row_c < channels - channel)
        if MASK == "channel":
            weight = load_weight(mask, sample, channel, tile, rows, exists, MASK, CHANNELS, BLOCK_G)
        pred = 0.0
        if pred_ptr is not None:
            pred = tl.load(pred_ptr + start + image_element, mask=exists, other=0.0).to(tl.float32)
        target = 0.0
        if target_ptr is not None:
            target = tl.load(target_ptr + start + image_element, mask=exists, other=0.0).to(tl.float32)
        for part in tl.static_range(PARTS):
            value = tl.zeros(element.shape, tl.float32)
            value = add_share(value, pred, weight, SHARES, 2 * part)
            value = add_share(value, target, weight, SHARES, 2 * part + 1)
            for copy in tl.static_range(COPIES):
                out, start = stacked_start(
                    length,
                    groups,
                    channels,
                    samples,
                    part,
                    sample,
                    channel,
                    copy,
                    tile,
                    SWAP,
                    COPIES,
                    PIXEL,
                    WHOLE,
                    BLOCK_G,
                )
                stacked = value * pick(scale, out + place, CONSTANTS) + pick(shift, out + place, CONSTANTS)
                tl.store(
                    stacked_ptr + start + stacked_element,
                    stacked.to(stacked_ptr.dtype.element_ty),
                    mask=exists,
                )


@triton.jit(do_not_specialize=_SIZES)
def backward_kernel(
    grad_ptr,  # [parts, samples, channels * COPIES, length]
    mask_ptr,  # see `load_weight`; None for MASK "none"
    grad_pred_ptr,  # [samples, channels, length] or None
    grad_target_ptr,  # [samples, channels, length] or None
    scale,  # of every channel of `grad`, or one for all
    length,
    groups,
    channels,
    tiles,
    chunks,
    samples,
    stride_n,
    stride_c,
    SHARES: tl.constexpr,  # as forward, "none" for an image whose gradient nobody wants
    PARTS: tl.constexpr,
    CONSTANTS: tl.constexpr,
    SWAP: tl.constexpr,
    COPIES: tl.constexpr,
    PIXEL: tl.constexpr,
    MASK: tl.constexpr,
    CHANNELS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    sample, first, tile = program_place(tl.program_id(0), tiles, chunks, BLOCK_C, STEPS)
    rows, _, element, inside = tile_rows(length, groups, tile, WHOLE, BLOCK_C, BLOCK_G, WIDTH)
    row_c, _, _ = rows
    mask = mask_ptr, stride_n, stride_c
    place, other = reverse(length, groups, tile, rows, element, SWAP, PIXEL, WHOLE, BLOCK_C, BLOCK_G)
    if SWAP and PIXEL > 1:
        place = PIXEL - 1 - place
    weight = 0.0
    if MASK == "plane" or MASK == "interleaved":
        weight = load_weight(mask, sample, first, tile, rows, inside, MASK, CHANNELS, BLOCK_G)
    for step in tl.static_range(STEPS):
        channel = first + step * BLOCK_C
        exists = inside & (row_c < channels - channel)
        if MASK == "channel":
            weight = load_weight(mask, sample, channel, tile, rows, exists, MASK, CHANNELS, BLOCK_G)
        to_pred = tl.zeros(element.shape, tl.float32)
        to_target = tl.zeros(element.shape, tl.float32)
        for part in tl.static_range(PARTS):
            if SHARES[2 * part] != "none" or SHARES[2 * part + 1] != "none":
                for copy in tl.static_range(COPIES):
                    out, start = stacked_start(
                        length,
                        groups,
                        channels,
                        samples,
                        part,
                        sample,
                        channel,
                        copy,
                        tile,
                        SWAP,
                        COPIES,
                        PIXEL,
                        WHOLE,
                        BLOCK_G,
                    )
                    grad = tl.load(grad_ptr + start + other, mask=exists, other=0.0).to(tl.float32)
                    grad *= pick(scale, out + place, CONSTANTS)
                    to_pred = add_share(to_pred, grad, weight, SHARES, 2 * part)
                    to_target = add_share(to_target, grad, weight, SHARES, 2 * part + 1)
        _, start = step_start(length, groups, channels, sample, channel, tile, WHOLE, BLOCK_G)
        if grad_pred_ptr is not None:
            tl.store(grad_pred_ptr + start + element, to_pred.to(grad_pred_ptr.dtype.element_ty), mask=exists)
        if grad_target_ptr is not None:
            tl.store(
                grad_target_ptr + start + element, to_target.to(grad_target_ptr.dtype.element_ty), mask=exists
            )


def _shares(parts: list[int], mask_is_hole: bool, need_pred: bool, need_target: bool) -> tuple[str, ...]:
    """The weight of pred and of target in every part: 0, 1, the mask, or what the mask leaves to 1."""
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
) -> tuple[Tensor | None, int, tuple[Any, ...], tuple[Any, ...], int]:
    """(mask, programs, run-time arguments, compile-time arguments, warps) that both kernels share."""
    channels = size[1]
    used = mask if "mask" in shares or "rest" in shares else None
    ready = plan.prepare_mask(used, size, channels_last)
    # Every part of every channel of a step is written out.
    steps = max(1, MAX_WRITTEN_OUT // (len(shares) // 2 * (out_channels // channels)))
    steps = min(steps, plan.MAX_STEPS)
    work, kind = plan.make_plan(size, channels_last, ready, False, True, max_steps=steps, channels_apart=True)
    numbers = (*work[:5], work.samples, ready.stride_n, ready.stride_c)
    compiled = (
        shares,
        len(shares) // 2,
        constants,
        swap and channels > 1,
        out_channels // channels,
        channels if channels_last else 1,
        kind,
        channels if kind == "interleaved" else 1,
        *work[5:9],
        width,
    )
    return ready.tensor, work.programs, numbers, compiled, work.warps


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
    ready, programs, numbers, compiled, warps = _plan(
        pred.shape, channels_last, mask, shares, channels, constants, swap, plan.stores_width(out)
    )
    with plan.on_device(pred):
        forward_kernel[(programs,)](
            plan.in_layout(pred, channels_last) if set(shares[::2]) != {"none"} else None,
            plan.in_layout(target, channels_last) if set(shares[1::2]) != {"none"} else None,
            ready,
            out,
            _constants(scale, 1.0, constants),
            _constants(shift, 0.0, constants),
            *numbers,
            *compiled,
            num_warps=warps,
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
    ready, programs, numbers, compiled, warps = _plan(
        size, channels_last, mask, shares, grad.shape[1], constants, swap, width
    )
    with plan.on_device(grad):
        backward_kernel[(programs,)](
            plan.in_layout(grad, channels_last),
            ready,
            grad_pred if need_pred else None,
            grad_target if need_target else None,
            _constants(scale, 1.0, constants),
            *numbers,
            *compiled,
            num_warps=warps,
        )
    return grad_pred, grad_target


def _constants(values: list[float], otherwise: float, count: int) -> tuple[float, ...]:
    """`count` constants from none, one or all of them."""
    return tuple(values) if len(values) == count else (values[0] if values else otherwise,) * count
