"""Hole and valid pixel losses from one pass over the images."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from .. import _library
from ..reference import hole_valid as reference
from ..reference._common import accumulate_dtype
from ..reference.masked_l1 import masked_loss_grad
from . import _checks, _pixel
from ._named_tuples import serializable


@serializable
class HoleValid(NamedTuple):
    """The two terms of `hole_valid_loss`, scalars on the device of the images."""

    hole: Tensor
    valid: Tensor


def _fake(backend: str, pred: Tensor, target: Tensor, mask: Tensor, *options: Any) -> tuple[Tensor, ...]:
    empties = _pixel.empties(pred, accumulate_dtype(pred, target), (), (), (pred.shape[0], 2))
    return *empties, _pixel.fake_signs(pred, options[-1], backend, mask, regions=2)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    penalty, param, _, mask_is_hole, _ = inputs[3:]
    _pixel.save_differences(ctx, inputs[:3], penalty, (penalty, param, mask_is_hole), *output[2:])


def _formula(
    ctx: Any,
    grad_hole: Tensor | None,
    grad_valid: Tensor | None,
    scale: Tensor,
    signs: None,
    mask: Tensor,
    pred: Tensor,
    target: Tensor,
) -> tuple[Tensor, Tensor]:
    penalty, param, mask_is_hole = ctx.options
    regions = reference.region_weights(scale, scale, mask, "hole" if mask_is_hole else "valid")
    value = scale.new_zeros(())
    for column, (grad, weight) in enumerate(zip((grad_hole, grad_valid), regions, strict=True)):
        if grad is not None:
            coefficient = grad * scale[:, column, None, None, None]
            value = value + masked_loss_grad(pred, target, weight, coefficient, penalty, param)
    return value, -value


def _backward(ctx: Any, kernel: Any, needs: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _pixel.backward(ctx, _op, kernel, needs, grads, None if ctx.options[0] == "l1" else _formula)


_op = _library.Op(
    "hole_valid",
    schema="(Tensor pred, Tensor target, Tensor mask, str penalty, float param, str normalize, "
    "bool mask_is_hole, bool save_signs) -> (Tensor, Tensor, Tensor, Tensor)",
    backward_schema="(Tensor? grad_hole, Tensor? grad_valid, Tensor scale, Tensor? signs, Tensor mask, "
    f"Tensor? pred, Tensor? target, {_pixel.IMAGE}, str penalty, float param, bool mask_is_hole, bool need_pred, "
    "bool need_target) -> (Tensor, Tensor)",
    outputs=2,
    fake=_fake,
    backward_fake=_pixel.gradients_fake(2, 7),
    save=_save,
    backward=_backward,
)


def region_counts(
    pred: Tensor, target: Tensor, mask: Tensor, normalize: str, mask_is: str
) -> tuple[Tensor, Tensor]:
    """What the hole and the valid term divide by."""
    hole, valid = reference.region_weights(pred, target, mask.detach(), mask_is)
    return _pixel.mean_count(pred, hole, normalize), _pixel.mean_count(pred, valid, normalize)


def hole_valid_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    penalty: str = "l1",
    normalize: str = "image",
    mask_is: str = "valid",
    eps: float = 1e-3,
    delta: float = 1.0,
    process_group: Any = None,
    backend: str | None = None,
) -> HoleValid:
    """The pixel loss inside the hole and the one on known pixels, from one pass over the images.

    With v = `mask` (1 = known) and h = 1 - v: ``hole = sum(h * p(pred - target)) / D_hole`` and
    ``valid = sum(v * p(pred - target)) / D_valid``. ``normalize="image"`` divides both by the number of elements of
    `pred`, ``"mask"`` each by its own summed weights (broadcast over channels), ``"sample"`` per sample, followed by
    the mean over all N samples. A region without pixels gives 0 with zero gradient.

    Args:
        pred: images (N, C, H, W); float16, bfloat16, float32 or float64, any strides. NCHW and channels_last are
            read in place, other strides through a copy.
        target: as `pred` in shape and device; its dtype may differ, a differing layout is copied.
        mask: 1 = known, 0 = hole, fractions belong to both in proportion: (N, 1, H, W), (1, 1, H, W), (H, W),
            (N, C, H, W) or any 4-D shape that broadcasts; floating, bool or an integer
            (nonzero counts as 1).
        penalty: "l1", "l2", "charbonnier" or "huber".
        normalize: "image", "mask" or "sample", see above.
        mask_is: "valid", or "hole" for a mask that is 1 inside the hole (flipped inside the kernel, for free).
        eps: of "charbonnier", in the unit of the images.
        delta: of "huber", in the unit of the images.
        process_group: for means over all ranks, as in `masked_l1_loss`; one all-reduce for both counts.
        backend: None (automatic), "reference", "cpu", "triton" or "cuda".

    Returns:
        ``HoleValid(hole, valid)``: two scalars, float32, float64 if an input is float64.

    Differentiable in `pred` and `target` (l1: subgradient 0 where they are equal), twice. If `mask` requires a
    gradient the differentiable reference runs instead of a kernel. For the l1 gradient 2 bits an element
    are kept, on the CPU 1 more a pixel.

    Raises:
        TypeError: an argument is no tensor or has a dtype not listed above.
        ValueError: shapes or devices disagree, or an option is unknown.
        RuntimeError: the `backend` asked for cannot run, with the reason.

    Liu et al., "Image Inpainting for Irregular Holes Using Partial Convolutions", 2018 (6 * hole + valid, both
    divided by the element count of the whole image).

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> pred, target = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
        >>> mask = torch.ones(1, 1, 4, 4)
        >>> mask[..., 0] = 0
        >>> ik.hole_valid_loss(pred, target, mask)
        HoleValid(hole=tensor(0.2500), valid=tensor(0.7500))
    """
    _checks.check_images(pred, target)
    mask = _checks.check_mask(mask, pred)
    _checks.check_choice("penalty", penalty, _checks.PENALTIES)
    _checks.check_choice("normalize", normalize, _checks.NORMALIZATIONS)
    _checks.check_choice("mask_is", mask_is, ("valid", "hole"))
    param = 0.0
    if penalty == "charbonnier":
        param = _checks.check_positive("eps", eps)
    elif penalty == "huber":
        param = _checks.check_positive("delta", delta)
    if process_group is not None:
        _pixel.check_group(process_group, mask)
    terms = _pixel.call(
        _op,
        lambda: reference.hole_valid(pred, target, mask, penalty, param, normalize, mask_is),
        backend,
        (pred, target, mask),
        (penalty, param, normalize, mask_is == "hole"),
        l1=penalty == "l1",
    )
    if process_group is not None:
        counts = region_counts(pred, target, mask, normalize, mask_is)
        terms = _pixel.global_means(terms, counts, process_group)
    return HoleValid(*terms)
