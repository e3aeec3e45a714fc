"""inpainting_pixel_loss: hole, valid and total variation of the composite from one pass."""

from __future__ import annotations

from functools import partial
from itertools import combinations
from typing import Any

import torch
from harness import (
    Backend,
    check_against_truth,
    evaluate,
    grid,
)
from hypothesis import given
from hypothesis import strategies as st
from pairs_cases import (
    MASK_IS,
    MODES,
    PENALTIES,
    TERM_WEIGHTS,
    TERMS,
    inpainting_pixel_call,
    inpainting_pixel_formula,
    region_cases,
    region_mask,
    regions_of,
    total_variation_call,
)
from pixel_cases import (
    NORMALIZATIONS,
    hole_valid_call,
    image_pair,
    make_mask,
    on_device,
    with_specials,
)
from torch import Tensor

import inpaint_kernels as ik

SIZE = (2, 3, 9, 14)
DEFAULT = "dilated_hole-default"


@grid(side=("pred", "target"), mask_is=MASK_IS, mask=("n1hw", "nchw"), penalty=PENALTIES)
def test_specials_stay_on_their_side(
    backend: Backend, side: str, mask_is: str, mask: str, penalty: str
) -> None:
    """NaN and Inf of pred on known pixels reach `valid` alone, those of target in the hole `hole` alone."""
    weights = make_mask(mask, SIZE, values="binary")
    hole, valid = regions_of(weights, SIZE, mask_is)
    pair = list(image_pair(SIZE))
    call = inpainting_pixel_call(backend, normalize="mask", mode=DEFAULT, penalty=penalty, mask_is=mask_is)
    clean_terms = (1, 3) if side == "pred" else (2, 3)

    def clean_part(*images: Tensor) -> tuple[Tensor, ...]:
        terms = call(*images)
        return tuple(terms[i] for i in clean_terms)

    clean = evaluate(clean_part, on_device(backend, *pair, weights), (0, 1))
    index, weight = (0, hole) if side == "pred" else (1, valid)
    pair[index] = with_specials(pair[index], weight == 0)
    dirty = on_device(backend, *pair, weights)
    result = evaluate(clean_part, dirty, (0, 1), clean[2])
    for got, want in zip((*result[0], *result[1]), (*clean[0], *clean[1]), strict=True):
        assert torch.equal(got, want)
        assert got.isfinite().all()
    terms = call(*dirty)
    assert not terms[2 if side == "pred" else 1].isfinite()
    assert not terms.total.isfinite()


@grid(chosen=map("-".join, combinations(TERMS, 2)), mode=(DEFAULT, "image-default"), penalty=PENALTIES)
def test_two_terms_send_their_own_gradients(backend: Backend, chosen: str, mode: str, penalty: str) -> None:
    """A backend may not take one for another, nor need them all."""
    options = {"normalize": "sample", "mode": mode, "penalty": penalty}
    call, formula = inpainting_pixel_call(backend, **options), partial(inpainting_pixel_formula, **options)
    check_against_truth(
        lambda *images: tuple(call(*images)[TERMS.index(term)] for term in chosen.split("-")),
        lambda *images: tuple(formula(*images)[TERMS.index(term)] for term in chosen.split("-")),
        on_device(backend, *image_pair(SIZE, "bf16/f32"), region_mask("n1hw", SIZE)),
        magnitudes={0: None, 1: None},
    )


def test_returns_named_terms(backend: Backend) -> None:
    inputs = on_device(backend, *image_pair(SIZE), make_mask("n1hw", SIZE))
    terms = ik.inpainting_pixel_loss(*inputs, backend=backend.name)
    assert isinstance(terms, ik.InpaintingPixel)
    assert all(getattr(terms, name) is terms[i] for i, name in enumerate(TERMS))
    paper = 6 * terms.hole + terms.valid + 0.1 * terms.tv
    torch.testing.assert_close(terms.total, paper, rtol=1e-6, atol=0)


@given(case=region_cases(), normalize=st.sampled_from(NORMALIZATIONS), mode=st.sampled_from(list(MODES)))
def test_the_terms_are_those_of_the_two_functions(
    backend: Backend, case: dict[str, Any], normalize: str, mode: str
) -> None:
    inputs = on_device(backend, *case.values())
    terms = inpainting_pixel_call(backend, normalize=normalize, mode=mode)(*inputs)
    hole, valid = hole_valid_call(backend, penalty="l1", normalize=normalize)(*inputs)
    tv = total_variation_call(backend, mode=mode, penalty="l1")(*inputs)
    for got, want in zip(terms[1:], (hole, valid, tv), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-30)
    weighted = sum(w * t for w, t in zip(TERM_WEIGHTS.values(), terms[1:], strict=True))
    torch.testing.assert_close(terms.total, weighted, rtol=1e-6, atol=1e-30)
