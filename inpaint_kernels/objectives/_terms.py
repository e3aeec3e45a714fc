"""The terms that objectives are tables of. A term knows its weight, what it reads and its formula, nothing else."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..features.lpips_heads import LPIPSHeads
from ..ops import _checks
from ..ops._named_tuples import serializable
from ..ops.adversarial import DiscriminatorLoss, as_entries, discriminator_loss, generator_loss
from ..ops.feature_distance import feature_distance
from ..ops.feature_matching import feature_matching_loss
from ..ops.gram import gram_matrix
from ..ops.lpips import lpips_distance
from ..ops.mask_operators import resize_mask
from ..ops.stacked_images import serving
from ..ops.style import style_loss
from ..reference._common import accumulate_dtype

# What a part of the predictions is compared with.
TRUTH_OF = {"raw": "target", "composite": "target", "hole_raw": "hole_target"}


@serializable
class DiscriminatorOutput(NamedTuple):
    """What a discriminator returns for an objective that matches its features.

    `logits` is a tensor or a list of them (several heads, scales or discriminators), `features` the maps to be
    matched, a list or, for several discriminators, a list of lists.
    """

    logits: Any
    features: Any


Maps = list[Tensor]  # of features, one tensor for each layer
Judged = Tensor | Sequence[Tensor] | DiscriminatorOutput


def _given(name: str, output: Judged | None) -> Judged:
    if output is None:
        raise ValueError(f"{name} is missing: pass what the discriminator returns as {name}=")
    return output


def logits_of(name: str, output: Judged | None) -> Any:
    """The logits of what a discriminator returned, which an argument called `name` holds."""
    output = _given(name, output)
    logits = output.logits if isinstance(output, DiscriminatorOutput) else output
    as_entries(name, logits)  # whose errors call them as the caller does
    return logits


def features_of(name: str, output: Judged | None) -> Any:
    if output is None:
        raise ValueError(f"{name} is missing: pass what the discriminator returns as {name}=")
    if not isinstance(output, DiscriminatorOutput):
        raise TypeError(
            f"{name} must be a DiscriminatorOutput(logits, features), whose features are matched, "
            f"got {type(output).__name__}"
        )
    return output.features


@dataclass(frozen=True)
class Term:
    """One row of an objective's table; without `weight` it is not computed."""

    weight: float


@dataclass(frozen=True)
class Pixel(Term):
    """Mean absolute error of the raw prediction in a region: "image", "hole" or "valid".

    `normalize` as `hole_valid_loss`. `by_hole_share`: divided by the share of the hole in the batch, 0 without a
    hole.
    """

    region: str = "image"
    normalize: str = "image"
    by_hole_share: bool = False


@dataclass(frozen=True)
class TotalVariation(Term):
    """Total variation of the "composite" or of the "raw" prediction, as `total_variation_loss`."""

    image: str = "composite"
    region: str = "dilated_hole"
    normalize: str = "image"


