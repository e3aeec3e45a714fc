"""SSIM by windows, its losses, and the operator that MS-SSIM shares with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _library
from ..reference import ssim as reference
from ..reference._common import accumulate_dtype, safe_divide
from . import _checks, _pixel


class Windows(NamedTuple):
    """How windows are formed and compared: arguments of the operator."""

    weights: list[float]  # of a row of the window
    same: bool
    c1: float
    c2: float


def _fake(
    backend: str, pred: Tensor, target: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    contrast, l1 = options[-2:]
    n, c = pred.shape[:2]
    sizes: list[tuple[Any, ...]] = [(n, c), (n, c) if contrast else (0,), () if l1 else (0,), (n * c + 1,)]
    return tuple(_pixel.empties(pred, accumulate_dtype(pred, target), *sizes))


def _backward_fake(*args: Any) -> tuple[Tensor, Tensor]:
    grads = [
        _pixel.empty_image(t, t.shape, _pixel.is_channels_last(t), t.dtype) if needed else t.new_empty(0)
        for t, needed in zip(args[4:6], args[-2:], strict=True)
    ]
    return grads[0], grads[1]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    # Of the statistics nothing is kept: windows are summed anew.
    _library.save_for_backward(ctx, output[3], *inputs[:3])
    ctx.options, ctx.outputs = inputs[3:7], inputs[7:]


def _formula(
    ctx: Any, needs: Any, grads: tuple[Tensor | None, ...], pred: Tensor, target: Tensor, mask: Tensor | None
) -> list[Tensor]:
    """Gradients to the images that need one, by autograd through the formula."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views: if one image is made of the other, no path between them is counted twice.
        images = pred.view_as(pred), target.view_as(target)
        outputs = reference.ssim(images[0], images[1], mask, *ctx.options, *ctx.outputs)
    sent = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if grad is not None]
    return list(
        torch.autograd.grad(
            [out for out, _ in sent],
            [image for image, needed in zip(images, needs, strict=False) if needed],
            [grad for _, grad in sent],
            create_graph=create_graph,
            allow_unused=True,
            materialize_grads=True,
        )
    )


def _backward(ctx: Any, kernel: Any, needs: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    # An output that was not asked for is empty, and so is what arrives for it.
    asked = (True, *ctx.outputs)
    grads = tuple(grad if wanted else None for grad, wanted in zip(grads, asked, strict=True))
    if all(grad is None for grad in grads):
        return None, None
    # Once: under a checkpoint a second look finds nothing.
    scale, pred, target, mask = ctx.saved_tensors
    if kernel is None:
        found = iter(_formula(ctx, needs[:2], grads, pred, target, mask))
        return next(found) if needs[0] else None, next(found) if needs[1] else None
    sent = [None if grad is None else grad.contiguous() for grad in grads]
    to_pred, to_target = kernel(*sent, scale, pred, target, mask, *ctx.options, *needs[:2])
    return to_pred if needs[0] else None, to_target if needs[1] else None


# Images (N, C, H, W); a mask (H, W) or (N|1, C|1, H, W). Returns similarity (N, C), contrast (N, C) or (0,), l1 () or
# (0,) and scale (N C + 1,): 1 over the weights of the windows of each plane, and 1 over those of l1, 0 instead of
# 1 / 0. All in float32; float64 if an image is float64.
_op = _library.Op(
    "ssim",
    schema="(Tensor pred, Tensor target, Tensor? mask, float[] window, bool same, float c1, float c2, "
    "bool contrast, bool l1) -> (Tensor, Tensor, Tensor, Tensor)",
    backward_schema="(Tensor? grad_similarity, Tensor? grad_contrast, Tensor? grad_l1, Tensor scale, Tensor pred, "
    "Tensor target, Tensor? mask, float[] window, bool same, float c1, float c2, bool need_pred, bool need_target) "
    "-> (Tensor, Tensor)",
    outputs=3,
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    backward=_backward,
    backends=("cpu", "triton"),
)


def check_windows(data_range: float, window_size: int, sigma: float, padding: str) -> Windows:
    """The options of all functions here."""
    data_range = _checks.check_positive("data_range", data_range)
    sigma = _checks.check_positive("sigma", sigma)
    _checks.check_count("window_size", window_size, 3)
    if window_size > 15 or window_size % 2 == 0:
        raise ValueError(f"window_size must be an odd number from 3 to 15, got {window_size}")
    _checks.check_choice("padding", padding, ("valid", "same"))
    weights = reference.gaussian_window(window_size, sigma)
    return Windows(weights, padding == "same", (0.01 * data_range) ** 2, (0.03 * data_range) ** 2)


def _plane_mask(mask: Tensor, pred: Tensor) -> Tensor:
    """The mask of images (..., C, H, W) as one of (N, C, H, W)."""
    if not isinstance(mask, Tensor) or mask.ndim == 2 or pred.ndim == 4:
        return mask
    if mask.ndim != pred.ndim:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; for pred {tuple(pred.shape)} allowed: (H, W), or a shape of the "
            "same rank that broadcasts to pred's"
        )
    samples = pred.shape[:-3]
    if any(size != 1 for size in mask.shape[:-3]):
        if any(size not in (1, full) for size, full in zip(mask.shape[:-3], samples, strict=True)):
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}, which does not broadcast to pred's {tuple(pred.shape)}"
            )
        mask = mask.expand(*samples, *mask.shape[-3:])
    # A count: -1 does not tell how many masks without pixels there are.
    return mask.reshape(mask.shape[:-3].numel(), *mask.shape[-3:])


