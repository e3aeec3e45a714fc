"""Perceptual distance of two predictions to one target, summed over layers and predictions.

The plain formula is the published one: the features of the raw and of the composite prediction are separate
tensors, each compared with the target by `F.l1_loss`, layer by layer. The rewrite compares the stacked
predictions with the broadcast target in one go, which is what one trunk pass over a stacked batch suggests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import Benchmark, Bytes, Case, Formula, Terms, feature_inputs, layers

EPS = 1e-3
COPIES = 2


def _charbonnier(x: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt((x - y) ** 2 + EPS**2).mean()


def _l1(x: Tensor, y: Tensor) -> Tensor:
    return (x - y).abs().mean()


def _penalty(case: Case) -> str:
    return str(case.options.get("penalty", "l1"))


def eager(case: Case) -> Formula:
    distance: Callable[[Tensor, Tensor], Tensor] = (
        _charbonnier if _penalty(case) == "charbonnier" else F.l1_loss
    )
    count = len(layers(case))

    def formula(**maps: Tensor) -> Terms:
        loss: Tensor | None = None
        for i in range(count):
            target = maps[f"target{i}"]
            for j in range(COPIES):
                term = distance(maps[f"input{i}_part{j}"], target)
                loss = term if loss is None else loss + term
        assert loss is not None
        return (loss,)

    return formula


def rewrite(case: Case) -> Formula:
    distance = _charbonnier if _penalty(case) == "charbonnier" else _l1
    count = len(layers(case))

    def layer(maps: Mapping[str, Tensor], i: int) -> Tensor:
        return distance(maps[f"input{i}"].unflatten(0, (COPIES, -1)), maps[f"target{i}"])

    def formula(**maps: Tensor) -> Terms:
        loss = layer(maps, 0)
        for i in range(1, count):
            loss = loss + layer(maps, i)
        # The means are over both predictions.
        return (COPIES * loss,)

    return formula


def fused(case: Case, backend: str) -> Formula:
    import inpaint_kernels as ik

    penalty, count = _penalty(case), len(layers(case))
    weights = [float(COPIES)] * count

    def formula(**maps: Tensor) -> Terms:
        inputs, targets = ([maps[f"{name}{i}"] for i in range(count)] for name in ("input", "target"))
        loss = ik.feature_distance(
            inputs, targets, weights=weights, penalty=penalty, eps=EPS, backend=backend
        )
        return (loss,)

    return formula


def minimum_bytes(case: Case) -> Bytes:
    """Forward reads predictions and target, backward writes the gradient of the predictions.

    What passes from one to the other is 2 sign bits an element for L1; Charbonnier reads its inputs again.
    """
    numel = sum(case.shape[0] * c * h * w for c, h, w in layers(case))
    target, predictions = numel * case.dtype.itemsize, COPIES * numel * case.dtype.itemsize
    if _penalty(case) == "charbonnier":
        return Bytes(predictions + target, 2 * predictions + target)
    signs = COPIES * numel // 4
    return Bytes(predictions + target + signs, predictions + signs)


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Tensor | None]:
    return feature_inputs(case, device, generator, copies=COPIES)


IMAGES = (4, 3, 256, 256)
POOLS = {"vgg16": True}

BENCHMARK = Benchmark(
    op="feature_distance",
    cases=[
        Case(IMAGES, "vgg16 pool1-3", options=POOLS),
        Case(IMAGES, "vgg16 pool1-3", torch.bfloat16, options=POOLS),
        Case(IMAGES, "vgg16 pool1-3 charbonnier", options={**POOLS, "penalty": "charbonnier"}),
        Case((1, 3, 16, 16), "vgg16 pool1-3", options=POOLS, quick=True),
        Case((16, 3, 512, 512), "vgg16 pool1-3", options=POOLS, devices=("cuda",)),
        Case((16, 3, 512, 512), "vgg16 pool1-3", torch.bfloat16, options=POOLS, devices=("cuda",)),
    ],
    make_inputs=make_inputs,
    eager=eager,
    rewrite=rewrite,
    fused=fused,
    minimum_bytes=minimum_bytes,
    # float32: sums of millions of elements; bfloat16: the plain formula rounds every intermediate to 8 bits.
    tolerances={torch.float32: 1e-5, torch.bfloat16: 2.0**-6},
)
