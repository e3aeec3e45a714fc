"""An objective for CMT, the continuous mask-aware transformer, whose own training code was not released."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..features.torchvision_nets import vgg16
from ..ops._named_tuples import serializable
from ._objective import Objective
from ._settings import AdversarialSettings
from ._terms import Adversarial, Perceptual, Pixel, Term


@serializable
class CMTTerms(NamedTuple):
    """Terms of `CMTObjective`: the weighted total and the raw terms, scalars on the images' device."""

    total: Tensor
    hole: Tensor
    valid: Tensor
    perceptual: Tensor
    adversarial: Tensor


@dataclass(frozen=True, kw_only=True)
class CMTSettings(AdversarialSettings):
    """Settings of `CMTObjective`, beside those of `AdversarialSettings`.

    Args:
        perceptual_layers: the trunk's taps that the perceptual term reads.
        penalty: of the perceptual term, "l2" or "l1".
        hole_weight, valid_weight, perceptual_weight, adversarial_weight: factors of the terms.
    """

    discriminator_image: str = "composite"
    perceptual_layers: tuple[str, ...] = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
    penalty: str = "l2"
    hole_weight: float = 1.0
    valid_weight: float = 0.1
    perceptual_weight: float = 10.0
    adversarial_weight: float = 0.001


class CMTObjective(Objective):
    """Hole, valid, perceptual and adversarial term for CMT: a reimplementation's objective, not the paper's.

    ``total = hole + 0.1 valid + 10 perceptual + 0.001 adversarial`` with x the prediction, y the truth, c the
    composite and h = 1 in the hole: ``hole = mean(h |x - y|)`` and ``valid = mean((1 - h) |x - y|)``, both over all
    elements; ``perceptual = sum mean (phi(c) - phi(y))^2`` over relu1_2, relu2_2, relu3_3 and relu4_3 of a VGG16;
    ``adversarial = mean softplus(-D(c))``.

    The authors of CMT released neither their losses nor the weights of them; surveys list a reconstruction, a
    perceptual and an adversarial term. The preset "community" is what a public reimplementation (HuyATon/thesis,
    2025) trains with. Take its numbers as a beginning: every one can be set.

    The reimplementation takes images in [0, 1], which the trunk reads as they are, and masks that are 1 in the hole;
    ``mask_is`` is "valid" here, as in most objectives. Its network pastes the known pixels itself, so that `valid` is
    0 there: give the composite as `pred` to repeat that. The discriminator is shown composites, and its loss is the
    average of both log-losses.

    {arguments}

    Ko and Kim, "Continuously Masked Transformer for Image Inpainting", 2023.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> objective = ik.objectives.CMTObjective(weights=None)  # a random VGG16
        >>> pred, target = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32)
        >>> mask = torch.ones(1, 1, 32, 32)
        >>> mask[..., 8:24, 8:24] = 0
        >>> fake = torch.nn.Conv2d(3, 1, 32)(objective.discriminator_input(pred, target, mask))
        >>> objective(pred, target, mask, fake=fake).total.backward()
    """

    presets = types.MappingProxyType({"community": CMTSettings()})
    result = CMTTerms
    net = staticmethod(vgg16)

    def table(self, s: CMTSettings) -> dict[str, Term]:
        return {
            "hole": Pixel(s.hole_weight, "hole"),
            "valid": Pixel(s.valid_weight, "valid"),
            "perceptual": Perceptual(
                s.perceptual_weight, s.perceptual_layers, ("composite",), penalty=s.penalty
            ),
            "adversarial": Adversarial(s.adversarial_weight, s.gan_mode, half=True),
        }
