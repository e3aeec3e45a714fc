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
    gradient_of,
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
    away_from_kinks,
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


@grid(penalty=PENALTIES, mode=MODES, wanted=((), (0,), (1,)), dtypes=("f32/f32", "bf16/f32"))
def test_only_the_gradients_asked_for(
    backend: Backend, penalty: str, mode: str, wanted: tuple[int, ...], dtypes: str
) -> None:
    inputs = on_device(backend, *image_pair(SIZE, dtypes), make_mask("n1hw", SIZE))
    call = masked_call(backend, penalty=penalty, mode=mode)
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    out = call(*leaves)
    assert out.requires_grad == bool(wanted)
    if wanted:
        out.sum().backward()
    assert [i for i, leaf in enumerate(leaves) if leaf.grad is not None] == list(wanted)
    check_against_truth(call, partial(masked_formula, penalty=penalty, mode=mode), inputs, wanted=wanted)


@grid(layout=("contiguous", "channels_last"), penalty=("l1", "l2"), mode=("mask", "none"))
def test_gradient_and_map_have_the_layout_of_pred(
    kernel: Backend, layout: str, penalty: str, mode: str
) -> None:
    pair = image_pair(SIZE, layouts=f"{layout}/{layout}")
    inputs = on_device(kernel, *pair, make_mask("n1hw", SIZE))
    (out,), gradients, _ = evaluate(masked_call(kernel, penalty=penalty, mode=mode), inputs, (0, 1))
    for got in (*gradients, *([out] if mode == "none" else [])):
        assert got.stride() == pair[0].stride()


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


@grid(penalty=PENALTIES, mode=MODES, mask=("nomask", "n1hw"), layout=("contiguous", "channels_last"))
def test_second_derivatives(backend: Backend, penalty: str, mode: str, mask: str, layout: str) -> None:
    """By pred, target and the upstream gradient, also where autograd must fill in a zero."""
    inputs = on_device(backend, *image_pair(SIZE, layouts=f"{layout}/{layout}"), make_mask(mask, SIZE))
    call = masked_call(backend, penalty=penalty, mode=mode)
    _, (first, _), (upstream,) = evaluate(call, inputs, (0, 1))
    # The derivative by the upstream gradient sums first derivatives of both signs, times at most 1.5 for
    # pred and for target; that by pred is, for charbonnier, a difference of two larger terms.
    terms = 3 * first.abs() / upstream
    formula = partial(masked_formula, penalty=penalty, mode=mode)
    check_against_truth(
        gradient_of(call),
        gradient_of(formula),
        [*inputs, upstream],
        wanted=(0, 1, 3),
        magnitudes={0: None, 1: None, 3: terms if mode == "none" else terms.sum()},
    )


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


@grid(penalty=PENALTIES, mode=MODES)
def test_gradcheck(backend: Backend, penalty: str, mode: str) -> None:
    size = (2, 2, 2, 2)
    pred, target = image_pair(size, "f64/f64")
    skip_unsupported(backend, pred)
    pred, target = away_from_kinks(pred, target)
    call = masked_call(backend, penalty=penalty, mode=mode)
    weights = make_mask("n1hw", size, "f64")
    leaves = (pred.requires_grad_(), target.requires_grad_())
    assert torch.autograd.gradcheck(lambda p, t: call(p, t, weights), leaves)
    assert torch.autograd.gradgradcheck(lambda p, t: call(p, t, weights), leaves)


@grid(penalty=PENALTIES, mode=MODES, mask=("n1hw", "hw", "nchw"), dtype=("f32", "f16"))
def test_gradient_to_the_mask(penalty: str, mode: str, mask: str, dtype: str) -> None:
    """The automatic choice takes the differentiable formula, with the full derivative also at weight 0."""
    check_against_truth(
        masked_call(None, penalty=penalty, mode=mode),
        partial(masked_formula, penalty=penalty, mode=mode, select=False),
        [*image_pair(SIZE), make_mask(mask, SIZE, dtype)],
        wanted=(0, 1, 2),
        magnitudes={2: None},
    )


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
