"""Tiles of the Triton kernels of SSIM: rows of images, sums along them and down the columns, the work split."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .pixel_tile import unpacked
from .product import INTERPRETED

# (elements of the call, rows of a strip), and the threads of a program, one a column. Reasoned, not measured.
STRIPS = ((1 << 18, 8), (1 << 22, 16), (1 << 63, 32))
THREADS = 128


class Window(NamedTuple):
    """What the kernels are compiled for."""

    SIZE: int
    PAD: int  # rows and columns outside that the first window begins with
    STEP: int  # distance of neighbours: 1, or C in channels_last
    BLOCK_X: int
    BLOCK_C: int


@triton.jit
def place_of(sizes, WINDOW: tl.constexpr):
    """Of a program: plane [1, BLOCK_C], column [BLOCK_X, 1], whether both exist, its first row, its end."""
    tiles, strips, rows = unpacked(sizes[6]), unpacked(sizes[7]), unpacked(sizes[8])
    program = tl.program_id(0)
    column = program % tiles * WINDOW.BLOCK_X + tl.arange(0, WINDOW.BLOCK_X)[:, None]
    first = program // tiles % strips * rows
    plane = program // tiles // strips * WINDOW.BLOCK_C + tl.arange(0, WINDOW.BLOCK_C)[None, :]
    exists = (plane < unpacked(sizes[4])) & (column >= 0)
    return plane, column, exists, first, tl.minimum(first + rows, unpacked(sizes[5]))


@triton.jit
def offset_of(plane, column, height, width, sizes, WINDOW: tl.constexpr):
    """Offset [BLOCK_X, BLOCK_C] of the columns in row 0 of images of that size, NCHW or channels_last."""
    pixels = height.to(tl.int64) * width
    if WINDOW.STEP == 1:
        offset = plane * pixels + column
    else:
        channels = unpacked(sizes[11])
        offset = plane // channels * channels * pixels + plane % channels + column.to(tl.int64) * WINDOW.STEP
    return offset


@triton.jit
def mask_place_of(plane, column, width, sizes, WINDOW: tl.constexpr):
    """Likewise of the mask, and the distances of its neighbours and rows."""
    if WINDOW.STEP == 1:
        step = 1
    else:
        # At run time: of neighbours known to touch, the compiler would load other ones than of the images, and
        # exchange every load through shared memory.
        step = unpacked(sizes[12])
    stride_n, stride_c = unpacked(sizes[9]).to(tl.int64), unpacked(sizes[10]).to(tl.int64)
    channels = unpacked(sizes[11])
    offset = plane // channels * stride_n + plane % channels * stride_c + column.to(tl.int64) * step
    return offset, step, width.to(tl.int64) * step


@triton.jit
def shift_of(pred_ptr, target_ptr, mask_ptr, plane, limit, sizes, WINDOW: tl.constexpr):
    """[1, BLOCK_C] each: the means of s and d over some counted pixels of the middle row.

    They are the same in every program of a plane.

    Variances do not change with a shift, and near 0 they cancel less. Pixels beyond `limit` stay out, and so does
    NaN: they are rare, and would move all others away from 0.
    """
    height, width = unpacked(sizes[0]), unpacked(sizes[1])
    column = tl.arange(0, WINDOW.BLOCK_X)[:, None] * width // WINDOW.BLOCK_X
    row = (height // 2).to(tl.int64) * width
    at = offset_of(plane, column, height, width, sizes, WINDOW) + row * WINDOW.STEP
    inside = (plane < unpacked(sizes[4])) & (column < width)
    a = tl.load(pred_ptr + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(target_ptr + at, mask=inside, other=0.0).to(tl.float32)
    inside = inside & (tl.abs(a + b) <= limit) & (tl.abs(a - b) <= limit)
    if mask_ptr is not None:
        offset, _, stride = mask_place_of(plane, column, width, sizes, WINDOW)
        m = tl.load(mask_ptr + offset + (height // 2) * stride, mask=inside, other=0).to(tl.float32)
        inside = inside & (m != 0)
    count = tl.maximum(tl.sum(tl.where(inside, 1.0, 0.0), axis=0, keep_dims=True), 1.0)
    s = tl.sum(tl.where(inside, a + b, 0.0), axis=0, keep_dims=True) / count
    d = tl.sum(tl.where(inside, a - b, 0.0), axis=0, keep_dims=True) / count
    return s, d


@triton.jit
def is_inside(column, width, SHIFT: tl.constexpr):
    inside = column + SHIFT < width
    if SHIFT < 0:
        inside = inside & (column + SHIFT >= 0)
    return inside


@triton.jit
def no_sum(WINDOW: tl.constexpr):
    # By name, as counts of static_range: Triton 3.6 makes no shape of the fields of a tuple.
    BLOCK_X: tl.constexpr = WINDOW.BLOCK_X
    BLOCK_C: tl.constexpr = WINDOW.BLOCK_C
    return tl.zeros([BLOCK_X, BLOCK_C], tl.float32)


@triton.jit
def image_row(pred, target, mask, mask_step, shift, column, width, readable, window, WINDOW: tl.constexpr):
    """Sums along a row of the windows that begin PAD before each column, [BLOCK_X, BLOCK_C]: of s and d, both
    shifted, and their squares, each times the mask, and of the mask; the column's own |d| and mask. The pointers are
    those of the row's columns."""
    SIZE: tl.constexpr = WINDOW.SIZE
    s_sum = no_sum(WINDOW)
    d_sum, ss_sum, dd_sum, m_sum, own, own_m = s_sum, s_sum, s_sum, s_sum, s_sum, s_sum
    for j in tl.static_range(SIZE):
        inside = readable & is_inside(column, width, j - WINDOW.PAD)
        a = tl.load(pred + (j - WINDOW.PAD) * WINDOW.STEP, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(target + (j - WINDOW.PAD) * WINDOW.STEP, mask=inside, other=0.0).to(tl.float32)
        s, d = a + b - shift[0], a - b - shift[1]
        weight = window[j]
        if mask is not None:
            m = tl.load(mask + (j - WINDOW.PAD) * mask_step, mask=inside, other=0).to(tl.float32)
            # Select, not only multiply: NaN and Inf under weight 0 do not count.
            s = tl.where(m == 0, 0.0, s)
            d = tl.where(m == 0, 0.0, d)
            weight = weight * m
            m_sum += weight
        s_sum += weight * s
        d_sum += weight * d
        ss_sum += weight * (s * s)
        dd_sum += weight * (d * d)
        if j == WINDOW.PAD:
            own = tl.abs(a - b)
            if mask is not None:
                own_m = m
                own = tl.where(m == 0, 0.0, m * own)
    return s_sum, d_sum, ss_sum, dd_sum, m_sum, own, own_m


@triton.jit
def map_row(pointer, column, width, readable, window, WINDOW: tl.constexpr):
    """Sums along a row of one map."""
    SIZE: tl.constexpr = WINDOW.SIZE
    total = no_sum(WINDOW)
    for j in tl.static_range(SIZE):
        inside = readable & is_inside(column, width, j - WINDOW.PAD)
        total += window[j] * tl.load(pointer + (j - WINDOW.PAD) * WINDOW.STEP, mask=inside, other=0.0)
    return total


@triton.jit
def no_sums(WINDOW: tl.constexpr):
    """Of the SIZE - 1 windows that are not complete."""
    SIZE: tl.constexpr = WINDOW.SIZE
    sums = (no_sum(WINDOW),)
    for _ in tl.static_range(2, SIZE):
        sums = sums + (no_sum(WINDOW),)  # type: ignore[assignment]  # noqa: RUF005
    return sums


@triton.jit
def add_row(sums, row, window, WINDOW: tl.constexpr):
    """The window that the row completes, and the sums of the SIZE - 1 after it, the next to be complete first."""
    LAST: tl.constexpr = WINDOW.SIZE - 1
    done = sums[0] + window[LAST] * row
    rest = (sums[1] + window[LAST - 1] * row,)
    for i in tl.static_range(2, LAST):
        rest = rest + (sums[i] + window[LAST - i] * row,)  # type: ignore[assignment]  # noqa: RUF005
    return done, rest + (window[0] * row,)  # noqa: RUF005


@triton.jit
def statistics(s, d, ss, dd, shift, c1, c2):
    """Means of s and d, variances of both; numerators and denominators of l and cs.

    The four sums are shifted; c1 and c2 are twice C1 and C2.
    """
    v_s, v_d = ss - s * s, dd - d * d
    mean_s, mean_d = s + shift[0], d + shift[1]
    a, b = mean_s * mean_s, mean_d * mean_d
    return mean_s, mean_d, v_s, v_d, a - b + c1, a + b + c1, v_s - v_d + c2, v_s + v_d + c2


class Images(NamedTuple):
    """Images ready to be read in place, and the work split over their windows, or over their pixels."""

    pred: Tensor  # [N, C, H, W]
    target: Tensor
    mask: Tensor | None  # [H, W] or [1|N, 1|C, H, W]
    programs: int
    # `packed`: height and width of the images, windows down and along, planes, rows that all programs cover, tiles of
    # a row, strips, rows of a strip, strides of the mask by sample and channel, channels, distance of its neighbours.
    sizes: tuple[int, ...]
    window: Window
    warps: int


def make_images(
    pred: Tensor, target: Tensor, mask: Tensor | None, size: int, same: bool, by_windows: bool
) -> Images:
    """Work split over windows, if `by_windows`, or over pixels, of which there are more with whole windows alone."""
    n, c, h, w = pred.shape
    last = plan.is_channels_last(pred)
    ready = plan.prepare_mask(mask, pred.shape, last)
    lost = 0 if same else size - 1
    out_h, out_w = h - lost, w - lost
    covered_h, covered_w = (out_h, out_w) if by_windows else (h, w)
    # Neighbours in memory are what neighbouring threads read.
    block_c = min(triton.next_power_of_2(c), 16) if last else 1
    block_x = min(THREADS // block_c, triton.next_power_of_2(w))
    rows = next(row[1] for row in STRIPS if pred.numel() <= row[0])
    if INTERPRETED:
        # An operation takes the interpreter the same time for any number of elements.
        block_c, rows = min(triton.next_power_of_2(n * c), 16), 24
    tiles, strips = triton.cdiv(covered_w, block_x), triton.cdiv(covered_h, rows)
    mask_step = c if last and ready.stride_c else 1
    strides = ready.stride_n, ready.stride_c
    return Images(
        plan.in_layout(pred, last),
        plan.in_layout(target, last),
        ready.tensor,
        triton.cdiv(n * c, block_c) * tiles * strips,
        plan.packed((h, w, out_h, out_w, n * c, covered_h, tiles, strips, rows, *strides, c, mask_step)),
        Window(size, size // 2 if same else 0, c if last else 1, block_x, block_c),
        max(1, block_x * block_c // 32),
    )
