"""Integer masks are binary in every op: a mask saved as 0/1 and one saved as 0/255 mean the same."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from harness import Backend, backend_for
from torch import Tensor

import inpaint_kernels as ik

SIZE = (2, 3, 9, 8)
DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16)

CALLS: dict[str, Callable[..., Any]] = {
    "masked_l1": ik.masked_l1_loss,
    "masked_huber": ik.masked_huber_loss,
    "hole_valid": ik.hole_valid_loss,
    "total_variation": lambda p, t, m, **o: ik.total_variation_loss(
        p, m, target=t, region="dilated_hole", **o
    ),
    "inpainting_pixel": ik.inpainting_pixel_loss,
    "gradient_loss": ik.gradient_loss,
    "composite": ik.composite,
    "stacked_images": ik.stacked_images,
    "feature_distance": lambda p, t, m, **o: ik.feature_distance(p, t, mask=m, **o),
    "partial_conv-proportional": lambda p, t, m, **o: ik.partial_conv2d(
        p, torch.ones(2, 3, 3, 3, device=p.device), None, m, padding=1, mask_update="proportional", **o
    ),
    "partial_conv": lambda p, t, m, **o: ik.partial_conv2d(
        p, torch.ones(2, 3, 3, 3, device=p.device), None, m, padding=1, **o
    ),
}


def images(device: str) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    pred, target = torch.rand(2, *SIZE, generator=rng).to(device)
    known = torch.rand(SIZE[0], 1, *SIZE[2:], generator=rng).to(device) < 0.6
    return pred.requires_grad_(), target, known


def results(found: Any, pred: Tensor) -> list[Tensor]:
    """Every output, and the gradient to the prediction."""
    outputs = [found] if isinstance(found, Tensor) else list(found)
    (grad,) = torch.autograd.grad(sum(x.sum() for x in outputs if x.requires_grad), pred)
    return [*outputs, grad]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", CALLS)
def test_nonzero_counts_as_one(backend: Backend, op: str, dtype: torch.dtype) -> None:
    call = partial(CALLS[op], backend=backend_for(op, backend))
    pred, target, known = images(backend.device)
    values = known.to(dtype) * 100
    if dtype == torch.uint8:
        values = known.to(dtype) * 255
    elif dtype == torch.int8:
        values = -known.to(dtype)
    expected = results(call(pred, target, known), pred)
    found = results(call(pred, target, values), pred)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_a_mask_file_of_255_is_no_weight(backend: Backend) -> None:
    pred, target = (
        torch.zeros(1, 1, 2, 2, device=backend.device),
        torch.ones(1, 1, 2, 2, device=backend.device),
    )
    mask = torch.tensor([[255, 255], [0, 255]], dtype=torch.uint8, device=backend.device)
    terms = ik.hole_valid_loss(pred, target, mask, backend=backend.name)
    assert (terms.hole.item(), terms.valid.item()) == (0.25, 0.75)
    assert ik.masked_l1_loss(pred, target, mask, reduction="sum", backend=backend.name).item() == 3
    name = backend_for("composite", backend)
    assert ik.composite(pred, target, mask, backend=name).flatten().tolist() == [1, 1, 0, 1]


def test_broadcast_masks_stay_broadcast() -> None:
    """An expanded mask of another dtype must not be written out."""
    from inpaint_kernels.ops._checks import binary

    mask = torch.full((1, 1, 4, 4), 255, dtype=torch.uint8).expand(8, 3, 4, 4)
    found = binary(mask)
    assert found.dtype == torch.bool
    assert found.shape == mask.shape
    assert found.stride()[:2] == (0, 0)


def test_compiled() -> None:
    pred, target, known = images("cpu")
    compiled = torch.compile(ik.masked_l1_loss, fullgraph=True)
    found = compiled(pred, target, known.to(torch.uint8) * 255)
    assert torch.equal(found, ik.masked_l1_loss(pred, target, known))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn], ids=str)
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    pred, target, known = images("cpu")
    with pytest.raises(
        TypeError, match=r"mask must be floating, bool or an integer, got torch\.(complex|float8)"
    ):
        ik.masked_l1_loss(pred, target, known.to(dtype))


@pytest.mark.parametrize("op", ["masked_l1", "partial_conv", "invert_mask"])
def test_exported_programs_hold_for_masks_of_other_strides(op: str) -> None:
    """The example's mask is expanded along the batch, the next one is not."""
    functions = {
        "masked_l1": ik.masked_l1_loss,
        "partial_conv": lambda p, t, m: ik.partial_conv2d(p, torch.ones(2, 3, 3, 3), None, m).output,
        "invert_mask": lambda p, t, m: ik.invert_mask(m),
    }

    class Module(torch.nn.Module):
        def forward(self, pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
            found: Tensor = functions[op](pred, target, mask)
            return found

    pred, target, known = images("cpu")
    pred, given = pred.detach(), known.to(torch.uint8) * 255
    example = torch.ones_like(given[:1]).expand(given.shape)
    program = torch.export.export(Module(), (pred, target, example)).module()
    assert torch.equal(program(pred, target, given), Module()(pred, target, given))
