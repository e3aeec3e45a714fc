"""masked_l1_loss, masked_mse_loss, masked_charbonnier_loss, masked_huber_loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from harness import (
    Backend,
    check_against_truth,
    evaluate,
    grid,
    laid_out,
    same_bits,
)
from hypothesis import given
from hypothesis import strategies as st
from pixel_cases import (
    MODES,
    PARAMS,
    PENALTIES,
    image_cases,
    image_pair,
    make_mask,
    masked_call,
    masked_formula,
    on_device,
    skip_unsupported,
    with_specials,
)
from torch import Tensor

# Planes of 126 elements: several vectors of 8 or 16, then a tail, in NCHW and in channels_last.
SIZE = (2, 3, 9, 14)


def check(
    backend: Backend,
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    penalty: str = "l1",
    mode: str = "mask",
) -> None:
    skip_unsupported(backend, pred, target)
    check_against_truth(
        masked_call(backend, penalty=penalty, mode=mode),
        partial(masked_formula, penalty=penalty, mode=mode),
        on_device(backend, pred, target, mask),
    )


@grid(
    penalty=PENALTIES,
    mode=MODES,
    layout=("contiguous", "channels_last"),
    size=(SIZE, (0, 3, 4, 5), (2, 0, 4, 5)),
)
def test_without_a_mask(
    backend: Backend, penalty: str, mode: str, layout: str, size: tuple[int, ...]
) -> None:
    check(backend, *image_pair(size, layouts=f"{layout}/{layout}"), None, penalty, mode)


@grid(penalty=PENALTIES, mode=MODES, mask=("n1hw", "hw", "nchw"), mask_dtype=("f32", "bool"))
def test_specials_outside_the_mask(
    backend: Backend, penalty: str, mode: str, mask: str, mask_dtype: str
) -> None:
    """What lies where the mask is 0 changes no bit of the loss or of a gradient."""
    weights = make_mask(mask, SIZE, mask_dtype)
    pred, target = image_pair(SIZE)
    call = masked_call(backend, penalty=penalty, mode=mode)
    clean = evaluate(call, on_device(backend, pred, target, weights), (0, 1))
    for dirty in (
        (with_specials(pred, weights == 0), target),
        (pred, with_specials(target, weights == 0)),
        (with_specials(pred, weights == 0), with_specials(target, weights == 0)),
    ):
        result = evaluate(call, on_device(backend, *dirty, weights), (0, 1), clean[2])
        for got, want in zip((*result[0], *result[1]), (*clean[0], *clean[1]), strict=True):
            assert torch.equal(got, want)
            assert got.isfinite().all()


@grid(penalty=PENALTIES, mode=MODES, special=("nan", "inf", "-inf"), layout=("contiguous", "channels_last"))
def test_counted_specials_propagate(
    backend: Backend, penalty: str, mode: str, special: str, layout: str
) -> None:
    """Into the loss and their own gradient, as in PyTorch (where sign(NaN) is 0), into no other gradient."""
    mask = make_mask("n1hw", SIZE, values="ones")
    pred, target = image_pair(SIZE, layouts=f"{layout}/{layout}")
    places = ((0, 0, 0, 0), (0, 2, 4, 5), (1, 1, 8, 13))
    call = masked_call(backend, penalty=penalty, mode=mode)
    clean = evaluate(call, on_device(backend, pred, target, mask), (0, 1))
    for place in places:
        pred[place] = float(special)
    (value,), gradients, _ = evaluate(call, on_device(backend, pred, target, mask), (0, 1), clean[2])
    at = tuple(torch.tensor(places).T)
    assert not (value[at] if mode == "none" else value).isfinite().any()
    if special == "nan":
        expected = torch.full((3,), 0.0 if penalty == "l1" else float("nan"))
    else:
        slope = {"l1": 1.0, "l2": float("inf"), "charbonnier": float("nan"), "huber": PARAMS["huber"]}[
            penalty
        ]
        reduction = MODES[mode][0]
        coefficient = clean[2][0][at].cpu() if mode == "none" else clean[2][0].cpu().expand(3)
        if reduction == "mean":  # the mask is all ones: every normalisation divides by the element count
            coefficient = coefficient / pred.numel()
        expected = coefficient * (slope if special == "inf" else -slope)
    untouched = torch.ones(SIZE, dtype=torch.bool)
    untouched[at] = False
    for sign, got, want in zip((1, -1), gradients, clean[1], strict=True):
        torch.testing.assert_close(got.cpu()[at], sign * expected, equal_nan=True)
        assert torch.equal(got.cpu()[untouched], want.cpu()[untouched])


@grid(penalty=PENALTIES, mode=MODES, layout=("contiguous", "channels_last"))
def test_create_graph_does_not_change_the_gradient(
    backend: Backend, penalty: str, mode: str, layout: str
) -> None:
    weights = make_mask("n1hw", SIZE)
    pred, target = image_pair(SIZE, layouts=f"{layout}/{layout}")
    pred = laid_out(with_specials(pred, weights == 0), layout)
    pred[1, :, 3, 3] = float("nan")
    weights[1, :, 3, 3] = 1
    inputs = on_device(backend, pred, target, weights)
    call = masked_call(backend, penalty=penalty, mode=mode)
    _, first, (upstream,) = evaluate(call, inputs, (0, 1))
    leaves = [t.detach().requires_grad_(i < 2) for i, t in enumerate(inputs)]
    again = torch.autograd.grad(call(*leaves), leaves[:2], upstream, create_graph=True)
    for got, want in zip(again, first, strict=True):
        torch.testing.assert_close(got.detach(), want, rtol=1e-6, atol=0, equal_nan=True)


@given(case=image_cases(), penalty=st.sampled_from(PENALTIES), mode=st.sampled_from(("mask", "sample")))
def test_scaling_the_mask_changes_nothing(
    backend: Backend, case: dict[str, Any], penalty: str, mode: str
) -> None:
    """A power of two is exact in every sum and quotient, so not a bit may change."""
    mask = torch.ones(case["pred"].shape[-2:]) if case["mask"] is None else case["mask"].float()
    inputs = on_device(backend, case["pred"], case["target"], mask)
    call = masked_call(backend, penalty=penalty, mode=mode)
    first = evaluate(call, inputs, (0, 1))
    scaled = evaluate(call, [*inputs[:2], 4 * inputs[2]], (0, 1), first[2])
    for got, want in zip((*scaled[0], *scaled[1]), (*first[0], *first[1]), strict=True):
        assert torch.equal(got, want)


@given(case=image_cases(), penalty=st.sampled_from(PENALTIES), mode=st.sampled_from(list(MODES)))
def test_swapping_pred_and_target(backend: Backend, case: dict[str, Any], penalty: str, mode: str) -> None:
    """Every penalty is even: the value keeps its bits, the gradients change places."""
    pred, target, mask = on_device(
        backend, case["pred"].contiguous(), case["target"].contiguous(), case["mask"]
    )
    call = masked_call(backend, penalty=penalty, mode=mode)
    (value,), (grad_pred, grad_target), upstream = evaluate(call, (pred, target, mask), (0, 1))
    (again,), swapped, _ = evaluate(call, (target, pred, mask), (0, 1), upstream)
    assert same_bits(value, again)
    assert torch.equal(swapped[0], grad_target)
    assert torch.equal(swapped[1], grad_pred)
