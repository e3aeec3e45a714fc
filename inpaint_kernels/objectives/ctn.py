"""The objectives of CTN (contextual transformer network) and of T-former, which trains with the same losses."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..features.torchvision_nets import vgg19
from ..ops._named_tuples import serializable
from ._objective import Objective
from ._settings import AdversarialSettings
from ._terms import Adversarial, Perceptual, Pixel, Style, Term


@serializable
class CTNTerms(NamedTuple):
    """Terms of `CTNObjective`: the weighted total and the raw terms, scalars on the images' device."""

    total: Tensor
    l1: Tensor
    perceptual: Tensor
    style: Tensor
    adversarial: Tensor


@dataclass(frozen=True, kw_only=True)
class CTNSettings(AdversarialSettings):
    """Settings of `CTNObjective` and of those with its terms, beside those of `AdversarialSettings`.

    Args:
        perceptual_layers, style_layers: the trunk's taps that the two terms read.
        l1_weight, perceptual_weight, style_weight, adversarial_weight: factors of the terms.
    """

    perceptual_layers: tuple[str, ...] = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
    style_layers: tuple[str, ...] = ("relu2_2", "relu3_4", "relu4_4", "relu5_2")
    l1_weight: float = 1.0
    perceptual_weight: float = 1.0
    style_weight: float = 1.0
    adversarial_weight: float = 0.1
    gan_mode: str = "clamped_bce"


class CTNObjective(Objective):
    """L1, perceptual, style and adversarial term of CTN.

    ``total = l1 + perceptual + 1 style + 0.1 adversarial`` with x the prediction, y the truth and h = 1 in the hole:
    ``l1 = mean |x - y|``; ``perceptual = sum mean |phi(x) - phi(y)|`` over relu1_1 to relu5_1 of a VGG19; ``style =
    sum mean |G(phi(h x)) - G(phi(h y))|`` over relu2_2, relu3_4, relu4_4 and relu5_2, with Gram matrices divided by
    C H W and known pixels set to 0, the gray of the range; ``adversarial = mean -log D(x)``.

    ============= ====== =============================================================================
    preset        style  source
    ============= ====== =============================================================================
    "released"    1      the default of the released code
    "recommended" 250    three sibling repositories of the same author; what the paper used is unknown
    ============= ====== =============================================================================

    Images are in [-1, 1] and go into the trunk as they are, mask 1 = known. The discriminator is shown the raw
    prediction and the truth; its loss is the average of both log-losses. They are taken of logits, but with the
    clamps that PyTorch gives a log-loss of a sigmoid ("clamped_bce"): in float32 a logit above 17 has no gradient,
    and from -28 down the gradient dies, too.
    ``gan_mode="nonsaturating"`` is the same formula without the clamps.

    {arguments}

    Deng et al., "Learning Contextual Transformer Network for Image Inpainting", 2021;
    dengyecode/ContextualTransformer.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> objective = ik.objectives.CTNObjective("recommended", weights=None)  # a random VGG19
        >>> pred, target = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32)
        >>> mask = torch.ones(1, 1, 32, 32)
        >>> discriminator = torch.nn.Conv2d(3, 1, 4, 2)
        >>> fake = discriminator(objective.discriminator_input(pred, target, mask))
        >>> objective(pred, target, mask, fake=fake).total.backward()
    """

    presets = types.MappingProxyType(
        {"released": CTNSettings(), "recommended": CTNSettings(style_weight=250.0)}
    )
    result = CTNTerms
    net = staticmethod(vgg19)

    def table(self, s: CTNSettings) -> dict[str, Term]:
        return {
            "l1": Pixel(s.l1_weight),
            "perceptual": Perceptual(s.perceptual_weight, s.perceptual_layers, ("raw",)),
            "style": Style(s.style_weight, s.style_layers, ("hole_raw",)),
            "adversarial": Adversarial(s.adversarial_weight, s.gan_mode, half=True),
        }


class TFormerObjective(CTNObjective):
    """L1, perceptual, style and adversarial term of T-former: those of `CTNObjective` with style weight 250.

    ``total = l1 + perceptual + 250 style + 0.1 adversarial``; formulas, ranges, polarity and discriminator as there.
    The released code trains it with AdamW, betas (0.9, 0.5).

    {arguments}

    Deng et al., "T-former: An Efficient Transformer for Image Inpainting", 2022;
    dengyecode/T-former_image_inpainting.

    Example:
        >>> import inpaint_kernels as ik
        >>> ik.objectives.TFormerObjective(weights=None).settings.style_weight
        250.0
    """

    presets = types.MappingProxyType({"released": CTNSettings(style_weight=250.0)})
