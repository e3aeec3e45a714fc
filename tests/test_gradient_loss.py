"""gradient_loss: differences of neighbours in the composite against those in the truth, in every region."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import pytest
import torch
from harness import (
    DTYPES,
    INTERPRETING,
    LAYOUTS,
    Backend,
    check_against_truth,
    covering,
    evaluate,
    generator,
    gradient_of,
    grid,
    laid_out,
    same_bits,
)
from hypothesis import given
from hypothesis import strategies as st
from pairs_cases import (
    GRADIENT_REGIONS,
    MASK_IS,
    PENALTIES,
    SHAPES,
    SIZES,
    gradient_loss_call,
    gradient_loss_formula,
    region_cases,
    region_mask,
    regions_of,
    tied_pair,
)
from pixel_cases import MASK_DTYPES, image_pair, make_mask, on_device, skip_unsupported, with_specials
from torch import Tensor
from training_checks import (
    check_compiles,
    check_deterministic,
    check_no_host_sync,
    kept_bytes,
)

import inpaint_kernels as ik

SIZE = (2, 3, 9, 14)


def check(backend: Backend, pred: Tensor, target: Tensor, mask: Tensor | None, **options: Any) -> None:
    """An element's gradient is a sum of up to four terms of both signs: judged by the largest element."""
    skip_unsupported(backend, pred, target)
    check_against_truth(
        gradient_loss_call(backend, **options),
        partial(gradient_loss_formula, **options),
        on_device(backend, pred, target, mask),
        magnitudes={0: None, 1: None},
    )


@grid(region=GRADIENT_REGIONS, penalty=PENALTIES, mask_is=MASK_IS, values=("mixed", "binary"))
def test_core(backend: Backend, region: str, penalty: str, mask_is: str, values: str) -> None:
    mask = region_mask("n1hw", SIZE, values=values)
    check(backend, *image_pair(SIZE), mask, region=region, penalty=penalty, mask_is=mask_is)


@grid(penalty=PENALTIES, layout=LAYOUTS)
def test_the_whole_image_needs_no_mask(backend: Backend, penalty: str, layout: str) -> None:
    pair = image_pair(SIZE, layouts=f"{layout}/{layout}")
    check(backend, *pair, None, region="image", penalty=penalty)


@grid(ring=(0, 1, 3, 5, 50), mask_is=MASK_IS)
def test_rings_of_any_width(backend: Backend, ring: int, mask_is: str) -> None:
    size = (2, 2, 17, 23)
    mask = torch.ones(2, 1, *size[2:])
    mask[0, :, 6:9, 8:11] = 0
    mask[1, :, :2, 15:] = 0.25
    check(backend, *image_pair(size), mask if mask_is == "valid" else 1 - mask, ring=ring, mask_is=mask_is)


@covering(region=GRADIENT_REGIONS, mask=SHAPES, layout=LAYOUTS, expanded=(False, True))
def test_mask_shapes_and_layouts(
    backend: Backend, region: str, mask: str, layout: str, expanded: bool
) -> None:
    weights = laid_out(region_mask(mask, SIZE), layout)
    check(backend, *image_pair(SIZE), weights.expand(SIZE) if expanded else weights, region=region)


@covering(region=("image", "ring"), pred=LAYOUTS, target=LAYOUTS, penalty=PENALTIES)
def test_layouts(backend: Backend, region: str, pred: str, target: str, penalty: str) -> None:
    pair = image_pair(SIZE, layouts=f"{pred}/{target}")
    check(backend, *pair, region_mask("n1hw", SIZE), region=region, penalty=penalty)


@grid(region=("hole", "ring"), pred=DTYPES, target=DTYPES)
def test_dtypes(backend: Backend, region: str, pred: str, target: str) -> None:
    for penalty in PENALTIES:
        pair = image_pair(SIZE, f"{pred}/{target}")
        check(backend, *pair, region_mask("n1hw", SIZE), region=region, penalty=penalty)


