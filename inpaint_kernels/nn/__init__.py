"""Losses and layers as modules."""

from .adversarial import FeatureMatchingLoss, GANLoss
from .partial_conv import PartialConv2d, PartialConv3d
from .perceptual import PerceptualLoss, PerceptualStyle, PerceptualStyleLoss, StyleLoss
from .structural import L1SSIMLoss, MSSSIMLoss, SSIMLoss

__all__ = [
    "FeatureMatchingLoss",
    "GANLoss",
    "L1SSIMLoss",
    "MSSSIMLoss",
    "PartialConv2d",
    "PartialConv3d",
    "PerceptualLoss",
    "PerceptualStyle",
    "PerceptualStyleLoss",
    "SSIMLoss",
    "StyleLoss",
]
