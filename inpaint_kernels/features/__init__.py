"""Frozen feature trunks for perceptual and style losses."""

from .torchvision_nets import alexnet, squeezenet, vgg16, vgg19
from .trunk import FrozenTrunk

__all__ = ["FrozenTrunk", "alexnet", "squeezenet", "vgg16", "vgg19"]
