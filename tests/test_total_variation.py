"""total_variation_loss: penalties of neighbouring pixels, of an image or of a composite that is never written."""

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
from pairs_cases import (
    BINARY_SIZES,
    MASK_IS,
    MODES,
    PENALTIES,
    REGIONS,
    SHAPES,
    SIZES,
    SOME_MODES,
    composite_formula,
    dilated,
    region_cases,
    region_mask,
    regions_of,
    tied_pair,
    total_variation_call,
    total_variation_formula,
)
from pixel_cases import (
    GPU_SIZES,
    MASK_DTYPES,
    image_pair,
    make_mask,
    on_device,
    skip_unsupported,
    with_specials,
)
from torch import Tensor

from inpaint_kernels.reference.total_variation import total_variation

SIZE = (2, 3, 9, 14)
KINDS = ("image", "composite")


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


def check_kind(
    backend: Backend, kind: str, pair: tuple[Tensor, Tensor], mask: Tensor | None, *options: str
) -> None:
    check(backend, pair[0], pair[1] if kind == "composite" else None, mask, *options)


@grid(mode=MODES, penalty=PENALTIES, mask_is=MASK_IS, kind=KINDS)
def test_core(backend: Backend, mode: str, penalty: str, mask_is: str, kind: str) -> None:
    check_kind(backend, kind, image_pair(SIZE), make_mask("n1hw", SIZE), mode, penalty, mask_is)


@grid(penalty=PENALTIES, mode=("image-default", "image-image"), layout=LAYOUTS)
def test_the_whole_image_needs_no_mask(backend: Backend, penalty: str, mode: str, layout: str) -> None:
    check(backend, laid_out(image_pair(SIZE)[0], layout), None, None, mode, penalty)


@grid(
    mode=("hole-mask", "dilated_hole-mask", "first_pixel-image"),
    mask=SHAPES,
    layout=("contiguous", "channels_last"),
    kind=KINDS,
    expanded=(False, True),
)
def test_mask_shapes(backend: Backend, mode: str, mask: str, layout: str, kind: str, expanded: bool) -> None:
    pair, weights = image_pair(SIZE, layouts=f"{layout}/{layout}"), make_mask(mask, SIZE)
    if expanded:
        check_kind(backend, kind, pair, weights.expand(SIZE), mode, "l2")
    else:
        check_kind(backend, kind, pair, weights, mode)


@grid(mask=("n1hw", "hw", "nchw"), mask_layout=LAYOUTS, layout=("contiguous", "channels_last"), kind=KINDS)
def test_mask_layouts(backend: Backend, mask: str, mask_layout: str, layout: str, kind: str) -> None:
    weights = laid_out(make_mask(mask, SIZE), mask_layout)
    check_kind(backend, kind, image_pair(SIZE, layouts=f"{layout}/{layout}"), weights)


@grid(image_layout=LAYOUTS, target_layout=LAYOUTS, penalty=PENALTIES)
def test_layouts(backend: Backend, image_layout: str, target_layout: str, penalty: str) -> None:
    pair = image_pair(SIZE, layouts=f"{image_layout}/{target_layout}")
    check(backend, *pair, make_mask("n1hw", SIZE), "dilated_hole-default", penalty)


@grid(
    penalty=PENALTIES,
    target_dtype=DTYPES,
    image_dtype=DTYPES,
    mode=("image-default", "hole-mask"),
    kind=KINDS,
)
def test_dtypes(
    backend: Backend, penalty: str, target_dtype: str, image_dtype: str, mode: str, kind: str
) -> None:
    pair = image_pair(SIZE, f"{image_dtype}/{target_dtype}")
    check_kind(backend, kind, pair, region_mask("n1hw", SIZE), mode, penalty)


@grid(
    dtype=MASK_DTYPES, mask=("n1hw", "nchw"), mask_is=MASK_IS, image_dtype=("f32", "f16", "f64"), kind=KINDS
)
def test_mask_dtypes(
    backend: Backend, dtype: str, mask: str, mask_is: str, image_dtype: str, kind: str
) -> None:
    pair = image_pair(SIZE, f"{image_dtype}/{image_dtype}")
    mode = "dilated_hole-mask"
    check_kind(backend, kind, pair, region_mask(mask, SIZE, dtype), mode, "l1", mask_is)


@grid(
    size=SIZES,
    layout=("contiguous", "channels_last"),
    mode=("image-default", "dilated_hole-mask"),
    kind=KINDS,
)
def test_sizes(backend: Backend, size: str, layout: str, mode: str, kind: str) -> None:
    """Both penalties, for their backwards are different kernels: one reads signs, the other three rows."""
    pair = image_pair(SIZES[size], layouts=f"{layout}/{layout}")
    for penalty in PENALTIES:
        check_kind(backend, kind, pair, make_mask("n1hw", SIZES[size]), mode, penalty)


@grid(size=BINARY_SIZES, mask=SHAPES, layout=("contiguous", "channels_last"))
def test_masks_of_zeros_and_ones(backend: Backend, size: str, mask: str, layout: str) -> None:
    """Which a backend may keep as bits; one fraction, in the last place, must undo that."""
    image, target = image_pair(SIZES[size], layouts=f"{layout}/{layout}")
    weights = region_mask(mask, SIZES[size], values="binary")
    check(backend, image, target, weights, "hole-mask")
    weights[(-1,) * weights.ndim] = 0.5
    check(backend, image, target, weights, "hole-mask")
    check(backend, image, None, weights, "first_pixel-image")


