"""Derivatives of total_variation_loss: one at a time, second ones, numerical ones, those to the mask."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from harness import Backend, check_against_truth, evaluate, gradient_of, grid
from pairs_cases import (
    MODES,
    PENALTIES,
    SOME_MODES,
    region_mask,
    total_variation_call,
    total_variation_formula,
)
from pixel_cases import image_pair, make_mask, on_device, skip_unsupported
from torch import Tensor

SIZE = (2, 3, 9, 14)
KINDS = ("image", "composite")


@grid(penalty=PENALTIES, mode=MODES, wanted=("image", "target"))
def test_one_gradient(backend: Backend, penalty: str, mode: str, wanted: str) -> None:
    options = {"mode": mode, "penalty": penalty}
    index = ("image", "target").index(wanted)
    inputs = on_device(backend, *image_pair(SIZE, "bf16/f32"), region_mask("n1hw", SIZE))
    call = total_variation_call(backend, **options)
    formula = partial(total_variation_formula, **options)
    check_against_truth(call, formula, inputs, wanted=(index,), magnitudes={index: None})
    leaves = [t.clone().requires_grad_(i == index) for i, t in enumerate(inputs)]
    call(*leaves).backward()
    assert [leaf.grad is not None for leaf in leaves[:2]] == [index == 0, index == 1]


@grid(layout=("contiguous", "channels_last"), penalty=PENALTIES, kind=KINDS)
def test_gradients_have_the_layout_of_the_image(
    kernel: Backend, layout: str, penalty: str, kind: str
) -> None:
    image, target = image_pair(SIZE, layouts=f"{layout}/{layout}")
    inputs = on_device(kernel, image, target if kind == "composite" else None, make_mask("n1hw", SIZE))
    call = total_variation_call(kernel, mode="dilated_hole-default", penalty=penalty)
    for got in evaluate(call, inputs, (0,) if kind == "image" else (0, 1))[1]:
        assert got.stride() == image.stride()


@grid(mode=SOME_MODES, penalty=PENALTIES, kind=KINDS, layout=("contiguous", "channels_last"))
def test_second_derivatives(backend: Backend, mode: str, penalty: str, kind: str, layout: str) -> None:
    options = {"mode": mode, "penalty": penalty, "mask_is": "hole" if layout == "contiguous" else "valid"}
    image, target = image_pair(SIZE, layouts=f"{layout}/{layout}")
    wanted = (0,) if kind == "image" else (0, 1)
    inputs = on_device(
        backend, image, None if kind == "image" else target, region_mask("n1hw", SIZE), torch.tensor(0.7)
    )
    call, formula = total_variation_call(backend, **options), partial(total_variation_formula, **options)
    # The derivative by the upstream gradient sums first derivatives of both signs, times at most 1.5.
    terms = 2 * sum(g.abs().sum() for g in evaluate(call, inputs[:3], wanted, [inputs[3]])[1])
    check_against_truth(
        gradient_of(call, wanted),
        gradient_of(formula, wanted),
        inputs,
        wanted=(*wanted, 3),
        magnitudes={**dict.fromkeys(wanted), 3: 2 * terms},
        output_magnitudes=dict.fromkeys(wanted),
    )


@grid(penalty=PENALTIES, mode=("image-default", "dilated_hole-mask"), factor=(1.0, 0.5))
def test_second_derivatives_of_a_target_made_of_the_image(
    backend: Backend, penalty: str, mode: str, factor: float
) -> None:
    """No path is counted twice. Factor 1: both arguments are the same tensor."""
    options = {"mode": mode, "penalty": penalty}
    image, mask = on_device(backend, image_pair(SIZE)[0], region_mask("n1hw", SIZE))

    def second_derivative(call: Any) -> Tensor:
        leaf = image.clone().requires_grad_()
        loss = call(leaf, leaf if factor == 1 else factor * leaf, mask)
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        if not first.requires_grad:  # l1: constant
            return torch.zeros_like(first)
        (second,) = torch.autograd.grad(first.square().sum(), leaf, allow_unused=True, materialize_grads=True)
        return second

    want = second_derivative(partial(total_variation_formula, **options))
    got = second_derivative(total_variation_call(backend, **options))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


@grid(penalty=PENALTIES, mode=SOME_MODES, kind=KINDS)
def test_gradcheck(backend: Backend, penalty: str, mode: str, kind: str) -> None:
    size = (2, 1, 3, 3)
    skip_unsupported(backend, torch.zeros(0, dtype=torch.float64))
    # Neighbours, and those of a composite in eighths, are apart by more than a numerical derivative moves them.
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0)).double().view(size)
    leaves = [order.requires_grad_(), (order * 1.7 + 0.3).flip(3).detach().requires_grad_()]
    mask = region_mask("n1hw", size, "f64")
    call = total_variation_call(backend, mode=mode, penalty=penalty)
    images = leaves[: KINDS.index(kind) + 1]

    def loss(image: Tensor, target: Tensor | None = None) -> Tensor:
        return call(image, target, mask)

    assert torch.autograd.gradcheck(loss, images)
    assert torch.autograd.gradgradcheck(loss, images)


@grid(penalty=PENALTIES, mode=MODES, kind=KINDS, mask=("hw", "nchw"))
def test_gradient_to_the_mask(penalty: str, mode: str, kind: str, mask: str) -> None:
    """The automatic choice takes the differentiable formula, with the full derivative also at weight 0."""
    options = {"mode": mode, "penalty": penalty, "mask_is": "hole" if mask == "hw" else "valid"}
    image, target = image_pair(SIZE)
    weights = make_mask(mask, SIZE)
    if mode.startswith("dilated"):
        # Among equal values a maximum has many derivatives.
        weights = torch.rand(weights.shape, generator=torch.Generator().manual_seed(0))
    wanted = (0, 2) if kind == "image" else (0, 1, 2)
    if mode.startswith("image") and kind == "image":
        wanted = (0,)
    check_against_truth(
        total_variation_call(None, **options),
        partial(total_variation_formula, **options, select=False),
        [image, None if kind == "image" else target, weights],
        wanted=wanted,
        magnitudes=dict.fromkeys(wanted),
    )
