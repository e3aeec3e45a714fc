"""hole_valid_loss: the loss inside the hole and on known pixels, from one pass."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from harness import (
    DTYPES,
    LAYOUTS,
    Backend,
    check_against_truth,
    evaluate,
    grid,
    laid_out,
    same_bits,
)
from hypothesis import given
from hypothesis import strategies as st
from pixel_cases import (
    GPU_SIZES,
    MASK_DTYPES,
    MASK_SHAPES,
    NORMALIZATIONS,
    PARAMS,
    PENALTIES,
    SIZES,
    hole_valid_call,
    hole_valid_formula,
    image_cases,
    image_pair,
    make_mask,
    masked_call,
    on_device,
    skip_unsupported,
    with_specials,
)
from torch import Tensor

import inpaint_kernels as ik
from inpaint_kernels.reference.hole_valid import hole_valid

# Planes of 126 elements: several vectors of 8 or 16, then a tail, in NCHW and in channels_last.
SIZE = (2, 3, 9, 14)
SHAPES = tuple(kind for kind in MASK_SHAPES if kind != "nomask")
MASK_IS = ("valid", "hole")


def check(
    backend: Backend,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    penalty: str = "l1",
    normalize: str = "image",
    mask_is: str = "valid",
) -> None:
    skip_unsupported(backend, pred, target)
    options = {"penalty": penalty, "normalize": normalize, "mask_is": mask_is}
    check_against_truth(
        hole_valid_call(backend, **options),
        partial(hole_valid_formula, **options),
        on_device(backend, pred, target, mask),
    )


@grid(penalty=PENALTIES, normalize=NORMALIZATIONS, mask_is=MASK_IS)
def test_core(backend: Backend, penalty: str, normalize: str, mask_is: str) -> None:
    check(backend, *image_pair(SIZE), make_mask("n1hw", SIZE), penalty, normalize, mask_is)


@grid(penalty=("l1", "l2"), normalize=("mask", "sample"), mask=SHAPES, layout=("contiguous", "channels_last"))
def test_mask_shapes(backend: Backend, penalty: str, normalize: str, mask: str, layout: str) -> None:
    pair = image_pair(SIZE, layouts=f"{layout}/{layout}")
    check(backend, *pair, make_mask(mask, SIZE), penalty, normalize)
    check(backend, *pair, make_mask(mask, SIZE).expand(SIZE), penalty, normalize)


@grid(mask=("n1hw", "hw", "nchw"), mask_layout=LAYOUTS, layout=("contiguous", "channels_last"))
def test_mask_layouts(backend: Backend, mask: str, mask_layout: str, layout: str) -> None:
    weights = laid_out(make_mask(mask, SIZE), mask_layout)
    check(backend, *image_pair(SIZE, layouts=f"{layout}/{layout}"), weights)


@grid(pred_layout=LAYOUTS, target_layout=LAYOUTS)
def test_layouts(backend: Backend, pred_layout: str, target_layout: str) -> None:
    for penalty in ("l1", "l2"):
        pair = image_pair(SIZE, layouts=f"{pred_layout}/{target_layout}")
        check(backend, *pair, make_mask("n1hw", SIZE), penalty)


@grid(penalty=("l1", "charbonnier"), target_dtype=DTYPES, pred_dtype=DTYPES)
def test_dtypes(backend: Backend, penalty: str, target_dtype: str, pred_dtype: str) -> None:
    check(backend, *image_pair(SIZE, f"{pred_dtype}/{target_dtype}"), make_mask("n1hw", SIZE), penalty)


@grid(dtype=MASK_DTYPES, mask=("n1hw", "nchw"), mask_is=MASK_IS, pred_dtype=("f32", "f16", "f64"))
def test_mask_dtypes(backend: Backend, dtype: str, mask: str, mask_is: str, pred_dtype: str) -> None:
    pair = image_pair(SIZE, f"{pred_dtype}/{pred_dtype}")
    check(backend, *pair, make_mask(mask, SIZE, dtype), "l1", "mask", mask_is)


@grid(size=SIZES, layout=("contiguous", "channels_last"), penalty=("l1", "huber"))
def test_sizes(backend: Backend, size: str, layout: str, penalty: str) -> None:
    pair = image_pair(SIZES[size], layouts=f"{layout}/{layout}")
    check(backend, *pair, make_mask("n1hw", SIZES[size]), penalty, "sample")


@grid(size=SIZES, mask=SHAPES, layout=("contiguous", "channels_last"))
def test_masks_of_zeros_and_ones(backend: Backend, size: str, mask: str, layout: str) -> None:
    """Which a backend may keep as bits; one fraction, in the last place, must undo that."""
    pair = image_pair(SIZES[size], layouts=f"{layout}/{layout}")
    weights = make_mask(mask, SIZES[size], values="binary")
    check(backend, *pair, weights, "l1", "mask")
    weights[(-1,) * weights.ndim] = 0.5
    check(backend, *pair, weights, "l1", "mask")


@grid(size=GPU_SIZES, layout=("contiguous", "channels_last"), penalty=("l1", "huber"), dtype=("f32", "bf16"))
def test_large_sizes(kernel: Backend, size: str, layout: str, penalty: str, dtype: str) -> None:
    if kernel.device != "cuda":
        pytest.skip("what a size changes on the CPU is in test_cpu_streaming.py")
    pair = image_pair(GPU_SIZES[size], f"{dtype}/{dtype}", f"{layout}/{layout}")
    check(kernel, *pair, make_mask("n1hw", GPU_SIZES[size]), penalty, "mask")


@grid(values=("zeros", "ones", "binary"), penalty=PENALTIES, normalize=NORMALIZATIONS)
def test_all_hole_and_all_valid(backend: Backend, values: str, penalty: str, normalize: str) -> None:
    """A region without pixels gives 0 with zero gradient, never 0/0."""
    check(backend, *image_pair(SIZE), make_mask("n1hw", SIZE, values=values), penalty, normalize)


@grid(normalize=NORMALIZATIONS, penalty=PENALTIES)
def test_one_empty_sample(backend: Backend, normalize: str, penalty: str) -> None:
    mask = make_mask("n1hw", SIZE)
    mask[0], mask[1] = 0, 1
    check(backend, *image_pair(SIZE), mask, penalty, normalize)


@grid(size=((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)), normalize=NORMALIZATIONS, penalty=("l1", "l2"))
def test_nothing_to_count(backend: Backend, size: tuple[int, ...], normalize: str, penalty: str) -> None:
    for mask in ("n1hw", "nchw"):
        check(backend, torch.randn(size), torch.randn(size), make_mask(mask, size), penalty, normalize)


@grid(normalize=NORMALIZATIONS, dtypes=("f16/f16", "f16/f32"), penalty=PENALTIES)
def test_extremes_do_not_overflow(backend: Backend, normalize: str, dtypes: str, penalty: str) -> None:
    pred, target = image_pair(SIZE, dtypes)
    pred[0, 0, 0], target[0, 0, 0] = 65504, -65504
    check(backend, pred, target, make_mask("n1hw", SIZE), penalty, normalize)


@grid(penalty=PENALTIES, region=("hole", "valid"), mask_is=MASK_IS, mask=("n1hw", "nchw"))
def test_specials_stay_in_their_region(
    backend: Backend, penalty: str, region: str, mask_is: str, mask: str
) -> None:
    """NaN and Inf in one region change no bit of the other region's loss and gradients."""
    weights = make_mask(mask, SIZE, values="binary")
    dirty_places = weights == (1.0 if region == mask_is else 0.0)
    pred, target = image_pair(SIZE)
    call = hole_valid_call(backend, penalty=penalty, normalize="mask", mask_is=mask_is)
    clean_region = 1 if region == "hole" else 0

    def one_term(*images: Tensor) -> Tensor:
        return call(*images)[clean_region]

    clean = evaluate(one_term, on_device(backend, pred, target, weights), (0, 1))
    dirty = on_device(backend, with_specials(pred, dirty_places), target, weights)
    result = evaluate(one_term, dirty, (0, 1), clean[2])
    for got, want in zip((*result[0], *result[1]), (*clean[0], *clean[1]), strict=True):
        assert torch.equal(got, want)
        assert got.isfinite().all()
    assert not call(*dirty)[1 - clean_region].isfinite()


