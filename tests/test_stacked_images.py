"""stacked_images: prediction, composite, truth and their hole-only versions as one normalised batch."""

from __future__ import annotations

from functools import partial
from itertools import permutations
from typing import Any

import pytest
import torch
from harness import (
    LAYOUTS,
    Backend,
    backends_under_test,
    check_against_truth,
    evaluate,
    gradient_of,
    grid,
    laid_out,
    same_bits,
)
from hypothesis import given
from hypothesis import strategies as st
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
from pixel_cases import (
    image_pair,
    make_mask,
    on_device,
    skip_unsupported,
    with_specials,
)
from torch import Tensor

import inpaint_kernels as ik
from inpaint_kernels.ops.stacked_images import MOST_ON_TRITON

SIZE = (2, 3, 9, 14)
MASKED = ("composite", "hole_raw", "hole_target")
# Every subset in its usual order, the whole in other orders, and repetitions.
SUBSETS = {
    "-".join(parts): parts
    for parts in (
        *(tuple(p for i, p in enumerate(PARTS) if bits >> i & 1) for bits in range(1, 2 ** len(PARTS))),
        *list(permutations(PARTS))[7::23],
        ("raw", "raw"),
        ("target", "composite", "target", "composite"),
        ("hole_raw", "hole_target", "hole_raw", "raw"),
    )
}
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
NORMALIZED = CONSTANTS["lists"]
# Each alone, what training uses, all of them, and repetitions.
SOME_SUBSETS = (*PARTS, "raw-composite-target", "-".join(PARTS), *list(SUBSETS)[-3:])


def check(backend: Backend, pred: Tensor, target: Tensor, mask: Tensor | None, **options: Any) -> None:
    skip_unsupported(backend, pred, target)
    options.setdefault("parts", PARTS)
    check_against_truth(
        stacked_images_call(backend, **options),
        partial(stacked_images_formula, **options),
        on_device(backend, pred, target, mask),
        out_dtype=torch.promote_types(pred.dtype, target.dtype),
    )


@grid(parts=SUBSETS, layout=("contiguous", "channels_last"))
def test_parts(backend: Backend, parts: str, layout: str) -> None:
    pair = image_pair(SIZE, layouts=f"{layout}/{layout}")
    check(backend, *pair, make_mask("n1hw", SIZE), parts=SUBSETS[parts], **NORMALIZED)


@grid(parts=MASKED, mask_is=MASK_IS, mask=("n1hw", "nchw"), layout=("contiguous", "channels_last"))
def test_mask_is(backend: Backend, parts: str, mask_is: str, mask: str, layout: str) -> None:
    pair = image_pair(SIZE, layouts=f"{layout}/{layout}")
    check(backend, *pair, make_mask(mask, SIZE), parts=(parts,), mask_is=mask_is, **NORMALIZED)


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


@grid(parts=(("raw",), ("target",), ("target", "raw")), layout=LAYOUTS, swap=(False, True))
def test_without_a_mask(backend: Backend, parts: tuple[str, ...], layout: str, swap: bool) -> None:
    pair = image_pair(SIZE, layouts=f"{layout}/{layout}")
    check(backend, *pair, None, parts=parts, swap_channels=swap, **NORMALIZED)


@grid(dtype=("f16", "bf16", "f32"), layout=("contiguous", "channels_last"))
def test_what_is_selected_keeps_its_bits(backend: Backend, dtype: str, layout: str) -> None:
    """Without constants a mask of zeros and ones copies."""
    pred, target = image_pair(SIZE, f"{dtype}/{dtype}", f"{layout}/{layout}")
    mask = make_mask("n1hw", SIZE, values="binary")
    found = stacked_images_call(backend, parts=PARTS)(*on_device(backend, pred, target, mask)).cpu()
    zero = torch.zeros_like(pred)
    expected = (
        pred,
        torch.where(mask == 1, target, pred),
        target,
        torch.where(mask == 1, zero, pred),
        torch.where(mask == 1, zero, target),
    )
    assert torch.equal(found, torch.cat(expected))


@grid(
    side=("pred", "target"),
    mask_is=MASK_IS,
    mask=("n1hw", "nchw"),
    layout=("contiguous", "channels_last"),
    swap=(False, True),
)
def test_specials_under_weight_zero(
    backend: Backend, side: str, mask_is: str, mask: str, layout: str, swap: bool
) -> None:
    """NaN and Inf where a part does not look change no bit of it, nor of any gradient."""
    weights = make_mask(mask, SIZE, values="binary")
    hole, valid = regions_of(weights, SIZE, mask_is)
    parts = ("composite", "hole_raw") if side == "pred" else ("composite",)
    call = stacked_images_call(backend, parts=parts, mask_is=mask_is, swap_channels=swap, **NORMALIZED)
    pair = list(image_pair(SIZE, layouts=f"{layout}/{layout}"))
    clean = evaluate(call, on_device(backend, *pair, weights), (0, 1))
    index, weight = (0, hole) if side == "pred" else (1, valid)
    pair[index] = laid_out(with_specials(pair[index], weight == 0), layout)
    result = evaluate(call, on_device(backend, *pair, weights), (0, 1), clean[2])
    for got, want in zip((*result[0], *result[1]), (*clean[0], *clean[1]), strict=True):
        assert same_bits(got, want)
        assert got.isfinite().all()


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


# Positions of the images a part is made of.
MADE_OF = {"raw": {0}, "composite": {0, 1}, "target": {1}, "hole_raw": {0}, "hole_target": {1}}


def made_of(parts: tuple[str, ...]) -> list[int]:
    return sorted(set().union(*(MADE_OF[part] for part in parts)))


