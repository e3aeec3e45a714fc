"""inpainting_pixel_loss: hole, valid and total variation of the composite from one pass."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from harness import Backend, check_against_truth, grid
from op_cases import DEFAULT, OPS
from pairs_cases import PENALTIES, TERMS, dilated
from pixel_cases import on_device
from torch import Tensor

import inpaint_kernels as ik


@grid(chosen=map("-".join, combinations(TERMS, 2)), mode=(DEFAULT, "image-default"), penalty=PENALTIES)
def test_two_terms_send_their_own_gradients(backend: Backend, chosen: str, mode: str, penalty: str) -> None:
    """A backend may not take one for another, nor need them all."""
    op = OPS[f"inpainting_pixel sample {mode} {penalty}"]

    def of(call: Any) -> Any:
        return lambda *t: tuple(call(*t)[TERMS.index(term)] for term in chosen.split("-"))

    inputs = on_device(backend, *op.make(dtypes="bf16/f32"))
    check_against_truth(of(op.by(backend)), of(op.formula), inputs, magnitudes={0: None, 1: None})


def test_returns_named_terms(backend: Backend) -> None:
    inputs = on_device(backend, *OPS[f"inpainting_pixel image {DEFAULT} l1"].make())
    terms = ik.inpainting_pixel_loss(*inputs, backend=backend.name)
    assert isinstance(terms, ik.InpaintingPixel)
    assert all(getattr(terms, name) is terms[i] for i, name in enumerate(TERMS))
    paper = 6 * terms.hole + terms.valid + 0.1 * terms.tv
    torch.testing.assert_close(terms.total, paper, rtol=1e-6, atol=0)


@pytest.mark.parametrize("mask_is", ["valid", "hole"])
def test_terms_are_those_of_the_paper(backend: Backend, mask_is: str) -> None:
    pred, target, mask = OPS[f"inpainting_pixel image {DEFAULT} l1"].make()
    hole = 1 - mask
    image = mask * target + hole * pred
    region = dilated(hole)
    down = (region[..., 1:, :] * region[..., :-1, :] * image.diff(dim=2).abs()).sum()
    across = (region[..., 1:] * region[..., :-1] * image.diff(dim=3).abs()).sum()
    distance = (pred - target).abs()
    expected = ((hole * distance).mean(), (mask * distance).mean(), (down + across) / image.numel())
    inputs: list[Tensor] = on_device(backend, pred, target, mask if mask_is == "valid" else hole)
    _, *found = ik.inpainting_pixel_loss(*inputs, mask_is=mask_is, backend=backend.name)
    for term, value in zip(found, expected, strict=True):
        torch.testing.assert_close(term.cpu(), value)
