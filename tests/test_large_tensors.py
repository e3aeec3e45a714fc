"""Every op over more than 2^31 elements: an index past that inside one plane, and one made of sample and pixel."""

from __future__ import annotations

import pytest
import torch
from feature_cases import distance_call, distance_settings, gram_call, style_call, style_settings
from harness import INTERPRETING, Backend
from pairs_cases import PENALTIES, inpainting_pixel_call, stacked_images_call, total_variation_call
from pixel_cases import hole_valid_call, masked_call, skip_without_memory
from torch import Tensor

pytestmark = [pytest.mark.slow, pytest.mark.skipif(INTERPRETING, reason="hours in the interpreter")]

Size = tuple[int, ...]
SAMPLES: Size = (3, 1, 2**15, 2**15)
sizes = pytest.mark.parametrize("size", [(1, 1, 2, 2**30 + 8), SAMPLES], ids=["plane", "samples"])
# Of neighbours: rows as long as those of a picture.
pair_sizes = pytest.mark.parametrize("size", [(1, 1, 2**15 + 1, 2**16), SAMPLES], ids=["plane", "samples"])
FIRST = (0, 0, 0, 0)


def last_of(size: Size) -> Size:
    return (size[0] - 1, 0, size[2] - 1, size[3] - 1)


def holding(kernel: Backend, size: Size, values: dict[Size, float]) -> Tensor:
    """Zeros in bfloat16 but for these values."""
    image = torch.zeros(size, dtype=torch.bfloat16, device=kernel.device)
    for where, value in values.items():
        image[where] = value
    return image


def known_corner(kernel: Backend, size: Size) -> Tensor:
    """A mask of which the last pixel alone is 1."""
    mask = torch.zeros(size[-2:], dtype=torch.bool, device=kernel.device)
    mask[-1, -1] = True
    return mask


def check_gradient(value: Tensor, leaf: Tensor, expected: dict[Size, float], count: int = 2) -> None:
    """`count` elements are not 0, among them those that are `expected`."""
    (gradient,) = torch.autograd.grad(value, leaf)
    for where, slope in expected.items():
        torch.testing.assert_close(float(gradient[where]), slope, rtol=1e-2, atol=0)
    assert gradient.count_nonzero() == count


def same(got: Tensor, want: float) -> None:
    torch.testing.assert_close(float(got.detach()), want, rtol=1e-6, atol=0)


@sizes
@pytest.mark.parametrize("mode", ["sum", "none"])
def test_masked_l1(kernel: Backend, size: Size, mode: str) -> None:
    skip_without_memory(kernel, (28 if mode == "none" else 16) * 2**30)
    last = last_of(size)
    pred = holding(kernel, size, {last: 3.0, FIRST: 1.0}).requires_grad_()
    target = holding(kernel, size, {FIRST: 2.0})
    loss = masked_call(kernel, penalty="l1", mode=mode)(pred, target)
    if mode == "none":
        assert loss[last] == 3.0
        assert loss[FIRST] == 1.0
    assert loss.sum() == 4.0
    check_gradient(loss.sum(), pred, {last: 1.0, FIRST: -1.0})


@sizes
def test_hole_valid(kernel: Backend, size: Size) -> None:
    skip_without_memory(kernel, 18 * 2**30)
    last = last_of(size)
    pred = holding(kernel, size, {last: 3.0}).requires_grad_()
    target = holding(kernel, size, {FIRST: 2.0})
    mask = known_corner(kernel, size)
    terms = hole_valid_call(kernel, penalty="l1", normalize="mask")(pred, target, mask)
    outside = pred.numel() - size[0]
    same(terms.valid, 3.0 / size[0])
    same(terms.hole, 2.0 / outside)
    check_gradient(terms.valid + outside * terms.hole, pred, {last: 1 / size[0], FIRST: -1.0})


