"""The objective of CoordFill."""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..features.lpips_heads import LPIPSHeads
from ..features.torchvision_nets import alexnet
from ..ops._named_tuples import serializable
from ._objective import Objective
from ._settings import AdversarialSettings
from ._terms import LPIPS, Adversarial, FeatureMatching, Term


@serializable
class CoordFillTerms(NamedTuple):
    """Terms of `CoordFillObjective`: the weighted total and the raw terms, scalars on the images' device."""

    total: Tensor
    lpips: Tensor
    adversarial: Tensor
    feature_matching: Tensor


@dataclass(frozen=True, kw_only=True)
class CoordFillSettings(AdversarialSettings):
    """Settings of `CoordFillObjective`, beside those of `AdversarialSettings`.

    Args:
        lpips_layers: the trunk's taps that LPIPS reads.
        lpips_weight, adversarial_weight, feature_matching_weight: factors of the terms.
    """

    preprocess: str = "lpips"
    gan_mode: str = "clamped_bce"
    discriminator_image: str = "composite"
    lpips_layers: tuple[str, ...] = ("relu1", "relu2", "relu3", "relu4", "relu5")
    lpips_weight: float = 10.0
    feature_matching_weight: float = 100.0


class CoordFillObjective(Objective):
    """LPIPS, adversarial and feature matching term of CoordFill.

    ``total = 10 lpips + adversarial + 100 feature_matching`` with c the composite and y the truth: `lpips` is that
    of c and y by an AlexNet with the heads of version 0.1; ``adversarial = mean -log D(c)``; ``feature_matching =
    sum mean |D_k(c) - D_k(y)|`` over the four activations of the discriminator before its last convolution. There
    is no pixel term. A feature vector of zeros has gradient 0 here, where the released code's is NaN.

    Images are in [-1, 1], mask 1 = known. The discriminator is shown composites and returns
    ``DiscriminatorOutput(logits, features)``; its loss is the sum of both log-losses, not their average. They are
    taken of logits, with the clamps that PyTorch gives a log-loss of a sigmoid ("clamped_bce");
    ``gan_mode="nonsaturating"`` is the same formula without the clamps.

    `heads`: "v0.1", the weights of LPIPS, or for another trunk a sequence of tensors (C,), one for each layer.

    {arguments}

    Liu et al., "CoordFill: Efficient High-Resolution Image Inpainting via Parameterized Coordinate Querying", 2023;
    NiFangBaAGe/CoordFill; Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric",
    2018.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> objective = ik.objectives.CoordFillObjective(weights=None)  # a random AlexNet
        >>> pred, target = torch.rand(1, 3, 64, 64, requires_grad=True), torch.rand(1, 3, 64, 64)
        >>> mask = torch.ones(1, 1, 64, 64)
        >>> mask[..., 8:24, 8:24] = 0
        >>> def discriminator(image):
        ...     return ik.objectives.DiscriminatorOutput(image.mean((2, 3)), [image])
        >>> shown = [objective.discriminator_input(image, target, mask) for image in (pred, target)]
        >>> fake, real = map(discriminator, shown)
        >>> objective(pred, target, mask, fake=fake, real=real).total.backward()
    """

    presets = types.MappingProxyType({"released": CoordFillSettings()})
    result = CoordFillTerms
    net = staticmethod(alexnet)

    def __init__(
        self, preset: str | None = None, *, heads: str | Sequence[Tensor] = "v0.1", **options: Any
    ) -> None:
        self._heads = LPIPSHeads("alex", heads)  # read by `table`
        super().__init__(preset, **options)

    def table(self, s: CoordFillSettings) -> dict[str, Term]:
        if len(self._heads.values) != len(s.lpips_layers):
            raise ValueError(
                f"heads has weights for {len(self._heads.values)} layers, lpips_layers names {len(s.lpips_layers)}"
            )
        return {
            "lpips": LPIPS(s.lpips_weight, s.lpips_layers, ("composite",), heads=self._heads),
            "adversarial": Adversarial(s.adversarial_weight, s.gan_mode),
            "feature_matching": FeatureMatching(s.feature_matching_weight),
        }
