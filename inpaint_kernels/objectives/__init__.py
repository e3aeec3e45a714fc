"""Training objectives of published inpainting methods: all their terms from one call."""

from .partial_conv import PartialConvObjective, PartialConvSettings, PartialConvTerms

__all__ = ["PartialConvObjective", "PartialConvSettings", "PartialConvTerms"]
