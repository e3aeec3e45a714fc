"""Small networks and images for the tests of FrozenTrunk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


def small_net(seed: int = 0) -> nn.Sequential:
    """A VGG of two blocks, in-place activations included."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class Hooked(nn.Module):
    """The same network behind a forward of its own, so that it can only be tapped by hooks."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.first, self.second = net[:4], net[4:]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).mean((2, 3))


def names_in_hooked(taps: Sequence[str]) -> list[str]:
    return [f"first.{tap}" if int(tap) < 4 else f"second.{tap}" for tap in taps]


def outputs_of(net: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Every child's output, which nothing afterwards can change."""
    found = []
    for child in net:
        x = child(x.clone())
        found.append(x.clone())
    return found


def images(*size: int) -> Tensor:
    return torch.rand(*(size or (2, 3, 12, 10)), generator=torch.Generator().manual_seed(1))
