"""hole_valid_loss: the loss inside the hole and on known pixels, from one pass."""

from __future__ import annotations

from typing import Any

import torch
from harness import (
    Backend,
    evaluate,
    grid,
)
from hypothesis import given
from hypothesis import strategies as st
from pixel_cases import (
    MASK_SHAPES,
    PARAMS,
    PENALTIES,
    hole_valid_call,
    image_cases,
    image_pair,
    make_mask,
    masked_call,
    on_device,
    with_specials,
)
from torch import Tensor

import inpaint_kernels as ik

# Planes of 126 elements: several vectors of 8 or 16, then a tail, in NCHW and in channels_last.
SIZE = (2, 3, 9, 14)
SHAPES = tuple(kind for kind in MASK_SHAPES if kind != "nomask")
MASK_IS = ("valid", "hole")


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
