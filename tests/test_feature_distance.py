"""feature_distance: values, gradients, second derivatives, and the gradients to a mask."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from feature_cases import (
    MASKS,
    check,
    check_distance,
    distance_call,
    distance_formula,
    distance_pair,
    distance_settings,
    distance_sizes,
    layer_mask,
)
from harness import LAYOUTS, Backend, assert_within_budget, evaluate, gradient_of, grid, laid_out
from hypothesis import given
from hypothesis import strategies as st
from pixel_cases import MASK_DTYPES, on_device, skip_unsupported, with_specials
from torch import Tensor

PENALTIES = ("l1", "l2", "charbonnier")
SIZE = (2, 5, 9, 14)
LAYERS = ((2, 3, 12, 10), (2, 17, 6, 5), (2, 8, 3, 3))
WEIGHTS = (0.5, 2.0, 0.125)


def run(
    backend: Backend | None,
    settings: dict[str, Any],
    pairs: Sequence[tuple[Tensor, Tensor]],
    masks: Sequence[Tensor | None] = (),
    wanted: Sequence[int] | None = None,
) -> None:
    flat = [x for x, _ in pairs] + [y for _, y in pairs] + [m for m in masks if m is not None]
    if backend is not None:
        skip_unsupported(backend, *flat[: 2 * len(pairs)])
        flat = on_device(backend, *flat)
    check_distance(backend, flat, len(pairs), settings, wanted)


@grid(penalty=PENALTIES, dtype=("f32", "bf16"))
def test_one_layer_in_float64(backend: Backend, penalty: str, dtype: str) -> None:
    """Makes the whole op float64."""
    pairs = [distance_pair(SIZE, dtypes=dtypes) for dtypes in (f"{dtype}/{dtype}", "f64/f64")]
    run(backend, distance_settings(penalty, weights=(1.0, 1e-9)), pairs)


@grid(
    mask=MASKS,
    predictions=(1, 3),
    layout=("contiguous", "channels_last"),
    normalize=("mask", "image"),
    penalty=PENALTIES,
    layer_reduction=("sum", "mean"),
    weights=(None, WEIGHTS, (1.0, 0.0, -2.0)),
)
def test_settings(
    backend: Backend,
    mask: str,
    predictions: int,
    layout: str,
    normalize: str,
    penalty: str,
    layer_reduction: str,
    weights: Sequence[float] | None,
) -> None:
    pairs = [
        distance_pair(size, predictions=predictions, layouts=f"{layout}/{layout}", seed=i)
        for i, size in enumerate(LAYERS)
    ]
    masks = [layer_mask(mask, size, predictions, seed=i) for i, size in enumerate(LAYERS)]
    settings = distance_settings(
        penalty, normalize=normalize, weights=weights, layer_reduction=layer_reduction
    )
    run(backend, settings, pairs, masks)


@grid(
    mask=("shared", "plane", "channels", "each-channels"),
    mask_layout=LAYOUTS,
    mask_dtype=MASK_DTYPES,
    layout=("contiguous", "channels_last"),
    dtype=("f32", "f16", "f64"),
)
def test_memory_of_masks(
    backend: Backend, mask: str, mask_layout: str, mask_dtype: str, layout: str, dtype: str
) -> None:
    options = {"dtypes": f"{dtype}/{dtype}", "layouts": f"{layout}/{layout}"}
    weights = laid_out(layer_mask(mask, SIZE, 2, mask_dtype), mask_layout)
    run(backend, distance_settings(), [distance_pair(SIZE, predictions=2, **options)], [weights])


def test_many_layers_of_many_kinds(backend: Backend) -> None:
    """Every layer with a dtype, a layout and a mask of its own, as feature matching under autocast has them."""
    kinds = [
        ((2, 3, 16, 16), "f32/f32", "contiguous/contiguous", "each"),
        ((2, 8, 8, 8), "bf16/f32", "channels_last/contiguous", "shared"),
        ((2, 16, 7, 5), "f16/bf16", "transposed/channels_last", "plane"),
        ((2, 1, 1, 1), "f32/f16", "contiguous/contiguous", "one"),
        ((2, 33, 2, 2), "bf16/bf16", "channels_last/channels_last", "channels"),
        ((2, 4, 31, 3), "f16/f16", "batch_inside/padded", "row"),
    ]
    pairs = [
        distance_pair(size, predictions=2, dtypes=dtypes, layouts=layouts, seed=i)
        for i, (size, dtypes, layouts, _) in enumerate(kinds)
    ]
    masks = [layer_mask(mask, size, 2, seed=i) for i, (size, _, _, mask) in enumerate(kinds)]
    for penalty in PENALTIES:
        run(backend, distance_settings(penalty), pairs, masks)


@grid(penalty=PENALTIES, predictions=(2, 3), layout=("contiguous", "channels_last"))
def test_predictions_are_those_of_a_repeated_target(
    backend: Backend, penalty: str, predictions: int, layout: str
) -> None:
    """The same loss and input gradients to the bit; k times the loss is the sum of the k losses."""
    x, y = on_device(backend, *distance_pair(SIZE, predictions=predictions, layouts=f"{layout}/{layout}"))
    call = distance_call(backend, 1, distance_settings(penalty))
    repeated = y.repeat(predictions, 1, 1, 1).contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    (shared,), (gradient,), upstream = evaluate(call, (x, y), (0,))
    (again,), (other,), _ = evaluate(call, (x, repeated), (0,), upstream)
    torch.testing.assert_close(shared, again, rtol=3e-7, atol=0)
    assert torch.equal(gradient, other)
    apart = sum(call(part, y) for part in x.split(SIZE[0]))
    torch.testing.assert_close(predictions * shared, apart, rtol=1e-6, atol=0)


@grid(
    penalty=PENALTIES,
    normalize=("mask", "image"),
    values=("zeros", "ones", "binary"),
    mask=("shared", "each"),
)
def test_whole_and_empty_masks(
    backend: Backend, penalty: str, normalize: str, values: str, mask: str
) -> None:
    """One layer with that mask beside one with fractions: an empty one counts 0."""
    pairs = [distance_pair(size, predictions=2, seed=i) for i, size in enumerate(LAYERS[:2])]
    masks = [layer_mask(mask, LAYERS[0], 2, values=values), layer_mask(mask, LAYERS[1], 2)]
    run(backend, distance_settings(penalty, normalize=normalize), pairs, masks)
    if values == "zeros":
        call = distance_call(backend, 1, distance_settings(penalty, normalize=normalize))
        (value,), gradients, _ = evaluate(call, on_device(backend, *pairs[0], masks[0]), (0, 1))
        assert value == 0
        assert not any(g.any() for g in gradients)


@grid(penalty=PENALTIES, layout=("contiguous", "channels_last"))
def test_identical_inputs(backend: Backend, penalty: str, layout: str) -> None:
    _, y = on_device(backend, *distance_pair(SIZE, layouts=f"{layout}/{layout}"))
    call = distance_call(backend, 1, distance_settings(penalty))
    (value,), gradients, _ = evaluate(call, (torch.cat([y, y]), y), (0, 1))
    if penalty != "charbonnier":
        assert value == 0
    assert not any(g.any() for g in gradients)


@grid(
    size=((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (0, 0, 0, 0)), penalty=PENALTIES, mask=("none", "shared")
)
def test_nothing_to_count(backend: Backend, size: tuple[int, int, int, int], penalty: str, mask: str) -> None:
    """Alone, and beside a layer that has something."""
    empty = (torch.randn(size), torch.randn(size))
    masks = [layer_mask(mask, size, 1), layer_mask(mask, SIZE, 1)]
    run(backend, distance_settings(penalty), [empty], masks[:1])
    run(backend, distance_settings(penalty), [empty, distance_pair(SIZE)], masks)


@grid(penalty=PENALTIES, dtypes=("f16/f16", "f16/f32", "bf16/f16"))
def test_extremes_do_not_overflow(backend: Backend, penalty: str, dtypes: str) -> None:
    pair = distance_pair(SIZE, predictions=2, dtypes=dtypes)
    pair[0][0, 0, 0], pair[1][0, 0, 0] = 65504, -65504
    pair[0][3, 2, 3], pair[1][1, 2, 3] = -6e-8, 6e-8
    run(backend, distance_settings(penalty), [pair])


@grid(penalty=PENALTIES, dtypes=("f16/f16", "bf16/f16", "f16/f32"), mask=("none", "shared"))
def test_upstream_scale_comes_before_the_rounding(
    backend: Backend, penalty: str, dtypes: str, mask: str
) -> None:
    """As under a GradScaler: 1/numel alone is below the range of float16."""
    pair = distance_pair((1, 64, 20, 20), predictions=2, dtypes=dtypes)
    flat = [*pair, *(m for m in [layer_mask(mask, (1, 64, 20, 20), 2)] if m is not None)]
    settings = distance_settings(penalty, weights=(0.001,))
    upstream = torch.tensor(2.0**24)
    formula = partial(distance_formula, layers=1, **settings)
    exact = [t.double() for t in flat]
    truth = evaluate(formula, exact, (0, 1), [upstream])[1]
    plain = evaluate(formula, [t.float() for t in flat], (0, 1), [upstream])[1]
    sizes = distance_sizes(*exact, upstream.double(), layers=1, **settings)[1]
    call = distance_call(backend, 1, settings)
    found = evaluate(call, on_device(backend, *flat), (0, 1), [upstream.to(backend.device)])[1]
    for i, (got, usual, want) in enumerate(zip(found, plain, truth, strict=True)):
        assert_within_budget(got, usual, want, acc=torch.float32, what=f"gradient {i}", magnitude=sizes[i])


@grid(penalty=PENALTIES, mask=("shared", "plane", "each-channels"), mask_dtype=("f32", "bool"))
def test_specials_outside_the_mask(backend: Backend, penalty: str, mask: str, mask_dtype: str) -> None:
    """What lies where the mask is 0 changes no bit of the loss or of a gradient."""
    x, y = distance_pair(SIZE, predictions=2)
    weights = layer_mask(mask, SIZE, 2, mask_dtype)
    full = weights.repeat(2, 1, 1, 1) if mask == "shared" else weights
    per_target = (full.expand(x.shape) == 0).unflatten(0, (2, 2)).all(0)
    call = distance_call(backend, 1, distance_settings(penalty))
    clean = evaluate(call, on_device(backend, x, y, weights), (0, 1))
    for dirty in (
        (with_specials(x, full == 0), y),
        (x, with_specials(y, per_target)),
        (with_specials(x, full == 0), with_specials(y, per_target)),
    ):
        result = evaluate(call, on_device(backend, *dirty, weights), (0, 1), clean[2])
        for got, want in zip((*result[0], *result[1]), (*clean[0], *clean[1]), strict=True):
            assert torch.equal(got, want)
            assert got.isfinite().all()


@grid(penalty=PENALTIES, special=("nan", "inf"), mask=("none", "shared"))
def test_counted_specials_propagate(backend: Backend, penalty: str, special: str, mask: str) -> None:
    """Into the loss and into no other gradient; sign(NaN) is 0, as in PyTorch."""
    x, y = distance_pair(SIZE, predictions=2)
    masks = [m for m in [layer_mask(mask, SIZE, 2, values="ones")] if m is not None]
    call = distance_call(backend, 1, distance_settings(penalty))
    clean = evaluate(call, on_device(backend, x, y, *masks), (0,))
    x[3, 2, 4, 5] = float(special)
    (value,), (gradient,), _ = evaluate(call, on_device(backend, x, y, *masks), (0,), clean[2])
    assert not value.isfinite()
    untouched = torch.ones_like(x, dtype=torch.bool)
    untouched[3, 2, 4, 5] = False
    assert torch.equal(gradient.cpu()[untouched], clean[1][0].cpu()[untouched])
    at = gradient[3, 2, 4, 5]
    if penalty == "l1":
        assert at == (0 if special == "nan" else clean[1][0].abs().max())
    else:
        assert not at.isfinite()


# ---- derivatives -------------------------------------------------------------------------------------------------


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
        values, gradients = distance_sizes(*flat, layers=1, **settings)
        by_mask = evaluate(formula, flat[:3], (2,), flat[3:])[1][0]
        return values, gradients | {2: by_mask.abs().max().expand(by_mask.shape)}

    formula = partial(distance_formula, layers=1, select=False, **settings)
    check(
        distance_call(None, 1, settings),
        formula,
        [*pair, layer_mask(mask, SIZE, 2)],
        wanted=(0, 1, 2),
        sizes=sizes,
    )


# ---- properties --------------------------------------------------------------------------------------------------


@given(
    size=st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 12), st.integers(1, 12)),
    predictions=st.integers(1, 3),
    dtypes=st.tuples(*[st.sampled_from(("f16", "bf16", "f32"))] * 2),
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 2),
    mask=st.sampled_from(list(MASKS)),
    mask_dtype=st.sampled_from(list(MASK_DTYPES)),
    settings=st.builds(
        distance_settings,
        st.sampled_from(PENALTIES),
        normalize=st.sampled_from(("mask", "image")),
        layer_reduction=st.sampled_from(("sum", "mean")),
    ),
)
def test_any_input(
    backend: Backend,
    size: tuple[int, int, int, int],
    predictions: int,
    dtypes: tuple[str, str],
    layouts: tuple[str, str],
    mask: str,
    mask_dtype: str,
    settings: dict[str, Any],
) -> None:
    pair = distance_pair(
        size, predictions=predictions, dtypes="/".join(dtypes), layouts="/".join(layouts), seed=sum(size)
    )
    run(backend, settings, [pair], [layer_mask(mask, size, predictions, mask_dtype)])


@given(
    size=st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12)),
    mask=st.sampled_from([m for m in MASKS if m != "none"]),
    penalty=st.sampled_from(PENALTIES),
)
def test_scaling_the_mask_changes_nothing(
    backend: Backend, size: tuple[int, int, int, int], mask: str, penalty: str
) -> None:
    """A power of two is exact in every sum and quotient."""
    x, y, weights = on_device(backend, *distance_pair(size, predictions=2), layer_mask(mask, size, 2))
    call = distance_call(backend, 1, distance_settings(penalty))
    first = evaluate(call, (x, y, weights), (0, 1))
    scaled = evaluate(call, (x, y, 4 * weights), (0, 1), first[2])
    for got, want in zip((*scaled[0], *scaled[1]), (*first[0], *first[1]), strict=True):
        assert torch.equal(got, want)
