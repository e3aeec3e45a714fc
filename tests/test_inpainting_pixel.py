"""inpainting_pixel_loss: hole, valid and total variation of the composite from one pass."""

from __future__ import annotations

from functools import partial
from itertools import combinations
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
from pairs_cases import (
    BINARY_SIZES,
    MASK_IS,
    MODES,
    PENALTIES,
    SHAPES,
    SIZES,
    SOME_MODES,
    TERM_WEIGHTS,
    TERMS,
    inpainting_pixel_call,
    inpainting_pixel_formula,
    region_cases,
    region_mask,
    regions_of,
    tied_pair,
    total_variation_call,
)
from pixel_cases import (
    GPU_SIZES,
    MASK_DTYPES,
    NORMALIZATIONS,
    hole_valid_call,
    image_pair,
    make_mask,
    on_device,
    skip_unsupported,
    with_specials,
)
from torch import Tensor

import inpaint_kernels as ik
from inpaint_kernels.reference.inpainting_pixel import inpainting_pixel

SIZE = (2, 3, 9, 14)
DEFAULT = "dilated_hole-default"


def check(
    backend: Backend,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    normalize: str = "image",
    mode: str = DEFAULT,
    penalty: str = "l1",
    mask_is: str = "valid",
) -> None:
    """An element's gradient is a sum of terms of both signs: judged by the largest element."""
    skip_unsupported(backend, pred, target)
    options = {"normalize": normalize, "mode": mode, "penalty": penalty, "mask_is": mask_is}
    check_against_truth(
        inpainting_pixel_call(backend, **options),
        partial(inpainting_pixel_formula, **options),
        on_device(backend, pred, target, mask),
        magnitudes={0: None, 1: None},
    )


@grid(normalize=NORMALIZATIONS, mode=MODES, penalty=PENALTIES, mask_is=MASK_IS)
def test_core(backend: Backend, normalize: str, mode: str, penalty: str, mask_is: str) -> None:
    check(backend, *image_pair(SIZE), make_mask("n1hw", SIZE), normalize, mode, penalty, mask_is)


@grid(
    normalize=("mask", "sample"),
    mode=(DEFAULT, "first_pixel-mask", "image-default"),
    mask=SHAPES,
    layout=("contiguous", "channels_last"),
    expanded=(False, True),
)
def test_mask_shapes(
    backend: Backend, normalize: str, mode: str, mask: str, layout: str, expanded: bool
) -> None:
    weights = make_mask(mask, SIZE)
    weights = weights.expand(SIZE) if expanded else weights
    check(backend, *image_pair(SIZE, layouts=f"{layout}/{layout}"), weights, normalize, mode)


@grid(
    mask=("n1hw", "hw", "nchw"),
    mask_layout=LAYOUTS,
    layout=("contiguous", "channels_last"),
    values=("mixed", "binary"),
)
def test_mask_layouts(backend: Backend, mask: str, mask_layout: str, layout: str, values: str) -> None:
    weights = laid_out(make_mask(mask, SIZE, values=values), mask_layout)
    check(backend, *image_pair(SIZE, layouts=f"{layout}/{layout}"), weights)


@grid(pred_layout=LAYOUTS, target_layout=LAYOUTS)
def test_layouts(backend: Backend, pred_layout: str, target_layout: str) -> None:
    pair = image_pair(SIZE, layouts=f"{pred_layout}/{target_layout}")
    check(backend, *pair, make_mask("n1hw", SIZE))


@grid(target_dtype=DTYPES, pred_dtype=DTYPES, mode=(DEFAULT, "image-default"))
def test_dtypes(backend: Backend, target_dtype: str, pred_dtype: str, mode: str) -> None:
    pair = image_pair(SIZE, f"{pred_dtype}/{target_dtype}")
    check(backend, *pair, region_mask("n1hw", SIZE), "image", mode)


@grid(dtype=MASK_DTYPES, mask=("n1hw", "nchw"), mask_is=MASK_IS, pred_dtype=("f32", "f16", "f64"))
def test_mask_dtypes(backend: Backend, dtype: str, mask: str, mask_is: str, pred_dtype: str) -> None:
    pair = image_pair(SIZE, f"{pred_dtype}/{pred_dtype}")
    check(backend, *pair, region_mask(mask, SIZE, dtype), "mask", "hole-mask", "l1", mask_is)


@grid(size=SIZES, layout=("contiguous", "channels_last"), mode=(DEFAULT, "image-default"))
def test_sizes(backend: Backend, size: str, layout: str, mode: str) -> None:
    pair = image_pair(SIZES[size], layouts=f"{layout}/{layout}")
    check(backend, *pair, make_mask("n1hw", SIZES[size]), "sample", mode)


@grid(size=BINARY_SIZES, mask=SHAPES, layout=("contiguous", "channels_last"))
def test_masks_of_zeros_and_ones(backend: Backend, size: str, mask: str, layout: str) -> None:
    """Which a backend may keep as bits; one fraction, in the last place, must undo that."""
    pair = image_pair(SIZES[size], layouts=f"{layout}/{layout}")
    weights = region_mask(mask, SIZES[size], values="binary")
    check(backend, *pair, weights, "mask")
    weights[(-1,) * weights.ndim] = 0.5
    check(backend, *pair, weights, "mask")


