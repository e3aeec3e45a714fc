"""The objectives of DeepFill v1 and v2, as mmagic trains them."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..nn._streaming import weighted_sum
from ..ops import _checks
from ..ops._named_tuples import serializable
from ..ops.adversarial import DiscriminatorLoss, discriminator_loss
from ..ops.penalties import gradient_penalty
from ._objective import Objective
from ._settings import AdversarialSettings
from ._terms import Adversarial, Judged, Pixel, Term, logits_of


@serializable
class DeepFillTerms(NamedTuple):
    """Terms of `DeepFillObjective`: the weighted total and the raw terms, scalars on the images' device."""

    total: Tensor
    hole: Tensor
    valid: Tensor
    adversarial: Tensor


@dataclass(frozen=True, kw_only=True)
class DeepFillSettings(AdversarialSettings):
    """Settings of `DeepFillObjective`, beside those of `AdversarialSettings`.

    Args:
        normalize: denominators of hole and valid, as `hole_valid_loss`.
        every_stage: hole and valid are summed over both stages, not of the last one alone.
        show_mask: the discriminator reads the mask (1 = hole) behind the image.
        hole_weight, valid_weight, adversarial_weight: factors of the terms.
        drift_weight: of half the squared means of the discriminator's logits, in its loss.
        gradient_penalty_weight: factor of ``gradient_penalty``.
    """

    mask_is: str = "hole"
    composite_from: str = "masked_target"
    discriminator_image: str = "composite"
    normalize: str = "mask"
    every_stage: bool = True
    show_mask: bool = True
    hole_weight: float = 1.0
    valid_weight: float = 1.0
    gan_mode: str = "hinge"
    adversarial_weight: float = 0.1
    drift_weight: float = 0.0
    gradient_penalty_weight: float = 0.0


class DeepFillObjective(Objective):
    """Hole, valid and adversarial term of the two-stage networks DeepFill v1 and v2, as mmagic trains them.

    `pred` is (stage 1, stage 2). ``total = hole + valid + w adversarial`` with x a stage's prediction, y the truth
    and h = 1 in the hole: ``hole = sum h |x - y| / sum h`` and ``valid`` the same over known pixels, both summed
    over the stages; ``adversarial = -mean D(c)`` with c the composite of stage 2.

    ====== ====== =============================================== ===================================================
    preset w      discriminators                                  their loss
    ====== ====== =============================================== ===================================================
    "v1"   0.0001 a global and a local one, losses summed         ``mean D(c) - mean D(y)``, 0.001 drift, and in every
                                                                  step ``gradient_penalty`` (WGAN-GP, 10)
    "v2"   0.1    one, which reads the mask (1 = hole), too       hinge: ``relu(1 - D(y)) + relu(1 + D(c))``
    ====== ====== =============================================== ===================================================

    Drift is half the square of each of the four means. The norm of the gradient penalty is taken over the channels
    of each pixel; the global critic's is weighed with the hole: ``gradient_penalty(discriminator, real, fake,
    mask)``. The local critic sees patches around the hole, which are yours to cut, and its penalty takes no mask.
    v1 trains its critics for five steps (places) or two (faces) to one of the generator.

    Images are in [-1, 1], mask 1 = hole. The composite is made of the masked image, which matters for masks with
    fractions: ``v (v y) + h x``. There is no trunk.

    {arguments}

    Yu et al., "Generative Image Inpainting with Contextual Attention", 2018, and "Free-Form Image Inpainting with
    Gated Convolution", 2019; open-mmlab/mmagic.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> objective = ik.objectives.DeepFillObjective("v2")
        >>> first, second = torch.rand(2, 1, 3, 32, 32, requires_grad=True)
        >>> target, mask = torch.rand(1, 3, 32, 32), torch.ones(1, 1, 32, 32)
        >>> discriminator = torch.nn.Conv2d(4, 1, 5, 2)
        >>> fake = discriminator(objective.discriminator_input((first, second), target, mask))
        >>> objective((first, second), target, mask, fake=fake).total.backward()
    """

    staged = True
    presets = types.MappingProxyType(
        {
            "v2": DeepFillSettings(),
            "v1": DeepFillSettings(
                show_mask=False,
                gan_mode="wgan",
                adversarial_weight=1e-4,
                drift_weight=0.001,
                gradient_penalty_weight=10.0,
                penalty_interval=1,
            ),
        }
    )
    result = DeepFillTerms

    def table(self, s: DeepFillSettings) -> dict[str, Term]:
        return {
            "hole": Pixel(s.hole_weight, "hole", s.normalize),
            "valid": Pixel(s.valid_weight, "valid", s.normalize),
            "adversarial": Adversarial(s.adversarial_weight, s.gan_mode, heads="sum"),
        }

    def discriminator_input(
        self,
        image: Tensor | Sequence[Tensor],
        target: Tensor,
        mask: Tensor | None = None,
        *,
        condition: Tensor | None = None,
    ) -> Any:
        last = image if isinstance(image, Tensor) else image[-1]
        return super().discriminator_input(last, target, mask, condition=condition)

    def shown(self, image: Tensor, known: Tensor | None, condition: Tensor | None) -> Tensor:
        image = super().shown(image, known, condition)
        if not self.settings.show_mask:
            return image
        if known is None:
            raise ValueError("mask is missing: the discriminator reads it")
        n, _, h, w = image.shape
        return torch.cat([image, (1 - _checks.check_plane(known).to(image.dtype)).expand(n, 1, h, w)], 1)

    def discriminator_loss(
        self, *, real: Judged, fake: Judged, mask: Tensor | None = None
    ) -> DiscriminatorLoss:
        loss = super().discriminator_loss(real=real, fake=fake, mask=mask)
        if not self.settings.drift_weight:
            return loss
        drift = loss.total.new_zeros(())
        for name, logits in (("real", logits_of("real", real)), ("fake", logits_of("fake", fake))):
            for head in [logits] if isinstance(logits, Tensor) else logits:
                one = getattr(discriminator_loss(head, head, mode=self.settings.gan_mode), name)
                drift = drift + one.square() / 2
        return loss._replace(total=weighted_sum([loss.total, drift], [1.0, self.settings.drift_weight]))

    def gradient_penalty(
        self,
        discriminator: Callable[[Tensor], Any],
        real: Tensor,
        fake: Tensor,
        mask: Tensor | None = None,
        *,
        alpha: float | Tensor | None = None,
    ) -> Tensor:
        """Of one discriminator at random mixes of real and fake images, as `ik.gradient_penalty`; `mask` (of the
        settings' polarity) weighs the gradient with the hole."""
        known = self._known(mask)
        hole = None if known is None else 1 - known.to(real.dtype)
        weight = self.settings.gradient_penalty_weight
        return gradient_penalty(
            discriminator, real, fake, mask=hole, norm="pixel", weight=weight, alpha=alpha
        )

    def discriminator_penalty(self, real_logits: Judged, real_images: Tensor) -> Tensor:
        raise ValueError("DeepFill's penalty is taken at mixed images: use gradient_penalty")