@grid(size=GPU_SIZES, layout=("contiguous", "channels_last"), penalty=PENALTIES, dtype=("f32", "bf16"))
def test_large_sizes(kernel: Backend, size: str, layout: str, penalty: str, dtype: str) -> None:
    if kernel.device != "cuda":
        pytest.skip("what a size changes on the CPU is in test_cpu_streaming.py")
    pair = image_pair(GPU_SIZES[size], f"{dtype}/{dtype}", f"{layout}/{layout}")
    check(kernel, *pair, region_mask("n1hw", GPU_SIZES[size]), "dilated_hole-mask", penalty)


@grid(values=("zeros", "ones", "binary"), mode=SOME_MODES, kind=KINDS, penalty=PENALTIES)
def test_all_hole_and_all_valid(backend: Backend, values: str, mode: str, kind: str, penalty: str) -> None:
    """An empty region gives 0 with zero gradient, never 0/0."""
    check_kind(backend, kind, image_pair(SIZE), make_mask("n1hw", SIZE, values=values), mode, penalty)


@grid(mode=("hole-mask", "dilated_hole-image"), kind=KINDS, layout=("contiguous", "channels_last"))
def test_a_sample_without_a_hole(backend: Backend, mode: str, kind: str, layout: str) -> None:
    mask = make_mask("n1hw", SIZE)
    mask[0] = 1
    check_kind(backend, kind, image_pair(SIZE, layouts=f"{layout}/{layout}"), mask, mode)


@grid(
    size=((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)),
    mode=("image-default", "hole-pairs", "dilated_hole-mask", "first_pixel-image"),
    kind=KINDS,
)
def test_nothing_to_count(backend: Backend, size: tuple[int, ...], mode: str, kind: str) -> None:
    for mask in ("n1hw", "nchw"):
        for penalty in PENALTIES:
            check_kind(backend, kind, image_pair(size), make_mask(mask, size), mode, penalty)


@grid(mode=("image-default", "dilated_hole-image"), kind=KINDS, layout=("contiguous", "channels_last"))
def test_no_gradient_between_equal_pixels(backend: Backend, mode: str, kind: str, layout: str) -> None:
    pair = tuple(laid_out(t, layout) for t in tied_pair(SIZE))
    check_kind(backend, kind, pair, region_mask("n1hw", SIZE), mode)
    flat = torch.full(SIZE, 0.3)
    inputs = on_device(backend, flat, None if kind == "image" else flat, region_mask("n1hw", SIZE))
    call = total_variation_call(backend, mode=mode, penalty="l1")
    (loss,), gradients, _ = evaluate(call, inputs, (0,) if kind == "image" else (0, 1))
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


@grid(mode=SOME_MODES, kind=KINDS, dtypes=("f16/f16", "f16/f32"), penalty=PENALTIES)
def test_extremes_do_not_overflow(backend: Backend, mode: str, kind: str, dtypes: str, penalty: str) -> None:
    image, target = image_pair(SIZE, dtypes)
    image[0, 0, 0], image[0, 0, 1] = 65504, -65504
    check_kind(backend, kind, (image, target), region_mask("n1hw", SIZE), mode, penalty)


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


@given(case=region_cases(), mode=st.sampled_from(list(MODES)), penalty=st.sampled_from(PENALTIES))
def test_any_input(backend: Backend, case: dict[str, Any], mode: str, penalty: str) -> None:
    check(backend, case["pred"], case["target"], case["mask"], mode, penalty)
    check(backend, case["pred"], None, case["mask"], mode, penalty, "hole")


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


@given(case=region_cases(), mode=st.sampled_from(list(MODES)), penalty=st.sampled_from(PENALTIES))
def test_mask_is_hole_flips_the_mask_only(
    backend: Backend, case: dict[str, Any], mode: str, penalty: str
) -> None:
    """In eighths 1 - mask is exact."""
    image, mask = on_device(backend, case["pred"], case["mask"].float())
    valid = total_variation_call(backend, mode=mode, penalty=penalty)
    hole = total_variation_call(backend, mode=mode, penalty=penalty, mask_is="hole")
    assert same_bits(valid(image, None, mask), hole(image, None, 1 - mask))


def test_the_packages_reference_is_the_formula() -> None:
    for mode, (region, normalize) in MODES.items():
        for penalty in PENALTIES:
            for mask_is in MASK_IS:
                options = {"penalty": penalty, "mask_is": mask_is}
                for target in (None, image_pair(SIZE)[1]):
                    check_against_truth(
                        lambda image, target, mask, options=options, region=region, norm=normalize: (
                            total_variation(
                                image, mask, target=target, region=region, normalize=norm, **options
                            )
                        ),
                        partial(total_variation_formula, mode=mode, **options),
                        [image_pair(SIZE)[0], target, make_mask("n1hw", SIZE)],
                        wanted=(0,),
                        magnitudes={0: None},
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
