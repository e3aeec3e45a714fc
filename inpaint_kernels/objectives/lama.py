"""The objective of LaMa, with a trunk that you bring."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..ops._named_tuples import serializable
from ..ops.adversarial import DiscriminatorLoss, discriminator_loss, generator_loss
from ..ops.mask_operators import resize_mask
from ..ops.penalties import r1_penalty
from ..reference._common import accumulate_dtype
from ._objective import Objective
from ._settings import AdversarialSettings
from ._terms import Adversarial, FeatureMatching, Judged, KnownPerceptual, Perceptual, Pixel, Term, logits_of


@serializable
class LaMaTerms(NamedTuple):
    """Terms of `LaMaObjective`: the weighted total and the raw terms, scalars on the images' device."""

    total: Tensor
    hole: Tensor
    valid: Tensor
    perceptual: Tensor
    adversarial: Tensor
    feature_matching: Tensor


@dataclass(frozen=True, kw_only=True)
class LaMaSettings(AdversarialSettings):
    """Settings of `LaMaObjective`, beside those of `AdversarialSettings`.

    Args:
        perceptual_layers: the trunk's taps that the perceptual term reads.
        layer_reduction: of the perceptual term over its layers, "sum" or "mean".
        perceptual_known_only: weigh the maps with the known mask, resized, and sum over the batch.
        feature_matching_known_only: weigh the discriminator's features with the known mask, resized.
        extra_hole_weight: the generator's adversarial term weighs ``1 + extra_hole_weight h``.
        mask_resize: how masks come to the size of logits, as `resize_mask` names it.
        hole_weight, valid_weight, perceptual_weight, adversarial_weight, feature_matching_weight: factors of the
            terms.
        r1_weight: factor of the discriminator's squared gradient norm.
    """

    preprocess: str = "imagenet"
    mask_is: str = "hole"
    penalty_interval: int = 1
    perceptual_layers: tuple[str, ...] = ("layer1", "layer2", "layer3", "layer4")
    layer_reduction: str = "sum"
    perceptual_known_only: bool = False
    feature_matching_known_only: bool = False
    extra_hole_weight: float = 0.0
    mask_resize: str = "nearest"
    hole_weight: float = 0.0
    valid_weight: float = 10.0
    perceptual_weight: float = 30.0
    adversarial_weight: float = 10.0
    feature_matching_weight: float = 100.0
    r1_weight: float = 0.001


@dataclass(frozen=True)
class _MaskedAdversarial(Adversarial):
    """Known pixels of a fake count as real for the discriminator."""

    extra_hole_weight: float = 0.0
    mask_resize: str = "nearest"

    @property
    def reads_known(self) -> bool:
        return self.extra_hole_weight != 0

    def _resized(self, known: Tensor | None, logits: Any) -> Tensor:
        if known is None:
            raise ValueError("mask is missing: the discriminator's labels are made of it")
        if self.mask_resize == "nearest":
            return known  # which the losses do themselves
        if not isinstance(logits, Tensor):
            raise ValueError(f"mask_resize={self.mask_resize!r} is for the logits of one discriminator")
        # The hole is what is resized: the largest values of a mask and of its inverse are at different places.
        return 1 - resize_mask(1 - known.to(accumulate_dtype(logits)), logits.shape[-2:], self.mask_resize)

    def generator(self, fake: Any, known: Tensor | None) -> Tensor:
        extra = self.extra_hole_weight
        mask = self._resized(known, fake) if extra else None
        return generator_loss(fake, mode=self.mode, mask=mask, extra_hole_weight=extra)

    def discriminator(self, real: Any, fake: Any, known: Tensor | None) -> DiscriminatorLoss:
        return discriminator_loss(real, fake, mode=self.mode, mask=self._resized(known, fake))


