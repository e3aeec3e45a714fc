"""Style loss in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import accumulate_dtype
from .gram import gram_matrix
from .masked_l1 import as_factor


def style_coefficient(normalize: str, channels: int, pixels: int, predictions: int) -> float:
    """Factor of the summed penalties of one layer; `predictions` is the batch of its input."""
    if normalize == "gatys":
        count = 4 * channels**2 * pixels**2 * predictions
    else:
        count = predictions * channels**2
    return 1.0 / count if count else 0.0


def style_loss(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    weights: Sequence[float | Tensor],
    *,
    penalty: str,
    normalize: str,
    target_is_gram: bool,
) -> Tensor:
    """Style loss over layers; arguments as `ops/style.py`, the target's batch divides the input's."""
    gram_normalize = "none" if normalize == "gatys" else normalize
    total = torch.zeros((), dtype=accumulate_dtype(*inputs, *targets), device=inputs[0].device)
    for x, y, weight in zip(inputs, targets, weights, strict=True):
        x, y = x.to(total.dtype), y.to(total.dtype)
        gram = gram_matrix(x, normalize=gram_normalize)
        goal = y if target_is_gram else gram_matrix(y, normalize=gram_normalize)
        copies = x.shape[0] // y.shape[0] if y.shape[0] else 0
        difference = gram - goal.repeat(copies, 1, 1)
        value = difference.abs() if penalty == "l1" else difference * difference
        factor = style_coefficient(normalize, x.shape[1], x.shape[2] * x.shape[3], x.shape[0])
        total = total + value.sum() * (as_factor(weight, total) * factor)
    return total