@grid(size=GPU_SIZES, layout=("contiguous", "channels_last"), dtype=("f32", "bf16"))
def test_large_sizes(kernel: Backend, size: str, layout: str, dtype: str) -> None:
    if kernel.device != "cuda":
        pytest.skip("what a size changes on the CPU is in test_cpu_streaming.py")
    pair = image_pair(GPU_SIZES[size], f"{dtype}/{dtype}", f"{layout}/{layout}")
    check(kernel, *pair, region_mask("n1hw", GPU_SIZES[size]), "mask")


@grid(values=("zeros", "ones", "binary"), normalize=NORMALIZATIONS, mode=SOME_MODES)
def test_all_hole_and_all_valid(backend: Backend, values: str, normalize: str, mode: str) -> None:
    """A region without pixels gives 0 with zero gradient, never 0/0."""
    check(backend, *image_pair(SIZE), make_mask("n1hw", SIZE, values=values), normalize, mode)


@grid(normalize=NORMALIZATIONS, mode=SOME_MODES)
def test_one_empty_sample(backend: Backend, normalize: str, mode: str) -> None:
    mask = make_mask("n1hw", SIZE)
    mask[0], mask[1] = 0, 1
    check(backend, *image_pair(SIZE), mask, normalize, mode)


@grid(
    size=((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)), normalize=NORMALIZATIONS, penalty=PENALTIES
)
def test_nothing_to_count(backend: Backend, size: tuple[int, ...], normalize: str, penalty: str) -> None:
    for mask in ("n1hw", "nchw"):
        for mode in (DEFAULT, "image-default"):
            check(backend, *image_pair(size), make_mask(mask, size), normalize, mode, penalty)


@grid(mode=(DEFAULT, "image-default"), layout=("contiguous", "channels_last"))
def test_ties(backend: Backend, mode: str, layout: str) -> None:
    pair = tuple(laid_out(t, layout) for t in tied_pair(SIZE))
    check(backend, *pair, region_mask("n1hw", SIZE), "image", mode)
    flat = torch.full(SIZE, 0.3)
    inputs = on_device(backend, flat, flat, region_mask("n1hw", SIZE))
    terms, gradients, _ = evaluate(
        inpainting_pixel_call(backend, normalize="image", mode=mode), inputs, (0, 1)
    )
    assert not any(t.any() for t in (*terms, *gradients))


@grid(normalize=NORMALIZATIONS, dtypes=("f16/f16", "f16/f32"), mode=(DEFAULT, "image-default", "hole-mask"))
def test_extremes_do_not_overflow(backend: Backend, normalize: str, dtypes: str, mode: str) -> None:
    pred, target = image_pair(SIZE, dtypes)
    pred[0, 0, 0], target[0, 0, 0] = 65504, -65504
    check(backend, pred, target, region_mask("n1hw", SIZE), normalize, mode)


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


@given(
    case=region_cases(),
    normalize=st.sampled_from(NORMALIZATIONS),
    mode=st.sampled_from(list(MODES)),
    penalty=st.sampled_from(PENALTIES),
    mask_is=st.sampled_from(MASK_IS),
)
def test_any_input(
    backend: Backend, case: dict[str, Any], normalize: str, mode: str, penalty: str, mask_is: str
) -> None:
    check(backend, **case, normalize=normalize, mode=mode, penalty=penalty, mask_is=mask_is)


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


@given(case=region_cases(), mode=st.sampled_from(list(MODES)))
def test_mask_is_hole_flips_the_mask_only(backend: Backend, case: dict[str, Any], mode: str) -> None:
    """In eighths 1 - mask is exact."""
    pred, target, mask = on_device(backend, case["pred"], case["target"], case["mask"].float())
    valid = inpainting_pixel_call(backend, normalize="mask", mode=mode)
    hole = inpainting_pixel_call(backend, normalize="mask", mode=mode, mask_is="hole")
    for got, want in zip(hole(pred, target, 1 - mask), valid(pred, target, mask), strict=True):
        assert same_bits(got, want)


def test_the_packages_reference_is_the_formula() -> None:
    for normalize in NORMALIZATIONS:
        for mode, (region, tv_normalize) in MODES.items():
            for mask_is in MASK_IS:
                check_against_truth(
                    partial(
                        inpainting_pixel,
                        normalize=normalize,
                        tv_region=region,
                        tv_penalty="l1",
                        tv_normalize=tv_normalize,
                        mask_is=mask_is,
                    ),
                    lambda *images, n=normalize, m=mode, i=mask_is: inpainting_pixel_formula(
                        *images, normalize=n, mode=m, mask_is=i
                    )[1:],
                    [*image_pair(SIZE), make_mask("n1hw", SIZE)],
                    magnitudes={0: None, 1: None},
                )
