"""Masked pixel losses: L1, MSE, Charbonnier and Huber, one kernel family with the penalty as a parameter."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import _library
from ..reference import masked_l1 as reference
from ..reference._common import accumulate_dtype
from . import _checks, _pixel

# The map of reduction "none" has no CUDA kernels: Triton writes it as fast.
MAP: dict[str, Any] = {"form": " with reduction='none'", "backends": ("cpu", "triton")}


def _fake(
    backend: str, pred: Tensor, target: Tensor, mask: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    _, _, reduction, _, save_signs = options
    dtype = accumulate_dtype(pred, target)
    signs = _pixel.fake_signs(pred, save_signs, backend, mask)
    if reduction == "none":
        loss_map = _pixel.empty_image(pred, pred.shape, _pixel.is_channels_last(pred), dtype)
        return loss_map, pred.new_empty(0, dtype=dtype), signs
    return *_pixel.empties(pred, dtype, (), (pred.shape[0], 1)), signs


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    penalty, param, *_ = inputs[3:]
    _pixel.save_differences(ctx, inputs[:3], penalty, (penalty, param), *output[1:])


def _formula(
    ctx: Any, grad: Tensor, scale: Tensor, signs: None, mask: Tensor | None, pred: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    coefficient = grad * scale[:, :, None, None] if grad.ndim == 0 else grad
    value = reference.masked_loss_grad(pred, target, mask, coefficient, *ctx.options)
    return value, -value


def _backward(ctx: Any, kernel: Any, needs: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    return _pixel.backward(ctx, _op, kernel, needs, (grad,), None if ctx.options[0] == "l1" else _formula)


_op = _library.Op(
    "masked_l1",
    schema="(Tensor pred, Tensor target, Tensor? mask, str penalty, float param, str reduction, "
    "str normalize, bool save_signs) -> (Tensor, Tensor, Tensor)",
    backward_schema="(Tensor grad, Tensor scale, Tensor? signs, Tensor? mask, Tensor? pred, Tensor? target, "
    f"{_pixel.IMAGE}, str penalty, float param, bool need_pred, bool need_target) -> (Tensor, Tensor)",
    outputs=1,
    fake=_fake,
    backward_fake=_pixel.gradients_fake(1, 6),
    save=_save,
    backward=_backward,
)


def _masked_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    penalty: str,
    param: float,
    reduction: str,
    normalize: str,
    process_group: Any,
    backend: str | None,
) -> Tensor:
    _checks.check_images(pred, target)
    if mask is not None:
        mask = _checks.check_mask(mask, pred)
    _checks.check_choice("reduction", reduction, _checks.REDUCTIONS)
    _checks.check_choice("normalize", normalize, _checks.NORMALIZATIONS)
    if process_group is not None:
        if reduction != "mean":
            raise ValueError(f"process_group needs reduction='mean', got {reduction!r}")
        _pixel.check_group(process_group, mask)
    options = penalty, param, reduction, normalize
    loss: Tensor = _pixel.call(
        _op,
        lambda: reference.masked_loss(pred, target, mask, *options),
        backend,
        (pred, target, mask),
        options,
        l1=penalty == "l1",
        **(MAP if reduction == "none" else {}),
    )
    if process_group is not None:
        count = _pixel.mean_count(pred, mask, normalize)
        (loss,) = _pixel.global_means((loss,), (count,), process_group)
    return loss


def masked_l1_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    normalize: str = "mask",
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Weighted mean absolute difference of two images.

    ``sum(mask * |pred - target|) / D``, where D is the summed mask, broadcast over the channels
    (``normalize="mask"``), the number of elements of `pred` (``"image"``), or the summed mask of each sample,
    followed by the mean over all N samples (``"sample"``). Where D is 0 (nothing counted, or an empty batch) the
    loss and its gradient are 0, never NaN.

    Args:
        pred: images (N, C, H, W); float16, bfloat16, float32 or float64, any strides. NCHW and channels_last are
            read in place, other strides through a copy.
        target: as `pred` in shape and device; its dtype may differ, a differing layout is copied.
        mask: weights, 1 = counted, 0 = ignored: (N, 1, H, W), (1, 1, H, W), (H, W), (N, C, H, W) or any 4-D shape
            that broadcasts; floating, bool or an integer (nonzero counts as 1), never negative. Where it is
            exactly 0, NaN and Inf in `pred` and `target` are ignored. None counts everything.
        reduction: "mean"; "sum", the weighted sum whatever `normalize` says; "none", the weighted map.
        normalize: "mask", "image" or "sample", see above.
        process_group: a torch.distributed group: D is summed over its ranks (one scalar all-reduce) and the
            result scaled such that the gradient average of DDP is the gradient of the global mean. The mean of
            the returned values over the ranks is that global mean. Needs ``reduction="mean"``.
        backend: None (automatic), "reference", "cpu", "triton" or "cuda", which has no ``reduction="none"``.

    Returns:
        A scalar, or for ``reduction="none"`` a tensor like `pred`; float32, float64 if an input is float64.

    Differentiable in `pred` and `target` (subgradient 0 where they are equal), twice. If `mask` requires a
    gradient the differentiable reference runs instead of a kernel. For the gradient 2 bits an element are kept.

    Raises:
        TypeError: an argument is no tensor or has a dtype not listed above.
        ValueError: shapes or devices disagree, or an option is unknown.
        RuntimeError: the `backend` asked for cannot run, with the reason.

    The region means of mmagic's ``masked_l1``; ``normalize="image"`` is the form of Liu et al., "Image
    Inpainting for Irregular Holes Using Partial Convolutions", 2018.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> pred, target = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
        >>> mask = torch.zeros(1, 1, 4, 4)
        >>> mask[..., :2] = 1
        >>> ik.masked_l1_loss(pred, target, mask)
        tensor(1.)
        >>> ik.masked_l1_loss(pred, target, mask, normalize="image")
        tensor(0.5000)
    """
    return _masked_loss(pred, target, mask, "l1", 0.0, reduction, normalize, process_group, backend)


