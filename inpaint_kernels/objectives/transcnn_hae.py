"""The objective of TransCNN-HAE, blind inpainting without a discriminator."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from ..features.torchvision_nets import vgg19
from ..ops._named_tuples import serializable
from ._objective import Objective
from ._settings import Settings
from ._terms import Perceptual, Pixel, Style, Term


@serializable
class TransCNNHAETerms(NamedTuple):
    """Terms of `TransCNNHAEObjective`: the weighted total and the raw terms, scalars on the images' device."""

    total: Tensor
    l1: Tensor
    perceptual: Tensor
    style: Tensor


@dataclass(frozen=True, kw_only=True)
class TransCNNHAESettings(Settings):
    """Settings of `TransCNNHAEObjective`, beside those of `Settings`.

    Args:
        perceptual_layers, style_layers: the trunk's taps that the two terms read.
        perceptual_layer_weights: a factor for each of the perceptual layers.
        l1_weight, perceptual_weight, style_weight: factors of the terms.
    """

    perceptual_layers: tuple[str, ...] = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
    perceptual_layer_weights: tuple[float, ...] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0)
    style_layers: tuple[str, ...] = ("relu4_1", "relu5_1")
    l1_weight: float = 2.0
    perceptual_weight: float = 1.0
    style_weight: float = 250.0


class TransCNNHAEObjective(Objective):
    """L1, perceptual and style term of TransCNN-HAE.

    ``total = 2 l1 + perceptual + 250 style`` with x the prediction and y the truth: ``l1 = mean |x - y|``;
    ``perceptual = sum w mean |phi(x) - phi(y)|`` over relu1_1 to relu5_1 of a VGG19 with w = 1/32, 1/16, 1/8, 1/4, 1;
    ``style = sum mean |G(phi(x)) - G(phi(y))|`` over relu4_1 and relu5_1, with Gram matrices divided by C H W. One
    pass of the trunk serves both.

    The presets "v1.0" (the version of the paper) and "master" (its successor) hold the same numbers. Images are in
    [-1, 1] and go into the trunk as they are. The inpainting is blind: no term reads a mask, which may be left out,
    and there is no discriminator.

    {arguments}

    Zhao et al., "TransCNN-HAE: Transformer-CNN Hybrid AutoEncoder for Blind Image Inpainting", 2022;
    zhenglab/TransCNN-HAE.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> objective = ik.objectives.TransCNNHAEObjective(weights=None)  # a random VGG19
        >>> pred, target = torch.rand(1, 3, 32, 32, requires_grad=True), torch.rand(1, 3, 32, 32)
        >>> objective(pred, target).total.backward()
    """

    presets = types.MappingProxyType({"v1.0": TransCNNHAESettings(), "master": TransCNNHAESettings()})
    result = TransCNNHAETerms
    net = staticmethod(vgg19)

    def table(self, s: TransCNNHAESettings) -> dict[str, Term]:
        weights = s.perceptual_layer_weights
        return {
            "l1": Pixel(s.l1_weight),
            "perceptual": Perceptual(s.perceptual_weight, s.perceptual_layers, ("raw",), weights),
            "style": Style(s.style_weight, s.style_layers, ("raw",)),
        }
