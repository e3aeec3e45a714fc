"""style_loss: second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from feature_cases import (
    STYLES,
    check,
    grams,
    style_call,
    style_formula,
    style_pair,
    style_settings,
    style_sizes,
)
from harness import Backend, evaluate, gradient_of, grid
from pixel_cases import on_device, skip_unsupported
from torch import Tensor

SIZE = (2, 5, 9, 14)
LAYERS = ((2, 3, 12, 10), (2, 17, 6, 5))
WEIGHTS = (0.5, 2.0)


@grid(style=STYLES, predictions=(1, 2), target=("features", "other size", "gram"))
def test_second_derivatives(backend: Backend, style: str, predictions: int, target: str) -> None:
    """By input, target and the upstream gradient."""
    plane = (3, 7) if target == "other size" else None
    pair = style_pair((2, 4, 5, 6), predictions=predictions, target_plane=plane)
    cached = target == "gram"
    flat = on_device(backend, *(grams([pair], style) if cached else pair))
    settings = style_settings(style, (0.7,), target_is_gram=cached)
    formula = partial(style_formula, **settings)
    firsts = (0,) if cached else (0, 1)

    def sizes(x: Tensor, y: Tensor, upstream: Tensor, *seconds: Tensor) -> tuple[list[Tensor], Any]:
        first = style_sizes(x, y, upstream, **settings)[1]
        wanted = (*firsts, 2)
        exact = evaluate(gradient_of(formula, firsts), [x, y, upstream], wanted, seconds)[1]
        # Sums over a whole layer of both signs, of terms as large as the largest.
        found = {i: g.abs().max().expand(g.shape) for i, g in zip(wanted, exact, strict=True)}
        found[2] = sum((first[i] * second.abs()).sum() for i, second in zip(firsts, seconds)) / upstream
        return [first[i] for i in firsts], found

    check(
        gradient_of(style_call(backend, settings), firsts),
        gradient_of(formula, firsts),
        [*flat, torch.tensor(1.3, device=backend.device)],
        wanted=(*firsts, 2),
        sizes=sizes,
    )


@grid(
    style=("chw-l1", "chw-l2", "gatys"),
    dtypes=("f16/f64", "bf16/f64", "f64/f32"),
    predictions=(1, 2),
    cached=(False, True),
)
def test_one_side_in_float64(
    backend: Backend, style: str, dtypes: str, predictions: int, cached: bool
) -> None:
    """Matrices, differences and all derivatives by the float64 side are those of float64."""
    pair = style_pair((2, 4, 5, 6), predictions=predictions, dtypes=dtypes)
    settings = style_settings(style, (0.7,), target_is_gram=cached)
    flat = grams([pair], style) if cached else pair
    skip_unsupported(backend, *flat)
    wide = next(i for i, t in enumerate(flat) if t.dtype == torch.float64)
    # Only the automatic choice has a gradient to given matrices.
    call = style_call(None if cached and wide == 1 else backend, settings)

    def derivatives(call: Any, flat: Sequence[Tensor]) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_(i == wide) for i, t in enumerate(flat)]
        loss = call(*leaves)
        (plain,) = torch.autograd.grad(loss, leaves[wide], retain_graph=True)
        (first,) = torch.autograd.grad(loss, leaves[wide], create_graph=True)
        upstream = torch.linspace(-1, 1, first.numel(), dtype=first.dtype).reshape(first.shape)
        second = torch.autograd.grad(first, leaves[wide], upstream, allow_unused=True)[0]
        return loss.detach(), plain, first.detach(), second

    found = derivatives(call, flat)
    truth = derivatives(partial(style_formula, **settings), [t.double() for t in flat])
    for got, want in zip(found, truth, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))


def test_cached_gram_needs_no_features(backend: Backend) -> None:
    """A Gram matrix of the truth without gradient: second derivatives by the input still work."""
    x, gram = on_device(backend, *grams([style_pair(SIZE)], "chw-l2"))
    x.requires_grad_()
    loss = style_call(backend, style_settings("chw-l2", target_is_gram=True))(x, gram)
    (first,) = torch.autograd.grad(loss, x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.isfinite().all()
    assert second.any()
