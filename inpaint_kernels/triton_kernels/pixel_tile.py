"""Tiles of the Triton kernels of the pixel losses: masked_l1, hole_valid and feature_distance.

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
Reductions: every program stores its sums, `finalize_kernel` adds them in float64 in a fixed order; no atomics.
Bytes an element of the target (float32, C channels, float32 mask of one channel): forward 4 + 4 k + 4 / C, and k / 4
for the signs; l1 backward k / 4 + 4 / C read and 4 k written, for masked_l1 and hole_valid 4 for each gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan


class Pair(NamedTuple):
    """The tensors of one layer, not empty: predictions, targets, what is kept and computed of them."""

    batch: int  # N
    input: Any  # [k N, C, H, W]; None in the backward of l1
    target: Any  # [N, C, H, W]; likewise
    mask: Tensor | None  # [H, W] or [1|N|kN, 1|C, H, W]; None in all layers or in none
    signs: Tensor | None  # uint8, l1 alone
    grad_input: Tensor | None = None  # [k N, C, H, W]
    grad_target: Tensor | None = None  # [N, C, H, W], only with one prediction


def kernel_tensors(
    pair: Pair, layer: plan.Layer, channels_last: bool, backward: bool = False
) -> tuple[Tensor | None, ...]:
    """What the kernels see of a layer: dense images, the mask, a word of signs for each group of 8; the gradients."""
    images = (x if x is None else plan.in_layout(x, channels_last) for x in (pair.input, pair.target))
    words = pair.signs if pair.signs is None else pair.signs.view(torch.int16)
    return (*images, layer.mask, words, *((pair.grad_input, pair.grad_target) if backward else ()))


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


@triton.constexpr_function
def tile_of(TILES, LAYER):
    """Triton 3.7 does not compile the index of a nested constexpr tuple."""
    return TILES[LAYER]


@triton.jit
def layer_place(program, sizes, TILE: tl.constexpr):
    """Sizes of a layer (`plan.Layer.sizes`), and the place of a program among its tiles.

    The place is (sample, first channel, tile), then (rows, group, element, inside) of `tile_rows`.
    """
    length, groups, channels = unpacked(sizes[0]), unpacked(sizes[1]), unpacked(sizes[2])
    tiles, chunks, samples = unpacked(sizes[3]), unpacked(sizes[4]), unpacked(sizes[5])
    # Written as multiples of UNIT, which is how the compiler knows that wide loads are aligned.
    stride_n = unpacked(sizes[6]).to(tl.int64) * TILE.UNIT
    stride_c = unpacked(sizes[7]).to(tl.int64) * TILE.UNIT
    # Chunks change fastest because they share a mask tile.
    chunk = program % chunks
    tile = (program // chunks) % tiles
    sample = program // chunks // tiles
    first = chunk.to(tl.int64) * (TILE.STEPS * TILE.BLOCK_C)
    tile = tile.to(tl.int64)
    counts = length, groups, channels, samples, stride_n, stride_c
    return counts, (sample.to(tl.int64), first, tile), tile_rows(length, groups, tile, TILE)


@triton.jit
def tile_rows(length, groups, tile, TILE: tl.constexpr):
    """Where the elements of a tile are; a row is WIDTH neighbours.

    Returns rows = (channel, number in the plane, whether it begins in the plane), each [ROWS, 1]; the offsets
    in memory group [ROWS, 1] and element [ROWS, WIDTH]; inside [ROWS, WIDTH]: what lies in the plane.
    Channels, numbers and offsets count from the tile's first.
    """
    WIDTH: tl.constexpr = TILE.WIDTH
    FOLD: tl.constexpr = 8 // WIDTH
    BLOCK_G: tl.constexpr = TILE.BLOCK_G
    row = tl.arange(0, TILE.BLOCK_C * BLOCK_G * FOLD)[:, None]
    lane = tl.arange(0, WIDTH)[None, :]
    row_c = row // (BLOCK_G * FOLD)
    row_p = row % (BLOCK_G * FOLD)
    group = row_p // FOLD
    element = row_p * WIDTH + lane
    # int32 holds these products: several channels in one tile mean planes smaller than a tile.
    if TILE.BLOCK_C != 1:
        group += row_c * groups
        if TILE.WHOLE:
            element = (row_c * groups * FOLD + row_p) * WIDTH + lane
        else:
            element += row_c * length
    if TILE.WHOLE:
        row_inside = row_p < (groups - tile * BLOCK_G) * FOLD
        inside = tl.broadcast_to(row_inside, [TILE.BLOCK_C * BLOCK_G * FOLD, WIDTH])
    else:
        row_inside = row_p * WIDTH < length - tile * (BLOCK_G * 8)
        inside = row_p * WIDTH + lane < length - tile * (BLOCK_G * 8)
    return (row_c, row_p, row_inside), group, element, inside


@triton.jit
def step_start(length, groups, channels, sample, channel, tile, TILE: tl.constexpr):
    """Offsets of the first group and the first element of a tile of `channel`."""
    segment = sample * channels + channel
    group = segment * groups + tile * TILE.BLOCK_G
    if TILE.WHOLE:
        # Written as a multiple of 8, which is how the compiler knows that wide loads are aligned.
        element = group * 8
    else:
        element = segment * length + tile * (TILE.BLOCK_G * 8)
    return group, element


@triton.jit
def load_weight(
    mask,  # its pointer, its strides by sample and channel
    sample,
    channel,
    tile,
    rows,  # three [ROWS, 1], see `tile_rows`
    inside,  # [ROWS, WIDTH]
    TILE: tl.constexpr,
):
    """Mask values of a tile in float32, 0 outside the plane; [ROWS, 1] where the elements of a row share one.

    "plane": one value per position, whatever the channel. "channel": channels lie stride_c apart.
    "interleaved": CHANNELS neighbours share one value (channels_last with a single-channel mask); CHANNELS is
    compile-time because every element is divided by it.
    """
    WIDTH: tl.constexpr = TILE.WIDTH
    CHANNELS: tl.constexpr = TILE.CHANNELS
    mask_ptr, stride_n, stride_c = mask
    row_c, row_p, row_inside = rows
    start = tile * (TILE.BLOCK_G * 8)
    position = row_p * WIDTH + tl.arange(0, WIDTH)[None, :]
    pointer = mask_ptr + sample * stride_n
    if TILE.MASK == "interleaved":
        pixel = start // CHANNELS
        rest = (start - pixel * CHANNELS).to(tl.int32)
        # Not `%`: Triton's interpreter has none of an int by a constexpr.
        if CHANNELS // WIDTH * WIDTH == CHANNELS:
            weight = tl.load(pointer + pixel + (rest + row_p * WIDTH) // CHANNELS, mask=row_inside, other=0)
        else:
            weight = tl.load(pointer + pixel + (rest + position) // CHANNELS, mask=inside, other=0)
    elif TILE.MASK == "channel":
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
