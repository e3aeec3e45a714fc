"""Tiles of the Triton kernels of partial_conv: what a program owns, where it lies, how the work is split.

A program owns a tile of pixels times channels of one sample, its pixels in a row whatever their dimensions. In
channels_last neighbouring threads take neighbouring channels and share a pixel's plane values; in NCHW they take
neighbouring pixels, and several channels share a tile of the planes. Where two tensors differ in layout the threads
exchange the tile. Accesses are 16 bytes a thread wherever the fast dimension allows it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile, and its warps; not measured. The backward holds three values an element in registers, so its
# tile is half as large. Tiles are whole, padded if need be: one with fewer elements than the threads have room for
# would be read by several threads, and one of them could find what another has already written in place.
TILE, BACKWARD_TILE, WARPS = 2048, 1024, 4
# The backward adds up at least this many partial sums, where there is work for as many programs, and at most this
# many tiles in one program.
PROGRAMS, MAX_STEPS = 2048, 16


class Tile(NamedTuple):
    """What the kernels are compiled for."""

    UNIT_P: int  # of the number of pixels
    UNIT_C: int  # of the number of channels
    BLOCK_P: int
    BLOCK_C: int
    IN_LAST: bool  # whether what is read is channels_last
    OUT_LAST: bool  # whether the result is
    SHARED: bool  # whether all samples share the planes
    GROUPED: bool  # whether there is more than one plane


@triton.jit
def tile_place(pixels, channels, tiles, chunks, TILE: tl.constexpr):
    """(sample, first pixel, first channel, pixels, channels) of a program; chunks change fastest because they share
    planes."""
    program = tl.program_id(0)
    first_p = (program // chunks % tiles).to(tl.int64) * TILE.BLOCK_P
    sample = (program // chunks // tiles).to(tl.int64)
    # Written as multiples of a unit, which is how the compiler knows that wide accesses are aligned.
    pixels, channels = pixels.to(tl.int64) * TILE.UNIT_P, channels * TILE.UNIT_C
    return sample, first_p, program % chunks * TILE.BLOCK_C, pixels, channels


@triton.jit
def tile_inside(place, TILE: tl.constexpr):
    _, first_p, first_c, pixels, channels = place
    inside_p = tl.arange(0, TILE.BLOCK_P)[:, None] < pixels - first_p
    return inside_p & (tl.arange(0, TILE.BLOCK_C)[None, :] < channels - first_c)


@triton.jit
def tile_pointer(pointer, place, LAST: tl.constexpr, TILE: tl.constexpr, SHARED: tl.constexpr = False):
    """Where the elements of a tile [BLOCK_P, BLOCK_C] are, in channels_last or NCHW; SHARED by all samples."""
    sample, first_p, first_c, pixels, channels = place
    sample = sample * 0 if SHARED else sample
    p = tl.arange(0, TILE.BLOCK_P)[:, None]
    c = tl.arange(0, TILE.BLOCK_C)[None, :]
    if LAST:
        at = pointer + ((sample * pixels + first_p) * channels + first_c) + (p * channels + c)
    else:
        at = pointer + ((sample * channels + first_c) * pixels + first_p) + (c.to(tl.int64) * pixels + p)
    return at


@triton.jit
def load_plane(plane_ptr, place, groups, TILE: tl.constexpr):
    """Values of planes [samples or 1, groups, pixels], 0 outside; [BLOCK_P, 1] where one serves all channels."""
    sample, first_p, first_c, pixels, channels = place
    plane_ptr += (sample * 0 if TILE.SHARED else sample) * groups * pixels + first_p
    p = tl.arange(0, TILE.BLOCK_P)
    if TILE.GROUPED:
        group = (first_c + tl.arange(0, TILE.BLOCK_C)[None, :]) // (channels // groups)
        inside = tile_inside(place, TILE)
        value = tl.load(plane_ptr + (group.to(tl.int64) * pixels + p[:, None]), mask=inside, other=0)
    else:
        value = tl.load(plane_ptr + p, mask=p < pixels - first_p, other=0)[:, None]
    return value.to(tl.float32)


class Work(NamedTuple):
    """Work split of a call."""

    sizes: tuple[int, int, int, int]  # pixels and channels in units, tiles, chunks
    tile: Tile
    steps: int
    programs: int


def split(
    samples: int,
    channels: int,
    pixels: int,
    last: list[bool],  # whether each tensor is channels_last: what is read, others, the result
    shared: bool,
    grouped: bool = False,
    backward: bool = False,
) -> Work:
    tile = BACKWARD_TILE if backward else TILE
    if True in last:
        block_c = fitting_block(channels, 32 if False in last else 128)
        block_p = tile // block_c
    else:
        block_p = min(triton.next_power_of_2(pixels), tile // min(triton.next_power_of_2(channels), 8))
        block_c = tile // block_p
    tiles, chunks = triton.cdiv(pixels, block_p), triton.cdiv(channels, block_c)
    steps = max(1, min(MAX_STEPS, samples * tiles * chunks // PROGRAMS)) if backward else 1
    tiles = triton.cdiv(tiles, steps)
    unit_p = math.gcd(pixels, 8) if False in last else 1
    unit_c = math.gcd(channels, 8) if True in last else 1
    sizes = pixels // unit_p, channels // unit_c, tiles, chunks
    compiled = Tile(unit_p, unit_c, block_p, block_c, last[0], last[-1], shared, grouped)
    return Work(sizes, compiled, steps, samples * tiles * chunks)


def is_last(t: Tensor, channels: int, pixels: int) -> bool:
    """Whether a dense tensor is read as channels_last; where both layouts are one, by its longer dimension."""
    if channels == 1 or pixels == 1:
        return channels > 1
    return not t.is_contiguous()


def fitting_block(extent: int, largest: int) -> int:
    """Power of two that cuts `extent` with the least left over, 32 to `largest` where there is a choice."""
    whole: int = triton.next_power_of_2(extent)
    blocks = [block for block in (128, 64, 32) if block <= largest and block < whole]
    # The first of the best: ties go to the larger.
    return min([min(whole, largest), *blocks], key=lambda block: -(-extent // block) * block)
