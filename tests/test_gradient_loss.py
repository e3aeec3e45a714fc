"""gradient_loss: differences of neighbours in the composite against those in the truth, in every region."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from harness import (
    LAYOUTS,
    Backend,
    check_against_truth,
    evaluate,
    grid,
    laid_out,
    same_bits,
)
from pairs_cases import (
    GRADIENT_REGIONS,
    MASK_IS,
    PENALTIES,
    gradient_loss_call,
    gradient_loss_formula,
    region_mask,
    regions_of,
)
from pixel_cases import image_pair, make_mask, on_device, skip_unsupported, with_specials
from torch import Tensor

import inpaint_kernels as ik

SIZE = (2, 3, 9, 14)


def check(backend: Backend, pred: Tensor, target: Tensor, mask: Tensor | None, **options: Any) -> None:
    """An element's gradient is a sum of up to four terms of both signs: judged by the largest element."""
    skip_unsupported(backend, pred, target)
    check_against_truth(
        gradient_loss_call(backend, **options),
        partial(gradient_loss_formula, **options),
        on_device(backend, pred, target, mask),
        magnitudes={0: None, 1: None},
    )


@grid(penalty=PENALTIES, layout=LAYOUTS)
def test_the_whole_image_needs_no_mask(backend: Backend, penalty: str, layout: str) -> None:
    pair = image_pair(SIZE, layouts=f"{layout}/{layout}")
    check(backend, *pair, None, region="image", penalty=penalty)


@grid(ring=(0, 1, 3, 5, 50), mask_is=MASK_IS)
def test_rings_of_any_width(backend: Backend, ring: int, mask_is: str) -> None:
    size = (2, 2, 17, 23)
    mask = torch.ones(2, 1, *size[2:])
    mask[0, :, 6:9, 8:11] = 0
    mask[1, :, :2, 15:] = 0.25
    check(backend, *image_pair(size), mask if mask_is == "valid" else 1 - mask, ring=ring, mask_is=mask_is)


@grid(region=GRADIENT_REGIONS, penalty=PENALTIES, layout=("contiguous", "channels_last"))
def test_nan_that_the_composite_does_not_take(
    backend: Backend, region: str, penalty: str, layout: str
) -> None:
    """NaN and Inf on known pixels, in either image, change no bit."""
    mask = region_mask("n1hw", SIZE, values="binary")
    known = regions_of(mask, SIZE, "valid")[1] > 0
    pair = image_pair(SIZE, layouts=f"{layout}/{layout}")
    call = gradient_loss_call(backend, region=region, penalty=penalty)
    clean = evaluate(call, on_device(backend, *pair, mask), (0, 1))
    dirty = [laid_out(with_specials(image, known), layout) for image in pair]
    result = evaluate(call, on_device(backend, *dirty, mask), (0, 1), clean[2])
    for got, want in zip((*result[0], *result[1]), (*clean[0], *clean[1]), strict=True):
        assert same_bits(got, want)
        assert got.isfinite().all()


@grid(penalty=PENALTIES)
def test_nan_in_the_hole_is_seen_and_stays_there(backend: Backend, penalty: str) -> None:
    pred, target = image_pair(SIZE)
    pred[1, 2, 4, 7] = torch.nan
    mask = torch.ones(2, 1, *SIZE[2:])
    mask[..., 4, 7] = 0
    call = gradient_loss_call(backend, penalty=penalty)
    (loss,), (gradient, _), _ = evaluate(call, on_device(backend, pred, target, mask), (0, 1))
    assert loss.isnan()
    assert gradient.isfinite().logical_or(gradient.new_tensor(mask.tolist()) == 0).all()


def by_loops(pred: Tensor, target: Tensor, mask: Tensor, ring: int, penalty: str) -> float:
    n, c, h, w = pred.shape
    hole = 1 - mask
    image = mask * target + hole * pred

    def weight(b: int, i: int, j: int) -> float:
        rows = range(max(i - ring, 0), min(i + ring + 1, h))
        columns = range(max(j - ring, 0), min(j + ring + 1, w))
        square = [float(hole[b, 0, p, q]) for p, q in itertools.product(rows, columns)]
        return min(max(float(hole[b, 0, i, j]) + max(square) - min(square), 0.0), 1.0)

    numerator = denominator = 0.0
    for b, k, i, j, (down, across) in itertools.product(
        range(n), range(c), range(h), range(w), ((1, 0), (0, 1))
    ):
        p, q = i + down, j + across
        if p < h and q < w:
            both = weight(b, i, j) * weight(b, p, q)
            d = float((image[b, k, p, q] - image[b, k, i, j]) - (target[b, k, p, q] - target[b, k, i, j]))
            numerator += both * (abs(d) if penalty == "l1" else d * d)
            denominator += both
    return numerator / denominator


@grid(ring=(1, 2), penalty=PENALTIES, values=("binary", "mixed"))
def test_ring_is_the_sum_over_pairs(backend: Backend, ring: int, penalty: str, values: str) -> None:
    size = (1, 2, 7, 8)
    pred, target = image_pair(size)
    mask = torch.ones(1, 1, 7, 8)
    mask[..., 1:4, 2:6] = region_mask("n1hw", (1, 1, 3, 4), values=values)
    found = gradient_loss_call(backend, ring=ring, penalty=penalty)(*on_device(backend, pred, target, mask))
    expected = by_loops(pred.double(), target.double(), mask.double(), ring, penalty)
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_no_kernel_drops_a_gradient_to_the_mask(kernel: Backend) -> None:
    pred, target, mask = on_device(kernel, *image_pair(SIZE), make_mask("n1hw", SIZE))
    with pytest.raises(RuntimeError, match="mask"):
        ik.gradient_loss(pred, target, mask.requires_grad_(), backend=kernel.name)
