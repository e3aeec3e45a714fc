"""Style loss in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import accumulate_dtype
from .gram import gram_matrix
from .masked_l1 import as_factor, penalty_value


def style_coefficient(normalize: str, channels: int, pixels: int, batch: int) -> float:
    """Factor of the summed penalties of one layer; `batch` is that of its input."""
    count = batch * channels**2 * (4 * pixels**2 if normalize == "gatys" else 1)
    return 1.0 / count if count else 0.0


def style_loss(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[float | Tensor],
    penalty: str,
    normalize: str,
    target_is_gram: bool,
) -> Tensor:
    """Style loss over layers; arguments as `ops/style.py`, the target's batch divides the input's."""
    total = torch.zeros((), dtype=accumulate_dtype(*inputs, *targets), device=inputs[0].device)
    for x, y, weight in zip(inputs, targets, weights, strict=True):
        x, y = x.to(total.dtype), y.to(total.dtype)
        target = y if target_is_gram else gram_matrix(y, normalize=normalize)
        predictions = x.shape[0] // y.shape[0] if y.shape[0] else 0
        difference = gram_matrix(x, normalize=normalize) - target.repeat(predictions, 1, 1)
        value = penalty_value(difference, penalty, 0.0).sum()
        factor = style_coefficient(normalize, x.shape[1], x.shape[2] * x.shape[3], x.shape[0])
        total = total + value * (as_factor(weight, total) * factor)
    return total
