"""Partial convolution: second derivatives, and the gradient to a mask."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from harness import Backend, assert_within_budget, generator, grid
from partial_conv_cases import (
    FORMS,
    Case,
    definition,
    exact_convolutions,  # noqa: F401
    make_mask,
    make_tensors,
    output_of,
    run,
    with_options,
)
from pixel_cases import on_device
from torch import Tensor

import inpaint_kernels as ik


def second(call: Any, leaves: list[Any], upstream: Tensor, seconds: list[Tensor]) -> tuple[Tensor, ...]:
    """Of the gradients to input, weight and bias, weighted by `seconds`: by input, weight, bias, upstream."""
    leaves = [t.detach().requires_grad_() for t in (*leaves, upstream)]
    first = torch.autograd.grad(call(*leaves[:-1]), leaves[:-1], leaves[-1], create_graph=True)
    return torch.autograd.grad(first, leaves, seconds, allow_unused=True, materialize_grads=True)


@grid(
    form=FORMS,
    mask=("none", "n1", "nc"),
    layout=("contiguous", "channels_last"),
    groups=(1, 2),
    dims=(2, 3),
)
def test_second_derivatives(
    backend: Backend, form: str, mask: str, layout: str, groups: int, dims: int
) -> None:
    size = (2, 4, 5, 6, 4)[: dims + 2]
    case = Case(size=size, outputs=4, groups=groups, stride=2, options=FORMS[form])
    x, w, b, known = on_device(backend, *make_tensors(case, mask=mask, layouts=f"{layout}/contiguous"))
    leaves = [x, w, b]
    exact = [t.double().cpu() for t in leaves]
    rng = generator(5)
    upstream = torch.randn(definition(case, *exact, known).output.shape, generator=rng)
    seconds = [torch.randn(t.shape, generator=rng) for t in leaves]
    moved = partial(on_device, backend)
    cpu_mask = None if known is None else known.cpu()
    got = second(output_of(backend, case, known), leaves, *moved(upstream), moved(*seconds))
    formula = lambda case: lambda *t: definition(case, *t, cpu_mask).output  # noqa: E731
    wide = [s.double() for s in seconds]
    truth = second(formula(case), exact, upstream.double(), wide)
    plain = second(formula(case), [t.cpu() for t in leaves], upstream, seconds)
    # Linear without the activation: absolute values give the sums of absolute terms.
    linear = with_options(case, activation="none")
    sizes = second(
        formula(linear), [t.abs() for t in exact], upstream.double().abs(), [s.abs() for s in wide]
    )
    for i, (a, usual, want, size) in enumerate(zip(got, plain, truth, sizes, strict=True)):
        assert_within_budget(a, usual, want, acc=torch.float32, what=f"derivative {i}", magnitude=size)


@grid(form=FORMS, mask=("n1", "plane", "nc"), multi_channel=(None, True))
def test_gradient_to_the_mask(form: str, mask: str, multi_channel: bool | None) -> None:
    """The automatic choice takes the differentiable formula, for the output and the new mask."""
    options = {**FORMS[form], "multi_channel": multi_channel}
    case = Case(size=(1, 2, 3, 3), outputs=2, kernel=2, options=options)
    x, w, b, _ = make_tensors(case, "f64")
    # Away from 0 and from window sums of 1, where the formula has kinks.
    known = make_mask(mask, case.size, "f64", values="ones") * 0.7
    known += 0.05 * torch.rand(known.shape, generator=generator(2), dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, w, b, known)]
    assert torch.autograd.gradcheck(lambda *t: tuple(run(None, case, list(t))), leaves)


def test_every_element_of_an_expanded_mask_gets_its_own_gradient() -> None:
    x, weight = torch.randn(2, 4, 6, 5).double(), torch.randn(3, 4, 3, 3).double()
    plane = torch.rand(1, 1, 6, 5).double() + 0.1
    gradients = []
    for mask in (plane.expand(2, 4, 6, 5), plane.repeat(2, 4, 1, 1)):
        mask = mask.detach().requires_grad_()
        output, new_mask = ik.partial_conv2d(x, weight, None, mask, padding=1, mask_update="proportional")
        gradients.append(torch.autograd.grad(output.square().sum() + new_mask.sum(), mask)[0])
    torch.testing.assert_close(*gradients)
