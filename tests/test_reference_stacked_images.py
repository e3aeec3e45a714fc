"""The plain formula of the batch a trunk reads, against the preprocessing of released code written out."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from inpaint_kernels.reference.stacked_images import PARTS, stacked_images

MEAN = torch.tensor([0.485, 0.456, 0.406], dtype=torch.float64)
STD = torch.tensor([0.229, 0.224, 0.225], dtype=torch.float64)


def images(channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """pred, target in [-1, 1] and a mask (1 = known) of zeros, halves and ones; float64."""
    generator = torch.Generator().manual_seed(channels)
    pred, target = (
        torch.rand(2, channels, 4, 5, generator=generator, dtype=torch.float64) * 2 - 1 for _ in range(2)
    )
    return pred, target, torch.randint(0, 3, (2, 1, 4, 5), generator=generator).to(torch.float64) / 2


def stack(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    parts: Sequence[str] = PARTS,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    swap: bool = False,
    mask_is: str = "valid",
) -> Tensor:
    return stacked_images(
        pred, target, mask, parts=parts, scale=scale, shift=shift, swap=swap, mask_is=mask_is
    )


@pytest.mark.parametrize("mask_is", ["valid", "hole"])
def test_parts_stand_in_the_order_asked_for(mask_is: str) -> None:
    pred, target, mask = images()
    hole = 1 - mask
    expected = {
        "raw": pred,
        "composite": mask * target + hole * pred,
        "target": target,
        "hole_raw": hole * pred,
        "hole_target": hole * target,
    }
    given = mask if mask_is == "valid" else hole
    for parts in (PARTS, PARTS[::-1], ("raw", "composite", "target"), ("target",)):
        found = stack(pred, target, given, parts, mask_is=mask_is)
        torch.testing.assert_close(found, torch.cat([expected[part] for part in parts]))


def test_normalisation_of_mmagic_and_aot_gan() -> None:
    """From [-1, 1] to [0, 1], then ImageNet's mean and deviation."""
    pred, target, mask = images()
    scale, shift = 0.5 / STD, (0.5 - MEAN) / STD
    found = stack(pred, target, mask, ("raw", "target"), scale, shift)
    expected = [((t + 1) / 2 - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1) for t in (pred, target)]
    torch.testing.assert_close(found, torch.cat(expected))


def test_masking_precedes_the_affine_map_and_the_swap() -> None:
    pred, target, mask = images()
    scale, shift = 1 / STD, -MEAN / STD
    found = stack(pred, target, mask, ("hole_raw",), scale, shift, swap=True)
    expected = (((1 - mask) * pred)[:, [2, 1, 0]] - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)
    torch.testing.assert_close(found, expected)


def test_a_single_channel_is_replicated() -> None:
    pred, target, mask = images(1)
    found = stack(pred, target, mask, ("raw", "composite"), 1 / STD, -MEAN / STD)
    raw = (pred.repeat(1, 3, 1, 1) - MEAN.view(1, 3, 1, 1)) / STD.view(1, 3, 1, 1)
    assert found.shape == (4, 3, 4, 5)
    torch.testing.assert_close(found[:2], raw)


def test_gradients_are_those_of_the_images_read() -> None:
    pred, target, mask = images()
    pred.requires_grad_()
    hole = (1 - mask).expand_as(pred)
    columns = {"raw": torch.ones_like(hole), "composite": hole, "target": 0 * hole, "hole_raw": hole}
    for part, expected in columns.items():
        found = stack(pred, target.requires_grad_(), mask, (part,), 1 / STD, -MEAN / STD)
        (grad,) = torch.autograd.grad(found.sum(), pred, allow_unused=True)
        expected = expected / STD.view(1, 3, 1, 1)
        torch.testing.assert_close(torch.zeros_like(pred) if grad is None else grad, expected)


def test_nan_under_a_hole_of_zero_reaches_no_hole_image() -> None:
    pred, target, mask = images()
    mask = (mask == 1).to(mask)
    pred = pred.masked_fill(mask == 1, torch.nan).requires_grad_()
    found = stack(pred, target, mask, ("composite", "hole_raw"))
    (grad,) = torch.autograd.grad(found.sum(), pred)
    assert found.isfinite().all() and grad.isfinite().all()


def test_half_images_are_rounded_once() -> None:
    pred, target, mask = (t.half() for t in images())
    found = stack(pred, target, mask, PARTS, 1 / STD, -MEAN / STD)
    exact = stack(pred.double(), target.double(), mask.double(), PARTS, 1 / STD, -MEAN / STD)
    assert found.dtype == torch.float16
    # float32 arithmetic below may fall on the other side of a tie: half an ulp of float16 and a little of float32.
    assert ((found.double() - exact).abs() <= exact.abs() * (2**-11 + 2**-20) + 2**-22).all()
