"""Triton kernels of Gram matrices; style shares their split sums and the product with a symmetric matrix.

    G[n] = s * F[n] F[n]^T, F [C, M], M = H * W;  grad_F[n] = s * (grad[n] + grad[n]^T) F[n]

Saved for backward: a reference to the features.
Forward: a program multiplies one pair of channel tiles of the lower triangle over one span of the pixels, so that
few channels still fill the machine. The sums of the spans go to a workspace and are added in a fixed order by a
second launch. Backward: one pass, a program owns a tile of rows and pixels of the gradient.
Bytes an element: forward one read, and at most 1/4 of it written and read again for split rows; backward one read and
one write. More channels than a tile (128, float32 64) are read once for each pair of tiles, mostly from cache.
Half precision runs on the tensor cores as it is. The matrix of the backward, float32, is then written first as two
half matrices under one factor a row (`split_kernel`), whose sum has 16 bits (bfloat16) or 22 (float16).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.gram import gram_scale
from . import plan

# Programs that fill the largest GPU listed (148 multiprocessors) a few times over.
PROGRAMS = 528
# Elements of the second stage's tile, and how many spans it loads at once.
ELEMENTS = tl.constexpr(512)
SPANS = tl.constexpr(8)


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """What the matrix product takes in: half precision as it is, float32 rounded if it will be cut to TF32."""
    if PRECISION == "half":
        value = x
    else:
        value = x.to(tl.float32)
        if PRECISION == "tf32":
            # The tensor core drops the low 13 bits; without rounding first every product would be too small.
            # A carry into the exponent is right for numbers, but would turn Inf and NaN into something else.
            rounded = ((value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
            value = tl.where(tl.abs(value) < 3.3895314e38, rounded, value)
    return value


@triton.jit
def multiply_add(accumulator, a, b, PRECISION: tl.constexpr):
    """accumulator + a b, the product summed from zero.

    Tensor cores truncate when they add to an accumulator: a long row summed in them drifts towards zero by far more
    than float32 rounding (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores", 2022). With
    an outer sum that rounds to nearest, 3xTF32 stays in the accuracy class of float32.
    """
    a = operand(a, PRECISION)
    b = operand(b, PRECISION)
    MODE: tl.constexpr = "tf32" if PRECISION == "half" else PRECISION
    # The limit concerns 8-bit types alone; other than 0 it keeps the compiler from merging the two sums.
    return accumulator + tl.dot(a, b, input_precision=MODE, max_num_imprecise_acc=a.shape[1])


@triton.jit
def tile_pair(pair, BLOCKS: tl.constexpr):
    """Row and column of a tile of the lower triangle; tiles are numbered row by row."""
    row = pair * 0
    for i in tl.static_range(1, BLOCKS):
        row += (pair >= i * (i + 1) // 2).to(tl.int32)
    return row, pair - row * (row + 1) // 2


@triton.jit
def load_features(
    pointer,  # first pixel of the sample's tile
    channel,  # [BLOCK_C] int32
    pixels,
    left,  # how many pixels are left
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Features [BLOCK_C, BLOCK_K], channels_last: [BLOCK_K, BLOCK_C]; 0 outside."""
    pixel = tl.arange(0, BLOCK_K)
    if CHANNELS_LAST:
        place = pixel[:, None] * C + channel[None, :]
        inside = tl.broadcast_to(pixel[:, None] < left, [BLOCK_K, BLOCK_C])
        if C % BLOCK_C != 0:
            inside = inside & (channel[None, :] < C)
    else:
        place = channel[:, None].to(tl.int64) * pixels + pixel[None, :]
        inside = tl.broadcast_to(pixel[None, :] < left, [BLOCK_C, BLOCK_K])
        if C % BLOCK_C != 0:
            inside = inside & (channel[:, None] < C)
    return tl.load(pointer + place, mask=inside, other=0.0)


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
def finalise_kernel(
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


@triton.jit
def load_factor(
    factor_ptr,
    stride_n,
    stride_r,
    stride_c,
    sample,
    samples,
    i,
    j,
    inside,
    COPIES: tl.constexpr,
    BOTH: tl.constexpr,
):
    """Elements (i, j) of a sample's symmetric matrix: COPIES of it are added up, or (BOTH) it and its transpose."""
    at = i.to(tl.int64) * stride_r + j.to(tl.int64) * stride_c
    value = tl.load(factor_ptr + sample * stride_n + at, mask=inside, other=0.0).to(tl.float32)
    for copy in tl.static_range(1, COPIES):
        pointer = factor_ptr + (sample + copy * samples) * stride_n
        value += tl.load(pointer + at, mask=inside, other=0.0).to(tl.float32)
    if BOTH:
        mirrored = j.to(tl.int64) * stride_r + i.to(tl.int64) * stride_c
        pointer = factor_ptr + sample * stride_n
        value += tl.load(pointer + mirrored, mask=inside, other=0.0).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["samples"])
def split_kernel(
    factor_ptr,  # [COPIES * samples, C, C], any strides
    high_ptr,  # [samples, C, C] in the features' dtype
    low_ptr,  # [samples, C, C] in the features' dtype
    rows_ptr,  # [2, samples, C]: factor of a row, and whether its low part is not all 0
    stride_n,
    stride_r,
    stride_c,
    samples,
    C: tl.constexpr,
    COPIES: tl.constexpr,
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """factor = row factor * (high + low).

    The row factor is the row's largest element: nothing leaves the range of float16, and the matrix of an l1 loss,
    one number times -1, 0 or 1, becomes exact in its high part alone.
    """
    BLOCKS: tl.constexpr = (C + ROWS - 1) // ROWS
    program = tl.program_id(0)
    sample = (program // BLOCKS).to(tl.int64)
    i = (program % BLOCKS) * ROWS + tl.arange(0, ROWS)[:, None]
    j = tl.arange(0, COLS)[None, :]
    inside = (i < C) & (j < C)
    value = load_factor(factor_ptr, stride_n, stride_r, stride_c, sample, samples, i, j, inside, COPIES, BOTH)
    largest = tl.max(tl.abs(value), axis=1, keep_dims=True)
    # A row of zeros, or with an Inf, is kept as it is.
    largest = tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)
    value = tl.div_rn(value, tl.broadcast_to(largest, [ROWS, COLS]))
    high = value.to(high_ptr.dtype.element_ty)
    wide = high.to(tl.float32)
    low = tl.where(tl.abs(wide) < float("inf"), value - wide, 0.0)
    at = sample * (C * C) + i * C + j
    tl.store(high_ptr + at, high, mask=inside)
    tl.store(low_ptr + at, low.to(low_ptr.dtype.element_ty), mask=inside)
    row = sample * C + i
    tl.store(rows_ptr + row, largest, mask=i < C)
    some = tl.max(tl.where(low != 0, 1.0, 0.0), axis=1, keep_dims=True)
    tl.store(rows_ptr + samples.to(tl.int64) * C + row, some, mask=i < C)


@triton.jit
def add_product(
    total,  # [BLOCK_R, BLOCK_M], channels_last: [BLOCK_M, BLOCK_R]
    factor_ptr,  # see `load_factor`
    strides,
    samples,
    features_ptr,  # first pixel of the tile
    sample,
    row,  # [BLOCK_R]
    pixels,
    left,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
    COPIES: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """total + factor rows times the features of a tile of pixels."""
    stride_n, stride_r, stride_c = strides
    for first in range(0, C, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = load_features(features_ptr, k, pixels, left, C, CHANNELS_LAST, BLOCK_K, BLOCK_M)
        if CHANNELS_LAST:
            i, j = row[None, :], k[:, None]
        else:
            i, j = row[:, None], k[None, :]
        inside = (i < C) & (j < C)
        if PRECISION == "half":
            f = tl.load(factor_ptr + sample * (C * C) + i * C + j, mask=inside, other=0.0)
        else:
            f = load_factor(
                factor_ptr, stride_n, stride_r, stride_c, sample, samples, i, j, inside, COPIES, BOTH
            )
        a, b = (x, f) if CHANNELS_LAST else (f, x)
        if PRECISION == "half":
            # The result is stored in half precision: what truncation does to a sum of C terms does not show.
            total = tl.dot(a, b, total)
        else:
            total = multiply_add(total, a, b, PRECISION)
    return total


@triton.jit(do_not_specialize=["samples", "length", "tiles"])
def product_kernel(
    grad_ptr,  # [] or None
    factor_ptr,  # [COPIES * samples, C, C] with strides, "half": [samples, C, C], the high part
    low_ptr,  # "half": [samples, C, C], else None
    rows_ptr,  # "half": [2, samples, C], see `split_kernel`; else None
    features_ptr,  # [samples, C, M], channels_last: [samples, M, C]
    out_ptr,  # as features
    samples,
    length,  # M, in units of UNIT
    tiles,
    stride_n,
    stride_r,
    stride_c,
    scale,
    C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
    COPIES: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    BLOCKS: tl.constexpr = (C + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0)
    # Rows change fastest: they share the features of a tile of pixels.
    row = (program % BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    tile = (program // BLOCKS) % tiles
    sample = (program // BLOCKS // tiles).to(tl.int64)
    pixels = length.to(tl.int64) * UNIT
    first = tile.to(tl.int64) * BLOCK_M
    start = sample * C * pixels + (first * C if CHANNELS_LAST else first)
    left = pixels - first
    coefficient = scale
    if grad_ptr is not None:
        coefficient *= tl.load(grad_ptr).to(tl.float32)
    strides = (stride_n, stride_r, stride_c)
    at = features_ptr + start
    pixel = tl.arange(0, BLOCK_M)
    if CHANNELS_LAST:
        row_d = row[None, :]
        total = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
        place = pixel[:, None] * C + row_d
        inside = (pixel[:, None] < left) & (row_d < C)
    else:
        row_d = row[:, None]
        total = tl.zeros([BLOCK_R, BLOCK_M], tl.float32)
        place = row_d.to(tl.int64) * pixels + pixel[None, :]
        inside = (pixel[None, :] < left) & (row_d < C)
    if PRECISION == "half":
        rows_ptr += sample * C
        row_factor = tl.load(rows_ptr + row, mask=row < C, other=0.0)
        some = tl.load(rows_ptr + samples.to(tl.int64) * C + row, mask=row < C, other=0.0)
        if tl.max(some, axis=0) > 0:
            total = add_product(
                total,
                low_ptr,
                strides,
                samples,
                at,
                sample,
                row,
                pixels,
                left,
                C,
                CHANNELS_LAST,
                PRECISION,
                COPIES,
                BOTH,
                BLOCK_K,
                BLOCK_M,
            )
    total = add_product(
        total,
        factor_ptr,
        strides,
        samples,
        at,
        sample,
        row,
        pixels,
        left,
        C,
        CHANNELS_LAST,
        PRECISION,
        COPIES,
        BOTH,
        BLOCK_K,
        BLOCK_M,
    )
    if PRECISION == "half":
        total *= row_factor[None, :] if CHANNELS_LAST else row_factor[:, None]
    tl.store(out_ptr + start + place, (total * coefficient).to(out_ptr.dtype.element_ty), mask=inside)


class Plan(NamedTuple):
    """Work split of the first stage."""

    block_c: int
    block_k: int
    warps: int
    steps: int
    splits: int


def precision(dtype: torch.dtype) -> str:
    """How products are formed: "half", "tf32x3", "tf32" or "ieee"."""
    if dtype != torch.float32:
        # Triton's interpreter multiplies bfloat16 blocks as integers.
        return "ieee" if triton.knobs.runtime.interpret and dtype == torch.bfloat16 else "half"
    if torch.version.hip:
        return "ieee"
    # What set_float32_matmul_precision set, too; its own getter raises once the newer setting was used. At "highest"
    # three TF32 products replace the float32 product of the plain cores: the same accuracy class (see
    # `multiply_add`), several times faster.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def tile_size(channels: int, dtype: torch.dtype) -> int:
    """BLOCK_C of the first stage."""
    return min(max(triton.next_power_of_2(channels), 16), 64 if dtype == torch.float32 else 128)


def make_plan(samples: int, channels: int, pixels: int, dtype: torch.dtype, block_c: int) -> Plan:
    """Work split of `samples` Gram matrices; depends on shapes alone, so results do not depend on the GPU."""
    block_k = 32 if dtype == torch.float32 else 64 if block_c == 128 else 128
    count = -(-channels // block_c)
    pairs = count * (count + 1) // 2
    blocks = max(1, -(-pixels // block_k))
    # A span of 8 BLOCK_C pixels at least: its sums then weigh no more than 1/4 of the features it reads.
    splits = max(1, min(-(-PROGRAMS // (samples * pairs)), blocks * block_k // (8 * block_c)))
    steps = -(-blocks // splits)
    return Plan(block_c, block_k, 8 if block_c == 128 else 4, steps, -(-blocks // steps))


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
    work = make_plan(count, c, max(pixels, second_pixels), features.dtype, block_c)
    blocks = -(-c // block_c)
    pairs = blocks * (blocks + 1) // 2
    unit = 1 if channels_last or pixels % 8 or second_pixels % 8 else 8
    sums = torch.empty(
        (count, work.splits, pairs, block_c, block_c), dtype=torch.float32, device=features.device
    )
    gram_kernel[(count * work.splits * pairs,)](
        features,
        second,
        sums,
        samples,
        pixels // unit,
        second_pixels // unit,
        work.steps,
        work.splits,
        c,
        channels_last,
        unit,
        precision(features.dtype),
        block_c,
        work.block_k,
        num_warps=work.warps,
    )
    return sums, work.splits


def second_stage_programs(samples: int, channels: int, block_c: int) -> int:
    """Programs of a second stage, see `second_stage_place`."""
    blocks = -(-channels // block_c)
    parts = -(-block_c * block_c // ELEMENTS.value)
    return samples * (blocks * (blocks + 1) // 2) * parts


def launch_product(
    grad: Tensor | None,  # []
    factor: Tensor,  # [copies * N, C, C], any strides
    features: Tensor,  # [N, C, H, W]
    scale: float,
    copies: int,
    both: bool,
) -> Tensor:
    """scale * grad * (the sum of the copies of factor, or factor + its transpose) @ features."""
    channels_last = plan.is_channels_last(features)
    features = plan.in_layout(features, channels_last)
    n, c, h, w = features.shape
    out = plan.empty_image(features, features.shape, channels_last, features.dtype)
    if out.numel() == 0:
        return out
    mode = precision(features.dtype)
    high, low, rows = factor, None, None
    with plan.on_device(features):
        if mode == "half":
            high = torch.empty((n, c, c), dtype=features.dtype, device=features.device)
            low = torch.empty_like(high)
            rows = torch.empty((2, n, c), dtype=torch.float32, device=features.device)
            cols = triton.next_power_of_2(c)
            block = max(1, 2048 // cols)
            split_kernel[(n * -(-c // block),)](
                factor,
                high,
                low,
                rows,
                *factor.stride(),
                n,
                c,
                copies,
                both,
                block,
                cols,
                num_warps=4,
            )
            copies, both = 1, False
        block_r = min(max(triton.next_power_of_2(c), 16), 128 if mode == "half" else 64)
        block_k = min(max(triton.next_power_of_2(c), 16), 64 if mode == "half" else 32)
        unit = 1 if channels_last or (h * w) % 8 else 8
        tiles = -(-(h * w) // 128)
        product_kernel[(n * tiles * -(-c // block_r),)](
            grad,
            high,
            low,
            rows,
            features,
            out,
            n,
            h * w // unit,
            tiles,
            *high.stride(),
            scale,
            c,
            channels_last,
            unit,
            mode,
            copies,
            both,
            block_r,
            block_k,
            128,
            num_warps=8 if block_r == 128 or mode != "half" else 4,
        )
    return out


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
        finalise_kernel[(second_stage_programs(n, c, block_c),)](
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
    return launch_product(None, grad, features, gram_scale(normalize, c, h * w), 1, True)
