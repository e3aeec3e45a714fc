"""Losses and layers as modules."""

from .perceptual import PerceptualLoss, PerceptualStyle, PerceptualStyleLoss, StyleLoss

__all__ = ["PerceptualLoss", "PerceptualStyle", "PerceptualStyleLoss", "StyleLoss"]
