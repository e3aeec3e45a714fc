"""stacked_images: prediction, composite, truth and their hole-only versions as one normalised batch; composite."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from harness import Backend, backend_for, backends_under_test, evaluate, grid, same_bits
from hypothesis import given
from hypothesis import strategies as st
from op_cases import in_common_dtype
from pairs_cases import (
    MASK_IS,
    PARTS,
    SCALE,
    SHIFT,
    region_cases,
    region_mask,
    regions_of,
    stacked_images_call,
    stacked_images_formula,
)
from pixel_cases import image_pair, make_mask, on_device, skip_unsupported, with_specials
from torch import Tensor

import inpaint_kernels as ik
from inpaint_kernels.ops.stacked_images import MOST_ON_TRITON

SIZE = (2, 3, 9, 14)
# scale and shift as the function takes them.
CONSTANTS: dict[str, dict[str, Any]] = {
    "none": {},
    "numbers": {"scale": 0.7, "shift": 12.0},
    "integers": {"scale": 3, "shift": -12},
    "lists": {"scale": SCALE, "shift": SHIFT},
    "scale": {"scale": list(SCALE)},
    "shift": {"shift": SHIFT},
    "number-list": {"scale": 0.7, "shift": SHIFT},
    "list-number": {"scale": SCALE, "shift": 12.0},
}


def check(backend: Backend, pred: Tensor, target: Tensor, mask: Tensor | None, **options: Any) -> None:
    skip_unsupported(backend, pred, target)
    options.setdefault("parts", PARTS)
    call, formula = stacked_images_call(backend, **options), partial(stacked_images_formula, **options)
    in_common_dtype(call, formula, on_device(backend, pred, target, mask))


@grid(
    constants=CONSTANTS,
    channels=(1, 3),
    swap=(False, True),
    layout=("contiguous", "channels_last"),
    dtype=("f32", "bf16"),
)
def test_constants_and_channels(
    backend: Backend, constants: str, channels: int, swap: bool, layout: str, dtype: str
) -> None:
    """One channel becomes three where scale or shift has three."""
    size = (2, channels, 9, 14)
    pair = image_pair(size, f"{dtype}/{dtype}", f"{layout}/{layout}")
    mask = region_mask("n1hw" if dtype == "f32" else "nchw", size)
    check(backend, *pair, mask, swap_channels=swap, **CONSTANTS[constants])


@grid(channels=(2, 4, 5, 8, 17), swap=(False, True), layout=("contiguous", "channels_last"))
def test_any_number_of_channels(backend: Backend, channels: int, swap: bool, layout: str) -> None:
    size = (2, channels, 5, 7)
    pair = image_pair(size, layouts=f"{layout}/{layout}")
    # Triton's kernels take lists for a few channels (test_triton_takes_few_parts), and a number for any.
    many = backend.name == "triton" and channels > MOST_ON_TRITON
    scale = 0.7 if many else [0.5 + 0.3 * i for i in range(channels)]
    check(backend, *pair, make_mask("nchw", size), swap_channels=swap, scale=scale, shift=20.0)


@grid(dtype=("f16", "bf16", "f32"), mask_is=MASK_IS, layout=("contiguous", "channels_last"))
def test_what_is_selected_keeps_its_bits(backend: Backend, dtype: str, mask_is: str, layout: str) -> None:
    """Without constants a mask of zeros and ones copies."""
    pred, target = image_pair(SIZE, f"{dtype}/{dtype}", f"{layout}/{layout}")
    mask = make_mask("n1hw", SIZE, values="binary")
    hole = regions_of(mask, SIZE, mask_is)[0] == 1
    composite, zero = torch.where(hole, pred, target), torch.zeros_like(pred)
    expected = (pred, composite, target, torch.where(hole, pred, zero), torch.where(hole, target, zero))
    inputs = on_device(backend, pred, target, mask)
    found = stacked_images_call(backend, parts=PARTS, mask_is=mask_is)(*inputs)
    assert torch.equal(found.cpu(), torch.cat(expected))
    name = backend_for("composite", backend)
    assert same_bits(ik.composite(*inputs, mask_is=mask_is, backend=name), composite)


def test_normalisation_of_mmagic_and_aot_gan(backend: Backend) -> None:
    """The batch of a trunk: from [-1, 1] to [0, 1], then ImageNet's mean and deviation."""
    pred, target = image_pair(SIZE)
    mean, std = torch.tensor((0.485, 0.456, 0.406)), torch.tensor((0.229, 0.224, 0.225))
    options = {"scale": (0.5 / std).tolist(), "shift": ((0.5 - mean) / std).tolist()}
    call = stacked_images_call(backend, parts=("raw", "target"), **options)
    expected = [((t + 1) / 2 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1) for t in (pred, target)]
    torch.testing.assert_close(call(*on_device(backend, pred, target)).cpu(), torch.cat(expected))


@grid(layout=("contiguous", "channels_last"), mask_is=MASK_IS)
def test_special_gradients_under_weight_zero(backend: Backend, layout: str, mask_is: str) -> None:
    """What a trunk sends into a composite stays on its side, even NaN."""
    weights = make_mask("n1hw", SIZE, values="binary")
    hole, valid = regions_of(weights, SIZE, mask_is)
    inputs = on_device(backend, *image_pair(SIZE, layouts=f"{layout}/{layout}"), weights)
    call = stacked_images_call(backend, parts=("composite",), mask_is=mask_is)
    for index, weight in ((0, hole), (1, valid)):
        upstream = with_specials(torch.ones(SIZE), weight == 0)
        gradient = evaluate(call, inputs, (0, 1), [upstream])[1][index].cpu()
        assert torch.equal(gradient, weight)


def test_a_mask_that_no_part_reads_may_ask_for_a_gradient(kernel: Backend) -> None:
    pred, target, mask = on_device(kernel, *image_pair(SIZE), make_mask("n1hw", SIZE))
    mask.requires_grad_()
    assert not stacked_images_call(kernel, parts=("raw",))(pred, target, mask).requires_grad


@given(
    case=region_cases(),
    parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=6),
    constants=st.sampled_from(("none", "numbers", "integers")),
    swap=st.booleans(),
    mask_is=st.sampled_from(MASK_IS),
)
def test_any_input(
    backend: Backend, case: dict[str, Any], parts: list[str], constants: str, swap: bool, mask_is: str
) -> None:
    check(backend, **case, parts=parts, swap_channels=swap, mask_is=mask_is, **CONSTANTS[constants])


@pytest.mark.parametrize("triton", [b for b in backends_under_test() if b.name == "triton"], ids=str)
def test_triton_takes_few_parts(triton: Backend) -> None:
    """Each part of each channel is written out in the kernel."""
    most = MOST_ON_TRITON
    pred, target = torch.rand(2, 1, 2, 3, 8, device=triton.device)
    full = ik.stacked_images(pred, target, parts=["raw"] * most, backend="triton")
    assert torch.equal(full, torch.cat([pred] * most))
    with pytest.raises(RuntimeError, match="at most 8 parts, and scale and shift for as many channels"):
        ik.stacked_images(pred, target, parts=["raw"] * (most + 1), backend="triton")
    wide = torch.rand(2, 1, most + 1, 2, 3, device=triton.device)
    with pytest.raises(RuntimeError, match="at most 8 parts"):
        ik.stacked_images(*wide, parts=["raw"], scale=[1.0] * (most + 1), backend="triton")
