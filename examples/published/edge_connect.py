"""EdgeConnect and the methods that took over parts of its loss file: CTN, T-former, TransCNN-HAE, AOT-GAN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import (
    IMAGENET,
    Terms,
    Trunk,
    log_loss,
    log_loss_discriminator,
    normalized,
    perceptual_l1,
    style_l1,
    with_total,
)

# Of VGG19. EdgeConnect chose them; CTN, T-former and AOT-GAN took over its loss file.
PERCEPTUAL_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
STYLE_LAYERS = ("relu2_2", "relu3_4", "relu4_4", "relu5_2")


# -- EdgeConnect --------------------------------------------------------------------------------


def edge_connect_edge(
    fake: Sequence[Tensor],
    real: Sequence[Tensor],
    *,
    adversarial_weight: float = 1.0,
    feature_matching_weight: float = 10.0,
) -> Terms:
    """knazeri/edge-connect, the edge stage. ``fake``, ``real``: the critic's five activations, the logits last."""
    adversarial = log_loss(fake[-1], 1.0)
    matching = fake[-1].new_zeros(())
    for a, b in zip(fake, real, strict=True):
        matching = matching + F.l1_loss(a, b.detach())
    return with_total(
        adversarial=(adversarial_weight, adversarial),
        feature_matching=(feature_matching_weight, matching),
    )


def edge_connect_inpaint(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    fake: Tensor,
    l1_weight: float = 1.0,
    perceptual_weight: float = 0.1,
    style_weight: float = 250.0,
    adversarial_weight: float = 0.1,
) -> Terms:
    """knazeri/edge-connect, the inpainting stage, weights of config.yml.example.

    L1 of the whole image is divided by the hole's share of the batch.
    """
    l1 = F.l1_loss(pred, target) / mask.mean()
    perceptual = perceptual_l1(trunk(pred, PERCEPTUAL_LAYERS), trunk(target, PERCEPTUAL_LAYERS))
    style = style_l1(trunk(pred * mask, STYLE_LAYERS), trunk(target * mask, STYLE_LAYERS))
    adversarial = log_loss(fake, 1.0)
    return with_total(
        l1=(l1_weight, l1),
        perceptual=(perceptual_weight, perceptual),
        style=(style_weight, style),
        adversarial=(adversarial_weight, adversarial),
    )


edge_connect_discriminator = log_loss_discriminator


# -- CTN and T-former ---------------------------------------------------------------------------


def ctn(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    fake: Tensor,
    l1_weight: float = 1.0,
    perceptual_weight: float = 1.0,
    style_weight: float = 1.0,
    adversarial_weight: float = 0.1,
) -> Terms:
    """dengyecode/ContextualTransformer. The style weight is what was released; its sibling repositories have 250.

    Perceptual and style loss are modules of their own, each with a VGG19 that is fed unnormalised images, the style
    loss with images that are 0 on known pixels.
    """
    hole = 1 - mask
    l1 = F.l1_loss(pred, target)
    perceptual = perceptual_l1(trunk(pred, PERCEPTUAL_LAYERS), trunk(target, PERCEPTUAL_LAYERS))
    style = style_l1(trunk(hole * pred, STYLE_LAYERS), trunk(hole * target, STYLE_LAYERS))
    adversarial = log_loss(fake, 1.0)
    return with_total(
        l1=(l1_weight, l1),
        perceptual=(perceptual_weight, perceptual),
        style=(style_weight, style),
        adversarial=(adversarial_weight, adversarial),
    )


ctn_discriminator = log_loss_discriminator


def t_former(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    fake: Tensor,
    style_weight: float = 250.0,
    **weights: float,
) -> Terms:
    """dengyecode/T-former_image_inpainting: the loss file of CTN with another weight of the style."""
    return ctn(trunk, pred, target, mask, fake=fake, style_weight=style_weight, **weights)


t_former_discriminator = log_loss_discriminator


# -- TransCNN-HAE -------------------------------------------------------------------------------


def transcnn_hae(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    *,
    layer_weights: Sequence[float] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0),
    l1_weight: float = 2.0,
    perceptual_weight: float = 1.0,
    style_weight: float = 250.0,
) -> Terms:
    """zhenglab/TransCNN-HAE, v1.0. One VGG19 pass for both terms; the style term has its last two layers."""
    l1 = F.l1_loss(pred, target)
    x, y = trunk(pred, PERCEPTUAL_LAYERS), trunk(target, PERCEPTUAL_LAYERS)
    perceptual = perceptual_l1(x, y, layer_weights)
    style = style_l1(x[3:], y[3:])
    return with_total(
        l1=(l1_weight, l1),
        perceptual=(perceptual_weight, perceptual),
        style=(style_weight, style),
    )


# -- AOT-GAN ------------------------------------------------------------------------------------


def aot_gan(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    fake: Tensor,
    labels: str = "released",
    l1_weight: float = 1.0,
    perceptual_weight: float = 0.1,
    style_weight: float = 250.0,
    adversarial_weight: float = 0.01,
) -> Terms:
    """researchmm/AOT-GAN-for-Inpainting.

    ``labels="released"`` averages the squared error before it multiplies by the mask and divides by the mask's mean,
    which is the average over the whole image again. ``"paper"`` weighs it by pixel: the hole alone.
    """

    def vgg(images: Tensor, layers: Sequence[str]) -> Sequence[Tensor]:
        return trunk(normalized((images + 1) / 2, IMAGENET), layers)

    l1 = F.l1_loss(pred, target)
    perceptual = perceptual_l1(vgg(pred, PERCEPTUAL_LAYERS), vgg(target, PERCEPTUAL_LAYERS))
    style = style_l1(vgg(pred, STYLE_LAYERS), vgg(target, STYLE_LAYERS))
    logits = F.interpolate(fake, size=mask.shape[-2:], mode="bilinear", align_corners=True)
    reduction = "none" if labels == "paper" else "mean"
    error = F.mse_loss(logits, torch.ones_like(logits), reduction=reduction)
    adversarial = (error * mask / mask.mean()).mean()
    return with_total(
        l1=(l1_weight, l1),
        perceptual=(perceptual_weight, perceptual),
        style=(style_weight, style),
        adversarial=(adversarial_weight, adversarial),
    )


def aot_gan_discriminator(real: Tensor, fake: Tensor, mask: Tensor, *, labels: str = "released") -> Terms:
    """Labels of true images and of composites: ``"released"`` 0 and the blurred hole, ``"paper"`` 1 and the blurred
    known mask.
    """
    real, fake = (
        F.interpolate(logits, size=mask.shape[-2:], mode="bilinear", align_corners=True)
        for logits in (real, fake)
    )
    if labels == "paper":
        fake_label, real_label = gaussian_blur(1 - mask), torch.ones_like(real)
    else:
        fake_label, real_label = gaussian_blur(mask), torch.zeros_like(real)
    on_real, on_fake = F.mse_loss(real, real_label), F.mse_loss(fake, fake_label)
    return {"total": on_real + on_fake, "real": on_real, "fake": on_fake}


def gaussian_blur(mask: Tensor, size: int = 71, sigma: float = 10.0) -> Tensor:
    """Convolution with the whole two-dimensional kernel, zeros outside the image. The kernel is a float32 one."""
    offset = torch.arange(size, dtype=torch.float32, device=mask.device) - size // 2
    line = torch.exp(-(offset**2) / (2 * sigma**2))
    line = line / line.sum()
    kernel = torch.outer(line, line).to(mask.dtype)[None, None]
    return F.conv2d(mask, kernel, padding=size // 2).detach()
