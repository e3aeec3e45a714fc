"""MAT, CoordFill and CMT."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    IMAGENET,
    LPIPS,
    Terms,
    Trunk,
    composite,
    log_loss,
    normalized,
    perceptual_l1,
    squared_gradient_norm,
    with_total,
)

# -- MAT ----------------------------------------------------------------------------------------


def mat(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    fake: tuple[Tensor, Tensor],
    layers: Sequence[str] = ("conv4_4", "conv5_4"),
    layer_weights: Sequence[float] = (1 / 4, 1 / 2),
    perceptual_weight: float = 0.1,
) -> Terms:
    """fenglinglwb/MAT. ``fake``: logits of the final image and of the first stage's, each by its own critic.

    A critic sees ``mat_critic_input(composite(...), mask)``. Only the perceptual term reads ``pred``, the final
    image.
    """
    image = composite(pred, target, mask)
    x, y = (trunk(normalized((images + 1) / 2, IMAGENET), layers) for images in (image, target))
    perceptual = perceptual_l1(x, y, layer_weights)
    adversarial, adversarial_stage1 = F.softplus(-fake[0]), F.softplus(-fake[1])
    total = (adversarial + adversarial_stage1 + perceptual_weight * perceptual).mean()
    return {
        "total": total,
        "perceptual": perceptual,
        "adversarial": adversarial.mean(),
        "adversarial_stage1": adversarial_stage1.mean(),
    }


def mat_critic_input(image: Tensor, mask: Tensor) -> Tensor:
    """(N, 4, H, W) of a composite or of a true image."""
    return torch.cat([mask - 0.5, image], 1)


def mat_discriminator(real: tuple[Tensor, Tensor], fake: tuple[Tensor, Tensor]) -> Terms:
    on_real = (F.softplus(-real[0]) + F.softplus(-real[1])).mean()
    on_fake = (F.softplus(fake[0]) + F.softplus(fake[1])).mean()
    return {"total": on_real + on_fake, "real": on_real, "fake": on_fake}


def mat_r1(real: tuple[Tensor, Tensor], images: tuple[Tensor, Tensor], gamma: float = 10.0) -> Tensor:
    """R1 of both critics; MAT adds 16 times this in every 16th step.

    ``images``: the true images, once for each critic, that require gradients and that ``real`` was computed from.
    """
    penalty = squared_gradient_norm(real[0], images[0]) + squared_gradient_norm(real[1], images[1])
    return (gamma / 2 * penalty).mean()


# -- CoordFill ----------------------------------------------------------------------------------


def coordfill(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    heads: Sequence[Tensor],
    fake: Tensor,
    fake_features: Sequence[Tensor],
    real_features: Sequence[Tensor],
    lpips_weight: float = 10.0,
    adversarial_weight: float = 1.0,
    feature_matching_weight: float = 100.0,
) -> Terms:
    """NiFangBaAGe/CoordFill. ``heads``: LPIPS' weights of each layer's channels, (C,) or (1, C, 1, 1).

    The features are the critic's activations before its last convolution, four of them.
    """
    distance = lpips(trunk, composite(pred, target, mask), target, heads).sum(0).mean()
    adversarial = log_loss(fake, 1.0)
    matching = fake.new_zeros(())
    for a, b in zip(fake_features, real_features, strict=True):
        matching = matching + F.l1_loss(a, b.detach())
    return with_total(
        lpips=(lpips_weight, distance),
        adversarial=(adversarial_weight, adversarial),
        feature_matching=(feature_matching_weight, matching),
    )


def lpips(trunk: Trunk, x: Tensor, y: Tensor, heads: Sequence[Tensor]) -> Tensor:
    """The distance by each layer of AlexNet of each sample, (5, N); LPIPS is their sum over the layers."""
    layers = ("relu1", "relu2", "relu3", "relu4", "relu5")
    maps = [trunk(normalized(images, LPIPS), layers) for images in (x, y)]
    distances = []
    for a, b, head in zip(*maps, heads, strict=True):
        difference = (unit_vectors(a) - unit_vectors(b)) ** 2
        distances.append(F.conv2d(difference, head.view(1, -1, 1, 1)).mean((1, 2, 3)))
    return torch.stack(distances)


def unit_vectors(features: Tensor, eps: float = 1e-10) -> Tensor:
    """The gradient of a zero vector is NaN, and only the ReLU below it keeps that from the image."""
    norm = torch.sqrt(torch.sum(features**2, dim=1, keepdim=True))
    return features / (norm + eps)


def coordfill_discriminator(real: Tensor, fake: Tensor) -> Terms:
    """The sum of both sides, not their mean."""
    on_real, on_fake = log_loss(real, 1.0), log_loss(fake, 0.0)
    return {"total": on_real + on_fake, "real": on_real, "fake": on_fake}


# -- CMT, as others train it --------------------------------------------------------------------


def cmt(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    fake: Tensor,
    hole_weight: float = 1.0,
    valid_weight: float = 0.1,
    perceptual_weight: float = 10.0,
    adversarial_weight: float = 0.001,
) -> Terms:
    """A public reimplementation of CMT; its authors released no training code, so this is not the paper's objective.

    The reimplementation's network pastes the known pixels itself, and its L1 term sees the result: pass the composite
    as ``pred`` to repeat that.
    """
    error = (pred - target).abs()
    hole = (mask * error).mean()
    valid = ((1 - mask) * error).mean()
    layers = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
    perceptual = pred.new_zeros(())
    for a, b in zip(trunk(composite(pred, target, 1 - mask), layers), trunk(target, layers), strict=True):
        perceptual = perceptual + F.mse_loss(a, b)
    adversarial = F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))
    return with_total(
        hole=(hole_weight, hole),
        valid=(valid_weight, valid),
        perceptual=(perceptual_weight, perceptual),
        adversarial=(adversarial_weight, adversarial),
    )


def cmt_discriminator(real: Tensor, fake: Tensor) -> Terms:
    on_real = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
    on_fake = F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
    return {"total": (on_real + on_fake) / 2, "real": on_real, "fake": on_fake}
