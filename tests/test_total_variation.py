"""total_variation_loss: penalties of neighbouring pixels, of an image or of a composite that is never written."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from harness import (
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
from pairs_cases import (
    MASK_IS,
    MODES,
    PENALTIES,
    REGIONS,
    composite_formula,
    dilated,
    region_cases,
    region_mask,
    regions_of,
    total_variation_call,
    total_variation_formula,
)
from pixel_cases import (
    image_pair,
    make_mask,
    on_device,
    skip_unsupported,
    with_specials,
)
from torch import Tensor

SIZE = (2, 3, 9, 14)


def check(
    backend: Backend,
    image: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    mode: str = "dilated_hole-default",
    penalty: str = "l1",
    mask_is: str = "valid",
) -> None:
    """An element's gradient is a sum of up to four terms of both signs: judged by the largest element."""
    wanted = (0,) if target is None else (0, 1)
    skip_unsupported(backend, *(t for t in (image, target) if t is not None))
    options = {"mode": mode, "penalty": penalty, "mask_is": mask_is}
    check_against_truth(
        total_variation_call(backend, **options),
        partial(total_variation_formula, **options),
        on_device(backend, image, target, mask),
        wanted=wanted,
        magnitudes=dict.fromkeys(wanted),
    )


@grid(penalty=PENALTIES, mode=("image-default", "image-image"), layout=LAYOUTS)
def test_the_whole_image_needs_no_mask(backend: Backend, penalty: str, mode: str, layout: str) -> None:
    check(backend, laid_out(image_pair(SIZE)[0], layout), None, None, mode, penalty)


def untouched(mask: Tensor, region: str, mask_is: str) -> Tensor:
    """Pixels all of whose pairs weigh 0, for a mask of zeros and ones."""
    weights = regions_of(mask, SIZE, mask_is)[0]
    weights = dilated(weights) if region == "dilated_hole" else weights
    if region == "first_pixel":  # the pixel also ends the pairs of the one above and of the one to the left
        weights = weights.clone()
        weights[..., 1:, :] += weights[..., :-1, :].clone()
        weights[..., 1:] += regions_of(mask, SIZE, mask_is)[0][..., :-1]
    return weights == 0


@grid(
    region=REGIONS[1:],
    penalty=PENALTIES,
    mask_is=MASK_IS,
    mask=("n1hw", "nchw"),
    layout=("contiguous", "channels_last"),
)
def test_specials_outside_of_the_region(
    backend: Backend, region: str, penalty: str, mask_is: str, mask: str, layout: str
) -> None:
    """NaN and Inf in pairs of weight 0 change no bit of the loss and of the gradient."""
    weights = make_mask(mask, SIZE, values="ones")
    weights[..., 2:5, 6:9] = 0
    if mask_is == "hole":
        weights = 1 - weights
    image = image_pair(SIZE)[0]
    places = untouched(weights, region, mask_is)
    assert 0 < places.sum() < places.numel()
    call = total_variation_call(backend, mode=f"{region}-mask", penalty=penalty, mask_is=mask_is)
    clean = evaluate(call, on_device(backend, laid_out(image, layout), None, weights), (0,))
    dirty = laid_out(with_specials(image, places), layout)
    result = evaluate(call, on_device(backend, dirty, None, weights), (0,), clean[2])
    for got, want in zip((*result[0], *result[1]), (*clean[0], *clean[1]), strict=True):
        assert same_bits(got, want)
        assert got.isfinite().all()


