"""Adversarial losses as modules."""

from __future__ import annotations

from torch import Tensor, nn

from ..ops._checks import LayerWeights
from ..ops.adversarial import (
    DiscriminatorLoss,
    Logits,
    check_options,
    discriminator_loss,
    generator_loss,
)
from ..ops.feature_matching import Features, feature_matching_loss


class GANLoss(nn.Module):
    """The adversarial losses of both sides: `generator_loss` when called, `discriminator_loss` by name.

    Args:
        mode: "nonsaturating", "minimax", "hinge", "lsgan", "wgan" or "clamped_bce".
        half: the discriminator's total is the average of its two parts instead of their sum.
        label_smoothing: s makes the label of real logits 1 - s.
        extra_hole_weight: how much more a logit in the hole counts for the generator.

    ``forward(logits, mask=None)`` returns the generator's loss, a scalar; ``discriminator(real_logits, fake_logits,
    mask=None)`` returns ``DiscriminatorLoss(total, real, fake)``. Logits are tensors or sequences of them. Raises
    TypeError and ValueError for unknown or unfit options, at once.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> loss = ik.nn.GANLoss("lsgan", half=True)
        >>> loss(torch.full((2, 1), 3.0))
        tensor(4.)
        >>> loss.discriminator(torch.ones(2, 1), torch.full((2, 1), 2.0)).total
        tensor(2.)
    """

    def __init__(
        self,
        mode: str = "nonsaturating",
        *,
        half: bool = False,
        label_smoothing: float = 0.0,
        extra_hole_weight: float = 0.0,
    ) -> None:
        super().__init__()
        check_options(mode, half, label_smoothing, extra_hole_weight)
        # Not `half`, which is a method of every module.
        self.mode, self.half_total = mode, half
        self.label_smoothing, self.extra_hole_weight = label_smoothing, extra_hole_weight

    def extra_repr(self) -> str:
        return (
            f"{self.mode!r}, half={self.half_total}, label_smoothing={self.label_smoothing}, "
            f"extra_hole_weight={self.extra_hole_weight}"
        )

    def forward(self, logits: Logits, mask: Tensor | None = None) -> Tensor:
        """The generator's loss of its logits, see `generator_loss`."""
        return generator_loss(logits, mode=self.mode, mask=mask, extra_hole_weight=self.extra_hole_weight)

    def discriminator(
        self, real_logits: Logits, fake_logits: Logits, mask: Tensor | None = None
    ) -> DiscriminatorLoss:
        """`discriminator_loss` with the options of this module."""
        return discriminator_loss(
            real_logits,
            fake_logits,
            mode=self.mode,
            half=self.half_total,
            mask=mask,
            label_smoothing=self.label_smoothing,
        )


class FeatureMatchingLoss(nn.Module):
    """`feature_matching_loss` with its options.

    Args:
        weights: one factor for each layer, 1 by default.
        penalty: "l1", "l2" or "charbonnier".
        layer_reduction: "sum" or "mean" over the layers.

    ``forward(fake, real, mask=None)`` takes activations as the function does and returns a scalar.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> loss = ik.nn.FeatureMatchingLoss(layer_reduction="mean")
        >>> real = [torch.ones(2, 4, 8, 8), torch.ones(2, 8, 4, 4)]
        >>> loss([torch.zeros_like(f) for f in real], real)
        tensor(1.)
    """

    def __init__(
        self, *, weights: LayerWeights = None, penalty: str = "l1", layer_reduction: str = "sum"
    ) -> None:
        super().__init__()
        self.weights, self.penalty, self.layer_reduction = weights, penalty, layer_reduction

    def extra_repr(self) -> str:
        return f"weights={self.weights}, penalty={self.penalty!r}, layer_reduction={self.layer_reduction!r}"

    def forward(self, fake: Features, real: Features, mask: Tensor | None = None) -> Tensor:
        """The distance of the activations `fake` from `real`, see `feature_matching_loss`."""
        return feature_matching_loss(
            fake,
            real,
            weights=self.weights,
            penalty=self.penalty,
            layer_reduction=self.layer_reduction,
            mask=mask,
        )
