"""Small networks and images for the tests of FrozenTrunk and of the losses on one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from harness import generator
from torch import Tensor, nn

from inpaint_kernels.features import FrozenTrunk

# Run child by child, or as a whole that can only be tapped by hooks.
both_kinds = pytest.mark.parametrize("kind", ["sequential", "hooked"])


def small_net(
    channels: int = 6, activation: Callable[[], nn.Module] = lambda: nn.ReLU(inplace=True)
) -> nn.Sequential:
    """A VGG of two blocks, in-place activations included."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        activation(),
        nn.Conv2d(channels, channels, 3, padding=1),
        activation(),
        nn.MaxPool2d(2),
        nn.Conv2d(channels, 8, 3, padding=1),
        activation(),
    )


class Wrapped(nn.Module):
    """A network behind a forward of another class."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Hooked(nn.Module):
    """A `small_net` behind a forward of its own, with other names and a layer behind it."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.first, self.second = net[:4], net[4:]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).mean((2, 3))


def names_in_hooked(taps: Sequence[str]) -> list[str]:
    return [f"first.{tap}" if int(tap) < 4 else f"second.{tap}" for tap in taps]


def small_trunk(kind: str, taps: Sequence[str], *args: Any, **options: Any) -> FrozenTrunk:
    """Of a `small_net`, as one of `both_kinds`."""
    net = small_net()
    if kind == "sequential":
        return FrozenTrunk(net, taps, *args, **options)
    return FrozenTrunk(Hooked(net), names_in_hooked(taps), *args, **options)


def outputs_of(net: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Every child's output, which nothing afterwards can change."""
    outputs = []
    for child in net:
        x = child(x.clone())
        outputs.append(x.clone())
    return outputs


def images(*size: int) -> Tensor:
    return torch.rand(*(size or (2, 3, 12, 10)), generator=generator(1))


def relative(got: Tensor, want: Tensor) -> float:
    """The norm of the error as a share of the norm of what is wanted, or as it is where that is zero."""
    norm, error = want.double().norm(), (got.double() - want.double()).norm()
    return float(error / norm if norm else error)
