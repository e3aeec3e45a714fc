"""SSIM and the L1 + SSIM loss: known values, masks, windows, tiles and ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from harness import (
    DTYPES,
    INTERPRETING,
    LAYOUTS,
    Backend,
    evaluate,
    grid,
    same_bits,
)
from pairs_cases import eighths
from pixel_cases import make_mask, on_device, skip_unsupported, with_specials
from ssim_cases import check, mean_of, plane_formula, ssim_call, ssim_formula, unit_pair
from torch import Tensor
from training_checks import check_compiles

import inpaint_kernels as ik

PADDINGS = ("valid", "same")
pytestmark = pytest.mark.usefixtures("kernels_of_ssim")


def constants(*values: float, size: tuple[int, ...] = (1, 1, 16, 16)) -> list[Tensor]:
    return [torch.full(size, value) for value in values]


# ---- known values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data_range", "value"), [(1, 0.80009995), (2, 0.80039920), (255, 0.99403208)])
def test_constants(backend: Backend, data_range: float, value: float) -> None:
    """(2ab + C1) / (a^2 + b^2 + C1): a range that is guessed wrong is off in the fourth digit, or in the first."""
    pair = on_device(backend, *constants(0.2, 0.4))
    found = ik.ssim(*pair, data_range=data_range, backend=backend.name)
    assert float(found) == pytest.approx(value, abs=2e-7)


def test_black_against_white(backend: Backend) -> None:
    pair = on_device(backend, *constants(0.0, 1.0))
    assert float(ik.ssim(*pair, backend=backend.name)) == pytest.approx(9.999e-5, abs=1e-7)


def test_opposite_structure_is_negative(backend: Backend) -> None:
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2
    pair = on_device(backend, *(x[None, None].float() for x in (board, 1 - board)))
    assert float(ik.ssim(*pair, backend=backend.name)) == pytest.approx(-0.9964065, abs=2e-6)
    assert float(ik.ssim_loss(*pair, backend=backend.name)) == pytest.approx(1.9964065, abs=2e-6)


@grid(dtype=("f32", "f16", "bf16", "f64"), padding=PADDINGS, mask=(None, "mixed"))
def test_equal_images_are_exactly_one(backend: Backend, dtype: str, padding: str, mask: str | None) -> None:
    """Flat or not, with a gradient that is exactly 0, not 0/0."""
    size = (2, 3, 13, 17)
    for x in (torch.full(size, 0.7), unit_pair(size)[0], torch.zeros(size)):
        images = [x.to(DTYPES[dtype])] * 2
        weights = make_mask("n1hw", size) if mask else None
        inputs = on_device(backend, *images, weights)
        skip_unsupported(backend, *images)
        call = partial(ik.ssim, padding=padding, reduction="none", backend=backend.name)
        (value,), gradients, _ = evaluate(call, inputs, (0, 1))
        assert torch.equal(value.cpu(), torch.ones(2, dtype=value.dtype))
        for gradient in gradients:
            assert not gradient.any()


def test_the_gradient_reaches_half_a_window(backend: Backend) -> None:
    """A window sees five pixels each way, in both directions. Where it sees equal images it sends nothing: one pixel
    that differs is seen from five pixels away, and these windows send to five more, no further."""
    pred, target = (t[..., 5:16, 5:16] for t in unit_pair((1, 1, 21, 21)))
    call = partial(ik.ssim, backend=backend.name)
    (_,), gradients, _ = evaluate(call, on_device(backend, pred, target), (0, 1))
    assert all((gradient != 0).all() for gradient in gradients)
    pred, _ = unit_pair((1, 1, 41, 43))
    target = pred.clone()
    target[..., 20, 21] += 0.3
    call = partial(ik.ssim, backend=backend.name)
    (_,), gradients, _ = evaluate(call, on_device(backend, pred, target), (0, 1))
    for gradient in gradients:
        assert (gradient[0, 0, 10:31, 11:32] != 0).all()
        # All but the CPU's kernels subtract a mean of d, and add it again.
        limit = 0.0 if backend.name == "cpu" else 1e-6 * float(gradient.abs().max())
        gradient[0, 0, 10:31, 11:32] = 0
        assert gradient.abs().max() <= limit


@grid(value=(1e6, -3e4), row=(15, 3), mask=("nomask", "n1hw"))
def test_a_value_far_beyond_the_range_spoils_its_windows_alone(
    backend: Backend, value: float, row: int, mask: str
) -> None:
    """Kernels subtract a mean of the image from all of it, which such a value would move far away."""
    pred, target = unit_pair((1, 2, 31, 33))
    weights = make_mask(mask, (1, 2, 31, 33))
    pred[:, 1, row, 4] = value
    call, formula = ssim_call(backend), ssim_formula
    exact = [None if t is None else t.double() for t in (pred, target, weights)]
    (want,), slopes, upstream = evaluate(formula, exact, (0, 1))
    (found,), gradients, _ = evaluate(
        call, on_device(backend, pred, target, weights), (0, 1), [upstream[0].float()]
    )
    torch.testing.assert_close(found.cpu().double(), want, rtol=0, atol=1e-5)
    for got, slope in zip(gradients, slopes, strict=True):
        away = slope[:, :, :, 15:]
        size = float(away.abs().max())
        torch.testing.assert_close(got.cpu()[:, :, :, 15:].double(), away, rtol=0, atol=1e-4 * size)


@pytest.mark.parametrize("padding", PADDINGS)
def test_windows_of_one_row_of_the_mask(backend: Backend, padding: str) -> None:
    """A mask that weighs windows around one row alone, but for a breath: the gradient ends five rows away."""
    pred, target = unit_pair((1, 2, 31, 29))
    mask = torch.zeros(31, 29)
    mask[10:21] = 1.0
    inputs = on_device(backend, pred, target, mask)
    (_,), gradients, _ = evaluate(partial(ik.ssim, padding=padding, backend=backend.name), inputs, (0, 1))
    for gradient in gradients:
        assert (gradient[:, :, 10:21] != 0).all()
        assert not gradient[:, :, :10].any()
        assert not gradient[:, :, 21:].any()


@pytest.mark.parametrize("scale", [2.0**-10, 2.0, 256.0])
def test_the_range_scales_with_the_images(backend: Backend, scale: float) -> None:
    pred, target = on_device(backend, *unit_pair((2, 3, 23, 21)))
    plain = ik.ssim(pred, target, backend=backend.name)
    scaled = ik.ssim(scale * pred, scale * target, data_range=scale, backend=backend.name)
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-7)


def numpy_ssim(x: Any, y: Any, data_range: float) -> float:
    """Float64 transcription for (C, H, W), valid windows of 11."""
    row = np.exp(-((np.arange(11) - 5.0) ** 2) / (2 * 1.5**2))
    row /= row.sum()

    def sums(v: Any) -> Any:
        v = np.apply_along_axis(np.convolve, 2, v, row, "valid")
        return np.apply_along_axis(np.convolve, 1, v, row, "valid")

    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mx, my = sums(x), sums(y)
    vx, vy, cov = sums(x * x) - mx**2, sums(y * y) - my**2, sums(x * y) - mx * my
    return float(
        ((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean(dtype=np.float64)
    )


def photographs() -> list[tuple[Any, Any]]:
    """Photographs (C, H, W) from 0 to 1 and what damages them: noise, blur, a dark and a flat copy."""
    data = pytest.importorskip("skimage.data")
    side = 40 if INTERPRETING else 256
    rng = np.random.default_rng(0)
    found = []
    for name in ("astronaut", "coffee", "chelsea"):
        photo = getattr(data, name)()[:side, :side].transpose(2, 0, 1) / 255.0
        blurred = (photo + np.roll(photo, 1, 1) + np.roll(photo, 1, 2) + np.roll(photo, -2, 1)) / 4
        noisy = np.clip(photo + 0.05 * rng.standard_normal(photo.shape), 0, 1)
        found += [(photo, noisy), (photo, blurred), (0.1 * photo + 0.9, 0.1 * blurred + 0.9)]
    return found


@pytest.mark.parametrize("data_range", [1.0, 255.0])
def test_photographs(backend: Backend, data_range: float) -> None:
    """Within 1e-7 of float64, where pytorch-msssim is."""
    # The interpreter rounds products that a GPU fuses with a sum, and over its small pictures less averages out.
    bound = 2e-7 if INTERPRETING else 1e-7
    for x, y in photographs():
        x32, y32 = ((data_range * v).astype(np.float32) for v in (x, y))
        pair = on_device(backend, *(torch.from_numpy(np.ascontiguousarray(v)) for v in (x32, y32)))
        found = float(ik.ssim(*pair, data_range=data_range, backend=backend.name))
        assert abs(found - numpy_ssim(x32.astype(float), y32.astype(float), data_range)) <= bound


def test_pytorch_msssim(backend: Backend) -> None:
    peer = pytest.importorskip("pytorch_msssim")
    pred, target = unit_pair((2, 3, 170, 181))
    moved = on_device(backend, pred, target)
    for name in ("ssim", "ms_ssim"):
        want = getattr(peer, name)(pred, target, data_range=1.0, size_average=False)
        got = getattr(ik, name)(*moved, reduction="none", backend=backend.name)
        torch.testing.assert_close(got.cpu(), want, rtol=2e-6, atol=1e-6)


# ---- against the formula -----------------------------------------------------------------------------------------


@grid(size=(3, 5, 7, 9, 11, 13, 15), padding=PADDINGS, mask=("nomask", "n1hw", "nchw"), l1=(False, True))
def test_every_window(backend: Backend, size: int, padding: str, mask: str, l1: bool) -> None:
    options = {"window_size": size, "sigma": 0.4 + size / 8, "padding": padding, "l1": l1}
    weights = make_mask(mask, (2, 2, 18, 21))
    # In eighths: of a small window weights near 0 would leave one pixel, and a variance that is all rounding.
    weights = weights if weights is None else eighths(weights)
    inputs = on_device(backend, *unit_pair((2, 2, 18, 21)), weights)
    check(ssim_call(backend, **options), partial(ssim_formula, **options), inputs)


@grid(sigma=(0.3, 1e6), mask=("nomask", "n1hw"))
def test_narrow_and_flat_windows(backend: Backend, sigma: float, mask: str) -> None:
    """Of a narrow one many weights are below the smallest float32, and one pixel has nearly all: its variance is the
    difference of near numbers, with an error that the plain formula exceeds five times."""
    options = {"window_size": 13, "sigma": sigma, "padding": "same"}
    weights = make_mask(mask, (2, 2, 14, 15))
    weights = weights if weights is None else 0.5 + eighths(weights)
    inputs = [*unit_pair((2, 2, 14, 15)), weights]
    exact = [None if t is None else t.double() for t in inputs]
    (want,), slopes, upstream = evaluate(partial(ssim_formula, **options), exact, (0, 1))
    call = ssim_call(backend, **options)
    (found,), gradients, _ = evaluate(call, on_device(backend, *inputs), (0, 1), [upstream[0].float()])
    torch.testing.assert_close(found.cpu().double(), want, rtol=0, atol=1e-6)
    for got, slope in zip(gradients, slopes, strict=True):
        torch.testing.assert_close(got.cpu().double(), slope, rtol=0, atol=1.5e-5 * float(slope.abs().max()))


# (N, C, H, W) by what the CPU's tiles of at most 128 x 256 pixels (128 x 128 with a mask) do with them.
TILES = {
    "one window": (1, 1, 11, 11),
    "narrow": (2, 1, 40, 11),
    "flat": (1, 2, 11, 50),
    "rows": (1, 1, 141, 13),  # two tiles; the second one has windows of both
    "edge": (1, 1, 132, 13),  # the second tile has no centre of a whole window
    "columns": (1, 2, 13, 259),
    "both": (1, 1, 150, 300),
}
if INTERPRETING:
    TILES = {name: TILES[name] for name in ("one window", "narrow", "flat")}


@grid(size=TILES, padding=PADDINGS, mask=("nomask", "n1hw", "nchw"), layout=("contiguous", "channels_last"))
def test_tiles(backend: Backend, size: str, padding: str, mask: str, layout: str) -> None:
    pred, target = unit_pair(TILES[size], layouts=f"{layout}/{layout}")
    inputs = on_device(backend, pred, target, make_mask(mask, TILES[size]))
    for wanted in ((0, 1), (0,), (1,)):
        options = {"padding": padding, "l1": wanted != (1,)}
        call, formula = ssim_call(backend, **options), partial(ssim_formula, **options)
        check(call, formula, inputs, wanted=wanted)


@grid(
    dtypes=("f16/f16", "bf16/bf16", "f16/f32", "f32/bf16", "f64/f64", "f64/f32"),
    layout=LAYOUTS,
    mask=("nomask", "n1hw"),
)
def test_valid_windows_in_any_dtype_and_layout(backend: Backend, dtypes: str, layout: str, mask: str) -> None:
    size = (2, 3, 14, 19)
    inputs = on_device(backend, *unit_pair(size, dtypes, f"{layout}/{layout}"), make_mask(mask, size))
    skip_unsupported(backend, *inputs[:2])
    check(ssim_call(backend), ssim_formula, inputs)


# ---- masks -------------------------------------------------------------------------------------------------------


@grid(padding=PADDINGS, mask=("n1hw", "nchw"), l1=(False, True))
def test_nothing_under_zero_is_read(backend: Backend, padding: str, mask: str, l1: bool) -> None:
    """Not a bit of the value or the gradient depends on it, be it NaN; the gradient there is 0."""
    size = (2, 3, 24, 27)
    pred, target = unit_pair(size)
    weights = make_mask(mask, size)
    weights[..., 4:20, 6:22] = 0
    hole = (weights == 0).expand(size)
    call = ssim_call(backend, padding=padding, l1=l1)
    results = []
    for filling in (lambda t: with_specials(t, hole), lambda t: t.masked_fill(hole, -3.0)):
        inputs = on_device(backend, filling(pred), filling(target), weights)
        results.append(evaluate(call, inputs, (0, 1)))
    for got, want in zip((*results[0][0], *results[0][1]), (*results[1][0], *results[1][1]), strict=True):
        assert got.isfinite().all()
        assert torch.equal(got, want)
    for gradient in results[0][1]:
        assert not gradient.cpu()[hole].any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_whole_mask_changes_nothing(backend: Backend, layout: str) -> None:
    size = (2, 3, 31, 33)
    images = on_device(backend, *unit_pair(size, layouts=f"{layout}/{layout}"))
    for shape in ((31, 33), (2, 1, 31, 33), (2, 3, 31, 33)):
        for l1 in (False, True):
            plain, whole = (
                evaluate(ssim_call(backend, l1=l1), [*images, m], (0, 1))
                for m in (None, torch.ones(shape, device=backend.device))
            )
            for got, want in zip((*whole[0], *whole[1]), (*plain[0], *plain[1]), strict=True):
                torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-6 * float(want.abs().max()))


def test_an_empty_sample_is_one(backend: Backend) -> None:
    """And has no gradient; with it the mean over the samples is that of its value 1 and the others'."""
    size = (3, 2, 16, 18)
    mask = make_mask("n1hw", size)
    mask[1] = 0
    inputs = on_device(backend, *unit_pair(size), mask)
    call = partial(ik.ssim, reduction="none", backend=backend.name)
    (values,), gradients, _ = evaluate(call, inputs, (0, 1))
    assert values[1] == 1
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert not gradient[1].any()
        assert gradient[0].any()
    torch.testing.assert_close(ik.ssim(*inputs, backend=backend.name), values.mean())
    empty = [*inputs[:2], torch.zeros_like(inputs[2])]
    for l1 in (False, True):
        (loss,), gradients, _ = evaluate(ssim_call(backend, l1=l1), empty, (0, 1))
        assert loss == 0
        assert not any(g.any() for g in gradients)


