"""Losses and layers as modules."""

from .partial_conv import PartialConv2d, PartialConv3d
from .perceptual import PerceptualLoss, PerceptualStyle, PerceptualStyleLoss, StyleLoss

__all__ = [
    "PartialConv2d",
    "PartialConv3d",
    "PerceptualLoss",
    "PerceptualStyle",
    "PerceptualStyleLoss",
    "StyleLoss",
]