@grid(region=("hole", "ring"), mask=MASK_DTYPES, mask_is=MASK_IS, image=("f16", "f64"))
def test_mask_dtypes(backend: Backend, region: str, mask: str, mask_is: str, image: str) -> None:
    pair = image_pair(SIZE, f"{image}/{image}")
    check(backend, *pair, region_mask("n1hw", SIZE, mask), region=region, mask_is=mask_is)


@grid(size=SIZES, layout=("contiguous", "channels_last"), region=GRADIENT_REGIONS)
def test_sizes(backend: Backend, size: str, layout: str, region: str) -> None:
    pair = image_pair(SIZES[size], layouts=f"{layout}/{layout}")
    check(backend, *pair, region_mask("n1hw", SIZES[size]), region=region)


@grid(values=("zeros", "ones"), region=GRADIENT_REGIONS, penalty=PENALTIES, mask_is=MASK_IS)
def test_all_hole_and_all_valid(
    backend: Backend, values: str, region: str, penalty: str, mask_is: str
) -> None:
    mask = make_mask("n1hw", SIZE, values=values)
    check(backend, *image_pair(SIZE), mask, region=region, penalty=penalty, mask_is=mask_is)
    if (values == "zeros") == (mask_is == "hole"):  # no hole
        call = gradient_loss_call(backend, region=region, penalty=penalty, mask_is=mask_is)
        (loss,), gradients, _ = evaluate(call, on_device(backend, *image_pair(SIZE), mask), (0, 1))
        assert loss == 0
        assert not any(gradient.any() for gradient in gradients)


