"""The two objectives of EdgeConnect: of its edge generator and of its inpainting generator."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..features.torchvision_nets import vgg19
from ..ops import _checks
from ..ops._named_tuples import serializable
from ._objective import Objective
from ._terms import Adversarial, FeatureMatching, Perceptual, Pixel, Style, Term
from .ctn import CTNSettings


@serializable
class EdgeConnectTerms(NamedTuple):
    """Terms of `EdgeConnectObjective`: the weighted total and the raw terms, scalars on the images' device."""

    total: Tensor
    l1: Tensor
    perceptual: Tensor
    style: Tensor
    adversarial: Tensor
    feature_matching: Tensor


@dataclass(frozen=True, kw_only=True)
class EdgeConnectSettings(CTNSettings):
    """Settings of `EdgeConnectObjective`, beside those of `CTNSettings`.

    Args:
        feature_matching_weight: factor of that term.
    """

    mask_is: str = "hole"
    perceptual_weight: float = 0.1
    style_weight: float = 250.0
    feature_matching_weight: float = 0.0


class EdgeConnectObjective(Objective):
    """Terms of EdgeConnect's edge generator ("edge") and of its inpainting generator ("inpaint").

    With x the prediction, y the truth and h = 1 in the hole:

    ========= =============================================================================================
    preset    total
    ========= =============================================================================================
    "edge"    ``adversarial + 10 feature_matching``
    "inpaint" ``l1 + 0.1 perceptual + 250 style + 0.1 adversarial``, the weights of config.yml.example
    ========= =============================================================================================

    ``l1 = mean |x - y| / mean(h)``, the whole image over the hole's share of the batch, 0 without a hole;
    ``perceptual``, ``style`` and ``adversarial`` as `CTNObjective`, which took them from here;
    ``feature_matching = sum mean |D_k(x) - D_k(y)|`` over the outputs of all five convolutions of the discriminator,
    the logits among them: it returns ``DiscriminatorOutput(logits, [a, b, c, d, logits])``.

    Images are in [0, 1] and go into the trunk as they are, mask 1 = hole. The discriminator of "inpaint" is shown
    the raw prediction, that of "edge" the gray image and the edges: ``discriminator_input(edges, target,
    condition=gray)``. Its loss is the average of both log-losses.

    {arguments}

    Nazeri et al., "EdgeConnect: Generative Image Inpainting with Adversarial Edge Learning", 2019;
    knazeri/edge-connect.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> objective = ik.objectives.EdgeConnectObjective("edge")
        >>> edges, target, gray = torch.rand(3, 1, 1, 32, 32)
        >>> def discriminator(image):
        ...     return ik.objectives.DiscriminatorOutput(image.mean((2, 3)), [image])
        >>> shown = (objective.discriminator_input(image, target, condition=gray) for image in (edges, target))
        >>> fake, real = map(discriminator, shown)
        >>> terms = objective(edges, target, fake=fake, real=real)
    """

    presets = types.MappingProxyType(
        {
            "inpaint": EdgeConnectSettings(),
            "edge": EdgeConnectSettings(
                l1_weight=0.0,
                perceptual_weight=0.0,
                style_weight=0.0,
                adversarial_weight=1.0,
                feature_matching_weight=10.0,
            ),
        }
    )
    result = EdgeConnectTerms
    net = staticmethod(vgg19)

    def table(self, s: EdgeConnectSettings) -> dict[str, Term]:
        return {
            "l1": Pixel(s.l1_weight, by_hole_share=True),
            "perceptual": Perceptual(s.perceptual_weight, s.perceptual_layers, ("raw",)),
            "style": Style(s.style_weight, s.style_layers, ("hole_raw",)),
            "adversarial": Adversarial(s.adversarial_weight, s.gan_mode, half=True),
            "feature_matching": FeatureMatching(s.feature_matching_weight),
        }

    def shown(self, image: Tensor, known: Tensor | None, condition: Tensor | None) -> Tensor:
        if condition is None:
            return image
        _checks.check_features("condition", condition)
        if condition.shape[:1] + condition.shape[2:] != image.shape[:1] + image.shape[2:]:
            raise ValueError(
                f"condition has shape {tuple(condition.shape)}, image has {tuple(image.shape)}: only their channels "
                "may differ"
            )
        return torch.cat([condition.to(image.dtype), image], 1)
