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


def zeros(kernel: Backend, size: Size) -> Tensor:
    return torch.zeros(size, dtype=torch.bfloat16, device=kernel.device)


@sizes
@pytest.mark.parametrize("mode", ["mask", "none"])
def test_masked_l1(kernel: Backend, size: Size, mode: str) -> None:
    skip_without_memory(kernel, (28 if mode == "none" else 16) * 2**30)
    pred = zeros(kernel, size)
    target = torch.zeros((), dtype=torch.bfloat16, device=kernel.device).expand(size).contiguous()
    last, first = last_of(size), FIRST
    pred[last], pred[first], target[first] = 3.0, 1.0, 2.0
    pred.requires_grad_()
    loss = masked_call(kernel, penalty="l1", mode="sum" if mode == "mask" else mode)(pred, target)
    if mode == "none":
        assert loss[last] == 3.0
        assert loss[first] == 1.0
        assert loss.sum() == 4.0
        (gradient,) = torch.autograd.grad(loss, pred, torch.ones((), device=kernel.device).expand(size))
    else:
        assert loss == 4.0
        (gradient,) = torch.autograd.grad(loss, pred)
    assert gradient[last] == 1.0
    assert gradient[first] == -1.0
    assert gradient.count_nonzero() == 2


@sizes
def test_hole_valid(kernel: Backend, size: Size) -> None:
    skip_without_memory(kernel, 18 * 2**30)
    pred = zeros(kernel, size)
    target = zeros(kernel, size)
    mask = torch.zeros(size[-2:], dtype=torch.bool, device=kernel.device)
    last, first = last_of(size), FIRST
    pred[last], target[first] = 3.0, 2.0
    mask[-1, -1] = True
    pred.requires_grad_()
    terms = hole_valid_call(kernel, penalty="l1", normalize="mask")(pred, target, mask)
    outside = pred.numel() - size[0]
    assert terms.valid == 3.0 / size[0]
    torch.testing.assert_close(terms.hole.cpu(), torch.tensor(2.0 / outside), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(terms.valid + outside * terms.hole, pred)
    torch.testing.assert_close(gradient[last].cpu().float(), torch.tensor(1 / size[0]), rtol=1e-2, atol=0)
    torch.testing.assert_close(gradient[first].cpu().float(), torch.tensor(-1.0), rtol=1e-2, atol=0)
    assert gradient.count_nonzero() == 2


@pytest.mark.parametrize("penalty", PENALTIES)
@pair_sizes
def test_total_variation(kernel: Backend, size: Size, penalty: str) -> None:
    skip_without_memory(kernel, 16 * 2**30)
    image = zeros(kernel, size)
    last = last_of(size)
    image[last], image[0, 0, 0, 0] = 2.0, -1.0
    image.requires_grad_()
    loss = total_variation_call(kernel, mode="image-image", penalty=penalty)(image, None, None)
    (gradient,) = torch.autograd.grad(loss * image.numel(), image)
    # Two corners, each the end of a pair down and of one across.
    power = PENALTIES.index(penalty) + 1
    want = torch.tensor(2 * (2.0**power + 1.0))
    torch.testing.assert_close((loss * image.numel()).cpu(), want, rtol=1e-6, atol=0)
    assert gradient[last] == 2 * (1 if penalty == "l1" else 4)
    assert gradient[0, 0, 0, 0] == -2 * (1 if penalty == "l1" else 2)
    assert gradient.count_nonzero() == 6


@pair_sizes
def test_inpainting_pixel(kernel: Backend, size: Size) -> None:
    skip_without_memory(kernel, 22 * 2**30)
    pred = zeros(kernel, size)
    target = zeros(kernel, size)
    mask = torch.zeros(size[-2:], dtype=torch.bool, device=kernel.device)
    last, first = last_of(size), FIRST
    pred[last], target[first] = 3.0, 2.0
    mask[-1, -1] = True  # known: the composite there is the target's 0
    pred.requires_grad_()
    terms = inpainting_pixel_call(kernel, normalize="image", mode="image-image")(pred, target, mask)
    count = pred.numel()
    for term, want in ((terms.hole, 2.0), (terms.valid, 3.0), (terms.tv, 0.0)):
        torch.testing.assert_close(term.cpu() * count, torch.tensor(want), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(count * (terms.valid + 2 * terms.hole), pred)
    assert gradient[last] == 1
    assert gradient[first] == -2
    assert gradient.count_nonzero() == 2


@pair_sizes
def test_stacked_images(kernel: Backend, size: Size) -> None:
    """Also an index made of part and sample."""
    skip_without_memory(kernel, 40 * 2**30)
    pred = zeros(kernel, size)
    target = zeros(kernel, size)
    mask = torch.zeros(size[-2:], dtype=torch.bool, device=kernel.device)
    last = last_of(size)
    pred[last], target[last] = 3.0, 2.0
    mask[-1, -1] = True
    pred.requires_grad_()
    stacked = stacked_images_call(kernel, parts=("raw", "composite"), scale=0.5)(pred, target, mask)
    assert stacked[last] == 1.5
    assert stacked[size[0] + last[0], 0, last[2], last[3]] == 1.0
    assert stacked.count_nonzero() == 2
    (gradient,) = torch.autograd.grad(stacked, pred, torch.ones_like(stacked))
    assert gradient[last] == 0.5
    assert gradient[0, 0, 0, 0] == 1.0
    assert (gradient == 1).sum() == gradient.numel() - size[0]


def test_gram(kernel: Backend) -> None:
    skip_without_memory(kernel, 14 * 2**30)
    x = zeros(kernel, SAMPLES)
    x[2, 0, -1, -1], x[0, 0, 0, 0] = 3.0, 2.0
    x.requires_grad_()
    gram = gram_call(kernel, "none")(x)
    assert gram.flatten().tolist() == [4.0, 0.0, 9.0]
    (gradient,) = torch.autograd.grad(gram.sum(), x)
    assert gradient[2, 0, -1, -1] == 6.0
    assert gradient[0, 0, 0, 0] == 4.0


def test_style(kernel: Backend) -> None:
    skip_without_memory(kernel, 20 * 2**30)
    x = zeros(kernel, SAMPLES)
    target = torch.zeros((3, 1, 2, 2), dtype=torch.bfloat16, device=kernel.device)
    x[2, 0, -1, -1], x[0, 0, 0, 0] = 3.0, 2.0
    x.requires_grad_()
    loss = style_call(kernel, style_settings("none-l1"))(x, target)
    assert loss == (9.0 + 4.0) / 3
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(
        gradient[[2, 0], 0, [-1, 0], [-1, 0]].cpu(), torch.tensor([2.0, 4 / 3], dtype=torch.bfloat16)
    )
    assert gradient.count_nonzero() == 2


@sizes
def test_feature_distance(kernel: Backend, size: Size) -> None:
    skip_without_memory(kernel, 18 * 2**30)
    x = zeros(kernel, size)
    y = zeros(kernel, size)
    last, first = last_of(size), FIRST
    x[last], x[first], y[first] = 3.0, 1.0, 2.0
    x.requires_grad_()
    count = float(x.numel())
    loss = distance_call(kernel, 1, distance_settings(weights=(count,)))(x, y)
    assert loss == 4.0
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient[last] == 1.0
    assert gradient[first] == -1.0
    assert gradient.count_nonzero() == 2
