"""LaMa."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    IMAGENET,
    Terms,
    Trunk,
    normalized,
    squared_gradient_norm,
)


def lama(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    fake: Tensor,
    fake_features: Sequence[Tensor],
    real_features: Sequence[Tensor],
    layers: Sequence[str] = ("layer1", "layer2", "layer3", "layer4"),
    hole_weight: float = 0.0,
    valid_weight: float = 10.0,
    adversarial_weight: float = 10.0,
    feature_matching_weight: float = 100.0,
    perceptual_weight: float = 30.0,
    extra_hole_weight: float = 0.0,
    resize: str = "nearest",
    mask_features: bool = False,
) -> Terms:
    """advimman/lama, configuration lama-fourier. ``l1`` is weighed by pixel, 10 where known and 0 in the hole.

    The features are the critic's activations before its last convolution. Switches that are off by default:
    ``extra_hole_weight`` and ``resize`` as `lama_generator`, ``mask_features`` as `lama_feature_matching`.
    ``perceptual_weight=0`` leaves that term out, as for `lama_vgg_perceptual`.
    """
    l1 = (F.l1_loss(pred, target, reduction="none") * (mask * hole_weight + (1 - mask) * valid_weight)).mean()
    adversarial = lama_generator(fake, mask, extra_hole_weight=extra_hole_weight, resize=resize)
    matching = lama_feature_matching(fake_features, real_features, mask if mask_features else None)
    total = l1 + adversarial_weight * adversarial + feature_matching_weight * matching
    terms = {"l1": l1, "adversarial": adversarial, "feature_matching": matching}
    if perceptual_weight:
        x, y = (trunk(normalized(images, IMAGENET), layers) for images in (pred, target))
        perceptual = torch.stack([F.mse_loss(a, b) for a, b in zip(x, y, strict=True)]).sum()
        terms["perceptual"] = perceptual
        total = total + perceptual_weight * perceptual
    return {"total": total, **terms}


def lama_vgg_perceptual(trunk: Trunk, pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The perceptual term of LaMa's ablations, weight 0.03: known pixels, summed over layers and samples.

    ``trunk`` is a VGG19 with average pooling.
    """
    layers = [
        f"relu{block}_{i + 1}"
        for block, count in ((1, 2), (2, 2), (3, 4), (4, 4), (5, 1))
        for i in range(count)
    ]
    x, y = (trunk(normalized(images, IMAGENET), layers) for images in (pred, target))
    distances = []
    for a, b in zip(x, y, strict=True):
        hole = F.interpolate(mask, size=a.shape[-2:], mode="bilinear", align_corners=False)
        distances.append((F.mse_loss(a, b, reduction="none") * (1 - hole)).mean((1, 2, 3)))
    return torch.stack(distances).sum()


def lama_feature_matching(
    fake: Sequence[Tensor], real: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """Mean over the layers; with a mask of known pixels alone, divided by all of them."""
    distances = []
    for a, b in zip(fake, real, strict=True):
        if mask is None:
            distances.append(F.mse_loss(a, b))
        else:
            hole = F.interpolate(mask, size=a.shape[-2:], mode="bilinear", align_corners=False)
            distances.append(((a - b).pow(2) * (1 - hole)).mean())
    return torch.stack(distances).mean()


def lama_generator(
    fake: Tensor,
    mask: Tensor,
    *,
    extra_hole_weight: float = 0.0,
    hole_only: bool = False,
    resize: str = "nearest",
) -> Tensor:
    """The whole image, unless ``extra_hole_weight`` adds to the hole or ``hole_only`` leaves the rest out."""
    loss = F.softplus(-fake)
    if hole_only:
        loss = loss * _lama_resized(mask, fake, resize)
    elif extra_hole_weight:
        loss = loss * (1 + _lama_resized(mask, fake, resize) * extra_hole_weight)
    return loss.mean()


def _lama_resized(mask: Tensor, logits: Tensor, mode: str) -> Tensor:
    size = logits.shape[-2:]
    if mode == "maxpool":
        return F.adaptive_max_pool2d(mask, size)
    return F.interpolate(mask, size=size, mode=mode)


def lama_discriminator(real: Tensor, fake: Tensor, mask: Tensor, *, resize: str = "nearest") -> Terms:
    """Known pixels of a generated image count as real ("mask_as_fake_target"). `lama_r1` comes on top."""
    hole = _lama_resized(mask, fake, resize)
    on_real = F.softplus(-real).mean()
    on_fake = (hole * F.softplus(fake) + (1 - hole) * F.softplus(-fake)).mean()
    return {"total": on_real + on_fake, "real": on_real, "fake": on_fake}


def lama_r1(real: Tensor, images: Tensor, weight: float = 0.001) -> Tensor:
    """In every step of the critic, without MAT's factor 1/2. ``images`` require gradients."""
    return weight * squared_gradient_norm(real, images).mean()
