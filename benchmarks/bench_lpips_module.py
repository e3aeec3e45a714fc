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
from .harness import Benchmark, Bytes, Case, Formula, Terms, randomize

if TYPE_CHECKING:
    from inpaint_kernels.nn import LPIPS

# What the lpips package subtracts from images in [-1, 1] and divides them by.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
_MODULES: dict[tuple[torch.device, torch.dtype, bool | None], LPIPS] = {}


def module_of(like: Tensor, channels_last: bool | None = None) -> LPIPS:
    """The same random weights for every device, dtype and layout."""
    key = like.device, like.dtype, channels_last
    if key not in _MODULES:
        import inpaint_kernels as ik

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module = ik.nn.LPIPS("alex", range="tanh", weights=None, channels_last=channels_last)
            randomize(module.trunk.features)
        _MODULES[key] = module.to(*key[:2])
    return _MODULES[key]


def eager(case: Case) -> Formula:
    def formula(pred: Tensor, target: Tensor) -> Terms:
        module = module_of(pred, channels_last=False)
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
    for channels_last in (None, False):
        module_of(pred, channels_last)
    return {"pred": pred.requires_grad_(), "target": target}


BENCHMARK = Benchmark(
    op="lpips_module",
    cases=[Case((8, 3, 256, 256), "alexnet"), Case((1, 3, 64, 64), "alexnet", quick=True)],
    make_inputs=make_inputs,
    eager=eager,
    fused=fused,
    minimum_bytes=lambda case: Bytes(0, 0),
    # Seen of both: 5e-8 for the loss, 8e-4 for the L2 error of the gradient where a rectifier or a pooling decides
    # otherwise than in float64.
    tolerances={torch.float32: 5e-3},
    variants=("plain",),
    heavy=True,
    compiled=False,
)