@grid(penalty=PENALTIES, layout=("contiguous", "channels_last"))
def test_nan_reaches_its_own_gradient_only(backend: Backend, penalty: str, layout: str) -> None:
    pred, target = image_pair(SIZE, layouts=f"{layout}/{layout}")
    pred[1, 2, 8, 13] = float("nan")
    inputs = on_device(backend, pred, target, make_mask("n1hw", SIZE, values="ones"))
    (hole, valid), (gradient, _), _ = evaluate(
        hole_valid_call(backend, penalty=penalty, normalize="image"), inputs, (0, 1)
    )
    assert hole == 0
    assert valid.isnan()
    assert int((~gradient.isfinite()).sum()) == (0 if penalty == "l1" else 1)
    assert penalty != "l1" or gradient[1, 2, 8, 13] == 0  # as torch.sign


def test_returns_named_terms(backend: Backend) -> None:
    terms = ik.hole_valid_loss(*on_device(backend, *image_pair(SIZE), make_mask("n1hw", SIZE)))
    assert isinstance(terms, ik.HoleValid)
    assert terms.hole is terms[0]
    assert terms.valid is terms[1]


@given(
    case=image_cases(masks=SHAPES),
    penalty=st.sampled_from(PENALTIES),
    normalize=st.sampled_from(NORMALIZATIONS),
    mask_is=st.sampled_from(MASK_IS),
)
def test_any_input(
    backend: Backend, case: dict[str, Any], penalty: str, normalize: str, mask_is: str
) -> None:
    check(backend, **case, penalty=penalty, normalize=normalize, mask_is=mask_is)


