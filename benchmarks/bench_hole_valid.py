"""Hole and valid terms, both divided by the number of elements of the image; the loss is 6 hole + valid.

The plain formula is the one of naoto0804/pytorch-inpainting-with-partial-conv and its many descendants:
images are masked first, then compared. The rewrite compares once and uses that the two terms add up to the
mean over the whole image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import Benchmark, Bytes, Case, Formula, Terms, image_inputs

EPS = 1e-3


def _charbonnier(pred: Tensor, target: Tensor) -> Tensor:
    return torch.sqrt((pred - target) ** 2 + EPS**2)


def eager(case: Case) -> Formula:
    def l1(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        hole = F.l1_loss((1 - mask) * pred, (1 - mask) * target)
        valid = F.l1_loss(mask * pred, mask * target)
        return hole, valid

    # Masking the images first would add eps to the penalty of every element that is not counted.
    def charbonnier(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        penalty = _charbonnier(pred, target)
        return ((1 - mask) * penalty).mean(), (mask * penalty).mean()

    return charbonnier if case.options.get("penalty") == "charbonnier" else l1


def rewrite(case: Case) -> Formula:
    compare = _charbonnier if case.options.get("penalty") == "charbonnier" else _l1

    def formula(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        penalty = compare(pred, target)
        valid = (mask * penalty).mean()
        return penalty.mean() - valid, valid

    return formula


def _l1(pred: Tensor, target: Tensor) -> Tensor:
    return (pred - target).abs()


def fused(case: Case, backend: str) -> Formula:
    import inpaint_kernels as ik

    penalty = str(case.options.get("penalty", "l1"))

    def formula(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        terms = ik.hole_valid_loss(pred, target, mask, penalty=penalty, eps=EPS, backend=backend)
        return terms.hole, terms.valid

    return formula


def minimum_bytes(case: Case) -> Bytes:
    """Forward reads pred, target and the one-channel mask; backward writes the gradient and reads the mask.

    What passes from one to the other is 2 sign bits an element for L1; Charbonnier reads its inputs again.
    """
    image = case.numel * case.dtype.itemsize
    mask = image // case.shape[1]
    if case.options.get("penalty") == "charbonnier":
        return Bytes(2 * image + mask, 3 * image + mask)
    signs = case.numel // 4
    return Bytes(2 * image + mask + signs, image + mask + signs)


LARGE = (8, 3, 512, 512)
HUGE = (16, 3, 512, 512)

BENCHMARK = Benchmark(
    op="hole_valid",
    cases=[
        Case(LARGE),
        Case(LARGE, dtype=torch.bfloat16),
        Case((1, 3, 64, 64), quick=True),
        Case(LARGE, "channels_last", layout="channels_last"),
        Case(LARGE, "charbonnier", options={"penalty": "charbonnier"}),
        Case(HUGE, devices=("cuda",)),
        Case(HUGE, dtype=torch.bfloat16, devices=("cuda",)),
    ],
    make_inputs=image_inputs,
    eager=eager,
    rewrite=rewrite,
    fused=fused,
    minimum_bytes=minimum_bytes,
    # float32: sums of millions of elements; bfloat16: the plain formula rounds every intermediate to 8 bits.
    tolerances={torch.float32: 1e-5, torch.bfloat16: 2.0**-6},
    weights=(6.0, 1.0),
)
