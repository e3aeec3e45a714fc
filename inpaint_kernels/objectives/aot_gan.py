"""The objective of AOT-GAN, whose discriminator learns a map of the hole."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..features.torchvision_nets import vgg19
from ..ops import _checks
from ..ops._named_tuples import serializable
from ..ops.adversarial import DiscriminatorLoss, mean
from ..reference._common import accumulate_dtype, safe_divide
from ..reference.gram import without_autocast
from ._objective import Objective
from ._terms import Adversarial, Perceptual, Pixel, Style, Term
from .ctn import CTNSettings


@serializable
class AOTGANTerms(NamedTuple):
    """Terms of `AOTGANObjective`: the weighted total and the raw terms, scalars on the images' device."""

    total: Tensor
    l1: Tensor
    perceptual: Tensor
    style: Tensor
    adversarial: Tensor


@dataclass(frozen=True, kw_only=True)
class AOTGANSettings(CTNSettings):
    """Settings of `AOTGANObjective`, beside those of `CTNSettings`.

    Args:
        labels: what real images and composites count as: "released" or "paper", see `AOTGANObjective`.
    """

    preprocess: str = "imagenet_tanh"
    mask_is: str = "hole"
    gan_mode: str = "lsgan"
    discriminator_image: str = "composite"
    labels: str = "released"
    perceptual_weight: float = 0.1
    style_weight: float = 250.0
    adversarial_weight: float = 0.01


def _blur(size: int, like: Tensor) -> Tensor:
    """(size, size): what multiplies a line of pixels to blur it."""
    position = torch.arange(max(size, 71), dtype=torch.float32, device=like.device)
    distance = position[:size, None] - position[:size]
    total = torch.exp(-(position[:71] - 35).square() / 200).sum()
    weights = torch.exp(-distance.square() / 200) / total
    return torch.where(distance.abs() <= 35, weights, 0.0).to(like.dtype)


def _blurred(mask: Tensor) -> Tensor:
    """A Gaussian of 71 x 71 with sigma 10 over (N, 1, H, W), zeros outside of the image.

    As products, because autocast and TF32 would round a convolution.
    """
    with without_autocast(mask):
        return _blur(mask.shape[-2], mask) @ mask @ _blur(mask.shape[-1], mask)


@dataclass(frozen=True)
class _SoftMaskGuided(Adversarial):
    """Squared errors of the logits, enlarged to the mask, against a map made of the mask."""

    labels: str = "released"

    def _enlarged(self, logits: Any, known: Tensor | None) -> tuple[Tensor, Tensor]:
        """(logits, hole) at the mask's size."""
        if known is None:
            raise ValueError("mask is missing: the discriminator's labels are made of it")
        if not isinstance(logits, Tensor) or logits.ndim != 4:
            raise ValueError("fake and real must be logits (N, 1, h, w) of one discriminator")
        logits = logits.to(accumulate_dtype(logits))
        hole = 1 - _checks.check_plane(known).to(logits.dtype)
        if hole.ndim == 2:
            hole = hole[None, None]
        return F.interpolate(logits, hole.shape[-2:], mode="bilinear", align_corners=True), hole

    @property
    def reads_known(self) -> bool:
        return True

    def generator(self, fake: Any, known: Tensor | None) -> Tensor:
        logits, hole = self._enlarged(fake, known)
        error = (logits - 1).square()
        if self.labels == "released":
            return mean(error)
        return safe_divide(mean(error * hole), mean(hole))

    def discriminator(self, real: Any, fake: Any, known: Tensor | None) -> DiscriminatorLoss:
        (on_real, hole), (on_fake, _) = self._enlarged(real, known), self._enlarged(fake, known)
        if self.labels == "released":
            losses = mean(on_real.square()), mean((on_fake - _blurred(hole)).square())
        else:
            losses = mean((on_real - 1).square()), mean((on_fake - _blurred(1 - hole)).square())
        return DiscriminatorLoss(losses[0] + losses[1], *losses)


class AOTGANObjective(Objective):
    """L1, perceptual, style and adversarial term of AOT-GAN.

    ``total = l1 + 0.1 perceptual + 250 style + 0.01 adversarial``: `l1`, `perceptual` and `style` as
    `CTNObjective`, but style on whole images, from the same pass of the trunk. The discriminator's logits, enlarged
    to the size of the mask (bilinear, corners aligned), are compared with a map by the squared error:

    ========== ============ ========================== ==================================================
    preset     real images  composites                 generator's term
    ========== ============ ========================== ==================================================
    "released" 0            the hole, blurred          1 everywhere: what the discriminator gives fakes
    "paper"    1            known pixels, blurred      1, averaged over the hole alone; 0 without a hole
    ========== ============ ========================== ==================================================

    The released generator's term is multiplied by the mask only after its mean was taken, which cancels. The labels
    of the paper are those that issue 2 of the repository reports. Blurred is a Gaussian of 71 x 71 with sigma 10.

    Images are in [-1, 1], normalised for the trunk with the statistics of ImageNet, mask 1 = hole. The discriminator
    is shown composites.

    {arguments}

    Zeng et al., "Aggregated Contextual Transformations for High-Resolution Image Inpainting", 2021;
    researchmm/AOT-GAN-for-Inpainting.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> objective = ik.objectives.AOTGANObjective("paper", weights=None)  # a random VGG19
        >>> pred, target = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32)
        >>> mask = torch.zeros(1, 1, 32, 32)
        >>> mask[..., 8:24, 8:24] = 1
        >>> fake = torch.nn.Conv2d(3, 1, 4, 4)(objective.discriminator_input(pred, target, mask))
        >>> objective(pred, target, mask, fake=fake).total.backward()
    """

    presets = types.MappingProxyType({"released": AOTGANSettings(), "paper": AOTGANSettings(labels="paper")})
    result = AOTGANTerms
    net = staticmethod(vgg19)

    def table(self, s: AOTGANSettings) -> dict[str, Term]:
        return {
            "l1": Pixel(s.l1_weight),
            "perceptual": Perceptual(s.perceptual_weight, s.perceptual_layers, ("raw",)),
            "style": Style(s.style_weight, s.style_layers, ("raw",)),
            "adversarial": _SoftMaskGuided(s.adversarial_weight, s.gan_mode, labels=s.labels),
        }