@given(case=image_cases(masks=SHAPES), penalty=st.sampled_from(PENALTIES))
def test_the_terms_add_up_to_the_unmasked_loss(backend: Backend, case: dict[str, Any], penalty: str) -> None:
    """Normalised by the image, hole + valid is the plain mean: value and gradients."""
    pred, target, mask = on_device(backend, case["pred"].float(), case["target"].float(), case["mask"])
    terms = hole_valid_call(backend, penalty=penalty, normalize="image")
    whole = masked_call(backend, penalty=penalty, mode="image")
    (got,), gradients, upstream = evaluate(lambda p, t, m: sum(terms(p, t, m)), (pred, target, mask), (0, 1))
    (want,), expected, _ = evaluate(whole, (pred, target, None), (0, 1), upstream)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)


@given(case=image_cases(masks=SHAPES), penalty=st.sampled_from(PENALTIES), flip=st.booleans())
def test_each_term_is_a_masked_loss(backend: Backend, case: dict[str, Any], penalty: str, flip: bool) -> None:
    """Also names the region: a swap of the two terms would keep their sum."""
    pred, target, mask = on_device(backend, case["pred"], case["target"], case["mask"].float())
    terms = ik.hole_valid_loss(
        *(pred, target, mask),
        penalty=penalty,
        normalize="mask",
        mask_is="hole" if flip else "valid",
        eps=PARAMS["charbonnier"],
        delta=PARAMS["huber"],
        backend=backend.name,
    )
    loss = masked_call(backend, penalty=penalty, mode="mask")
    for got, weight in zip(terms, (mask, 1 - mask) if flip else (1 - mask, mask), strict=True):
        torch.testing.assert_close(got, loss(pred, target, weight), rtol=1e-5, atol=1e-30)


@given(case=image_cases(masks=SHAPES), penalty=st.sampled_from(PENALTIES))
def test_mask_is_hole_flips_the_names_only(backend: Backend, case: dict[str, Any], penalty: str) -> None:
    inputs = on_device(backend, *case.values())
    valid_first = hole_valid_call(backend, penalty=penalty, normalize="mask")(*inputs)
    hole_first = hole_valid_call(backend, penalty=penalty, normalize="mask", mask_is="hole")(*inputs)
    assert same_bits(valid_first.hole, hole_first.valid)
    assert same_bits(valid_first.valid, hole_first.hole)


def test_the_packages_reference_is_the_formula() -> None:
    for penalty, param in PARAMS.items():
        for normalize in NORMALIZATIONS:
            for mask_is in MASK_IS:
                options = {"penalty": penalty, "normalize": normalize, "mask_is": mask_is}
                check_against_truth(
                    partial(hole_valid, **options, param=param),
                    partial(hole_valid_formula, **options),
                    [*image_pair(SIZE), make_mask("n1hw", SIZE)],
                )
