"""Tiles of the Triton kernels of the LPIPS distance: pixels by channels, the work split of a layer."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .pixel_tile import unpacked

# Channels of a pixel that stay in registers, and those at once of a longer column.
MAX_C, LONG_C = 1024, 64


class Column(NamedTuple):
    """What the kernels are compiled for, of one layer."""

    C: int
    CHANNELS_LAST: bool
    UNIT: int  # of the number of pixels
    PREDICTIONS: int  # k, of each target
    SHARED: bool  # whether the predictions of a target share its mask
    BLOCK_P: int
    BLOCK_C: int


class Layer(NamedTuple):
    """Of one layer what the kernels read, and how its work is split."""

    tensors: tuple[Tensor | None, ...]  # input, target, weight, mask
    programs: int  # of each chunk of channels
    # `packed`: pixels in UNITs, tiles, samples of the target, stride of the mask by sample, first sum.
    sizes: tuple[int, ...]
    column: Column


@triton.jit
def load_column(pointer, start, pixel, left, first, pixels, COLUMN: tl.constexpr):
    """Features [BLOCK_P, BLOCK_C] from channel `first` on, in float32; 0 outside. Also their places."""
    channel = first + tl.arange(0, COLUMN.BLOCK_C)[None, :]
    if COLUMN.CHANNELS_LAST:
        place = start + pixel * COLUMN.C + channel
    else:
        place = start + channel.to(tl.int64) * pixels + pixel
    # By name: Triton 3.6 makes no shape of the fields of a tuple.
    BLOCK_P: tl.constexpr = COLUMN.BLOCK_P
    BLOCK_C: tl.constexpr = COLUMN.BLOCK_C
    inside = tl.broadcast_to(pixel < left, [BLOCK_P, BLOCK_C])
    if COLUMN.C % BLOCK_C != 0:
        inside = inside & (channel < COLUMN.C)
    return tl.load(pointer + place, mask=inside, other=0.0).to(tl.float32), place, inside


@triton.jit
def load_head(weight_ptr, first, COLUMN: tl.constexpr):
    """Weights [1, BLOCK_C] of the channels from `first` on, 0 outside."""
    channel = first + tl.arange(0, COLUMN.BLOCK_C)[None, :]
    return tl.load(weight_ptr + channel, mask=channel < COLUMN.C, other=0.0).to(tl.float32)


@triton.jit
def squared_norms(pointer, start, pixel, left, pixels, COLUMN: tl.constexpr):
    """[BLOCK_P, 1] squared norms, and the last channels that were read."""
    x, _, _ = load_column(pointer, start, pixel, left, 0, pixels, COLUMN)
    squares = x * x
    for first in range(COLUMN.BLOCK_C, COLUMN.C, COLUMN.BLOCK_C):
        more, _, _ = load_column(pointer, start, pixel, left, first, pixels, COLUMN)
        squares += more * more
    return tl.sum(squares, axis=1, keep_dims=True), x


@triton.jit
def factors(squares, eps):
    """1 / (norm + eps), 0 for a zero vector, and the norm, of a zero vector 1."""
    zero = squares == 0
    norm = tl.sqrt_rn(tl.where(zero, 1.0, squares))
    one = tl.full(norm.shape, 1.0, tl.float32)
    return tl.where(zero, 0.0, tl.div_rn(one, norm + eps)), norm


@triton.jit
def place_of(program, sizes, COLUMN: tl.constexpr):
    """Of a program in its layer: sample, first pixel, pixels, samples, stride of the mask by sample."""
    pixels = unpacked(sizes[0]).to(tl.int64) * COLUMN.UNIT
    tiles, samples, stride_n = unpacked(sizes[1]), unpacked(sizes[2]), unpacked(sizes[3])
    sample = (program // tiles).to(tl.int64)
    begin = (program % tiles).to(tl.int64) * COLUMN.BLOCK_P
    return sample, begin, pixels, samples.to(tl.int64), stride_n.to(tl.int64)


@triton.jit
def load_mask(mask_ptr, sample, at, stride_n, pixel, left, COLUMN: tl.constexpr):
    """[BLOCK_P, 1] in float32; 0 outside."""
    pointer = mask_ptr + (sample if COLUMN.SHARED else at) * stride_n
    return tl.load(pointer + pixel, mask=pixel < left, other=0).to(tl.float32)


@triton.jit
def load_scale(scale_ptr, place, sizes, COLUMN: tl.constexpr):
    """Factor of a sample's sum over a layer; without masks the pixels' mean."""
    if scale_ptr is None:
        pixels = (unpacked(sizes[0]) * COLUMN.UNIT).to(tl.float32)
        scale = tl.div_rn(tl.full(pixels.shape, 1.0, tl.float32), pixels)
    else:
        scale = tl.load(scale_ptr + place)
    return scale


def _block(channels: int, pixels: int, channels_last: bool, elements: int, whole: bool) -> tuple[int, int]:
    """(BLOCK_P, BLOCK_C); `whole` columns, if they are not too long."""
    size = triton.next_power_of_2(channels)
    if whole:
        block_c = size if size <= MAX_C else LONG_C
    else:
        block_c = min(size, 128 if channels_last else 16)
    return min(max(1, elements // block_c), triton.next_power_of_2(pixels)), block_c


def make_layers(
    input: list[Tensor],
    target: list[Tensor],
    weights: list[Tensor],
    mask: list[Tensor],
    elements: int,
    whole: bool,
) -> list[Layer]:
    """Work split of all layers into tiles of `elements`, see `_block`."""
    layers, first = [], 0
    for i, (x, y) in enumerate(zip(input, target, strict=True)):
        kn, c, h, w = x.shape
        n, pixels, last = y.shape[0], h * w, plan.is_channels_last(x)
        ready = plan.prepare_mask(mask[i] if mask else None, (kn, 1, h, w), False)
        shared = not mask or mask[i].ndim == 2 or mask[i].shape[0] != kn or kn == n
        unit = 1 if last or pixels % 8 else 8
        block_p, block_c = _block(c, pixels, last, elements, whole)
        column = Column(c, last, unit, kn // n, shared, block_p, block_c)
        tiles = triton.cdiv(pixels, block_p)
        tensors = plan.in_layout(x, last), plan.in_layout(y, last), weights[i].contiguous(), ready.tensor
        sizes = plan.packed((pixels // unit, tiles, n, ready.stride_n, first))
        layers.append(Layer(tensors, n * tiles, sizes, column))
        first += kn * tiles
    return layers
