"""style_loss: values, gradients and second derivatives."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from feature_cases import (
    STYLES,
    check,
    check_style,
    feature_map,
    gram_factor,
    gram_formula,
    grams,
    style_call,
    style_formula,
    style_pair,
    style_settings,
    style_sizes,
)
from harness import (
    DTYPES,
    INTERPRETING,
    LAYOUTS,
    Backend,
    evaluate,
    generator,
    gradient_of,
    grid,
    laid_out,
)
from hypothesis import given
from hypothesis import strategies as st
from pixel_cases import on_device, skip_unsupported
from torch import Tensor

from inpaint_kernels.ops.gram import gram_matrix
from inpaint_kernels.ops.style import style_loss

SIZE = (2, 5, 9, 14)
# Layers of different size, as a trunk returns them.
LAYERS = ((2, 3, 12, 10), (2, 17, 6, 5), (2, 8, 3, 3))
WEIGHTS = (0.5, 2.0, 0.125)


def run(
    backend: Backend,
    style: str,
    pairs: Sequence[tuple[Tensor, Tensor]],
    *,
    weights: Sequence[float] | None = None,
) -> None:
    """One layer for each pair."""
    flat = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    skip_unsupported(backend, *flat)
    check_style(backend, on_device(backend, *flat), style_settings(style, weights))


@grid(style=STYLES, predictions=(2, 3))
def test_predictions_are_those_of_a_repeated_target(backend: Backend, style: str, predictions: int) -> None:
    """And k times the loss is the sum of the losses of the k predictions."""
    x, y = on_device(backend, *style_pair(SIZE, predictions=predictions))
    call = style_call(backend, style_settings(style))
    loss = call(x, y)
    torch.testing.assert_close(loss, call(x, y.repeat(predictions, 1, 1, 1)), rtol=1e-6, atol=0)
    apart = sum(call(part, y) for part in x.split(SIZE[0]))
    torch.testing.assert_close(predictions * loss, apart, rtol=1e-6, atol=0)


@grid(style=STYLES)
def test_other_size_of_the_target(backend: Backend, style: str) -> None:
    """A Gram matrix has no height and width: the style of a picture of any size."""
    run(backend, style, [style_pair(SIZE, predictions=2, target_plane=(5, 31))])


@grid(style=("chw-l1", "chw-l2", "gatys"), layout=("expanded", "transposed", "sliced"))
def test_strides_of_a_cached_gram(backend: Backend, style: str, layout: str) -> None:
    """One matrix for all samples, or any view; a matrix that is not symmetric counts entry by entry."""
    x, gram = grams([style_pair(SIZE)], style)
    gram = gram * (0.5 + torch.rand(gram.shape, generator=generator(5)))
    gram = gram[:1].expand(2, -1, -1) if layout == "expanded" else laid_out(gram, layout)
    flat = on_device(backend, x, gram)
    check_style(backend, flat, style_settings(style, target_is_gram=True), wanted=(0,))


@grid(style=STYLES, predictions=(1, 2))
def test_gradient_to_a_given_gram(style: str, predictions: int) -> None:
    """The automatic choice takes the differentiable formula."""
    x, gram = grams([style_pair(SIZE, predictions=predictions)], style)
    gram = gram * (0.5 + torch.rand(gram.shape, generator=generator(5)))
    check_style(None, [x, gram], style_settings(style, target_is_gram=True))


def test_cached_gram_of_the_package(backend: Backend) -> None:
    """Cached or not, the same loss and the same gradient, up to rounding."""
    x, y = on_device(backend, *style_pair(SIZE, predictions=2))
    for style, (normalize, _) in STYLES.items():
        cached = gram_matrix(y, normalize="none" if normalize == "gatys" else normalize, backend=backend.name)
        plain = evaluate(style_call(backend, style_settings(style)), [x, y], (0,))
        call = style_call(backend, style_settings(style, target_is_gram=True))
        result = evaluate(call, [x, cached], (0,), plain[2])
        for got, want in zip((*result[0], *result[1]), (*plain[0], *plain[1]), strict=True):
            torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6 * float(want.abs().max()))


def test_gatys_is_the_published_formula(backend: Backend) -> None:
    """sum_l w_l / (4 C^2 M^2) ||G - G'||_F^2 of unnormalised matrices, mean over the batch."""
    pairs = [style_pair(size, seed=i) for i, size in enumerate(LAYERS)]
    want = 0.0
    for (x, y), weight in zip(pairs, WEIGHTS, strict=True):
        n, c, h, w = x.shape
        for a, b in zip(x.double().view(n, c, h * w), y.double().view(n, c, h * w), strict=True):
            want += weight * float((a @ a.T - b @ b.T).norm() ** 2) / (4 * c**2 * (h * w) ** 2) / n
    flat = on_device(backend, *(x for x, _ in pairs), *(y for _, y in pairs))
    got = style_loss(flat[:3], flat[3:], weights=WEIGHTS, normalize="gatys", backend=backend.name)
    assert float(got) == pytest.approx(want, rel=2e-6)


