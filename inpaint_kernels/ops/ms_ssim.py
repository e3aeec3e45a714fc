"""MS-SSIM: the operator of `ssim` at several scales."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference._common import accumulate_dtype
from ..reference.ssim import counted
from . import _checks
from .ssim import Windows, as_images, check_windows, plane_means, reduced, sample_means

# Wang et al., 2003, from the finest scale to the coarsest.
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def check_scales(scale_weights: Sequence[float] | None) -> list[float]:
    """The exponents of the scales."""
    if scale_weights is None:
        return list(SCALE_WEIGHTS)
    if not isinstance(scale_weights, Sequence) or isinstance(scale_weights, str) or not scale_weights:
        raise TypeError(f"scale_weights must be a non-empty sequence of numbers, got {scale_weights!r}")
    return [_checks.check_positive(f"scale_weights[{i}]", weight) for i, weight in enumerate(scale_weights)]


def _halved(x: Tensor) -> Tensor:
    """Means of 2 x 2 pixels; before the first row or column of an odd number of them stands one of zeros.

    As ``avg_pool2d``, which on a CPU takes more time than all of SSIM.
    """
    if x.shape[-2] % 2 or x.shape[-1] % 2:
        x = F.pad(x, (x.shape[-1] % 2, 0, x.shape[-2] % 2, 0))
    rows = x[..., ::2, :] + x[..., 1::2, :]
    return (rows[..., ::2] + rows[..., 1::2]) * 0.25


def _next_scale(pred: Tensor, target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Both images and the mask at half the size. A masked image becomes the means of counted pixels alone."""
    if mask is None:
        return _halved(pred), _halved(target), None
    weight = _halved(mask)
    divisor = torch.where(weight == 0, torch.ones_like(weight), weight)
    pred, target = (_halved(counted(image, mask) * mask) / divisor for image in (pred, target))
    return pred, target, weight


def _power(value: Tensor, exponent: float) -> Tensor:
    """``max(value, 0) ** exponent``, whose derivative at 0 is 0 here; NaN stays NaN."""
    clamped = value <= 0
    base = torch.where(clamped, torch.ones_like(value), value)
    return torch.where(clamped, torch.zeros_like(value), base**exponent)


def _plane_values(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    windows: Windows,
    exponents: list[float],
    backend: str | None,
) -> Tensor:
    """(N, C): the product over the scales of contrast, at the last one similarity, to their exponents."""
    product: Tensor | None = None
    last = len(exponents) - 1
    for scale, exponent in enumerate(exponents):
        if scale == 1:
            # Means of half types are not rounded to them.
            dtype = accumulate_dtype(pred, target)
            pred, target = pred.to(dtype), target.to(dtype)
            if mask is not None:
                mask = (mask[None, None] if mask.ndim == 2 else mask).to(dtype)
        if scale:
            pred, target, mask = _next_scale(pred, target, mask)
        similarity, contrast, _ = plane_means(pred, target, mask, windows, backend, contrast=scale < last)
        factor = _power(contrast if scale < last else similarity, exponent)
        product = factor if product is None else product * factor
    assert product is not None
    return product


