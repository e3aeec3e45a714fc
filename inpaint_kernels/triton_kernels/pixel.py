"""The Triton kernels of the pixel losses: masked_l1, hole_valid and feature_distance.

    d = input[j N + n] - target[n];  S_r = sum w_r * penalty(d) over the elements of one layer whose w_r is not 0
    loss_r = sum over layers of scale_r * S_r;  grad_input = sum over r of grad_r * scale_r * w_r * penalty'(d)

A layer is a target of N samples and k predictions of it. Regions r: one, w = mask, or two, the hole and the valid
one, of which one is the mask and the other 1 - mask. masked_l1 is one layer and one region, hole_valid one layer and
two regions; feature_distance has many layers, each a branch of its own, compiled for its dtypes, mask and tile, and a
program takes the branch of its layer.

Work split (sizes in `plan.py`): memory is seen as samples of `channels` segments of `length` consecutive
elements, each cut into groups of 8, the unit of the packed signs. A program owns BLOCK_G groups of
STEPS * BLOCK_C channels of one target sample, held as [ROWS, WIDTH] tiles: a row is what one thread moves at once,
16 bytes of float32 (WIDTH 4, two rows a group) or of half precision (WIDTH 8). It goes over the k predictions, so
that target and shared mask are read once. A single-channel mask is loaded once and serves all channels of the
program. BLOCK_C > 1 only where a plane is smaller than a tile.

Saved for backward: l1 keeps 2 sign bits an element of the input, the other penalties re-read input and target.
Reductions: every program stores its sums, `finalise_kernel` adds them in float64 in a fixed order; no atomics.
Bytes an element of the target (float32, C channels, float32 mask of one channel): forward 4 + 4 k + 4 / C, and k / 4
for the signs; l1 backward k / 4 + 4 / C read and 4 k written, for masked_l1 and hole_valid 4 for each gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan


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
def program_place(program, tiles, chunks, BLOCK_C: tl.constexpr, STEPS: tl.constexpr):
    """Sample, first channel and tile of a program; chunks change fastest because they share a mask tile."""
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


@triton.jit
def region_weights(weight, HOLE: tl.constexpr):
    """(hole, valid) weights from a mask that is 1 in the hole (HOLE) or on known pixels."""
    if HOLE:
        hole = weight
        valid = 1.0 - weight
    else:
        hole = 1.0 - weight
        valid = weight
    return hole, valid


@triton.jit
def layer_place(
    program,
    sizes,
    UNIT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sizes of a layer (`plan.Layer.sizes`), and the place of a program among its tiles."""
    length, groups, channels = unpacked(sizes[0]), unpacked(sizes[1]), unpacked(sizes[2])
    tiles, chunks, samples = unpacked(sizes[3]), unpacked(sizes[4]), unpacked(sizes[5])
    # Written as multiples of UNIT, which is how the compiler knows that wide loads are aligned.
    stride_n, stride_c = unpacked(sizes[6]).to(tl.int64) * UNIT, unpacked(sizes[7]).to(tl.int64) * UNIT
    sample, first, tile = program_place(program, tiles, chunks, BLOCK_C, STEPS)
    rows, group, element, inside = tile_rows(length, groups, tile, WHOLE, BLOCK_C, BLOCK_G, WIDTH)
    counts = length, groups, channels, samples, stride_n, stride_c
    return counts, (sample, first, tile), (rows, group, element, inside)


