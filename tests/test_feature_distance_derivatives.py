"""feature_distance: second derivatives, and the gradients to a mask."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from feature_cases import (
    MASKS,
    check,
    distance_call,
    distance_formula,
    distance_pair,
    distance_settings,
    distance_sizes,
    layer_mask,
)
from harness import Backend, evaluate, gradient_of, grid
from pixel_cases import on_device, skip_unsupported
from torch import Tensor

PENALTIES = ("l1", "l2", "charbonnier")
SIZE = (2, 5, 9, 14)


@grid(penalty=PENALTIES, mask=MASKS, layout=("contiguous", "channels_last"))
def test_second_derivatives(backend: Backend, penalty: str, mask: str, layout: str) -> None:
    predictions = 2 if layout == "contiguous" else 1
    pair = distance_pair(SIZE, predictions=predictions, layouts=f"{layout}/{layout}")
    masks = [m for m in [layer_mask(mask, SIZE, predictions)] if m is not None]
    settings = distance_settings(penalty, weights=(0.7,))
    formula = partial(distance_formula, layers=1, **settings)

    def inner(call: Any) -> Any:
        # (input, target, upstream, *masks): the upstream gradient last is what `gradient_of` expects.
        return lambda x, y, up, *masks: gradient_of(lambda a, b: call(a, b, *masks))(x, y, up)

    def sizes(x: Tensor, y: Tensor, up: Tensor, *rest: Tensor) -> tuple[list[Tensor], dict[int, Tensor]]:
        masks, seconds = rest[: len(rest) - 2], rest[len(rest) - 2 :]
        first = distance_sizes(x, y, *masks, up, layers=1, **settings)[1]
        exact = evaluate(inner(formula), [x, y, up, *masks], (0, 1, 2), seconds)[1]
        largest = [g.abs().max().expand(g.shape) for g in exact[:2]]
        whole = sum((first[i] * seconds[i].abs()).sum() for i in (0, 1)) / up
        return [first[0], first[1]], {0: largest[0], 1: largest[1], 2: whole}

    up = torch.tensor(1.3)
    check(
        inner(distance_call(backend, 1, settings)),
        inner(formula),
        on_device(backend, *pair, up, *masks),
        wanted=(0, 1, 2),
        sizes=sizes,
    )


@grid(penalty=("l2", "charbonnier"), dtypes=("f16/f64", "bf16/f64", "f64/f32"), predictions=(1, 2))
def test_second_derivatives_with_one_side_in_float64(
    backend: Backend, penalty: str, dtypes: str, predictions: int
) -> None:
    """The other side joins it, with all derivatives by the float64 side."""
    pair = distance_pair(SIZE, predictions=predictions, dtypes=dtypes)
    skip_unsupported(backend, *pair)
    settings = distance_settings(penalty)
    wide = next(i for i, t in enumerate(pair) if t.dtype == torch.float64)

    def second(call: Any, flat: Sequence[Tensor]) -> Tensor:
        leaves = [t.detach().requires_grad_() for t in flat]
        (first,) = torch.autograd.grad(call(*leaves), leaves[wide], create_graph=True)
        upstream = torch.linspace(-1, 1, first.numel(), dtype=first.dtype).reshape(first.shape)
        return torch.autograd.grad(first, leaves[wide], upstream)[0]

    got = second(distance_call(backend, 1, settings), pair)
    want = second(partial(distance_formula, layers=1, **settings), [t.double() for t in pair])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))


@grid(penalty=PENALTIES, mask=("one", "plane", "shared", "each-channels"), normalize=("mask", "image"))
def test_gradient_to_the_mask(penalty: str, mask: str, normalize: str) -> None:
    """The automatic choice takes the differentiable formula, with the full derivative also at weight 0."""
    pair = distance_pair(SIZE, predictions=2)
    settings = distance_settings(penalty, normalize=normalize)

    def sizes(*flat: Tensor) -> tuple[list[Tensor], dict[int, Tensor]]:
        values, found = distance_sizes(*flat, layers=1, **settings)
        by_mask = evaluate(formula, flat[:3], (2,), flat[3:])[1][0]
        return values, found | {2: by_mask.abs().max().expand(by_mask.shape)}

    formula = partial(distance_formula, layers=1, select=False, **settings)
    check(
        distance_call(None, 1, settings),
        formula,
        [*pair, layer_mask(mask, SIZE, 2)],
        wanted=(0, 1, 2),
        sizes=sizes,
    )