def ms_ssim(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    data_range: float = 1.0,
    window_size: int = 11,
    sigma: float = 1.5,
    padding: str = "valid",
    scale_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Multi-scale SSIM: the product of the contrast terms of five scales and of the similarity at the coarsest.

    For every channel ``prod_s max(cs_s, 0)^w_s * max(ssim_S, 0)^w_S``, then the mean over the channels. ``cs_s`` is
    the mean over windows of ``(2 cov + C2) / (vx + vy + C2)``, ``ssim_S`` that of `ssim`. The next scale has the
    means of 2 x 2 pixels; before the first row (column) of an odd number of rows (columns) stands one of zeros, as in
    pytorch-msssim.

    **Contrast is clamped at 0.** On content that is anti-correlated at one of the scales the value is 0 and so is the
    gradient: training does not leave such a state by this loss alone.

    Args:
        pred: images (N, C, H, W), or of any rank (..., C, H, W); float16, bfloat16, float32 or float64. With
            `padding` "valid" and five scales both sides have at least 161 pixels for a window of 11.
        target: as `pred` in shape and device; its dtype may differ.
        mask: weights, as in `ssim`. Scales below the first have the mean of the mask in the 2 x 2 pixels, and there
            of the images the mean weighted by the mask; what lies outside the image is uncounted.
        data_range: the width of the range of values, as in `ssim`.
        window_size: pixels of a side of the window, odd, 3 to 15.
        sigma: width of the Gaussian in pixels.
        padding: "valid" or "same", as in `ssim`.
        scale_weights: the exponent of each scale, from the finest to the coarsest; None = 0.0448, 0.2856, 0.3001,
            0.2363, 0.1333. Their number is that of the scales.
        reduction: "mean" over the samples, or "none" for one value of each.
        backend: None (automatic), "reference", "cpu" or "triton".

    Returns:
        A scalar, or for "none" a tensor of shape (N,), ``pred.shape[:-3]`` in general, from 0 to 1; float32, float64
        if an image is float64. A scale without a counted window counts 1.

    Differentiable in `pred` and `target`, twice. Keeps the images of all scales, a third more than the images. If
    `mask` requires a gradient the differentiable reference runs instead of a kernel.

    Raises:
        TypeError: an argument is no tensor or has a dtype not listed above, such as uint8.
        ValueError: shapes or devices disagree, an image is too small, or an option is not allowed.
        RuntimeError: the `backend` asked for cannot run, with the reason.

    Wang et al., "Multiscale Structural Similarity for Image Quality Assessment", 2003.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> image = torch.rand(1, 3, 161, 161)
        >>> ik.ms_ssim(image, image)
        tensor(1.)
    """
    windows = check_windows(data_range, window_size, sigma, padding)
    exponents = check_scales(scale_weights)
    _checks.check_choice("reduction", reduction, ("mean", "none"))
    x, y, m = as_images(pred, target, mask, windows)
    smallest = 1 if windows.same else (len(windows.weights) - 1) * 2 ** (len(exponents) - 1) + 1
    if x.shape[-2] < smallest or x.shape[-1] < smallest:
        raise ValueError(
            f"pred has {x.shape[-2]} x {x.shape[-1]} pixels, {len(exponents)} scales of a {window_size} x "
            f"{window_size} window need {smallest} x {smallest}: take a smaller window_size, fewer scale_weights, or "
            "padding='same'"
        )
    values = _plane_values(x, y, m, windows, exponents, backend)
    return reduced(sample_means(values, m, windows), pred.shape[:-3], reduction)


def ms_ssim_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    data_range: float = 1.0,
    window_size: int = 11,
    sigma: float = 1.5,
    padding: str = "valid",
    scale_weights: Sequence[float] | None = None,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """``1 - ms_ssim``, from 0 for equal images to 1.

    Contrast is clamped at 0: on anti-correlated content the loss is 1 and its gradient 0, see `ms_ssim`.

    Args:
        pred: images (N, C, H, W) or (..., C, H, W), as in `ms_ssim`.
        target: as `pred`.
        mask: weights, as in `ms_ssim`.
        data_range: the width of the range of values, as in `ssim`.
        window_size: pixels of a side of the window, odd, 3 to 15.
        sigma: width of the Gaussian in pixels.
        padding: "valid" or "same", as in `ssim`.
        scale_weights: the exponent of each scale, as in `ms_ssim`.
        reduction: "mean" over the samples, or "none" for one value of each.
        backend: None (automatic), "reference", "cpu" or "triton".

    Returns:
        A scalar, or for "none" a tensor of shape (N,), ``pred.shape[:-3]`` in general; float32, float64 if an image
        is float64. A sample without a counted window gives 0.

    Differentiable in `pred` and `target`, twice. Raises as `ms_ssim`.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> image = torch.rand(1, 3, 161, 161)
        >>> ik.ms_ssim_loss(image, image)
        tensor(0.)
    """
    return 1 - ms_ssim(
        pred,
        target,
        mask,
        data_range=data_range,
        window_size=window_size,
        sigma=sigma,
        padding=padding,
        scale_weights=scale_weights,
        reduction=reduction,
        backend=backend,
    )
