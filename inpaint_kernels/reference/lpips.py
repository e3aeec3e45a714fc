"""The distance of LPIPS in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import accumulate_dtype
from .gram import without_autocast


def unit_vectors(features: Tensor, eps: float) -> Tensor:
    """Every pixel's channels over their norm plus `eps`; a zero vector stays one, with all derivatives 0."""
    squares = features.square().sum(1, keepdim=True)
    zero = squares == 0
    # One factor a pixel: zeros are put right in a plane, not in the whole map.
    return features * torch.where(zero, 0.0, 1.0 / (torch.where(zero, 1.0, squares).sqrt() + eps))


def lpips_distance(
    input: Sequence[Tensor], target: Sequence[Tensor], weights: Sequence[Tensor], eps: float = 1e-10
) -> Tensor:
    """(k N,): over layers the sum, over pixels the mean of ``sum_c w_c (u_c - v_c)^2`` of unit vectors u and v.

    Of k predictions against one target; `weights` holds one of (C,) for each layer.
    """
    total = None
    with without_autocast(input[0]):
        for x, y, weight in zip(input, target, weights, strict=True):
            dtype = accumulate_dtype(x, y)
            u, v = (unit_vectors(features.to(dtype), eps) for features in (x, y))
            predictions = x.shape[0] // y.shape[0] if y.shape[0] else 1
            difference = (u.unflatten(0, (predictions, y.shape[0])) - v).square().flatten(0, 1)
            layer = torch.einsum("nchw,c->nhw", difference, weight.to(dtype)).mean((1, 2))
            total = layer if total is None else total + layer
    assert total is not None
    return total
