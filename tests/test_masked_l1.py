"""masked_l1_loss, masked_mse_loss, masked_charbonnier_loss, masked_huber_loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from harness import (
    DTYPES,
    LAYOUTS,
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
    GPU_SIZES,
    MASK_DTYPES,
    MASK_SHAPES,
    MODES,
    PARAMS,
    PENALTIES,
    SIZES,
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

from inpaint_kernels.reference.masked_l1 import masked_loss

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


@grid(penalty=PENALTIES, mode=MODES, mask=("nomask", "n1hw"))
def test_core(backend: Backend, penalty: str, mode: str, mask: str) -> None:
    check(backend, *image_pair(SIZE), make_mask(mask, SIZE), penalty, mode)


@grid(penalty=("l1", "huber"), mode=MODES, mask=MASK_SHAPES, layout=("contiguous", "channels_last"))
def test_mask_shapes(backend: Backend, penalty: str, mode: str, mask: str, layout: str) -> None:
    pair = image_pair(SIZE, layouts=f"{layout}/{layout}")
    check(backend, *pair, make_mask(mask, SIZE), penalty, mode)


@grid(
    mask=("n1hw", "hw", "nchw"),
    mask_layout=LAYOUTS,
    layout=("contiguous", "channels_last"),
    mode=("mask", "none"),
)
def test_mask_layouts(backend: Backend, mask: str, mask_layout: str, layout: str, mode: str) -> None:
    weights = laid_out(make_mask(mask, SIZE), mask_layout)
    check(backend, *image_pair(SIZE, layouts=f"{layout}/{layout}"), weights, "l1", mode)


@grid(layout=("contiguous", "channels_last"), mode=MODES)
def test_mask_expanded_view(backend: Backend, layout: str, mode: str) -> None:
    """Stride 0 over samples, channels, both, and over the picture itself."""
    for kind in ("n1hw", "1chw", "11hw", "hw", "n1h1"):
        weights = make_mask(kind, SIZE).expand(SIZE)
        check(backend, *image_pair(SIZE, layouts=f"{layout}/{layout}"), weights, "l2", mode)


@grid(pred_layout=LAYOUTS, target_layout=LAYOUTS, mode=("mask", "none"))
def test_layouts(backend: Backend, pred_layout: str, target_layout: str, mode: str) -> None:
    for penalty in ("l1", "l2"):
        pair = image_pair(SIZE, layouts=f"{pred_layout}/{target_layout}")
        check(backend, *pair, make_mask("n1hw", SIZE), penalty, mode)


@grid(penalty=PENALTIES, mode=("sample", "none"), target_dtype=DTYPES, pred_dtype=DTYPES)
def test_dtypes(backend: Backend, penalty: str, mode: str, target_dtype: str, pred_dtype: str) -> None:
    check(backend, *image_pair(SIZE, f"{pred_dtype}/{target_dtype}"), make_mask("n1hw", SIZE), penalty, mode)


@grid(dtype=MASK_DTYPES, mask=("n1hw", "nchw"), mode=MODES, pred_dtype=("f32", "f16", "f64"))
def test_mask_dtypes(backend: Backend, dtype: str, mask: str, mode: str, pred_dtype: str) -> None:
    check(backend, *image_pair(SIZE, f"{pred_dtype}/{pred_dtype}"), make_mask(mask, SIZE, dtype), "l1", mode)


@grid(
    size=SIZES, mode=("mask", "sample", "none"), layout=("contiguous", "channels_last"), penalty=("l1", "l2")
)
def test_sizes(backend: Backend, size: str, mode: str, layout: str, penalty: str) -> None:
    pair = image_pair(SIZES[size], layouts=f"{layout}/{layout}")
    check(backend, *pair, make_mask("n1hw", SIZES[size]), penalty, mode)


@grid(size=SIZES, mask=("n1hw", "nchw"), mode=("mask", "none"), layout=("contiguous", "channels_last"))
def test_masks_of_zeros_and_ones(backend: Backend, size: str, mask: str, mode: str, layout: str) -> None:
    """Which the signs contain already; one fraction, in the last place, must undo that."""
    pair = image_pair(SIZES[size], layouts=f"{layout}/{layout}")
    weights = make_mask(mask, SIZES[size], values="binary")
    check(backend, *pair, weights, "l1", mode)
    weights[-1, -1, -1, -1] = 0.5
    check(backend, *pair, weights, "l1", mode)


@grid(size=GPU_SIZES, layout=("contiguous", "channels_last"), penalty=("l1", "huber"), dtype=("f32", "bf16"))
def test_large_sizes(kernel: Backend, size: str, layout: str, penalty: str, dtype: str) -> None:
    if kernel.device != "cuda":
        pytest.skip("what a size changes on the CPU is in test_cpu_streaming.py")
    pair = image_pair(GPU_SIZES[size], f"{dtype}/{dtype}", f"{layout}/{layout}")
    check(kernel, *pair, make_mask("n1hw", GPU_SIZES[size]), penalty, "mask")


@grid(values=("zeros", "ones", "binary"), penalty=PENALTIES, mode=MODES)
def test_whole_and_empty_masks(backend: Backend, values: str, penalty: str, mode: str) -> None:
    check(backend, *image_pair(SIZE), make_mask("n1hw", SIZE, values=values), penalty, mode)


@grid(mode=MODES, penalty=PENALTIES)
def test_one_empty_sample(backend: Backend, mode: str, penalty: str) -> None:
    mask = make_mask("n1hw", SIZE)
    mask[0] = 0
    check(backend, *image_pair(SIZE), mask, penalty, mode)


@grid(penalty=PENALTIES, mode=MODES)
def test_identical_inputs(backend: Backend, penalty: str, mode: str) -> None:
    """The usual state outside the hole; the subgradient of every penalty is exactly 0."""
    pred, mask = on_device(backend, image_pair(SIZE)[0], make_mask("n1hw", SIZE))
    call = masked_call(backend, penalty=penalty, mode=mode)
    (value,), gradients, _ = evaluate(call, (pred, pred.clone(), mask), (0, 1))
    if penalty != "charbonnier":
        assert not value.any()
    assert not any(g.any() for g in gradients)
    check(backend, pred, pred.clone(), mask, penalty, mode)


@grid(size=((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (0, 0, 0, 0)), mode=MODES, penalty=("l1", "l2"))
def test_nothing_to_count(backend: Backend, size: tuple[int, ...], mode: str, penalty: str) -> None:
    for mask in ("nomask", "n1hw", "nchw"):
        check(backend, torch.randn(size), torch.randn(size), make_mask(mask, size), penalty, mode)


@grid(mode=MODES, dtypes=("f16/f16", "f16/f32", "bf16/f16"), penalty=PENALTIES)
def test_extremes_do_not_overflow(backend: Backend, mode: str, dtypes: str, penalty: str) -> None:
    """A difference of 131008 leaves float16, its square does too; the sums are float32."""
    pred, target = image_pair(SIZE, dtypes)
    pred[0, 0, 0], target[0, 0, 0] = 65504, -65504
    pred[1, 2, 3], target[1, 2, 3] = -6e-8, 6e-8
    check(backend, pred, target, make_mask("n1hw", SIZE), penalty, mode)


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


@grid(upstream=("expanded", "channels_last", "transposed", "padded"), layout=("contiguous", "channels_last"))
def test_any_strides_of_the_upstream_gradient(backend: Backend, upstream: str, layout: str) -> None:
    """The gradient of a map arrives expanded from a sum, or in whatever layout the next op left it."""
    for penalty in ("l1", "huber"):
        call = masked_call(backend, penalty=penalty, mode="none")
        inputs = on_device(backend, *image_pair(SIZE, layouts=f"{layout}/{layout}"), make_mask("n1hw", SIZE))
        values = torch.full((1, 1, 1, 1), 0.7).expand(SIZE) if upstream == "expanded" else torch.randn(SIZE)
        plain = values.contiguous().to(backend.device)
        if upstream == "expanded":
            view = values.to(backend.device).as_strided(SIZE, (0, 0, 0, 0))
        else:
            view = on_device(backend, laid_out(values, upstream))[0]
        for got, want in zip(
            evaluate(call, inputs, (0, 1), [view])[1], evaluate(call, inputs, (0, 1), [plain])[1], strict=True
        ):
            assert torch.equal(got, want)


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


@given(case=image_cases(), penalty=st.sampled_from(PENALTIES), mode=st.sampled_from(list(MODES)))
def test_any_input(backend: Backend, case: dict[str, Any], penalty: str, mode: str) -> None:
    check(backend, **case, penalty=penalty, mode=mode)


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


def test_the_packages_reference_is_the_formula() -> None:
    """The function that the benchmarks call the truth, against the formula of these tests."""
    for penalty, param in PARAMS.items():
        for mode, (reduction, normalize) in MODES.items():
            options = {"penalty": penalty, "param": param, "reduction": reduction, "normalize": normalize}
            check_against_truth(
                partial(masked_loss, **options),
                partial(masked_formula, penalty=penalty, mode=mode),
                [*image_pair(SIZE), make_mask("n1hw", SIZE)],
            )
