"""Forward kernels of the pixel losses: the sums of every program or the map, then losses and scales."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .pixel_tile import (
    Pair,
    kernel_tensors,
    layer_place,
    load_weight,
    pack_signs,
    penalty_value,
    region_weights,
    step_start,
    tile_of,
    unpacked,
)


@triton.jit
def forward_layer(
    program,
    tensors,  # input, target, mask, signs; see `kernel_tensors`
    outs,  # map [samples, channels, length] or None; sums [regions, 1 or 2, programs of all layers]
    total,
    sizes,  # see `plan.Layer`
    param,
    PENALTY: tl.constexpr,
    HOLE: tl.constexpr,  # of two regions, whether the mask is 1 in the hole; None for one
    WEIGHTS: tl.constexpr,
    TILES: tl.constexpr,
    LAYER: tl.constexpr,
):
    TILE: tl.constexpr = tile_of(TILES, LAYER)
    MASK: tl.constexpr = TILE.MASK
    SHARED: tl.constexpr = TILE.SHARED
    STEPS: tl.constexpr = TILE.STEPS
    PREDICTIONS: tl.constexpr = TILE.PREDICTIONS
    input_ptr, target_ptr, mask_ptr, signs_ptr = tensors
    map_ptr, sums_ptr = outs
    counts, place, inner = layer_place(program, sizes, TILE)
    length, groups, channels, samples, stride_n, stride_c = counts
    mask = mask_ptr, stride_n, stride_c
    sample, first, tile = place
    rows, group, element, inside = inner
    row_c, row_p, row_inside = rows
    loss = tl.zeros(element.shape, tl.float32)
    loss_2 = tl.zeros(element.shape, tl.float32)
    weights = tl.zeros(element.shape, tl.float32)
    weights_2 = tl.zeros(element.shape, tl.float32)
    if SHARED and (MASK == "plane" or MASK == "interleaved"):
        weight = load_weight(mask, sample, first, tile, rows, inside, TILE)
    for step in tl.static_range(STEPS):
        channel = first + step * TILE.BLOCK_C
        _, start = step_start(length, groups, channels, sample, channel, tile, TILE)
        valid_c = row_c < channels - channel
        exists = inside & valid_c
        target = tl.load(target_ptr + start + element, mask=exists, other=0.0).to(tl.float32)
        for prediction in tl.static_range(PREDICTIONS):
            at = sample + prediction * samples
            if MASK != "none" and (not SHARED or (prediction == 0 and MASK == "channel")):
                weight = load_weight(mask, at, channel, tile, rows, exists, TILE)
            group_start, start = step_start(length, groups, channels, at, channel, tile, TILE)
            d = tl.load(input_ptr + start + element, mask=exists, other=0.0).to(tl.float32) - target
            value = penalty_value(d, PENALTY, param)
            counted = exists
            if MASK == "none":
                value = tl.where(exists, value, 0.0)
            elif HOLE is None:
                # Select, not only multiply: NaN and Inf under weight 0 do not count.
                counted = exists & (weight != 0)
                value = tl.where(counted, weight * value, 0.0)
                if WEIGHTS and (not SHARED or prediction == 0):
                    weights += tl.where(exists, weight, 0.0)
            else:
                # Every element lies in some region, and so has a sign.
                hole, valid = region_weights(weight, HOLE)
                loss_2 += tl.where(exists & (valid != 0), valid * value, 0.0)
                value = tl.where(exists & (hole != 0), hole * value, 0.0)
                if WEIGHTS and (not SHARED or prediction == 0):
                    weights += tl.where(exists, hole, 0.0)
                    weights_2 += tl.where(exists, valid, 0.0)
            loss += value
            if map_ptr is not None:
                tl.store(map_ptr + start + element, value, mask=exists)
            if signs_ptr is not None:
                tl.store(
                    signs_ptr + group_start + group,
                    pack_signs(d, counted),
                    mask=row_inside & valid_c & (row_p % (8 // TILE.WIDTH) == 0),
                )
    if map_ptr is None:
        TIMES: tl.constexpr = PREDICTIONS if SHARED else 1
        sums_ptr += tl.program_id(0)
        tl.store(sums_ptr, tl.sum(loss))
        if WEIGHTS:
            sums_ptr += total
            tl.store(sums_ptr, tl.sum(weights) * TIMES)
        if HOLE is not None:
            sums_ptr += total
            tl.store(sums_ptr, tl.sum(loss_2))
            if WEIGHTS:
                sums_ptr += total
                tl.store(sums_ptr, tl.sum(weights_2) * TIMES)


@triton.jit(do_not_specialize=["total"])
def forward_kernel(
    layers,  # the tensors of each, see `kernel_tensors`
    map_ptr,  # weighted penalties of the only layer instead of the sums, or None
    sums_ptr,  # [regions, 1 or 2, programs]: numerators, then summed weights if WEIGHTS; None for a map
    firsts,  # first program of each layer, see `plan.packed`
    sizes,  # of each layer, see `plan.Layer`
    total,
    param,  # of the penalty
    PENALTY: tl.constexpr,
    HOLE: tl.constexpr,  # of two regions, whether the mask is 1 in the hole; None for one
    WEIGHTS: tl.constexpr,
    TILES: tl.constexpr,  # of each layer, see `plan.Tile`
    LAYERS: tl.constexpr,
):
    program = tl.program_id(0)
    outs = map_ptr, sums_ptr
    for layer in tl.static_range(LAYERS):
        first = unpacked(firsts[layer])
        if (program >= first) & (program < unpacked(firsts[layer + 1])):
            at, tensors = program - first, layers[layer]
            forward_layer(at, tensors, outs, total, sizes[layer], param, PENALTY, HOLE, WEIGHTS, TILES, layer)


@triton.jit(do_not_specialize=["total", "means", "scale_rows"])
def finalize_kernel(
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
            tuple(map(kernel_tensors, pairs, layers, last)),
            outs[0] if is_map else None,
            sums,
            plan.packed(firsts),
            tuple(layer.sizes for layer in layers),
            firsts[-1],
            param,
            penalty,
            mask_is_hole,
            has_weights,
            tuple(layer.tile for layer in layers),
            len(layers),
            num_warps=layers[0].warps,
        )
        if sums is not None:
            numels = [p.input.numel() for p in pairs]
            launch_finalize(sums, outs, scale, firsts, numels, normalize, samples, weights, numbers)


def launch_finalize(
    sums: Tensor,  # [..., programs], see `finalize_kernel`
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
        rows, cols, warps = 1, 1024, 8
    finalize_kernel[(len(outs),)](
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