class LaMaObjective(Objective):
    """Pixel, perceptual, adversarial and feature matching term of LaMa, and its R1 penalty.

    With x the prediction, y the truth and h = 1 in the hole: ``total = 10 valid + 30 perceptual + 10 adversarial +
    100 feature_matching``; ``valid = mean((1 - h) |x - y|)`` and ``hole = mean(h |x - y|)`` (weight 0) over all
    elements; ``perceptual = sum mean (psi(x) - psi(y))^2`` over the stages of a trunk; ``adversarial = mean
    softplus(-D(x))``; ``feature_matching`` is the mean over layers of the discriminator of ``mean (D_k(x) -
    D_k(y))^2``.

    ========== ========================== ============
    preset     perceptual                 pixel term
    ========== ========================== ============
    "released" the sum over four stages   10 known
    "paper"    their mean                 none
    ========== ========================== ============

    The trunk is yours: LaMa's is a dilated ResNet50, trained to segment ADE20K, tapped at its four stages
    (``FrozenTrunk(resnet, ["layer1", "layer2", "layer3", "layer4"])``, or other taps as `perceptual_layers`). It
    stays in evaluation mode; in the released code it is put into training mode by mistake. The VGG19 of LaMa's
    ablations has average pooling; ``perceptual_weight=0.03, perceptual_known_only=True`` and its taps give that
    term.

    Images are in [0, 1], mask 1 = hole. The discriminator is shown the raw prediction and returns
    ``DiscriminatorOutput(logits, features)``, the features being its activations before the last convolution. For
    it, known pixels of a prediction count as real: ``mean(softplus(-D(y))) + mean(h softplus(D(x)) + (1 - h)
    softplus(-D(x)))`` with h resized to the logits; the paper multiplies this, too, by 10.
    ``discriminator_penalty`` is ``0.001 |dD(y)/dy|^2``, in every step.

    {arguments}

    Suvorov et al., "Resolution-robust Large Mask Inpainting with Fourier Convolutions", 2022; advimman/lama.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> stages = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 4, 4), torch.nn.Conv2d(8, 8, 2, 2))
        >>> trunk = ik.features.FrozenTrunk(stages, ["0", "1"])
        >>> objective = ik.objectives.LaMaObjective(trunk=trunk, perceptual_layers=["0", "1"])
        >>> pred, target = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32)
        >>> mask = torch.zeros(1, 1, 32, 32)
        >>> mask[..., 8:24, 8:24] = 1
        >>> def discriminator(image):
        ...     return ik.objectives.DiscriminatorOutput(image.mean(1, keepdim=True), [image])
        >>> fake, real = discriminator(pred), discriminator(target)
        >>> objective(pred, target, mask, fake=fake, real=real).total.backward()
    """

    presets = types.MappingProxyType(
        {
            "released": LaMaSettings(),
            "paper": LaMaSettings(valid_weight=0.0, layer_reduction="mean"),
        }
    )
    result = LaMaTerms

    def table(self, s: LaMaSettings) -> dict[str, Term]:
        layers = s.perceptual_layers
        share = 1.0 if s.layer_reduction == "sum" else 1 / len(layers)
        perceptual = KnownPerceptual if s.perceptual_known_only else Perceptual
        return {
            "hole": Pixel(s.hole_weight, "hole"),
            "valid": Pixel(s.valid_weight, "valid"),
            "perceptual": perceptual(s.perceptual_weight, layers, ("raw",), (share,) * len(layers), "l2"),
            "adversarial": _MaskedAdversarial(
                s.adversarial_weight,
                s.gan_mode,
                extra_hole_weight=s.extra_hole_weight,
                mask_resize=s.mask_resize,
            ),
            "feature_matching": FeatureMatching(
                s.feature_matching_weight, "l2", "mean", s.feature_matching_known_only
            ),
        }

    def discriminator_penalty(self, real_logits: Judged, real_images: Tensor) -> Tensor:
        """R1 by the truth (N, C, H, W) that the discriminator's input was made of, with a gradient."""
        logits = logits_of("real_logits", real_logits)
        return r1_penalty(logits, real_images, gamma=2 * self.settings.r1_weight)
