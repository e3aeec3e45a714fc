"""The distance of LPIPS in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import accumulate_dtype, is_differentiated, safe_divide
from .gram import without_autocast


def unit_factor(features: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """What makes unit vectors of every pixel's channels, ``1 / (norm + eps)``, and the norm, (N, 1, H, W) each.

    A zero vector has factor 0 with all derivatives 0, and norm 1.
    """
    squares = features.square().sum(1, keepdim=True)
    zero = squares == 0
    norm = torch.where(zero, 1.0, squares).sqrt()
    return torch.where(zero, 0.0, 1.0 / (norm + eps)), norm


def _prepared(
    x: Tensor, y: Tensor, mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | float]:
    """Both maps with one batch, in `dtype`, and each pixel's share of the mean over its sample's pixels."""
    predictions = x.shape[0] // y.shape[0] if y.shape[0] else 1
    # Converted first: the gradient of a repeated target is a sum, which a half type would round term by term.
    x, y = x.to(dtype), y.to(dtype)
    if predictions != 1:
        # In the layout of x: in another one the sums over channels of equal vectors would differ in their last bits.
        last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
        y = y.repeat(predictions, 1, 1, 1)
        y = y.contiguous(memory_format=torch.channels_last) if last else y
    if mask is None:
        return x, y, 1.0 / max(x.shape[2] * x.shape[3], 1)
    if mask.ndim == 4 and mask.shape[0] not in (1, x.shape[0]):
        mask = mask.repeat(predictions, 1, 1, 1)
    ignored = mask == 0
    if is_differentiated(mask):
        # The derivative by the mask is the distance, also at weight 0: drop only what is not finite.
        ignored = ignored & ~(torch.isfinite(x) & torch.isfinite(y))
    x, y = (torch.where(ignored, 0.0, features) for features in (x, y))
    weight = mask.to(dtype).expand(x.shape[0], 1, *x.shape[2:])
    return x, y, safe_divide(weight, weight.sum((2, 3), keepdim=True))


def lpips_gradients(
    x: Tensor, y: Tensor, weight: Tensor, mask: Tensor | None, grad: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients by one layer's maps of ``grad`` (k N,) times its distances, as differentiable expressions.

    Both are (k N, C, H, W): the target's is not yet summed over the predictions.
    """
    x, y, share = _prepared(x, y, mask, grad.dtype)
    (r, x_norm), (s, y_norm) = unit_factor(x, eps), unit_factor(y, eps)
    g = (grad.reshape(-1, 1, 1, 1) * share) * 2.0 * weight.to(grad.dtype).reshape(-1, 1, 1) * (x * r - y * s)
    by_x = r * g - x * ((g * x).sum(1, keepdim=True) * r * r / x_norm)
    by_y = y * ((g * y).sum(1, keepdim=True) * s * s / y_norm) - s * g
    return by_x, by_y


def reduce_samples(values: Tensor, reduction: str) -> Tensor:
    """The values (N,) themselves for "none", their "sum", or their "mean", which is 0 of none."""
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" or not values.shape[0] else values.mean()


def lpips_distance(
    input: Sequence[Tensor],
    target: Sequence[Tensor],
    weights: Sequence[Tensor],
    masks: Sequence[Tensor] | None = None,
    *,
    eps: float = 1e-10,
    reduction: str = "none",
) -> Tensor:
    """Over layers the sum, over pixels the mean of ``sum_c w_c (u_c - v_c)^2`` of unit vectors u and v.

    Of k predictions against one target; `weights` holds one of (C,) for each layer.
    """
    dtype = accumulate_dtype(*input, *target)
    total = torch.zeros(input[0].shape[0], dtype=dtype, device=input[0].device)
    with without_autocast(input[0]):
        for layer, weight in enumerate(weights):
            mask = masks[layer] if masks else None
            x, y, share = _prepared(input[layer], target[layer], mask, dtype)
            difference = x * unit_factor(x, eps)[0] - y * unit_factor(y, eps)[0]
            plane = (difference.square() * weight.to(dtype).reshape(-1, 1, 1)).sum(1)
            if isinstance(share, float):
                total = total + plane.sum((1, 2)) * share
            else:
                total = total + (plane * share.squeeze(1)).sum((1, 2))
    return reduce_samples(total, reduction)
