"""gram_matrix."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from feature_cases import (
    CHANNELS,
    GRAM_NORMALIZATIONS,
    check,
    feature_map,
    gram_call,
    gram_formula,
    gram_sizes,
)
from harness import DTYPES, EMULATING, INTERPRETING, LAYOUTS, Backend, evaluate, gradient_of, grid, laid_out
from hypothesis import given
from hypothesis import strategies as st
from op_cases import OPS, Op
from op_choices import ops
from pixel_cases import on_device
from torch import Tensor

SIZE = (2, 5, 9, 14)


def test_exactly_symmetric(backend: Backend) -> None:
    for channels in CHANNELS:
        for layout in ("contiguous", "channels_last"):
            x = on_device(backend, feature_map((2, channels, 8, 9), layout=layout))[0]
            gram = gram_call(backend, "chw")(x)
            assert torch.equal(gram, gram.mT)


@grid(
    channels=(200, 400),
    plane=((5, 7), (12, 13)),
    layout=("contiguous", "channels_last"),
    dtype=("f32", "f16"),
)
def test_many_channels_of_few_pixels(
    backend: Backend, channels: int, plane: tuple[int, int], layout: str, dtype: str
) -> None:
    """The CPU's backward takes such maps in bands of 192 channels, which the other sizes do not reach."""
    if INTERPRETING or EMULATING:
        pytest.skip("other kernels have no such bands")
    OPS["gram chw"].check_on(backend, [feature_map((2, channels, *plane), dtype, layout)])


@grid(op=ops("gram"), layout=("contiguous", "channels_last"))
def test_loud_float16_features(backend: Backend, op: Op, layout: str) -> None:
    """Mean square 100 at 256x256: the plain sums pass 6.5e6, a hundred times the range of float16."""
    plane = (16, 16) if INTERPRETING else (256, 256)
    x = (10 * feature_map((1, 3, *plane))).half()
    op.check_on(backend, [laid_out(x, layout)])
    x[..., 0] = 65504
    op.check_on(backend, [laid_out(x, layout)])


@grid(op=ops("gram"), dtype=("f16", "bf16"))
def test_quiet_features(backend: Backend, op: Op, dtype: str) -> None:
    """Products far below the normal range of float16."""
    x = (1e-4 * feature_map(SIZE)).to(DTYPES[dtype])
    op.check_on(backend, [x])
    assert gram_call(backend, "chw")(x.to(backend.device)).diagonal(dim1=1, dim2=2).all()


def test_upstream_scale_comes_before_the_rounding(backend: Backend) -> None:
    """As under a GradScaler: the gradient of float16 features would underflow without the upstream factor."""
    x = on_device(backend, (0.01 * feature_map(SIZE)).half())[0]
    upstream = torch.full((2, 5, 5), 2.0**16, device=backend.device)
    _, (got,), _ = evaluate(gram_call(backend, "chw"), [x], (0,), [upstream])
    _, (want,), _ = evaluate(OPS["gram chw"].formula, [x.cpu().double()], (0,), [upstream.cpu()])
    torch.testing.assert_close(got.cpu().double(), want, rtol=2e-3, atol=0.06)
    assert got.isfinite().all()


@grid(special=("nan", "inf"), channels=(3, 17, 70), layout=("contiguous", "channels_last"))
def test_specials_stay_in_their_channel(backend: Backend, special: str, channels: int, layout: str) -> None:
    x = feature_map((2, channels, 5, 7), layout=layout)
    clean = gram_call(backend, "chw")(on_device(backend, x)[0]).cpu()
    x[1, 2, 4, 6] = float(special)
    gram = gram_call(backend, "chw")(on_device(backend, x)[0]).cpu()
    touched = torch.zeros(2, channels, channels, dtype=torch.bool)
    touched[1, 2] = touched[1, :, 2] = True
    torch.testing.assert_close(
        gram[touched].double(), gram_formula(x.double(), "chw")[touched], equal_nan=True
    )
    assert not gram[touched].isfinite().any()
    assert torch.equal(gram[~touched], clean[~touched])


@grid(normalize=GRAM_NORMALIZATIONS, layout=("contiguous", "channels_last"))
def test_second_derivatives(backend: Backend, normalize: str, layout: str) -> None:
    """By the features and by the gradient of the matrix."""
    x = on_device(backend, feature_map(SIZE, layout=layout))[0]

    def sizes(x: Tensor, upstream: Tensor, second: Tensor) -> tuple[list[Tensor], dict[int, Tensor]]:
        by_features = gram_sizes(second, upstream, normalize=normalize)[1][0]
        # s (V X^T + X V^T)
        by_upstream = gram_sizes(x.abs() + second.abs(), upstream, normalize=normalize)[0][0]
        return [gram_sizes(x, upstream, normalize=normalize)[1][0]], {0: by_features, 1: by_upstream}

    check(
        gradient_of(gram_call(backend, normalize), (0,)),
        gradient_of(partial(gram_formula, normalize=normalize), (0,)),
        [x, torch.rand(2, 5, 5, device=backend.device)],
        wanted=(0, 1),
        sizes=sizes,
    )


@given(
    size=st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from(("f16", "bf16", "f32")),
    layout=st.sampled_from(list(LAYOUTS)),
    op=st.sampled_from(ops("gram")),
)
def test_any_input(backend: Backend, size: tuple[int, ...], dtype: str, layout: str, op: Op) -> None:
    op.check_on(backend, [feature_map(size, dtype, layout, seed=sum(size))])