def test_defaults(backend: Backend) -> None:
    x, y = on_device(backend, *style_pair(SIZE))
    assert torch.equal(
        style_loss(x, y, backend=backend.name), style_call(backend, style_settings("chw-l1"))(x, y)
    )
    both = style_loss((x, x), (y, y), weights=(1, 0.5), backend=backend.name)
    torch.testing.assert_close(both, 1.5 * style_loss(x, y, backend=backend.name), rtol=1e-6, atol=0)


@grid(style=STYLES, dtype=("f32", "f16"), layout=("contiguous", "channels_last"))
def test_signed_features(backend: Backend, style: str, dtype: str, layout: str) -> None:
    """Sums that cancel, as before an activation."""
    x = feature_map((2, 6, 11, 13), dtype, layout, seed=1)
    y = feature_map((2, 6, 11, 13), dtype, layout, seed=2)
    run(backend, style, [(x, y)])


@grid(style=STYLES, layout=("contiguous", "channels_last"), channels=(3, 64))
def test_identical_inputs(backend: Backend, style: str, layout: str, channels: int) -> None:
    """Ties: loss and gradients exactly 0, also when the two lie in different memory layouts."""
    x = on_device(backend, feature_map((2, channels, 9, 14), layout=layout))[0]
    call = style_call(backend, style_settings(style))
    (value,), gradients, _ = evaluate(call, (x, x.clone()), (0, 1))
    assert value == 0
    assert not any(g.any() for g in gradients)


@grid(style=("chw-l1", "none-l1"), dtype=("f32", "f16", "bf16"), apart=("2^-10", "2^-7"))
def test_signs_of_nearly_identical_inputs(backend: Backend, style: str, dtype: str, apart: str) -> None:
    """As near convergence: no sign of G - G' may come from a rounding that is not needed.

    The gradient is factor @ features, so with orthogonal features (one-hot pixels) it shows the signs one by one:
    the inputs are one-hot on the first C pixels, and what makes G differ lies behind them.
    """
    n, c, rest = 2, 12, 52
    rng_x, rng_y = (feature_map((n, c, 1, rest), seed=i, signed=False) for i in (1, 2))
    common = feature_map((n, c, 1, rest), seed=3, signed=False)
    step = 2.0 ** int(apart[2:])
    one_hot = torch.eye(c).expand(n, c, c).unsqueeze(2)
    x, y = (torch.cat([one_hot, common + step * noise], dim=3).to(DTYPES[dtype]) for noise in (rng_x, rng_y))
    settings = style_settings(style)
    _, (gradient,), _ = evaluate(
        style_call(backend, settings), on_device(backend, x, y), (0,), [torch.tensor(float(c**2))]
    )
    normalize = STYLES[style][0]
    d = gram_formula(x.double(), normalize) - gram_formula(y.double(), normalize)
    noise = 4 * torch.finfo(torch.float32).eps * gram_formula(x.double().abs(), normalize)
    clear = d.abs() > noise
    assert clear.float().mean() > 0.9
    if dtype != "f32":
        # The case is of use only if rounding the matrices to the dtype of the features would flip signs.
        rounded = (d + gram_formula(y.double(), normalize)).to(DTYPES[dtype]).double()
        rounded = rounded - gram_formula(y.double(), normalize).to(DTYPES[dtype]).double()
        assert (rounded.sign() != d.sign())[clear].any()
    signs = gradient[..., 0, :c].cpu().float().sign()
    assert torch.equal(signs[clear], d.sign().float()[clear])


