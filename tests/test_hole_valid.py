"""hole_valid_loss: the loss inside the hole and on known pixels, from one pass."""

from __future__ import annotations

from typing import Any

import torch
from harness import Backend
from hypothesis import given
from hypothesis import strategies as st
from op_cases import OPS
from pairs_cases import MASK_IS, SHAPES
from pixel_cases import PENALTIES, image_cases, image_pair, make_mask, on_device

import inpaint_kernels as ik


def test_returns_named_terms(backend: Backend) -> None:
    terms = ik.hole_valid_loss(
        *on_device(backend, *image_pair((2, 3, 9, 14)), make_mask("n1hw", (2, 3, 9, 14)))
    )
    assert isinstance(terms, ik.HoleValid)
    assert terms.hole is terms[0]
    assert terms.valid is terms[1]


@given(case=image_cases(masks=SHAPES), penalty=st.sampled_from(PENALTIES), mask_is=st.sampled_from(MASK_IS))
def test_each_term_is_a_masked_loss(
    backend: Backend, case: dict[str, Any], penalty: str, mask_is: str
) -> None:
    """Which also names the region: a swap of the two terms would keep their sum."""
    pred, target, mask = on_device(backend, case["pred"], case["target"], case["mask"].float())
    terms = OPS[f"hole_valid {penalty} mask {mask_is}"].by(backend)(pred, target, mask)
    loss = OPS[f"masked_l1 {penalty} mask"].by(backend)
    for got, weight in zip(terms, (mask, 1 - mask) if mask_is == "hole" else (1 - mask, mask), strict=True):
        torch.testing.assert_close(got, loss(pred, target, weight), rtol=1e-5, atol=1e-30)
