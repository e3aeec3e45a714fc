"""The objective of partial convolution (Liu et al. 2018) and of three code bases that train with it."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..features.torchvision_nets import vgg16
from ..ops._named_tuples import serializable
from ._objective import Objective
from ._settings import Settings
from ._terms import Perceptual, Pixel, Style, Term, TotalVariation


@serializable
class PartialConvTerms(NamedTuple):
    """Terms of `PartialConvObjective`: the weighted total and the raw terms, scalars on the images' device."""

    total: Tensor
    hole: Tensor
    valid: Tensor
    tv: Tensor
    perceptual: Tensor
    style: Tensor


@dataclass(frozen=True, kw_only=True)
class PartialConvSettings(Settings):
    """Settings of `PartialConvObjective`, beside those of `Settings`; the defaults are the paper's.

    Args:
        layers: the trunk's taps that perceptual and style term read.
        predictions: what they compare with the truth: "raw", "composite" or both.
        hole_weight, valid_weight, tv_weight, perceptual_weight, style_weight: factors of the terms.
        normalize: denominator of hole and valid, as `hole_valid_loss`.
        tv_image: total variation of the "composite" or of the "raw" prediction.
        tv_region, tv_normalize: its pairs and denominators, as `total_variation_loss`.
        pixel_space: hole, valid and tv on the images as given ("image"), or as the trunk reads them ("trunk").
    """

    preprocess: str = "imagenet"
    layers: tuple[str, ...] = ("pool1", "pool2", "pool3")
    predictions: tuple[str, ...] = ("raw", "composite")
    hole_weight: float = 6.0
    valid_weight: float = 1.0
    tv_weight: float = 0.1
    perceptual_weight: float = 0.05
    style_weight: float = 120.0
    normalize: str = "image"
    tv_image: str = "composite"
    tv_region: str = "dilated_hole"
    tv_normalize: str = "image"
    pixel_space: str = "image"


_PRESETS = types.MappingProxyType(
    {
        "paper": PartialConvSettings(),
        "nvidia": PartialConvSettings(
            hole_weight=5.0,
            valid_weight=5.0,
            tv_weight=0.0,
            predictions=("raw",),
            tv_image="raw",
            tv_region="image",
            tv_normalize="pairs",
            pixel_space="trunk",
        ),
        "naoto0804": PartialConvSettings(
            preprocess="none", composite_from="masked_target", tv_region="image", tv_normalize="pairs"
        ),
        "mmagic": PartialConvSettings(
            preprocess="imagenet_tanh",
            mask_is="hole",
            normalize="mask",
            tv_region="first_pixel",
            tv_normalize="mask",
        ),
    }
)


class PartialConvObjective(Objective):
    """Hole, valid, total variation, perceptual and style term of partial convolution, as four sources train them.

    ``total = 6 hole + 1 valid + 0.1 tv + 0.05 perceptual + 120 style``, in "nvidia" ``5 (hole + valid) + 0.05
    perceptual + 120 style``. With x the prediction, y the truth and c the composite: hole and valid are the masked L1
    of x, perceptual is ``mean |phi(x) - phi(y)| + mean |phi(c) - phi(y)|`` and style the same with Gram matrices
    divided by C H W, both summed over pool1, pool2 and pool3 of a VGG16. The terms are alike, the numbers are not:

    =========== ============ ======== ==================== ======== ===============================================
    preset      images       mask 1 = hole, valid over     compared total variation
    =========== ============ ======== ==================== ======== ===============================================
    "paper"     [0, 1]       known    all elements         x and c  of c, hole dilated by 1 pixel, over all elements
    "nvidia"    [0, 1]       known    all elements,        x        weight 0; of x normalised, mean over pairs
                                      images normalised
    "naoto0804" normalised   known    all elements         x and c  of c, whole image, mean over pairs
    "mmagic"    [-1, 1]      hole     each over its region x and c  of c, hole at a pair's first pixel, over the hole
    =========== ============ ======== ==================== ======== ===============================================

    Normalised is ``(image - mean) / std`` of ImageNet, which makes a pixel error 4.4 times as large as in [0, 1], and
    [-1, 1] twice as large. Over its region, the hole weighs the same however small it is; over all elements, in
    proportion to its area. mmagic feeds its trunk BGR images under RGB statistics; ``swap_channels=True`` mends that.
    It leaves a hole's last row and column in the image out of the denominators of total variation; here they count.
    naoto0804 makes the composite from the masked image, which matters for masks with fractions, as resized ones have:
    the truth then counts with the square of the mask. ``composite_from="target"`` turns that off.

    The trunk that is built is a VGG16. "nvidia" takes no mask (all known) as well.

    {arguments}

    Liu et al., "Image Inpainting for Irregular Holes Using Partial Convolutions", 2018; NVIDIA/partialconv,
    naoto0804/pytorch-inpainting-with-partial-conv, open-mmlab/mmagic. The paper leaves the denominator of total
    variation open: its authors state that every L1 term is averaged over the image.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> objective = ik.objectives.PartialConvObjective("paper", weights=None, style_weight=240)  # a random VGG16
        >>> pred, target = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32)
        >>> mask = torch.ones(1, 1, 32, 32)
        >>> mask[..., 8:24, 8:24] = 0
        >>> terms = objective(pred, target, mask)
        >>> terms.total.backward()
        >>> objective.settings.hole_weight, objective.settings.style_weight
        (6.0, 240.0)
    """

    presets = _PRESETS
    result = PartialConvTerms
    net = staticmethod(vgg16)

    def table(self, s: PartialConvSettings) -> dict[str, Term]:
        return {
            "hole": Pixel(s.hole_weight, "hole", s.normalize),
            "valid": Pixel(s.valid_weight, "valid", s.normalize),
            "tv": TotalVariation(s.tv_weight, s.tv_image, s.tv_region, s.tv_normalize),
            "perceptual": Perceptual(s.perceptual_weight, s.layers, s.predictions),
            "style": Style(s.style_weight, s.layers, s.predictions),
        }
