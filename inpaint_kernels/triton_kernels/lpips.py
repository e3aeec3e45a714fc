"""Triton kernels of the LPIPS distance: channel columns, all layers in one launch, a branch for each.

    d_c = ra a_c - rb b_c, ra = 1 / (|a| + eps), 0 for a zero vector, rb likewise
    value[n] = sum over layers of scale[n] * the sum over pixels of m sum_c w_c d_c^2, scale = 1 / (the sum of m)
    grad_a_c = f (2 w_c ra d_c - ca a_c), grad_b_c = f (-2 w_c rb d_c - cb b_c), f = grad[n] scale[n] m

Saved for backward, 16 bytes a pixel and prediction: ra, rb, ca and cb, see `ops/lpips.py`.
Forward: a program owns BLOCK_P pixels of one target sample and goes over the k predictions. A column of up to MAX_C
channels stays in registers, so that every feature is read once, the target's for all predictions; a longer column is
read twice, the second time from the cache. Backward: tiles that need no sum over channels. Products are rounded
before they are subtracted (`enable_fp_fusion=False`): equal features differ by exactly 0.
Reductions: every program stores its sums, `value_kernel` adds them in float64 in a fixed order; no atomics.
Bytes an element of the target (float32, C channels): forward 4 + 4 k, and 16 k / C for what is saved; backward
4 + 4 k + 16 k / C read, and 4 written for each gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .lpips_tile import (
    Layer,
    factors,
    load_column,
    load_head,
    load_mask,
    load_scale,
    make_layers,
    place_of,
    squared_norms,
)
from .pixel_tile import tile_of, unpacked

# Elements of a tile and its warps, forward and backward. Reasoned, not measured: with 16 elements of each image a
# thread two programs fit on a multiprocessor, and 8 pixels of 512 channels are whole sectors of memory.
TILE, WARPS = 4096, 8
BACKWARD_TILE, BACKWARD_WARPS = 2048, 4


@triton.jit
def differences(a, b, ra, rb, weight):
    """[BLOCK_P, BLOCK_C] terms of the value and of the sums of weighted differences times a and b."""
    d = a * ra - b * rb
    weighted = weight * d
    return weighted * d, weighted * a, weighted * b


@triton.jit
def forward_layer(
    program,
    tensors,  # input [k N, C, P], target [N, C, P], weight [C], mask [1|N|kN, P] or None, saved [4, k N, P] or None
    sums_ptr,  # [programs of the layer, PREDICTIONS] from its first sum on
    sizes,  # see `Layer`
    eps,
    COLUMNS: tl.constexpr,
    LAYER: tl.constexpr,
):
    COLUMN: tl.constexpr = tile_of(COLUMNS, LAYER)
    C: tl.constexpr = COLUMN.C
    BLOCK_C: tl.constexpr = COLUMN.BLOCK_C
    PREDICTIONS: tl.constexpr = COLUMN.PREDICTIONS
    input_ptr, target_ptr, weight_ptr, mask_ptr, saved_ptr = tensors
    sample, begin, pixels, samples, stride_n = place_of(program, sizes, COLUMN)
    left = pixels - begin
    pixel = tl.arange(0, COLUMN.BLOCK_P)[:, None]
    offset = begin * (C if COLUMN.CHANNELS_LAST else 1)
    target_start = sample * C * pixels + offset
    squares, b = squared_norms(target_ptr, target_start, pixel, left, pixels, COLUMN)
    rb, norm_b = factors(squares, eps)
    weight = load_head(weight_ptr, 0, COLUMN)
    for prediction in tl.static_range(PREDICTIONS):
        at = sample + prediction * samples
        start = at * C * pixels + offset
        squares, a = squared_norms(input_ptr, start, pixel, left, pixels, COLUMN)
        ra, norm_a = factors(squares, eps)
        value, by_a, by_b = differences(a, b, ra, rb, weight)
        if C > BLOCK_C:
            value, by_a, by_b = differences(tl.zeros_like(a), tl.zeros_like(b), ra, rb, weight)
            for first in range(0, C, BLOCK_C):
                part_a, _, _ = load_column(input_ptr, start, pixel, left, first, pixels, COLUMN)
                part_b, _, _ = load_column(target_ptr, target_start, pixel, left, first, pixels, COLUMN)
                terms = differences(part_a, part_b, ra, rb, load_head(weight_ptr, first, COLUMN))
                value += terms[0]
                by_a += terms[1]
                by_b += terms[2]
        value = tl.sum(value, axis=1, keep_dims=True)
        counted = pixel < left
        if mask_ptr is not None:
            if prediction == 0 or not COLUMN.SHARED:
                mask = load_mask(mask_ptr + begin, sample, at, stride_n, pixel, left, COLUMN)
            # Select, not only multiply: NaN and Inf under weight 0 do not count.
            counted = mask != 0
            value = value * mask
        place = unpacked(sizes[4]).to(tl.int64) + program.to(tl.int64) * PREDICTIONS + prediction
        tl.store(sums_ptr + place, tl.sum(tl.where(counted, value, 0.0)))
        if saved_ptr is not None:
            plane = PREDICTIONS * samples * pixels
            saved = saved_ptr + at * pixels + begin + pixel
            # In this order: of short or long vectors r^2 / |a| alone is beyond float32.
            ca = tl.div_rn(2 * tl.sum(by_a, axis=1, keep_dims=True) * ra * ra, norm_a)
            cb = tl.div_rn(-2 * tl.sum(by_b, axis=1, keep_dims=True) * rb * rb, norm_b)
            tl.store(saved, tl.where(counted, ra, 0.0), mask=pixel < left)
            tl.store(saved + plane, tl.where(counted, rb, 0.0), mask=pixel < left)
            tl.store(saved + 2 * plane, tl.where(counted, ca, 0.0), mask=pixel < left)
            tl.store(saved + 3 * plane, tl.where(counted, cb, 0.0), mask=pixel < left)


@triton.jit(do_not_specialize=["eps"])
def forward_kernel(
    layers,  # tensors of each, see `forward_layer`
    sums_ptr,  # [programs, PREDICTIONS] of each layer
    firsts,  # first program of each layer, see `plan.packed`
    sizes,  # of each layer, see `Layer`
    eps,
    COLUMNS: tl.constexpr,  # of each layer
    LAYERS: tl.constexpr,
):
    program = tl.program_id(0)
    for layer in tl.static_range(LAYERS):
        first = unpacked(firsts[layer])
        if (program >= first) & (program < unpacked(firsts[layer + 1])):
            at, tensors = program - first, layers[layer]
            forward_layer(at, tensors, sums_ptr, sizes[layer], eps, COLUMNS, layer)


@triton.jit
def layer_value(
    at, sums_ptr, scale_ptr, sizes, COLUMNS: tl.constexpr, LAYER: tl.constexpr, BLOCK: tl.constexpr
):
    """[1] in float64 of sample `at`."""
    COLUMN: tl.constexpr = tile_of(COLUMNS, LAYER)
    tiles, samples = unpacked(sizes[1]), unpacked(sizes[2])
    lane = tl.arange(0, BLOCK)
    begin = (at % samples * tiles).to(tl.int64) * COLUMN.PREDICTIONS + at // samples
    sums_ptr += begin + unpacked(sizes[4])
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, tiles, BLOCK):
        place = (first + lane).to(tl.int64) * COLUMN.PREDICTIONS
        total += tl.load(sums_ptr + place, mask=first + lane < tiles, other=0.0).to(tl.float64)
    scale = load_scale(scale_ptr, LAYER * tl.num_programs(0) + at, sizes, COLUMN)
    return tl.sum(total, axis=0, keep_dims=True) * scale.to(tl.float64)


@triton.jit
def value_kernel(
    sums_ptr,  # [programs, PREDICTIONS] of each layer
    values_ptr,  # [k N]
    scale_ptr,  # [layers, k N] or None
    sizes,  # of each layer, see `Layer`
    COLUMNS: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the sums of one sample (program) and its layers."""
    at = tl.program_id(0)
    value = tl.zeros([1], tl.float64)
    for layer in tl.static_range(LAYERS):
        value += layer_value(at, sums_ptr, scale_ptr, sizes[layer], COLUMNS, layer, BLOCK)
    tl.store(values_ptr + at + tl.arange(0, 1), value.to(tl.float32))


