"""SSIM in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import accumulate_dtype, is_differentiated, safe_divide


def gaussian_window(size: int, sigma: float) -> list[float]:
    """The weights of a row of the window; their sum is 1."""
    radius = size // 2
    values = [math.exp(-((i - radius) ** 2) / (2.0 * sigma**2)) for i in range(size)]
    total = sum(values)
    return [value / total for value in values]


def window_sums(x: Tensor, window: Sequence[float]) -> Tensor:
    """Weighted sum over every whole window, rows first.

    Slices and not a convolution: autocast leaves them alone, and they have every derivative.
    """
    radius = len(window) // 2
    for dim in (-1, -2):
        length = x.shape[dim] - 2 * radius
        total = window[radius] * x.narrow(dim, radius, length)
        for i in range(radius):
            total = total + window[i] * (x.narrow(dim, i, length) + x.narrow(dim, 2 * radius - i, length))
        x = total
    return x


def centres(x: Tensor, radius: int, same: bool) -> Tensor:
    """The pixels that are the centre of a window."""
    if same:
        return x
    return x[..., radius : x.shape[-2] - radius, radius : x.shape[-1] - radius]


def counted(image: Tensor, mask: Tensor) -> Tensor:
    """The image, 0 where the mask is exactly 0. NaN there would survive its product with 0, here or in a backward."""
    ignored = mask == 0
    if is_differentiated(mask):
        # The derivative by the mask reads the image, also at mask 0: drop only what is not finite.
        ignored = ignored & ~torch.isfinite(image)
    return torch.where(ignored, torch.zeros((), dtype=image.dtype, device=image.device), image)


def _mean(value: Tensor, weight: Tensor | None) -> Tensor:
    """(N, C) weighted means of a map over its windows; 1 where none counts."""
    if value.shape[-1] == 0 or value.shape[-2] == 0:
        return value.sum((-2, -1)) + 1
    if weight is None:
        return value.mean((-2, -1))
    # Not a sum over an expanded dimension, which might add in another order: means of ones are exactly 1.
    total = (torch.ones_like(value) * weight).sum((-2, -1))
    mean = safe_divide((value * weight).sum((-2, -1)), total)
    return torch.where(total == 0, torch.ones_like(mean), mean)


def ssim(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    window: Sequence[float],
    same: bool,
    c1: float,
    c2: float,
    contrast: bool = False,
    l1: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(similarity, contrast, l1) of images (N, C, H, W), float32, or float64 if an image is float64.

    With the weighted means, variances and covariance of the two images in every window:
    ``l = (2 mx my + c1) / (mx^2 + my^2 + c1)``, ``cs = (2 cov + c2) / (vx + vy + c2)``.
    similarity (N, C): the mean of ``l * cs`` over the windows, each with the mask's weight at its centre; 1 where the
    mask counts none. contrast (N, C): the same of ``cs``. l1 (): the mean of |pred - target| by the mask's weights, 0
    where they are all 0. What is not asked for is empty.

    Both in terms of s = pred + target and d = pred - target: ``4 mx my = ms^2 - md^2`` and ``2 (mx^2 + my^2) = ms^2 +
    md^2``, so that ``l = 1 - md^2 / ((ms^2 + md^2) / 2 + c1)``, and likewise for the variances. Equal images then
    have exactly the value 1 and no gradient.
    """
    dtype = accumulate_dtype(pred, target)
    x, y = pred.to(dtype), target.to(dtype)
    radius = len(window) // 2
    none = x.new_empty(0)
    distance = none
    if mask is not None:
        mask = mask.to(dtype)
        x, y = counted(x, mask), counted(y, mask)
    s, d = x + y, x - y
    if l1:
        counts = torch.ones_like(d) if mask is None else mask.expand(d.shape)
        distance = safe_divide((d.abs() * counts).sum(), counts.sum())
    weight = None if mask is None else centres(mask, radius, same)
    # A variance does not change with a shift, and near 0 it cancels less. The data range limits the shift: rare
    # values beyond it would move the others away from 0.
    limit = 200 * math.sqrt(c1)
    shifts = [
        v.detach().nan_to_num(0.0, 0.0, 0.0).clamp(-limit, limit).mean((-2, -1), keepdim=True) for v in (s, d)
    ]
    if same:
        s, d = F.pad(s, (radius,) * 4), F.pad(d, (radius,) * 4)
        mask = None if mask is None else F.pad(mask, (radius,) * 4)
    s, d = s - shifts[0], d - shifts[1]
    moments = torch.stack([s, d, s * s, d * d])
    if mask is None:
        moments = window_sums(moments, window)
    else:
        total = window_sums(mask, window)
        moments = window_sums(moments * mask, window) / torch.where(total == 0, torch.ones_like(total), total)
    ms, md, ss, dd = moments.unbind()
    vs, vd = ss - ms * ms, dd - md * md
    ms, md = ms + shifts[0], md + shifts[1]
    luminance = 1 - md * md / (0.5 * (ms * ms + md * md) + c1)
    cs = 1 - vd / (0.5 * (vs + vd) + c2)
    return _mean(luminance * cs, weight), _mean(cs, weight) if contrast else none, distance
