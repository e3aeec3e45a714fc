"""MS-SSIM: its scales, masks, clamped contrast and refusals."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from harness import INTERPRETING, Backend, evaluate, grid
from pixel_cases import make_mask, on_device, skip_unsupported, with_specials
from ssim_cases import check, ms_ssim_formula, unit_pair
from torch import Tensor
from training_checks import check_compiles

import inpaint_kernels as ik

pytestmark = pytest.mark.usefixtures("kernels_of_ssim")
# Three scales of a window of 5 need 17 pixels.
FEW = {"window_size": 5, "sigma": 1.2}
EXPONENTS = (0.3, 0.5, 0.2)


def near(size: tuple[int, ...], dtypes: str = "f32/f32", layout: str = "contiguous") -> tuple[Tensor, Tensor]:
    """Images alike enough to have a positive contrast at every scale."""
    pred, target = unit_pair(size, layouts=f"{layout}/{layout}")
    types = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "f64": torch.float64}
    first, second = (types[dtype] for dtype in dtypes.split("/"))
    return (0.7 * target + 0.3 * pred).to(first), target.to(second)


def formula(*images: Tensor, **options: Any) -> Tensor:
    return ms_ssim_formula(*images, **options).mean()


@grid(
    size=((2, 3, 24, 20), (1, 2, 17, 18), (2, 1, 19, 23)),
    mask=("nomask", "n1hw", "hw"),
    padding=("valid", "same"),
    layout=("contiguous", "channels_last"),
)
def test_scales(backend: Backend, size: tuple[int, ...], mask: str, padding: str, layout: str) -> None:
    """Even and odd sides."""
    inputs = on_device(backend, *near(size, layout=layout), make_mask(mask, size))
    call = partial(ik.ms_ssim, **FEW, padding=padding, scale_weights=EXPONENTS, backend=backend.name)
    truth = partial(formula, **FEW, padding=padding, weights=EXPONENTS)
    check(call, truth, inputs)


@pytest.mark.parametrize("dtypes", ["f16/f16", "bf16/f32"])
def test_dtypes(backend: Backend, dtypes: str) -> None:
    """Scales of half types are not rounded to them."""
    inputs = on_device(backend, *near((2, 3, 24, 20), dtypes))
    skip_unsupported(backend, *inputs)
    call = partial(ik.ms_ssim, **FEW, scale_weights=EXPONENTS, backend=backend.name)
    check(call, partial(formula, **FEW, weights=EXPONENTS), inputs)


def test_float64(backend: Backend) -> None:
    """As near as the formula's own rounding lets one see."""
    inputs = near((2, 3, 24, 20), "f64/f64")
    skip_unsupported(backend, *inputs)
    call = partial(ik.ms_ssim, **FEW, scale_weights=EXPONENTS, backend=backend.name)
    got, want = (evaluate(f, inputs, (0, 1)) for f in (call, partial(formula, **FEW, weights=EXPONENTS)))
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.abs().max()))


def test_the_published_scales(backend: Backend) -> None:
    size = (1, 1, 161, 162) if INTERPRETING else (2, 3, 161, 190)
    inputs = on_device(backend, *near(size))
    found = ik.ms_ssim(*inputs, reduction="none", backend=backend.name)
    want = ms_ssim_formula(*(t.cpu().double() for t in inputs))
    torch.testing.assert_close(found.cpu().double(), want, rtol=0, atol=2e-6)
    torch.testing.assert_close(ik.ms_ssim_loss(*inputs, backend=backend.name), 1 - found.mean())


def test_equal_images(backend: Backend) -> None:
    image = torch.full((1, 3, 20, 20), 0.3)
    call = partial(ik.ms_ssim, **FEW, scale_weights=EXPONENTS, backend=backend.name)
    (value,), gradients, _ = evaluate(call, on_device(backend, image, image), (0, 1))
    assert value == 1
    assert all(g.isfinite().all() for g in gradients)