@triton.jit
def layer_weight(at, mask_ptr, sizes, COLUMNS: tl.constexpr, LAYER: tl.constexpr, BLOCK: tl.constexpr):
    """[1] in float64: the sum of the mask of sample `at`."""
    COLUMN: tl.constexpr = tile_of(COLUMNS, LAYER)
    pixels = unpacked(sizes[0]) * COLUMN.UNIT
    sample = at % unpacked(sizes[2]) if COLUMN.SHARED else at
    lane = tl.arange(0, BLOCK)
    mask_ptr += sample.to(tl.int64) * unpacked(sizes[3])
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, pixels, BLOCK):
        total += tl.load(mask_ptr + first + lane, mask=first + lane < pixels, other=0).to(tl.float64)
    return tl.sum(total, axis=0, keep_dims=True)


@triton.jit
def scale_kernel(
    masks,  # [1|N|kN, P] of each layer
    scale_ptr,  # [layers, k N]
    sizes,  # of each layer, see `Layer`
    COLUMNS: tl.constexpr,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """1 / (the sum of the mask) of one sample (program) in every layer."""
    at = tl.program_id(0)
    for layer in tl.static_range(LAYERS):
        weight = layer_weight(at, masks[layer], sizes[layer], COLUMNS, layer, BLOCK)
        # An empty mask means value 0 and gradient 0, never 1 / 0.
        scale = tl.where(weight == 0, 0.0, 1.0 / tl.where(weight == 0, 1.0, weight))
        tl.store(scale_ptr + layer * tl.num_programs(0) + at + tl.arange(0, 1), scale.to(tl.float32))


@triton.jit
def backward_layer(
    program,
    tensors,  # as in `forward_layer`, then the gradients of input and target, or None
    grad_ptr,  # [k N]
    scale_ptr,  # [layers, k N] or None
    sizes,
    COLUMNS: tl.constexpr,
    LAYER: tl.constexpr,
):
    COLUMN: tl.constexpr = tile_of(COLUMNS, LAYER)
    C: tl.constexpr = COLUMN.C
    PREDICTIONS: tl.constexpr = COLUMN.PREDICTIONS
    CHUNKS: tl.constexpr = (C + COLUMN.BLOCK_C - 1) // COLUMN.BLOCK_C
    input_ptr, target_ptr, weight_ptr, mask_ptr, saved_ptr, grad_input_ptr, grad_target_ptr = tensors
    # Chunks of channels change fastest: they share the factors of a pixel.
    sample, begin, pixels, samples, stride_n = place_of(program // CHUNKS, sizes, COLUMN)
    first = program % CHUNKS * COLUMN.BLOCK_C
    left = pixels - begin
    pixel = tl.arange(0, COLUMN.BLOCK_P)[:, None]
    offset = begin * (C if COLUMN.CHANNELS_LAST else 1)
    target_start = sample * C * pixels + offset
    b, target_place, inside = load_column(target_ptr, target_start, pixel, left, first, pixels, COLUMN)
    weight = 2 * load_head(weight_ptr, first, COLUMN)
    total = tl.zeros_like(b)
    plane = PREDICTIONS * samples * pixels
    for prediction in tl.static_range(PREDICTIONS):
        at = sample + prediction * samples
        a, place, _ = load_column(input_ptr, at * C * pixels + offset, pixel, left, first, pixels, COLUMN)
        saved = saved_ptr + at * pixels + begin + pixel
        ra = tl.load(saved, mask=pixel < left, other=0.0)
        rb = tl.load(saved + plane, mask=pixel < left, other=0.0)
        ca = tl.load(saved + 2 * plane, mask=pixel < left, other=0.0)
        cb = tl.load(saved + 3 * plane, mask=pixel < left, other=0.0)
        row = LAYER * PREDICTIONS * samples
        f = tl.load(grad_ptr + at) * load_scale(scale_ptr, row + at, sizes, COLUMN)
        counted = pixel < left
        if mask_ptr is not None:
            if prediction == 0 or not COLUMN.SHARED:
                mask = load_mask(mask_ptr + begin, sample, at, stride_n, pixel, left, COLUMN)
            f = f * mask
            # Select, not only multiply: NaN and Inf under weight 0 do not count.
            counted = mask != 0
        weighted = weight * (a * ra - b * rb)
        if grad_input_ptr is not None:
            value = tl.where(counted, f * (ra * weighted - ca * a), 0.0)
            tl.store(grad_input_ptr + place, value.to(grad_input_ptr.dtype.element_ty), mask=inside)
        if grad_target_ptr is not None:
            total += tl.where(counted, f * (-rb * weighted - cb * b), 0.0)
    if grad_target_ptr is not None:
        tl.store(grad_target_ptr + target_place, total.to(grad_target_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    layers,  # tensors of each, see `backward_layer`
    grad_ptr,  # [k N]
    scale_ptr,  # [layers, k N] or None
    firsts,  # first program of each layer, see `plan.packed`
    sizes,  # of each layer, see `Layer`
    COLUMNS: tl.constexpr,  # of each layer
    LAYERS: tl.constexpr,
):
    program = tl.program_id(0)
    for layer in tl.static_range(LAYERS):
        first = unpacked(firsts[layer])
        if (program >= first) & (program < unpacked(firsts[layer + 1])):
            at, tensors = program - first, layers[layer]
            backward_layer(at, tensors, grad_ptr, scale_ptr, sizes[layer], COLUMNS, layer)


def _launch_scale(layers: Sequence[Layer], samples: int, like: Tensor) -> Tensor | None:
    """[layers, k N]: factor of the sums of each sample; None for the mean over pixels."""
    if layers[0].tensors[3] is None:
        return None
    scale = torch.empty((len(layers), samples), dtype=torch.float32, device=like.device)
    scale_kernel[(samples,)](
        tuple(layer.tensors[3] for layer in layers),
        scale,
        tuple(layer.sizes for layer in layers),
        tuple(layer.column for layer in layers),
        len(layers),
        1024,
        num_warps=4,
    )
    return scale


def forward(
    input: list[Tensor],  # [k N, C, H, W] of each layer
    target: list[Tensor],  # [N, C, H, W]
    weights: list[Tensor],  # [C]
    mask: list[Tensor],  # [H, W] or [1|N|kN, 1, H, W] of each layer, or nothing
    eps: float,
    save: bool,
) -> tuple[Tensor, list[Tensor]]:
    """(values, saved) of `ops/lpips.py`."""
    samples, device = input[0].shape[0], input[0].device
    values = torch.empty(samples, dtype=torch.float32, device=device)
    saved = [
        torch.empty((4, samples, *x.shape[2:]) if save else (0,), dtype=torch.float32, device=device)
        for x in input
    ]
    filled = [i for i, x in enumerate(input) if x.numel()]
    if len(filled) < len(input):
        # An empty layer adds nothing.
        values.zero_()
        if filled:
            x, y, w, m = ([part[i] for i in filled if part] for part in (input, target, weights, mask))
            values, found = forward(x, y, w, m, eps, save)
            for i, planes in zip(filled, found, strict=True):
                saved[i] = planes
        return values, saved
    layers = make_layers(input, target, weights, mask, TILE, True)
    firsts = (0, *accumulate(layer.programs for layer in layers))
    columns = tuple(layer.column for layer in layers)
    sizes = tuple(layer.sizes for layer in layers)
    with plan.on_device(values):
        scale = _launch_scale(layers, samples, values)
        count = sum(layer.programs * layer.column.PREDICTIONS for layer in layers)
        sums = torch.empty(count, dtype=torch.float32, device=device)
        forward_kernel[(firsts[-1],)](
            tuple((*layer.tensors, s if save else None) for layer, s in zip(layers, saved, strict=True)),
            sums,
            plan.packed(firsts),
            sizes,
            eps,
            columns,
            len(layers),
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        value_kernel[(samples,)](sums, values, scale, sizes, columns, len(layers), 256, num_warps=1)
    return values, saved


def backward(
    grad: Tensor,  # [k N]
    input: list[Tensor],  # [k N, C, H, W] of each layer
    target: list[Tensor],  # [N, C, H, W]
    weights: list[Tensor],  # [C]
    mask: list[Tensor],  # [H, W] or [1|N|kN, 1, H, W] of each layer, or nothing
    saved: list[Tensor],  # [4, k N, H, W]
    wanted: list[int],
) -> list[Tensor]:
    """Of each layer the gradient of its input (bit 1 of `wanted`), then of its target (bit 2)."""
    samples = input[0].shape[0]
    filled = [i for i, x in enumerate(input) if x.numel()]
    if len(filled) < len(input):
        parts = (input, target, weights, mask, saved)
        of_input, of_target, w, m, kept = ([part[i] for i in filled if part] for part in parts)
        flagged = [wanted[i] for i in filled]
        gradients = iter(backward(grad, of_input, of_target, w, m, kept, flagged) if filled else ())
        return [
            next(gradients) if x.numel() else torch.zeros_like(maps)
            for x, y, flags in zip(input, target, wanted, strict=True)
            for maps, bit in ((x, 1), (y, 2))
            if flags & bit
        ]
    layers = make_layers(input, target, weights, mask, BACKWARD_TILE, False)
    grads = [
        plan.empty_image(maps, maps.shape, layer.column.CHANNELS_LAST, maps.dtype) if flags & bit else None
        for layer, x, y, flags in zip(layers, input, target, wanted, strict=True)
        for maps, bit in ((x, 1), (y, 2))
    ]
    chunks = [triton.cdiv(layer.column.C, layer.column.BLOCK_C) for layer in layers]
    firsts = (0, *accumulate(layer.programs * n for layer, n in zip(layers, chunks, strict=True)))
    with plan.on_device(grad):
        scale = _launch_scale(layers, samples, grad)
        backward_kernel[(firsts[-1],)](
            tuple(
                (*layer.tensors, s, *pair)
                for layer, s, *pair in zip(layers, saved, grads[::2], grads[1::2], strict=True)
            ),
            grad.contiguous(),
            scale,
            plan.packed(firsts),
            tuple(layer.sizes for layer in layers),
            tuple(layer.column for layer in layers),
            len(layers),
            num_warps=BACKWARD_WARPS,
            enable_fp_fusion=False,
        )
    # A target in the other layout than its input gets its gradient in its own.
    own = [plan.is_channels_last(x) for pair in zip(input, target, strict=True) for x in pair]
    return [plan.in_layout(g, last) for g, last in zip(grads, own, strict=True) if g is not None]
