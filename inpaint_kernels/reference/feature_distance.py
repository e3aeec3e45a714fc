"""Feature distance in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import accumulate_dtype
from .masked_l1 import as_factor, reduce_map, weighted_map


def feature_distance(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[float | Tensor],
    masks: Sequence[Tensor] | None,
    *,
    penalty: str,
    param: float,
    normalize: str,
) -> Tensor:
    """Weighted sum over layers of mean distances; arguments as `ops/feature_distance.py`."""
    total = torch.zeros((), dtype=accumulate_dtype(*inputs, *targets), device=inputs[0].device)
    for layer, (x, y, weight) in enumerate(zip(inputs, targets, weights, strict=True)):
        predictions = x.shape[0] // y.shape[0] if y.shape[0] else 0
        # Converted first: the gradient of a repeated target is a sum, which a half type would round term by term.
        x, target = x.to(total.dtype), y.to(total.dtype).repeat(predictions, 1, 1, 1)
        mask = masks[layer].to(total.dtype) if masks is not None else None
        if mask is not None and mask.ndim == 4 and mask.shape[0] not in (1, x.shape[0]):
            mask = mask.repeat(predictions, 1, 1, 1)
        value = weighted_map(x, target, mask, penalty, param)
        total = total + as_factor(weight, total) * reduce_map(value, mask, normalize)
    return total
