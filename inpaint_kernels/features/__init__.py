"""Frozen feature trunks for perceptual and style losses."""

from .torchvision_nets import alexnet, vgg16, vgg19
from .trunk import FrozenTrunk

__all__ = ["FrozenTrunk", "alexnet", "vgg16", "vgg19"]