@dataclass(frozen=True)
class FeatureTerm(Term):
    """A distance of feature maps: the sum over `layers` and over the `images` compared with their truths."""

    layers: tuple[str, ...]
    images: tuple[str, ...]
    layer_weights: tuple[float, ...] | None = None

    # Whether the distance is weighed with the known mask, and whether it is summed over the batch.
    known_only = False
    batch_sum = False

    def __post_init__(self) -> None:
        if len({TRUTH_OF[image] for image in self.images}) > 1:
            raise ValueError(
                f"predictions: {', '.join(self.images)} are compared with different images; "
                "give them terms of their own"
            )
        if self.layer_weights is not None and len(self.layer_weights) != len(self.layers):
            raise ValueError(
                f"layer_weights has {len(self.layer_weights)} entries for the {len(self.layers)} layers "
                f"{', '.join(self.layers)}"
            )

    @property
    def factors(self) -> list[float]:
        """Of the layers; the ops take the mean over predictions, of which a term is the sum."""
        return [weight * len(self.images) for weight in self.layer_weights or (1.0,) * len(self.layers)]

    def prepared(self, maps: Maps, backend: str | None) -> Maps:
        """What is worth keeping of the maps of a target that is used again."""
        return maps

    def distance(self, maps: Maps, target: Maps, known: Tensor | None, backend: str | None) -> Tensor:
        """Of the predictions' maps from those of the target, prepared or not, a mean over samples.

        `known` is the mask for those that are `known_only`.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Perceptual(FeatureTerm):
    """Mean absolute difference of the maps, or with `penalty` "l2" the mean square."""

    penalty: str = "l1"

    def distance(self, maps: Maps, target: Maps, known: Tensor | None, backend: str | None) -> Tensor:
        return feature_distance(maps, target, weights=self.factors, penalty=self.penalty, backend=backend)


@dataclass(frozen=True)
class KnownPerceptual(Perceptual):
    """That of known pixels, by a mask resized to each layer, over all elements of a sample, summed over samples."""

    known_only = True
    batch_sum = True

    def distance(self, maps: Maps, target: Maps, known: Tensor | None, backend: str | None) -> Tensor:
        assert known is not None
        known = _checks.check_plane(known).to(accumulate_dtype(known))
        sizes = [truth.shape[-2:] for truth in target]
        samples = target[0].shape[0]
        masks = [resize_mask(known, size, "bilinear").expand(samples, 1, *size) for size in sizes]
        return feature_distance(
            maps,
            target,
            weights=self.factors,
            penalty=self.penalty,
            mask=masks,
            normalize="image",
            backend=backend,
        )


@dataclass(frozen=True)
class Style(FeatureTerm):
    """Mean absolute difference of the Gram matrices, which are divided by C H W."""

    def prepared(self, maps: Maps, backend: str | None) -> Maps:
        return [gram_matrix(features, backend=backend) for features in maps]

    def distance(self, maps: Maps, target: Maps, known: Tensor | None, backend: str | None) -> Tensor:
        is_gram = target[0].ndim == 3
        return style_loss(maps, target, weights=self.factors, target_is_gram=is_gram, backend=backend)


@dataclass(frozen=True)
class LPIPS(FeatureTerm):
    """Distance of unit feature vectors, channel by channel with the weights of `heads`."""

    heads: LPIPSHeads = dataclasses.field(default_factory=lambda: LPIPSHeads("alex"))

    def distance(self, maps: Maps, target: Maps, known: Tensor | None, backend: str | None) -> Tensor:
        self.heads.check([m.shape[1] for m in maps])
        distance = lpips_distance(maps, target, self.heads.values, backend=serving(backend))
        return distance if len(self.images) == 1 else distance * len(self.images)


@dataclass(frozen=True)
class Adversarial(Term):
    """The generator's loss on what the discriminator says of a fake, and the discriminator's own loss.

    Of several logits both are the mean, with `heads` "sum" the sum. `half` averages the discriminator's two sides.
    """

    mode: str
    half: bool = False
    heads: str = "mean"

    @property
    def reads_known(self) -> bool:
        """Whether the generator's loss depends on the mask."""
        return False

    def generator(self, fake: Any, known: Tensor | None) -> Tensor:
        """Of the logits of a fake; the mask `known` is for those that read it."""
        if self.heads == "sum" and not isinstance(fake, Tensor):
            return functools.reduce(torch.add, [generator_loss(logits, mode=self.mode) for logits in fake])
        return generator_loss(fake, mode=self.mode)

    def discriminator(self, real: Any, fake: Any, known: Tensor | None) -> DiscriminatorLoss:
        loss = discriminator_loss(real, fake, mode=self.mode, half=self.half)
        if self.heads == "sum" and not isinstance(real, Tensor):
            return DiscriminatorLoss(*(value * len(real) for value in loss))
        return loss


@dataclass(frozen=True)
class FeatureMatching(Term):
    """Distance of the discriminator's features of a fake from those of the truth."""

    penalty: str = "l1"
    layer_reduction: str = "sum"
    reads_known: bool = False

    def matched(self, fake: Any, real: Any, known: Tensor | None, backend: str | None) -> Tensor:
        """Of lists of features, which the mask `known` weighs; None weighs all of them 1."""
        return feature_matching_loss(
            fake,
            real,
            penalty=self.penalty,
            layer_reduction=self.layer_reduction,
            mask=known,
            backend=backend,
        )
