"""Tiles of the Triton kernels over neighbouring pixels: what a program owns, where it lies, its region and its signs.

Memory is seen as samples of `channels` segments of `height` rows of `width` elements, the next pixel STEP elements
away: planes in NCHW (STEP 1), whole samples in channels_last (STEP C). A chunk is STEPS rows of a segment; a program
owns BLOCK_G groups of 8 elements of BLOCK_S chunks of one sample and walks down their rows, each a [ROWS, WIDTH] tile
as in `pixel_tile`. It keeps the values of a row in registers for the next row. The channels of the same rows are
neighbouring chunks: they share a mask.

Three tiles go together: (before, here, after), the pixels beside those of the tile. Where neighbouring pixels are
neighbouring elements, most of them lie in the same registers, one element further: then `before` and `after` are
[ROWS, 1], the elements beyond both ends of a row, and `behind` and `ahead` move the tile by one element. Else they
are tiles of their own. Either way they come from the cache: their lines were read for the tile.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .pixel_tile import pack_signs, region_weights, unpacked
from .plan import Mask, packed

# (elements of the call, rows of a chunk), groups of 8 in a tile. Reasoned, not tuned: no GPU has measured them yet.
CHUNKS = ((1 << 18, 2), (1 << 22, 4), (1 << 63, 8))
BLOCK = 64
# Total variation alone: there is no total that the terms would enter.
NO_WEIGHTS = (0.0, 0.0, 0.0)


class Tile(NamedTuple):
    """What the kernels are compiled for."""

    STEP: int  # elements from a pixel to the next one
    SHARED: int  # neighbours that share a mask value
    WHOLE: bool  # whether a row is whole groups of 8
    BLOCK_S: int
    BLOCK_G: int
    STEPS: int
    WIDTH: int
    REGION: str
    HOLE: bool  # whether the mask is 1 in the hole


class Plan(NamedTuple):
    """Work split of one call."""

    sizes: tuple[int, ...]  # `packed`: height, width, groups, channels, blocks, tiles
    tile: Tile
    programs: int
    warps: int


def make_plan(size: Any, channels_last: bool, mask: Mask, row: int, region: str, mask_is_hole: bool) -> Plan:
    """Work split of a call on images of `size`, in rows of `row` elements a thread."""
    return _plan(*size, channels_last, mask.kind == "interleaved", row, region, mask_is_hole)


@functools.lru_cache(maxsize=1024)
def _plan(
    n: int,
    c: int,
    h: int,
    w: int,
    channels_last: bool,
    interleaved: bool,
    row: int,
    region: str,
    mask_is_hole: bool,
) -> Plan:
    channels, width, step = (1, w * c, c) if channels_last else (c, w, 1)
    steps = next(rows for elements, rows in CHUNKS if n * c * h * w <= elements)
    groups = triton.cdiv(width, 8)
    # Evenly filled chunks: 9 rows are two of 5, not 8 and 1.
    steps = triton.cdiv(h, triton.cdiv(h, steps))
    chunks = channels * triton.cdiv(h, steps)
    block_g = min(BLOCK, triton.next_power_of_2(groups))
    block_s = min(BLOCK // block_g, triton.next_power_of_2(chunks))
    blocks, tiles = triton.cdiv(chunks, block_s), triton.cdiv(groups, block_g)
    # A pixel's neighbours are tiles of their own there: of 8 elements a thread would run out of registers.
    row = 4 if channels_last else row
    shared, whole = c if interleaved else 1, width % 8 == 0
    return Plan(
        sizes=packed((h, width, groups, channels, blocks, tiles)),
        tile=Tile(step, shared, whole, block_s, block_g, steps, row, region, mask_is_hole),
        programs=n * blocks * tiles,
        warps=max(1, block_s * block_g * 8 // row // 32),
    )


@triton.jit
def unpacked_sizes(sizes):
    height, width, groups = unpacked(sizes[0]), unpacked(sizes[1]), unpacked(sizes[2])
    return height, width, groups, unpacked(sizes[3]), unpacked(sizes[4]), unpacked(sizes[5])


@triton.jit
def tile_place(
    sizes,  # height, width, groups, channels, blocks, tiles
    stride_n,  # of the mask
    stride_c,
    TILE: tl.constexpr,
):
    """Where a program works: (number of the top row in its segment, of that row in all, group [ROWS, 1], place,
    mask offset, mask place).

    The row numbers are [ROWS, 1] where a tile holds several chunks; a chunk behind the last one begins below the
    image. place = (sample; start of the tile in its row; here and edge counted from there; which of (before, here,
    after), of the pixels still farther and of the ends of a thread's elements lie in the row). `before` is STEP
    elements before the edge, `after` is `after_edge` elements behind it. The mask offset is where the tile begins in
    the top row, mask place = (elements of a row, here, edge).
    """
    height, _, groups, channels, blocks, tiles = sizes
    STEP: tl.constexpr = TILE.STEP
    WIDTH: tl.constexpr = TILE.WIDTH
    SHARED: tl.constexpr = TILE.SHARED
    FOLD: tl.constexpr = 8 // WIDTH
    program = tl.program_id(0)
    chunk = program // tiles % blocks * TILE.BLOCK_S
    row = tl.arange(0, TILE.BLOCK_S * TILE.BLOCK_G * FOLD)[:, None]
    if TILE.BLOCK_S != 1:
        chunk += row // (TILE.BLOCK_G * FOLD)
        row = row % (TILE.BLOCK_G * FOLD)
    tile = (program % tiles).to(tl.int64)
    start = tile * (TILE.BLOCK_G * 8)
    group = tile * TILE.BLOCK_G + row // FOLD
    here = row * WIDTH + tl.arange(0, WIDTH)[None, :]
    edge = row * WIDTH if STEP == 1 else here
    if TILE.WHOLE:
        # One comparison for a whole group, which is how the compiler knows that it may be moved at once.
        inside = tl.broadcast_to(group < groups, here.shape)
    else:
        inside = in_row(here, start, sizes)
    AFTER: tl.constexpr = after_edge(STEP, STEP, WIDTH)
    beside = in_row(edge - STEP, start, sizes), inside, in_row(edge + AFTER, start, sizes)
    far = in_row(edge - 2 * STEP, start, sizes), in_row(edge + AFTER + STEP, start, sizes)
    ends = in_row(edge, start, sizes), in_row(edge + AFTER - STEP, start, sizes)
    sample = (program // tiles // blocks).to(tl.int64)
    place = sample, start, here, edge, beside, far, ends
    channel, top = (chunk % channels).to(tl.int64), chunk // channels * TILE.STEPS
    if SHARED != 1:
        first = start // SHARED
        here = ((start - first * SHARED).to(tl.int32) + here) // SHARED
        start, edge = first, here
    mask_stride = row_stride(sizes, SHARED, TILE.WHOLE)
    mask_offset = sample * stride_n + channel * stride_c + top * mask_stride + start
    top_row = (sample * channels + channel) * height + top
    return top, top_row, group, place, mask_offset, (mask_stride, here, edge)


@triton.constexpr_function
def after_edge(STEP, pixel, WIDTH):
    """Distance from the edge of a place to what comes after, where neighbouring pixels are `pixel` elements apart.

    A distance known to the compiler goes into the instruction: one address serves a row and all that is beside it.
    """
    return WIDTH if STEP == 1 else pixel


@triton.jit
def in_row(at, start, sizes):
    """Which places counted from `start` lie in the row."""
    # 2^30 is more than a tile is long: the comparisons are 32 bits wide whatever the size.
    first = -tl.minimum(start, 1 << 30).to(tl.int32)
    return (at >= first) & (at < tl.minimum(sizes[1] - start, 1 << 30).to(tl.int32))


@triton.jit
def row_stride(sizes, SHARED: tl.constexpr, WHOLE: tl.constexpr):
    """Elements of a row of the images, or of a mask whose values SHARED of them share."""
    if SHARED != 1:
        stride = (sizes[1] // SHARED).to(tl.int64)
    elif WHOLE:
        # Written as a multiple of 8, which is how the compiler knows that wide accesses are aligned.
        stride = sizes[2].to(tl.int64) * 8
    else:
        stride = sizes[1].to(tl.int64)
    return stride


@triton.jit
def _moved4(x, free, BACK: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 2, 2]))
    if BACK:
        first, _ = tl.split(odd)
        halves = tl.join(tl.join(free, first), even)
    else:
        _, last = tl.split(even)
        halves = tl.join(odd, tl.join(last, free))
    return tl.reshape(halves, [x.shape[0], 4])


@triton.jit
def _moved(x, free, BACK: tl.constexpr):
    """Each row of x [ROWS, WIDTH] moved by one element; `free` [ROWS, 1] takes the place that becomes free.

    Even and odd elements change places, their order apart: so the compiler moves nothing, it renames registers.
    """
    ROWS: tl.constexpr = x.shape[0]
    free = tl.reshape(free, [ROWS])
    if x.shape[1] == 4:
        moved = _moved4(x, free, BACK)
    else:
        even, odd = tl.split(tl.reshape(x, [ROWS, 4, 2]))
        if BACK:
            halves = tl.join(_moved4(odd, free, BACK), even)
        else:
            halves = tl.join(odd, _moved4(even, free, BACK))
        moved = tl.reshape(halves, [ROWS, 8])
    return moved


@triton.jit
def ahead(here, after, TILE: tl.constexpr):
    """The values of the pixels after those of the tile."""
    if TILE.STEP == 1:
        after = _moved(here, after, False)
    return after


@triton.jit
def behind(here, before, TILE: tl.constexpr):
    """The values of the pixels before those of the tile."""
    if TILE.STEP == 1:
        before = _moved(here, before, True)
    return before


@triton.jit
def load_mask(
    mask_ptr,  # where the tile begins in the top row, or None
    mask_place,
    place,
    number,  # of the row wanted, counted from the top one
    exists,
    TILE: tl.constexpr,
):
    """Mask values of (before, here, after) in float32; without a mask everything weighs 1.

    What a kernel does not use the compiler does not load.
    """
    before, here, after = 1.0, 1.0, 1.0
    if mask_ptr is not None:
        stride, at, edge = mask_place
        inside = place[4]
        PIXEL: tl.constexpr = TILE.STEP if TILE.SHARED == 1 else 1
        AFTER: tl.constexpr = after_edge(TILE.STEP, PIXEL, TILE.WIDTH)
        mask_ptr += number * stride
        before = tl.load(mask_ptr + edge - PIXEL, mask=inside[0] & exists, other=0).to(tl.float32)
        here = tl.load(mask_ptr + at, mask=inside[1] & exists, other=0).to(tl.float32)
        after = tl.load(mask_ptr + edge + AFTER, mask=inside[2] & exists, other=0).to(tl.float32)
    return before, here, after


@triton.jit
def wider(a, b, TILE: tl.constexpr):
    """Of two mask values the one that leaves more of a hole, for (before, here, after)."""
    if TILE.HOLE:
        value = tl.maximum(a[0], b[0]), tl.maximum(a[1], b[1]), tl.maximum(a[2], b[2])
    else:
        value = tl.minimum(a[0], b[0]), tl.minimum(a[1], b[1]), tl.minimum(a[2], b[2])
    return value


@triton.jit
def _load_bounded(mask_ptr, exists, TILE: tl.constexpr):
    """Mask values in float32; beyond the image the value that every hole is wider than."""
    value = tl.load(mask_ptr, mask=exists, other=0).to(tl.float32)
    return tl.where(exists, value, -float("inf") if TILE.HOLE else float("inf"))


@triton.jit
def reach(
    mask_ptr,  # where the tile begins in the top row
    mask_place,
    place,
    sizes,
    top,
    number,  # of the row wanted, counted from the top one
    TILE: tl.constexpr,
):
    """The widest of a pixel's mask value and those of its two neighbours in a row, for (before, here, after)."""
    PIXEL: tl.constexpr = TILE.STEP if TILE.SHARED == 1 else 1
    AFTER: tl.constexpr = after_edge(TILE.STEP, PIXEL, TILE.WIDTH)
    _, _, _, _, beside, far, ends = place
    stride, at, edge = mask_place
    exists = (top + number >= 0) & (top + number < sizes[0])
    here_ptr = mask_ptr + number * stride + at
    edge_ptr = mask_ptr + number * stride + edge
    before = _load_bounded(edge_ptr - PIXEL, beside[0] & exists, TILE)
    here = _load_bounded(here_ptr, beside[1] & exists, TILE)
    after = _load_bounded(edge_ptr + AFTER, beside[2] & exists, TILE)
    far_before = _load_bounded(edge_ptr - 2 * PIXEL, far[0] & exists, TILE)
    far_after = _load_bounded(edge_ptr + AFTER + PIXEL, far[1] & exists, TILE)
    first, last = here, here
    if TILE.STEP == 1:
        # The first and the last element of `here` once more: no single one can be taken out of a tile.
        first = _load_bounded(edge_ptr, ends[0] & exists, TILE)
        last = _load_bounded(edge_ptr + AFTER - 1, ends[1] & exists, TILE)
    lower = far_before, behind(here, before, TILE), last
    upper = first, ahead(here, after, TILE), far_after
    return wider(wider(lower, (before, here, after), TILE), upper, TILE)


@triton.jit
def region_values(value, exists, TILE: tl.constexpr):
    """The factors of a pair's weight from its first and from its second pixel; 0 beyond the image.

    value: of the mask, the widest around the pixel for a dilated region.
    """
    first = tl.where(exists, 1.0, 0.0)
    second = first
    if TILE.REGION != "image":
        hole, _ = region_weights(value, TILE.HOLE)
        first = tl.where(exists, hole, 0.0)
        if TILE.REGION != "first_pixel":
            second = first
    return first, second


@triton.jit
def load_image(images, offset, exists, weight, TILE: tl.constexpr):
    """(the image whose variation is wanted, pred - target); images = (pred, target), target None: no composite."""
    pred_ptr, target_ptr = images
    image = tl.load(pred_ptr + offset, mask=exists, other=0.0).to(tl.float32)
    d = image
    if target_ptr is not None:
        target = tl.load(target_ptr + offset, mask=exists, other=0.0).to(tl.float32)
        d = image - target
        hole, valid = region_weights(weight, TILE.HOLE)
        # Select, not only multiply: NaN and Inf under weight 0 do not count.
        known = valid * tl.where(valid != 0, target, 0.0)
        # Rounded alike wherever a pixel is formed, which a compiler need not do by itself: equal pixels stay equal.
        image = tl.fma(hole, tl.where(hole != 0, image, 0.0), known)
    return image, d


@triton.jit
def store_signs(signs_ptr, groups, d, exists):
    """Two planes of a row, see `ops/_pairs.py`; signs_ptr [ROWS, 1]: the group's byte in the first of them."""
    word = pack_signs(d, True).to(tl.int32)
    exists = exists & (tl.arange(0, d.shape[0])[:, None] % (8 // d.shape[1]) == 0)
    tl.store(signs_ptr, (word & 255).to(tl.uint8), mask=exists)
    tl.store(signs_ptr + groups, (word >> 8 & 255).to(tl.uint8), mask=exists)


@triton.jit
def load_signs(signs_ptr, groups, exists):
    """[ROWS, 1], the word of `pack_signs`."""
    positive = tl.load(signs_ptr, mask=exists, other=0).to(tl.int32)
    return positive | (tl.load(signs_ptr + groups, mask=exists, other=0).to(tl.int32) << 8)


@triton.jit
def load_signs_before(signs_ptr, group, groups, exists, TILE: tl.constexpr):
    """As `load_signs`, of the elements STEP before; group [ROWS, 1]: its number in the row."""
    STEP: tl.constexpr = TILE.STEP
    BACK: tl.constexpr = (STEP + 7) // 8
    LATE: tl.constexpr = BACK * 8 - STEP
    word = load_signs(signs_ptr - BACK, groups, exists & (group >= BACK))
    if LATE != 0:
        rest = load_signs(signs_ptr - (BACK - 1), groups, exists & (group >= BACK - 1))
        # In each of the two bytes: first the last 8 - LATE bits of one group, then LATE bits of the next.
        KEPT: tl.constexpr = 255 >> LATE
        word = (word >> LATE & (KEPT * 257)) | ((rest << (8 - LATE)) & ((255 - KEPT) * 257))
    return word
