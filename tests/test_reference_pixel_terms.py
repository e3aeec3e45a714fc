"""Plain formulas of total variation, the pixel terms and a trunk's batch, against loops and released formulas."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from inpaint_kernels.reference.inpainting_pixel import inpainting_pixel
from inpaint_kernels.reference.stacked_images import stacked_images
from inpaint_kernels.reference.total_variation import total_variation

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


def test_normalisation_of_mmagic_and_aot_gan() -> None:
    """The batch of a trunk: from [-1, 1] to [0, 1], then ImageNet's mean and deviation."""
    pred, target, mask = (2 * t - 1 for t in images())
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    options = {"scale": 0.5 / std, "shift": (0.5 - mean) / std, "swap": False, "mask_is": "valid"}
    found = stacked_images(pred, target, mask, parts=("raw", "target"), **options)
    expected = [((t + 1) / 2 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1) for t in (pred, target)]
    torch.testing.assert_close(found, torch.cat(expected))


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