@grid(wanted=("pred", "target"), parts=SOME_SUBSETS)
def test_one_gradient(backend: Backend, wanted: str, parts: str) -> None:
    position = ("pred", "target").index(wanted)
    options = {"parts": SUBSETS[parts], **NORMALIZED}
    inputs = on_device(backend, *image_pair(SIZE, "bf16/f32"), region_mask("n1hw", SIZE))
    call = stacked_images_call(backend, **options)
    leaves = [t.clone().requires_grad_(i == position) for i, t in enumerate(inputs)]
    out = call(*leaves)
    if position not in made_of(SUBSETS[parts]):
        # No graph, or a gradient of zero.
        if out.requires_grad:
            out.sum().backward()
            assert leaves[position].grad is None or not leaves[position].grad.any()
        return
    check_against_truth(
        call, partial(stacked_images_formula, **options), inputs, wanted=(position,), out_dtype=torch.float32
    )
    out.sum().backward()
    assert [leaf.grad is not None for leaf in leaves[:2]] == [position == 0, position == 1]


@grid(layout=("contiguous", "channels_last"), swap=(False, True), dtype=("f32", "f16"))
def test_layout_of_results_and_gradients(kernel: Backend, layout: str, swap: bool, dtype: str) -> None:
    pair = image_pair(SIZE, f"{dtype}/{dtype}", f"{layout}/{layout}")
    call = stacked_images_call(kernel, parts=PARTS, swap_channels=swap, **NORMALIZED)
    (out,), gradients, _ = evaluate(call, on_device(kernel, *pair, make_mask("n1hw", SIZE)), (0, 1), None)
    assert out.is_contiguous(memory_format=FORMATS[layout])
    for got in gradients:
        assert got.stride() == pair[0].stride()


FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@grid(
    parts=SOME_SUBSETS,
    layout=("contiguous", "channels_last"),
    swap=(False, True),
    mask_is=MASK_IS,
    channels=(3, 1),
)
def test_second_derivatives(
    backend: Backend, parts: str, layout: str, swap: bool, mask_is: str, channels: int
) -> None:
    """The operation is linear: its gradient is constant in the images and linear in the upstream gradient."""
    size = (2, channels, 4, 5)
    images = made_of(SUBSETS[parts])
    upstream = torch.rand(len(SUBSETS[parts]) * size[0], 3, *size[2:]) + 0.5
    pair = image_pair(size, layouts=f"{layout}/{layout}")
    inputs = on_device(backend, *pair, make_mask("n1hw", size), upstream)
    options = {"parts": SUBSETS[parts], "swap_channels": swap, "mask_is": mask_is, **NORMALIZED}
    check_against_truth(
        gradient_of(stacked_images_call(backend, **options), images),
        gradient_of(partial(stacked_images_formula, **options), images),
        inputs,
        wanted=(*images, 3),
    )


@grid(channels=(1, 3), swap=(False, True), constants=("none", "lists"))
def test_gradcheck(backend: Backend, channels: int, swap: bool, constants: str) -> None:
    size = (2, channels, 2, 2)
    pair = image_pair(size, "f64/f64")
    skip_unsupported(backend, *pair)
    mask = region_mask("n1hw", size, "f64")
    call = stacked_images_call(backend, parts=PARTS, swap_channels=swap, **CONSTANTS[constants])
    leaves = tuple(t.requires_grad_() for t in pair)
    assert torch.autograd.gradcheck(lambda p, t: call(p, t, mask), leaves)
    assert torch.autograd.gradgradcheck(lambda p, t: call(p, t, mask), leaves)


def test_a_mask_that_no_part_reads_may_ask_for_a_gradient(kernel: Backend) -> None:
    pred, target, mask = on_device(kernel, *image_pair(SIZE), make_mask("n1hw", SIZE))
    mask.requires_grad_()
    assert not stacked_images_call(kernel, parts=("raw",))(pred, target, mask).requires_grad


@pytest.mark.parametrize(
    ("parts", "scale", "message"),
    [
        ([5], [], "parts: unknown"),
        ([-1], [], "parts: unknown"),
        ([1], [], "needs a mask"),
        ([0], [1.0] * 4, "channels"),
    ],
)
def test_operator_checks_what_would_crash(parts: list[int], scale: list[float], message: str) -> None:
    if Backend("cpu", "cpu") not in backends_under_test():
        pytest.skip("is about the CPU operator")
    image = torch.zeros(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.inpaint_kernels.stacked_images_cpu(image, image, None, parts, scale, [], False, False)


def test_operator_checks_the_shape_of_the_gradient() -> None:
    if Backend("cpu", "cpu") not in backends_under_test():
        pytest.skip("is about the CPU operator")
    backward, f32 = torch.ops.inpaint_kernels.stacked_images_backward_cpu, torch.float32
    with pytest.raises(RuntimeError, match="shape of the stacked batch"):
        backward(
            torch.zeros(3, 3, 4, 5),
            None,
            [2, 3, 4, 5],
            False,
            f32,
            f32,
            [0, 2],
            [],
            False,
            False,
            True,
            False,
        )


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


@given(case=region_cases(), parts=st.lists(st.sampled_from(PARTS), min_size=2, max_size=5))
def test_a_batch_of_parts_is_the_parts_one_by_one(
    backend: Backend, case: dict[str, Any], parts: list[str]
) -> None:
    inputs = on_device(backend, *case.values())
    together = stacked_images_call(backend, parts=parts)(*inputs)
    single = [stacked_images_call(backend, parts=(part,))(*inputs) for part in parts]
    assert same_bits(together, torch.cat(single))


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
