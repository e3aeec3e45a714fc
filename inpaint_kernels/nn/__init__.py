"""Losses and layers as modules."""
