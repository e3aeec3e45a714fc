"""Masked pixel losses in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from ._common import accumulate_dtype, is_differentiated, safe_divide


def penalty_value(d: Tensor, penalty: str, param: float) -> Tensor:
    """The penalty of every difference: `l1`, `l2`, `charbonnier` (param = eps) or `huber` (param = delta)."""
    if penalty == "l1":
        return d.abs()
    if penalty == "l2":
        return d * d
    if penalty == "charbonnier":
        return torch.sqrt(d * d + param * param)
    a = d.abs()
    inside = ~(a > param)
    # The square of what lies outside would send back 0 * Inf.
    q = torch.where(inside, d, torch.zeros((), dtype=d.dtype, device=d.device))
    return torch.where(inside, 0.5 * q * q, param * (a - 0.5 * param))


def penalty_grad(d: Tensor, penalty: str, param: float) -> Tensor:
    """Derivative of `penalty_value`, itself differentiable."""
    if penalty == "l1":
        return d.sgn()
    if penalty == "l2":
        return 2.0 * d
    if penalty == "charbonnier":
        return d / torch.sqrt(d * d + param * param)
    return d.clamp(-param, param)


def counted_difference(pred: Tensor, target: Tensor, weight: Tensor | None) -> Tensor:
    """pred - target in the accumulation dtype, 0 where the weight is exactly 0.

    The selection stands before the penalty: autograd would multiply a NaN derivative by the zero that a
    selection after it sends back.
    """
    dtype = accumulate_dtype(pred, target)
    d = pred.to(dtype) - target.to(dtype)
    if weight is None:
        return d
    ignored = weight == 0
    if is_differentiated(weight):
        # The derivative by the weight is the penalty, also at weight 0: drop only what is not finite.
        ignored = ignored & ~torch.isfinite(d)
    return torch.where(ignored, torch.zeros((), dtype=dtype, device=d.device), d)


def weighted_map(pred: Tensor, target: Tensor, weight: Tensor | None, penalty: str, param: float) -> Tensor:
    """weight * penalty(pred - target), elementwise, without NaN where the weight is 0."""
    d = counted_difference(pred, target, weight)
    value = penalty_value(d, penalty, param)
    if weight is None:
        return value
    return value * weight.to(value.dtype)


def as_factor(weight: float | Tensor, total: Tensor) -> float | Tensor:
    """A weight that may be a tensor, in the dtype and on the device of what it multiplies."""
    return weight.to(total) if isinstance(weight, Tensor) else weight


def reduce_map(value: Tensor, weight: Tensor | None, normalize: str) -> Tensor:
    """Mean of a weighted map (N, C, H, W) with the denominator named by `normalize`."""
    if value.numel() == 0:
        return value.sum()
    if normalize == "image" or (weight is None and normalize == "mask"):
        return value.sum() / value.numel()
    if weight is None:
        return value.mean(dim=(1, 2, 3)).mean()
    weight = weight.to(value.dtype).expand_as(value)
    if normalize == "mask":
        return safe_divide(value.sum(), weight.sum())
    return safe_divide(value.sum(dim=(1, 2, 3)), weight.sum(dim=(1, 2, 3))).mean()


def masked_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    penalty: str,
    param: float,
    reduction: str,
    normalize: str,
) -> Tensor:
    """Masked pixel loss; arguments as the public functions of `ops/masked_l1.py`."""
    if mask is not None:
        mask = mask.to(accumulate_dtype(pred, target))
    value = weighted_map(pred, target, mask, penalty, param)
    if reduction == "none":
        return value
    if reduction == "sum":
        return value.sum()
    return reduce_map(value, mask, normalize)


def masked_loss_grad(
    pred: Tensor, target: Tensor, weight: Tensor | None, coefficient: Tensor, penalty: str, param: float
) -> Tensor:
    """coefficient * weight * penalty'(pred - target): the first gradient as a differentiable expression.

    The backward takes this path under `create_graph=True`, so that second derivatives come from autograd.
    """
    grad = coefficient * penalty_grad(counted_difference(pred, target, weight), penalty, param)
    return grad if weight is None else grad * weight.to(grad.dtype)
