"""Partial convolution with its terms on pixels and on VGG16, and DeepFill v1 and v2, which have no trunk."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    IMAGENET,
    Terms,
    Trunk,
    composite,
    normalized,
    perceptual_l1,
    style_l1,
    with_total,
)

# -- Partial convolution ------------------------------------------------------------------------


def partial_conv(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    hole_weight: float = 6.0,
    valid_weight: float = 1.0,
    tv_weight: float = 0.1,
    perceptual_weight: float = 0.05,
    style_weight: float = 120.0,
) -> Terms:
    """Liu et al. (2018), as the paper states it. Perceptual and style term compare the output and the composite."""
    error = (pred - target).abs()
    hole, valid = ((1 - mask) * error).mean(), (mask * error).mean()
    image = composite(pred, target, mask)
    tv = variation_around(image, 1 - mask)
    layers = ("pool1", "pool2", "pool3")
    *predictions, truth = (trunk(normalized(images, IMAGENET), layers) for images in (pred, image, target))
    perceptual = torch.stack([perceptual_l1(maps, truth) for maps in predictions]).sum()
    style = torch.stack([style_l1(maps, truth) for maps in predictions]).sum()
    return with_total(
        hole=(hole_weight, hole),
        valid=(valid_weight, valid),
        tv=(tv_weight, tv),
        perceptual=(perceptual_weight, perceptual),
        style=(style_weight, style),
    )


def variation_around(image: Tensor, hole: Tensor) -> Tensor:
    """Summed differences of neighbours in the hole dilated by one pixel, as a share of all elements."""
    region = F.max_pool2d(hole, 3, stride=1, padding=1)
    across = region[:, :, :, 1:] * region[:, :, :, :-1] * (image[:, :, :, 1:] - image[:, :, :, :-1]).abs()
    down = region[:, :, 1:] * region[:, :, :-1] * (image[:, :, 1:] - image[:, :, :-1]).abs()
    return (across.sum() + down.sum()) / image.numel()


# -- DeepFill v1 and v2, as mmagic trains them --------------------------------------------------


def region_mean(error: Tensor, weight: Tensor) -> Tensor:
    return (error * weight).sum() / (weight.expand_as(error).sum() + 1e-12)


def _deepfill(
    stages: tuple[Tensor, Tensor],
    target: Tensor,
    mask: Tensor,
    adversarial: Tensor,
    weights: tuple[float, float, float],
) -> Terms:
    """The generator's terms; `weights` of hole, known pixels and adversarial term."""
    terms = {}
    for number, pred in enumerate(stages, 1):
        terms[f"hole_stage{number}"] = region_mean((pred - target).abs(), mask)
        terms[f"valid_stage{number}"] = region_mean((pred - target).abs(), 1 - mask)
    hole_weight, valid_weight, adversarial_weight = weights
    total = (
        hole_weight * (terms["hole_stage1"] + terms["hole_stage2"])
        + valid_weight * (terms["valid_stage1"] + terms["valid_stage2"])
        + adversarial_weight * adversarial
    )
    return {"total": total, **terms, "adversarial": adversarial}


def deepfill_v1(
    pred: tuple[Tensor, Tensor],
    target: Tensor,
    mask: Tensor,
    *,
    fake: tuple[Tensor, Tensor],
    hole_weight: float = 1.0,
    valid_weight: float = 1.0,
    adversarial_weight: float = 1e-4,
) -> Terms:
    """open-mmlab/mmagic, deepfillv1. ``pred``: of both stages; ``fake``: of the global and the local critic.

    The critics see ``composite(pred[1], (1 - mask) * target, 1 - mask)``, the local one a patch around the hole.
    """
    adversarial = -fake[0].mean() - fake[1].mean()
    return _deepfill(pred, target, mask, adversarial, (hole_weight, valid_weight, adversarial_weight))


def deepfill_v1_discriminator(
    real: tuple[Tensor, Tensor], fake: tuple[Tensor, Tensor], *, drift_weight: float = 0.001
) -> Terms:
    """Wasserstein, and a drift term: half the square of each of the four means. The gradient penalty comes on top."""
    means = torch.stack([-real[0].mean(), -real[1].mean(), fake[0].mean(), fake[1].mean()])
    on_real, on_fake, drift = means[:2].sum(), means[2:].sum(), 0.5 * means.square().sum()
    total = on_real + on_fake + drift_weight * drift
    return {"total": total, "real": on_real, "fake": on_fake, "drift": drift}


def deepfill_v1_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    mask: Tensor | None = None,
    *,
    alpha: Tensor | None = None,
    weight: float = 10.0,
) -> Tensor:
    """Of one critic: the global one with the mask, the local one (patches) without.

    The norm is taken over the channels of each pixel, so known pixels add a constant 1. ``alpha`` (N, 1, 1, 1) is the
    true image's share of the mix, by default random.
    """
    if alpha is None:
        alpha = torch.rand(real.shape[0], 1, 1, 1).to(real)
    mix = (alpha * real + (1.0 - alpha) * fake).detach().requires_grad_()
    logits = critic(mix)
    (gradient,) = torch.autograd.grad(logits, mix, torch.ones_like(logits), create_graph=True)
    if mask is not None:
        gradient = gradient * mask
    penalty = ((gradient.norm(2, dim=1) - 1) ** 2).mean()
    if mask is not None:
        penalty = penalty / mask.mean()
    return weight * penalty


def deepfill_v2(
    pred: tuple[Tensor, Tensor],
    target: Tensor,
    mask: Tensor,
    *,
    fake: Tensor,
    hole_weight: float = 1.0,
    valid_weight: float = 1.0,
    adversarial_weight: float = 0.1,
) -> Terms:
    """open-mmlab/mmagic, deepfillv2. ``pred``: outputs of both stages.

    The critic sees ``torch.cat([composite(pred[1], (1 - mask) * target, 1 - mask), mask], 1)``.
    """
    adversarial = -fake.mean()
    return _deepfill(pred, target, mask, adversarial, (hole_weight, valid_weight, adversarial_weight))


def deepfill_v2_discriminator(real: Tensor, fake: Tensor) -> Terms:
    on_real, on_fake = F.relu(1 - real).mean(), F.relu(1 + fake).mean()
    return {"total": on_real + on_fake, "real": on_real, "fake": on_fake}
