"""LPIPS of whole images, AlexNet with random weights: `nn.LPIPS` and the formula of the lpips package.

The formula runs the same network over the prediction and over the truth, keeps the maps of both, and takes the
distance layer by layer; the module runs the truth without a graph and takes the distance in one sweep a layer. Almost
all of the time goes into the convolutions, which are the same in both.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from . import bench_lpips
from .harness import Benchmark, Bytes, Case, Formula, Terms

if TYPE_CHECKING:
    from inpaint_kernels.nn import LPIPS

# What the lpips package subtracts from images in [-1, 1] and divides them by.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_MODULES: dict[tuple[torch.device, torch.dtype], LPIPS] = {}


def module_of(like: Tensor) -> LPIPS:
    """The same random weights for every device and dtype."""
    key = like.device, like.dtype
    if key not in _MODULES:
        import inpaint_kernels as ik

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = ik.nn.LPIPS("alex", range="tanh", weights=None)
            for layer in module.trunk.features.children():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        _MODULES[key] = module.to(*key)
    return _MODULES[key]


def eager(case: Case) -> Formula:
    def formula(pred: Tensor, target: Tensor) -> Terms:
        module = module_of(pred)
        shift, scale = (pred.new_tensor(values).view(1, 3, 1, 1) for values in (SHIFT, SCALE))
        maps: dict[str, Tensor] = {}
        assert isinstance(module.trunk.features, nn.Sequential)
        for name, images in (("input", pred), ("target", target)):
            value, count = (images - shift) / scale, 0
            for layer in module.trunk.features:
                value = layer(value)
                if isinstance(layer, nn.ReLU):
                    maps[f"{name}{count}"] = value
                    count += 1
        for i, weights in enumerate(module.heads.values):
            maps[f"weights{i}"] = weights.to(pred.dtype)
        return bench_lpips.distance(maps)

    return formula


def fused(case: Case, backend: str) -> Formula:
    return lambda pred, target: (module_of(pred)(pred, target),)


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Tensor | None]:
    pred, target = (2 * torch.rand(case.shape, generator=generator, device=device) - 1 for _ in range(2))
    module_of(pred)
    return {"pred": pred.requires_grad_(), "target": target}


BENCHMARK = Benchmark(
    op="lpips_module",
    cases=[Case((8, 3, 256, 256), "alexnet"), Case((1, 3, 64, 64), "alexnet", quick=True)],
    make_inputs=make_inputs,
    eager=eager,
    fused=fused,
    minimum_bytes=lambda case: Bytes(0, 0),
    # Convolutions of another layout add up in another order.
    tolerances={torch.float32: 2e-4},
    variants=("plain",),
    heavy=True,
    compiled=False,
)
