"""The linear heads of LPIPS: a weight for every channel of every layer it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

_FILE = Path(__file__).with_name("lpips_heads_v0.1.pt")


class LPIPSHeads:
    """Finite weights (C,) of each layer, never negative: those of version 0.1 for a network, or the caller's."""

    def __init__(self, net: str, heads: str | Sequence[Tensor] = "v0.1") -> None:
        if isinstance(heads, str):
            if heads != "v0.1":
                raise ValueError(f"heads: got {heads!r}, allowed: 'v0.1' or a sequence of tensors")
            known = torch.load(_FILE, map_location="cpu", weights_only=True)
            self.values = [value for key, value in known.items() if key.startswith(f"{net}.")]
            return
        if not isinstance(heads, Sequence):
            raise TypeError(f"heads must be 'v0.1' or a sequence of tensors, got {type(heads).__name__}")
        self.values = []
        for layer, value in enumerate(heads):
            if not isinstance(value, Tensor) or not value.is_floating_point():
                kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"heads[{layer}] must be a floating Tensor, got {kind}")
            refused = value[(value < 0) | ~value.isfinite()]
            if value.numel() != max(value.shape, default=0) or refused.numel():
                raise ValueError(
                    f"heads[{layer}] must hold one non-negative, finite weight for each channel, got shape "
                    f"{tuple(value.shape)}" + (f" and {float(refused[0]):g} in it" if refused.numel() else "")
                )
            self.values.append(value.detach().reshape(-1))

    def check(self, channels: Sequence[int]) -> None:
        """One weight for each channel of each layer."""
        counts = [len(value) for value in self.values]
        if counts != list(channels):
            raise ValueError(f"heads have {counts} weights for layers of {list(channels)} channels")

    def follow(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Goes where `fn` takes a tensor; the numbers stay as exact as they are."""
        self.values = [value.to(fn(value).device) for value in self.values]
