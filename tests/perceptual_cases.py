"""Images, losses and formulas of the tests of PerceptualLoss, StyleLoss and PerceptualStyleLoss."""

from __future__ import annotations

from typing import Any

import torch
from feature_cases import distance_formula, distance_settings, style_formula, style_settings
from harness import generator
from torch import Tensor, nn
from trunk_cases import outputs_of, small_net

from inpaint_kernels.features import FrozenTrunk
from inpaint_kernels.nn import PerceptualLoss, PerceptualStyleLoss, StyleLoss

N = 5
TAPS = ["1", "4", "6"]
WEIGHTS = [0.5, 2.0, 1.0]
CHUNKS = (None, 1, 2, 3, N, N + 4)
LOSSES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "perceptual": (PerceptualLoss, {"weights": WEIGHTS}),
    "perceptual-l2": (PerceptualLoss, {"penalty": "l2", "layer_reduction": "mean"}),
    "style": (StyleLoss, {"weights": WEIGHTS}),
    "style-hw-l2": (StyleLoss, {"penalty": "l2", "normalize": "hw"}),
    "style-gatys": (StyleLoss, {"normalize": "gatys"}),
    "both": (PerceptualStyleLoss, {"perceptual_weight": 0.05, "style_weight": 120.0}),
    "both-taps": (
        PerceptualStyleLoss,
        {
            "perceptual_taps": ["1", "6"],
            "style_taps": [1],
            "perceptual_weights": [1.0, 0.5],
            "style_weights": [2.0],
            "perceptual_weight": 0.1,
            "style_weight": 250.0,
        },
    ),
}


def trunk(**options: Any) -> FrozenTrunk:
    return FrozenTrunk(small_net(), TAPS, "imagenet", **options)


def make(name: str, chunk: int | None = None, layers: FrozenTrunk | None = None) -> Any:
    kind, options = LOSSES[name]
    return kind(layers or trunk(), **options, chunk=chunk)


def images(predictions: int = 1, size: tuple[int, ...] = (N, 3, 12, 10)) -> tuple[Tensor, Tensor]:
    rng = generator(3)
    return torch.rand(predictions * size[0], *size[1:], generator=rng), torch.rand(size, generator=rng)


def total(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result.total


def gradient(loss: nn.Module, pred: Tensor, target: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(value, gradient by the prediction of `scale` times the value)"""
    leaf = pred.detach().clone().requires_grad_()
    value = total(loss(leaf, target))
    (value * scale).backward()
    return value.detach(), leaf.grad


def features_by_hand(x: Tensor) -> list[Tensor]:
    mean, std = x.new_tensor([0.485, 0.456, 0.406]), x.new_tensor([0.229, 0.224, 0.225])
    outputs = outputs_of(small_net().to(x), (x - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))
    return [outputs[int(tap)] for tap in TAPS]


def by_hand(name: str, pred: Tensor, target: Tensor) -> Tensor:
    flat = [*features_by_hand(pred), *features_by_hand(target)]

    def distance(*flat: Tensor, penalty: str = "l1", **settings: Any) -> Tensor:
        return distance_formula(*flat, layers=len(flat) // 2, **distance_settings(penalty, **settings))

    if name == "perceptual":
        return distance(*flat, weights=WEIGHTS)
    if name == "perceptual-l2":
        return distance(*flat, penalty="l2", layer_reduction="mean")
    if name.startswith("style"):
        kind = {"style": "chw-l1", "style-hw-l2": "hw-l2", "style-gatys": "gatys"}[name]
        return style_formula(*flat, **style_settings(kind, WEIGHTS if name == "style" else None))
    if name == "both":
        return 0.05 * distance(*flat) + 120.0 * style_formula(*flat, **style_settings("chw-l1"))
    perceptual = distance(flat[0], flat[2], flat[3], flat[5], weights=[1.0, 0.5])
    return 0.1 * perceptual + 250.0 * style_formula(flat[1], flat[4], **style_settings("chw-l1", [2.0]))
