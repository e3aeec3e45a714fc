"""Triton kernels of SSIM: a program marches down a strip of columns.

Of s = a + b and d = a - b, with E the mean over a window (of what the mask counts) and V_s = E[s^2] - E[s]^2:
    l = (E[s]^2 - E[d]^2 + 2 C1) / (E[s]^2 + E[d]^2 + 2 C1), cs = (V_s - V_d + 2 C2) / (V_s + V_d + 2 C2)
    grad_a = grad_s + grad_d, grad_b = grad_s - grad_d with grad_s = m (W g_s + 2 s W g_ss), grad_d likewise
g_s, g_d, g_ss and g_dd are the gradients by a window's sums, W the sum over the windows that a pixel lies in. Equal
images have d = 0, and so exactly l = cs = 1 and gradient 0. Variances and their gradients are those of shifted s and
d.

A row of the four maps is summed along the row as it is read: a number is loaded once for each of its windows, all but
once from the first-level cache. Down the columns a row is added to the sums of the windows it lies in, SIZE - 1 of
each map in registers, and completes one of them. Nothing passes between threads, and no row is read twice but those
where strips overlap. Channels of a channels_last pixel stand side by side.
Saved for backward: nothing but the inputs. The backward forms the windows anew and writes the four g, 16 bytes a
window, to memory that is free again when a second kernel has summed them in the same way.
Reductions: every program stores its sums, `mean_kernel` adds them in float64 in a fixed order; no atomics.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan
from .pixel_tile import unpacked
from .ssim_tile import (
    add_row,
    image_row,
    make_images,
    map_row,
    mask_place_of,
    no_sum,
    no_sums,
    offset_of,
    place_of,
    shift_of,
    statistics,
)


@triton.jit(do_not_specialize=["c1", "c2", "limit"])
def window_kernel(
    pred_ptr,  # [N, C, H, W], NCHW or channels_last
    target_ptr,  # [N, C, H, W]
    mask_ptr,  # [H, W] or [1|N, 1|C, H, W], or None
    sums_ptr,  # [kinds, programs, BLOCK_C], see `mean_kernel`; None in the backward
    maps_ptr,  # [4, N, C, windows down, windows along], the g of s, d, s^2, d^2; None in the forward
    grads,  # [N, C] of similarity and of contrast, or None; maps only
    scale_ptr,  # [N C + 1]; maps only
    sizes,  # see `Images`
    window,  # SIZE weights
    c1,
    c2,
    limit,  # see `shift_of`
    CONTRAST: tl.constexpr,
    L1: tl.constexpr,
    WINDOW: tl.constexpr,
):
    LAST: tl.constexpr = WINDOW.SIZE - 1
    CENTRE: tl.constexpr = WINDOW.SIZE // 2 - WINDOW.PAD
    height, width = unpacked(sizes[0]), unpacked(sizes[1])
    out_height, out_width, planes = unpacked(sizes[2]), unpacked(sizes[3]), unpacked(sizes[4])
    plane, column, exists, first, end = place_of(sizes, WINDOW)
    image = offset_of(plane, column, height, width, sizes, WINDOW)
    stride = width.to(tl.int64) * WINDOW.STEP
    shift = shift_of(pred_ptr, target_ptr, mask_ptr, plane, limit, sizes, WINDOW)
    mask_step = 0
    if mask_ptr is not None:
        mask_offset, mask_step, mask_stride = mask_place_of(plane, column, width, sizes, WINDOW)
        mask_ptr += mask_offset
        m_sums = no_sums(WINDOW)
    if maps_ptr is not None:
        scale = tl.load(scale_ptr + plane, mask=plane < planes, other=0.0)
        by_similarity, by_contrast = tl.zeros_like(scale), tl.zeros_like(scale)
        if grads[0] is not None:
            by_similarity = scale * tl.load(grads[0] + plane, mask=plane < planes, other=0.0)
        if grads[1] is not None:
            by_contrast = scale * tl.load(grads[1] + plane, mask=plane < planes, other=0.0)
        maps_ptr += offset_of(plane, column, out_height, out_width, sizes, WINDOW)
        map_size = planes.to(tl.int64) * out_height * out_width
    zero = no_sum(WINDOW)
    similarity, contrast, l1, weights, l1_weights = zero, zero, zero, zero, zero
    s_sums, d_sums, ss_sums, dd_sums = no_sums(WINDOW), no_sums(WINDOW), no_sums(WINDOW), no_sums(WINDOW)
    for row in range(first - WINDOW.PAD, end + LAST - WINDOW.PAD):
        readable = exists & (row >= 0) & (row < height)
        at = image + row * stride
        mask_row = mask_ptr + row * mask_stride if mask_ptr is not None else None
        s, d, ss, dd, m, own, own_m = image_row(
            pred_ptr + at,
            target_ptr + at,
            mask_row,
            mask_step,
            shift,
            column,
            width,
            readable,
            window,
            WINDOW,
        )
        s, s_sums = add_row(s_sums, s, window, WINDOW)
        d, d_sums = add_row(d_sums, d, window, WINDOW)
        ss, ss_sums = add_row(ss_sums, ss, window, WINDOW)
        dd, dd_sums = add_row(dd_sums, dd, window, WINDOW)
        out = row - (LAST - WINDOW.PAD)
        counted = exists & (out >= first) & (out < out_height) & (column < out_width)
        centre = tl.where(counted, 1.0, 0.0)
        if mask_ptr is not None:
            m, m_sums = add_row(m_sums, m, window, WINDOW)
            centre_ptr = mask_ptr + (out + CENTRE) * mask_stride + CENTRE * mask_step
            centre = tl.load(centre_ptr, mask=counted, other=0).to(tl.float32)
            counted = centre != 0
            normal = tl.div_rn(tl.full(m.shape, 1.0, tl.float32), tl.where(m == 0, 1.0, m))
            s, d, ss, dd = s * normal, d * normal, ss * normal, dd * normal
        means = statistics(s, d, ss, dd, shift, c1, c2)
        mean_s, mean_d, v_s, v_d, l_top, l_bottom, cs_top, cs_bottom = means
        # Rounded division: equal images are exactly 1.
        cs = tl.div_rn(cs_top, cs_bottom)
        luminance = tl.div_rn(l_top, l_bottom)
        if sums_ptr is not None:
            similarity += tl.where(counted, centre * (luminance * cs), 0.0)
            contrast += tl.where(counted, centre * cs, 0.0)
            weights += centre
            if L1:
                owned = readable & (row >= first) & (row < end) & (column < width)
                l1 += tl.where(owned, own, 0.0)
                l1_weights += tl.where(owned, own_m, 0.0)
        else:
            if mask_ptr is not None:
                centre *= normal
            f, by_cs = centre * by_similarity * cs, centre * (by_similarity * luminance + by_contrast)
            g_ss = 2 * by_cs * v_d / cs_bottom / cs_bottom
            g_dd = -2 * by_cs * (v_s + c2) / cs_bottom / cs_bottom
            by_luminance = 4 * f / l_bottom / l_bottom
            g_s = mean_s * (by_luminance * mean_d * mean_d) - 2 * s * g_ss
            g_d = -mean_d * (by_luminance * (mean_s * mean_s + c1)) - 2 * d * g_dd
            inside = exists & (out >= first) & (out < out_height) & (column < out_width)
            to = maps_ptr + out * (out_width.to(tl.int64) * WINDOW.STEP)
            tl.store(to, tl.where(counted, g_s, 0.0), mask=inside)
            tl.store(to + map_size, tl.where(counted, g_d, 0.0), mask=inside)
            tl.store(to + 2 * map_size, tl.where(counted, g_ss, 0.0), mask=inside)
            tl.store(to + 3 * map_size, tl.where(counted, g_dd, 0.0), mask=inside)
    if sums_ptr is not None:
        total = tl.num_programs(0).to(tl.int64) * WINDOW.BLOCK_C
        sums_ptr += tl.program_id(0).to(tl.int64) * WINDOW.BLOCK_C + tl.arange(0, WINDOW.BLOCK_C)[None, :]
        tl.store(sums_ptr, tl.sum(similarity, axis=0, keep_dims=True))
        if CONTRAST:
            sums_ptr += total
            tl.store(sums_ptr, tl.sum(contrast, axis=0, keep_dims=True))
        if mask_ptr is not None:
            sums_ptr += total
            tl.store(sums_ptr, tl.sum(weights, axis=0, keep_dims=True))
        if L1:
            sums_ptr += total
            tl.store(sums_ptr, tl.sum(l1, axis=0, keep_dims=True))
            if mask_ptr is not None:
                sums_ptr += total
                tl.store(sums_ptr, tl.sum(l1_weights, axis=0, keep_dims=True))


@triton.jit
def summed(pointer, length, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of `length` numbers STEP apart, [1] in float64."""
    lane = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, length, BLOCK):
        at = (first + lane).to(tl.int64) * STEP
        total += tl.load(pointer + at, mask=first + lane < length, other=0.0).to(tl.float64)
    return tl.sum(total, axis=0, keep_dims=True)


