"""Partial convolution in two and three dimensions."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _library, _torch_private
from ..reference import partial_conv as reference
from . import _checks, _partial_conv_plan
from ._named_tuples import serializable
from ._partial_conv import op, window
from ._partial_conv_plan import Size


@serializable
class PartialConvOutput(NamedTuple):
    """`output` of a partial convolution and the `new_mask` that belongs to it."""

    output: Tensor
    new_mask: Tensor


def partial_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    multi_channel: bool | None = None,
    numerator: str = "window",
    mask_update: str = "clamp",
    mask_input: bool = True,
    scale_bias: bool = False,
    activation: str = "none",
    negative_slope: float = 0.01,
    backend: str | None = None,
) -> PartialConvOutput:
    """Convolution that sees known pixels only, rescaled by how much of each window is known.

    With s the mask summed over a window and K the number of mask values in it (kh kw, times the input channels of a
    group for a multi-channel mask)::

        new_mask = min(s, 1)
        ratio    = K / s * new_mask                     where s > 0, else 0
        output   = conv(input * mask, weight) * ratio                       without bias
        output   = (conv(input * mask, weight) * ratio + bias) * new_mask   with bias

    followed by the activation. Zero padding counts as unknown; without a mask everything else is known ("partial
    convolution padding"). Sums are exact and there is no epsilon: half precision and empty windows give no NaN. What
    lies under mask 0 is ignored even when it is NaN.

    Args:
        input: (N, Cin, H, W); float16, bfloat16, float32 or float64 (`reference` and `cpu`). Under autocast, input,
            weight and bias are cast as for F.conv2d.
        weight: (Cout, Cin / groups, kh, kw), of the input's dtype.
        bias: (Cout,), floating, or None.
        mask: 1 = known, 0 = hole: (N, 1, H, W), (1, 1, H, W) or (H, W) for one plane shared by all channels,
            (N, Cin, H, W) for a multi-channel mask; floating, bool or an integer (nonzero counts as 1);
            never negative.
        stride, padding, dilation, groups: as in F.conv2d; padding may be "same" or "valid".
        multi_channel: whether windows count all channels; by default, whether the mask has several. True spreads a
            single-channel mask over all channels.
        numerator: "window" for K (NVIDIA), "one" for 1 (the authors' FAQ, naoto0804).
        mask_update: what becomes of the window sum. "clamp": as above, which gives windows with s < 1 of a fractional
            mask the constant factor K. "binary": new_mask = 1 where s > 0, ratio = K / s. "proportional": for
            soft masks, new_mask = s / K and ratio = K / s, so the output is the mean of the window weighted by the
            mask (normalised convolution) and the new mask its mean confidence; the bias is added whole, as with
            "binary".
        mask_input: False convolves the input as it is (MAT).
        scale_bias: True adds the bias and applies the activation before the ratio, `act(conv + bias) * ratio` (MAT).
        activation: "none", "relu" or "leaky_relu", in the same pass.
        negative_slope: of "leaky_relu", not negative.
        backend: None (automatic), "reference", "cpu", "triton" or "cuda".

    Returns:
        PartialConvOutput(output, new_mask). output is (N, Cout, Ho, Wo) in the input's dtype, channels_last if the
        input or the weight is. new_mask is float32 (float64 for float64 input): (N, 1, Ho, Wo) for a single-channel
        mask, (N, Cout, Ho, Wo) for a multi-channel one (an expanded view unless groups > 1); N is the mask's batch.

    Differentiable in `input`, `weight` and `bias`, twice. A mask gets no gradient, unless it requires one: then the
    differentiable reference runs, and the new mask is part of the graph too. Saved for backward: input, weight, mask,
    the new mask and one more plane of its size, with an activation the output. Nothing is remembered from call to
    call.

    Raises:
        TypeError: input, weight, bias or mask is no tensor of an allowed dtype.
        ValueError: shapes do not fit, or an option is unknown.
        RuntimeError: the `backend` asked for cannot run, with the reason.

    Liu et al., "Image Inpainting for Irregular Holes Using Partial Convolutions", 2018; NVIDIA/partialconv. MAT's
    layer is ``mask_input=False, scale_bias=True, activation="leaky_relu", negative_slope=0.2`` with the weight times
    ``sqrt(2 / (Cin * kh * kw))`` and the bias times ``sqrt(2)``, its gains. Where it halves the image (``down=2``, a
    3x3 kernel), a low-pass filter comes first: with f = (1, 3, 3, 1) / 8 and k = outer(f, f), the input is
    ``F.conv2d(input, k.expand(Cin, 1, 4, 4), padding=2, groups=Cin)``, the mask ``F.pad(mask, (1, 0, 1, 0))``, and
    the layer has stride 2 and padding 0.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> mask = torch.tensor([[1.0, 1.0, 0.0, 0.0]]).expand(4, 4)
        >>> out, new_mask = ik.partial_conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3), mask=mask, padding=1)
        >>> out[0, 0, 0], new_mask[0, 0, 0]
        (tensor([9., 9., 9., 0.]), tensor([1., 1., 1., 0.]))
    """
    return _partial_conv(
        2, input, weight, bias, mask, stride, padding, dilation, groups, multi_channel, numerator, mask_update,
        mask_input, scale_bias, activation, negative_slope, backend,
    )  # fmt: skip


def partial_conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    *,
    multi_channel: bool | None = None,
    numerator: str = "window",
    mask_update: str = "clamp",
    mask_input: bool = True,
    scale_bias: bool = False,
    activation: str = "none",
    negative_slope: float = 0.01,
    backend: str | None = None,
) -> PartialConvOutput:
    """Partial convolution of volumes.

    `partial_conv2d` with one more dimension: K counts the kd kh kw values of a window.

    Args:
        input: (N, Cin, D, H, W), otherwise as in `partial_conv2d`.
        weight: (Cout, Cin / groups, kd, kh, kw), of the input's dtype.
        bias: (Cout,), floating, or None.
        mask: (N, 1, D, H, W), (1, 1, D, H, W), (D, H, W) or (N, Cin, D, H, W).
        stride, padding, dilation, groups: as in F.conv3d.
        multi_channel, numerator, mask_update, mask_input, scale_bias, activation, negative_slope, backend: as in
            `partial_conv2d`.

    Returns:
        PartialConvOutput(output, new_mask), (N, Cout, Do, Ho, Wo) and the new mask as in `partial_conv2d`.

    Differentiable as `partial_conv2d` is.

    Raises:
        TypeError, ValueError, RuntimeError: as `partial_conv2d`.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> out, new_mask = ik.partial_conv3d(torch.ones(1, 2, 4, 4, 4), torch.ones(3, 2, 3, 3, 3), padding=1)
        >>> out.shape, float(out[0, 0, 0, 0, 0])
        (torch.Size([1, 3, 4, 4, 4]), 54.0)
    """
    return _partial_conv(
        3, input, weight, bias, mask, stride, padding, dilation, groups, multi_channel, numerator, mask_update,
        mask_input, scale_bias, activation, negative_slope, backend,
    )  # fmt: skip


def _partial_conv(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    multi_channel: bool | None,
    numerator: str,
    update: str,
    mask_input: bool,
    scale_bias: bool,
    activation: str,
    slope: float,
    backend: str | None,
) -> PartialConvOutput:
    _partial_conv_plan.check_types(input, weight, bias, mask)
    if mask is not None:
        mask = _checks.binary(mask)
    tensors = (input, weight, bias, mask)
    device = input.device
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        low = torch.get_autocast_dtype(device.type)
        input, weight = (
            t.to(low) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (input, weight)
        )
    plain = _library.is_plain(tensors)
    make_plan = _partial_conv_plan.remembered_plan if plain else _partial_conv_plan.make_plan
    plan = make_plan(
        dims,
        (input.shape, input.dtype, device),
        (weight.shape, weight.dtype, weight.device),
        None if bias is None else (bias.shape, bias.dtype, bias.device),
        None if mask is None else (mask.shape, mask.dtype, mask.device),
        stride,
        padding,
        dilation,
        groups,
        multi_channel,
        numerator,
        update,
        scale_bias,
        activation,
        slope,
    )
    if plan.around is not None:
        if mask is None:
            mask = torch.ones((1, 1, *input.shape[2:]), dtype=torch.float32, device=device)
        input, mask = F.pad(input, plan.around), F.pad(mask, plan.around)

    grad_mode = torch.is_grad_enabled()
    weighted = grad_mode and mask is not None and mask.requires_grad
    chosen = op.choose(backend, (input, weight, bias, mask), input.dtype, mask=mask)
    # A graph for other programs holds torch's own operators only.
    exporting = not plain and (torch.compiler.is_exporting() or _torch_private.is_traced())
    if exporting:
        chosen = "reference"
    if mask is None:
        known = torch.ones((1, 1, *input.shape[2:]), dtype=plan.window[-1], device=device)
    else:
        # Of a mask that is differentiated every element is due its own derivative, and a graph must hold for other
        # strides; torch.compile guards those.
        narrow = plain or (
            torch.compiler.is_compiling() and not exporting and _library.transform_of((mask,)) is None
        )
        known = mask = _as_planes(mask.contiguous() if exporting else mask, dims, narrow and not weighted)
    if chosen == "reference":
        ratio, new_mask = reference.window_planes(known, *plan.window)
    elif plain:
        # Kernels know no autograd: below it, this takes 3 us less.
        with _library.below_autograd():
            ratio, new_mask = window[chosen](known, *plan.window)
    else:
        ratio, new_mask = window[chosen](known, *plan.window)
    given = (
        input, weight, bias, mask if mask_input else None, ratio, new_mask, *plan.where, plan.weigh_bias, scale_bias,
        activation, plan.slope,
    )  # fmt: skip
    if chosen == "reference":
        output = reference.partial_conv(*given)
    else:
        needs = input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        output = op(chosen, grad_mode and needs, *given)
    return PartialConvOutput(output, _expanded(new_mask, plan.view))


def _as_planes(mask: Tensor, spatial_dims: int, narrow: bool) -> Tensor:
    """(N, C, ...), with 1 in place of a batch or channel dimension the mask was expanded along if `narrow`."""
    if mask.ndim == spatial_dims:
        return mask[None, None]
    if narrow:
        for dim in (0, 1):
            if mask.shape[dim] > 1 and mask.stride(dim) == 0:
                mask = mask.narrow(dim, 0, 1)
    return mask


def _expanded(new_mask: Tensor, view: tuple[int, int]) -> Tensor:
    """(N, 1 or groups, ...) as (batch, channels, ...): expanded, or repeated where groups differ."""
    if new_mask.shape[:2] == view:
        return new_mask
    planes = reference.channel_planes(new_mask, view[1])
    return planes.expand(*view, *planes.shape[2:])
