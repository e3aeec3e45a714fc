"""Perceptual and style losses on a frozen trunk, plain or streamed."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ..features.trunk import FrozenTrunk, check_trunk
from ..ops._checks import LayerWeights
from ..ops._named_tuples import serializable
from ..ops.feature_distance import feature_distance
from ..ops.style import style_loss
from ._streaming import Term, check_chunk, check_learned, trunk_terms


@serializable
class PerceptualStyle(NamedTuple):
    """Terms of `PerceptualStyleLoss`: the weighted total and both raw terms, scalars on the images' device."""

    total: Tensor
    perceptual: Tensor
    style: Tensor


def _on_some_taps(places: list[int], term: Term, input: list[Tensor], target: list[Tensor]) -> Tensor:
    return term([input[i] for i in places], [target[i] for i in places])


class _TrunkLoss(nn.Module):
    """A loss of one term on all taps of a trunk."""

    def __init__(self, trunk: FrozenTrunk, weights: LayerWeights, chunk: int | None) -> None:
        super().__init__()
        self.trunk, self.weights, self.chunk = check_trunk(trunk), weights, check_chunk(chunk)

    def term(self, input: list[Tensor], target: list[Tensor]) -> Tensor:
        """The loss on features."""
        raise NotImplementedError

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        if self.chunk is not None:
            check_learned(weights=self.weights)
        return trunk_terms(self.trunk, [self.term], [1.0], pred, target, self.chunk)[0]


class PerceptualLoss(_TrunkLoss):
    """Distance of two images' features in a frozen trunk: `feature_distance` over its taps.

    Args:
        trunk: a `FrozenTrunk`, for example ``ik.features.vgg16()``.
        weights: one factor for each tap, 1 by default; a tensor may require a gradient, unless the loss is streamed.
        penalty: "l1", "l2" or "charbonnier".
        layer_reduction: "sum" or "mean" over the taps.
        chunk: None keeps the trunk's activations for the backward, as any network does. A number streams: trunk
            forward and backward run for so many samples at a time inside the forward, and only the gradient of the
            images is kept, in float32 for half images. Value and gradient are the same, at any upstream scale; in a
            trunk that computes in float16 the gradients are scaled inside, so that they survive without a GradScaler
            and with one. A number of at least N runs the passes of the plain path. A second derivative is refused.

    ``forward(pred, target)`` takes images (k N, C, H, W) and (N, C, H, W) and returns a scalar; k > 1 compares
    several predictions, in the order of torch.cat, with one target, and takes the mean. Differentiable in `pred`, and
    without streaming in `target`. Raises TypeError for what is no trunk, ValueError for shapes that disagree and for
    images that are too small for the trunk. Under ``torch.compile`` a streamed loss breaks the graph.

    Johnson et al., "Perceptual Losses for Real-Time Style Transfer and Super-Resolution", 2016.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> loss = ik.nn.PerceptualLoss(ik.features.vgg16(weights=None), chunk=1)
        >>> image = torch.rand(2, 3, 32, 32)
        >>> loss(image, image)
        tensor(0.)
    """

    def __init__(
        self,
        trunk: FrozenTrunk,
        *,
        weights: LayerWeights = None,
        penalty: str = "l1",
        layer_reduction: str = "sum",
        chunk: int | None = None,
    ) -> None:
        super().__init__(trunk, weights, chunk)
        self.penalty, self.layer_reduction = penalty, layer_reduction

    def term(self, input: list[Tensor], target: list[Tensor]) -> Tensor:
        return feature_distance(
            input, target, weights=self.weights, penalty=self.penalty, layer_reduction=self.layer_reduction
        )


class StyleLoss(_TrunkLoss):
    """Distance of two images' Gram matrices in a frozen trunk: `style_loss` over its taps.

    Args:
        trunk: a `FrozenTrunk`.
        weights: one factor for each tap, 1 by default; a tensor may require a gradient, unless the loss is streamed.
        penalty: "l1", "l2" or None, as `style_loss`.
        normalize: "chw", "hw", "none" or "gatys", as `style_loss`.
        chunk: None, or the number of samples streamed at a time, as `PerceptualLoss`.

    ``forward(pred, target)`` as `PerceptualLoss`.

    Gatys et al., "Image Style Transfer Using Convolutional Neural Networks", 2016; Liu et al., 2018.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> loss = ik.nn.StyleLoss(ik.features.vgg16(weights=None))
        >>> image = torch.rand(2, 3, 32, 32)
        >>> loss(image, image)
        tensor(0.)
    """

    def __init__(
        self,
        trunk: FrozenTrunk,
        *,
        weights: LayerWeights = None,
        penalty: str | None = None,
        normalize: str = "chw",
        chunk: int | None = None,
    ) -> None:
        super().__init__(trunk, weights, chunk)
        self.penalty, self.normalize = penalty, normalize

    def term(self, input: list[Tensor], target: list[Tensor]) -> Tensor:
        return style_loss(input, target, weights=self.weights, penalty=self.penalty, normalize=self.normalize)