def as_images(
    pred: Tensor, target: Tensor, mask: Tensor | None, windows: Windows
) -> tuple[Tensor, Tensor, Tensor | None]:
    """pred, target and mask as images (N, C, H, W); raises unless they fit each other and the window."""
    for name, value in (("pred", pred), ("target", target)):
        if not isinstance(value, Tensor) or value.dtype not in _checks.FLOATS:
            error = _checks.not_floating(name, value)
            if not isinstance(value, Tensor) or value.dtype.is_complex:
                raise error
            raise TypeError(
                f"{error}: convert it, {name}.float(), and name its range, data_range=255 for bytes"
            )
    if pred.ndim < 3:
        raise ValueError(
            f"pred must have shape (C, H, W), (N, C, H, W) or (..., C, H, W), got {tuple(pred.shape)}"
        )
    if target.shape != pred.shape:
        raise ValueError(f"target has shape {tuple(target.shape)}, pred has {tuple(pred.shape)}")
    if target.device != pred.device:
        raise ValueError(f"target is on {target.device}, pred is on {pred.device}")
    size = len(windows.weights)
    if not windows.same and (pred.shape[-2] < size or pred.shape[-1] < size):
        raise ValueError(
            f"pred has {pred.shape[-2]} x {pred.shape[-1]} pixels, the window {size} x {size}: no whole window fits; "
            "take a smaller window_size, or padding='same'"
        )
    if mask is not None:
        mask = _plane_mask(mask, pred)
    if pred.ndim != 4:
        shape = (pred.shape[:-3].numel(), *pred.shape[-3:])
        pred, target = pred.reshape(shape), target.reshape(shape)
    return pred, target, None if mask is None else _checks.check_mask(mask, pred)