def test_contrast_is_clamped(backend: Backend) -> None:
    """Anti-correlated content: value and gradient are 0, never NaN; of one channel alone they are left out."""
    pred, target = near((1, 2, 20, 20))
    call = partial(ik.ms_ssim, **FEW, scale_weights=EXPONENTS, backend=backend.name)
    (value,), gradients, _ = evaluate(call, on_device(backend, -target, target), (0, 1))
    assert value == 0
    assert not any(g.any() for g in gradients)
    pred[:, 1] = -target[:, 1]
    (value,), gradients, _ = evaluate(call, on_device(backend, pred, target), (0, 1))
    (alone,), _, _ = evaluate(call, on_device(backend, pred[:, :1], target[:, :1]), (0, 1))
    torch.testing.assert_close(value, alone / 2)
    for gradient in gradients:
        assert gradient.isfinite().all()
        assert gradient[:, 0].any()
        assert not gradient[:, 1].any()


@pytest.mark.parametrize("special", ["nan", "inf"])
def test_counted_specials_propagate(backend: Backend, special: str) -> None:
    """A clamp at 0 must not take NaN for 0: its sample is NaN, and the others are what they were."""
    pred, target = near((2, 3, 24, 20))
    call = partial(ik.ms_ssim, **FEW, scale_weights=EXPONENTS, reduction="none", backend=backend.name)
    clean = call(*on_device(backend, pred, target))
    pred[1, 2, 7, 9] = float(special)
    (values,), gradients, _ = evaluate(call, on_device(backend, pred, target), (0, 1))
    assert values[1].isnan()
    assert values[0] == clean[0]
    for gradient in gradients:
        assert gradient[0].isfinite().all()
        assert gradient[1, 2, 7, 9].isnan()


def test_nothing_under_zero_is_read(backend: Backend) -> None:
    size = (2, 3, 26, 27)
    pred, target = near(size)
    mask = make_mask("n1hw", size)
    assert mask is not None
    mask[..., 3:18, 5:19] = 0
    mask[1] = 0
    hole = (mask == 0).expand(size)
    call = partial(ik.ms_ssim, **FEW, scale_weights=EXPONENTS, reduction="none", backend=backend.name)
    results = []
    for filling in (lambda t: with_specials(t, hole), lambda t: t.masked_fill(hole, -3.0)):
        results.append(evaluate(call, on_device(backend, filling(pred), filling(target), mask), (0, 1)))
    for got, want in zip((*results[0][0], *results[0][1]), (*results[1][0], *results[1][1]), strict=True):
        assert got.isfinite().all()
        assert torch.equal(got, want)
    assert results[0][0][0][1] == 1
    for gradient in results[0][1]:
        assert gradient[0].any()
        assert not gradient.cpu()[hole].any()


def test_gradient_to_the_mask() -> None:
    """The automatic choice takes the formula at every scale."""
    size = (1, 2, 18, 20)
    inputs = [*near(size, "f64/f64"), torch.rand(1, 1, 18, 20, dtype=torch.float64) + 0.1]
    leaves = [t.requires_grad_() for t in inputs]
    call = partial(ik.ms_ssim, **FEW, scale_weights=EXPONENTS)
    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True)


def test_smallest_side() -> None:
    """161 pixels for five scales and a window of 11, as in pytorch-msssim; less is refused, naming both."""
    whole = torch.rand(1, 1, 161, 200)
    assert ik.ms_ssim(whole, whole) == 1
    for small in (whole[:, :, :160], whole.mT[..., :160]):
        height, width = small.shape[2:]
        message = f"pred has {height} x {width} pixels, 5 scales of a 11 x 11 window need 161 x 161"
        with pytest.raises(ValueError, match=message):
            ik.ms_ssim(small, small)
    assert ik.ms_ssim(*[torch.rand(1, 1, 3, 2)] * 2, padding="same") == 1
    with pytest.raises(TypeError, match="data_range=255"):
        ik.ms_ssim(whole.byte(), whole)
    for weights, error in (([], TypeError), ("11", TypeError), ([0.5, -1.0], ValueError), (0.5, TypeError)):
        with pytest.raises(error, match="scale_weights"):
            ik.ms_ssim(whole, whole, scale_weights=weights)


def test_compiles(kernel: Backend) -> None:
    call = partial(ik.ms_ssim, **FEW, scale_weights=EXPONENTS, backend=kernel.name)
    cases = [on_device(kernel, *near((2, 3, h, w))) for h, w in ((24, 20), (32, 28))]
    truth = partial(formula, **FEW, weights=EXPONENTS)
    check_compiles(call, lambda f, x: check(f, truth, x), cases)
