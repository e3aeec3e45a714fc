"""What the objectives of several methods share."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Trunk = Callable[[Tensor, Sequence[str]], Sequence[Tensor]]
Terms = dict[str, Tensor]

# (mean, std) of the three channels.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LPIPS = ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))


def composite(pred: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """The truth where ``known`` is 1, the prediction where it is 0."""
    return known * target + (1 - known) * pred


def gram(features: Tensor) -> Tensor:
    n, c, h, w = features.shape
    flat = features.reshape(n, c, h * w)
    return torch.bmm(flat, flat.transpose(1, 2)) / (c * h * w)


def perceptual_l1(x: Sequence[Tensor], y: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """The sum over the layers, each with its weight, by default 1."""
    loss = x[0].new_zeros(())
    for a, b, weight in zip(x, y, weights or (1.0,) * len(x), strict=True):
        loss = loss + weight * F.l1_loss(a, b)
    return loss


def style_l1(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    loss = x[0].new_zeros(())
    for a, b in zip(x, y, strict=True):
        loss = loss + F.l1_loss(gram(a), gram(b))
    return loss


def log_loss(logits: Tensor, label: float) -> Tensor:
    """On the sigmoid in which the discriminator ends, as nn.BCELoss computes it."""
    probability = torch.sigmoid(logits)
    return F.binary_cross_entropy(probability, torch.full_like(probability, label))


_BUFFERS: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}


def normalized(images: Tensor, mean_std: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """(images - mean) / std; the constants are kept, as modules keep them in buffers."""
    key = (mean_std, images.dtype, images.device)
    if key not in _BUFFERS:
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in mean_std)
        _BUFFERS[key] = mean, std
    mean, std = _BUFFERS[key]
    return (images - mean) / std


def with_total(**terms: tuple[float, Tensor]) -> Terms:
    """The terms, each given with its weight, and ``"total"``, their weighted sum."""
    total = functools.reduce(operator.add, (weight * term for weight, term in terms.values()))
    return {"total": total, **{name: term for name, (_, term) in terms.items()}}


def log_loss_discriminator(real: Tensor, fake: Tensor) -> Terms:
    """The mean of both sides (CTN, T-former, EdgeConnect)."""
    on_real, on_fake = log_loss(real, 1.0), log_loss(fake, 0.0)
    return {"total": (on_real + on_fake) / 2, "real": on_real, "fake": on_fake}


def squared_gradient_norm(logits: Tensor, images: Tensor) -> Tensor:
    """(N,): of the summed logits by each image, differentiable once more."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum([1, 2, 3])
