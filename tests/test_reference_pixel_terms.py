"""Plain formulas of composite, total variation and the pixel terms, against loops and released formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from inpaint_kernels.reference.composite import composite
from inpaint_kernels.reference.inpainting_pixel import inpainting_pixel
from inpaint_kernels.reference.total_variation import dilate, total_variation

REGIONS = ("image", "hole", "dilated_hole", "first_pixel")
SIZES = ((2, 3, 5, 7), (1, 1, 1, 1), (1, 2, 1, 4), (2, 1, 6, 1))


def images(size: tuple[int, ...] = (2, 3, 5, 7), masks: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """pred, target and a mask (1 = known) of zeros, ones and fractions; float64."""
    generator = torch.Generator().manual_seed(size[-1] + 10 * masks)
    pred, target = (torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(2))
    shape = (size[0], masks, *size[2:])
    mask = torch.randint(0, 5, shape, generator=generator).to(torch.float64) / 2
    return pred, target, mask.clamp(max=1)


def tv(image: Tensor, mask: Tensor | None, **options: str | None) -> Tensor:
    given: dict[str, str | None] = {
        "region": "image",
        "penalty": "l1",
        "normalize": None,
        "mask_is": "valid",
    } | options
    return total_variation(image, mask, **given)  # type: ignore[arg-type]


def by_loops(image: Tensor, mask: Tensor, region: str, penalty: str, normalize: str) -> float:
    n, c, h, w = image.shape
    hole = (1 - mask).expand(image.shape)

    def at(b: int, k: int, i: int, j: int) -> float:
        if region == "image":
            return 1.0
        if region != "dilated_hole":
            return float(hole[b, k, i, j])
        rows, columns = range(max(i - 1, 0), min(i + 2, h)), range(max(j - 1, 0), min(j + 2, w))
        return max(float(hole[b, k, p, q]) for p, q in itertools.product(rows, columns))

    total = 0.0
    for down, across in ((1, 0), (0, 1)):
        summed, pairs = 0.0, 0
        for b, k, i, j in itertools.product(range(n), range(c), range(h - down), range(w - across)):
            d = abs(float(image[b, k, i + down, j + across] - image[b, k, i, j]))
            weight = at(b, k, i, j) * (1.0 if region == "first_pixel" else at(b, k, i + down, j + across))
            summed += weight * (d if penalty == "l1" else d * d)
            pairs += 1
        places = itertools.product(range(n), range(c), range(h), range(w))
        counts = {"pairs": pairs, "image": image.numel(), "mask": sum(at(*place) for place in places)}
        total += summed / counts[normalize] if counts[normalize] else 0.0
    return total


@pytest.mark.parametrize("normalize", ["pairs", "image", "mask"])
@pytest.mark.parametrize("penalty", ["l1", "l2"])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("size", SIZES)
def test_total_variation_is_the_sum_over_pairs(
    size: tuple[int, ...], region: str, penalty: str, normalize: str
) -> None:
    for masks in {1, size[1]}:
        image, _, mask = images(size, masks)
        found = tv(image, mask, region=region, penalty=penalty, normalize=normalize)
        assert float(found) == pytest.approx(by_loops(image, mask, region, penalty, normalize), abs=1e-12)


def test_released_denominators() -> None:
    image, _, mask = images()
    hole = 1 - mask
    down, across = (image.diff(dim=d).abs() for d in (2, 3))
    # naoto0804 loss.py: the mean over the pairs of each axis.
    torch.testing.assert_close(tv(image, None), down.mean() + across.mean())
    # mmagic: the weight at the first pixel, over its sum broadcast to the channels.
    count = hole.sum() * image.shape[1] + 1e-12
    expected = (hole[..., :-1, :] * down).sum() / count + (hole[..., :-1] * across).sum() / count
    torch.testing.assert_close(tv(image, mask, region="first_pixel", normalize="mask"), expected)


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("normalize", [None, "pairs", "image", "mask"])
def test_no_pair_gives_zero_with_zero_gradient(region: str, normalize: str | None) -> None:
    for size, value in (((0, 3, 4, 4), 1.0), ((1, 3, 1, 1), 0.0), ((2, 3, 4, 4), 1.0)):
        image = torch.rand(size, requires_grad=True)
        if region == "image" and size[0] == 2:
            continue
        mask = torch.full((size[0], 1, *size[2:]), value)
        loss = tv(image, mask, region=region, normalize=normalize)
        (grad,) = torch.autograd.grad(loss, image)
        assert loss.item() == 0 and not grad.any()


def test_outside_of_the_region_nan_is_ignored() -> None:
    image = torch.rand(1, 3, 6, 6)
    image[..., 0] = torch.nan
    mask = torch.ones(1, 1, 6, 6)
    mask[..., 3:] = 0
    image.requires_grad_()
    for region in REGIONS[1:]:
        loss = tv(image, mask, region=region)
        (grad,) = torch.autograd.grad(loss, image)
        assert loss.isfinite() and grad.isfinite().all()


def test_dilate_is_the_maximum_of_nine() -> None:
    hole = torch.zeros(1, 1, 5, 5)
    hole[0, 0, 0, 0], hole[0, 0, 3, 3] = 1, 0.5
    expected = torch.zeros(5, 5)
    expected[2:, 2:] = 0.5
    expected[:2, :2] = 1
    assert torch.equal(dilate(hole)[0, 0], expected)


@pytest.mark.parametrize("mask_is", ["valid", "hole"])
def test_composite_selects_and_mixes(mask_is: str) -> None:
    pred, target, mask = images()
    found = composite(pred, target, mask if mask_is == "valid" else 1 - mask, mask_is=mask_is)
    torch.testing.assert_close(found, mask * target + (1 - mask) * pred)
    binary = torch.where(mask > 0.5, 1.0, 0.0)
    pred, target = pred.masked_fill(binary == 1, torch.nan), target.masked_fill(binary == 0, torch.inf)
    pred.requires_grad_()
    target.requires_grad_()
    found = composite(pred, target, binary if mask_is == "valid" else 1 - binary, mask_is=mask_is)
    assert torch.equal(found, torch.where(binary == 1, target, pred))
    by_pred, by_target = torch.autograd.grad(found.sum(), (pred, target))
    assert torch.equal(by_pred, (1 - binary).expand_as(pred)) and torch.equal(
        by_target, binary.expand_as(pred)
    )


def test_gradient_to_the_mask_of_a_composite() -> None:
    """Also where one of the two weights is 0."""
    pred, target, mask = images(masks=3)
    found = composite(pred, target, mask.requires_grad_(), mask_is="valid")
    (grad,) = torch.autograd.grad(found.sum(), mask)
    torch.testing.assert_close(grad, target - pred)


def test_composite_takes_the_wider_dtype() -> None:
    half, single = torch.rand(1, 3, 4, 4).half(), torch.rand(1, 3, 4, 4)
    mask = torch.zeros(1, 1, 4, 4)
    assert composite(half, half, mask, mask_is="valid").dtype == torch.float16
    assert composite(half, single, mask, mask_is="valid").dtype == torch.float32


@pytest.mark.parametrize("mask_is", ["valid", "hole"])
def test_pixel_terms_are_those_of_the_paper(mask_is: str) -> None:
    pred, target, mask = images()
    hole = 1 - mask
    image = mask * target + hole * pred
    region = torch.nn.functional.max_pool2d(hole, 3, 1, 1)
    down = (region[..., 1:, :] * region[..., :-1, :] * image.diff(dim=2).abs()).sum()
    across = (region[..., 1:] * region[..., :-1] * image.diff(dim=3).abs()).sum()
    expected = (
        (hole * (pred - target).abs()).mean(),
        (mask * (pred - target).abs()).mean(),
        (down + across) / image.numel(),
    )
    found = inpainting_pixel(
        pred,
        target,
        mask if mask_is == "valid" else hole,
        normalize="image",
        tv_region="dilated_hole",
        tv_penalty="l1",
        tv_normalize=None,
        mask_is=mask_is,
    )
    for term, value in zip(found, expected, strict=True):
        torch.testing.assert_close(term, value)


def test_gradients() -> None:
    pred, target, mask = images((1, 2, 4, 5))
    pred.requires_grad_()
    target.requires_grad_()
    assert torch.autograd.gradcheck(lambda p, t: composite(p, t, mask, mask_is="valid"), (pred, target))
    for region in REGIONS:
        assert torch.autograd.gradcheck(lambda p, r=region: tv(p, mask, region=r, penalty="l2"), (pred,))