@grid(
    size=((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (1, 2, 1, 1)),
    region=GRADIENT_REGIONS,
    mask=("n1hw", "hw", "nchw"),
)
def test_nothing_to_count(backend: Backend, size: tuple[int, ...], region: str, mask: str) -> None:
    inputs = on_device(backend, *image_pair(size), make_mask(mask, size, values="zeros"))
    for penalty in PENALTIES:
        (loss,), gradients, _ = evaluate(
            gradient_loss_call(backend, region=region, penalty=penalty), inputs, (0, 1)
        )
        assert loss == 0
        assert not any(gradient.any() for gradient in gradients)


@grid(region=GRADIENT_REGIONS, penalty=PENALTIES, layout=("contiguous", "channels_last"))
def test_nan_that_the_composite_does_not_take(
    backend: Backend, region: str, penalty: str, layout: str
) -> None:
    """NaN and Inf on known pixels, in either image, change no bit."""
    mask = region_mask("n1hw", SIZE, values="binary")
    known = regions_of(mask, SIZE, "valid")[1] > 0
    pair = image_pair(SIZE, layouts=f"{layout}/{layout}")
    call = gradient_loss_call(backend, region=region, penalty=penalty)
    clean = evaluate(call, on_device(backend, *pair, mask), (0, 1))
    dirty = [laid_out(with_specials(image, known), layout) for image in pair]
    result = evaluate(call, on_device(backend, *dirty, mask), (0, 1), clean[2])
    for got, want in zip((*result[0], *result[1]), (*clean[0], *clean[1]), strict=True):
        assert same_bits(got, want)
        assert got.isfinite().all()


@grid(penalty=PENALTIES)
def test_nan_in_the_hole_is_seen_and_stays_there(backend: Backend, penalty: str) -> None:
    pred, target = image_pair(SIZE)
    pred[1, 2, 4, 7] = torch.nan
    mask = torch.ones(2, 1, *SIZE[2:])
    mask[..., 4, 7] = 0
    call = gradient_loss_call(backend, penalty=penalty)
    (loss,), (gradient, _), _ = evaluate(call, on_device(backend, pred, target, mask), (0, 1))
    assert loss.isnan()
    assert gradient.isfinite().logical_or(gradient.new_tensor(mask.tolist()) == 0).all()


def by_loops(pred: Tensor, target: Tensor, mask: Tensor, ring: int, penalty: str) -> float:
    n, c, h, w = pred.shape
    hole = 1 - mask
    image = mask * target + hole * pred

    def weight(b: int, i: int, j: int) -> float:
        rows = range(max(i - ring, 0), min(i + ring + 1, h))
        columns = range(max(j - ring, 0), min(j + ring + 1, w))
        square = [float(hole[b, 0, p, q]) for p, q in itertools.product(rows, columns)]
        return min(max(float(hole[b, 0, i, j]) + max(square) - min(square), 0.0), 1.0)

    numerator = denominator = 0.0
    for b, k, i, j, (down, across) in itertools.product(
        range(n), range(c), range(h), range(w), ((1, 0), (0, 1))
    ):
        p, q = i + down, j + across
        if p < h and q < w:
            both = weight(b, i, j) * weight(b, p, q)
            d = float((image[b, k, p, q] - image[b, k, i, j]) - (target[b, k, p, q] - target[b, k, i, j]))
            numerator += both * (abs(d) if penalty == "l1" else d * d)
            denominator += both
    return numerator / denominator


@grid(ring=(1, 2), penalty=PENALTIES, values=("binary", "mixed"))
def test_ring_is_the_sum_over_pairs(backend: Backend, ring: int, penalty: str, values: str) -> None:
    size = (1, 2, 7, 8)
    pred, target = image_pair(size)
    mask = torch.ones(1, 1, 7, 8)
    mask[..., 1:4, 2:6] = region_mask("n1hw", (1, 1, 3, 4), values=values)
    found = gradient_loss_call(backend, ring=ring, penalty=penalty)(*on_device(backend, pred, target, mask))
    expected = by_loops(pred.double(), target.double(), mask.double(), ring, penalty)
    assert float(found) == pytest.approx(expected, rel=1e-6)


@given(
    case=region_cases(),
    region=st.sampled_from(GRADIENT_REGIONS),
    penalty=st.sampled_from(PENALTIES),
    ring=st.integers(0, 4),
    mask_is=st.sampled_from(MASK_IS),
)
def test_any_input(backend: Backend, case: dict[str, Any], **options: Any) -> None:
    check(backend, *case.values(), **options)


@grid(region=GRADIENT_REGIONS, layout=("contiguous", "channels_last"))
def test_no_gradient_between_equal_differences(backend: Backend, region: str, layout: str) -> None:
    pair = [laid_out(t, layout) for t in tied_pair(SIZE)]
    check(backend, *pair, region_mask("n1hw", SIZE), region=region)


@grid(region=GRADIENT_REGIONS, penalty=PENALTIES, layout=("contiguous", "channels_last"))
def test_second_derivatives(backend: Backend, region: str, penalty: str, layout: str) -> None:
    options = {"region": region, "penalty": penalty}
    pair = image_pair(SIZE, layouts=f"{layout}/{layout}")
    inputs = on_device(backend, *pair, region_mask("n1hw", SIZE), torch.tensor(0.7))
    call, formula = gradient_loss_call(backend, **options), partial(gradient_loss_formula, **options)
    # The derivative by the upstream gradient sums first derivatives of both signs, times at most 1.5.
    terms = 2 * sum(g.abs().sum() for g in evaluate(call, inputs[:3], (0, 1), [inputs[3]])[1])
    check_against_truth(
        gradient_of(call),
        gradient_of(formula),
        inputs,
        wanted=(0, 1, 3),
        magnitudes={0: None, 1: None, 3: 2 * terms},
        output_magnitudes={0: None, 1: None},
    )


@grid(region=GRADIENT_REGIONS, penalty=PENALTIES)
def test_gradcheck(backend: Backend, region: str, penalty: str) -> None:
    size = (2, 1, 3, 4)
    skip_unsupported(backend, torch.zeros(0, dtype=torch.float64))
    # Neighbours' differences are apart by more than a numerical derivative moves them.
    order = torch.randperm(24, generator=generator(0)).double().view(size)
    images = (order.requires_grad_(), (order * 1.7 + 0.3).flip(3).detach().requires_grad_())
    loss = partial(
        gradient_loss_call(backend, region=region, penalty=penalty), mask=region_mask("n1hw", size, "f64")
    )
    assert torch.autograd.gradcheck(loss, images)
    assert torch.autograd.gradgradcheck(loss, images)


@grid(region=GRADIENT_REGIONS, penalty=PENALTIES, mask=("hw", "nchw"))
def test_gradient_to_the_mask(region: str, penalty: str, mask: str) -> None:
    """The automatic choice takes the differentiable formula, with the full derivative also at weight 0."""
    options = {"region": region, "penalty": penalty, "mask_is": "hole" if mask == "hw" else "valid"}
    weights = make_mask(mask, SIZE)
    if region in ("dilated_hole", "ring"):  # among equal values a maximum has many derivatives
        weights = torch.rand(weights.shape, generator=generator(0))
    check_against_truth(
        gradient_loss_call(None, **options),
        partial(gradient_loss_formula, **options, select=False),
        [*image_pair(SIZE), weights],
        wanted=(0, 1, 2),
        magnitudes={0: None, 1: None, 2: None},
    )


def test_no_kernel_drops_a_gradient_to_the_mask(kernel: Backend) -> None:
    pred, target, mask = on_device(kernel, *image_pair(SIZE), make_mask("n1hw", SIZE))
    with pytest.raises(RuntimeError, match="mask"):
        ik.gradient_loss(pred, target, mask.requires_grad_(), backend=kernel.name)


@pytest.mark.parametrize(
    ("region", "penalty", "mask", "layout"),
    [
        ("ring", "l1", "n1hw", "contiguous"),
        ("dilated_hole", "l2", "hw", "channels_last"),
        ("image", "l1", "nomask", "contiguous"),
    ],
)
def test_compile(kernel: Backend, region: str, penalty: str, mask: str, layout: str) -> None:
    options = {"region": region, "penalty": penalty}
    check_compiles(
        gradient_loss_call(kernel, **options),
        lambda compiled, inputs: check_against_truth(
            compiled, partial(gradient_loss_formula, **options), inputs, magnitudes={0: None, 1: None}
        ),
        [
            on_device(kernel, *image_pair(size, layouts=f"{layout}/{layout}"), make_mask(mask, size))
            for size in ((2, 3, 9, 14), (3, 4, 16, 10))
        ],
    )


@grid(region=GRADIENT_REGIONS, layout=("contiguous", "channels_last"))
def test_two_runs_give_the_same_bits(kernel: Backend, region: str, layout: str) -> None:
    size = SIZES["7"] if INTERPRETING else (3, 3, 150, 170)
    pair = image_pair(size, layouts=f"{layout}/{layout}")
    inputs = on_device(kernel, *pair, make_mask("n1hw", size))
    call = gradient_loss_call(kernel, region=region)
    check_deterministic(lambda: [t for part in evaluate(call, inputs, (0, 1))[:2] for t in part])


@grid(region=GRADIENT_REGIONS, penalty=PENALTIES)
def test_no_host_sync_and_no_autocast(backend: Backend, region: str, penalty: str) -> None:
    inputs = on_device(backend, *image_pair(SIZE, "bf16/f32"), make_mask("n1hw", SIZE))
    call = gradient_loss_call(backend, region=region, penalty=penalty)
    outside = evaluate(call, inputs, (0, 1))
    check_no_host_sync(lambda: evaluate(call, inputs, (0, 1), outside[2]))
    with torch.autocast(backend.device, torch.bfloat16):
        inside = evaluate(call, inputs, (0, 1), outside[2])
    for got, want in zip((*inside[0], *inside[1]), (*outside[0], *outside[1]), strict=True):
        assert same_bits(got, want)


@pytest.mark.parametrize("region", GRADIENT_REGIONS)
def test_l1_keeps_no_image(kernel: Backend, region: str) -> None:
    """4 bits an element, the scales, R of the ring, on the CPU the mask in bits."""
    size = (8, 3, 8, 8) if INTERPRETING else (8, 3, 64, 64)
    pred, target, mask = on_device(kernel, *image_pair(size), make_mask("n1hw", size))
    call = gradient_loss_call(kernel, region=region)
    kept = kept_bytes(lambda *images: call(*(2 * t for t in images), mask), pred.requires_grad_(), target)
    ring = 4 * mask.numel() if region == "ring" else 0
    assert kept <= pred.numel() / 2 + ring + mask.numel() / 8 + 16 * 8
