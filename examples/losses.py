"""The training objectives, twice: with the fused losses and with the eager formulas they replace.

The only place that builds losses; a further published method is one more row of ``METHODS``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import published
import torch
import torch.distributed as dist
from errors import InputError
from methods import Eager, FeatureTerms, Fused, Method, Objective, Terms
from torch import Tensor

# Of the pixel objective; it takes its perceptual and style weights as options.
PIXEL_WEIGHTS = {"hole": 6.0, "valid": 1.0}


def make_objective(
    kind: str,
    name: str = "pixel",
    *,
    normalize: str = "image",
    backend: str | None = None,
    group: dist.ProcessGroup | None = None,
    features: FeatureTerms | None = None,
) -> Objective:
    """One of the two sides of an objective.

    Args:
        kind: "fused" or "eager".
        name: "pixel", errors in the hole and elsewhere, with perceptual and style terms if there are ``features``;
            or a published method, a key of ``METHODS``, of which ``features`` has the trunk.
        normalize: "image" divides both terms by the number of elements of ``pred``, "mask" each by the
            size of its region, over all processes of ``group``; for "pixel".
        backend: which implementation of the fused losses, as ``fused_backend`` says; None chooses by device.
        group: the DDP process group, None for a single process.
        features: perceptual and style terms of the output and of the composite, None for none.
    """
    if name != "pixel":
        assert features is not None
        # The terms are means over images, so that DDP's average of equal batches is the global one. EdgeConnect
        # divides by the hole's share of a batch: of each process's own, as its code would do.
        method = METHODS[name]
        return Eager(method, features) if kind == "eager" else Fused(method, features, backend)
    pixels = _eager(normalize, group) if kind == "eager" else _fused(normalize, backend, group)
    if features is None:
        return Objective(pixels)
    compare = _eager_features(features) if kind == "eager" else _fused_features(features)

    def terms(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        composite = published.composite(pred, target, mask)
        pixel_terms = pixels(pred, target, mask)
        weighted_sum, perceptual, style = compare(pred.to(composite.dtype), composite, target)
        return pixel_terms._replace(
            total=pixel_terms.total + weighted_sum, perceptual=perceptual, style=style
        )

    return Objective(terms)


# -- published methods --------------------------------------------------------------------------


def _transcnn_hae(trunk: published.Trunk, pred: Tensor, target: Tensor, mask: Tensor) -> published.Terms:
    return published.transcnn_hae(trunk, pred, target)


def _coordfill(trunk: published.Trunk, pred: Tensor, *images: Tensor, **judged: Any) -> published.Terms:
    return published.coordfill(trunk, pred, *images, heads=_lpips_heads(pred.device), **judged)


@functools.cache
def _lpips_heads(device: torch.device) -> list[Tensor]:
    from inpaint_kernels.features.lpips_heads import LPIPSHeads

    return [weights.to(device) for weights in LPIPSHeads("alex").values]


# LaMa's own trunk is a ResNet50 trained for segmentation, which whoever trains with its objective brings.
LAMA_LAYERS, LAMA_VALID_WEIGHT = ("pool1", "pool2", "pool3", "pool4"), 10.0


def _lama(*images: Any, **judged: Any) -> published.Terms:
    terms = published.lama(*images, layers=LAMA_LAYERS, valid_weight=LAMA_VALID_WEIGHT, **judged)
    # Its pixel term has the weight inside.
    terms["valid"] = terms.pop("l1") / LAMA_VALID_WEIGHT
    return terms


METHODS = {
    "pconv": Method("PartialConvObjective", "vgg16", published.partial_conv, tanh=False),
    "ctn": Method("CTNObjective", "vgg19", published.ctn, published.ctn_discriminator),
    "tformer": Method("TFormerObjective", "vgg19", published.t_former, published.t_former_discriminator),
    # Its network has two stages, each with a discriminator; both are shown the one output there is.
    "mat": Method(
        "MATObjective",
        "vgg19",
        published.mat,
        published.mat_discriminator,
        critic_input=published.mat_critic_input,
        penalty=lambda real, images: published.mat_r1(real, (images, images)),
        heads=2,
    ),
    "transcnn-hae": Method("TransCNNHAEObjective", "vgg19", _transcnn_hae),
    "coordfill": Method("CoordFillObjective", "alexnet", _coordfill, published.coordfill_discriminator),
    "cmt": Method(
        "CMTObjective", "vgg16", published.cmt, published.cmt_discriminator, tanh=False, hole_mask=True
    ),
    "lama": Method(
        "LaMaObjective",
        "vgg16",
        _lama,
        published.lama_discriminator,
        penalty=published.lama_r1,
        tanh=False,
        hole_mask=True,
        mask_labels=True,
        changes={"perceptual_layers": LAMA_LAYERS, "valid_weight": LAMA_VALID_WEIGHT},
    ),
    "edge-connect": Method(
        "EdgeConnectObjective",
        "vgg19",
        published.edge_connect_inpaint,
        published.edge_connect_discriminator,
        tanh=False,
        hole_mask=True,
    ),
    "aot-gan": Method(
        "AOTGANObjective",
        "vgg19",
        published.aot_gan,
        published.aot_gan_discriminator,
        hole_mask=True,
        mask_labels=True,
    ),
}


# -- pixel terms, and single terms on features ---------------------------------------------------

PixelTerms = Callable[[Tensor, Tensor, Tensor], Terms]
# (output, composite, truth) -> weighted sum, perceptual term, style term
Comparison = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None, Tensor | None]]


def weighted(hole: Tensor, valid: Tensor) -> Terms:
    return Terms(PIXEL_WEIGHTS["hole"] * hole + PIXEL_WEIGHTS["valid"] * valid, hole, valid)


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


def _eager_features(features: FeatureTerms) -> Comparison:
    """The published loops over predictions and layers."""
    trunk = features.trunk

    def compare(
        pred: Tensor, composite: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        *predictions, truth = (trunk(images) for images in (pred, composite, target))
        total, perceptual, style = truth[0].new_zeros(()), None, None
        if features.perceptual:
            perceptual = torch.stack([published.perceptual_l1(maps, truth) for maps in predictions]).sum()
            total = total + features.perceptual * perceptual
        if features.style:
            style = torch.stack([published.style_l1(maps, truth) for maps in predictions]).sum()
            total = total + features.style * style
        return total, perceptual, style

    return compare


def _fused(normalize: str, backend: str | None, group: dist.ProcessGroup | None) -> PixelTerms:
    import inpaint_kernels as ik

    if group is None or normalize == "image":

        def terms(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
            return weighted(*ik.hole_valid_loss(pred, target, mask, normalize=normalize, backend=backend))

    else:
        # Region means over all processes need the summed masks of all processes.
        def terms(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
            hole = ik.masked_l1_loss(pred, target, 1 - mask, backend=backend, process_group=group)
            valid = ik.masked_l1_loss(pred, target, mask, backend=backend, process_group=group)
            return weighted(hole, valid)

    return terms


def _eager(normalize: str, group: dist.ProcessGroup | None) -> PixelTerms:
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
    from inpaint_kernels.objectives import DiscriminatorOutput

    asked = asked or os.environ.get("INPAINT_KERNELS_BACKEND") or None
    # As large as every trunk needs it.
    image, reason = torch.zeros(1, 3, 32, 32, device=device), ""
    judged = DiscriminatorOutput(image[:, :1], [image])
    for backend in (asked,) if asked else ("cuda", "triton", "cpu", "reference"):
        try:
            objective = make_objective("fused", name, backend=backend, features=features)
            objective(image, image, image[:, :1], judged, judged)
            return backend
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
    raise InputError(f"--backend {asked}: {reason}")
