"""Losses on frozen-trunk features, plain or streamed.

A frozen trunk needs no activation after its own backward. Streaming therefore runs trunk forward and backward for a
few samples at a time inside the loss's forward, and keeps only the gradient of the images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# (features of the predictions, features of the target) -> scalar, a mean over the predictions
Term = Callable[[list[Tensor], list[Tensor]], Tensor]


class _RefuseSecond(torch.autograd.Function):
    """kept * grad; a derivative of it is refused, because the activations it needs are gone.

    `pred` is a graph input so that the error is met on the way to it, also with `allow_unused=True`.
    """

    @staticmethod
    def forward(ctx: Any, kept: Tensor, grad: Tensor, pred: Tensor) -> Tensor:
        return (kept * grad).to(pred.dtype)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise RuntimeError(
            "the streamed loss keeps no activations, so it has no second derivative; "
            "use the plain path (chunk=None) under create_graph=True"
        )


class _Streamed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,  # [k * N, C, H, W]
        target: Tensor,  # [N, C, H, W]
        trunk: nn.Module,
        terms: Sequence[Term],
        weights: Sequence[float],
        chunk: int,
    ) -> tuple[Tensor, ...]:
        samples = target.shape[0]
        copies = pred.shape[0] // samples if samples else 0
        needed = ctx.needs_input_grad[0]
        # float16 would underflow here: a GradScaler multiplies only afterwards.
        kept = torch.empty_like(pred, dtype=torch.float32 if pred.dtype == torch.float16 else pred.dtype)
        values: list[Tensor | None] = [None] * len(terms)
        for begin in range(0, samples, chunk):
            end = min(begin + chunk, samples)
            rows = [slice(copy * samples + begin, copy * samples + end) for copy in range(copies)]
            with torch.no_grad():
                goal = trunk(target[begin:end])
            images = torch.cat([pred[row] for row in rows]) if copies > 1 else pred[rows[0]]
            with torch.enable_grad():
                images = images.detach().requires_grad_(needed)
                features = trunk(images)
                found = [term(features, goal) * ((end - begin) / samples) for term in terms]
                total = _weighted_sum(found, weights)
            if needed:
                (grad,) = torch.autograd.grad(total, images)
                for row, part in zip(rows, grad.split(end - begin), strict=True):
                    kept[row] = part
            del features, goal
            values = [
                one.detach() if old is None else old + one.detach()
                for old, one in zip(values, found, strict=True)
            ]
        if samples == 0:
            values = [pred.new_zeros((), dtype=torch.float32) for _ in terms]
        ctx.save_for_backward(kept, pred)
        done = [value for value in values if value is not None]
        total = _weighted_sum(done, weights)
        ctx.mark_non_differentiable(*done)
        ctx.set_materialize_grads(False)
        return (total if len(done) > 1 else total.clone(), *done)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        if grad is None:
            return (None,) * 6
        kept, pred = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (_RefuseSecond.apply(kept, grad, pred), *(None,) * 5)
        return ((kept * grad).to(pred.dtype), *(None,) * 5)


def _weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = values[0] * weights[0]
    for value, weight in zip(values[1:], weights[1:], strict=True):
        total = total + value * weight
    return total


def check_images(pred: Tensor, target: Tensor) -> None:
    """pred (k N, C, H, W) against target (N, C, H, W)."""
    for name, value in (("pred", pred), ("target", target)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
        if value.ndim != 4:
            raise ValueError(f"{name} must have shape (N, C, H, W), got {tuple(value.shape)}")
    batches_fit = pred.shape[0] % target.shape[0] == 0 if target.shape[0] else pred.shape[0] == 0
    if not batches_fit or pred.shape[1:] != target.shape[1:]:
        raise ValueError(
            f"pred has shape {tuple(pred.shape)}; for target {tuple(target.shape)} it must be the same, "
            "or a whole number of batches of it in the order of torch.cat"
        )


def trunk_terms(
    trunk: nn.Module,
    terms: Sequence[Term],
    weights: Sequence[float],
    pred: Tensor,
    target: Tensor,
    chunk: int | None,
) -> tuple[Tensor, ...]:
    """(weighted total, *terms) of one trunk pass over the predictions and one, without gradient, over the target.

    Streamed (`chunk` samples of the target at a time), only the total is differentiable.
    """
    check_images(pred, target)
    if chunk is not None:
        if target.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "target requires a gradient, which the streamed loss does not compute; chunk=None does"
            )
        return _Streamed.apply(pred, target, trunk, tuple(terms), tuple(weights), chunk)
    features = trunk(pred)
    with torch.set_grad_enabled(torch.is_grad_enabled() and target.requires_grad):
        goal = trunk(target)
    found = [term(features, goal) for term in terms]
    return (_weighted_sum(found, weights), *found)
