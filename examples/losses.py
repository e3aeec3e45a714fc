"""The training objective, twice: with the fused losses and with the eager formulas they replace.

The only place that builds losses; a further objective is one more function here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from pictures import InputError
from torch import Tensor

if TYPE_CHECKING:
    from inpaint_kernels.features import FrozenTrunk

# Of Liu et al. (2018). The pixel objective has the first two, and takes its perceptual and style weights as options.
HOLE_WEIGHT, VALID_WEIGHT = 6.0, 1.0
TV_WEIGHT, PERCEPTUAL_WEIGHT, STYLE_WEIGHT = 0.1, 0.05, 120.0


class Terms(NamedTuple):
    """Scalars on the device: the weighted ``total`` and its unweighted terms, None for those left out."""

    total: Tensor
    hole: Tensor
    valid: Tensor
    perceptual: Tensor | None = None
    style: Tensor | None = None
    tv: Tensor | None = None


@dataclass(frozen=True)
class FeatureTerms:
    """Weights of the terms on a trunk's features, 0 for none, and how many samples are streamed at a time.

    ``trunk`` takes pictures in [0, 1]; the one of "pconv" takes them normalised, which its objective does itself.
    """

    trunk: FrozenTrunk
    perceptual: float = PERCEPTUAL_WEIGHT
    style: float = STYLE_WEIGHT
    chunk: int | None = None


Objective = Callable[[Tensor, Tensor, Tensor], Terms]


def weighted(hole: Tensor, valid: Tensor) -> Terms:
    return Terms(HOLE_WEIGHT * hole + VALID_WEIGHT * valid, hole, valid)


def make_objective(
    kind: str,
    name: str = "pixel",
    *,
    normalize: str = "image",
    backend: str | None = None,
    group: dist.ProcessGroup | None = None,
    features: FeatureTerms | None = None,
) -> Objective:
    """A function of (pred [N, 3, H, W], target, mask [N, 1, H, W] with 1 = known).

    Args:
        kind: "fused" or "eager".
        name: "pixel", errors in the hole and elsewhere, with perceptual and style terms if there are ``features``;
            "pconv", the published objective of partial convolution, of which ``features`` has the trunk.
        normalize: "image" divides both terms by the number of elements of ``pred``, "mask" each by the
            size of its region, over all processes of ``group``; for "pixel".
        backend: which implementation of the fused losses, as ``fused_backend`` says; None chooses by device.
        group: the DDP process group, None for a single process.
        features: perceptual and style terms of the output and of the composite, None for none.
    """
    if name == "pconv":
        assert features is not None
        # All of its terms are means over whole images, so that DDP's average of equal batches is the global one.
        return _eager_partial_conv(features) if kind == "eager" else _fused_partial_conv(features, backend)
    pixels = _eager(normalize, group) if kind == "eager" else _fused(normalize, backend, group)
    if features is None:
        return pixels
    compare = _eager_features(features) if kind == "eager" else _fused_features(features)

    def objective(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return _with_features(pixels, compare, pred, _composite(pred, target, mask), target, mask)

    return objective


def _fused_partial_conv(features: FeatureTerms, backend: str | None) -> Objective:
    import inpaint_kernels as ik

    complete = ik.objectives.PartialConvObjective(
        "paper", trunk=features.trunk, chunk=features.chunk, backend=backend
    )

    def objective(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return Terms(**complete(pred, target, mask)._asdict())

    return objective


def _eager_partial_conv(features: FeatureTerms) -> Objective:
    """The same as training scripts write it."""
    from inpaint_kernels.features import FrozenTrunk

    trunk = features.trunk
    pixels = _eager("image", None)
    compare = _eager_features(replace(features, trunk=FrozenTrunk(trunk.features, trunk.taps, "imagenet")))

    def objective(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        composite = _composite(pred, target, mask)
        terms = _with_features(pixels, compare, pred, composite, target, mask)
        tv = _variation_around(composite, 1 - mask)
        return terms._replace(total=terms.total + TV_WEIGHT * tv, tv=tv)

    return objective


def _composite(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return mask * target + (1 - mask) * pred


def _variation_around(image: Tensor, hole: Tensor) -> Tensor:
    """Summed differences of neighbours in the hole dilated by one pixel, as a share of all elements."""
    region = F.max_pool2d(hole, 3, stride=1, padding=1)
    across = region[:, :, :, 1:] * region[:, :, :, :-1] * (image[:, :, :, 1:] - image[:, :, :, :-1]).abs()
    down = region[:, :, 1:] * region[:, :, :-1] * (image[:, :, 1:] - image[:, :, :-1]).abs()
    return (across.sum() + down.sum()) / image.numel()


# (output, composite, truth) -> weighted sum, perceptual term, style term
Comparison = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None, Tensor | None]]


def _with_features(
    pixels: Objective, compare: Comparison, pred: Tensor, composite: Tensor, target: Tensor, mask: Tensor
) -> Terms:
    terms = pixels(pred, target, mask)
    weighted_sum, perceptual, style = compare(pred.to(composite.dtype), composite, target)
    return terms._replace(total=terms.total + weighted_sum, perceptual=perceptual, style=style)


def _fused_features(features: FeatureTerms) -> Comparison:
    import inpaint_kernels as ik

    trunk, chunk = features.trunk, features.chunk
    if features.perceptual and features.style:
        both = ik.nn.PerceptualStyleLoss(
            trunk, perceptual_weight=features.perceptual, style_weight=features.style, chunk=chunk
        )

        # A mean over both predictions, where the published terms are the sum of two means.
        def compare(pred: Tensor, composite: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total, perceptual, style = both(torch.cat([pred, composite]), target)
            return 2 * total, 2 * perceptual, 2 * style

        return compare
    is_style = bool(features.style)
    weight = features.style if is_style else features.perceptual
    one = ik.nn.StyleLoss(trunk, chunk=chunk) if is_style else ik.nn.PerceptualLoss(trunk, chunk=chunk)

    def compare_one(
        pred: Tensor, composite: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        term = 2 * one(torch.cat([pred, composite]), target)
        return weight * term, None if is_style else term, term if is_style else None

    return compare_one


def _gram(features: Tensor) -> Tensor:
    n, c, h, w = features.shape
    flat = features.view(n, c, h * w)
    return torch.bmm(flat, flat.transpose(1, 2)) / (c * h * w)


def _eager_features(features: FeatureTerms) -> Comparison:
    """The published loops over predictions and layers."""
    trunk = features.trunk

    def summed(term: Callable[[Tensor, Tensor], Tensor], maps: list[list[Tensor]]) -> Tensor:
        *predictions, truth = maps
        values = [term(x, y) for found in predictions for x, y in zip(found, truth, strict=True)]
        return torch.stack(values).sum()

    def compare(
        pred: Tensor, composite: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        maps = [trunk(pred), trunk(composite), trunk(target)]
        perceptual = summed(F.l1_loss, maps) if features.perceptual else None
        style = summed(lambda x, y: F.l1_loss(_gram(x), _gram(y)), maps) if features.style else None
        parts = [(features.perceptual, perceptual), (features.style, style)]
        weighted_terms = [weight * term for weight, term in parts if term is not None]
        return torch.stack(weighted_terms).sum(), perceptual, style

    return compare


def _fused(normalize: str, backend: str | None, group: dist.ProcessGroup | None) -> Objective:
    import inpaint_kernels as ik

    if group is None or normalize == "image":

        def objective(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
            return weighted(*ik.hole_valid_loss(pred, target, mask, normalize=normalize, backend=backend))

    else:
        # Region means over all processes need the summed masks of all processes.
        def objective(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
            hole = ik.masked_l1_loss(pred, target, 1 - mask, backend=backend, process_group=group)
            valid = ik.masked_l1_loss(pred, target, mask, backend=backend, process_group=group)
            return weighted(hole, valid)

    return objective


def _eager(normalize: str, group: dist.ProcessGroup | None) -> Objective:
    """What a training script without the package writes."""

    def by_image(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        error = (pred - target).abs()
        return weighted(((1 - mask) * error).mean(), (mask * error).mean())

    def by_mask(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        error = (pred - target).abs()
        terms = []
        for region in (1 - mask, mask):
            count, processes = region.sum() * pred.shape[1], 1
            if group is not None:
                # DDP averages gradients, so a share of the global sum is multiplied by the number of shares.
                dist.all_reduce(count, group=group)
                processes = dist.get_world_size(group)
            terms.append((region * error).sum() * processes / count.clamp(min=1))
        return weighted(*terms)

    return by_image if normalize == "image" else by_mask


def fused_backend(
    device: torch.device, asked: str | None, name: str = "pixel", features: FeatureTerms | None = None
) -> str:
    """The implementation the fused losses of an objective run on: the one asked for, else the first that can."""
    asked = asked or os.environ.get("INPAINT_KERNELS_BACKEND") or None
    image, reason = torch.zeros(1, 3, 8, 8, device=device), ""
    for backend in (asked,) if asked else ("cuda", "triton", "cpu", "reference"):
        try:
            make_objective("fused", name, backend=backend, features=features)(image, image, image[:, :1])
            return backend
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
    raise InputError(f"--backend {asked}: {reason}")