def test_a_window_counts_by_its_centre(backend: Backend) -> None:
    """Windows that see counted pixels, around one that is not, are left out; with "valid" the border is no centre."""
    size = (1, 1, 20, 20)
    pred, target = unit_pair(size)
    mask = torch.zeros(20, 20)
    mask[:5] = 1  # no window of 11 has its centre there
    inputs = on_device(backend, pred, target, mask)
    assert ik.ssim(*inputs, backend=backend.name) == 1
    assert ik.ssim(*inputs, padding="same", backend=backend.name) < 0.999


def test_channels_with_masks_of_their_own(backend: Backend) -> None:
    """Weigh what they count: a channel without a counted window weighs nothing."""
    size = (2, 3, 17, 16)
    pred, target = unit_pair(size)
    mask = make_mask("nchw", size)
    mask[0, 1] = 0
    mask[1] = 0
    inputs = on_device(backend, pred, target, mask)
    similarity, _, weight = plane_formula(pred, target, mask)
    found = ik.ssim(*inputs, reduction="none", backend=backend.name)
    torch.testing.assert_close(found.cpu(), mean_of(similarity, weight), rtol=1e-5, atol=1e-6)
    assert found[1] == 1


# ---- shapes ------------------------------------------------------------------------------------------------------


def test_any_rank(backend: Backend) -> None:
    pred, target = on_device(backend, *unit_pair((6, 3, 14, 13)))
    (mask,) = on_device(backend, make_mask("n1hw", (6, 3, 14, 13)))
    call = partial(ik.ssim, reduction="none", backend=backend.name)
    want, masked = call(pred, target), call(pred, target, mask)
    video = (2, 3, 3, 14, 13)
    assert same_bits(call(pred.view(video), target.view(video)), want.view(2, 3))
    found = call(pred.view(video), target.view(video), mask.view(2, 3, 1, 14, 13))
    assert same_bits(found, masked.view(2, 3))
    first = mask.view(2, 3, 1, 14, 13)[:, :1]
    found = call(pred.view(video), target.view(video), first)
    repeated = first.expand(2, 3, 1, 14, 13).reshape(6, 1, 14, 13)
    assert same_bits(found, call(pred, target, repeated).view(2, 3))
    single = call(pred[0], target[0], mask[0])
    assert single.shape == ()
    assert same_bits(single, masked[0])
    assert same_bits(call(pred[0], target[0], mask[0, 0]), masked[0])
    both = partial(ik.l1_ssim_loss, backend=backend.name)
    torch.testing.assert_close(both(pred[2], target[2], mask[2]), both(pred[2:3], target[2:3], mask[2:3]))


