"""Device code shared by the Triton kernels of masked_l1 and hole_valid: addressing, formulas, second stage.

Work split (sizes in `plan.py`): memory is seen as samples of `channels` segments of `length` consecutive
elements, each cut into groups of 8, the unit of the packed signs. A program owns BLOCK_G groups of
STEPS * BLOCK_C channels of one sample, held as [ROWS, WIDTH] tiles: a row is what one thread moves at once,
16 bytes of float32 (WIDTH 4, two rows a group) or of half precision (WIDTH 8). A single-channel mask is
loaded once and serves all channels of the program. BLOCK_C > 1 only where a plane is smaller than a tile.

Reductions: every program stores its sums, `finalise` adds them in float64 in a fixed order; no atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def penalty_value(d, PENALTY: tl.constexpr, param):
    """`param`: eps of Charbonnier, delta of Huber. A run-time number: one that changes compiles nothing new."""
    if PENALTY == "l1":
        value = tl.abs(d)
    elif PENALTY == "l2":
        value = d * d
    elif PENALTY == "charbonnier":
        value = tl.sqrt(d * d + param * param)
    else:
        a = tl.abs(d)
        # |d| <= delta: d^2 / 2, else delta * (|d| - delta / 2); a NaN survives in `a`.
        bounded = tl.minimum(a, param)
        value = bounded * (a - 0.5 * bounded)
    return value


@triton.jit
def penalty_grad(d, PENALTY: tl.constexpr, param):
    """Derivative of the smooth penalties; l1 goes through the packed signs."""
    if PENALTY == "l2":
        value = d + d
    elif PENALTY == "charbonnier":
        value = d * tl.rsqrt(d * d + param * param)
    else:
        # Comparisons, not minimum and maximum: those would drop a NaN.
        value = tl.where(d > param, param, tl.where(d < -param, -param, d))
    return value


@triton.jit
def unpacked(value):
    """A number of a tuple that `plan.packed` made."""
    return (value - 3) >> 1


@triton.jit
def pack_signs(d, counted):
    """[ROWS, WIDTH] differences -> [ROWS, 1] int16, the word of the group of 8 a row belongs to.

    Bit k: d > 0, bit 8 + k: d < 0 of element k. NaN (torch.sign gives 0) and ties set neither.
    """
    ROWS: tl.constexpr = d.shape[0]
    WIDTH: tl.constexpr = d.shape[1]
    FOLD: tl.constexpr = 8 // WIDTH
    place = tl.arange(0, ROWS)[:, None] % FOLD * WIDTH + tl.arange(0, WIDTH)[None, :]
    bits = tl.where(counted & (d > 0), 1 << place, 0) + tl.where(counted & (d < 0), 256 << place, 0)
    word = tl.sum(bits, axis=1, keep_dims=True)
    if FOLD == 2:
        word = tl.sum(tl.reshape(word, [ROWS // 2, 2]), axis=1, keep_dims=True)
        word = tl.reshape(tl.broadcast_to(word, [ROWS // 2, 2]), [ROWS, 1])
    return word.to(tl.int16)


@triton.jit
def apply_signs(word, value):
    """[ROWS, 1] packed signs, [ROWS, WIDTH] value -> value, -value or 0."""
    WIDTH: tl.constexpr = value.shape[1]
    FOLD: tl.constexpr = 8 // WIDTH
    place = tl.arange(0, value.shape[0])[:, None] % FOLD * WIDTH + tl.arange(0, WIDTH)[None, :]
    word = word.to(tl.int32)
    positive = (word >> place) & 1
    negative = (word >> (place + 8)) & 1
    return tl.where(positive != 0, value, tl.where(negative != 0, -value, 0.0))


@triton.jit
def program_place(tiles, chunks, BLOCK_C: tl.constexpr, STEPS: tl.constexpr):
    """Sample, first channel and tile of a program; chunks change fastest because they share a mask tile."""
    program = tl.program_id(0)
    chunk = program % chunks
    tile = (program // chunks) % tiles
    sample = program // chunks // tiles
    return sample.to(tl.int64), chunk.to(tl.int64) * (STEPS * BLOCK_C), tile.to(tl.int64)


@triton.jit
def tile_rows(
    length,
    groups,
    tile,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Where the elements of a tile are; a row is WIDTH neighbours.

    Returns rows = (channel, number in the plane, whether it begins in the plane), each [ROWS, 1]; the offsets
    in memory group [ROWS, 1] and element [ROWS, WIDTH]; inside [ROWS, WIDTH]: what lies in the plane.
    Channels, numbers and offsets count from the tile's first.
    """
    FOLD: tl.constexpr = 8 // WIDTH
    row = tl.arange(0, BLOCK_C * BLOCK_G * FOLD)[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    row_c = row // (BLOCK_G * FOLD)
    row_p = row % (BLOCK_G * FOLD)
    group = row_p // FOLD
    element = row_p * WIDTH + lane
    # int32 holds these products: several channels in one tile mean planes smaller than a tile.
    if BLOCK_C != 1:
        group += row_c * groups
        if WHOLE:
            element = (row_c * groups * FOLD + row_p) * WIDTH + lane
        else:
            element += row_c * length
    if WHOLE:
        row_inside = row_p < (groups - tile * BLOCK_G) * FOLD
        inside = tl.broadcast_to(row_inside, [BLOCK_C * BLOCK_G * FOLD, WIDTH])
    else:
        row_inside = row_p * WIDTH < length - tile * (BLOCK_G * 8)
        inside = row_p * WIDTH + lane < length - tile * (BLOCK_G * 8)
    return (row_c, row_p, row_inside), group, element, inside


@triton.jit
def step_start(length, groups, channels, sample, channel, tile, WHOLE: tl.constexpr, BLOCK_G: tl.constexpr):
    """Offsets of the first group and the first element of a tile of `channel`."""
    segment = sample * channels + channel
    group = segment * groups + tile * BLOCK_G
    if WHOLE:
        # Written as a multiple of 8, which is how the compiler knows that wide loads are aligned.
        element = group * 8
    else:
        element = segment * length + tile * (BLOCK_G * 8)
    return group, element


@triton.jit
def load_weight(
    mask_ptr,
    stride_n,
    stride_c,
    sample,
    channel,
    tile,
    rows,  # three [ROWS, 1], see `tile_rows`
    inside,  # [ROWS, WIDTH]
    MASK: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Mask values of a tile in float32, 0 outside the plane; [ROWS, 1] where the elements of a row share one.

    "plane": one value per position, whatever the channel. "channel": channels lie stride_c apart.
    "interleaved": CHANNELS neighbours share one value (channels_last with a single-channel mask); CHANNELS is
    compile-time because every element is divided by it.
    """
    WIDTH: tl.constexpr = inside.shape[1]
    row_c, row_p, row_inside = rows
    start = tile * (BLOCK_G * 8)
    position = row_p * WIDTH + tl.arange(0, WIDTH)[None, :]
    pointer = mask_ptr + sample * stride_n
    if MASK == "interleaved":
        pixel = start // CHANNELS
        rest = (start - pixel * CHANNELS).to(tl.int32)
        # Not `%`: Triton's interpreter has none of an int by a constexpr.
        if CHANNELS // WIDTH * WIDTH == CHANNELS:
            weight = tl.load(pointer + pixel + (rest + row_p * WIDTH) // CHANNELS, mask=row_inside, other=0)
        else:
            weight = tl.load(pointer + pixel + (rest + position) // CHANNELS, mask=inside, other=0)
    elif MASK == "channel":
        pointer += channel * stride_c + start
        weight = tl.load(pointer + row_c.to(tl.int64) * stride_c + position, mask=inside, other=0)
    else:
        weight = tl.load(pointer + start + position, mask=inside, other=0)
    return weight.to(tl.float32)


@triton.jit(do_not_specialize=["samples", "per_sample", "scale_rows", "numel"])
def finalise(
    sums_ptr,  # [regions, 2, samples, per_sample]: numerator, then summed weights if needed
    out_ptr,  # []
    second_ptr,  # [], of region 1
    scale_ptr,  # [scale_rows, regions]
    samples,
    per_sample,
    scale_rows,
    numel,
    NORMALIZE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Adds the partial sums of one region (program); writes the loss and d loss / d S_n of every sample."""
    region = tl.program_id(0)
    regions = tl.num_programs(0)
    count = samples.to(tl.int64) * per_sample
    WEIGHTS: tl.constexpr = NORMALIZE == "mask" or NORMALIZE == "sample"
    sums_ptr += region * count * (2 if WEIGHTS else 1)
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    if NORMALIZE == "sample":
        total = tl.zeros([ROWS, 1], tl.float64)
        for first in range(0, samples, ROWS):
            sample = first + row
            numerator = tl.zeros([ROWS, COLS], tl.float64)
            weight = tl.zeros([ROWS, COLS], tl.float64)
            for start in range(0, per_sample, COLS):
                offset = sample.to(tl.int64) * per_sample + start + col
                inside = (sample < samples) & (start + col < per_sample)
                numerator += tl.load(sums_ptr + offset, mask=inside, other=0.0).to(tl.float64)
                weight += tl.load(sums_ptr + count + offset, mask=inside, other=0.0).to(tl.float64)
            weight_n = tl.sum(weight, axis=1, keep_dims=True)
            # Nothing counted means loss 0 and gradient 0, never 0 / 0.
            scale = tl.where(weight_n == 0, 0.0, 1.0 / (tl.where(weight_n == 0, 1.0, weight_n) * samples))
            total += tl.sum(numerator, axis=1, keep_dims=True) * scale
            tl.store(scale_ptr + sample * regions + region, scale.to(tl.float32), mask=sample < samples)
        loss = tl.sum(total)
    else:
        numerator = tl.zeros([ROWS, COLS], tl.float64)
        weight = tl.zeros([ROWS, COLS], tl.float64)
        place = row * COLS + col
        for start in range(0, count, ROWS * COLS):
            inside = start + place < count
            numerator += tl.load(sums_ptr + start + place, mask=inside, other=0.0).to(tl.float64)
            if NORMALIZE == "mask":
                weight += tl.load(sums_ptr + count + start + place, mask=inside, other=0.0).to(tl.float64)
        if NORMALIZE == "mask":
            denominator = tl.sum(weight)
        elif NORMALIZE == "image":
            denominator = numel.to(tl.float64)
        else:
            denominator = tl.full([], 1.0, tl.float64)
        scale = tl.where(denominator == 0, 0.0, 1.0 / tl.where(denominator == 0, 1.0, denominator))
        loss = tl.sum(numerator) * scale
        for first in range(0, scale_rows, ROWS * COLS):
            sample = first + place
            value = tl.zeros([ROWS, COLS], tl.float32) + scale.to(tl.float32)
            tl.store(scale_ptr + sample * regions + region, value, mask=sample < scale_rows)
    # Two outputs of one launch: each program stores through its own pointer.
    tl.store(out_ptr, loss.to(tl.float32), mask=region == 0)
    tl.store(second_ptr, loss.to(tl.float32), mask=region == 1)


def launch_finalise(
    sums: Tensor,  # [regions, 1 or 2, samples, per_sample]
    out: Tensor,  # []
    second: Tensor,  # []
    scale: Tensor,  # [N, regions]
    samples: int,
    per_sample: int,
    numel: int,
    normalize: str,
) -> None:
    """Second stage of one or two regions."""
    if normalize == "sample":
        cols = min(triton.next_power_of_2(per_sample), 1024)
        rows, warps = 1024 // cols, 4
    else:
        rows, (cols, warps) = 1, ((1024, 4) if samples * per_sample <= 1024 else (4096, 16))
    finalise[(scale.shape[1],)](
        sums,
        out,
        second,
        scale,
        samples,
        per_sample,
        scale.shape[0],
        numel,
        NORMALIZE=normalize,
        ROWS=rows,
        COLS=cols,
        num_warps=warps,
    )
