"""Triton kernels around the convolution of a partial convolution.

    mask_input:       out = mask == 0 ? 0 : input * mask
    finish:           out = act((raw * ratio + bias) * new_mask), 0 where new_mask is 0, and its variants
    finish_backward:  out = gradient by raw; the sums over samples and pixels of the gradient by the bias

`how` and HOW, one word: 1 the new mask weighs the bias, 2 the ratio comes after bias and activation, 4 relu,
8 leaky_relu.
Formulas: csrc/common/partial_conv.h; tiles and addressing: `partial_conv_tile.py`. Each tensor is read and written
once; a result may overwrite the operand it came from.
Sums of the bias gradient: every program stores those of its pixels, a second launch adds them in a fixed order.
Bytes an element (bfloat16, C channels a plane): 2 read and 2 written, 8 / C of the planes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .partial_conv_tile import (
    WARPS,
    is_last,
    load_plane,
    split,
    tile_inside,
    tile_place,
    tile_pointer,
)
from .partial_conv_window import window as window

# A size that happens to be 1 or divisible by 16 must not cost another compilation.
_SIZES = ["pixels", "channels", "tiles", "chunks"]


@triton.jit(do_not_specialize=_SIZES)
def mask_input_kernel(
    input_ptr,  # [samples, channels, pixels], IN_LAST: [samples, pixels, channels]
    mask_ptr,  # MASK "plane": [samples or 1, 1, pixels], "nchw" and "last": all channels; None for "none"
    out_ptr,  # as the input, by OUT_LAST
    pixels,  # in units of UNIT_P
    channels,  # in units of UNIT_C
    tiles,
    chunks,
    MASK: tl.constexpr,
    TILE: tl.constexpr,
):
    place = tile_place(pixels, channels, tiles, chunks, TILE)
    inside = tile_inside(place, TILE)
    at = tile_pointer(input_ptr, place, TILE.IN_LAST, TILE)
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if MASK != "none":
        if MASK == "plane":
            weight = load_plane(mask_ptr, place, 1, TILE)
        else:
            at = tile_pointer(mask_ptr, place, MASK == "last", TILE, TILE.SHARED)
            weight = tl.load(at, mask=inside, other=0).to(tl.float32)
        # Select, not only multiply: NaN and Inf under mask 0 do not count.
        value = tl.where(weight == 0, 0.0, value * weight)
    at = tile_pointer(out_ptr, place, TILE.OUT_LAST, TILE)
    tl.store(at, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activate(x, slope, HOW: tl.constexpr):
    """A NaN is not below 0 and stays."""
    if HOW // 4 == 0:
        return x
    return tl.where(x < 0, 0.0 if HOW // 4 == 1 else slope * x, x)


@triton.jit(do_not_specialize=[*_SIZES, "groups", "slope"])
def finish_kernel(
    raw_ptr,  # [samples, channels, pixels], IN_LAST: [samples, pixels, channels]
    ratio_ptr,  # [samples or 1, groups, pixels]
    new_mask_ptr,
    bias_ptr,  # [channels] or None
    out_ptr,  # as raw, by OUT_LAST
    pixels,  # in units of UNIT_P
    channels,  # in units of UNIT_C
    tiles,
    chunks,
    groups,
    slope,
    HOW: tl.constexpr,
    TILE: tl.constexpr,
):
    place = tile_place(pixels, channels, tiles, chunks, TILE)
    inside = tile_inside(place, TILE)
    at = tile_pointer(raw_ptr, place, TILE.IN_LAST, TILE)
    x = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    ratio = load_plane(ratio_ptr, place, groups, TILE)
    new_mask = load_plane(new_mask_ptr, place, groups, TILE)
    if HOW & 2 == 0:
        x *= ratio
    if bias_ptr is not None:
        _, _, first_c, _, all_channels = place
        c = tl.arange(0, TILE.BLOCK_C)
        bias = tl.load(bias_ptr + first_c + c, mask=c < all_channels - first_c, other=0.0)
        x += bias[None, :].to(tl.float32)
    if HOW & 1:
        x *= new_mask
    x = activate(x, slope, HOW)
    if HOW & 2:
        x *= ratio
    # Last, as every activation maps 0 to 0.
    x = tl.where(new_mask == 0, 0.0, x)
    at = tile_pointer(out_ptr, place, TILE.OUT_LAST, TILE)
    tl.store(at, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*_SIZES, "groups", "slope", "steps"])
def finish_backward_kernel(
    grad_ptr,  # [samples, channels, pixels], IN_LAST: [samples, pixels, channels]
    output_ptr,  # what `finish` gave, by OUTPUT_LAST; None without an activation
    ratio_ptr,  # [samples or 1, groups, pixels]
    new_mask_ptr,
    out_ptr,  # as the gradient, by OUT_LAST
    sums_ptr,  # [channels, samples * tiles] or None
    pixels,  # in units of UNIT_P
    channels,  # in units of UNIT_C
    tiles,
    chunks,
    groups,
    slope,
    steps,  # blocks of pixels in a tile
    HOW: tl.constexpr,
    OUTPUT_LAST: tl.constexpr,
    TILE: tl.constexpr,
):
    sample, first_p, first_c, all_pixels, all_channels = tile_place(pixels, channels, tiles, chunks, TILE)
    first_p *= steps
    BLOCK_P: tl.constexpr = TILE.BLOCK_P
    BLOCK_C: tl.constexpr = TILE.BLOCK_C
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for step in range(steps):
        place = (sample, first_p + step * BLOCK_P, first_c, all_pixels, all_channels)
        inside = tile_inside(place, TILE)
        at = tile_pointer(grad_ptr, place, TILE.IN_LAST, TILE)
        g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if HOW // 4:
            at = tile_pointer(output_ptr, place, OUTPUT_LAST, TILE)
            output = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        ratio = load_plane(ratio_ptr, place, groups, TILE)
        new_mask = load_plane(new_mask_ptr, place, groups, TILE)
        g = tl.where(new_mask == 0, 0.0, g)
        if HOW & 2:
            g *= ratio
        if HOW // 4:
            g = tl.where(output > 0, g, g * slope)
        if HOW & 1:
            g *= new_mask
        if sums_ptr is not None:
            total += g
        if HOW & 2 == 0:
            g *= ratio
        at = tile_pointer(out_ptr, place, TILE.OUT_LAST, TILE)
        tl.store(at, g.to(out_ptr.dtype.element_ty), mask=inside)
    if sums_ptr is not None:
        c = tl.arange(0, BLOCK_C)[None, :]
        at = (
            sums_ptr
            + tl.program_id(0) // chunks
            + (first_c + c).to(tl.int64) * (tl.num_programs(0) // chunks)
        )
        tl.store(at, tl.sum(total, axis=0, keep_dims=True), mask=c < all_channels - first_c)


@triton.jit(do_not_specialize=["rows"])
def add_rows_kernel(
    sums_ptr,  # [channels, rows]
    out_ptr,  # [channels]
    rows,
    COLS: tl.constexpr,
):
    """One channel of the bias gradient, in float64 and in a fixed order."""
    channel = tl.program_id(0)
    sums_ptr += channel.to(tl.int64) * rows
    col = tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.float64)
    for first in range(0, rows, COLS):
        value = tl.load(sums_ptr + first + col, mask=first + col < rows, other=0.0)
        total += value.to(tl.float64)
    tl.store(out_ptr + channel, tl.sum(total).to(tl.float32))


def mask_input(
    input: Tensor,  # [N, C, ...]
    mask: Tensor | None,  # [1 or N, 1 or C, ...]
    out: Tensor,  # [N, C, ...], may be the input
) -> None:
    """out = 0 where the mask is 0, else input * mask."""
    if input.numel() == 0:
        return
    samples, channels = input.shape[:2]
    pixels = input.numel() // (samples * channels)
    last = [is_last(t, channels, pixels) for t in (input, out)]
    shared, kind, whole = False, "none", True
    if mask is not None:
        mask_last = is_last(mask, mask.shape[1], pixels)
        shared = mask.shape[0] == 1
        kind = "plane" if mask.shape[1] == 1 else "last" if mask_last else "nchw"
        whole = mask.shape == input.shape and mask_last == last[0]
    if last[0] == last[1] and whole:
        # One long row: neither the layout nor odd sizes matter.
        samples, channels, pixels, last = 1, 1, input.numel(), [False, False]
        kind = "none" if mask is None else "plane"
    if kind in ("nchw", "last"):
        last.insert(1, kind == "last")
    work = split(samples, channels, pixels, last, shared)
    with plan.on_device(input):
        mask_input_kernel[(work.programs,)](
            input,
            mask,
            out,
            *work.sizes,
            kind,
            work.tile,
            num_warps=WARPS,
        )


def finish(
    raw: Tensor,  # [N, C, ...]
    ratio: Tensor,  # [1 or N, G, ...]
    new_mask: Tensor,
    bias: Tensor | None,  # [C]
    how: int,
    slope: float,
    out: Tensor,  # [N, C, ...], may be raw
) -> None:
    """out = the layer's result from the convolution's."""
    if raw.numel() == 0:
        return
    samples, channels = raw.shape[:2]
    pixels = raw.numel() // (samples * channels)
    groups = ratio.shape[1]
    last = [is_last(t, channels, pixels) for t in (raw, out)]
    work = split(samples, channels, pixels, last, ratio.shape[0] == 1, groups > 1)
    with plan.on_device(raw):
        finish_kernel[(work.programs,)](
            raw,
            ratio,
            new_mask,
            None if bias is None else bias.contiguous(),
            out,
            *work.sizes,
            groups,
            slope,
            how,
            work.tile,
            num_warps=WARPS,
        )


def finish_backward(
    grad: Tensor,  # [N, C, ...]
    output: Tensor | None,  # [N, C, ...], given with an activation
    ratio: Tensor,  # [1 or N, G, ...]
    new_mask: Tensor,
    how: int,
    slope: float,
    need_bias: bool,
    out: Tensor,  # [N, C, ...], may be grad
) -> Tensor:
    """out = the gradient by the convolution's result; returns the gradient by the bias (C,), or an empty tensor."""
    samples, channels = grad.shape[:2]
    if grad.numel() == 0:
        return torch.zeros(channels if need_bias else 0, dtype=ratio.dtype, device=grad.device)
    bias_grad = torch.empty(channels if need_bias else 0, dtype=ratio.dtype, device=grad.device)
    pixels = grad.numel() // (samples * channels)
    groups = ratio.shape[1]
    # Without an activation there is no output: any flag does.
    last = [is_last(grad if t is None else t, channels, pixels) for t in (grad, output, out)]
    work = split(samples, channels, pixels, last, ratio.shape[0] == 1, groups > 1, backward=True)
    rows = work.programs // work.sizes[3]
    with plan.on_device(grad):
        sums = None
        if need_bias:
            sums = torch.empty((channels, rows), dtype=torch.float32, device=grad.device)
        finish_backward_kernel[(work.programs,)](
            grad,
            output,
            ratio,
            new_mask,
            out,
            sums,
            *work.sizes,
            groups,
            slope,
            work.steps,
            how,
            last[1],
            work.tile,
            num_warps=WARPS,
        )
        if sums is not None:
            add_rows_kernel[(channels,)](
                sums,
                bias_grad,
                rows,
                1024 if rows <= 1024 else 2048,
                num_warps=4 if rows <= 1024 else 8,
            )
    return bias_grad