def plane_means(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    windows: Windows,
    backend: str | None,
    contrast: bool = False,
    l1: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(similarity, contrast, l1) of `reference.ssim`, of images that fit each other."""
    chosen = _op.choose(backend, (pred, target, mask), pred.dtype, target.dtype, mask=mask)
    if chosen == "reference":
        return reference.ssim(pred, target, mask, *windows, contrast, l1)
    needs = _pixel.needs_grad(pred, target)
    similarity, cs, distance = _op(chosen, needs, pred, target, mask, *windows, contrast, l1)
    return similarity, cs, distance


def sample_means(value: Tensor, mask: Tensor | None, windows: Windows) -> Tensor:
    """(N,) means over the channels of values (N, C), each with the weights of its windows; 1 where none counts."""
    if value.shape[1] == 1:
        return value.squeeze(1)
    if mask is None or mask.ndim == 2 or mask.shape[1] == 1:
        return value.mean(1) if value.shape[1] else value.sum(1) + 1
    counted = reference.centres(mask.to(value.dtype), len(windows.weights) // 2, windows.same)
    weight = counted.sum((-2, -1))
    total = weight.sum(1)
    mean = safe_divide((value * weight).sum(1), total)
    return torch.where(total == 0, torch.ones_like(mean), mean)


def reduced(samples: Tensor, leading: Any, reduction: str) -> Tensor:
    """Values (N,) of samples as the mean over them, 1 where there is none, or as (...) those of `leading` images."""
    if reduction == "none":
        return samples.reshape(leading)
    return samples.mean() if samples.shape[0] else samples.sum() + 1


def ssim(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    data_range: float = 1.0,
    window_size: int = 11,
    sigma: float = 1.5,
    padding: str = "valid",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Structural similarity of images: 1 for equal ones, down to -1 for opposite structure, never clamped.

    The mean over Gaussian windows of
    ``(2 mx my + C1) (2 cov + C2) / ((mx^2 + my^2 + C1) (vx + vy + C2))`` with the weighted means, variances and
    covariance of the two images in the window, ``C1 = (0.01 data_range)^2`` and ``C2 = (0.03 data_range)^2``.

    With a mask every statistic is of counted pixels alone, ``sum(w m x) / sum(w m)`` (normalised convolution), and
    each window weighs the mask's value at its centre. Windows around uncounted pixels do not count.

    Args:
        pred: images (N, C, H, W), or of any rank (..., C, H, W), where (C, H, W) is one image; float16, bfloat16,
            float32 or float64. NCHW and channels_last are read in place, other strides as well.
        target: as `pred` in shape and device; its dtype may differ.
        mask: non-negative weights, 1 = counted: (N, 1, H, W), (1, 1, H, W), (H, W) or (N, C, H, W), for other ranks
            of the images a shape of that rank that broadcasts; floating, bool or integer (nonzero counts as 1). Where
            it is exactly 0, NaN and Inf are ignored.
        data_range: the width of the range of values: 1 for [0, 1], 2 for [-1, 1], 255 for bytes.
        window_size: pixels of a side of the window, odd, 3 to 15.
        sigma: width of the Gaussian in pixels.
        padding: "valid" takes windows that lie within the image; "same" takes one around every pixel, with zeros
            outside the image. With a mask, what lies outside is uncounted instead.
        reduction: "mean" over the samples, or "none" for one value of each.
        backend: None (automatic), "reference", "cpu" or "triton".

    Returns:
        A scalar, or for "none" a tensor of shape (N,), ``pred.shape[:-3]`` in general; float32, float64 if an image
        is float64. A sample's value is the weighted mean over its channels and windows. A sample without a counted
        window has the value 1 and no gradient, as has an empty batch.

    Differentiable in `pred` and `target`, twice; the gradient of equal images is 0. Keeps references to the images
    and a number for each plane: the backward sums the windows anew. If `mask` requires a gradient the differentiable
    reference runs instead of a kernel.

    Raises:
        TypeError: an argument is no tensor or has a dtype not listed above, such as uint8.
        ValueError: shapes or devices disagree, an image is smaller than the window, or an option is not allowed.
        RuntimeError: the `backend` asked for cannot run, with the reason.

    Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity", 2004.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> image = torch.rand(1, 3, 16, 16)
        >>> ik.ssim(image, image), ik.ssim(torch.full_like(image, 0.2), torch.full_like(image, 0.4))
        (tensor(1.), tensor(0.8001))
    """
    windows = check_windows(data_range, window_size, sigma, padding)
    _checks.check_choice("reduction", reduction, ("mean", "none"))
    x, y, m = as_images(pred, target, mask, windows)
    similarity = plane_means(x, y, m, windows, backend)[0]
    return reduced(sample_means(similarity, m, windows), pred.shape[:-3], reduction)


def ssim_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    data_range: float = 1.0,
    window_size: int = 11,
    sigma: float = 1.5,
    padding: str = "valid",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """``1 - ssim``: 0 for equal images, up to 2 for opposite structure.

    Args:
        pred: images (N, C, H, W) or (..., C, H, W), as in `ssim`.
        target: as `pred`.
        mask: weights, as in `ssim`.
        data_range: the width of the range of values, as in `ssim`.
        window_size: pixels of a side of the window, odd, 3 to 15.
        sigma: width of the Gaussian in pixels.
        padding: "valid" or "same", as in `ssim`.
        reduction: "mean" over the samples, or "none" for one value of each.
        backend: None (automatic), "reference", "cpu" or "triton".

    Returns:
        A scalar, or for "none" a tensor of shape (N,), ``pred.shape[:-3]`` in general; float32, float64 if an image
        is float64. A sample without a counted window gives 0.

    Differentiable in `pred` and `target`, twice. Raises as `ssim`.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> image = torch.rand(1, 3, 16, 16)
        >>> ik.ssim_loss(image, image)
        tensor(0.)
    """
    return 1 - ssim(
        pred,
        target,
        mask,
        data_range=data_range,
        window_size=window_size,
        sigma=sigma,
        padding=padding,
        reduction=reduction,
        backend=backend,
    )


def l1_ssim_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    ssim_weight: float = 0.2,
    data_range: float = 1.0,
    window_size: int = 11,
    sigma: float = 1.5,
    padding: str = "valid",
    backend: str | None = None,
) -> Tensor:
    """``(1 - ssim_weight) * L1 + ssim_weight * (1 - ssim)`` in one pass over the images.

    The loss of 3D Gaussian splatting. L1 is the mean of |pred - target|; with a mask ``sum(mask * |pred - target|) /
    sum(mask)``, the mask broadcast over the channels, as `masked_l1_loss`.

    Args:
        pred: images (N, C, H, W) or (..., C, H, W), as in `ssim`.
        target: as `pred`.
        mask: weights of both terms, as in `ssim`.
        ssim_weight: the share of the structural term, from 0 to 1.
        data_range: the width of the range of values, as in `ssim`; L1 is not divided by it.
        window_size: pixels of a side of the window, odd, 3 to 15.
        sigma: width of the Gaussian in pixels.
        padding: "valid" or "same", as in `ssim`; released splatting code uses "same".
        backend: None (automatic), "reference", "cpu" or "triton".

    Returns:
        A scalar, float32; float64 if an image is float64. An empty mask gives 0 with zero gradient.

    Differentiable in `pred` and `target` (L1: subgradient 0 where they are equal), twice; keeps what `ssim` keeps.
    Raises as `ssim`.

    Kerbl et al., "3D Gaussian Splatting for Real-Time Radiance Field Rendering", 2023.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> pred, target = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.4)
        >>> ik.l1_ssim_loss(pred, target)
        tensor(0.2000)
    """
    ssim_weight = check_share(ssim_weight)
    windows = check_windows(data_range, window_size, sigma, padding)
    x, y, m = as_images(pred, target, mask, windows)
    similarity, _, l1 = plane_means(x, y, m, windows, backend, l1=True)
    mean = reduced(sample_means(similarity, m, windows), (), "mean")
    return (1 - ssim_weight) * l1 + ssim_weight * (1 - mean)


def check_share(ssim_weight: float) -> float:
    """A number from 0 to 1."""
    ssim_weight = _checks.check_number("ssim_weight", ssim_weight)
    if not 0 <= ssim_weight <= 1:
        raise ValueError(f"ssim_weight must lie between 0 and 1, got {ssim_weight!r}")
    return ssim_weight
