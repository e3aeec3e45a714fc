"""The objective of MAT, the mask-aware transformer."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..features.torchvision_nets import vgg19
from ..ops import _checks
from ..ops._named_tuples import serializable
from ..ops.penalties import r1_penalty
from ._objective import Objective
from ._settings import AdversarialSettings
from ._terms import Adversarial, Judged, Perceptual, Term, logits_of


@serializable
class MATTerms(NamedTuple):
    """Terms of `MATObjective`: the weighted total and the raw terms, scalars on the images' device."""

    total: Tensor
    perceptual: Tensor
    adversarial: Tensor


@dataclass(frozen=True, kw_only=True)
class MATSettings(AdversarialSettings):
    """Settings of `MATObjective`, beside those of `AdversarialSettings`.

    Args:
        perceptual_layers: the trunk's taps that the perceptual term reads.
        perceptual_layer_weights: a factor for each of them.
        perceptual_weight, adversarial_weight: factors of the terms.
        r1_gamma: of the discriminator's penalty, as `r1_penalty`.
    """

    preprocess: str = "imagenet_tanh"
    discriminator_image: str = "composite"
    penalty_interval: int = 16
    perceptual_layers: tuple[str, ...] = ("conv4_4", "conv5_4")
    perceptual_layer_weights: tuple[float, ...] = (1 / 4, 1 / 2)
    perceptual_weight: float = 0.1
    r1_gamma: float = 10.0


class MATObjective(Objective):
    """Perceptual and adversarial term of MAT, and the R1 penalty of its two discriminators.

    ``total = adversarial + 0.1 perceptual`` with c the composite of the final image and y the truth: ``perceptual =
    1/4 mean |phi(c) - phi(y)|`` at conv4_4 of a VGG19 plus 1/2 of that at conv5_4, both before their ReLU;
    ``adversarial = mean softplus(-D(c)) + mean softplus(-D1(c1))``, the sum over the final and the first stage's
    image, each with a discriminator of its own. There is no pixel term; the released code only logs one.

    Images are in [-1, 1], mask 1 = known. A prediction is the final image, or (first stage, final image).
    ``discriminator_input`` of such a pair is a list of two, of [mask - 1/2, composite]: 4 channels. Logits are lists
    in the same order; their losses are summed, not averaged. The discriminators' loss is
    ``softplus(-D(y)) + softplus(D(c))``, summed over both, and ``discriminator_penalty`` is
    ``10/2 (|dD(y)/dy|^2 + |dD1(y)/dy|^2)``. The released code takes it in every 16th step
    (``settings.penalty_interval``) and multiplies it by 16 then, which is left to you.

    {arguments}

    Li et al., "MAT: Mask-Aware Transformer for Large Hole Image Inpainting", 2022; fenglinglwb/MAT.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> objective = ik.objectives.MATObjective(weights=None)  # a random VGG19
        >>> first, final = torch.rand(2, 1, 3, 32, 32, requires_grad=True)
        >>> target, mask = torch.rand(1, 3, 32, 32), torch.ones(1, 1, 32, 32)
        >>> discriminators = [torch.nn.Conv2d(4, 1, 4, 2) for _ in range(2)]
        >>> shown = objective.discriminator_input((first, final), target, mask)
        >>> fake = [d(image) for d, image in zip(discriminators, shown)]
        >>> objective((first, final), target, mask, fake=fake).total.backward()

        The step of the discriminators, with the penalty of every 16th:

        >>> real_images = target.clone().requires_grad_()
        >>> shown = objective.discriminator_input((real_images, real_images), real_images, mask)
        >>> real = [d(image) for d, image in zip(discriminators, shown)]
        >>> loss = objective.discriminator_loss(real=real, fake=[logits.detach() for logits in fake]).total
        >>> (loss + 16 * objective.discriminator_penalty(real, real_images)).backward()
    """

    staged = True
    presets = types.MappingProxyType({"released": MATSettings()})
    result = MATTerms
    net = staticmethod(vgg19)

    def table(self, s: MATSettings) -> dict[str, Term]:
        weights = s.perceptual_layer_weights
        return {
            "perceptual": Perceptual(s.perceptual_weight, s.perceptual_layers, ("composite",), weights),
            "adversarial": Adversarial(s.adversarial_weight, s.gan_mode, heads="sum"),
        }

    def shown(self, image: Tensor, known: Tensor | None, condition: Tensor | None) -> Tensor:
        image = super().shown(image, known, condition)
        if known is None:
            raise ValueError("mask is missing: the discriminators of MAT read it")
        n, _, h, w = image.shape
        return torch.cat([_checks.check_plane(known).to(image.dtype).expand(n, 1, h, w) - 0.5, image], 1)

    def discriminator_penalty(self, real_logits: Judged, real_images: Tensor) -> Tensor:
        """R1 of both discriminators by the truth (N, C, H, W) that both inputs were made of, with a gradient."""
        logits = logits_of("real_logits", real_logits)
        heads = 1 if isinstance(logits, Tensor) else len(logits)
        return r1_penalty(logits, real_images, gamma=self.settings.r1_gamma) * heads