@grid(
    side=("image", "target"),
    mode=("image-default", "dilated_hole-mask", "first_pixel-image"),
    penalty=PENALTIES,
    mask_is=MASK_IS,
    mask=("n1hw", "nchw"),
)
def test_specials_the_composite_does_not_take(
    backend: Backend, side: str, mode: str, penalty: str, mask_is: str, mask: str
) -> None:
    """NaN and Inf of the image on known pixels, and of the target inside the hole, change no bit."""
    weights = make_mask(mask, SIZE, values="binary")
    hole, valid = regions_of(weights, SIZE, mask_is)
    pair = list(image_pair(SIZE))
    call = total_variation_call(backend, mode=mode, penalty=penalty, mask_is=mask_is)
    clean = evaluate(call, on_device(backend, *pair, weights), (0, 1))
    index, weight = (0, hole) if side == "image" else (1, valid)
    pair[index] = with_specials(pair[index], weight == 0)
    result = evaluate(call, on_device(backend, *pair, weights), (0, 1), clean[2])
    for got, want in zip((*result[0], *result[1]), (*clean[0], *clean[1]), strict=True):
        assert same_bits(got, want)
        assert got.isfinite().all()


@grid(penalty=PENALTIES, layout=("contiguous", "channels_last"), of=("image", "pred", "target"))
def test_nan_reaches_its_neighbours_only(backend: Backend, penalty: str, layout: str, of: str) -> None:
    """And of the images of a composite that alone which is seen there."""
    pair, index = image_pair(SIZE, layouts=f"{layout}/{layout}"), int(of == "target")
    pair[index][1, 2, 4, 7] = torch.nan
    mask = make_mask("n1hw", SIZE, values="ones" if of == "target" else "zeros")
    inputs = on_device(backend, pair[0], None if of == "image" else pair[1], mask)
    mode = "image-default" if of == "target" else "hole-default"
    call = total_variation_call(backend, mode=mode, penalty=penalty)
    (loss,), gradients, _ = evaluate(call, inputs, (0,) if of == "image" else (0, 1))
    assert loss.isnan()
    # l1 as torch.sign: 0 for a NaN. l2: the pixel and its four neighbours.
    assert int((~gradients[index].isfinite()).sum()) == (0 if penalty == "l1" else 5)
    assert of == "image" or not gradients[1 - index].any()


@given(
    case=region_cases(),
    mode=st.sampled_from([mode for mode in MODES if not mode.startswith("first_pixel")]),
    penalty=st.sampled_from(PENALTIES),
    turn=st.sampled_from(("rows", "columns", "both", "transpose")),
)
def test_turning_the_image_turns_the_gradient(
    backend: Backend, case: dict[str, Any], mode: str, penalty: str, turn: str
) -> None:
    """Every pair keeps its pixels and weight, apart from "first_pixel", which has a direction."""

    def turned(t: Tensor) -> Tensor:
        if turn == "transpose":
            return t.transpose(-1, -2)
        return t.flip({"rows": (-2,), "columns": (-1,), "both": (-2, -1)}[turn])

    call = total_variation_call(backend, mode=mode, penalty=penalty)
    mask = case["mask"].expand(case["pred"].shape).float()
    image = case["pred"].float()
    inputs = on_device(backend, image, None, mask)
    (value,), (gradient,), upstream = evaluate(call, inputs, (0,))
    other = on_device(backend, turned(image), None, turned(mask))
    (again,), (back,), _ = evaluate(call, other, (0,), upstream)
    torch.testing.assert_close(again, value, rtol=1e-5, atol=1e-30)
    size = float(gradient.abs().max()) if gradient.numel() else 0.0
    torch.testing.assert_close(back, turned(gradient), rtol=1e-5, atol=1e-6 * size + 1e-30)


@given(case=region_cases(), mode=st.sampled_from(list(MODES)), penalty=st.sampled_from(PENALTIES))
def test_the_composite_need_not_be_written(
    backend: Backend, case: dict[str, Any], mode: str, penalty: str
) -> None:
    pred, target, mask = on_device(backend, case["pred"].float(), case["target"].float(), case["mask"])
    call = total_variation_call(backend, mode=mode, penalty=penalty)
    written = composite_formula(pred, target, mask.float())
    torch.testing.assert_close(
        call(pred, target, mask), call(written, None, mask), rtol=1e-5, atol=1e-6, equal_nan=False
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
