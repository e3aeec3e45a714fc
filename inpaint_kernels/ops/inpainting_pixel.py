"""Hole, valid and total variation of the composite from one pass over the images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .. import _library
from ..reference import inpainting_pixel as reference
from ..reference._common import accumulate_dtype
from . import _checks, _pairs, _pixel
from ._named_tuples import serializable
from .hole_valid import hole_valid_loss, region_counts
from .total_variation import total_variation_loss


@serializable
class InpaintingPixel(NamedTuple):
    """Terms of `inpainting_pixel_loss`: the weighted total and the raw terms, scalars on the images' device."""

    total: Tensor
    hole: Tensor
    valid: Tensor
    tv: Tensor


def _fake(backend: str, pred: Tensor, target: Tensor, mask: Tensor, *options: Any) -> tuple[Tensor, ...]:
    sizes: list[tuple[Any, ...]] = [(), (), (), (), (pred.shape[0], 2), (2,)]
    empties = _pixel.empties(pred, accumulate_dtype(pred, target), *sizes)
    return *empties, _pairs.fake_signs(pred, 6, options[-1], backend, mask)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pred, target, mask, *weights, _, tv_region, _, mask_is_hole, _ = inputs
    _pixel.save(ctx, pred, target, (*weights, tv_region, mask_is_hole), *output[4:], mask)


def _backward(ctx: Any, kernel: Any, needs: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return _pixel.backward(ctx, _op, kernel, needs, grads)


_op = _library.Op(
    "inpainting_pixel",
    schema="(Tensor pred, Tensor target, Tensor mask, float hole_weight, float valid_weight, float tv_weight, "
    "str normalize, str tv_region, str tv_normalize, bool mask_is_hole, bool save_signs) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    backward_schema="(Tensor? grad_total, Tensor? grad_hole, Tensor? grad_valid, Tensor? grad_tv, Tensor scale, "
    f"Tensor tv_scale, Tensor signs, Tensor mask, {_pixel.IMAGE}, float hole_weight, float valid_weight, "
    "float tv_weight, str tv_region, bool mask_is_hole, bool need_pred, bool need_target) -> (Tensor, Tensor)",
    outputs=4,
    fake=_fake,
    backward_fake=_pixel.gradients_fake(4, 8),
    save=_save,
    backward=_backward,
)


def inpainting_pixel_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    hole_weight: float = 6.0,
    valid_weight: float = 1.0,
    tv_weight: float = 0.1,
    normalize: str = "image",
    tv_region: str = "dilated_hole",
    tv_penalty: str = "l1",
    tv_normalize: str | None = None,
    mask_is: str = "valid",
    process_group: Any = None,
    backend: str | None = None,
) -> InpaintingPixel:
    """The pixel terms of an inpainting objective, from one pass over the images forward and one backward.

    ``total = hole_weight * hole + valid_weight * valid + tv_weight * tv`` with hole and valid as `hole_valid_loss`
    and tv as ``total_variation_loss(pred, mask, target=target)``, that of the composite, which is never written.

    Args:
        pred: images (N, C, H, W); float16, bfloat16, float32 or float64, any strides. NCHW and channels_last are
            read in place, other strides through a copy.
        target: as `pred` in shape and device; its dtype may differ, a differing layout is copied.
        mask: 1 = known, 0 = hole; shapes and dtypes as `hole_valid_loss`.
        hole_weight, valid_weight, tv_weight: factors of the terms in the total.
        normalize: of hole and valid: "image", "mask" or "sample", as `hole_valid_loss`.
        tv_region: "image", "hole", "dilated_hole" or "first_pixel", as `total_variation_loss`.
        tv_penalty: "l1", or "l2", for which hole and valid take one pass and total variation another.
        tv_normalize: "pairs", "image", "mask" or None, as `total_variation_loss`.
        mask_is: "valid", or "hole" for a mask that is 1 inside the hole (flipped inside the kernel, for free).
        process_group: for means over all ranks, as in `masked_l1_loss`; one all-reduce for all counts. For
            ``tv_normalize="pairs"`` see `total_variation_loss`.
        backend: None (automatic), "reference", "cpu", "triton" or "cuda".

    Returns:
        ``InpaintingPixel(total, hole, valid, tv)``: scalars, the last three unweighted; float32, float64 if an
        image is float64.

    Differentiable in `pred` and `target` through every one of the four (subgradient 0 at ties), twice. If `mask`
    requires a gradient the differentiable reference runs instead of a kernel. 6 bits an element are kept for the
    gradient, on the CPU 1 more a pixel of the mask.

    Raises:
        TypeError: an argument is no tensor or has a dtype not listed above.
        ValueError: shapes or devices disagree, or an option is unknown.
        RuntimeError: the `backend` asked for cannot run, with the reason.

    Liu et al., "Image Inpainting for Irregular Holes Using Partial Convolutions", 2018: the defaults.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> pred, target = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
        >>> mask = torch.ones(1, 1, 4, 4)
        >>> mask[..., 0] = 0
        >>> terms = ik.inpainting_pixel_loss(pred, target, mask)
        >>> terms.hole, terms.valid, terms.tv
        (tensor(0.2500), tensor(0.7500), tensor(0.2500))
        >>> terms.total  # 6 * 0.25 + 0.75 + 0.1 * 0.25
        tensor(2.2750)
    """
    _checks.check_images(pred, target)
    mask = _checks.check_mask(mask, pred)
    weights = (
        _checks.check_number("hole_weight", hole_weight),
        _checks.check_number("valid_weight", valid_weight),
        _checks.check_number("tv_weight", tv_weight),
    )
    _checks.check_choice("normalize", normalize, _checks.NORMALIZATIONS)
    _checks.check_choice("mask_is", mask_is, ("valid", "hole"))
    tv_norm = _pairs.check_options("tv_", tv_region, tv_penalty, tv_normalize)
    if process_group is not None:
        _pixel.check_group(process_group, mask)
    chosen = _op.choose(backend, (pred, target, mask), pred.dtype, target.dtype, mask=mask)
    terms: Sequence[Tensor]
    if chosen == "reference":
        terms = reference.inpainting_pixel(
            pred, target, mask, normalize, tv_region, tv_penalty, tv_norm, mask_is
        )
    elif tv_penalty == "l2":
        where: dict[str, Any] = {"mask_is": mask_is, "backend": chosen}
        hole, valid = hole_valid_loss(pred, target, mask, normalize=normalize, **where)
        tv = total_variation_loss(
            pred, mask, target=target, region=tv_region, penalty="l2", normalize=tv_norm, **where
        )
        terms = hole, valid, tv
    else:
        grad = _pixel.needs_grad(pred, target)
        options = (*weights, normalize, tv_region, tv_norm, mask_is == "hole", grad)
        total, *terms = _op(chosen, grad, pred, target, mask, *options)
        if process_group is None:
            return InpaintingPixel(total, *terms)
    if process_group is not None:
        counts = (
            *region_counts(pred, target, mask, normalize, mask_is),
            _pairs.pair_count(pred, mask, tv_region, tv_norm, mask_is),
        )
        terms = _pixel.global_means(terms, counts, process_group)
    hole, valid, tv = terms
    return InpaintingPixel(weights[0] * hole + weights[1] * valid + weights[2] * tv, hole, valid, tv)
