"""composite: prediction inside the hole, truth elsewhere. A part of stacked_images, which tests the kernel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import Backend, backend_for, evaluate, grid, laid_out, same_bits
from hypothesis import given
from hypothesis import strategies as st
from pairs_cases import (
    MASK_IS,
    region_cases,
    regions_of,
    stacked_images_call,
)
from pixel_cases import image_pair, make_mask, on_device, with_specials
from torch import Tensor

import inpaint_kernels as ik

SIZE = (2, 3, 9, 14)


def composite_call(backend: Backend | None, mask_is: str = "valid") -> Callable[..., Tensor]:
    return partial(ik.composite, mask_is=mask_is, backend=backend_for("composite", backend))


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
