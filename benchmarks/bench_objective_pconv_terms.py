"""The partial-convolution objective outside its trunk: everything of `bench_objective_pconv` but the network itself.

In place of the network stands one that costs nothing: it returns feature maps of VGG16's sizes that lie ready, takes
their gradients and gives back a gradient of the images that lies ready. What is left is the composite, the
normalised images, the pixel terms, feature distances and Gram matrices, forward and backward.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .bench_objective_pconv import published
from .bench_perceptual import MEAN, STD, TAPS
from .harness import Benchmark, Bytes, Case, Formula, Terms, feature_inputs, image_inputs, layers


@torch.library.custom_op("inpaint_kernels_bench::read", mutates_args=("sink",))
def read(images: Tensor, sink: Tensor) -> None:
    """What a compiler must not leave out: the images a network would read."""


@read.register_fake
def _(images: Tensor, sink: Tensor) -> None:
    return None


class Network(torch.autograd.Function):
    """Returns `maps`, whose gradients go to them, and gives `images` the gradient `back`."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, back: Tensor, sink: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        read(images, sink)
        ctx.back = back
        return tuple(map_.view_as(map_) for map_ in maps)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back, None, None, *grads


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Tensor | None]:
    n, c, h, w = case.shape
    back = torch.randn(2 * n, c, h, w, generator=generator, device=device) / case.numel
    return {
        **image_inputs(case, device, generator),
        **feature_inputs(case, device, generator, copies=2),
        "back": back.to(case.dtype),
        "sink": torch.zeros(1, device=device, dtype=case.dtype),
    }


def eager(case: Case) -> Formula:
    depth = range(len(layers(case)))

    def formula(
        pred: Tensor, target: Tensor, mask: Tensor, back: Tensor, sink: Tensor, **maps: Tensor
    ) -> Terms:
        def trunk(images: Tensor, which: int) -> Any:
            mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
            images = (images - mean) / std
            if which == 2:
                read(images, sink)
                return [maps[f"target{i}"] for i in depth]
            given = [maps[f"input{i}_part{which}"] for i in depth]
            return Network.apply(images, back.chunk(2)[which], sink, *given)

        return (published(trunk, pred, target, mask),)

    return formula


def fused(case: Case, backend: str) -> Formula:
    import inpaint_kernels as ik

    depth = range(len(layers(case)))

    class Ready(ik.features.FrozenTrunk):
        given: dict[str, Tensor]

        def forward(self, images: Tensor, layers: Sequence[str] | None = None) -> list[Tensor]:
            given = self.given
            if len(images) != len(given["back"]):
                read(images, given["sink"])
                return [given[f"target{i}"] for i in depth]
            maps = [given[f"input{i}"] for i in depth]
            return list(Network.apply(images, given["back"], given["sink"], *maps))

    @functools.cache
    def objective() -> tuple[Ready, ik.objectives.PartialConvObjective]:
        network = torch.nn.Sequential(*(torch.nn.Identity() for _ in depth))
        trunk = Ready(network, [str(i) for i in depth])
        trunk.names = list(TAPS)
        return trunk, ik.objectives.PartialConvObjective("paper", trunk=trunk, backend=backend)

    def formula(pred: Tensor, target: Tensor, mask: Tensor, **given: Tensor) -> Terms:
        trunk, loss = objective()
        trunk.given = given
        return (loss(pred, target, mask).total,)

    return formula


def minimum_bytes(case: Case) -> Bytes:
    """Forward reads the images, the mask and the maps of two predictions and the truth, and writes three images.

    Backward reads the predictions' maps again, for the Gram matrices, and writes their gradients; signs are left out.
    """
    size = case.dtype.itemsize
    image = case.numel * size
    mask = image // case.shape[1]
    maps = case.shape[0] * sum(c * h * w for c, h, w in layers(case)) * size
    return Bytes(5 * image + mask + 3 * maps, 3 * image + mask + 4 * maps)


BENCHMARK = Benchmark(
    op="objective_pconv_terms",
    cases=[
        Case((4, 3, 256, 256), "vgg16 pool1-3", options={"vgg16": True}),
        Case((1, 3, 64, 64), "vgg16 pool1-3", options={"vgg16": True}, quick=True),
        Case((16, 3, 512, 512), "vgg16 pool1-3", torch.bfloat16, options={"vgg16": True}, devices=("cuda",)),
    ],
    make_inputs=make_inputs,
    eager=eager,
    fused=fused,
    minimum_bytes=minimum_bytes,
    # float32: sums of millions of elements; bfloat16: the plain formula rounds Gram matrices to 8 bits.
    tolerances={torch.float32: 2e-5, torch.bfloat16: 2.0**-4},
)
