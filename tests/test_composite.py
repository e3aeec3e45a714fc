"""composite: prediction inside the hole, truth elsewhere. A part of stacked_images, which tests the kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import (
    DTYPES,
    LAYOUTS,
    Backend,
    backend_for,
    check_against_truth,
    evaluate,
    grid,
    laid_out,
    same_bits,
)
from hypothesis import given
from hypothesis import strategies as st
from pairs_cases import (
    MASK_IS,
    SHAPES,
    SIZES,
    composite_formula,
    region_cases,
    region_mask,
    regions_of,
    stacked_images_call,
)
from pixel_cases import image_pair, make_mask, on_device, skip_unsupported, with_specials
from torch import Tensor

import inpaint_kernels as ik
from inpaint_kernels.reference.composite import composite

SIZE = (2, 3, 9, 14)


def composite_call(backend: Backend | None, mask_is: str = "valid") -> Callable[..., Tensor]:
    return partial(ik.composite, mask_is=mask_is, backend=backend_for("composite", backend))


def check(backend: Backend, pred: Tensor, target: Tensor, mask: Tensor, mask_is: str = "valid") -> None:
    skip_unsupported(backend, pred, target)
    check_against_truth(
        composite_call(backend, mask_is),
        partial(composite_formula, mask_is=mask_is),
        on_device(backend, pred, target, mask),
        out_dtype=torch.promote_types(pred.dtype, target.dtype),
    )


@grid(mask=SHAPES, mask_is=MASK_IS, layout=("contiguous", "channels_last"), values=("mixed", "binary"))
def test_core(backend: Backend, mask: str, mask_is: str, layout: str, values: str) -> None:
    pair = image_pair(SIZE, layouts=f"{layout}/{layout}")
    check(backend, *pair, region_mask(mask, SIZE, values=values), mask_is)


@grid(size=SIZES, layout=("contiguous", "channels_last"))
def test_sizes(backend: Backend, size: str, layout: str) -> None:
    pair = image_pair(SIZES[size], layouts=f"{layout}/{layout}")
    check(backend, *pair, region_mask("n1hw", SIZES[size]))


@grid(pred_layout=LAYOUTS, target_layout=LAYOUTS)
def test_layouts(backend: Backend, pred_layout: str, target_layout: str) -> None:
    pair = image_pair(SIZE, layouts=f"{pred_layout}/{target_layout}")
    check(backend, *pair, region_mask("n1hw", SIZE))


@grid(target_dtype=DTYPES, pred_dtype=DTYPES)
def test_dtypes(backend: Backend, target_dtype: str, pred_dtype: str) -> None:
    check(backend, *image_pair(SIZE, f"{pred_dtype}/{target_dtype}"), region_mask("n1hw", SIZE))


@grid(dtype=("f16", "bf16", "f32"), mask_is=MASK_IS, layout=("contiguous", "channels_last"))
def test_a_mask_of_zeros_and_ones_copies(backend: Backend, dtype: str, mask_is: str, layout: str) -> None:
    """Bit for bit, and whatever lies on the other side; the gradient goes where the value came from."""
    mask = make_mask("n1hw", SIZE, values="binary")
    hole, valid = regions_of(mask, SIZE, mask_is)
    pred, target = image_pair(SIZE, f"{dtype}/{dtype}")
    want = torch.where(hole == 1, pred, target)
    pair = (with_specials(pred, hole == 0), with_specials(target, valid == 0))
    inputs = on_device(backend, *(laid_out(t, layout) for t in pair), mask)
    (got,), gradients, (upstream,) = evaluate(composite_call(backend, mask_is), inputs, (0, 1))
    assert same_bits(got, want)
    assert got.stride() == inputs[0].stride()
    for gradient, weight in zip(gradients, (hole, valid), strict=True):
        assert torch.equal(gradient, upstream * weight.to(upstream))


@grid(mask_is=MASK_IS, mask=("n1hw", "hw", "nchw"))
def test_gradient_to_the_mask(mask_is: str, mask: str) -> None:
    check_against_truth(
        composite_call(None, mask_is),
        partial(composite_formula, mask_is=mask_is, select=False),
        [*image_pair(SIZE), region_mask(mask, SIZE)],
        wanted=(0, 1, 2),
        magnitudes={2: None},
    )


@given(case=region_cases(), mask_is=st.sampled_from(MASK_IS))
def test_is_the_part_of_stacked_images(backend: Backend, case: dict[str, Any], mask_is: str) -> None:
    inputs = on_device(backend, *case.values())
    part = stacked_images_call(backend, parts=("composite",), mask_is=mask_is)
    assert same_bits(composite_call(backend, mask_is)(*inputs), part(*inputs))


@given(case=region_cases())
def test_of_equal_images_it_is_that_image(backend: Backend, case: dict[str, Any]) -> None:
    """Up to the rounding of h x + (1 - h) x."""
    pred, mask = on_device(backend, case["pred"].bfloat16(), case["mask"])
    assert torch.equal(composite_call(backend)(pred, pred.clone(), mask), pred)


def test_the_packages_reference_is_the_formula() -> None:
    for mask_is in MASK_IS:
        check_against_truth(
            partial(composite, mask_is=mask_is),
            partial(composite_formula, mask_is=mask_is),
            [*image_pair(SIZE), region_mask("n1hw", SIZE)],
        )
