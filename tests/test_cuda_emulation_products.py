"""The products of the CUDA kernels of gram and style, run on the CPU: torch's precision setting, NaN and Inf.

At "highest" float32 features take three TF32 products, at "high" and "medium" one of the rounded operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch
from cuda_emulation import emulation  # noqa: F401
from feature_cases import (
    MATMUL_PRECISIONS,
    STYLES,
    check,
    check_style,
    feature_map,
    gram_call,
    gram_formula,
    gram_sizes,
    matmul_precision,
    style_call,
    style_formula,
    style_pair,
    style_settings,
    style_sizes,
)
from harness import EMULATED, EMULATING, INTERPRETING, Call, covering, evaluate, laid_out, same_bits
from torch import Tensor

pytestmark = pytest.mark.skipif(INTERPRETING or EMULATING, reason="runs with the compiled backends")

BOTH = ("contiguous", "channels_last")
INF, LARGEST = torch.inf, torch.finfo(torch.float32).max
# Relative error of a product of two operands with the 11 bits of TF32.
TF32 = 2.0**-10


def to_tf32(x: Tensor) -> Tensor:
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def check_one_product(call: Call, formula: Call, inputs: Sequence[Tensor], sizes: Call) -> None:
    """At "high" and "medium" results are wrong by what TF32 allows, and by much more than at "highest"."""
    wanted = range(len(inputs))
    outputs, gradients, upstream = evaluate(call, inputs, wanted)
    exact = [t.double() for t in inputs]
    truth, true_gradients, _ = evaluate(formula, exact, wanted, upstream)
    output_sizes, gradient_sizes = sizes(*exact, *(u.double() for u in upstream))
    size = [*output_sizes, *(gradient_sizes[i] for i in wanted)]

    def errors(found: Sequence[Tensor]) -> list[float]:
        triples = zip(found, (*truth, *true_gradients), size, strict=True)
        return [float(((got.double() - want).abs() / terms).max()) for got, want, terms in triples]

    least = errors((*outputs, *gradients))
    for precision in ("high", "medium"):
        with matmul_precision(precision):
            found, found_gradients, _ = evaluate(call, inputs, wanted, upstream)
        for i, error in enumerate(errors((*found, *found_gradients))):
            assert 8 * least[i] < error <= TF32, f"{precision}, result {i}: {error:.3g}, {least[i]:.3g}"
    with matmul_precision("highest"):
        again, again_gradients, _ = evaluate(call, inputs, wanted, upstream)
    assert all(map(same_bits, (*again, *again_gradients), (*outputs, *gradients)))


@covering(size=((2, 9, 5, 7), (1, 72, 9, 16), (1, 8, 32, 34)), layout=BOTH)
def test_precision_of_gram(size: tuple[int, int, int, int], layout: str) -> None:
    formula, sizes = (partial(f, normalize="chw") for f in (gram_formula, gram_sizes))
    check_one_product(gram_call(EMULATED, "chw"), formula, [feature_map(size, layout=layout)], sizes)


@covering(style=STYLES, layout=BOTH)
def test_precision_of_style(style: str, layout: str) -> None:
    settings = style_settings(style, weights=[1.0, 0.3])
    sizes = ((2, 9, 5, 6), (1, 70, 4, 4))
    flat = [feature_map(s, layout=layout, seed=i) for i, s in enumerate(sizes)]
    flat += [feature_map(s, seed=2 + i) for i, s in enumerate(sizes)]
    formula, terms = (partial(f, **settings) for f in (style_formula, style_sizes))
    check_one_product(style_call(EMULATED, settings), formula, flat, terms)


@covering(layout=BOTH, size=((1, 72, 9, 16), (2, 9, 5, 7)))
def test_operands_are_rounded_to_nearest(layout: str, size: tuple[int, int, int, int]) -> None:
    """One product is the three products of operands that have no low parts, to the bit."""
    x = feature_map(size, layout=layout)
    x[0, 0, 0, 0] = LARGEST
    # A factor that is exact in TF32.
    upstream = [torch.full((size[0], size[1], size[1]), 0.5)]
    call = gram_call(EMULATED, "none")
    rounded = to_tf32(x)
    rounded[0, 0, 0, 0] = 2.0**128 - 2.0**117
    want = evaluate(call, [laid_out(rounded, layout)], [0], upstream)
    with matmul_precision("high"):
        got = evaluate(call, [x], [0], upstream)
    assert all(map(same_bits, (*got[0], *got[1]), (*want[0], *want[1])))
    assert not same_bits(got[0][0], evaluate(call, [x], [0], upstream)[0][0])


def test_half_precision_ignores_the_setting() -> None:
    for dtype in ("f16", "bf16"):
        x = feature_map((2, 24, 6, 11), dtype)
        want = evaluate(gram_call(EMULATED, "chw"), [x], [0])
        with matmul_precision("high"):
            got = evaluate(gram_call(EMULATED, "chw"), [x], [0], want[2])
        assert all(map(same_bits, (*got[0], *got[1]), (*want[0], *want[1])))


def test_compiled_code_follows_the_setting() -> None:
    """Also where it was compiled at another one."""
    x, y = style_pair((1, 9, 5, 6))
    x = x + 0.001  # more bits than TF32 has
    call = style_call(EMULATED, style_settings("hw-l2"))
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    losses = []
    for precision in ("highest", "high", "highest"):
        with matmul_precision(precision):
            want = evaluate(call, [x, y], [0, 1])
            got = evaluate(compiled, [x, y], [0, 1], want[2])
        assert all(map(same_bits, (*got[0], *got[1]), (*want[0], *want[1])))
        losses.append(want[0][0])
    assert losses[0] == losses[2] != losses[1]


# ---- NaN and Inf -------------------------------------------------------------------------------------------------

SPECIALS = {
    "inf": {(2, 1): INF},
    "signs": {(2, 1): INF, (5, 1): -INF, (3, 1): 0.0, (4, 1): 1.0},  # Inf - Inf, Inf * 0, Inf * 1
    "scattered": {(2, 1): INF, (2, 7): -INF, (6, 11): INF},
    "nan": {(2, 5): torch.nan},
    "nan and inf": {(2, 5): torch.nan, (4, 5): INF, (4, 3): -INF},
}


def with_values(x: Tensor, values: dict[tuple[int, int], float]) -> Tensor:
    """Values at (channel, pixel) of the first sample."""
    x = x.clone(memory_format=torch.preserve_format)
    for (channel, pixel), value in values.items():
        x[0, channel, pixel // x.shape[3], pixel % x.shape[3]] = value
    return x


def same_places(got: Tensor, want: Tensor) -> bool:
    """NaN, Inf and -Inf where they should be."""
    return all(
        torch.equal(got == v if v == v else got.isnan(), want == v if v == v else want.isnan())
        for v in (INF, -INF, torch.nan)
    )


def check_places(call: Call, formula: Call, inputs: Sequence[Tensor]) -> None:
    """Also with one product a special value is where the definition has it."""
    wanted = range(len(inputs))
    with matmul_precision("high"):
        outputs, gradients, upstream = evaluate(call, inputs, wanted)
    truth, true_gradients, _ = evaluate(formula, [x.double() for x in inputs], wanted, upstream)
    assert all(map(same_places, (*outputs, *gradients), (*truth, *true_gradients)))


@covering(special=SPECIALS, size=((1, 9, 4, 5), (2, 72, 4, 4)), layout=BOTH, dtype=("f32", "bf16", "f16"))
def test_specials_of_gram(special: str, size: tuple[int, int, int, int], layout: str, dtype: str) -> None:
    """Where the definition has them, and what is finite as accurate as without them."""
    x = with_values(feature_map(size, dtype, layout), SPECIALS[special])
    formula, sizes = (partial(f, normalize="chw") for f in (gram_formula, gram_sizes))
    check(gram_call(EMULATED, "chw"), formula, [x], wanted=(0,), sizes=sizes)
    check_places(gram_call(EMULATED, "chw"), formula, [x])


@covering(special=SPECIALS, style=("chw-l1", "hw-l2"), dtype=("f32", "bf16", "f16"), layout=BOTH)
def test_specials_of_style(special: str, style: str, dtype: str, layout: str) -> None:
    x, y = style_pair((2, 72, 4, 4), dtypes=f"{dtype}/{dtype}", layouts=f"{layout}/{layout}")
    settings = style_settings(style)
    pair = [with_values(x, SPECIALS[special]), y]
    check_style(EMULATED, pair, settings)
    check_places(style_call(EMULATED, settings), partial(style_formula, **settings), pair)


@covering(layout=BOTH, dtype=("f32", "f16", "bf16"))
def test_infinite_gradients(layout: str, dtype: str) -> None:
    """Of one entry of a matrix: other rows stay finite and accurate."""
    x = feature_map((1, 12, 4, 5), dtype, layout)
    leaf = x.detach().requires_grad_()
    upstream = torch.rand((1, 12, 12), generator=torch.Generator().manual_seed(0)) + 0.5
    upstream *= 1e5  # beyond the range of half precision
    upstream[0, 3, 4] = INF
    (got,) = torch.autograd.grad(gram_call(EMULATED, "chw")(leaf), leaf, upstream)
    exact = x.double().requires_grad_()
    (want,) = torch.autograd.grad(gram_formula(exact, "chw"), exact, upstream.double())
    assert same_places(got, want)
    finite = [c for c in range(12) if c not in (3, 4)]
    assert got[:, finite].isfinite().all()
    torch.testing.assert_close(got[:, finite].double(), want[:, finite], rtol=0.02, atol=0.5)


@covering(layout=BOTH, size=((1, 9, 4, 5), (1, 72, 4, 4)))
def test_largest_numbers_stay_finite(layout: str, size: tuple[int, int, int, int]) -> None:
    """The largest float32 is beyond TF32, which would round it to Inf."""
    x = with_values(feature_map(size, layout=layout), {(c, 6): 1e-3 * c for c in range(size[1])})
    x = with_values(x, {(6, 6): LARGEST, (7, 6): 0.0})
    call, formula = gram_call(EMULATED, "chw"), partial(gram_formula, normalize="chw")
    truth, true_gradients, upstream = evaluate(formula, [x.double()], [0])
    for precision in MATMUL_PRECISIONS:
        with matmul_precision(precision):
            outputs, gradients, _ = evaluate(call, [x], [0], upstream)
        for got, want in ((outputs[0], truth[0]), (gradients[0], true_gradients[0])):
            fits = want.abs() < LARGEST  # all but the square
            assert int((~fits).sum()) <= 1
            torch.testing.assert_close(got[fits].double(), want[fits], rtol=TF32, atol=1e-3)