@grid(size=((0, 3, 12, 12), (2, 0, 12, 12)), l1=(False, True), mask=(False, True))
def test_no_images(backend: Backend, size: tuple[int, ...], l1: bool, mask: bool) -> None:
    inputs = on_device(backend, torch.zeros(size), torch.zeros(size), torch.ones(12, 12) if mask else None)
    (loss,), gradients, _ = evaluate(ssim_call(backend, l1=l1), inputs, (0, 1))
    assert loss == 0
    assert all(g.shape == size for g in gradients)


def test_no_pixels(backend: Backend) -> None:
    """Of any rank, with and without a mask of that rank: no window counts."""
    for size in ((2, 3, 0, 12), (2, 2, 3, 0, 12)):
        (image,) = on_device(backend, torch.zeros(size))
        for mask in (None, image[..., :1, :, :]):
            found = ik.ssim(image, image, mask, padding="same", reduction="none", backend=backend.name)
            assert torch.equal(found.cpu(), torch.ones(size[:-3]))


def test_one_pass_is_both_losses(backend: Backend) -> None:
    for mask in (None, make_mask("n1hw", (2, 3, 19, 23))):
        inputs = on_device(backend, *unit_pair((2, 3, 19, 23)), mask)
        options = {"data_range": 2.0, "backend": backend.name}
        both = ik.l1_ssim_loss(*inputs, ssim_weight=0.85, **options)
        l1 = ik.masked_l1_loss(*inputs, backend=backend.name)
        torch.testing.assert_close(both, 0.15 * l1 + 0.85 * ik.ssim_loss(*inputs, **options))