def masked_mse_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    normalize: str = "mask",
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Weighted mean squared difference of two images, ``sum(mask * (pred - target)^2) / D``.

    Args:
        pred: images (N, C, H, W), as in `masked_l1_loss`.
        target: as `pred`.
        mask: weights, as in `masked_l1_loss`.
        reduction: "mean", "sum" or "none".
        normalize: the denominator D: "mask", "image" or "sample".
        process_group: for a mean over all ranks, as in `masked_l1_loss`.
        backend: None (automatic), "reference", "cpu", "triton" or "cuda", as in `masked_l1_loss`.

    Returns:
        A scalar, or for ``reduction="none"`` a tensor like `pred`; float32, float64 if an input is float64.

    Differentiable in `pred` and `target`, twice; keeps references to both. Raises as `masked_l1_loss`.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> ik.masked_mse_loss(torch.full((1, 3, 4, 4), 3.0), torch.ones(1, 3, 4, 4))
        tensor(4.)
    """
    return _masked_loss(pred, target, mask, "l2", 0.0, reduction, normalize, process_group, backend)


def masked_charbonnier_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    eps: float = 1e-3,
    reduction: str = "mean",
    normalize: str = "mask",
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Weighted mean Charbonnier penalty, ``sum(mask * sqrt((pred - target)^2 + eps^2)) / D``.

    Args:
        pred: images (N, C, H, W), as in `masked_l1_loss`.
        target: as `pred`.
        mask: weights, as in `masked_l1_loss`.
        eps: half-width of the smooth region, in the unit of the images; squared inside the root.
        reduction: "mean", "sum" or "none".
        normalize: the denominator D: "mask", "image" or "sample".
        process_group: for a mean over all ranks, as in `masked_l1_loss`.
        backend: None (automatic), "reference", "cpu", "triton" or "cuda", as in `masked_l1_loss`.

    Returns:
        A scalar, or for ``reduction="none"`` a tensor like `pred`; float32, float64 if an input is float64.

    Differentiable in `pred` and `target`, twice; keeps references to both. Raises as `masked_l1_loss`, and
    ValueError for an `eps` whose square float32 cannot hold.

    Charbonnier et al., 1994, as used by Lai et al., "Deep Laplacian Pyramid Networks", 2017.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> image = torch.ones(1, 3, 4, 4)
        >>> ik.masked_charbonnier_loss(image, image)
        tensor(0.0010)
    """
    eps = _checks.check_positive("eps", eps)
    return _masked_loss(pred, target, mask, "charbonnier", eps, reduction, normalize, process_group, backend)


def masked_huber_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    delta: float = 1.0,
    reduction: str = "mean",
    normalize: str = "mask",
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Weighted mean Huber penalty: ``d^2 / 2`` up to |d| = delta, ``delta * (|d| - delta / 2)`` beyond.

    Args:
        pred: images (N, C, H, W), as in `masked_l1_loss`.
        target: as `pred`.
        mask: weights, as in `masked_l1_loss`.
        delta: where the penalty turns from quadratic to linear, in the unit of the images.
        reduction: "mean", "sum" or "none".
        normalize: the denominator D: "mask", "image" or "sample".
        process_group: for a mean over all ranks, as in `masked_l1_loss`.
        backend: None (automatic), "reference", "cpu", "triton" or "cuda", as in `masked_l1_loss`.

    Returns:
        A scalar, or for ``reduction="none"`` a tensor like `pred`; float32, float64 if an input is float64.

    Differentiable in `pred` and `target`, twice; keeps references to both. Raises as `masked_l1_loss`.

    Huber, "Robust Estimation of a Location Parameter", 1964, scaled as ``torch.nn.functional.huber_loss``.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> ik.masked_huber_loss(torch.full((1, 3, 4, 4), 3.0), torch.zeros(1, 3, 4, 4))
        tensor(2.5000)
    """
    delta = _checks.check_positive("delta", delta)
    return _masked_loss(pred, target, mask, "huber", delta, reduction, normalize, process_group, backend)
