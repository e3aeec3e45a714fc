"""Trunk, images, losses and formulas of the tests of PerceptualLoss, StyleLoss and PerceptualStyleLoss."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from feature_cases import distance_formula, distance_settings, style_formula, style_settings
from harness import generator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from inpaint_kernels.features import FrozenTrunk
from inpaint_kernels.nn import PerceptualLoss, PerceptualStyleLoss, StyleLoss

N = 5
TAPS = ["1", "4", "6"]
WEIGHTS = [0.5, 2.0, 1.0]


def net(
    channels: int = 6, activation: Callable[[], nn.Module] = lambda: nn.ReLU(inplace=True)
) -> nn.Sequential:
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


def trunk(**options: Any) -> FrozenTrunk:
    return FrozenTrunk(net(), TAPS, "imagenet", **options)


def images(predictions: int = 1, size: tuple[int, ...] = (N, 3, 12, 10)) -> tuple[Tensor, Tensor]:
    rng = generator(3)
    return torch.rand(predictions * size[0], *size[1:], generator=rng), torch.rand(size, generator=rng)


LOSSES: dict[str, Callable[..., nn.Module]] = {
    "perceptual": lambda **o: PerceptualLoss(o.pop("trunk", None) or trunk(), weights=WEIGHTS, **o),
    "perceptual-l2": lambda **o: PerceptualLoss(
        o.pop("trunk", None) or trunk(), penalty="l2", layer_reduction="mean", **o
    ),
    "style": lambda **o: StyleLoss(o.pop("trunk", None) or trunk(), weights=WEIGHTS, **o),
    "style-hw-l2": lambda **o: StyleLoss(o.pop("trunk", None) or trunk(), penalty="l2", normalize="hw", **o),
    "style-gatys": lambda **o: StyleLoss(o.pop("trunk", None) or trunk(), normalize="gatys", **o),
    "both": lambda **o: PerceptualStyleLoss(
        o.pop("trunk", None) or trunk(), perceptual_weight=0.05, style_weight=120.0, **o
    ),
    "both-taps": lambda **o: PerceptualStyleLoss(
        o.pop("trunk", None) or trunk(),
        perceptual_taps=["1", "6"],
        style_taps=[1],
        perceptual_weights=[1.0, 0.5],
        style_weights=[2.0],
        perceptual_weight=0.1,
        style_weight=250.0,
        **o,
    ),
}


def counted_ops(run: Callable[[], object]) -> Counter[str]:
    """How often each operator reaches a kernel."""
    counts: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[str(func)] += 1
            return func(*args, **(kwargs or {}))

    with Count():
        run()
    return counts


def total(found: Any) -> Tensor:
    return found if isinstance(found, Tensor) else found.total


def gradient(loss: nn.Module, pred: Tensor, target: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    leaf = pred.detach().clone().requires_grad_()
    value = total(loss(leaf, target))
    (value * scale).backward()
    return value.detach(), leaf.grad


def features_by_hand(x: Tensor) -> list[Tensor]:
    found = []
    mean, std = x.new_tensor([0.485, 0.456, 0.406]), x.new_tensor([0.229, 0.224, 0.225])
    x = (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    for index, child in enumerate(net(activation=nn.ReLU).to(x)):
        x = child(x)
        if str(index) in TAPS:
            found.append(x)
    return found


def by_hand(name: str, pred: Tensor, target: Tensor) -> Tensor:
    flat = [*features_by_hand(pred), *features_by_hand(target)]
    three = {"layers": 3}
    if name == "perceptual":
        return distance_formula(*flat, **three, **distance_settings("l1", weights=WEIGHTS))
    if name == "perceptual-l2":
        return distance_formula(*flat, **three, **distance_settings("l2", layer_reduction="mean"))
    if name.startswith("style"):
        kind = {"style": "chw-l1", "style-hw-l2": "hw-l2", "style-gatys": "gatys"}[name]
        return style_formula(*flat, **style_settings(kind, WEIGHTS if name == "style" else None))
    if name == "both":
        perceptual = distance_formula(*flat, **three, **distance_settings("l1"))
        return 0.05 * perceptual + 120.0 * style_formula(*flat, **style_settings("chw-l1"))
    some = [flat[0], flat[2], flat[3], flat[5]]
    perceptual = distance_formula(*some, layers=2, **distance_settings("l1", weights=[1.0, 0.5]))
    return 0.1 * perceptual + 250.0 * style_formula(flat[1], flat[4], **style_settings("chw-l1", [2.0]))


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


CHUNKS = (None, 1, 2, 3, N, N + 4)
