"""Total variation of an image or of a composite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..reference import hole_valid, partial_conv
from ..reference import total_variation as reference
from ..reference.composite import composite
from ..reference.masked_l1 import masked_loss_grad
from . import _checks, _pairs, _pixel
from .masked_l1 import _IMAGE


def _fake(
    backend: str,
    image: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    region: str,
    penalty: str,
    normalize: str,
    mask_is_hole: bool,
    save_signs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _pixel.accumulate(image, image if target is None else target)
    return (
        image.new_empty((), dtype=dtype),
        image.new_empty(2, dtype=dtype),
        _pairs.fake_signs(image, 4, save_signs, backend, mask),
    )


def _backward_fake(
    grad: Tensor,
    scale: Tensor,
    signs: Tensor | None,
    mask: Tensor | None,
    image: Tensor | None,
    target: Tensor | None,
    size: Any,
    channels_last: bool,
    image_dtype: torch.dtype,
    target_dtype: torch.dtype,
    composite: bool,
    region: str,
    penalty: str,
    mask_is_hole: bool,
    need_image: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    return _pixel.fake_gradients(
        scale, size, channels_last, image_dtype, target_dtype, need_image, need_target
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    image, target, mask, region, penalty, _, mask_is_hole, _ = inputs
    scale, signs = output[1:]
    ctx.options = region, penalty, mask_is_hole
    ctx.composite = target is not None
    other = image if target is None else target
    ctx.image = (image.shape, _pixel.is_channels_last(image), image.dtype, other.dtype)
    if penalty == "l1":
        _library.save_for_backward(ctx, scale, signs, mask, None, None)
    else:
        _library.save_for_backward(ctx, scale, None, mask, image, target)


def _backward(ctx: Any, op: Any, needs: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None
    scale, signs, mask, image, target = ctx.saved_tensors
    region, penalty, mask_is_hole = ctx.options
    needs = needs[:2]
    if op is not None:
        found = op(grad, scale, signs, mask, image, target, *ctx.image, ctx.composite, *ctx.options, *needs)
        return found[0] if needs[0] else None, found[1] if needs[1] else None
    mask_is = "hole" if mask_is_hole else "valid"
    size, channels_last, image_dtype, target_dtype = ctx.image
    if penalty == "l1":
        # Constant almost everywhere: its second derivative by the images is zero.
        across, down = _pairs.unpack_signs(signs, 4, size, channels_last, scale.dtype, ctx.backend)
        value = _pairs.signs_gradient(
            grad * scale[1] * across, grad * scale[0] * down, mask, region, mask_is_hole
        )
    else:
        x = image.to(scale.dtype)
        if target is not None:
            x = composite(x, target.to(scale.dtype), mask, mask_is=mask_is)
        across_weight, down_weight = _pairs.weights(x, mask, region, mask_is_hole)
        value = _pairs.sum_gradient(
            masked_loss_grad(x[..., 1:], x[..., :-1], across_weight, grad * scale[1], penalty, 0.0),
            masked_loss_grad(x[..., 1:, :], x[..., :-1, :], down_weight, grad * scale[0], penalty, 0.0),
        )
    if not ctx.composite:
        return value.to(image_dtype), None
    hole, valid = hole_valid.region_weights(value, value, mask, mask_is)
    return (
        partial_conv.masked_input(value, hole).to(image_dtype) if needs[0] else None,
        partial_conv.masked_input(value, valid).to(target_dtype) if needs[1] else None,
    )


_op = _library.Op(
    "total_variation",
    schema="(Tensor image, Tensor? target, Tensor? mask, str region, str penalty, str normalize, "
    "bool mask_is_hole, bool save_signs) -> (Tensor, Tensor, Tensor)",
    backward_schema="(Tensor grad, Tensor scale, Tensor? signs, Tensor? mask, Tensor? image, Tensor? target, "
    f"{_IMAGE.replace('pred_dtype', 'image_dtype')}, bool composite, str region, str penalty, "
    "bool mask_is_hole, bool need_image, bool need_target) -> (Tensor, Tensor)",
    outputs=1,
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    backward=_backward,
)


def total_variation_loss(
    image: Tensor,
    mask: Tensor | None = None,
    *,
    target: Tensor | None = None,
    region: str = "image",
    penalty: str = "l1",
    normalize: str | None = None,
    mask_is: str = "valid",
    process_group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Total variation: the penalty of the differences between neighbouring pixels, down and across.

    ``sum_down / D_down + sum_across / D_across`` with ``sum = sum over pairs of w * p(next - this)``. With h = 1 -
    `mask` (1 in the hole) a pair weighs 1 (``region="image"``), the product of h at its two pixels ("hole"), the
    product of their values of h dilated by one pixel, a 3x3 maximum ("dilated_hole"), or h at the upper or left one
    of the two ("first_pixel").

    Args:
        image: images (N, C, H, W); float16, bfloat16, float32 or float64, any strides. NCHW and channels_last are
            read in place, other strides through a copy.
        mask: 1 = known, 0 = hole; shapes and dtypes as `hole_valid_loss`. Needed for a region and for `target`, and
            refused where neither is given, since nothing would read it.
        target: the truth: the total variation is that of ``composite(image, target, mask)``, which is formed inside
            the kernel and never written. As `image` in shape and device; its dtype may differ.
        region: "image", "hole", "dilated_hole" or "first_pixel", see above.
        penalty: "l1", or "l2" for the squared difference.
        normalize: the denominators: "pairs" = number of pairs of the axis, "image" = number of elements of `image`,
            "mask" = summed region values, broadcast over channels; None = "pairs" for the whole image, else "image".
        mask_is: "valid", or "hole" for a mask that is 1 inside the hole (flipped inside the kernel, for free).
        process_group: for a mean over all ranks, as in `masked_l1_loss`. For "pairs" the images of all ranks must
            have one height and width, for only their numbers are shared.
        backend: None (automatic), "reference", "cpu", "triton" or "cuda".

    Returns:
        A scalar, float32, float64 if an image is float64. No pair, or an empty region, gives 0 with zero gradient.

    Differentiable in `image` and `target` (l1: subgradient 0 where two pixels are equal), twice. If `mask` requires a
    gradient the differentiable reference runs instead of a kernel. For the l1 gradient 4 bits an element are kept, on
    the CPU 1 more a pixel of the mask. NaN in pairs of weight 0 is ignored.

    Raises:
        TypeError: an argument is no tensor or has a dtype not listed above.
        ValueError: shapes or devices disagree, the mask is missing or would not be read, or an option is unknown.
        RuntimeError: the `backend` asked for cannot run, with the reason.

    Liu et al., "Image Inpainting for Irregular Holes Using Partial Convolutions", 2018 (dilated hole of the
    composite); naoto0804/pytorch-inpainting-with-partial-conv (whole image); mmagic's MaskedTVLoss
    ("first_pixel" with "mask"). Where a hole reaches the image's last row or column mmagic leaves that row out of the
    denominator of the pairs down, that column out of the other one; here every pixel of the region counts.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> image = torch.arange(4.0).expand(1, 1, 4, 4)
        >>> ik.total_variation_loss(image)
        tensor(1.)
    """
    _checks.check_features("image", image)
    if target is not None:
        _checks.check_images(image, target, "image")
    _checks.check_choice("mask_is", mask_is, ("valid", "hole"))
    normalize = _pairs.check_options("", region, penalty, normalize)
    if region == "image" and target is None:
        if mask is not None:
            raise ValueError(
                "region='image' reads no mask: leave it out, or choose region='hole', 'dilated_hole' or "
                "'first_pixel'; with target= the mask makes the composite"
            )
    elif mask is None:
        needed = f"region={region!r}" if region != "image" else "target"
        raise ValueError(f"mask is missing: {needed} needs it to tell the hole from the known pixels")
    else:
        mask = _checks.check_mask(mask, image, "image")
    if process_group is not None:
        _pixel.check_group(process_group, mask)
        local = total_variation_loss(
            image,
            mask,
            target=target,
            region=region,
            penalty=penalty,
            normalize=normalize,
            mask_is=mask_is,
            backend=backend,
        )
        count = _pairs.pair_count(image, mask, region, normalize, mask_is)
        (value,) = _pixel.global_means((local,), (count,), process_group)
        return value
    other = image if target is None else target
    chosen = _op.choose(backend, (image, target, mask), image.dtype, other.dtype, mask=mask)
    if chosen == "reference":
        return reference.total_variation(
            image, mask, target=target, region=region, penalty=penalty, normalize=normalize, mask_is=mask_is
        )
    grad = _pixel.needs_grad(image, other)
    found: Tensor = _op(
        chosen,
        grad,
        image,
        target,
        mask,
        region,
        penalty,
        normalize,
        mask_is == "hole",
        grad and penalty == "l1",
    )
    return found
