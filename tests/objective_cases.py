"""Trunk, images and published formulas of the tests of PartialConvObjective.

The formulas are written from what the released training codes compute, one term after the other on whole images, in
any dtype; none of the package is used.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import generator
from torch import Tensor, nn

import inpaint_kernels as ik
from inpaint_kernels.features import FrozenTrunk

TERMS = ("hole", "valid", "tv", "perceptual", "style")
MASKS = ("binary", "fractional", "channels", "holes", "known")
SIZE = (2, 3, 24, 16)


@functools.cache
def narrow_stack() -> nn.Sequential:
    """VGG16 up to pool3 with few channels, and weights that keep activations near 1."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 3
    for width in (6, 6, "M", 8, 8, "M", 10, 10, 10, "M"):
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
            continue
        conv = nn.Conv2d(channels, width, 3, padding=1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        layers += [conv, nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers)


def trunk(**options: Any) -> FrozenTrunk:
    found = FrozenTrunk(_copy(narrow_stack()), ["4", "9", "16"], **options)
    found.names = ["pool1", "pool2", "pool3"]
    return found


def _copy(stack: nn.Sequential) -> nn.Sequential:
    with torch.random.fork_rng():
        new = nn.Sequential(
            *(
                nn.Conv2d(c.in_channels, c.out_channels, 3, padding=1) if isinstance(c, nn.Conv2d) else c
                for c in stack
            )
        )
    new.load_state_dict(stack.state_dict())
    return new


def objective(preset: str = "paper", **options: Any) -> ik.objectives.PartialConvObjective:
    return ik.objectives.PartialConvObjective(preset, trunk=options.pop("trunk", None) or trunk(), **options)


def images(preset: str, size: tuple[int, ...] = SIZE) -> tuple[Tensor, Tensor]:
    """(pred, target) in the range that a preset takes."""
    rng = generator(7)
    pred, target = torch.rand(size, generator=rng), torch.rand(size, generator=rng)
    if preset == "mmagic":
        return 2 * pred - 1, 2 * target - 1
    return (4 * pred - 2, 4 * target - 2) if preset == "naoto0804" else (pred, target)


def known(kind: str, size: tuple[int, ...] = SIZE) -> Tensor:
    """A mask, 1 = known. Holes end above the last row and left of the last column, but for "holes"."""
    n, c, h, w = size
    rng = generator(8)
    mask = torch.ones(n, c if kind == "channels" else 1, h, w)
    if kind == "holes":
        return mask.zero_()
    if kind == "known":
        return mask
    inner = torch.rand(mask[..., :-1, :-1].shape, generator=rng)
    mask[..., :-1, :-1] = inner if kind == "fractional" else (inner < 0.6).to(mask)
    mask[..., 3 : h // 2, 2 : w // 2] = 0.25 if kind == "fractional" else 0
    return mask


def mask_for(preset: str, kind: str, size: tuple[int, ...] = SIZE) -> Tensor:
    mask = known(kind, size)
    return 1 - mask if preset == "mmagic" else mask


def vgg_maps(stack: nn.Sequential, image: Tensor) -> list[Tensor]:
    """features[4], [9] and [16]."""
    found = []
    for place, layer in enumerate(stack):
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is not None
            image = F.conv2d(image, layer.weight.to(image), layer.bias.to(image), padding=1)
        elif isinstance(layer, nn.ReLU):
            image = F.relu(image)
        else:
            image = F.max_pool2d(image, 2, 2)
        if place in (4, 9, 16):
            found.append(image)
    return found


def gram(features: Tensor) -> Tensor:
    n, c, h, w = features.shape
    flat = features.reshape(n, c, h * w)
    return flat @ flat.transpose(1, 2) / (c * h * w)


def whitened(image: Tensor) -> Tensor:
    mean, std = image.new_tensor([0.485, 0.456, 0.406]), image.new_tensor([0.229, 0.224, 0.225])
    return (image - mean[None, :, None, None]) / std[None, :, None, None]


def compared(stack: nn.Sequential, predictions: list[Tensor], truth: Tensor) -> tuple[Tensor, Tensor]:
    """(perceptual, style) as every source adds them up."""
    goal = vgg_maps(stack, truth)
    perceptual = style = truth.new_zeros(())
    for prediction in predictions:
        for found, want in zip(vgg_maps(stack, prediction), goal, strict=True):
            perceptual = perceptual + (found - want).abs().mean()
            style = style + (gram(found) - gram(want)).abs().mean()
    return perceptual, style


def paper(stack: nn.Sequential, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Liu et al. 2018, all L1 terms averaged over the image, images in [0, 1]."""
    h = 1 - v
    c = v * y + h * x
    hole, valid = ((w * (x - y).abs()).sum() / y.numel() for w in (h, v))
    region = F.max_pool2d(h, 3, 1, 1)
    across = region[..., 1:] * region[..., :-1] * (c[..., 1:] - c[..., :-1]).abs()
    down = region[..., 1:, :] * region[..., :-1, :] * (c[..., 1:, :] - c[..., :-1, :]).abs()
    tv = (across.sum() + down.sum()) / c.numel()
    perceptual, style = compared(stack, [whitened(x), whitened(c)], whitened(y))
    total = 6 * hole + valid + 0.1 * tv + 0.05 * perceptual + 120 * style
    return total, hole, valid, tv, perceptual, style


def nvidia(
    stack: nn.Sequential, x: Tensor, y: Tensor, v: Tensor | None, smooth: float = 0.0
) -> tuple[Tensor, ...]:
    """models/loss.py: one normalised pair feeds every term; no mask, which splits the pixel term only to show it."""
    x, y = whitened(x), whitened(y)
    v = torch.ones_like(x) if v is None else v
    hole, valid = ((w * (x - y).abs()).mean() for w in (1 - v, v))
    perceptual, style = compared(stack, [x], y)
    tv = x.new_zeros(())
    if smooth:
        tv = (x[..., 1:] - x[..., :-1]).abs().mean() + (x[..., 1:, :] - x[..., :-1, :]).abs().mean()
    total = 5 * (x - y).abs().mean() + 0.05 * perceptual + 120 * style + smooth * tv
    return total, hole, valid, tv, perceptual, style


def naoto0804(stack: nn.Sequential, x: Tensor, y: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """loss.py: means of masked images, normalised ones, gray ones three times for VGG.

    Its composite is made of the network's input, which places2.py masks: ``gt_img * mask``.
    """
    given = y * v
    c = v * given + (1 - v) * x
    hole = ((1 - v) * x - (1 - v) * y).abs().mean()
    valid = (v * x - v * y).abs().mean()
    tv = (c[:, :, :, :-1] - c[:, :, :, 1:]).abs().mean() + (c[:, :, :-1] - c[:, :, 1:]).abs().mean()
    three = [t if t.shape[1] == 3 else torch.cat([t] * 3, 1) for t in (x, c, y)]
    perceptual, style = compared(stack, three[:2], three[2])
    total = 6 * hole + 1 * valid + 0.1 * tv + 0.05 * perceptual + 120 * style
    return total, hole, valid, tv, perceptual, style


def mmagic(stack: nn.Sequential, x: Tensor, y: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """partial_conv: means over regions, images in [-1, 1], mask 1 = hole.

    It divides total variation by the weights of the pairs, `total_variation_loss` by those of the region. They are
    the same for holes that leave out the last row and column; "holes" is divided as the op does.
    """

    def region_mean(error: Tensor, weight: Tensor) -> Tensor:
        return (error * weight).sum() / (weight.expand_as(error).sum() + 1e-12)

    c = y * (1 - h) + x * h
    hole, valid = (region_mean((x - y).abs(), weight) for weight in (h, 1 - h))
    down = region_mean((c[:, :, :-1] - c[:, :, 1:]).abs(), h[:, :, :-1])
    across = region_mean((c[:, :, :, :-1] - c[:, :, :, 1:]).abs(), h[:, :, :, :-1])
    if bool((h == 1).all()):
        down, across = down * (1 - 1 / h.shape[2]), across * (1 - 1 / h.shape[3])
    unit = [whitened((t + 1) * 0.5) for t in (x, c, y)]
    perceptual, style = compared(stack, unit[:2], unit[2])
    total = 6 * hole + valid + 0.1 * (down + across) + 0.05 * perceptual + 120 * style
    return total, hole, valid, down + across, perceptual, style


FORMULAS: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "paper": paper,
    "nvidia": nvidia,
    "naoto0804": naoto0804,
    "mmagic": mmagic,
}


def gradients(terms: tuple[Tensor, ...], pred: Tensor) -> list[Tensor]:
    """Of every term by `pred`; zeros for one that does not depend on it."""
    return [
        torch.autograd.grad(term, pred, retain_graph=True, allow_unused=True, materialize_grads=True)[0]
        if term.requires_grad
        else torch.zeros_like(pred)
        for term in terms
    ]


def relative(got: Tensor, want: Tensor) -> float:
    norm = want.double().norm()
    return float((got.double() - want.double()).norm() / norm) if norm else float(got.double().norm())
