"""Formulas and calls shared by the tests of SSIM, written from the definition, without the package's reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import Backend, Call, backend_for, check_against_truth, evaluate
from pixel_cases import image_pair
from torch import Tensor

import inpaint_kernels as ik

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
# Windows that fit every image; a range unlike the default, so that an ignored one shows.
WINDOWS: dict[str, Any] = {"padding": "same", "window_size": 11, "sigma": 1.5, "data_range": 2.0}


def unit_pair(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """As `image_pair`, around 0.5 as pictures are: where means are near 0, luminance magnifies every rounding."""
    pair = image_pair(*args, **options)
    for image in pair:
        image.mul_(0.25).add_(0.5)
    return pair


def windows_of(x: Tensor, size: int, sigma: float, padding: str) -> Tensor:
    """Weighted sums over the windows of every plane: over the columns of each window, then over its rows."""
    row = torch.exp(-((torch.arange(size, dtype=torch.float64) - size // 2) ** 2) / (2 * sigma**2))
    row = (row / row.sum()).to(x.dtype)[None, None]
    around = size // 2 if padding == "same" else 0
    across = F.conv1d(x.reshape(-1, 1, x.shape[-1]), row, padding=around)
    across = across.reshape(-1, *x.shape[-2:-1], across.shape[-1])
    down = F.conv1d(across.transpose(1, 2).reshape(-1, 1, x.shape[-2]), row, padding=around)
    down = down.reshape(*across.shape[::2], down.shape[-1]).transpose(1, 2)
    return down.reshape(*x.shape[:-2], *down.shape[-2:])


def plane_formula(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    *,
    padding: str = "valid",
    window_size: int = 11,
    sigma: float = 1.5,
    data_range: float = 1.0,
    select: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """(similarity, contrast) of every window, and the windows' weights."""
    sums = partial(windows_of, size=window_size, sigma=sigma, padding=padding)
    weight = torch.ones_like(pred) if mask is None else mask.expand(pred.shape)
    if select:
        pred, target = pred.masked_fill(weight == 0, 0.0), target.masked_fill(weight == 0, 0.0)
    total: Tensor | float = 1.0 if mask is None else sums(weight)
    if isinstance(total, Tensor):
        total = total.masked_fill(total == 0, 1.0)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mx, my = sums(weight * pred) / total, sums(weight * target) / total
    vx = sums(weight * pred.square()) / total - mx.square()
    vy = sums(weight * target.square()) / total - my.square()
    cov = sums(weight * pred * target) / total - mx * my
    contrast = (2 * cov + c2) / (vx + vy + c2)
    similarity = (2 * mx * my + c1) / (mx.square() + my.square() + c1) * contrast
    edge = window_size // 2 if padding == "valid" else 0
    return similarity, contrast, weight[..., edge : weight.shape[-2] - edge, edge : weight.shape[-1] - edge]


def mean_of(values: Tensor, weight: Tensor, dims: tuple[int, ...] = (1, 2, 3)) -> Tensor:
    """Weighted means; 1 where there is no weight."""
    total = weight.sum(dims)
    one = torch.ones_like(total)
    return torch.where(total == 0, one, (values * weight).sum(dims) / torch.where(total == 0, one, total))


def ssim_formula(
    pred: Tensor, target: Tensor, mask: Tensor | None = None, *, l1: bool = False, **options: Any
) -> Tensor:
    """1 - SSIM, or (`l1`) 0.7 L1 + 0.3 (1 - SSIM)."""
    if pred.numel() == 0:
        return pred.sum() + target.sum()
    similarity, _, weight = plane_formula(pred, target, mask, **options)
    loss = 1 - mean_of(similarity, weight).mean()
    if not l1:
        return loss
    weight = torch.ones_like(pred) if mask is None else mask.expand(pred.shape)
    d = pred - target
    d = d.masked_fill(weight == 0, 0.0) if options.get("select", True) else d
    total = weight.sum()
    distance = (weight * d.abs()).sum() / total if total != 0 else 0.0 * d.sum()
    return 0.7 * distance + 0.3 * loss


def ssim_call(backend: Backend | None, *, l1: bool = False, **options: Any) -> Call:
    name = backend_for("ssim", backend)
    if l1:
        return partial(ik.l1_ssim_loss, ssim_weight=0.3, backend=name, **options)
    return partial(ik.ssim_loss, backend=name, **options)


def check(
    call: Call,
    formula: Call,
    inputs: Sequence[Tensor | None],
    wanted: Sequence[int] = (0, 1),
    of_gradients: bool = False,
) -> None:
    """`check_against_truth`, where a loss is a difference from 1, and a gradient one of terms several times its size,
    those by the means and by the variances; `of_gradients`: the outputs are gradients, too."""
    exact = [None if t is None else t.detach().cpu().double() for t in inputs]
    outputs, gradients, _ = evaluate(formula, exact, wanted)
    sizes, output_sizes = (
        {i: 4 * t.abs().max() for i, t in pairs if t.numel()}
        for pairs in (list(zip(wanted, gradients, strict=True)), list(enumerate(outputs)))
    )
    check_against_truth(
        call,
        formula,
        inputs,
        wanted=wanted,
        magnitudes=sizes,
        output_magnitudes=output_sizes if of_gradients else {0: torch.ones(())},
    )


def ms_ssim_formula(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    weights: Sequence[float] = SCALE_WEIGHTS,
    **options: Any,
) -> Tensor:
    """Values of the samples, for masks of one channel."""
    images, value = [pred, target], torch.ones((), dtype=pred.dtype)
    for scale, exponent in enumerate(weights):
        if scale:
            pad = [0, 0, 0, 0]
            pad[0], pad[2] = images[0].shape[3] % 2, images[0].shape[2] % 2

            def halved(x: Tensor, pad: list[int] = pad) -> Tensor:
                x = F.pad(x, pad)
                quarters = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
                least = [min(q.shape[d] for q in quarters) for d in (-2, -1)]
                return sum(q[..., : least[0], : least[1]] for q in quarters) / 4  # type: ignore[return-value]

            if mask is None:
                images = [halved(x) for x in images]
            else:
                counted = halved(mask)
                images = [halved(x.masked_fill(mask == 0, 0.0) * mask) for x in images]
                images = [x / counted.masked_fill(counted == 0, 1.0) for x in images]
                mask = counted
        similarity, contrast, weight = plane_formula(*images, mask, **options)
        last = scale == len(weights) - 1
        factor = mean_of(similarity if last else contrast, weight, (2, 3))
        value = value * torch.where(factor > 0, factor.clamp(min=1e-300) ** exponent, 0.0)
    return value.mean(1)
