"""Gram matrices of feature maps, with a gradient that is not symmetric, as a cached target or a weighting gives.

The plain formula is the published one, `bmm / (c * h * w)`. The rewrite folds the scale into the product and
uses in its backward that (dG + dG^T) X is one product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .harness import Benchmark, Bytes, Case, Formula, Terms, feature_inputs


def _weighted(gram: Tensor, weights: Tensor) -> Terms:
    return ((gram * weights).sum(),)


def eager(case: Case) -> Formula:
    def formula(features: Tensor, weights: Tensor) -> Terms:
        n, c, h, w = features.shape
        flat = features.view(n, c, h * w)
        return _weighted(torch.bmm(flat, flat.transpose(1, 2)) / (c * h * w), weights)

    return formula


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        n, c, h, w = features.shape
        flat = features.reshape(n, c, h * w)
        ctx.save_for_backward(features)
        empty = flat.new_empty((n, c, c))
        return torch.baddbmm(empty, flat, flat.transpose(1, 2), beta=0.0, alpha=1.0 / (c * h * w))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (features,) = ctx.saved_tensors
        n, c, h, w = features.shape
        factor = (grad + grad.transpose(1, 2)) / (c * h * w)
        return torch.bmm(factor, features.reshape(n, c, h * w)).view(features.shape)


def rewrite(case: Case) -> Formula:
    return lambda features, weights: _weighted(_Gram.apply(features), weights)


def fused(case: Case, backend: str) -> Formula:
    import inpaint_kernels as ik

    return lambda features, weights: _weighted(ik.gram_matrix(features, backend=backend), weights)


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Tensor | None]:
    n, c = case.shape[:2]
    weights = torch.rand((n, c, c), generator=generator, device=device)
    features = feature_inputs(case, device, generator)["input0"]
    return {"features": features, "weights": weights.to(case.dtype)}


def minimum_bytes(case: Case) -> Bytes:
    """Forward reads the map, backward reads it again and writes its gradient."""
    size = case.numel * case.dtype.itemsize
    return Bytes(size, 2 * size)


BENCHMARK = Benchmark(
    op="gram",
    cases=[
        Case((4, 64, 256, 256), "chw"),
        Case((4, 256, 64, 64), "chw"),
        Case((1, 64, 8, 8), "chw", quick=True),
        Case((16, 64, 256, 256), "chw", torch.bfloat16, devices=("cuda",)),
    ],
    make_inputs=make_inputs,
    eager=eager,
    rewrite=rewrite,
    fused=fused,
    minimum_bytes=minimum_bytes,
    tolerances={torch.float32: 2e-5, torch.bfloat16: 2.0**-6},
)
