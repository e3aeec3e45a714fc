"""Matrix products of the Triton kernels of gram and style: precision, and a symmetric matrix times features.

    out[n] = scale * grad * factor[n] F[n], F [C, M], factor [C, C]

A program owns a tile of rows and pixels of `out`; channels up to a tile are read once. Half precision runs on the
tensor cores as it is: the float32 factor is first written as two half matrices under one factor a row
(`split_kernel`), whose sum has 16 bits (bfloat16) or 22 (float16). float32 features take three TF32 products, or one
where torch's setting allows it.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Product(NamedTuple):
    """What `product_kernel` is compiled for."""

    C: int
    CHANNELS_LAST: bool
    UNIT: int  # of the number of pixels
    PRECISION: str  # see `precision`
    BLOCK_R: int
    BLOCK_K: int
    BLOCK_M: int


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


@triton.jit(do_not_specialize=["samples"])
def split_kernel(
    factor_ptr,  # [samples, C, C]
    high_ptr,  # [samples, C, C] in the features' dtype
    low_ptr,  # [samples, C, C] in the features' dtype
    rows_ptr,  # [2, samples, C]: factor of a row, and whether its low part is not all 0
    samples,
    C: tl.constexpr,
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
    at = sample * (C * C) + i * C + j
    value = tl.load(factor_ptr + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(value), axis=1, keep_dims=True)
    # A row of zeros, or with an Inf, is kept as it is.
    largest = tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)
    value = tl.div_rn(value, tl.broadcast_to(largest, [ROWS, COLS]))
    high = value.to(high_ptr.dtype.element_ty)
    wide = high.to(tl.float32)
    low = tl.where(tl.abs(wide) < float("inf"), value - wide, 0.0)
    tl.store(high_ptr + at, high, mask=inside)
    tl.store(low_ptr + at, low.to(low_ptr.dtype.element_ty), mask=inside)
    row = sample * C + i
    tl.store(rows_ptr + row, largest, mask=i < C)
    some = tl.max(tl.where(low != 0, 1.0, 0.0), axis=1, keep_dims=True)
    tl.store(rows_ptr + samples.to(tl.int64) * C + row, some, mask=i < C)


@triton.jit
def add_product(
    total,  # [BLOCK_R, BLOCK_M], channels_last: [BLOCK_M, BLOCK_R]
    factor_ptr,  # [samples, C, C]
    features_ptr,  # first pixel of the tile
    sample,
    row,  # [BLOCK_R]
    pixels,
    left,
    PRODUCT: tl.constexpr,
):
    """total + factor rows times the features of a tile of pixels."""
    C: tl.constexpr = PRODUCT.C
    CHANNELS_LAST: tl.constexpr = PRODUCT.CHANNELS_LAST
    PRECISION: tl.constexpr = PRODUCT.PRECISION
    BLOCK_K: tl.constexpr = PRODUCT.BLOCK_K
    for first in range(0, C, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = load_features(features_ptr, k, pixels, left, C, CHANNELS_LAST, BLOCK_K, PRODUCT.BLOCK_M)
        if CHANNELS_LAST:
            i, j = row[None, :], k[:, None]
        else:
            i, j = row[:, None], k[None, :]
        inside = (i < C) & (j < C)
        f = tl.load(factor_ptr + sample * (C * C) + i * C + j, mask=inside, other=0.0)
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
    factor_ptr,  # [samples, C, C], "half": the high part
    low_ptr,  # "half": [samples, C, C], else None
    rows_ptr,  # "half": [2, samples, C], see `split_kernel`; else None
    features_ptr,  # [samples, C, M], channels_last: [samples, M, C]
    out_ptr,  # as features
    samples,
    length,  # M, in units of UNIT
    tiles,
    scale,
    PRODUCT: tl.constexpr,
):
    C: tl.constexpr = PRODUCT.C
    CHANNELS_LAST: tl.constexpr = PRODUCT.CHANNELS_LAST
    PRECISION: tl.constexpr = PRODUCT.PRECISION
    BLOCK_R: tl.constexpr = PRODUCT.BLOCK_R
    BLOCK_M: tl.constexpr = PRODUCT.BLOCK_M
    BLOCKS: tl.constexpr = (C + BLOCK_R - 1) // BLOCK_R
    program = tl.program_id(0)
    # Rows change fastest: they share the features of a tile of pixels.
    row = (program % BLOCKS) * BLOCK_R + tl.arange(0, BLOCK_R)
    tile = (program // BLOCKS) % tiles
    sample = (program // BLOCKS // tiles).to(tl.int64)
    pixels = length.to(tl.int64) * PRODUCT.UNIT
    first = tile.to(tl.int64) * BLOCK_M
    start = sample * C * pixels + (first * C if CHANNELS_LAST else first)
    left = pixels - first
    coefficient = scale
    if grad_ptr is not None:
        coefficient *= tl.load(grad_ptr).to(tl.float32)
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
            total = add_product(total, low_ptr, at, sample, row, pixels, left, PRODUCT)
    total = add_product(total, factor_ptr, at, sample, row, pixels, left, PRODUCT)
    if PRECISION == "half":
        total *= row_factor[None, :] if CHANNELS_LAST else row_factor[:, None]
    tl.store(out_ptr + start + place, (total * coefficient).to(out_ptr.dtype.element_ty), mask=inside)


def precision(dtype: torch.dtype) -> str:
    """How products are formed: "half", "tf32x3", "tf32" or "ieee"."""
    if dtype != torch.float32:
        # Triton's interpreter multiplies bfloat16 blocks as integers.
        return "ieee" if INTERPRETED and dtype == torch.bfloat16 else "half"
    if torch.version.hip:
        return "ieee"
    # What set_float32_matmul_precision set, too; its own getter raises once the newer setting was used. At "highest"
    # three TF32 products replace the float32 product of the plain cores: the same accuracy class (see
    # `multiply_add`), several times faster.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def launch_product(
    grad: Tensor | None,  # []
    factor: Tensor,  # [N, C, C]
    features: Tensor,  # [N, C, H, W]
    scale: float,
) -> Tensor:
    """scale * grad * factor @ features."""
    channels_last = plan.is_channels_last(features)
    features = plan.in_layout(features, channels_last)
    n, c, h, w = features.shape
    out = plan.empty_image(features, features.shape, channels_last, features.dtype)
    if out.numel() == 0:
        return out
    mode = precision(features.dtype)
    factor = factor.contiguous()
    high, low, rows = factor, None, None
    with plan.on_device(features):
        if mode == "half":
            high = torch.empty((n, c, c), dtype=features.dtype, device=features.device)
            low = torch.empty_like(high)
            rows = torch.empty((2, n, c), dtype=torch.float32, device=features.device)
            cols = triton.next_power_of_2(c)
            block = max(1, 2048 // cols)
            split_kernel[(n * triton.cdiv(c, block),)](
                factor,
                high,
                low,
                rows,
                n,
                c,
                block,
                cols,
                num_warps=4,
            )
        block_r = min(max(triton.next_power_of_2(c), 16), 128 if mode == "half" else 64)
        block_k = min(max(triton.next_power_of_2(c), 16), 64 if mode == "half" else 32)
        unit = 1 if channels_last or (h * w) % 8 else 8
        block_m = 128
        tiles = triton.cdiv(h * w, block_m)
        product_kernel[(n * tiles * triton.cdiv(c, block_r),)](
            grad,
            high,
            low,
            rows,
            features,
            out,
            n,
            h * w // unit,
            tiles,
            scale,
            Product(c, channels_last, unit, mode, block_r, block_k, block_m),
            num_warps=8 if block_r == 128 or mode != "half" else 4,
        )
    return out


def gram_scale(normalize: str, channels: int, pixels: int) -> float:
    """Factor of F F^T, as csrc/common/gram.h."""
    count = {"chw": channels * pixels, "hw": pixels}.get(normalize, 1)
    return 1.0 / count if count else 1.0


def style_coefficient(normalize: str, channels: int, pixels: int, predictions: int) -> float:
    """Factor of the summed penalties of one layer, as csrc/common/gram.h."""
    count = predictions * channels**2
    if normalize == "gatys":
        count *= 4 * pixels**2
    return 1.0 / count if count else 0.0
