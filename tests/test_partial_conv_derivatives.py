"""Partial convolution: second derivatives, and the gradient to a mask."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import (
    DTYPES,
    Backend,
    assert_within_budget,
    evaluate,
    generator,
    grid,
)
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
from pixel_cases import on_device, skip_unsupported
from torch import Tensor

CASE = Case(size=(2, 3, 7, 8), outputs=4)
# ---- second derivatives ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "mask", "bias", "dims"),
    [
        *((form, mask, "same", 2) for form in FORMS for mask in ("n1", "nc")),
        ("usual", "none", "same", 2),
        ("usual", "n1", None, 2),
        ("mat", "nc", "same", 3),
    ],
)
def test_gradcheck(backend: Backend, form: str, mask: str, bias: str | None, dims: int) -> None:
    case = Case(size=(1, 2, 2, 3, 2)[: dims + 2], outputs=2, kernel=2, options=FORMS[form])
    given = make_tensors(case, "f64", mask=mask, bias=bias)
    skip_unsupported(backend, given[0])
    leaves = [t.requires_grad_() for t in given[:3] if t is not None]
    call = lambda *t: run(backend, case, [*t, *[None] * (3 - len(t)), given[3]]).output  # noqa: E731
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


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
    linear = with_options(case, **{**case.options, "activation": "none"})
    sizes = second(
        formula(linear), [t.abs() for t in exact], upstream.double().abs(), [s.abs() for s in wide]
    )
    for i, (a, usual, want, size) in enumerate(zip(got, plain, truth, sizes, strict=True)):
        assert_within_budget(a, usual, want, acc=torch.float32, what=f"derivative {i}", magnitude=size)


@grid(form=FORMS, dtype=("f32", "f16", "bf16"), mask=("n1", "nc"))
def test_create_graph_does_not_change_the_gradient(
    backend: Backend, form: str, dtype: str, mask: str
) -> None:
    """By more than the rounding of a half that the library's convolution gets."""
    case = with_options(CASE, **FORMS[form])
    x, w, b, known = on_device(backend, *make_tensors(case, dtype, mask=mask))
    call = output_of(backend, case, known)
    _, first, (upstream,) = evaluate(call, (x, w, b), (0, 1, 2))
    leaves = [t.detach().requires_grad_() for t in (x, w, b)]
    again = torch.autograd.grad(call(*leaves), leaves, upstream, create_graph=True)
    linear = with_options(CASE, **{**FORMS[form], "activation": "none"})
    terms = evaluate(
        lambda *t: definition(linear, *t, known).output,
        [t.double().abs() for t in leaves],
        (0, 1, 2),
        [upstream],
    )[1]
    eps = torch.finfo(DTYPES[dtype]).eps if dtype != "f32" else 8 * torch.finfo(torch.float32).eps
    for got, want, size in zip(again, first, terms, strict=True):
        assert got.dtype == want.dtype
        assert bool(((got.double() - want.double()).abs() <= 2 * eps * size).all())


def test_gradient_penalty(backend: Backend) -> None:
    """As a critic with such layers has it: the norm of the input's gradient, by the weights of two layers."""
    x, w, b, mask = on_device(backend, *make_tensors(CASE))
    w2 = w.flatten()[: 3 * 4 * 9].view(3, 4, 3, 3).clone()

    def penalty(backend: Backend | None, wide: bool) -> tuple[Tensor, ...]:
        kind = torch.float64 if wide else torch.float32
        device = "cpu" if wide else x.device
        leaves = [t.detach().to(device, kind).requires_grad_() for t in (x, w, w2)]
        case2 = Case(size=(2, 4, 7, 8), outputs=3)
        if wide:
            middle = definition(CASE, *leaves[:2], b.to(device, kind), mask.cpu())
            value = definition(case2, F.silu(middle.output), leaves[2], None, middle.new_mask[:, :1]).output
        else:
            found = run(backend, CASE, [*leaves[:2], b, mask])
            value = run(backend, case2, [F.silu(found.output), leaves[2], None, found.new_mask]).output
        (grad,) = torch.autograd.grad(value.sum(), leaves[0], create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaves[1:])

    for got, want in zip(penalty(backend, False), penalty(None, True), strict=True):
        largest = float(want.abs().max())
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5 * largest)


@grid(form=FORMS, mask=("n1", "plane", "nc"), multi_channel=(None, True))
def test_gradient_to_the_mask(form: str, mask: str, multi_channel: bool | None) -> None:
    """The automatic choice takes the differentiable formula, for the output and the new mask."""
    case = Case(
        size=(1, 2, 4, 4), outputs=2, kernel=2, options={**FORMS[form], "multi_channel": multi_channel}
    )
    x, w, b, _ = make_tensors(case, "f64")
    # Away from 0 and from window sums of 1, where the formula has kinks.
    known = make_mask(mask, case.size, "f64", values="ones") * 0.7
    known += 0.05 * torch.rand(known.shape, generator=generator(2), dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, w, b, known)]
    assert torch.autograd.gradcheck(lambda *t: tuple(run(None, case, list(t))), leaves)
