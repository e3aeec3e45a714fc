"""Triton kernels of Gram matrices; style shares their split sums.

    G[n] = s * F[n] F[n]^T, F [C, M], M = H * W;  grad_F[n] = s * (grad[n] + grad[n]^T) F[n]

Saved for backward: a reference to the features.
Forward: a program multiplies one pair of channel tiles of the lower triangle over one span of the pixels, so that
few channels still fill the machine. The sums of the spans go to a workspace and are added in a fixed order by a
second launch. More channels than a tile (128, float32 64) are read once for each pair of tiles, mostly from cache.
Bytes an element: forward one read, and at most 1/4 of it written and read again for split rows; backward one read and
one write.
Matrix products, and the backward: `product.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .product import gram_scale, launch_product, load_features, multiply_add, precision

# Programs that fill the largest GPU listed (148 multiprocessors) a few times over.
PROGRAMS = 528
# Elements of the second stage's tile, and how many spans it loads at once.
ELEMENTS = tl.constexpr(512)
SPANS = tl.constexpr(8)


@triton.jit
def tile_pair(pair, BLOCKS: tl.constexpr):
    """Row and column of a tile of the lower triangle; tiles are numbered row by row."""
    row = pair * 0
    for i in tl.static_range(1, BLOCKS):
        row += (pair >= i * (i + 1) // 2).to(tl.int32)
    return row, pair - row * (row + 1) // 2


@triton.jit(do_not_specialize=["samples", "length", "second_length", "steps", "splits"])
def gram_kernel(
    features_ptr,  # [samples, C, M], channels_last: [samples, M, C]
    second_ptr,  # the same of the samples after those, with its own M; or None
    sums_ptr,  # [samples of both, splits, pairs, BLOCK_C, BLOCK_C]
    samples,
    length,  # M, in units of UNIT
    second_length,
    steps,  # blocks of pixels in a span
    splits,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    PAIRS: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    program = tl.program_id(0)
    # Pairs change fastest: they share tiles of the features.
    row, col = tile_pair(program % PAIRS, BLOCKS)
    split = (program // PAIRS) % splits
    sample = program // PAIRS // splits
    pointer = features_ptr
    if second_ptr is not None:
        second = sample >= samples
        pointer = tl.where(second, second_ptr, features_ptr)
        length = tl.where(second, second_length, length)
        sample = tl.where(second, sample - samples, sample)
    # Written as a multiple of UNIT, which is how the compiler knows that wide loads are aligned.
    pixels = length.to(tl.int64) * UNIT
    start = split.to(tl.int64) * steps * BLOCK_K
    end = tl.minimum(start + steps * BLOCK_K, pixels)
    pointer += sample.to(tl.int64) * C * pixels
    row_channel = row * BLOCK_C + tl.arange(0, BLOCK_C)
    col_channel = col * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C, BLOCK_C], tl.float32)
    for first in range(start, end, BLOCK_K):
        at = pointer + (first * C if CHANNELS_LAST else first)
        left = pixels - first
        a = load_features(at, row_channel, pixels, left, C, CHANNELS_LAST, BLOCK_C, BLOCK_K)
        if BLOCKS == 1:
            b = a
        else:
            b = load_features(at, col_channel, pixels, left, C, CHANNELS_LAST, BLOCK_C, BLOCK_K)
        if CHANNELS_LAST:
            total = multiply_add(total, tl.trans(a), b, PRECISION)
        else:
            total = multiply_add(total, a, tl.trans(b), PRECISION)
    place = tl.arange(0, BLOCK_C)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    tl.store(sums_ptr + program.to(tl.int64) * (BLOCK_C * BLOCK_C) + place, total)


@triton.jit
def second_stage_place(C: tl.constexpr, BLOCK_C: tl.constexpr):
    """What a program of the second stage owns: sample, pair, offset in the tile, matrix row and column, lower half.

    A diagonal tile counts below its diagonal only, and every value is stored on both sides: its upper half may
    differ from the lower in the last bit, by the order in which 3xTF32 adds its terms.
    """
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    PAIRS: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    PARTS: tl.constexpr = (BLOCK_C * BLOCK_C + ELEMENTS - 1) // ELEMENTS
    program = tl.program_id(0)
    pair = (program // PARTS) % PAIRS
    sample = (program // PARTS // PAIRS).to(tl.int64)
    row, col = tile_pair(pair, BLOCKS)
    place = (program % PARTS) * ELEMENTS + tl.arange(0, ELEMENTS)
    i = row * BLOCK_C + place // BLOCK_C
    j = col * BLOCK_C + place % BLOCK_C
    return sample, pair, place, i, j, (i < C) & (j <= i) & (place < BLOCK_C * BLOCK_C)


@triton.jit
def add_splits(sums_ptr, sample, splits, pair, place, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """F F^T of one sample at `place` [ELEMENTS] of one tile: the sums of all spans, in a fixed order."""
    BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    PAIRS: tl.constexpr = BLOCKS * (BLOCKS + 1) // 2
    TILE: tl.constexpr = BLOCK_C * BLOCK_C
    span = tl.arange(0, SPANS)[:, None]
    pointer = sums_ptr + (sample * splits * PAIRS + pair) * TILE + place[None, :]
    total = tl.zeros([SPANS, ELEMENTS], tl.float32)
    for first in range(0, splits, SPANS):
        inside = (first + span < splits) & (place[None, :] < TILE)
        total += tl.load(pointer + (first + span).to(tl.int64) * (PAIRS * TILE), mask=inside, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def store_both(pointer, i, j, value, inside, C: tl.constexpr):
    """Stores values of the lower half of a [C, C] matrix on both sides of its diagonal."""
    tl.store(pointer + i * C + j, value, mask=inside)
    tl.store(pointer + j * C + i, value, mask=inside)


@triton.jit(do_not_specialize=["splits"])
def finalize_kernel(
    sums_ptr,  # [N, splits, pairs, BLOCK_C, BLOCK_C]
    out_ptr,  # [N, C, C]
    splits,
    scale,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample, pair, place, i, j, inside = second_stage_place(C, BLOCK_C)
    value = add_splits(sums_ptr, sample, splits, pair, place, C, BLOCK_C) * scale
    store_both(out_ptr + sample * (C * C), i, j, value, inside, C)


def tile_size(channels: int, dtype: torch.dtype) -> int:
    """BLOCK_C of the first stage."""
    return min(max(triton.next_power_of_2(channels), 16), 64 if dtype == torch.float32 else 128)


def _pairs(channels: int, block_c: int) -> int:
    """Tiles of the lower triangle."""
    blocks: int = triton.cdiv(channels, block_c)
    return blocks * (blocks + 1) // 2


def launch_gram(
    features: Tensor,  # [N, C, H, W], dense in the layout
    second: Tensor | None,  # [N', C, H', W'] of the same dtype and layout
    channels_last: bool,
    block_c: int,
) -> tuple[Tensor, int]:
    """First stage: (sums [N + N', splits, pairs, BLOCK_C, BLOCK_C], splits)."""
    samples, c = features.shape[:2]
    pixels = features.shape[2] * features.shape[3]
    count, second_pixels = samples, pixels
    if second is not None:
        count, second_pixels = samples + second.shape[0], second.shape[2] * second.shape[3]
    # The work split depends on shapes alone, so results do not depend on the GPU.
    block_k = 32 if features.dtype == torch.float32 else 64 if block_c == 128 else 128
    pairs = _pairs(c, block_c)
    blocks = max(1, triton.cdiv(max(pixels, second_pixels), block_k))
    # A span of 8 BLOCK_C pixels at least: its sums then weigh no more than 1/4 of the features it reads.
    splits = max(1, min(triton.cdiv(PROGRAMS, count * pairs), blocks * block_k // (8 * block_c)))
    steps = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, steps)
    unit = 1 if channels_last or pixels % 8 or second_pixels % 8 else 8
    shape = count, splits, pairs, block_c, block_c
    sums = torch.empty(shape, dtype=torch.float32, device=features.device)
    gram_kernel[(count * splits * pairs,)](
        features,
        second,
        sums,
        samples,
        pixels // unit,
        second_pixels // unit,
        steps,
        splits,
        c,
        channels_last,
        unit,
        precision(features.dtype),
        block_c,
        block_k,
        num_warps=8 if block_c == 128 else 4,
    )
    return sums, splits


def second_stage_programs(samples: int, channels: int, block_c: int) -> int:
    """Programs of a second stage, see `second_stage_place`."""
    parts: int = triton.cdiv(block_c * block_c, ELEMENTS.value)
    return samples * _pairs(channels, block_c) * parts


def forward(
    features: Tensor,  # [N, C, H, W]
    normalize: str,
) -> Tensor:
    """[N, C, C] of `ops/gram.py`."""
    n, c, h, w = features.shape
    make = torch.empty if features.numel() else torch.zeros
    out = make((n, c, c), dtype=torch.float32, device=features.device)
    if features.numel() == 0:
        return out
    channels_last = plan.is_channels_last(features)
    block_c = tile_size(c, features.dtype)
    with plan.on_device(features):
        sums, splits = launch_gram(plan.in_layout(features, channels_last), None, channels_last, block_c)
        finalize_kernel[(second_stage_programs(n, c, block_c),)](
            sums, out, splits, gram_scale(normalize, c, h * w), c, block_c, num_warps=4
        )
    return out


def backward(
    grad: Tensor,  # [N, C, C]
    features: Tensor,  # [N, C, H, W]
    normalize: str,
) -> Tensor:
    """Gradient by the features of `ops/gram.py`."""
    _, c, h, w = features.shape
    return launch_product(None, grad + grad.mT, features, gram_scale(normalize, c, h * w))