@triton.jit
def store_mean(out_ptr, total, weight, EMPTY: tl.constexpr):
    mean = tl.where(weight == 0, EMPTY, total / tl.where(weight == 0, 1.0, weight))
    tl.store(out_ptr + tl.arange(0, 1), mean.to(tl.float32))


@triton.jit(do_not_specialize=["programs"])
def mean_kernel(
    sums_ptr,  # [kinds, programs, BLOCK_C]: similarity, contrast, with a mask the windows' weights, l1, its weights
    similarity_ptr,  # [N, C]
    contrast_ptr,  # [N, C] or None
    l1_ptr,  # [] or None
    scale_ptr,  # [N C + 1]: 1 / what the sums of each plane, and that of l1, are divided by
    sizes,
    programs,
    MASKED: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The means of one plane (program), the last program that of l1."""
    KINDS: tl.constexpr = 1 + (contrast_ptr is not None) + MASKED
    total = programs.to(tl.int64) * BLOCK_C
    at, planes = tl.program_id(0), unpacked(sizes[4])
    scale_ptr += at
    if at < planes:
        parts = unpacked(sizes[6]) * unpacked(sizes[7])
        sums_ptr += (at // BLOCK_C).to(tl.int64) * parts * BLOCK_C + at % BLOCK_C
        if MASKED:
            weight = summed(sums_ptr + (KINDS - 1) * total, parts, BLOCK_C, BLOCK)
        else:
            weight = tl.zeros([1], tl.float64) + unpacked(sizes[2]).to(tl.float64) * unpacked(sizes[3])
        store_mean(similarity_ptr + at, summed(sums_ptr, parts, BLOCK_C, BLOCK), weight, 1.0)
        if contrast_ptr is not None:
            store_mean(contrast_ptr + at, summed(sums_ptr + total, parts, BLOCK_C, BLOCK), weight, 1.0)
        store_mean(scale_ptr, tl.full([1], 1.0, tl.float64), weight, 0.0)
    elif l1_ptr is not None:
        sums_ptr += KINDS * total
        if MASKED:
            weight = summed(sums_ptr + total, total, 1, BLOCK)
        else:
            pixels = unpacked(sizes[0]).to(tl.float64) * unpacked(sizes[1])
            weight = tl.zeros([1], tl.float64) + pixels * planes
        store_mean(l1_ptr, summed(sums_ptr, total, 1, BLOCK), weight, 0.0)
        store_mean(scale_ptr, tl.full([1], 1.0, tl.float64), weight, 0.0)
    else:
        tl.store(scale_ptr + tl.arange(0, 1), tl.zeros([1], tl.float32))


@triton.jit(do_not_specialize=["limit"])
def gradient_kernel(
    maps_ptr,  # [4, N, C, windows down, windows along], the g of s, d, s^2, d^2
    pred_ptr,  # [N, C, H, W]
    target_ptr,  # [N, C, H, W]
    mask_ptr,  # [H, W] or [1|N, 1|C, H, W], or None
    grad_pred_ptr,  # [N, C, H, W] or None
    grad_target_ptr,  # [N, C, H, W] or None
    grad_l1_ptr,  # [] or None
    scale_ptr,  # [N C + 1], the last that of l1
    sizes,  # see `Images`
    window,
    limit,
    WINDOW: tl.constexpr,  # its PAD is that of the windows that a pixel lies in
):
    LAST: tl.constexpr = WINDOW.SIZE - 1
    height, width = unpacked(sizes[0]), unpacked(sizes[1])
    map_height, map_width, planes = unpacked(sizes[2]), unpacked(sizes[3]), unpacked(sizes[4])
    plane, column, exists, first, end = place_of(sizes, WINDOW)
    maps_ptr += offset_of(plane, column, map_height, map_width, sizes, WINDOW)
    map_size = planes.to(tl.int64) * map_height * map_width
    map_stride = map_width.to(tl.int64) * WINDOW.STEP
    image = offset_of(plane, column, height, width, sizes, WINDOW)
    stride = width.to(tl.int64) * WINDOW.STEP
    shift = shift_of(pred_ptr, target_ptr, mask_ptr, plane, limit, sizes, WINDOW)
    by_l1 = 0.0
    if grad_l1_ptr is not None:
        by_l1 = tl.load(grad_l1_ptr) * tl.load(scale_ptr + planes)
    if mask_ptr is not None:
        mask_offset, _, mask_stride = mask_place_of(plane, column, width, sizes, WINDOW)
        mask_ptr += mask_offset
    s_sums, d_sums, ss_sums, dd_sums = no_sums(WINDOW), no_sums(WINDOW), no_sums(WINDOW), no_sums(WINDOW)
    for row in range(first - WINDOW.PAD, end + LAST - WINDOW.PAD):
        readable = exists & (row >= 0) & (row < map_height)
        at = maps_ptr + row * map_stride
        g_s = map_row(at, column, map_width, readable, window, WINDOW)
        g_d = map_row(at + map_size, column, map_width, readable, window, WINDOW)
        g_ss = map_row(at + 2 * map_size, column, map_width, readable, window, WINDOW)
        g_dd = map_row(at + 3 * map_size, column, map_width, readable, window, WINDOW)
        g_s, s_sums = add_row(s_sums, g_s, window, WINDOW)
        g_d, d_sums = add_row(d_sums, g_d, window, WINDOW)
        g_ss, ss_sums = add_row(ss_sums, g_ss, window, WINDOW)
        g_dd, dd_sums = add_row(dd_sums, g_dd, window, WINDOW)
        out = row - (LAST - WINDOW.PAD)
        inside = exists & (out >= first) & (column < width)
        to = image + out * stride
        a = tl.load(pred_ptr + to, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(target_ptr + to, mask=inside, other=0.0).to(tl.float32)
        s, d = a + b - shift[0], a - b - shift[1]
        grad_s = g_s + 2 * s * g_ss
        grad_d = g_d + 2 * d * g_dd
        if grad_l1_ptr is not None:
            grad_d += tl.where(a > b, by_l1, tl.where(a < b, -by_l1, 0.0))
        if mask_ptr is not None:
            m = tl.load(mask_ptr + out * mask_stride, mask=inside, other=0).to(tl.float32)
            grad_s = tl.where(m == 0, 0.0, m * grad_s)
            grad_d = tl.where(m == 0, 0.0, m * grad_d)
        if grad_pred_ptr is not None:
            value = (grad_s + grad_d).to(grad_pred_ptr.dtype.element_ty)
            tl.store(grad_pred_ptr + to, value, mask=inside)
        if grad_target_ptr is not None:
            value = (grad_s - grad_d).to(grad_target_ptr.dtype.element_ty)
            tl.store(grad_target_ptr + to, value, mask=inside)


def shift_limit(c1: float) -> float:
    """Twice the data range, as in `reference/ssim.py`."""
    return 200 * math.sqrt(c1)


def window_of(weights: list[float]) -> tuple[float, ...]:
    """Of a narrow Gaussian without the weights that float32 has no normal number for: to Triton those are float64."""
    return tuple(weight if weight >= torch.finfo(torch.float32).tiny else 0.0 for weight in weights)


def forward(
    pred: Tensor,  # [N, C, H, W]
    target: Tensor,  # [N, C, H, W]
    mask: Tensor | None,  # [H, W] or [1|N, 1|C, H, W]
    window: list[float],
    same: bool,
    c1: float,
    c2: float,
    contrast: bool,
    l1: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(similarity, contrast, l1, scale) of `ops/ssim.py`."""
    n, c = pred.shape[:2]
    make = torch.empty if pred.numel() else torch.ones
    similarity, cs, scale = (
        make(size, dtype=torch.float32, device=pred.device)
        for size in ((n, c), (n, c) if contrast else (0,), (n * c + 1,))
    )
    distance = torch.zeros(() if l1 else (0,), dtype=torch.float32, device=pred.device)
    if pred.numel() == 0:
        return similarity, cs, distance, scale.zero_()
    images = make_images(pred, target, mask, len(window), same, not l1)
    kinds = 1 + contrast + l1 + (mask is not None) * (1 + l1)
    block_c = images.window.BLOCK_C
    with plan.on_device(pred):
        shape = kinds, images.programs, block_c
        sums = torch.empty(shape, dtype=torch.float32, device=pred.device)
        window_kernel[(images.programs,)](
            *images[:3],
            sums,
            None,
            None,
            None,
            images.sizes,
            window_of(window),
            2 * c1,
            2 * c2,
            shift_limit(c1),
            contrast,
            l1,
            images.window,
            num_warps=images.warps,
        )
        mean_kernel[(n * c + 1,)](
            sums,
            similarity,
            cs if contrast else None,
            distance if l1 else None,
            scale,
            images.sizes,
            images.programs,
            mask is not None,
            block_c,
            512,
            num_warps=4,
        )
    return similarity, cs, distance, scale


def backward(
    grad_similarity: Tensor | None,  # [N, C]
    grad_contrast: Tensor | None,  # [N, C]
    grad_l1: Tensor | None,  # []
    scale: Tensor,  # [N C + 1]
    pred: Tensor,  # [N, C, H, W]
    target: Tensor,  # [N, C, H, W]
    mask: Tensor | None,  # [H, W] or [1|N, 1|C, H, W]
    window: list[float],
    same: bool,
    c1: float,
    c2: float,
    need_pred: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    """(grad_pred, grad_target) of `ops/ssim.py`."""
    last = plan.is_channels_last(pred)
    types = pred.dtype, target.dtype
    grads = plan.empty_gradients(pred, pred.shape, last, *types, need_pred, need_target)
    if pred.numel() == 0:
        return grads
    by_windows = make_images(pred, target, mask, len(window), same, True)
    by_pixels = make_images(*by_windows[:3], len(window), same, False)
    out_h, out_w = ((value - 3) // 2 for value in by_windows.sizes[2:4])
    with plan.on_device(pred):
        shape = 4, *pred.shape[:2], out_h, out_w
        maps = torch.empty(shape, dtype=torch.float32, device=pred.device)
        window_kernel[(by_windows.programs,)](
            *by_windows[:3],
            None,
            maps,
            (grad_similarity, grad_contrast),
            scale,
            by_windows.sizes,
            window_of(window),
            2 * c1,
            2 * c2,
            shift_limit(c1),
            False,
            False,
            by_windows.window,
            num_warps=by_windows.warps,
        )
        gradient_kernel[(by_pixels.programs,)](
            maps,
            *by_pixels[:3],
            *(g if needed else None for g, needed in zip(grads, (need_pred, need_target), strict=True)),
            grad_l1,
            scale,
            by_pixels.sizes,
            window_of(window),
            shift_limit(c1),
            by_pixels.window._replace(PAD=len(window) - 1 - by_pixels.window.PAD),
            num_warps=by_pixels.warps,
        )
    # A target in the other layout than pred gets its gradient in its own.
    return grads[0], plan.in_layout(grads[1], need_target and plan.is_channels_last(target))
