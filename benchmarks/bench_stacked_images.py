"""Raw prediction, composite and truth, normalised for a feature trunk, as one batch; its gradient to the prediction.

The plain formula is what training scripts write: the composite, then mean and standard deviation of ImageNet on each
of the three images, then `torch.cat`. The rewrite concatenates first and normalises the whole batch once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bench_perceptual import MEAN, STD
from .harness import Benchmark, Bytes, Case, Formula, Terms, image_inputs

SCALE = tuple(1 / std for std in STD)
SHIFT = tuple(-mean / std for mean, std in zip(MEAN, STD, strict=True))


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Tensor | None]:
    n, c, h, w = case.shape
    upstream = torch.randn(3 * n, c, h, w, generator=generator, device=device).to(case.dtype)
    if case.layout == "channels_last":
        upstream = upstream.contiguous(memory_format=torch.channels_last)
    return {**image_inputs(case, device, generator), "upstream": upstream}


def _normalised(image: Tensor) -> Tensor:
    mean, std = (image.new_tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (image - mean) / std


def _composite(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    return mask * target + (1 - mask) * pred


def eager(case: Case) -> Formula:
    def formula(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        images = (pred, _composite(pred, target, mask), target)
        return (torch.cat([_normalised(image) for image in images]),)

    return formula


def rewrite(case: Case) -> Formula:
    def formula(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return (_normalised(torch.cat([pred, _composite(pred, target, mask), target])),)

    return formula


def fused(case: Case, backend: str) -> Formula:
    import inpaint_kernels as ik

    def formula(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return (ik.stacked_images(pred, target, mask, scale=SCALE, shift=SHIFT, backend=backend),)

    return formula


def minimum_bytes(case: Case) -> Bytes:
    """Forward reads pred, target and the one-channel mask and writes three images.

    Backward reads the gradients of two of them and the mask, and writes that of pred.
    """
    image = case.numel * case.dtype.itemsize
    mask = image // case.shape[1]
    return Bytes(5 * image + mask, 3 * image + mask)


TRAINING = (8, 3, 256, 256)
HUGE = (16, 3, 512, 512)

BENCHMARK = Benchmark(
    op="stacked_images",
    cases=[
        Case(TRAINING, "composite"),
        Case(TRAINING, "composite", dtype=torch.bfloat16),
        Case((1, 3, 64, 64), "composite", quick=True),
        Case(TRAINING, "composite-channels-last", layout="channels_last"),
        Case(HUGE, "composite", devices=("cuda",)),
        Case(HUGE, "composite", dtype=torch.bfloat16, devices=("cuda",)),
    ],
    make_inputs=make_inputs,
    eager=eager,
    rewrite=rewrite,
    fused=fused,
    minimum_bytes=minimum_bytes,
    # bfloat16: the plain formula rounds after every step.
    tolerances={torch.float32: 1e-5, torch.bfloat16: 2.0**-5},
    layer=True,
)
