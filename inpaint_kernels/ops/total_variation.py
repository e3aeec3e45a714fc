"""Total variation of an image or of a composite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..reference import hole_valid
from ..reference import total_variation as reference
from ..reference._common import accumulate_dtype, masked_input
from ..reference.composite import composite
from ..reference.masked_l1 import masked_loss_grad
from . import _checks, _pairs, _pixel


def _fake(
    backend: str, image: Tensor, target: Tensor | None, mask: Tensor | None, *options: Any
) -> tuple[Tensor, ...]:
    dtype = accumulate_dtype(image, image if target is None else target)
    empties = _pixel.empties(image, dtype, (), (2,))
    return *empties, _pairs.fake_signs(image, 4, options[-1], backend, mask)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    region, penalty, _, mask_is_hole, _ = inputs[3:]
    options = inputs[1] is not None, region, penalty, mask_is_hole
    _pixel.save_differences(ctx, inputs[:3], penalty, options, *output[1:])


def _formula(
    ctx: Any, grad: Tensor, scale: Tensor, signs: None, mask: Any, image: Tensor, target: Any
) -> tuple[Tensor, Tensor]:
    is_composite, region, penalty, mask_is_hole = ctx.options
    mask_is = "hole" if mask_is_hole else "valid"
    x = image.to(scale.dtype)
    if is_composite:
        x = composite(x, target.to(scale.dtype), mask, mask_is=mask_is)
    across_weight = down_weight = None
    if region != "image":
        hole, _ = hole_valid.region_weights(x, x, mask, mask_is)
        down_weight, across_weight, _ = reference.pair_weights(hole, region)
    across = masked_loss_grad(x[..., 1:], x[..., :-1], across_weight, grad * scale[1], penalty, 0.0)
    down = masked_loss_grad(x[..., 1:, :], x[..., :-1, :], down_weight, grad * scale[0], penalty, 0.0)
    pad = torch.nn.functional.pad
    value = pad(across, (1, 0)) - pad(across, (0, 1)) + pad(down, (0, 0, 1, 0)) - pad(down, (0, 0, 0, 1))
    if not is_composite:
        return value, value
    hole, valid = hole_valid.region_weights(value, value, mask, mask_is)
    return masked_input(value, hole), masked_input(value, valid)


def _backward(ctx: Any, kernel: Any, needs: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    return _pixel.backward(ctx, _op, kernel, needs, (grad,), None if ctx.options[2] == "l1" else _formula)


_op = _library.Op(
    "total_variation",
    schema="(Tensor image, Tensor? target, Tensor? mask, str region, str penalty, str normalize, "
    "bool mask_is_hole, bool save_signs) -> (Tensor, Tensor, Tensor)",
    backward_schema="(Tensor grad, Tensor scale, Tensor? signs, Tensor? mask, Tensor? image, Tensor? target, "
    f"{_pixel.IMAGE.replace('pred_dtype', 'image_dtype')}, bool composite, str region, str penalty, "
    "bool mask_is_hole, bool need_image, bool need_target) -> (Tensor, Tensor)",
    outputs=1,
    fake=_fake,
    backward_fake=_pixel.gradients_fake(1, 6),
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
    loss: Tensor = _pixel.call(
        _op,
        lambda: reference.total_variation(image, mask, region, penalty, normalize, mask_is, target),
        backend,
        (image, target, mask),
        (region, penalty, normalize, mask_is == "hole"),
        l1=penalty == "l1",
    )
    if process_group is not None:
        count = _pairs.pair_count(image, mask, region, normalize, mask_is)
        (loss,) = _pixel.global_means((loss,), (count,), process_group)
    return loss
