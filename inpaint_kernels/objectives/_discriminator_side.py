"""What an objective does for the discriminator: its input, its loss, its penalty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..ops import _checks
from ..ops.adversarial import DiscriminatorLoss
from ..ops.composite import composite
from ..ops.stacked_images import serving, stacked_images
from ._terms import Adversarial, Judged, Term, logits_of


class DiscriminatorSide(nn.Module):
    """The part of `Objective` that the discriminator's step calls."""

    settings: Any
    backend: str | None
    _terms: dict[str, Term]

    def discriminator_input(
        self,
        image: Tensor | Sequence[Tensor],
        target: Tensor,
        mask: Tensor | None = None,
        *,
        condition: Tensor | None = None,
    ) -> Any:
        """What the discriminator is shown of a prediction, or of the target itself; a list for several stages.

        The target is recognised as `target` or ``target.detach()``, inside a compiled graph as `target` alone.
        """
        if not isinstance(image, Tensor):
            stages = _checks.as_layers("image", image)
            return [self.discriminator_input(each, target, mask, condition=condition) for each in stages]
        _checks.check_images(image, target, "image")
        if mask is not None:
            mask = _checks.check_mask(mask, image, "image").detach()
        composed = getattr(self.settings, "discriminator_image", "raw") == "composite"
        if composed and not _checks.is_same(image, target):
            if mask is None:
                raise ValueError("mask is missing: the discriminator is shown composites")
            known = self._composited(target.detach(), mask)
            image = composite(
                image, known, mask, mask_is=self.settings.mask_is, backend=serving(self.backend)
            )
        return self.shown(image, self._known(mask), condition)

    def shown(self, image: Tensor, known: Tensor | None, condition: Tensor | None) -> Tensor:
        """The image with what else a method's discriminator reads; the mask `known` is 1 where a pixel is known."""
        if condition is not None:
            raise ValueError(f"condition: the discriminator of {type(self).__name__} reads none")
        return image

    def discriminator_loss(
        self, *, real: Judged, fake: Judged, mask: Tensor | None = None
    ) -> DiscriminatorLoss:
        """(total, real, fake) from what the discriminator returns for the truth and for a detached prediction."""
        term = next((t for t in self._terms.values() if isinstance(t, Adversarial)), None)
        if term is None:
            raise ValueError(
                f"{type(self).__name__} has no adversarial term with these settings, so no discriminator to train"
            )
        return term.discriminator(logits_of("real", real), logits_of("fake", fake), self._known(mask))

    def discriminator_penalty(self, real_logits: Judged, real_images: Tensor) -> Tensor:
        """The gradient penalty of the discriminator, for every ``settings.penalty_interval``-th of its steps."""
        raise ValueError(f"{type(self).__name__} has no gradient penalty (settings.penalty_interval is 0)")

    def _known(self, mask: Tensor | None) -> Tensor | None:
        """The mask with 1 = known."""
        if mask is None:
            return None
        mask = _checks.binary(mask).detach()
        if self.settings.mask_is == "valid":
            return mask
        return 1 - mask if mask.is_floating_point() else ~mask

    def _composited(self, target: Tensor, mask: Tensor | None) -> Tensor:
        """What composites take their known pixels from."""
        # Masking twice is masking once where a mask has no fractions.
        if mask is None or self.settings.composite_from == "target" or not mask.is_floating_point():
            return target
        flipped = "valid" if self.settings.mask_is == "hole" else "hole"
        return stacked_images(
            target, target, mask, parts=("hole_target",), mask_is=flipped, backend=serving(self.backend)
        )
