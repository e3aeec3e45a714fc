"""Triton kernels of the feature distance, all layers in one launch.

    d = input[j N + n] - target[n];  S_l = sum w * penalty(d) over layer l (w == 0 selects the element away)
    loss = sum over layers of scale_l * S_l, scale_l = weight_l / D_l;  grad_input = grad * scale_l * w * penalty'(d)

Saved for backward: l1 keeps 2 sign bits an element of the input, the other penalties re-read input and target.
Forward: a program owns a tile of one target sample of one layer and goes over its k predictions, so that target and
shared mask are read once; one small launch adds the sums up, layer by layer in a fixed order. Backward: one pass.
Every layer is a branch of its own, compiled for its dtypes, mask and tile; a program takes the branch of its layer.
Bytes an element of the target (float32, k predictions): forward 4 + 4 k, and k/4 for the signs; l1 backward k/4 read
and 4 k written. Tiles and addressing: `pixel.py`.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .pixel import (
    apply_signs,
    load_weight,
    pack_signs,
    penalty_grad,
    penalty_value,
    step_start,
    tile_rows,
    unpacked,
)

# The dtypes of `ops/_checks.py`, by their index.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@triton.jit
def tile_place(program, tiles, chunks, BLOCK_C: tl.constexpr, STEPS: tl.constexpr):
    """Sample of the target, first channel and tile of a layer's program; chunks change fastest."""
    chunk = program % chunks
    tile = (program // chunks) % tiles
    sample = program // chunks // tiles
    return sample.to(tl.int64), chunk.to(tl.int64) * (STEPS * BLOCK_C), tile.to(tl.int64)


@triton.jit
def forward_layer(
    program,
    input_ptr,  # [COPIES * samples, channels, length]
    target_ptr,  # [samples, channels, length]
    mask_ptr,  # see `load_weight`; None for MASK "none"
    signs_ptr,  # [COPIES * samples, channels, groups] int16, or None
    sizes,  # see `plan.Layer`
    param,
    PENALTY: tl.constexpr,
    TILES: tl.constexpr,
    LAYER: tl.constexpr,
):
    """(sum of the weighted penalties, sum of the weights) of one tile of all predictions."""
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
    length, groups, channels = unpacked(sizes[0]), unpacked(sizes[1]), unpacked(sizes[2])
    tiles, chunks, samples = unpacked(sizes[3]), unpacked(sizes[4]), unpacked(sizes[5])
    # Written as multiples of UNIT, which is how the compiler knows that wide loads are aligned.
    stride_n, stride_c = unpacked(sizes[6]).to(tl.int64) * UNIT, unpacked(sizes[7]).to(tl.int64) * UNIT
    sample, first, tile = tile_place(program, tiles, chunks, BLOCK_C, STEPS)
    rows, group, element, inside = tile_rows(length, groups, tile, WHOLE, BLOCK_C, BLOCK_G, WIDTH)
    row_c, row_p, row_inside = rows
    loss_sum = tl.zeros(element.shape, tl.float32)
    weight_sum = tl.zeros(element.shape, tl.float32)
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
            if MASK != "none" and (not SHARED or copy == 0):
                weight_sum += tl.where(exists, weight, 0.0)
            group_start, start = step_start(length, groups, channels, at, channel, tile, WHOLE, BLOCK_G)
            d = tl.load(input_ptr + start + element, mask=exists, other=0.0).to(tl.float32) - target
            value = penalty_value(d, PENALTY, param)
            if MASK == "none":
                counted = exists
                loss_sum += tl.where(exists, value, 0.0)
            else:
                # Select, not only multiply: NaN and Inf under weight 0 do not count.
                counted = exists & (weight != 0)
                loss_sum += tl.where(counted, weight * value, 0.0)
            if signs_ptr is not None:
                tl.store(
                    signs_ptr + group_start + group,
                    pack_signs(d, counted),
                    mask=row_inside & valid_c & (row_p % (8 // WIDTH) == 0),
                )
    return tl.sum(loss_sum), tl.sum(weight_sum) * (COPIES if SHARED else 1)


@triton.jit(do_not_specialize=["total"])
def forward_kernel(
    inputs,  # of each layer
    targets,
    masks,
    signs,
    sums_ptr,  # [2, programs]
    firsts,  # first program of each layer, see `plan.packed`
    sizes,  # of each layer, see `plan.Layer`
    total,
    param,
    PENALTY: tl.constexpr,
    TILES: tl.constexpr,  # 10 of each layer, see `plan.Layer`
    LAYERS: tl.constexpr,
):
    program = tl.program_id(0)
    for layer in tl.static_range(LAYERS):
        first = unpacked(firsts[layer])
        if (program >= first) & (program < unpacked(firsts[layer + 1])):
            loss, weight = forward_layer(
                program - first,
                inputs[layer],
                targets[layer],
                masks[layer],
                signs[layer],
                sizes[layer],
                param,
                PENALTY,
                TILES,
                layer,
            )
            tl.store(sums_ptr + program, loss)
            tl.store(sums_ptr + total + program, weight)


@triton.jit(do_not_specialize=["total"])
def finalise_kernel(
    sums_ptr,  # [2, programs]
    loss_ptr,  # []
    scale_ptr,  # [L]
    firsts,  # first program of each layer, see `plan.packed`
    counts,  # elements of each layer, likewise
    weights,
    total,
    COUNT: tl.constexpr,  # whether D_l is the number of elements, not the summed mask
    NUMBERS: tl.constexpr,
    LAYERS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Adds the sums of every layer; writes the loss and d loss / d S_l."""
    col = tl.arange(0, COLS)
    loss = tl.full([], 0.0, tl.float64)
    for layer in tl.static_range(LAYERS):
        numerator = tl.zeros([COLS], tl.float64)
        weight = tl.zeros([COLS], tl.float64)
        end = unpacked(firsts[layer + 1])
        for first in range(unpacked(firsts[layer]), end, COLS):
            inside = first + col < end
            numerator += tl.load(sums_ptr + first + col, mask=inside, other=0.0).to(tl.float64)
            if not COUNT:
                weight += tl.load(sums_ptr + total + first + col, mask=inside, other=0.0).to(tl.float64)
        if COUNT:
            denominator = unpacked(counts[layer]).to(tl.float64)
        else:
            denominator = tl.sum(weight)
        scale = tl.where(denominator == 0, 0.0, weights[layer] / tl.where(denominator == 0, 1.0, denominator))
        loss += tl.sum(numerator) * scale
        tl.store(scale_ptr + NUMBERS[layer], scale.to(tl.float32))
    tl.store(loss_ptr, loss.to(tl.float32))


@triton.jit
def backward_layer(
    program,
    coefficient,
    signs_ptr,  # [COPIES * samples, channels, groups] int16 for l1, else None
    mask_ptr,  # see `load_weight`; None for MASK "none"
    input_ptr,  # [COPIES * samples, channels, length], None for l1
    target_ptr,  # [samples, channels, length], None for l1
    grad_ptr,  # [COPIES * samples, channels, length]
    sizes,  # see `plan.Layer`
    param,
    PENALTY: tl.constexpr,
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
    length, groups, channels = unpacked(sizes[0]), unpacked(sizes[1]), unpacked(sizes[2])
    tiles, chunks, samples = unpacked(sizes[3]), unpacked(sizes[4]), unpacked(sizes[5])
    # Written as multiples of UNIT, which is how the compiler knows that wide loads are aligned.
    stride_n, stride_c = unpacked(sizes[6]).to(tl.int64) * UNIT, unpacked(sizes[7]).to(tl.int64) * UNIT
    sample, first, tile = tile_place(program, tiles, chunks, BLOCK_C, STEPS)
    rows, group, element, inside = tile_rows(length, groups, tile, WHOLE, BLOCK_C, BLOCK_G, WIDTH)
    row_c, _, row_inside = rows
    if SHARED and (MASK == "plane" or MASK == "interleaved"):
        weight = load_weight(
            mask_ptr, stride_n, stride_c, sample, first, tile, rows, inside, MASK, CHANNELS, BLOCK_G
        )
    for step in tl.static_range(STEPS):
        channel = first + step * BLOCK_C
        valid_c = row_c < channels - channel
        exists = inside & valid_c
        if PENALTY != "l1":
            _, start = step_start(length, groups, channels, sample, channel, tile, WHOLE, BLOCK_G)
            target = tl.load(target_ptr + start + element, mask=exists, other=0.0).to(tl.float32)
        for copy in tl.static_range(COPIES):
            at = sample + copy * samples
            group_start, start = step_start(length, groups, channels, at, channel, tile, WHOLE, BLOCK_G)
            if MASK != "none" and (not SHARED or (copy == 0 and MASK == "channel")):
                weight = load_weight(
                    mask_ptr, stride_n, stride_c, at, channel, tile, rows, exists, MASK, CHANNELS, BLOCK_G
                )
            value = tl.zeros(element.shape, tl.float32) + coefficient
            if MASK != "none":
                value *= weight
            if PENALTY == "l1":
                word = tl.load(signs_ptr + group_start + group, mask=row_inside & valid_c, other=0)
                value = apply_signs(word, value)
            else:
                d = tl.load(input_ptr + start + element, mask=exists, other=0.0).to(tl.float32) - target
                value *= penalty_grad(d, PENALTY, param)
                if MASK != "none":
                    value = tl.where(weight != 0, value, 0.0)
            tl.store(grad_ptr + start + element, value.to(grad_ptr.dtype.element_ty), mask=exists)


@triton.jit
def backward_kernel(
    grad_ptr,  # []
    scale_ptr,  # [L]
    signs,  # of each layer
    masks,
    inputs,
    targets,
    grads,
    firsts,  # first program of each layer, see `plan.packed`
    sizes,  # of each layer, see `plan.Layer`
    param,
    PENALTY: tl.constexpr,
    TILES: tl.constexpr,  # 10 of each layer, see `plan.Layer`
    NUMBERS: tl.constexpr,
    LAYERS: tl.constexpr,
):
    program = tl.program_id(0)
    coefficient = tl.load(grad_ptr).to(tl.float32)
    for layer in tl.static_range(LAYERS):
        first = unpacked(firsts[layer])
        if (program >= first) & (program < unpacked(firsts[layer + 1])):
            backward_layer(
                program - first,
                coefficient * tl.load(scale_ptr + NUMBERS[layer]),
                signs[layer],
                masks[layer],
                inputs[layer],
                targets[layer],
                grads[layer],
                sizes[layer],
                param,
                PENALTY,
                TILES,
                layer,
            )


def forward(
    input: list[Tensor],  # [k N, C, H, W] of each layer
    target: list[Tensor],  # [N, C, H, W]
    mask: list[Tensor],  # [H, W] or [1|N|kN, 1|C, H, W] of each layer, or nothing
    weights: list[float],
    penalty: str,
    param: float,
    normalize: str,
    save_signs: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(loss, scale, signs) of `ops/feature_distance.py`."""
    device = input[0].device
    channels_last = [plan.is_channels_last(x) for x in input]
    signs = [
        plan.empty_signs(x, x.shape, last) if save_signs else plan.no_signs(x)
        for x, last in zip(input, channels_last, strict=True)
    ]
    used = [i for i, x in enumerate(input) if x.numel()]
    if not used:
        zero = torch.zeros((), dtype=torch.float32, device=device)
        return zero, torch.zeros(len(input), dtype=torch.float32, device=device), signs
    loss = torch.empty((), dtype=torch.float32, device=device)
    make = torch.empty if len(used) == len(input) else torch.zeros
    scale = make(len(input), dtype=torch.float32, device=device)
    images = [plan.in_layout(input[i], channels_last[i]) for i in used]
    goals = [plan.in_layout(target[i], channels_last[i]) for i in used]
    elements = max(goal.numel() for goal in goals)
    layers = [
        plan.make_layer(
            x.shape,
            y.shape[0],
            channels_last[i],
            mask[i] if mask else None,
            save_signs,
            plan.loads_width(x, y),
            elements,
        )
        for i, x, y in zip(used, images, goals, strict=True)
    ]
    firsts = (0, *accumulate(layer.programs for layer in layers))
    programs = firsts[-1]
    with plan.on_device(input[0]):
        sums = torch.empty(2 * programs, dtype=torch.float32, device=device)
        forward_kernel[(programs,)](
            tuple(images),
            tuple(goals),
            tuple(layer.mask for layer in layers),
            tuple(signs[i].view(torch.int16) if save_signs else None for i in used),
            sums,
            plan.packed(firsts),
            tuple(layer.sizes for layer in layers),
            programs,
            param,
            penalty,
            tuple(value for layer in layers for value in layer.tile),
            len(layers),
            num_warps=layers[0].warps,
        )
        finalise_kernel[(1,)](
            sums,
            loss,
            scale,
            plan.packed(firsts),
            plan.packed([x.numel() for x in images]),
            tuple(weights[i] for i in used),
            programs,
            normalize == "image" or not mask,
            tuple(used),
            len(layers),
            1024 if programs <= 1024 * len(layers) else 4096,
            num_warps=4 if programs <= 1024 * len(layers) else 16,
        )
    return loss, scale, signs


def backward(
    grad: Tensor,  # []
    scale: Tensor,  # [L]
    signs: list[Tensor],  # uint8 of each layer, l1 only
    mask: list[Tensor],  # [H, W] or [1|N|kN, 1|C, H, W] of each layer, or nothing
    input: list[Tensor],  # [k N, C, H, W] of each layer, not l1
    target: list[Tensor],  # [N, C, H, W] of each layer, not l1
    sizes: list[int],  # k N, C, H, W, N of each layer
    channels_last: list[int],
    dtypes: list[int],  # index into DTYPES
    penalty: str,
    param: float,
) -> list[Tensor]:
    """Gradient of each layer's input, of `ops/feature_distance.py`."""
    count = len(dtypes)
    shapes = [sizes[5 * i : 5 * i + 4] for i in range(count)]
    grads = [
        plan.empty_image(grad, shapes[i], bool(channels_last[i]), DTYPES[dtypes[i]]) for i in range(count)
    ]
    used = [i for i in range(count) if grads[i].numel()]
    if not used:
        return grads
    l1 = penalty == "l1"
    elements = max(grads[i].numel() // shapes[i][0] * sizes[5 * i + 4] for i in used)
    layers = [
        plan.make_layer(
            shapes[i],
            sizes[5 * i + 4],
            bool(channels_last[i]),
            # A 0/1 mask adds nothing to the signs, which are 0 where it is 0.
            None if not mask or (l1 and mask[i].dtype == torch.bool) else mask[i],
            l1,
            plan.stores_width(grads[i]),
            elements,
        )
        for i in used
    ]
    firsts = (0, *accumulate(layer.programs for layer in layers))
    with plan.on_device(grad):
        backward_kernel[(firsts[-1],)](
            grad,
            scale,
            tuple(signs[i].view(torch.int16) if l1 else None for i in used),
            tuple(layer.mask for layer in layers),
            tuple(None if l1 else plan.in_layout(input[i], bool(channels_last[i])) for i in used),
            tuple(None if l1 else plan.in_layout(target[i], bool(channels_last[i])) for i in used),
            tuple(grads[i] for i in used),
            plan.packed(firsts),
            tuple(layer.sizes for layer in layers),
            param,
            penalty,
            tuple(value for layer in layers for value in layer.tile),
            tuple(used),
            len(layers),
            num_warps=layers[0].warps,
        )
    return grads
