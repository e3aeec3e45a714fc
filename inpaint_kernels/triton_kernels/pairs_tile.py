"""Tiles of the Triton kernels over neighbouring pixels: what a program owns, where it lies, its mask and its signs.

Memory is seen as samples of `channels` segments of `height` rows of `width` elements, the next pixel STEP elements
away: planes in NCHW (STEP 1), whole samples in channels_last (STEP C). A strip is STEPS rows of a segment; a program
owns BLOCK_G groups of 8 elements of BLOCK_S strips of one sample and walks down their rows. A row is a [ROWS, WIDTH]
tile as in `pixel.py`; what was found in it is kept for the next one. Read twice, from the cache, are the rows around a
strip and the neighbours within a row. The channels of the same rows are neighbouring strips: they share a mask.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .hole_valid import region_weights
from .pixel import pack_signs
from .plan import Mask

# (elements of the call, groups of 8 in a tile, rows of a strip). Reasoned, not tuned: no GPU has measured them yet.
STRIPS = ((1 << 18, 16, 2), (1 << 22, 32, 4), (1 << 63, 64, 8))
# Places in the tuple of `mask_row`: weights, then what the region is made of.
LEFT, HERE, RIGHT, REACH = (tl.constexpr(i) for i in range(4))


class StripPlan(NamedTuple):
    """Work split of one call; the kernels take the sizes as one tuple, then the fields in capitals."""

    sizes: tuple[int, ...]  # height, width, groups, channels, blocks, tiles
    STEP: int
    SHARED: int
    WHOLE: bool
    BLOCK_S: int
    BLOCK_G: int
    STEPS: int
    WIDTH: int
    samples: int
    programs: int
    warps: int


def make_plan(size: Any, channels_last: bool, mask: Mask, wide: bool) -> StripPlan:
    """Work split of a call on images of `size`; `wide`: rows of 4 elements, for float32."""
    n, c, h, w = size
    return _plan(n, c, h, w, channels_last, mask.kind == "interleaved", wide)


@functools.lru_cache(maxsize=1024)
def _plan(n: int, c: int, h: int, w: int, channels_last: bool, interleaved: bool, wide: bool) -> StripPlan:
    channels, width, step = (1, w * c, c) if channels_last else (c, w, 1)
    _, block, steps = next(row for row in STRIPS if n * c * h * w <= row[0])
    groups = triton.cdiv(width, 8)
    # Evenly filled strips: 9 rows are two of 5, not 8 and 1.
    steps = triton.cdiv(h, triton.cdiv(h, steps))
    strips = channels * triton.cdiv(h, steps)
    block_g = min(block, triton.next_power_of_2(groups))
    block_s = min(block // block_g, triton.next_power_of_2(strips))
    blocks, tiles = triton.cdiv(strips, block_s), triton.cdiv(groups, block_g)
    row = 4 if wide else 8
    return StripPlan(
        sizes=(h, width, groups, channels, blocks, tiles),
        STEP=step,
        SHARED=c if interleaved else 1,
        WHOLE=width % 8 == 0,
        BLOCK_S=block_s,
        BLOCK_G=block_g,
        STEPS=steps,
        WIDTH=row,
        samples=n,
        programs=n * blocks * tiles,
        warps=max(1, block_s * block_g * 8 // row // 32),
    )


@triton.jit
def strip_place(
    sizes,  # height, width, groups, channels, blocks, tiles
    BLOCK_S: tl.constexpr,
    BLOCK_G: tl.constexpr,
    STEPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Where a program works: (sample, channel, number of the top row, place).

    place = (start of the tile in its row, x [ROWS, WIDTH] and group [ROWS, 1] counted from there, whether a group
    begins [ROWS, 1]). Channel and top row are [ROWS, 1] where a tile holds several strips; a strip behind the last
    one begins below the image.
    """
    _, _, _, channels, blocks, tiles = sizes
    FOLD: tl.constexpr = 8 // WIDTH
    program = tl.program_id(0)
    strip = program // tiles % blocks * BLOCK_S
    row = tl.arange(0, BLOCK_S * BLOCK_G * FOLD)[:, None]
    if BLOCK_S != 1:
        strip += row // (BLOCK_G * FOLD)
        row = row % (BLOCK_G * FOLD)
    start = (program % tiles).to(tl.int64) * (BLOCK_G * 8)
    place = (start, row * WIDTH + tl.arange(0, WIDTH)[None, :], row // FOLD, row % FOLD == 0)
    sample = (program // tiles // blocks).to(tl.int64)
    return sample, (strip % channels).to(tl.int64), strip // channels * STEPS, place


@triton.jit
def row_stride(sizes, SHARED: tl.constexpr, WHOLE: tl.constexpr):
    """Elements of a row of the images, or of the mask whose values SHARED of them share."""
    _, width, groups, _, _, _ = sizes
    if SHARED != 1:
        stride = (width // SHARED).to(tl.int64)
    elif WHOLE:
        # Written as a multiple of 8, which is how the compiler knows that wide accesses are aligned.
        stride = groups.to(tl.int64) * 8
    else:
        stride = width.to(tl.int64)
    return stride


@triton.jit
def mask_columns(place, SHARED: tl.constexpr):
    """(start of the tile in a row of the mask, columns [ROWS, WIDTH] counted from there)."""
    start, x, _, _ = place
    if SHARED == 1:
        return start, x
    first = start // SHARED
    return first, ((start - first * SHARED).to(tl.int32) + x) // SHARED


@triton.jit
def in_row(place, sizes, DISTANCE: tl.constexpr, WHOLE: tl.constexpr):
    """[ROWS, WIDTH]: which elements have one in their row DISTANCE further on."""
    start, x, group, _ = place
    _, width, groups, _, _, _ = sizes
    # 2^30 is more than a tile is long: whatever the size, the comparisons are 32 bits wide.
    if DISTANCE < 0:
        inside = x + DISTANCE >= -tl.minimum(start, 1 << 30).to(tl.int32)
    elif DISTANCE == 0 and WHOLE:
        inside = tl.broadcast_to(group < tl.minimum(groups - start // 8, 1 << 30).to(tl.int32), x.shape)
    else:
        inside = x + DISTANCE < tl.minimum(width - start, 1 << 30).to(tl.int32)
    return inside


@triton.jit
def wider(a, b, HOLE: tl.constexpr):
    """The mask value that leaves more of a hole."""
    return tl.maximum(a, b) if HOLE else tl.minimum(a, b)


@triton.jit
def mask_value(
    mask_ptr,  # [ROWS, WIDTH], in the row wanted
    place,
    sizes,
    row_exists,
    NEIGHBOUR: tl.constexpr,
    HOLE: tl.constexpr,
    STEP: tl.constexpr,
    SHARED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Weights of the pixels NEIGHBOUR further on in float32; beyond the image, what no hole is narrower than."""
    exists = in_row(place, sizes, NEIGHBOUR * STEP, WHOLE) & in_row(place, sizes, 0, WHOLE) & row_exists
    distance = NEIGHBOUR * (STEP if SHARED == 1 else 1)
    value = tl.load(mask_ptr + distance, mask=exists, other=0).to(tl.float32)
    return tl.where(exists, value, -float("inf") if HOLE else float("inf"))


@triton.jit
def mask_row(
    mask_ptr,  # [ROWS, WIDTH], in the top row; None: everything weighs 1
    NUMBER: tl.constexpr,
    stride,
    place,
    sizes,
    top,
    REGION: tl.constexpr,
    HOLE: tl.constexpr,
    STEP: tl.constexpr,
    SHARED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Row NUMBER from the top. LEFT, HERE, RIGHT: weights of those pixels; REACH + each: the widest hole of three.

    What a kernel does not use the compiler does not load.
    """
    if mask_ptr is None:
        return 1.0, 1.0, 1.0, 1.0, 1.0, 1.0
    exists = (top + NUMBER >= 0) & (top + NUMBER < sizes[0])
    mask_ptr += NUMBER * stride
    left = mask_value(mask_ptr, place, sizes, exists, -1, HOLE, STEP, SHARED, WHOLE)
    here = mask_value(mask_ptr, place, sizes, exists, 0, HOLE, STEP, SHARED, WHOLE)
    right = mask_value(mask_ptr, place, sizes, exists, 1, HOLE, STEP, SHARED, WHOLE)
    if REGION != "dilated_hole":
        return left, here, right, left, here, right
    far_left = mask_value(mask_ptr, place, sizes, exists, -2, HOLE, STEP, SHARED, WHOLE)
    far_right = mask_value(mask_ptr, place, sizes, exists, 2, HOLE, STEP, SHARED, WHOLE)
    before, after = wider(left, here, HOLE), wider(here, right, HOLE)
    return (
        left,
        here,
        right,
        wider(far_left, before, HOLE),
        wider(left, after, HOLE),
        wider(after, far_right, HOLE),
    )


@triton.jit
def region_value(above, row, below, SIDE: tl.constexpr, REGION: tl.constexpr, HOLE: tl.constexpr):
    """Value of the region LEFT of, HERE at or RIGHT of the pixels of a row, from three of `mask_row`."""
    value = row[REACH + SIDE]
    if REGION == "dilated_hole":
        value = wider(wider(above[REACH + SIDE], value, HOLE), below[REACH + SIDE], HOLE)
    hole, _ = region_weights(value, HOLE)
    return hole


@triton.jit
def weigh_pair(first, second, exists, REGION: tl.constexpr):
    """(weight, which pairs count), given the region at the first pixel of each and at the second."""
    if REGION == "image":
        return 1.0, exists
    weight = first if REGION == "first_pixel" else first * second
    return weight, exists & (weight != 0)


@triton.jit
def load_image(
    pred_ptr,  # [ROWS, WIDTH]
    target_ptr,  # [ROWS, WIDTH], or None: no composite
    offset,
    exists,
    weight,
    HOLE: tl.constexpr,
):
    """(the image whose variation is wanted, pred - target)."""
    pred = tl.load(pred_ptr + offset, mask=exists, other=0.0).to(tl.float32)
    if target_ptr is None:
        return pred, pred
    target = tl.load(target_ptr + offset, mask=exists, other=0.0).to(tl.float32)
    hole, valid = region_weights(weight, HOLE)
    # Select, not only multiply: NaN and Inf under weight 0 do not count.
    image = tl.where(hole != 0, hole * pred, 0.0) + tl.where(valid != 0, valid * target, 0.0)
    return image, pred - target


@triton.jit
def store_signs(signs_ptr, groups, exists, d, counted):
    """Two planes of a row, see `ops/_pairs.py`; signs_ptr [ROWS, 1]: the group's byte in the first of them."""
    word = pack_signs(d, counted).to(tl.int32)
    tl.store(signs_ptr, (word & 255).to(tl.uint8), mask=exists)
    tl.store(signs_ptr + groups, (word >> 8 & 255).to(tl.uint8), mask=exists)


@triton.jit
def load_signs(signs_ptr, groups, exists):
    """[ROWS, 1], the word of `pack_signs`."""
    positive = tl.load(signs_ptr, mask=exists, other=0).to(tl.int32)
    return positive | (tl.load(signs_ptr + groups, mask=exists, other=0).to(tl.int32) << 8)


@triton.jit
def load_signs_before(signs_ptr, group, groups, exists, STEP: tl.constexpr):
    """As `load_signs`, of the elements STEP before; group [ROWS, 1]: number in the row."""
    BACK: tl.constexpr = (STEP + 7) // 8
    LATE: tl.constexpr = BACK * 8 - STEP
    word = load_signs(signs_ptr - BACK, groups, exists & (group >= BACK))
    if LATE != 0:
        rest = load_signs(signs_ptr - (BACK - 1), groups, exists & (group >= BACK - 1))
        # Per byte: its last 8 - LATE bits come first, then LATE bits of the next group.
        KEPT: tl.constexpr = 255 >> LATE
        word = (word >> LATE & (KEPT * 257)) | ((rest << (8 - LATE)) & ((255 - KEPT) * 257))
    return word