@pytest.mark.parametrize("penalty", PENALTIES)
@pair_sizes
def test_total_variation(kernel: Backend, size: Size, penalty: str) -> None:
    skip_without_memory(kernel, 16 * 2**30)
    last = last_of(size)
    image = holding(kernel, size, {last: 2.0, FIRST: -1.0}).requires_grad_()
    loss = total_variation_call(kernel, mode="image-image", penalty=penalty)(image, None, None)
    # Two corners, each the end of a pair down and of one across.
    power = PENALTIES.index(penalty) + 1
    same(loss * image.numel(), 2 * (2.0**power + 1.0))
    slopes = {last: 2.0, FIRST: -2.0} if penalty == "l1" else {last: 8.0, FIRST: -4.0}
    check_gradient(loss * image.numel(), image, slopes, 6)


@pair_sizes
def test_inpainting_pixel(kernel: Backend, size: Size) -> None:
    skip_without_memory(kernel, 22 * 2**30)
    last = last_of(size)
    pred = holding(kernel, size, {last: 3.0}).requires_grad_()
    target = holding(kernel, size, {FIRST: 2.0})
    # Where a pixel is known, the composite is the target's 0.
    mask = known_corner(kernel, size)
    terms = inpainting_pixel_call(kernel, normalize="image", mode="image-image")(pred, target, mask)
    count = pred.numel()
    for term, want in ((terms.hole, 2.0), (terms.valid, 3.0), (terms.tv, 0.0)):
        same(term * count, want)
    check_gradient(count * (terms.valid + 2 * terms.hole), pred, {last: 1.0, FIRST: -2.0})


@pair_sizes
def test_stacked_images(kernel: Backend, size: Size) -> None:
    """Also an index made of part and sample."""
    skip_without_memory(kernel, 40 * 2**30)
    last = last_of(size)
    pred = holding(kernel, size, {last: 3.0}).requires_grad_()
    target = holding(kernel, size, {last: 2.0})
    mask = known_corner(kernel, size)
    stacked = stacked_images_call(kernel, parts=("raw", "composite"), scale=0.5)(pred, target, mask)
    assert stacked[last] == 1.5
    assert stacked[size[0] + last[0], 0, last[2], last[3]] == 1.0
    assert stacked.count_nonzero() == 2
    (gradient,) = torch.autograd.grad(stacked, pred, torch.ones_like(stacked))
    assert gradient[last] == 0.5
    assert gradient[FIRST] == 1.0
    assert (gradient == 1).sum() == gradient.numel() - size[0]


def test_gram(kernel: Backend) -> None:
    skip_without_memory(kernel, 14 * 2**30)
    last = last_of(SAMPLES)
    x = holding(kernel, SAMPLES, {last: 3.0, FIRST: 2.0}).requires_grad_()
    gram = gram_call(kernel, "none")(x)
    assert gram.flatten().tolist() == [4.0, 0.0, 9.0]
    check_gradient(gram.sum(), x, {last: 6.0, FIRST: 4.0})


def test_style(kernel: Backend) -> None:
    skip_without_memory(kernel, 20 * 2**30)
    last = last_of(SAMPLES)
    x = holding(kernel, SAMPLES, {last: 3.0, FIRST: 2.0}).requires_grad_()
    target = torch.zeros((3, 1, 2, 2), dtype=torch.bfloat16, device=kernel.device)
    loss = style_call(kernel, style_settings("none-l1"))(x, target)
    assert loss == (9.0 + 4.0) / 3
    check_gradient(loss, x, {last: 2.0, FIRST: 4 / 3})


@sizes
def test_feature_distance(kernel: Backend, size: Size) -> None:
    skip_without_memory(kernel, 18 * 2**30)
    last = last_of(size)
    x = holding(kernel, size, {last: 3.0, FIRST: 1.0}).requires_grad_()
    y = holding(kernel, size, {FIRST: 2.0})
    loss = distance_call(kernel, 1, distance_settings(weights=(float(x.numel()),)))(x, y)
    assert loss == 4.0
    check_gradient(loss, x, {last: 1.0, FIRST: -1.0})
