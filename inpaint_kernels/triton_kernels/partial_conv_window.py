"""Triton kernels of the mask's way through a partial convolution: window sums, ratio and new mask.

    s = sum of the mask over a window, zeros outside;  (ratio, new_mask) as in `reference/partial_conv.py`

A mask of several channels is first summed over the channels of each group into one float32 plane, every element read
once; a mask whose pixels are not evenly apart, as those of a crop, is copied before. Then the same box filter runs
that takes a single-channel mask as it lies in memory, whatever its strides. The filter adds the kh * kw values of a
window one by one: neighbouring windows find them in the first-level cache, and the plane is small beside the
features. 2D is 3D of depth 1.
Bytes a pixel of a float32 mask (C channels): 4 C + 4 for the sum, 4 read and 8 written for the windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .partial_conv_tile import fitting_block
from .pixel_tile import unpacked

# Elements of a tile and its warps. Reasoned, not measured.
SUM_TILE, SUM_WARPS = 1024, 4
BOX_TILE, BOX_WARPS = 512, 4
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit(do_not_specialize=["groups", "tiles"])
def channel_sum_kernel(
    mask_ptr,  # [samples, groups * members, pixels], any strides
    sums_ptr,  # [samples, groups, pixels]
    groups,
    tiles,
    members,  # from here on specialised: wide loads need to know what 16 divides
    pixels,
    stride_n,
    stride_c,
    stride_p,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    tile = program % tiles
    group = (program // tiles) % groups
    sample = (program // tiles // groups).to(tl.int64)
    pixel = tile.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    channel = tl.arange(0, BLOCK_C)[None, :]
    mask_ptr += sample * stride_n + group.to(tl.int64) * members * stride_c
    place = pixel * stride_p
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(0, members, BLOCK_C):
        at = place + (first + channel).to(tl.int64) * stride_c
        inside = (pixel < pixels) & (first + channel < members)
        total += tl.load(mask_ptr + at, mask=inside, other=0).to(tl.float32)
    sums_ptr += (sample * groups + group) * pixels
    tl.store(sums_ptr + pixel, tl.sum(total, axis=1, keep_dims=True), mask=pixel < pixels)


@triton.jit(do_not_specialize=["multiplicity", "numerator", "size"])
def box_kernel(
    mask_ptr,  # [samples, groups, depth, height, width], any strides
    ratio_ptr,  # [samples, groups, out_depth, out_height, out_width]
    new_mask_ptr,
    sizes,  # `plan.packed`: depth, height and width, the same of the result, groups, tiles of rows and of columns
    stride_n,
    stride_c,
    stride_d,
    stride_h,
    stride_w,
    multiplicity,  # what a sum of mask values counts
    numerator,
    size,  # mask values in a window
    UPDATE: tl.constexpr,
    KERNEL: tl.constexpr,  # (depth, height, width), as the next three
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    ROWS: tl.constexpr = KERNEL[0] * KERNEL[1]
    COLS: tl.constexpr = KERNEL[2]
    depth, height, width = unpacked(sizes[0]), unpacked(sizes[1]), unpacked(sizes[2])
    out_depth, out_height, out_width = unpacked(sizes[3]), unpacked(sizes[4]), unpacked(sizes[5])
    groups, row_tiles, col_tiles = unpacked(sizes[6]), unpacked(sizes[7]), unpacked(sizes[8])
    program = tl.program_id(0)
    col_tile = program % col_tiles
    row_tile = (program // col_tiles) % row_tiles
    slab = program // col_tiles // row_tiles  # one depth of one plane
    z = slab % out_depth
    group = (slab // out_depth) % groups
    sample = (slab // out_depth // groups).to(tl.int64)
    y = row_tile * BLOCK_H + tl.arange(0, BLOCK_H)[:, None]
    x = col_tile * BLOCK_W + tl.arange(0, BLOCK_W)[None, :]
    mask_ptr += sample * stride_n + group.to(tl.int64) * stride_c
    first_z = z * STRIDE[0] - PADDING[0]
    first_y = y * STRIDE[1] - PADDING[1]
    first_x = x * STRIDE[2] - PADDING[2]
    covered = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    # Rows of a window in a loop: unrolled, a large 3D one would take the compiler minutes.
    for row in range(ROWS):
        in_z = first_z + row // KERNEL[1] * DILATION[0]
        in_y = first_y + row % KERNEL[1] * DILATION[1]
        row_inside = (in_z >= 0) & (in_z < depth) & (in_y >= 0) & (in_y < height)
        at_row = in_y.to(tl.int64) * stride_h + in_z.to(tl.int64) * stride_d
        for col in tl.static_range(COLS):
            in_x = first_x + col * DILATION[2]
            inside = row_inside & (in_x >= 0) & (in_x < width)
            at = at_row + in_x.to(tl.int64) * stride_w
            covered += tl.load(mask_ptr + at, mask=inside, other=0).to(tl.float32)
    covered *= multiplicity
    empty = covered == 0
    safe = tl.where(empty, 1.0, covered)
    # Rounded division: what a full window is divided by has to leave it exactly 1.
    if UPDATE == "clamp":
        ratio = tl.div_rn(numerator + tl.zeros_like(safe), tl.maximum(safe, 1.0))
        new_mask = tl.minimum(covered, 1.0)
    else:
        ratio = tl.minimum(tl.div_rn(numerator + tl.zeros_like(safe), safe), LARGEST)
        if UPDATE == "binary":
            new_mask = tl.full(covered.shape, 1.0, tl.float32)
        else:
            new_mask = tl.div_rn(covered, size + tl.zeros_like(covered))
    inside = (y < out_height) & (x < out_width)
    at = (slab.to(tl.int64) * out_height + y) * out_width + x
    tl.store(ratio_ptr + at, tl.where(empty, 0.0, ratio), mask=inside)
    tl.store(new_mask_ptr + at, tl.where(empty, 0.0, new_mask), mask=inside)


def _as_3d(values: Sequence[int], missing: int) -> tuple[int, ...]:
    return (missing,) * (3 - len(values)) + tuple(values)


def _sum_channels(mask: Tensor, groups: int) -> Tensor:
    """(N, groups, D, H, W) float32 sums over the channels of each group of an (N, C, D, H, W) mask."""
    sums = torch.empty((mask.shape[0], groups, *mask.shape[2:]), dtype=torch.float32, device=mask.device)
    mask = mask.flatten(2)
    n, channels, pixels = mask.shape
    members = channels // groups
    interleaved = mask.stride(1) == 1 and pixels > 1
    block_c = fitting_block(members, 128 if interleaved else 8)
    block_p = SUM_TILE // block_c
    tiles = triton.cdiv(pixels, block_p)
    channel_sum_kernel[(n * groups * tiles,)](
        mask,
        sums,
        groups,
        tiles,
        members,
        pixels,
        *mask.stride(),
        block_p,
        block_c,
        num_warps=SUM_WARPS,
    )
    return sums


def window(
    mask: Tensor,  # [N, C, H, W] or [N, C, D, H, W]
    multiplicity: int,
    windows: Sequence[int],  # kernel, stride, padding and dilation of each dimension, groups
    numerator: float,
    update: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(ratio, new_mask), each (N, 1 or groups, ...), of `ops/partial_conv.py`."""
    assert dtype == torch.float32
    dims = mask.ndim - 2
    kernel, stride, padding, dilation = (windows[dims * i : dims * (i + 1)] for i in range(4))
    groups = windows[-1]
    if mask.shape[1] == 1:
        groups, members = 1, multiplicity
    else:
        members, multiplicity = mask.shape[1] // groups, 1
    out_size = [
        (extent + 2 * pad - spread * (k - 1) - 1) // step + 1
        for extent, k, step, pad, spread in zip(
            mask.shape[2:], kernel, stride, padding, dilation, strict=True
        )
    ]
    ratio = torch.empty((mask.shape[0], groups, *out_size), dtype=dtype, device=mask.device)
    new_mask = torch.empty_like(ratio)
    if ratio.numel() == 0:
        return ratio, new_mask
    if mask.ndim == 4:
        mask = mask.unsqueeze(2)
    out_depth, out_height, out_width = out_3d = _as_3d(out_size, 1)
    block_w = fitting_block(out_width, 128)
    block_h = BOX_TILE // block_w
    row_tiles, col_tiles = triton.cdiv(out_height, block_h), triton.cdiv(out_width, block_w)
    with plan.on_device(mask):
        if mask.shape[1] > groups:
            mask = _sum_channels(mask, groups)
        box_kernel[(mask.shape[0] * groups * out_depth * row_tiles * col_tiles,)](
            mask,
            ratio,
            new_mask,
            plan.packed((*mask.shape[2:], *out_3d, groups, row_tiles, col_tiles)),
            *mask.stride(),
            float(multiplicity),
            numerator,
            float(members * math.prod(kernel)),
            update,
            _as_3d(kernel, 1),
            _as_3d(stride, 1),
            _as_3d(padding, 0),
            _as_3d(dilation, 1),
            block_h,
            block_w,
            num_warps=BOX_WARPS,
        )
    return ratio, new_mask
