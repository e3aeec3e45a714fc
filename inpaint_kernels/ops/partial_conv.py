"""Partial convolution in two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import partial_conv as reference
from ..reference.masked_l1 import accumulate_dtype
from . import _checks, _mask_planes
from ._mask_planes import Geometry
from ._partial_conv import op

NUMERATORS = ("window", "one")
UPDATES = ("clamp", "binary", "proportional")
ACTIVATIONS = ("none", "relu", "leaky_relu")
Size = int | Sequence[int]


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
            (N, Cin, H, W) for a multi-channel mask; any floating dtype, bool or uint8; never negative.
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
    with an activation the output. What is computed from a mask is remembered while the mask lives (at most 256 MiB
    in all) and found again by other layers, by the backward and by later steps; torch's in-place operations are
    noticed, writes through `mask.data` or NumPy are not. Do not write into a new mask that others still use.

    Raises:
        TypeError: input, weight, bias or mask is no tensor of an allowed dtype.
        ValueError: shapes do not fit, or an option is unknown.
        RuntimeError: the `backend` asked for cannot run, with the reason.

    Liu et al., "Image Inpainting for Irregular Holes Using Partial Convolutions", 2018; NVIDIA/partialconv. MAT's
    layer is ``mask_input=False, scale_bias=True, activation="leaky_relu", negative_slope=0.2`` with weight and bias
    multiplied by its gain.

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
    _check_tensors(dims, input, weight, bias, groups)
    _checks.check_choice("numerator", numerator, NUMERATORS)
    _checks.check_choice("mask_update", update, UPDATES)
    _checks.check_choice("activation", activation, ACTIVATIONS)
    if not 0 <= slope <= 1e18:
        # The sign of the output has to tell the sign before the activation.
        raise ValueError(f"negative_slope must be a number from 0 on, got {slope!r}")
    if mask is not None:
        multi_channel = _check_mask(mask, input, multi_channel)
    strides, dilations = _sizes("stride", stride, dims, 1), _sizes("dilation", dilation, dims, 1)
    kernel = tuple(weight.shape[2:])
    pads, extra = _paddings(padding, strides, dilations, kernel)
    if any(extra):
        # An even kernel with "same": torch pads what is missing at the end.
        if mask is None:
            mask = torch.ones((1, 1, *input.shape[2:]), dtype=torch.float32, device=input.device)
        around = [side for pad in reversed(extra) for side in (0, pad)]
        input, mask = F.pad(input, around), F.pad(mask, around)
    geometry = Geometry(
        kernel, strides, pads, dilations, input.shape[1], groups, bool(multi_channel), numerator, update
    )
    if any(size < 1 for size in _mask_planes.output_size(input.shape[2:], kernel, strides, pads, dilations)):
        raise ValueError(
            f"weight's windows {kernel} (dilation {dilations}) do not fit into input {tuple(input.shape)} with "
            f"padding {pads}"
        )
    kind = input.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        low = torch.get_autocast_dtype(kind)
        input, weight = (t if t.dtype == torch.float64 else t.to(low) for t in (input, weight))
    if input.dtype != weight.dtype:
        raise TypeError(f"weight has dtype {weight.dtype}, input has {input.dtype}")

    dtype = accumulate_dtype(input)
    weighted = mask is not None and mask.requires_grad and torch.is_grad_enabled()
    if weighted and backend is None:
        backend = "reference"
    chosen = op.choose(backend, input.device, input.dtype)
    if weighted and chosen != "reference":
        raise RuntimeError(
            f"backend {chosen!r} computes no gradient to mask; use backend='reference' or mask.detach()"
        )
    # A graph for other programs holds torch's own operators only.
    if torch.compiler.is_exporting() or torch._C._get_tracing_state():
        chosen = "reference"
    channels = weight.shape[0] if multi_channel else 1
    view = (1 if mask is None or mask.ndim == dims else mask.shape[0], channels)
    if weighted:
        ratio, planes = _mask_planes.compute(
            "reference", mask, input.shape[2:], input.device, geometry, dtype
        )
        new_mask = _mask_planes.expand(planes, view)
    else:
        ratio, planes, new_mask = _mask_planes.find(
            chosen, mask, input.shape[2:], input.device, geometry, dtype, view
        )
    if chosen == "reference":
        out = reference.partial_conv(
            input,
            weight,
            bias,
            _mask_planes.narrowed(mask, dims) if mask is not None and mask_input else None,
            ratio,
            planes,
            strides,
            pads,
            dilations,
            groups,
            reference.weighs_bias(bias is not None, update, scale_bias),
            scale_bias,
            activation,
            slope,
        )
        return PartialConvOutput(out, new_mask)
    needs = torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )
    out = op(
        chosen,
        needs,
        input,
        weight,
        bias,
        mask,
        ratio,
        planes,
        strides,
        pads,
        dilations,
        groups,
        geometry.multi_channel,
        mask_input,
        scale_bias,
        activation,
        float(slope),
        numerator,
        update,
    )
    return PartialConvOutput(out, new_mask)


def _check_tensors(dims: int, input: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    spatial = "D, H, W" if dims == 3 else "H, W"
    for name, value in (("input", input), ("weight", weight), ("bias", bias)):
        if value is None and name == "bias":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
        if value.dtype not in _checks.FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
        if value.device != input.device:
            raise ValueError(f"{name} is on {value.device}, input is on {input.device}")
    if input.ndim != dims + 2:
        raise ValueError(f"input must have shape (N, C, {spatial}), got {tuple(input.shape)}")
    if weight.ndim != dims + 2:
        raise ValueError(
            f"weight must have shape (Cout, Cin / groups, k{spatial.lower().replace(', ', ', k')}), got "
            f"{tuple(weight.shape)}"
        )
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be a positive int, got {groups!r}")
    if weight.shape[1] * groups != input.shape[1] or weight.shape[0] % groups:
        raise ValueError(
            f"weight {tuple(weight.shape)} with groups={groups} takes {weight.shape[1] * groups} input channels and "
            f"a multiple of {groups} output channels; input has {input.shape[1]} channels"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def _check_mask(mask: Tensor, input: Tensor, multi_channel: bool | None) -> bool:
    """Whether windows count all channels."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a Tensor, got {type(mask).__name__}")
    if mask.dtype not in _checks.MASK_DTYPES:
        raise TypeError(f"mask must be floating, bool or uint8, got {mask.dtype}")
    if mask.device != input.device:
        raise ValueError(f"mask is on {mask.device}, input is on {input.device}")
    shape, full = tuple(mask.shape), tuple(input.shape)
    # No `shape[0] in (1, full[0])`: torch.compile finds no symbolic size in a tuple.
    fits = shape == full[2:] or (
        len(shape) == len(full)
        and (shape[0] == 1 or shape[0] == full[0])
        and (shape[1] == 1 or shape[1] == full[1])
        and shape[2:] == full[2:]
    )
    if not fits:
        spatial = "D, H, W" if len(full) == 5 else "H, W"
        raise ValueError(
            f"mask has shape {shape}; for input {full} allowed: (N, 1, {spatial}), (1, 1, {spatial}), ({spatial}), "
            f"(N, Cin, {spatial})"
        )
    channels = shape[1] if len(shape) == len(full) else 1
    if multi_channel is False and channels > 1:
        raise ValueError(
            f"mask has {channels} channels and multi_channel is False: give one channel, or multi_channel=True"
        )
    return channels > 1 if multi_channel is None else multi_channel


def _sizes(name: str, value: Size, dims: int, least: int) -> tuple[int, ...]:
    """One int for each dimension."""
    found = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(found) != dims or not all(isinstance(n, (int, torch.SymInt)) and n >= least for n in found):
        raise ValueError(f"{name} must be an int or {dims} ints, each at least {least}, got {value!r}")
    return found


def _paddings(
    padding: Size | str, stride: tuple[int, ...], dilation: tuple[int, ...], kernel: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(padding on both sides, more of it at the end) of each dimension."""
    none = (0,) * len(kernel)
    if padding == "valid":
        return none, none
    if padding == "same":
        if any(step != 1 for step in stride):
            raise ValueError(f"padding='same' needs stride 1, got {stride}")
        total = [spread * (extent - 1) for spread, extent in zip(dilation, kernel, strict=True)]
        return tuple(n // 2 for n in total), tuple(n % 2 for n in total)
    if isinstance(padding, str):
        raise ValueError(f"padding must be an int, {len(kernel)} ints, 'same' or 'valid', got {padding!r}")
    return _sizes("padding", padding, len(kernel), 0), none
