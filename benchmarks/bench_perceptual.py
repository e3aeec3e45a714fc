"""Perceptual and style loss on VGG16 with random weights: kept bytes and time of the streamed and plain paths.

The plain formula is the published loop over the same trunk: one pass for the prediction, one for the target,
then `F.l1_loss` of the features and of their Gram matrices. `ik-plain` is `PerceptualStyleLoss` with chunk=None,
`ik-chunk1` the one that streams single samples, and so on. Almost all of the time goes into the convolutions,
which are the same in all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import Benchmark, Bytes, Case, Formula, Terms, randomize

if TYPE_CHECKING:
    from inpaint_kernels.features import FrozenTrunk

PERCEPTUAL_WEIGHT, STYLE_WEIGHT = 0.05, 120.0
TAPS = ("pool1", "pool2", "pool3")
# Normalisation of images in [0, 1], as torchvision's.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


_TRUNKS: dict[tuple[torch.device, torch.dtype, str, bool | None], FrozenTrunk] = {}


def trunk_of(
    device: torch.device, dtype: torch.dtype, preprocess: str = "imagenet", channels_last: bool | None = False
) -> FrozenTrunk:
    """The same random weights for every device and dtype, scaled so that features neither vanish nor grow."""
    # Not functools.cache: torch.compile traces what is below it, where this finds what `make_inputs` made.
    key = (device, dtype, preprocess, channels_last)
    if key not in _TRUNKS:
        _TRUNKS[key] = _make_trunk(*key)
    return _TRUNKS[key]


def _make_trunk(
    device: torch.device, dtype: torch.dtype, preprocess: str, channels_last: bool | None
) -> FrozenTrunk:
    import inpaint_kernels as ik

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        trunk = ik.features.vgg16(TAPS, weights=None, preprocess=preprocess, channels_last=channels_last)
        randomize(trunk.features)
    # Buffers of the preprocessing stay as they are: the trunk converts them itself.
    trunk.features.to(device, dtype)
    return trunk.to(device)


def features_of(images: Tensor) -> list[Tensor]:
    trunk = trunk_of(images.device, images.dtype)
    mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    value, maps = (images - mean) / std, []
    assert isinstance(trunk.features, torch.nn.Sequential)
    for layer in trunk.features:
        value = layer(value)
        if isinstance(layer, torch.nn.MaxPool2d):
            maps.append(value)
    return maps


def gram(features: Tensor) -> Tensor:
    n, c, h, w = features.shape
    flat = features.view(n, c, h * w)
    return torch.bmm(flat, flat.transpose(1, 2)) / (c * h * w)


def eager(case: Case) -> Formula:
    def formula(pred: Tensor, target: Tensor) -> Terms:
        perceptual = style = pred.new_zeros(())
        for x, y in zip(features_of(pred), features_of(target), strict=True):
            perceptual = perceptual + F.l1_loss(x, y)
            style = style + F.l1_loss(gram(x), gram(y))
        return (PERCEPTUAL_WEIGHT * perceptual + STYLE_WEIGHT * style,)

    return formula


def fused(case: Case, variant: str) -> Formula:
    import inpaint_kernels as ik

    chunk = None if variant == "plain" else int(variant.removeprefix("chunk"))

    def formula(pred: Tensor, target: Tensor) -> Terms:
        trunk = trunk_of(pred.device, pred.dtype)
        loss = ik.nn.PerceptualStyleLoss(
            trunk, perceptual_weight=PERCEPTUAL_WEIGHT, style_weight=STYLE_WEIGHT, chunk=chunk
        )
        return (loss(pred, target).total,)

    return formula


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Tensor | None]:
    pred, target = (
        torch.rand(case.shape, generator=generator, device=device).to(case.dtype) for _ in range(2)
    )
    trunk_of(pred.device, pred.dtype)
    return {"pred": pred.requires_grad_(), "target": target}


BENCHMARK = Benchmark(
    op="perceptual",
    cases=[
        Case((8, 3, 256, 256), "vgg16 perceptual + style"),
        Case((4, 3, 64, 64), "vgg16 perceptual + style", quick=True),
    ],
    make_inputs=make_inputs,
    eager=eager,
    fused=fused,
    minimum_bytes=lambda case: Bytes(0, 0),
    # Seen: 1e-7 for the loss, 1e-3 for the L2 error of the gradient, of plain and streamed paths alike.
    tolerances={torch.float32: 5e-3},
    variants=("plain", "chunk1", "chunk2", "chunk4"),
    heavy=True,
    compiled=False,
)
