"""Masked mean of a pixel penalty: sum(m * l(pred - target)) / sum(m), the mask broadcast over channels.

The plain formula is the masked reduction of mmagic (`mask_reduce_loss` around `l1_loss`), the form most
inpainting code bases share. The rewrite sums the mask before it is broadcast instead of after.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import Benchmark, Bytes, Case, Formula, Terms, image_inputs

EPS = 1e-3


def _l1(pred: Tensor, target: Tensor) -> Tensor:
    return F.l1_loss(pred, target, reduction="none")


def _charbonnier(pred: Tensor, target: Tensor) -> Tensor:
    return torch.sqrt((pred - target) ** 2 + EPS**2)


def _penalty(case: Case) -> Callable[[Tensor, Tensor], Tensor]:
    return _charbonnier if case.options.get("penalty") == "charbonnier" else _l1


def eager(case: Case) -> Formula:
    penalty = _penalty(case)

    def formula(pred: Tensor, target: Tensor, mask: Tensor | None) -> Terms:
        loss = penalty(pred, target)
        if mask is None:
            return (loss.mean(),)
        loss = loss * mask
        mask = mask.expand_as(loss)
        return (loss.sum() / (mask.sum() + 1e-12),)

    return formula


def rewrite(case: Case) -> Formula | None:
    if not case.options.get("mask", True):
        return None
    penalty = _penalty(case)

    def formula(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        return ((penalty(pred, target) * mask).sum() / (mask.sum() * pred.shape[1] + 1e-12),)

    return formula


def fused(case: Case, backend: str) -> Formula:
    import inpaint_kernels as ik

    if case.options.get("penalty") == "charbonnier":
        return lambda pred, target, mask: (
            ik.masked_charbonnier_loss(pred, target, mask, eps=EPS, normalize="mask", backend=backend),
        )
    return lambda pred, target, mask: (
        ik.masked_l1_loss(pred, target, mask, normalize="mask", backend=backend),
    )


def minimum_bytes(case: Case) -> Bytes:
    """Forward reads pred, target and the one-channel mask; backward writes the gradient and reads the mask.

    What passes from one to the other is 2 sign bits an element for L1; Charbonnier reads its inputs again.
    """
    image = case.numel * case.dtype.itemsize
    mask = image // case.shape[1] if case.options.get("mask", True) else 0
    if case.options.get("penalty") == "charbonnier":
        return Bytes(2 * image + mask, 3 * image + mask)
    signs = case.numel // 4
    return Bytes(2 * image + mask + signs, image + mask + signs)


LARGE = (8, 3, 512, 512)
HUGE = (16, 3, 512, 512)

BENCHMARK = Benchmark(
    op="masked_l1",
    cases=[
        Case(LARGE),
        Case(LARGE, dtype=torch.bfloat16),
        Case((1, 3, 64, 64), quick=True),
        Case(LARGE, "channels_last", layout="channels_last"),
        Case(LARGE, "no mask", options={"mask": False}),
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
)
