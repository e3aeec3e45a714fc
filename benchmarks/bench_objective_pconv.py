"""One step of the whole partial-convolution objective (preset "paper") on VGG16 with random weights.

The plain formula is written as published training scripts are: pixel terms and the composite from several passes over
the images, one trunk pass each for prediction, composite and truth, loops over layers and predictions, the Gram
matrices of the truth once for each prediction. `ik-plain` is `PartialConvObjective`, `ik-chunk1` the one that streams
single samples, and so on. Most of the time goes into the convolutions, which are the same in all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .bench_inpainting_pixel import HOLE_WEIGHT, TV_WEIGHT, VALID_WEIGHT, dilate, total_variation
from .bench_perceptual import PERCEPTUAL_WEIGHT, STYLE_WEIGHT, features_of, gram, trunk_of
from .harness import Benchmark, Bytes, Case, Formula, Terms, image_inputs

# Images, and which of prediction, composite and truth they are, to feature maps.
Trunk = Callable[[Tensor, int], Sequence[Tensor]]


def published(trunk: Trunk, pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The total, by a trunk that normalises the images itself."""
    hole = F.l1_loss((1 - mask) * pred, (1 - mask) * target)
    valid = F.l1_loss(mask * pred, mask * target)
    composite = mask * target + (1 - mask) * pred
    tv = total_variation(composite, dilate(1 - mask))
    maps = [trunk(images, which) for which, images in enumerate((pred, composite, target))]
    perceptual = style = pred.new_zeros(())
    for prediction in maps[:2]:
        for x, y in zip(prediction, maps[2], strict=True):
            perceptual = perceptual + F.l1_loss(x, y)
            style = style + F.l1_loss(gram(x), gram(y))
    pixel = HOLE_WEIGHT * hole + VALID_WEIGHT * valid + TV_WEIGHT * tv
    return pixel + PERCEPTUAL_WEIGHT * perceptual + STYLE_WEIGHT * style


def eager(case: Case) -> Formula:
    def formula(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return (published(lambda images, _: features_of(images), pred, target, mask),)

    return formula


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Tensor | None]:
    inputs = image_inputs(case, device, generator)
    assert inputs["pred"] is not None
    trunk_of(inputs["pred"].device, case.dtype)
    return inputs


def fused(case: Case, variant: str) -> Formula:
    import inpaint_kernels as ik

    chunk = None if variant == "plain" else int(variant.removeprefix("chunk"))

    @functools.cache
    def objective(device: torch.device, dtype: torch.dtype) -> ik.objectives.PartialConvObjective:
        trunk = trunk_of(device, dtype, preprocess="none", channels_last=None)
        return ik.objectives.PartialConvObjective("paper", trunk=trunk, chunk=chunk)

    def formula(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return (objective(pred.device, pred.dtype)(pred, target, mask).total,)

    return formula


BENCHMARK = Benchmark(
    op="objective_pconv",
    cases=[
        Case((4, 3, 256, 256), "vgg16 whole step"),
        Case((4, 3, 64, 64), "vgg16 whole step", quick=True),
        Case((16, 3, 512, 512), "vgg16 whole step", dtype=torch.bfloat16, devices=("cuda",)),
    ],
    make_inputs=make_inputs,
    eager=eager,
    fused=fused,
    minimum_bytes=lambda case: Bytes(0, 0),
    # As in bench_perceptual: rounding moves features across kinks. bfloat16 rounds every activation to 8 bits.
    tolerances={torch.float32: 5e-3, torch.bfloat16: 2.0**-3},
    variants=("plain", "chunk1", "chunk2"),
    heavy=True,
)