@grid(style=STYLES, layout=("contiguous", "channels_last"))
def test_loud_float16_features(backend: Backend, style: str, layout: str) -> None:
    """Mean square 100 at 256x256; the weight brings the gradient of "none" into the range of float16."""
    plane = (16, 16) if INTERPRETING else (256, 256)
    x, y = style_pair((1, 3, *plane))
    pair = [laid_out((10 * t / t.square().mean().sqrt()).half(), layout) for t in (x, y)]
    run(backend, style, [(pair[0], pair[1])], weights=(1e-5 if style == "none-l2" else 1.0,))


@grid(style=("chw-l1", "chw-l2", "hw-l1", "gatys"))
def test_upstream_scale_comes_before_the_rounding(backend: Backend, style: str) -> None:
    """As under a GradScaler: without its factor these gradients are below the range of float16."""
    x, y = style_pair((2, 16, 20, 20), dtypes="f16/f16")
    settings = style_settings(style)
    truth = evaluate(
        partial(style_formula, **settings), [x.double(), y.double()], (0, 1), [torch.tensor(1.0)]
    )
    scale = 100 / float(truth[1][0].abs().max())
    upstream = torch.tensor(scale)
    _, gradients, _ = evaluate(
        style_call(backend, settings), on_device(backend, x, y), (0, 1), [upstream.to(backend.device)]
    )
    for got, want in zip(gradients, truth[1], strict=True):
        torch.testing.assert_close(
            got.cpu().double(), scale * want, rtol=1e-3, atol=1e-5 * scale * float(want.abs().max())
        )


def test_nan_reaches_the_loss(backend: Backend) -> None:
    for style in STYLES:
        for place in (0, 1):
            pair = [t.clone() for t in style_pair(SIZE)]
            pair[place][1, 2, 3, 4] = float("nan")
            assert style_call(backend, style_settings(style))(*on_device(backend, *pair)).isnan()


@given(
    size=st.tuples(st.integers(0, 2), st.integers(1, 20), st.integers(1, 12), st.integers(1, 12)),
    style=st.sampled_from(list(STYLES)),
    predictions=st.integers(1, 3),
    dtypes=st.tuples(*[st.sampled_from(("f16", "bf16", "f32"))] * 2),
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 2),
)
def test_any_input(
    backend: Backend,
    size: tuple[int, int, int, int],
    style: str,
    predictions: int,
    dtypes: tuple[str, str],
    layouts: tuple[str, str],
) -> None:
    pair = style_pair(
        size, predictions=predictions, dtypes="/".join(dtypes), layouts="/".join(layouts), seed=sum(size)
    )
    run(backend, style, [pair])


def test_gram_factor_of_the_tests() -> None:
    """The scale in the formula of these tests, against one that counts by hand."""
    x = torch.ones(1, 2, 3, 4)
    assert [float(gram_formula(x, n)[0, 0, 1]) for n in ("chw", "hw", "none")] == [0.5, 1.0, 12.0]
    assert gram_factor("gatys", 2, 12) == 1.0


# ---- second derivatives ------------------------------------------------------------------------------------------


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