@triton.jit
def forward_layer(
    program,
    input_ptr,  # [COPIES * samples, channels, length]
    target_ptr,  # [samples, channels, length]
    mask_ptr,  # see `load_weight`; None for MASK "none"
    signs_ptr,  # [COPIES * samples, channels, groups] int16, or None
    map_ptr,  # [samples, channels, length] or None
    sums_ptr,  # [regions, 1 or 2, programs of all layers]
    total,
    sizes,  # see `plan.Layer`
    param,
    PENALTY: tl.constexpr,
    HOLE: tl.constexpr,  # of two regions, whether the mask is 1 in the hole; None for one
    WEIGHTS: tl.constexpr,
    TILES: tl.constexpr,
    LAYER: tl.constexpr,
):
    # Flat, because Triton 3.7 does not compile the index of a nested constexpr tuple.
    MASK: tl.constexpr = TILES[10 * LAYER + 0]
    CHANNELS: tl.constexpr = TILES[10 * LAYER + 1]
    UNIT: tl.constexpr = TILES[10 * LAYER + 2]
    COPIES: tl.constexpr = TILES[10 * LAYER + 3]
    SHARED: tl.constexpr = TILES[10 * LAYER + 4]
    WHOLE: tl.constexpr = TILES[10 * LAYER + 5]
    BLOCK_C: tl.constexpr = TILES[10 * LAYER + 6]
    BLOCK_G: tl.constexpr = TILES[10 * LAYER + 7]
    STEPS: tl.constexpr = TILES[10 * LAYER + 8]
    WIDTH: tl.constexpr = TILES[10 * LAYER + 9]
    counts, place, inner = layer_place(program, sizes, UNIT, WHOLE, BLOCK_C, BLOCK_G, STEPS, WIDTH)
    length, groups, channels, samples, stride_n, stride_c = counts
    sample, first, tile = place
    rows, group, element, inside = inner
    row_c, row_p, row_inside = rows
    loss = tl.zeros(element.shape, tl.float32)
    loss_2 = tl.zeros(element.shape, tl.float32)
    weights = tl.zeros(element.shape, tl.float32)
    weights_2 = tl.zeros(element.shape, tl.float32)
    if SHARED and (MASK == "plane" or MASK == "interleaved"):
        weight = load_weight(
            mask_ptr, stride_n, stride_c, sample, first, tile, rows, inside, MASK, CHANNELS, BLOCK_G
        )
    for step in tl.static_range(STEPS):
        channel = first + step * BLOCK_C
        _, start = step_start(length, groups, channels, sample, channel, tile, WHOLE, BLOCK_G)
        valid_c = row_c < channels - channel
        exists = inside & valid_c
        target = tl.load(target_ptr + start + element, mask=exists, other=0.0).to(tl.float32)
        for copy in tl.static_range(COPIES):
            at = sample + copy * samples
            if MASK != "none" and (not SHARED or (copy == 0 and MASK == "channel")):
                weight = load_weight(
                    mask_ptr, stride_n, stride_c, at, channel, tile, rows, exists, MASK, CHANNELS, BLOCK_G
                )
            group_start, start = step_start(length, groups, channels, at, channel, tile, WHOLE, BLOCK_G)
            d = tl.load(input_ptr + start + element, mask=exists, other=0.0).to(tl.float32) - target
            value = penalty_value(d, PENALTY, param)
            counted = exists
            if MASK == "none":
                value = tl.where(exists, value, 0.0)
            elif HOLE is None:
                # Select, not only multiply: NaN and Inf under weight 0 do not count.
                counted = exists & (weight != 0)
                value = tl.where(counted, weight * value, 0.0)
                if WEIGHTS and (not SHARED or copy == 0):
                    weights += tl.where(exists, weight, 0.0)
            else:
                # Every element lies in some region, and so has a sign.
                hole, valid = region_weights(weight, HOLE)
                loss_2 += tl.where(exists & (valid != 0), valid * value, 0.0)
                value = tl.where(exists & (hole != 0), hole * value, 0.0)
                if WEIGHTS and (not SHARED or copy == 0):
                    weights += tl.where(exists, hole, 0.0)
                    weights_2 += tl.where(exists, valid, 0.0)
            loss += value
            if map_ptr is not None:
                tl.store(map_ptr + start + element, value, mask=exists)
            if signs_ptr is not None:
                tl.store(
                    signs_ptr + group_start + group,
                    pack_signs(d, counted),
                    mask=row_inside & valid_c & (row_p % (8 // WIDTH) == 0),
                )
    if map_ptr is None:
        SHARE: tl.constexpr = COPIES if SHARED else 1
        sums_ptr += tl.program_id(0)
        tl.store(sums_ptr, tl.sum(loss))
        if WEIGHTS:
            sums_ptr += total
            tl.store(sums_ptr, tl.sum(weights) * SHARE)
        if HOLE is not None:
            sums_ptr += total
            tl.store(sums_ptr, tl.sum(loss_2))
            if WEIGHTS:
                sums_ptr += total
                tl.store(sums_ptr, tl.sum(weights_2) * SHARE)


@triton.jit(do_not_specialize=["total"])
def forward_kernel(
    inputs,  # of each layer
    targets,
    masks,
    signs,
    map_ptr,  # weighted penalties of the only layer instead of the sums, or None
    sums_ptr,  # [regions, 1 or 2, programs]: numerators, then summed weights if WEIGHTS; None for a map
    firsts,  # first program of each layer, see `plan.packed`
    sizes,  # of each layer, see `plan.Layer`
    total,
    param,  # of the penalty
    PENALTY: tl.constexpr,
    HOLE: tl.constexpr,  # of two regions, whether the mask is 1 in the hole; None for one
    WEIGHTS: tl.constexpr,
    TILES: tl.constexpr,  # 10 of each layer, see `plan.Layer`
    LAYERS: tl.constexpr,
):
    program = tl.program_id(0)
    for layer in tl.static_range(LAYERS):
        first = unpacked(firsts[layer])
        if (program >= first) & (program < unpacked(firsts[layer + 1])):
            forward_layer(
                program - first,
                inputs[layer],
                targets[layer],
                masks[layer],
                signs[layer],
                map_ptr,
                sums_ptr,
                total,
                sizes[layer],
                param,
                PENALTY,
                HOLE,
                WEIGHTS,
                TILES,
                layer,
            )


@triton.jit(do_not_specialize=["total", "means", "scale_rows"])
def finalise_kernel(
    sums_ptr,  # [regions, 1 or 2, programs]: numerators, then summed weights unless COUNT
    outs,  # [] of each region
    scale_ptr,  # [rows, regions]
    firsts,  # first sum of each layer, see `plan.packed`
    counts,  # what a layer's sum is divided by if COUNT, likewise
    weights,  # factor of each layer
    total,
    means,  # the mean is that of so many equal parts of a layer, each divided by its own weights
    scale_rows,  # of each part
    COUNT: tl.constexpr,
    NUMBERS: tl.constexpr,  # first row of each layer in scale
    LAYERS: tl.constexpr,
    REGIONS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Adds the partial sums of one region (program); writes the loss and d loss / d S of every layer or sample."""
    region = tl.program_id(0)
    sums_ptr += region * total.to(tl.int64) * (1 if COUNT else 2)
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, COLS)[None, :]
    loss = tl.zeros([ROWS, 1], tl.float64)
    for layer in tl.static_range(LAYERS):
        begin = unpacked(firsts[layer])
        length = (unpacked(firsts[layer + 1]) - begin) // means
        for first in range(0, means, ROWS):
            part = first + row
            numerator = tl.zeros([ROWS, COLS], tl.float64)
            weight = tl.zeros([ROWS, COLS], tl.float64)
            for start in range(0, length, COLS):
                at = begin + part.to(tl.int64) * length + start + col
                inside = (part < means) & (start + col < length)
                numerator += tl.load(sums_ptr + at, mask=inside, other=0.0).to(tl.float64)
                if not COUNT:
                    weight += tl.load(sums_ptr + total + at, mask=inside, other=0.0).to(tl.float64)
            if COUNT:
                denominator = tl.zeros([ROWS, 1], tl.float64) + unpacked(counts[layer]).to(tl.float64)
            else:
                denominator = tl.sum(weight, axis=1, keep_dims=True)
            # Nothing counted means loss 0 and gradient 0, never 0 / 0.
            empty = denominator == 0
            scale = tl.where(empty, 0.0, weights[layer] / (tl.where(empty, 1.0, denominator) * means))
            loss += tl.sum(numerator, axis=1, keep_dims=True) * scale
            for start in range(0, scale_rows, COLS):
                place = NUMBERS[layer] + part.to(tl.int64) * scale_rows + start + col
                tl.store(
                    scale_ptr + place * REGIONS + region,
                    tl.broadcast_to(scale, [ROWS, COLS]).to(tl.float32),
                    mask=(part < means) & (start + col < scale_rows),
                )
    for i in tl.static_range(REGIONS):
        # Each program stores through its own pointer.
        tl.store(outs[i], tl.sum(loss).to(tl.float32), mask=region == i)


@triton.jit
def backward_layer(
    program,
    grad_ptr,  # [] of the first region or None; MAP: [samples, channels, length]
    grad_2_ptr,  # [] of the second one or None
    scale_ptr,  # [samples, regions] if PER_SAMPLE, else [1], or None
    signs_ptr,  # [COPIES * samples, channels, groups] int16 for l1, else None
    mask_ptr,  # see `load_weight`; None for MASK "none"
    input_ptr,  # [COPIES * samples, channels, length], None for l1
    target_ptr,  # [samples, channels, length], None for l1
    grad_input_ptr,  # [COPIES * samples, channels, length] or None
    grad_target_ptr,  # [samples, channels, length] or None; only with one copy
    sizes,  # see `plan.Layer`
    param,
    PENALTY: tl.constexpr,
    HOLE: tl.constexpr,  # of two regions, whether the mask is 1 in the hole; None for one
    MAP: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    TILES: tl.constexpr,
    LAYER: tl.constexpr,
):
    # Flat, because Triton 3.7 does not compile the index of a nested constexpr tuple.
    MASK: tl.constexpr = TILES[10 * LAYER + 0]
    CHANNELS: tl.constexpr = TILES[10 * LAYER + 1]
    UNIT: tl.constexpr = TILES[10 * LAYER + 2]
    COPIES: tl.constexpr = TILES[10 * LAYER + 3]
    SHARED: tl.constexpr = TILES[10 * LAYER + 4]
    WHOLE: tl.constexpr = TILES[10 * LAYER + 5]
    BLOCK_C: tl.constexpr = TILES[10 * LAYER + 6]
    BLOCK_G: tl.constexpr = TILES[10 * LAYER + 7]
    STEPS: tl.constexpr = TILES[10 * LAYER + 8]
    WIDTH: tl.constexpr = TILES[10 * LAYER + 9]
    counts, place, inner = layer_place(program, sizes, UNIT, WHOLE, BLOCK_C, BLOCK_G, STEPS, WIDTH)
    length, groups, channels, samples, stride_n, stride_c = counts
    sample, first, tile = place
    rows, group, element, inside = inner
    row_c, _, row_inside = rows
    if PER_SAMPLE and scale_ptr is not None:
        scale_ptr += sample * (1 if HOLE is None else 2)
    if grad_ptr is not None and not MAP:
        factor = tl.load(grad_ptr).to(tl.float32)
        if scale_ptr is not None:
            factor *= tl.load(scale_ptr)
    if grad_2_ptr is not None:
        factor_2 = tl.load(grad_2_ptr).to(tl.float32) * tl.load(scale_ptr + 1)
    if SHARED and (MASK == "plane" or MASK == "interleaved"):
        weight = load_weight(
            mask_ptr, stride_n, stride_c, sample, first, tile, rows, inside, MASK, CHANNELS, BLOCK_G
        )
    for step in tl.static_range(STEPS):
        channel = first + step * BLOCK_C
        valid_c = row_c < channels - channel
        exists = inside & valid_c
        if signs_ptr is None:
            _, start = step_start(length, groups, channels, sample, channel, tile, WHOLE, BLOCK_G)
            target = tl.load(target_ptr + start + element, mask=exists, other=0.0).to(tl.float32)
        for copy in tl.static_range(COPIES):
            at = sample + copy * samples
            group_start, start = step_start(length, groups, channels, at, channel, tile, WHOLE, BLOCK_G)
            if MASK != "none" and (not SHARED or (copy == 0 and MASK == "channel")):
                weight = load_weight(
                    mask_ptr, stride_n, stride_c, at, channel, tile, rows, exists, MASK, CHANNELS, BLOCK_G
                )
            if MAP:
                factor = tl.load(grad_ptr + start + element, mask=exists, other=0.0).to(tl.float32)
            value = tl.zeros(element.shape, tl.float32)
            if MASK == "none":
                value += factor
                counted = exists
            elif HOLE is None:
                value += factor
                value *= weight
                counted = weight != 0
            else:
                hole, valid = region_weights(weight, HOLE)
                counted = value != 0
                if grad_ptr is not None:
                    value += tl.where(hole != 0, factor * hole, 0.0)
                    counted = counted | (hole != 0)
                if grad_2_ptr is not None:
                    value += tl.where(valid != 0, factor_2 * valid, 0.0)
                    counted = counted | (valid != 0)
            if signs_ptr is not None:
                word = tl.load(signs_ptr + group_start + group, mask=row_inside & valid_c, other=0)
                value = apply_signs(word, value)
            else:
                d = tl.load(input_ptr + start + element, mask=exists, other=0.0).to(tl.float32) - target
                # A NaN in a region that sends no gradient must not reach the other one's as 0 * NaN.
                value = tl.where(counted, value * penalty_grad(d, PENALTY, param), 0.0)
            if grad_input_ptr is not None:
                dtype = grad_input_ptr.dtype.element_ty
                tl.store(grad_input_ptr + start + element, value.to(dtype), mask=exists)
            if grad_target_ptr is not None:
                dtype_2 = grad_target_ptr.dtype.element_ty
                tl.store(grad_target_ptr + start + element, (-value).to(dtype_2), mask=exists)


@triton.jit
def backward_kernel(
    grads,  # of each region, see `backward_layer`
    scale_ptr,  # [rows, regions] or None
    signs,  # of each layer
    masks,
    inputs,
    targets,
    grad_inputs,
    grad_targets,
    firsts,  # first program of each layer, see `plan.packed`
    sizes,  # of each layer, see `plan.Layer`
    param,  # of the penalty
    PENALTY: tl.constexpr,
    HOLE: tl.constexpr,  # of two regions, whether the mask is 1 in the hole; None for one
    MAP: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
    TILES: tl.constexpr,  # 10 of each layer, see `plan.Layer`
    NUMBERS: tl.constexpr,  # first row of each layer in scale
    LAYERS: tl.constexpr,
):
    program = tl.program_id(0)
    for layer in tl.static_range(LAYERS):
        first = unpacked(firsts[layer])
        if (program >= first) & (program < unpacked(firsts[layer + 1])):
            backward_layer(
                program - first,
                grads[0],
                grads[1],
                scale_ptr if scale_ptr is None else scale_ptr + NUMBERS[layer],
                signs[layer],
                masks[layer],
                inputs[layer],
                targets[layer],
                grad_inputs[layer],
                grad_targets[layer],
                sizes[layer],
                param,
                PENALTY,
                HOLE,
                MAP,
                PER_SAMPLE,
                TILES,
                layer,
            )


class Pair(NamedTuple):
    """The tensors of one layer, not empty: predictions, targets, what is kept and computed of them."""

    batch: int  # N
    input: Any  # [k N, C, H, W]; None in the backward of l1
    target: Any  # [N, C, H, W]; likewise
    mask: Tensor | None  # [H, W] or [1|N|kN, 1|C, H, W]; None in all layers or in none
    signs: Tensor | None  # uint8, l1 alone
    grad_input: Tensor | None = None  # [k N, C, H, W]
    grad_target: Tensor | None = None  # [N, C, H, W], only with one prediction


def launch_forward(
    pairs: Sequence[Pair],
    outs: Sequence[Tensor],  # [] of each region, or the map [N, C, H, W] of the only layer
    scale: Tensor,  # [rows, regions], for a map not written
    penalty: str,
    param: float,
    normalize: str,
    *,
    mask_is_hole: bool | None = None,  # of two regions
    samples: int = 1,  # rows of each layer
    weights: Sequence[float] = (1.0,),
    numbers: Sequence[int] = (0,),  # first row of each layer
) -> None:
    """Both stages."""
    is_map = outs[0].ndim != 0
    if pairs[0].mask is None and normalize != "sum":
        # Every element weighs 1: all normalisations divide by the number of elements.
        normalize = "image"
    has_weights = not is_map and normalize in ("mask", "sample")
    last = [plan.is_channels_last(p.input) for p in pairs]
    elements = max(p.target.numel() for p in pairs)
    layers = []
    for p, c in zip(pairs, last, strict=True):
        width = plan.stores_width(*outs) if is_map else plan.loads_width(p.input, p.target)
        save_signs = p.signs is not None
        layers.append(plan.make_layer(p.input.shape, p.batch, c, p.mask, save_signs, width, elements))
    firsts = (0, *accumulate(layer.programs for layer in layers))
    with plan.on_device(scale):
        shape = len(outs), 1 + has_weights, firsts[-1]
        sums = None if is_map else torch.empty(shape, dtype=torch.float32, device=scale.device)
        forward_kernel[(firsts[-1],)](
            tuple(plan.in_layout(p.input, c) for p, c in zip(pairs, last, strict=True)),
            tuple(plan.in_layout(p.target, c) for p, c in zip(pairs, last, strict=True)),
            tuple(layer.mask for layer in layers),
            tuple(p.signs if p.signs is None else p.signs.view(torch.int16) for p in pairs),
            outs[0] if is_map else None,
            sums,
            plan.packed(firsts),
            tuple(layer.sizes for layer in layers),
            firsts[-1],
            param,
            penalty,
            mask_is_hole,
            has_weights,
            tuple(value for layer in layers for value in layer.tile),
            len(layers),
            num_warps=layers[0].warps,
        )
        if sums is not None:
            numels = [p.input.numel() for p in pairs]
            launch_finalise(sums, outs, scale, firsts, numels, normalize, samples, weights, numbers)


def launch_finalise(
    sums: Tensor,  # [..., programs], see `finalise_kernel`
    outs: Sequence[Tensor],  # [] of each region
    scale: Tensor,  # [rows, regions]
    firsts: Sequence[int],
    numels: Sequence[int],  # elements of each layer
    normalize: str,
    samples: int,
    weights: Sequence[float] = (1.0,),
    numbers: Sequence[int] = (0,),
) -> None:
    """Second stage; `samples` rows of `scale` belong to each layer."""
    programs = firsts[-1]
    means = samples if normalize == "sample" else 1
    if normalize == "sample":
        cols = min(triton.next_power_of_2(programs // means), 1024)
        rows, warps = 1024 // cols, 4
    else:
        rows, (cols, warps) = 1, ((1024, 4) if programs <= 1024 * len(numels) else (2048, 8))
    finalise_kernel[(len(outs),)](
        sums,
        tuple(outs),
        scale,
        plan.packed(firsts),
        plan.packed([1] * len(numels) if normalize == "sum" else numels),
        tuple(weights),
        sums.shape[-1],
        means,
        samples // means,
        normalize in ("image", "sum"),
        tuple(numbers),
        len(numels),
        len(outs),
        rows,
        cols,
        num_warps=warps,
    )


def launch_backward(
    pairs: Sequence[Pair],
    grads: Sequence[Tensor | None],  # [] of each region, or [N, C, H, W] of a map
    scale: Tensor,  # [rows, regions]; empty for a map
    penalty: str,
    param: float,
    *,
    mask_is_hole: bool | None = None,  # of two regions
    per_sample: bool = True,  # a row of `scale` is a sample, not a layer
    numbers: Sequence[int] = (0,),  # first row of each layer
) -> None:
    """Fills the gradients of the pairs."""
    l1 = penalty == "l1"
    images: list[Any] = [p.grad_target if p.grad_input is None else p.grad_input for p in pairs]
    last = [plan.is_channels_last(x) for x in images]
    # The gradient of a summed map is one number expanded to the image: read it as such.
    grad = grads[0]
    is_map = grad is not None and grad.ndim != 0 and any(grad.stride())
    if grad is not None and is_map:
        grads = [plan.in_layout(grad, last[0])]
    elements = max(x.numel() // x.shape[0] * p.batch for x, p in zip(images, pairs, strict=True))
    layers = []
    for x, p, c in zip(images, pairs, last, strict=True):
        width = plan.stores_width(*(g for g in (p.grad_input, p.grad_target) if g is not None))
        # A 0/1 mask adds nothing to the signs of one region, which are 0 where it is 0; the scale of its sample does.
        known = l1 and mask_is_hole is None and p.mask is not None and p.mask.dtype == torch.bool
        mask, apart = None if known else p.mask, per_sample and p.mask is not None
        layers.append(plan.make_layer(x.shape, p.batch, c, mask, l1, width, elements, apart))
    firsts = (0, *accumulate(layer.programs for layer in layers))
    with plan.on_device(scale):
        backward_kernel[(firsts[-1],)](
            (*grads, None)[:2],
            scale.contiguous() if scale.numel() else None,
            tuple(p.signs if p.signs is None else p.signs.view(torch.int16) for p in pairs),
            tuple(layer.mask for layer in layers),
            tuple(None if l1 else plan.in_layout(p.input, c) for p, c in zip(pairs, last, strict=True)),
            tuple(None if l1 else plan.in_layout(p.target, c) for p, c in zip(pairs, last, strict=True)),
            tuple(p.grad_input for p in pairs),
            tuple(p.grad_target for p in pairs),
            plan.packed(firsts),
            tuple(layer.sizes for layer in layers),
            param,
            penalty,
            mask_is_hole,
            is_map,
            per_sample,
            tuple(value for layer in layers for value in layer.tile),
            tuple(numbers),
            len(layers),
            num_warps=layers[0].warps,
        )
