"""Gradient loss: structure across the border of an inpainted hole, from the kernels of total variation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference import gradient_loss as reference
from ..reference._common import accumulate_dtype
from ..reference.hole_valid import region_weights
from . import _checks, _pairs, _pixel
from .stacked_images import serving, stacked_images
from .total_variation import _op as kernels
from .total_variation import total_variation_loss

REGIONS = ("image", "hole", "dilated_hole", "ring")


def _from_kernels(
    pred: Tensor, target: Tensor, mask: Tensor | None, region: str, ring: int, mask_is: str, **options: Any
) -> tuple[Tensor, Tensor]:
    """As the reference, from the total variation of d = h * (pred - target) with `options`."""
    difference = pred.to(accumulate_dtype(pred, target)) - target
    weights: Tensor | None = None
    if mask is not None and region != "image":
        weights = reference.region_map(region_weights(difference, difference, mask, mask_is)[0], region, ring)
    if mask is None:
        value = total_variation_loss(difference, region="image", **options)
    elif region == "ring":
        # Detached, for it is not read, and a gradient to it would be a whole image of zeros.
        unread = difference.detach()
        serves = serving(options["backend"])
        d = stacked_images(difference, unread, mask, parts=("hole_raw",), mask_is=mask_is, backend=serves)
        value = total_variation_loss(d, weights, region="hole", mask_is="hole", **options)
    else:
        # d is the composite of the difference and zeros, which the kernel need not write; few bytes of zeros will do.
        zeros = torch.zeros_like(difference, dtype=torch.float16)
        options |= {"target": zeros, "mask_is": mask_is}
        value = total_variation_loss(difference, mask, region=region, **options)
    summed = reference.pairs(difference, weights)[2]
    return value * torch.where(summed == 0, 0.0, difference.numel() / summed), summed


def gradient_loss(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    region: str = "ring",
    ring: int = 5,
    penalty: str = "l1",
    mask_is: str = "valid",
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Penalty of the differences of neighbours in the composite minus those in the truth: structure across the seam.

    With h = 1 - `mask` (1 in the hole) and d = ``composite(pred, target, mask) - target = h * (pred - target)``:
    ``sum over pairs of w * p(d_next - d_this) / sum over pairs of w``, the pairs down and across taken together, the
    weights broadcast over the channels. A pair weighs 1 (``region="image"``), or the product of the values at its two
    pixels of h ("hole"), of h dilated by one pixel, a 3x3 maximum ("dilated_hole"), or of the hole together with a
    band of `ring` pixels on both sides of its border ("ring"): ``R = clip(h + dilate(h) - erode(h), 0, 1)``, with
    maximum and minimum of h over the square of ``2 * ring + 1`` pixels, which ends at the border of the image.

    Args:
        pred: images (N, C, H, W); float16, bfloat16, float32 or float64, any strides.
        target: the truth, as `pred` in shape and device; its dtype may differ.
        mask: 1 = known, 0 = hole, fractions mix; shapes and dtypes as `hole_valid_loss`. None, for region "image"
            alone, compares all of `pred`: d = pred - target.
        region: "image", "hole", "dilated_hole" or "ring", see above.
        ring: width of the band on each side of the border, in pixels, 0 or more; read by "ring" alone.
        penalty: "l1", or "l2" for the squared difference.
        mask_is: "valid", or "hole" for a mask that is 1 inside the hole.
        process_group: for a mean over all ranks, as in `masked_l1_loss`: the summed weights are those of all ranks.
        backend: None (automatic), "reference", "cpu", "triton" or "cuda".

    Returns:
        A scalar, float32, float64 if an image is float64. No pair, or an empty region, gives 0 with zero gradient.

    Differentiable in `pred` and `target` (l1: subgradient 0 where two differences are equal), twice. If `mask`
    requires a gradient the differentiable reference runs instead of a kernel. The l1 gradient keeps 4 bits an
    element, on the CPU 1 more a pixel of the mask, and for "ring" R; the l2 gradient keeps the difference of the
    images. What lies on known pixels is ignored, even NaN.

    Raises:
        TypeError: an argument is no tensor or has a dtype not listed above, or `ring` is no integer.
        ValueError: shapes or devices disagree, the mask is missing, `ring` is negative, or an option is unknown.
        RuntimeError: the `backend` asked for cannot run, with the reason.

    Released inpainting code compares the Sobel magnitudes of the luma over the hole and a ring around its border;
    this loss compares the differences of neighbours in every channel.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> pred, target, mask = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), torch.tensor([[1.0, 1.0, 0.0, 0.0]])
        >>> ik.gradient_loss(pred, target, mask, ring=1)
        tensor(0.5000)
    """
    _checks.check_images(pred, target)
    _checks.check_choice("region", region, REGIONS)
    _checks.check_choice("penalty", penalty, _pairs.PENALTIES)
    _checks.check_choice("mask_is", mask_is, ("valid", "hole"))
    _checks.check_count("ring", ring, 0)
    if mask is not None:
        mask = _checks.check_mask(mask, pred)
    elif region != "image":
        raise ValueError(
            f"mask is missing: region={region!r} needs it to tell the hole from the known pixels; "
            "region='image' does without"
        )
    if process_group is not None:
        _pixel.check_group(process_group, mask)
    chosen = kernels.choose(backend, (pred, target, mask), pred.dtype, target.dtype, mask=mask)
    if chosen == "reference":
        loss, summed = reference.gradient_loss(pred, target, mask, region, ring, penalty, mask_is)
    else:
        options = {"penalty": penalty, "normalize": "image", "backend": chosen}
        loss, summed = _from_kernels(pred, target, mask, region, ring, mask_is, **options)
    if process_group is not None:
        (loss,) = _pixel.global_means((loss,), (summed,), process_group)
    return loss
