"""Derivatives of every op: each gradient alone, second ones, numerical ones, those to a mask, and their layout."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from harness import Backend, Call, as_tuple, check_against_truth, evaluate, gradient_of, grid
from op_cases import SUBSETS, Op
from op_choices import SETTINGS, WAYS, ops
from pixel_cases import away_from_kinks, on_device, skip_unsupported
from ssim_cases import check as check_ssim
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last")
# Whose outputs need not depend on both images.
STACKS = ("stacked_images", "composite")
PAIRS = ("total_variation", "inpainting_pixel", "gradient_loss")


def outputs_of(op: Op, backend: Backend | None, number: int) -> tuple[Call, Call]:
    """One output of the call and of the formula."""
    call, formula = op.by(backend), op.formula
    return lambda *t: as_tuple(call(*t))[number], lambda *t: as_tuple(formula(*t))[number]


@grid(op=SETTINGS)
def test_only_the_gradients_asked_for(backend: Backend, op: Op) -> None:
    """Of each output alone: the others send no gradient at all."""
    for dtypes in ("bf16/f32", "f32/f32") if op.name == "masked_l1" else ("bf16/f32",):
        inputs = on_device(backend, *op.make(dtypes=dtypes))
        found = op.outputs(inputs, backend.name)
        assert not any(out.requires_grad for out in found)
        for wanted, number in product(SUBSETS[op.free], range(len(found))):
            call, formula = outputs_of(op, backend, number)
            leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
            out = call(*leaves)
            if not out.requires_grad:  # of parts that do not show this image
                assert op.name in STACKS
                continue
            out.sum().backward()
            got = [i for i, leaf in enumerate(leaves) if leaf.grad is not None]
            assert got == list(wanted) or op.name in STACKS
            op.judge(call, formula, inputs, wanted=wanted)


@grid(op=[*SETTINGS, *ops("partial_conv")], layout=(*LAYOUTS, "transposed"))
def test_gradients_have_the_layout_of_their_inputs(kernel: Backend, op: Op, layout: str) -> None:
    """As have maps and batches of images; for any other layout than these two, all of them are contiguous."""
    inputs = on_device(kernel, *op.make(layout=layout))
    outputs, gradients, _ = evaluate(op.by(kernel), inputs, op.wanted)
    alike = [out for out in outputs if out.shape[1:] == inputs[0].shape[1:] and op.name in WAYS]
    for got, like in [*zip(gradients[: op.free], inputs, strict=False), *((out, inputs[0]) for out in alike)]:
        if layout == "transposed" and like.ndim >= 4:
            assert got.is_contiguous()
        else:
            assert got.stride() == like.stride()


@grid(op=[op for op in SETTINGS if op.name in WAYS], layout=LAYOUTS)
def test_second_derivatives(backend: Backend, op: Op, layout: str) -> None:
    """By the images and the upstream gradient, also where autograd must fill in a zero."""
    masks = ("n1hw", "nomask") if op.name == "masked_l1" else ("n1hw",)
    for mask in masks:
        check_second_derivatives(backend, op, on_device(backend, *op.make(layout=layout, mask=mask)))


def check_second_derivatives(backend: Backend, op: Op, inputs: list[Tensor]) -> None:
    call, up = op.by(backend), len(inputs)
    outputs = op.outputs(inputs, backend.name)
    upstream = torch.full_like(outputs[0], 0.7)
    if op.name == "ssim":
        functions = gradient_of(call, op.wanted), gradient_of(op.formula, op.wanted)
        return check_ssim(*functions, [*inputs, upstream], (*op.wanted, up), of_gradients=True)
    # `gradient_of` sends i + 1 times the upstream gradient into output i. The derivative by the upstream gradient
    # sums first derivatives of both signs, times at most 1.5; that by an image may be a difference of larger terms.
    sent = [upstream * (i + 1) for i in range(len(outputs))]
    terms = [1.5 * g.abs() / 0.7 for g in evaluate(call, inputs, op.wanted, sent)[1]]
    size = sum(terms) if outputs[0].shape == inputs[0].shape else sum(t.sum() for t in terms)
    largest: dict[int, Tensor | None] = dict.fromkeys(op.wanted)
    check_against_truth(
        gradient_of(call, op.wanted),
        gradient_of(op.formula, op.wanted),
        [*inputs, upstream],
        wanted=(*op.wanted, up),
        magnitudes={**largest, up: size},
        output_magnitudes=largest if op.name in PAIRS else None,
    )


def clear_of_kinks(op: Op) -> list[Tensor]:
    """Small inputs in float64 at which a numerical derivative straddles no kink."""
    inputs = op.make((2, 1, 3, 2) if op.name in PAIRS else (2, 3, 2, 2), dtypes="f64/f64")
    images = inputs[: op.free]
    if op.name in PAIRS:
        # Neighbours, and those of a composite in eighths, are apart by more than a numerical derivative moves them.
        order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).double().view(2, 1, 3, 2)
        images = [order, (order * 1.7 + 0.3).flip(3)][: op.free]
    elif op.name in ("masked_l1", "hole_valid", "feature_distance", "ssim"):
        half = len(images) // 2
        for x, y in zip(range(half), range(half, 2 * half), strict=True):
            target = images[y].repeat(images[x].shape[0] // images[y].shape[0], 1, 1, 1)
            images[x] = away_from_kinks(images[x], target)[0]
    return [*(t.detach().requires_grad_() for t in images), *(t.double() for t in inputs[op.free :])]


@grid(op=SETTINGS)
def test_create_graph_and_autocast_do_not_change_the_gradient(
    backend: Backend, op: Op, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With both asked for in the backward, the gradient is still judged as the op's own."""
    grad, calls = torch.autograd.grad, iter([True])

    def first_of_all(*args: Any, **options: Any) -> Any:
        if not next(calls, False):  # of the formula
            return grad(*args, **options)
        # The backward of a plain matmul follows autocast.
        with torch.autocast(backend.device, torch.bfloat16, enabled=backend.name != "reference"):
            return grad(*args, **options, create_graph=True)

    inputs = on_device(backend, *op.make(dtypes="f16/f32"))
    monkeypatch.setattr(torch.autograd, "grad", first_of_all)
    op.check(op.by(backend), inputs)


