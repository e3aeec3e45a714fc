"""Losses and layers as modules."""

from .adversarial import FeatureMatchingLoss, GANLoss
from .lpips import LPIPS
from .partial_conv import PartialConv2d, PartialConv3d
from .perceptual import PerceptualLoss, PerceptualStyle, PerceptualStyleLoss, StyleLoss

__all__ = [
    "LPIPS",
    "FeatureMatchingLoss",
    "GANLoss",
    "PartialConv2d",
    "PartialConv3d",
    "PerceptualLoss",
    "PerceptualStyle",
    "PerceptualStyleLoss",
    "StyleLoss",
]
