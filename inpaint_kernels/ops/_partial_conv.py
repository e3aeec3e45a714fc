"""The op behind partial_conv2d and partial_conv3d."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..reference import partial_conv as reference
from . import _mask_planes
from . import _partial_conv_passes as passes
from ._mask_planes import Geometry


def _fake(backend: str, input: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    ratio = rest[2]
    size = (input.shape[0], weight.shape[0], *ratio.shape[2:])
    return torch.empty(
        size,
        dtype=input.dtype,
        device=input.device,
        memory_format=passes.dense_format(input.ndim, passes.is_last(input) or passes.is_last(weight)),
    )


def _backward_fake(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    output: Tensor | None,
    ratio: Tensor,
    new_mask: Tensor,
    input_size: Any,
    weight_size: Any,
    channels_last: list[bool],
    input_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    formats = [passes.dense_format(grad.ndim, last) for last in channels_last]
    found = [
        grad.new_empty(0, dtype=dtype)
        if other is None
        else torch.empty(size, dtype=dtype, device=grad.device, memory_format=memory_format)
        for other, size, dtype, memory_format in zip(
            (weight, input), (input_size, weight_size), (input_dtype, weight_dtype), formats, strict=True
        )
    ]
    return found[0], found[1], ratio.new_empty(grad.shape[1] if rest[-1] else 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """Of the planes nothing: they are found again, or computed again from the mask."""
    input, weight, bias, mask, ratio = inputs[:5]
    activation = inputs[13]
    needs = ctx.needs_input_grad
    _library.save_for_backward(
        ctx,
        input if needs[1] else None,
        weight if needs[0] else None,
        mask,
        output[0] if activation != "none" else None,
    )
    ctx.settings = inputs[6:]
    ctx.sizes = (tuple(input.shape), tuple(weight.shape))
    ctx.channels_last = [passes.is_last(input), passes.is_last(weight)]
    ctx.dtypes = (input.dtype, weight.dtype, None if bias is None else bias.dtype, ratio.dtype)


def _backward(ctx: Any, op: Any, needs: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    input, weight, mask, output = ctx.saved_tensors
    stride, padding, dilation, groups, multi, mask_input, scale_bias, activation, slope, numerator, update = (
        ctx.settings
    )
    input_size, weight_size = ctx.sizes
    input_dtype, weight_dtype, bias_dtype, dtype = ctx.dtypes
    geometry = Geometry(
        tuple(weight_size[2:]),
        tuple(stride),
        tuple(padding),
        tuple(dilation),
        input_size[1],
        groups,
        multi,
        numerator,
        update,
    )
    weigh_bias = reference.weighs_bias(bias_dtype is not None, update, scale_bias)
    plain = _library.is_plain((grad, mask))
    ratio, new_mask, _ = _mask_planes.find(
        ctx.backend, mask, input_size[2:], grad.device, geometry, dtype, plain
    )
    if op is None:
        shaping = (stride, padding, dilation, groups, mask_input, weigh_bias, scale_bias, activation, slope)
        found = _formula(grad, input, weight, mask, output, ratio, new_mask, ctx.sizes, input_dtype, *shaping)
    else:
        found = op(
            grad,
            input,
            weight,
            mask,
            output,
            ratio,
            new_mask,
            input_size,
            weight_size,
            ctx.channels_last,
            input_dtype,
            weight_dtype,
            stride,
            padding,
            dilation,
            groups,
            mask_input,
            weigh_bias,
            scale_bias,
            activation,
            slope,
            needs[2],
        )
    grad_input, grad_weight, grad_bias = found
    return (
        grad_input if needs[0] else None,
        grad_weight if needs[1] else None,
        None if not needs[2] else grad_bias if grad_bias.dtype == bias_dtype else grad_bias.to(bias_dtype),
    )


def _formula(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    output: Tensor | None,
    ratio: Tensor,
    new_mask: Tensor,
    sizes: Any,
    dtype: torch.dtype,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    mask_input: bool,
    weigh_bias: bool,
    scale_bias: bool,
    activation: str,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients as differentiable expressions."""
    channels = grad.shape[1]
    ratio = reference.channel_planes(ratio, channels)
    new_mask = reference.channel_planes(new_mask, channels)
    zero = torch.zeros((), dtype=ratio.dtype, device=grad.device)
    value = torch.where(new_mask == 0, zero, grad.to(ratio.dtype))
    if scale_bias:
        value = value * ratio
    if output is not None:
        value = torch.where(output > 0, value, value * (0.0 if activation == "relu" else slope))
    if weigh_bias:
        value = value * new_mask
    others = [0, *range(2, grad.ndim)]
    grad_bias = value.sum(others)
    if not scale_bias:
        value = value * ratio
    kernel_mask = passes.kernel_mask(mask, mask_input, grad)
    x = input if input is None or kernel_mask is None else reference.masked_input(input, kernel_mask)
    grad_input, grad_weight = passes.convolution_backward(
        value.to(dtype), x, weight, sizes[0], sizes[1], stride, padding, dilation, groups
    )
    if weight is not None and kernel_mask is not None:
        grad_input = reference.masked_input(grad_input, kernel_mask)
    return grad_input, grad_weight, grad_bias


op = _library.Op(
    "partial_conv",
    schema="(Tensor input, Tensor weight, Tensor? bias, Tensor? mask, Tensor ratio, Tensor new_mask, "
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, int groups, bool multi_channel, bool mask_input, "
    "bool scale_bias, str activation, float slope, str numerator, str update) -> Tensor",
    backward_schema="(Tensor grad, Tensor? input, Tensor? weight, Tensor? mask, Tensor? output, Tensor ratio, "
    "Tensor new_mask, SymInt[] input_size, SymInt[] weight_size, bool[] channels_last, ScalarType input_dtype, "
    "ScalarType weight_dtype, SymInt[] stride, SymInt[] padding, SymInt[] dilation, int groups, bool mask_input, "
    "bool weigh_bias, bool scale_bias, str activation, float slope, bool need_bias) -> (Tensor, Tensor, Tensor)",
    outputs=1,
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    backward=_backward,
    implement=(passes.forward, passes.backward),
    flops=(
        lambda input, weight, *_, out_val: 2 * out_val.numel() * math.prod(weight.shape[1:]),
        lambda grad, input, weight, *rest, out_val: (
            2 * grad.numel() * math.prod(rest[5][1:]) * ((input is not None) + (weight is not None))
        ),
    ),
)