# ---- training ----------------------------------------------------------------------------------------------------


@grid(padding=PADDINGS, mask=("nomask", "n1hw"), contrast=(False, True))
def test_numerical_gradients(backend: Backend, padding: str, mask: str, contrast: bool) -> None:
    """Of all outputs of the operator, first and second."""
    from inpaint_kernels.ops import ssim as module

    size = (2, 1, 4, 4)
    inputs = [t.double() if t is not None else None for t in (*unit_pair(size), make_mask(mask, size))]
    skip_unsupported(backend, inputs[0])
    windows = module.check_windows(1.0, 3, 0.8, padding)

    def call(pred: Tensor, target: Tensor) -> tuple[Tensor, ...]:
        found = module.plane_means(pred, target, inputs[2], windows, backend.name, contrast, contrast)
        return found if contrast else found[:1]

    # Apart: |pred - target| has no derivative at 0.
    leaves = [inputs[1] + 0.1 * (1 + inputs[0].abs()), inputs[1]]
    leaves = [t.detach().requires_grad_() for t in leaves]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_second_derivatives_of_a_target_made_of_the_image(backend: Backend, factor: float) -> None:
    """No path is counted twice. Factor 1: both arguments are the same tensor."""
    image, _ = on_device(backend, *unit_pair((1, 2, 13, 12)))

    def second_derivative(call: Any) -> Tensor:
        leaf = image.clone().requires_grad_()
        loss = call(leaf, leaf if factor == 1 else factor * leaf)
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (second,) = torch.autograd.grad((first * leaf).sum(), leaf)
        return second

    want, got = second_derivative(ssim_formula), second_derivative(ssim_call(backend))
    # Of equal images the loss is 0 whatever they are: what remains is the rounding of terms of 0.1.
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_compiles(kernel: Backend) -> None:
    """Whole windows; others, and without l1, in test_training.py."""
    sizes = ((2, 3, 14, 17), (2, 3, 21, 15))
    cases = [on_device(kernel, *unit_pair(size), make_mask("n1hw", size)) for size in sizes]
    formula = partial(ssim_formula, l1=True)
    check_compiles(ssim_call(kernel, l1=True), lambda f, x: check(f, formula, x), cases)