@grid(op=SETTINGS)
def test_gradcheck(backend: Backend, op: Op) -> None:
    inputs = clear_of_kinks(op)
    skip_unsupported(backend, inputs[0])
    images, fixed = inputs[: op.free], inputs[op.free :]

    def call(*images: Tensor) -> tuple[Tensor, ...]:
        return op.outputs([*images, *fixed], backend.name)

    assert torch.autograd.gradcheck(call, images)
    assert torch.autograd.gradgradcheck(call, images)


@grid(
    op=[op for op in SETTINGS if op.name in WAYS],
    mask=("n1hw-f16", "hw-f32", "nchw-f32"),
)
def test_gradient_to_the_mask(op: Op, mask: str) -> None:
    """The automatic choice takes the differentiable formula, with the full derivative also at weight 0."""
    kind, dtype = mask.split("-")
    inputs = op.make(mask=kind)
    if "dilated" in op.id or "ring" in op.id:
        # Among equal values, as many halves would be, a maximum has many derivatives.
        inputs[-1] = torch.rand(inputs[-1].shape, generator=torch.Generator().manual_seed(0))
    elif dtype == "f16":
        inputs[-1] = inputs[-1].half()
    formula = partial(op.formula, select=False)
    wanted = tuple(range(len(inputs)))
    if op.name == "ssim":
        return op.judge(op.by(None), formula, inputs, wanted=wanted)
    for number in range(len(op.outputs(inputs))):
        check_against_truth(
            outputs_of(op, None, number)[0],
            lambda *t, number=number: as_tuple(formula(*t))[number],
            inputs,
            wanted=wanted,
            magnitudes=dict.fromkeys(wanted if op.name in PAIRS else wanted[-1:]),
        )