class PerceptualStyleLoss(nn.Module):
    """Perceptual and style loss from one pass of a shared trunk.

    Args:
        trunk: a `FrozenTrunk` that taps the layers of both terms.
        perceptual_taps, style_taps: which of the trunk's taps each term reads, by name as in ``trunk.taps`` or by
            place; all of them by default.
        perceptual_weight, style_weight: factors of the two terms in the total. Those that partial convolution
            publishes, 0.05 and 120, are for the sum of the terms of raw and composite images. Of k predictions
            stacked in `pred` a term is the mean, so they are k times as large here.
        perceptual_weights, style_weights: factors of the layers within each term.
        penalty, layer_reduction: of the perceptual term, as `PerceptualLoss`.
        normalize: of the style term, as `StyleLoss`.
        chunk: None, or the number of samples streamed at a time, as `PerceptualLoss`; then only the total is
            differentiable.

    ``forward(pred, target)`` returns ``PerceptualStyle(total, perceptual, style)``; images as `PerceptualLoss`.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> trunk = ik.features.vgg16(weights=None)
        >>> loss = ik.nn.PerceptualStyleLoss(trunk, perceptual_weight=2 * 0.05, style_weight=2 * 120)
        >>> raw, target = torch.rand(2, 3, 32, 32, requires_grad=True), torch.rand(2, 3, 32, 32)
        >>> mask = (torch.rand(2, 1, 32, 32) < 0.7).float()
        >>> pred = torch.cat([raw, ik.composite(raw, target, mask)])  # k = 2
        >>> loss(pred, target).total.backward()
    """

    def __init__(
        self,
        trunk: FrozenTrunk,
        *,
        perceptual_taps: Sequence[str | int] | None = None,
        style_taps: Sequence[str | int] | None = None,
        perceptual_weight: float = 1.0,
        style_weight: float = 1.0,
        perceptual_weights: LayerWeights = None,
        style_weights: LayerWeights = None,
        penalty: str = "l1",
        layer_reduction: str = "sum",
        normalize: str = "chw",
        chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.trunk, self.chunk = check_trunk(trunk), check_chunk(chunk)
        self.factors = [perceptual_weight, style_weight]
        self.layer_weights = {"perceptual_weights": perceptual_weights, "style_weights": style_weights}
        perceptual = PerceptualLoss(
            trunk, weights=perceptual_weights, penalty=penalty, layer_reduction=layer_reduction
        )
        style = StyleLoss(trunk, weights=style_weights, normalize=normalize)
        self.terms: list[Term] = [
            functools.partial(
                _on_some_taps, _places("perceptual_taps", trunk, perceptual_taps), perceptual.term
            ),
            functools.partial(_on_some_taps, _places("style_taps", trunk, style_taps), style.term),
        ]

    def forward(self, pred: Tensor, target: Tensor) -> PerceptualStyle:
        if self.chunk is not None:
            check_learned(
                perceptual_weight=self.factors[0], style_weight=self.factors[1], **self.layer_weights
            )
        return PerceptualStyle(*trunk_terms(self.trunk, self.terms, self.factors, pred, target, self.chunk))


def _places(name: str, trunk: FrozenTrunk, taps: Sequence[str | int] | None) -> list[int]:
    if taps is None:
        return list(range(len(trunk.taps)))
    known = trunk.names
    places = [known.index(tap) if tap in known else tap for tap in taps]
    wrong = [p for p in places if not isinstance(p, int) or not 0 <= p < len(known)]
    if wrong or not places:
        raise ValueError(f"{name}: {wrong or 'empty'}; this trunk taps {', '.join(known)}")
    return [p for p in places if isinstance(p, int)]
