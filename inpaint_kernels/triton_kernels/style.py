"""Triton kernels of the style loss.

    D = G(input)[j N + n] - G(target)[n] in float32;  loss = sum over layers of w * coefficient * sum penalty(D)
    factor = 2 * s * w * coefficient * penalty'(D);  grad_input[n] = grad * factor[n] F[n], the target's: -the sum of
    its predictions' factors times its features

Saved for backward: the factors [k N, C, C] and references to the features.
Forward, each layer: the Gram sums of input and target in one launch (two if their dtypes or layouts differ), then
one that adds the spans up and forms difference, loss and factor; the target's Gram matrix is added up once for all
its predictions. A last launch adds the losses. Backward: the product of `product.py` for each layer.
Bytes an element: forward one read of input and target, backward one read and one write for each gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gram, pixel_forward, plan
from .gram import add_splits, second_stage_place, store_both
from .product import gram_scale, launch_product, style_coefficient


# The losses of a layer begin where those of the layer before end, aligned or not.
@triton.jit(do_not_specialize=["losses_ptr", "samples", "splits", "target_splits"])
def difference_kernel(
    sums_ptr,  # [PREDICTIONS * samples, splits, pairs, BLOCK_C, BLOCK_C]
    target_ptr,  # [samples, target_splits, pairs, BLOCK_C, BLOCK_C], IS_GRAM: [samples, C, C]
    factor_ptr,  # [PREDICTIONS * samples, C, C] or None
    losses_ptr,  # [programs]
    samples,
    splits,
    target_splits,
    stride_n,  # of target, IS_GRAM
    stride_r,
    stride_c,
    scale,
    target_scale,
    coefficient,
    factor_scale,
    PENALTY: tl.constexpr,
    IS_GRAM: tl.constexpr,
    C: tl.constexpr,
    PREDICTIONS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    sample, pair, place, i, j, inside = second_stage_place(C, BLOCK_C)
    if IS_GRAM:
        target_ptr += sample * stride_n
        at = i.to(tl.int64) * stride_r + j.to(tl.int64) * stride_c
        mirrored = j.to(tl.int64) * stride_r + i.to(tl.int64) * stride_c
        target = tl.load(target_ptr + at, mask=inside, other=0.0).to(tl.float32)
        # What the caller calls a Gram matrix need not be symmetric.
        target_mirrored = tl.load(target_ptr + mirrored, mask=inside, other=0.0).to(tl.float32)
    else:
        target = add_splits(target_ptr, sample, target_splits, pair, place, C, BLOCK_C) * target_scale
        target_mirrored = target
    loss = tl.zeros(place.shape, tl.float32)
    for prediction in tl.static_range(PREDICTIONS):
        at_sample = sample + prediction * samples.to(tl.int64)
        value = add_splits(sums_ptr, at_sample, splits, pair, place, C, BLOCK_C) * scale
        d = value - target
        d_mirrored = value - target_mirrored
        if PENALTY == "l1":
            loss += tl.abs(d) + tl.where(i == j, 0.0, tl.abs(d_mirrored))
            # Comparisons, so that a NaN has sign 0.
            grad = tl.where(d > 0, 0.5, tl.where(d < 0, -0.5, 0.0))
            grad += tl.where(d_mirrored > 0, 0.5, tl.where(d_mirrored < 0, -0.5, 0.0))
        else:
            loss += d * d + tl.where(i == j, 0.0, d_mirrored * d_mirrored)
            grad = d + d_mirrored
        if factor_ptr is not None:
            store_both(factor_ptr + at_sample * (C * C), i, j, grad * factor_scale, inside, C)
    loss = tl.where(inside, loss, 0.0)
    tl.store(losses_ptr + tl.program_id(0), tl.sum(loss) * coefficient)


def _launch_layer(
    x: Tensor,  # [k N, C, H, W]
    y: Tensor,  # [N, C, H', W'], or Gram matrices [N, C, C]
    factor: Tensor | None,  # [k N, C, C]
    losses: Tensor,  # [programs]
    block_c: int,
    weight: float,
    penalty: str,
    normalize: str,
    target_is_gram: bool,
) -> None:
    n, c = x.shape[:2]
    pixels = x.shape[2] * x.shape[3]
    channels_last = plan.is_channels_last(x)
    x = plan.in_layout(x, channels_last)
    target_last = not target_is_gram and plan.is_channels_last(y)
    together = not target_is_gram and target_last == channels_last and y.dtype == x.dtype
    if not target_is_gram:
        y = plan.in_layout(y, target_last)
    sums, splits = gram.launch_gram(x, y if together else None, channels_last, block_c)
    if together:
        target_sums, target_splits = sums[n:], splits
    elif target_is_gram:
        target_sums, target_splits = y, 1
    else:
        target_sums, target_splits = gram.launch_gram(y, None, target_last, block_c)
    gram_normalize = "none" if normalize == "gatys" else normalize
    scale = gram_scale(gram_normalize, c, pixels)
    target_scale = 1.0 if target_is_gram else gram_scale(gram_normalize, c, y.shape[2] * y.shape[3])
    coefficient = weight * style_coefficient(normalize, c, pixels, n)
    difference_kernel[(losses.shape[0],)](
        sums,
        target_sums,
        factor,
        losses,
        y.shape[0],
        splits,
        target_splits,
        *(y.stride() if target_is_gram else (0, 0, 0)),
        scale,
        target_scale,
        coefficient,
        2 * scale * coefficient,
        penalty,
        target_is_gram,
        c,
        n // y.shape[0],
        block_c,
        num_warps=4,
    )


def forward(
    input: list[Tensor],  # [k N, C, H, W] of each layer
    target: list[Tensor],  # [N, C, H', W'], or Gram matrices [N, C, C]
    weights: list[float],
    penalty: str,
    normalize: str,
    target_is_gram: bool,
    save: bool,
) -> tuple[Tensor, list[Tensor]]:
    """(loss, factors) of `ops/style.py`."""
    device = input[0].device
    factors = [
        torch.empty(
            (x.shape[0], x.shape[1], x.shape[1]) if save else (0,), dtype=torch.float32, device=device
        )
        for x in input
    ]
    layers = [i for i, x in enumerate(input) if x.shape[0] * x.shape[1] > 0]
    if not layers:
        return torch.zeros((), dtype=torch.float32, device=device), factors
    blocks = [
        min(gram.tile_size(input[i].shape[1], t.dtype) for t in (input[i], target[i])[: 2 - target_is_gram])
        for i in layers
    ]
    programs = [
        gram.second_stage_programs(target[i].shape[0], input[i].shape[1], block)
        for i, block in zip(layers, blocks, strict=True)
    ]
    loss, unused = (torch.empty((1, 1), dtype=torch.float32, device=device) for _ in range(2))
    losses = torch.empty(sum(programs), dtype=torch.float32, device=device)
    with plan.on_device(input[0]):
        for i, block, part in zip(layers, blocks, losses.split(programs), strict=True):
            _launch_layer(
                input[i],
                target[i],
                factors[i] if save else None,
                part,
                block,
                weights[i],
                penalty,
                normalize,
                target_is_gram,
            )
        pixel_forward.launch_finalize(losses, (loss,), unused, (0, losses.shape[0]), (1,), "sum", 1)
    return loss.view(()), factors


def backward(
    grad: Tensor,  # []
    factors: list[Tensor],  # [k N, C, C] of each layer
    features: list[Tensor],  # [N, C, H, W]
    sign: float,
) -> list[Tensor]:
    """Gradient of each layer's features: sign * grad * (the sum of its k factors) @ features."""
    grads = []
    for factor, x in zip(factors, features, strict=True):
        if factor.shape[0] > x.shape[0]:
            factor = factor.unflatten(0, (-1, x.shape[0])).sum(0)
        grads.append(launch_product(grad, factor, x, sign))
    return grads
