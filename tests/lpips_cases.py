"""Formula, inputs and checks of lpips_distance, written from the definition, without the package's reference.

Layers travel flat, (*inputs, *targets, *masks), as in `feature_cases`; weights follow from the number of channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from feature_cases import check, layers_by_prediction
from harness import Backend, Call, backend_for
from torch import Tensor

from inpaint_kernels.ops.lpips import lpips_distance

EPS = 1e-10


def heads(channels: int, device: Any = "cpu") -> Tensor:
    """1, 2, 3, 4, 0, 1, ...: also a weight that switches its channel off."""
    return ((torch.arange(channels, device=device) + 1) % 5).float()


def zero_vectors(x: Tensor) -> Tensor:
    return (x == 0).all(1, keepdim=True)


def norm(x: Tensor) -> Tensor:
    """Of every pixel's channels; not 0 for zero vectors, which are put right behind it."""
    return torch.where(zero_vectors(x), 1.0, x).square().sum(1, keepdim=True).sqrt()


def unit(x: Tensor) -> Tensor:
    """A zero vector stays one, with gradient 0."""
    return torch.where(zero_vectors(x), 0.0, x / (norm(x) + EPS))


def _shares(mask: Tensor) -> Tensor:
    """What each pixel counts in its sample's mean, (k N, 1, H, W)."""
    plane = mask[:, :1]
    total = plane.sum((1, 2, 3), keepdim=True)
    return torch.where(total == 0, 0.0 * plane, plane / torch.where(total == 0, 1.0, total))


def _layers(flat: Sequence[Tensor], layers: int, select: bool) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(x, y, shares, weights) of every layer; `select`: without what lies where the mask is 0."""
    found = []
    for x, y, mask in layers_by_prediction(flat, layers):
        if select:
            x, y = x.masked_fill(mask == 0, 0.0), y.masked_fill(mask == 0, 0.0)
        found.append((x, y, _shares(mask), heads(x.shape[1]).to(x.dtype).reshape(-1, 1, 1)))
    return found


def lpips_formula(*flat: Tensor, layers: int = 2, select: bool = True, reduction: str = "none") -> Tensor:
    total = flat[0].new_zeros(flat[0].shape[0])
    for x, y, shares, weights in _layers(flat, layers, select):
        total = total + (shares * weights * (unit(x) - unit(y)).square()).sum((1, 2, 3))
    if reduction == "none":
        return total
    return total.sum() / (max(total.shape[0], 1) if reduction == "mean" else 1)


def lpips_sizes(
    *flat: Tensor, layers: int = 2, reduction: str = "none"
) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Of the terms that cancel: u and v in their difference, and a gradient's part along its vector."""
    *flat, upstream = flat
    if reduction == "mean":
        upstream = upstream / max(flat[0].shape[0], 1)
    total, gradients = flat[0].new_zeros(flat[0].shape[0]), {}
    for i, (x, y, shares, weights) in enumerate(_layers(flat, layers, True)):
        u, v = unit(x).abs(), unit(y).abs()
        # Rounding alone makes a difference of equal vectors.
        apart = (unit(x) - unit(y)).abs() + torch.finfo(torch.float32).eps * (u + v)
        total = total + (shares.abs() * weights * apart * (u + v)).sum((1, 2, 3))
        slope = 2 * weights * (u + v) * shares.abs() * upstream.abs().reshape(-1, 1, 1, 1)
        for place, maps, units in ((i, x, u), (layers + i, y, v)):
            size = (slope + units * (slope * units).sum(1, keepdim=True)) / norm(maps)
            gradients[place] = torch.where(zero_vectors(maps), 0.0, size)
        n = flat[layers + i].shape[0]
        gradients[layers + i] = (
            gradients[layers + i].unflatten(0, (-1, n)).sum(0) if n else 0 * flat[layers + i]
        )
    if reduction != "none":
        total = total.sum() / (max(total.shape[0], 1) if reduction == "mean" else 1)
    return [total], gradients


def lpips_call(backend: Backend | None, layers: int = 2, reduction: str = "none") -> Call:
    name = backend_for("lpips_distance", backend)

    def call(*flat: Tensor) -> Tensor:
        return lpips_distance(
            list(flat[:layers]),
            list(flat[layers : 2 * layers]),
            [heads(x.shape[1], x.device) for x in flat[:layers]],
            mask=list(flat[2 * layers :]) or None,
            reduction=reduction,
            backend=name,
        )

    return call


def check_lpips(
    backend: Backend | None,
    flat: Sequence[Tensor],
    layers: int,
    reduction: str = "none",
    wanted: Sequence[int] | None = None,
) -> None:
    check(
        lpips_call(backend, layers, reduction),
        partial(lpips_formula, layers=layers, reduction=reduction),
        flat,
        wanted=range(2 * layers) if wanted is None else wanted,
        sizes=partial(lpips_sizes, layers=layers, reduction=reduction),
        masks=len(flat) - 2 * layers,
    )
