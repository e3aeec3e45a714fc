"""Partial convolution in two and three dimensions: torch's convolution between small kernels."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _library, _torch_private
from ..reference import partial_conv as reference
from ..reference.partial_conv import Windows
from . import _checks
from ._named_tuples import serializable
from ._partial_conv import op, window

ACTIVATIONS = reference.ACTIVATIONS
NUMERATORS = ("window", "one")
UPDATES = ("clamp", "binary", "proportional")
Size = int | Sequence[int]
SPATIAL = {2: "H, W", 3: "D, H, W"}
# Of a tensor what its values do not change: shape, dtype, device.
Kind = tuple[torch.Size, torch.dtype, torch.device]
Kinds = tuple[Kind, Kind, Kind | None, Kind | None]  # input, weight, bias, mask
# What a user sets, from `stride` to `negative_slope`, without `mask_input`.
Settings = tuple[Size, Size | str, Size, int, bool | None, str, str, bool, str, float]


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
    settings = (
        stride, padding, dilation, groups, multi_channel, numerator, mask_update, scale_bias, activation,
        negative_slope,
    )  # fmt: skip
    return _partial_conv(2, input, weight, bias, mask, mask_input, settings, backend)


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
    settings = (
        stride, padding, dilation, groups, multi_channel, numerator, mask_update, scale_bias, activation,
        negative_slope,
    )  # fmt: skip
    return _partial_conv(3, input, weight, bias, mask, mask_input, settings, backend)


def _partial_conv(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    mask_input: bool,
    settings: Settings,
    backend: str | None,
) -> PartialConvOutput:
    for name, value in (("input", input), ("weight", weight), ("bias", bias), ("mask", mask)):
        if not isinstance(value, Tensor) and (value is not None or name in ("input", "weight")):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if mask is not None:
        mask = _checks.binary(mask)
    device = input.device
    plain = _library.is_plain((input, weight, bias, mask))
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        low = torch.get_autocast_dtype(device.type)
        input, weight = (
            t.to(low) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (input, weight)
        )
    kinds: Any = tuple(
        None if t is None else (t.shape, t.dtype, t.device) for t in (input, weight, bias, mask)
    )
    plan = (_remembered_plan if plain else _make_plan)(dims, kinds, settings)
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
    window_planes = reference.window_planes if chosen == "reference" else window[chosen]
    # Kernels know no autograd: below it, this takes 3 us less.
    with _library.below_autograd() if plain and chosen != "reference" else contextlib.nullcontext():
        ratio, new_mask = window_planes(known, *plan.window)
    given = (
        input, weight, bias, mask if mask_input else None, ratio, new_mask, plan.windows, plan.how, plan.slope,
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


class _Plan(NamedTuple):
    """What a call does, whatever the values."""

    window: tuple[Any, ...]  # arguments of the window kernel after the mask
    windows: tuple[int, ...]  # `reference.Windows`, packed
    how: int  # `reference.Finish`, packed
    slope: float
    view: tuple[int, int]  # batch and channels of the new mask
    around: list[int] | None  # of F.pad: what "same" adds at the end for an even kernel


def _make_plan(dims: int, kinds: Kinds, settings: Settings) -> _Plan:
    """Raises for arguments that do not fit together."""
    stride, padding, dilation, groups, multi_channel, numerator, update, scale_bias, activation, slope = (
        settings
    )
    input, weight, bias, mask = kinds
    _check_layer(dims, kinds, groups)
    _checks.check_choice("numerator", numerator, NUMERATORS)
    _checks.check_choice("mask_update", update, UPDATES)
    _checks.check_choice("activation", activation, ACTIVATIONS)
    if not 0 <= slope <= 1e18:
        # The sign of the output has to tell the sign before the activation.
        raise ValueError(f"negative_slope must be a number from 0 on, got {slope!r}")
    if mask is not None:
        multi_channel = _check_mask(tuple(mask[0]), tuple(input[0]), multi_channel)
    channels, kernel = weight[0][0], tuple(weight[0][2:])
    strides, dilations = _sizes("stride", stride, dims, 1), _sizes("dilation", dilation, dims, 1)
    pads, extra = _paddings(padding, strides, dilations, kernel)
    around = [side for pad in reversed(extra) for side in (0, pad)] if any(extra) else None
    windows = Windows(kernel, strides, pads, dilations, groups)
    padded = [extent + more for extent, more in zip(input[0][2:], extra, strict=True)]
    if any(extent < 1 for extent in windows.output_size(padded)):
        raise ValueError(
            f"weight's windows {kernel} (dilation {dilations}) do not fit into input {tuple(input[0])} with "
            f"padding {pads}"
        )
    if input[1] != weight[1]:
        raise TypeError(f"weight has dtype {weight[1]}, input has {input[1]}")
    members = input[0][1] // groups if multi_channel else 1
    dividend = float(members * math.prod(kernel)) if numerator == "window" else 1.0
    dtype = torch.float64 if input[1] == torch.float64 else torch.float32
    # Of all updates "clamp" alone has a new mask that may be fractional where s < 1.
    weigh_bias = bias is not None and update == "clamp" and not scale_bias
    return _Plan(
        (members, windows.packed(), dividend, update, dtype),
        windows.packed(),
        reference.Finish(weigh_bias, bool(scale_bias), activation).packed(),
        0.0 if activation == "relu" else float(slope),
        (1 if mask is None or len(mask[0]) == dims else mask[0][0], channels if multi_channel else 1),
        around,
    )


# The checks and sizes of a layer took 40 us a call, 100 between convolutions that fill the caches.
_remembered = functools.lru_cache(maxsize=4096)(_make_plan)


def _remembered_plan(dims: int, kinds: Kinds, settings: Settings) -> _Plan:
    """`_make_plan`, once for the same arguments.

    Only for sizes and groups that are all ints: (1.0, 1.0) equals (1, 1), and is refused.
    """
    sizes = [tuple(value) if isinstance(value, list) else value for value in settings[:4]]
    types = {type(n) for value in sizes for n in (value if isinstance(value, tuple) else (value,))}
    if not types <= {int, str}:
        return _make_plan(dims, kinds, settings)
    return _remembered(dims, kinds, (*sizes, *settings[4:]))


def _check_layer(dims: int, kinds: Kinds, groups: int) -> None:
    input, weight, bias, _ = kinds
    for name, kind in zip(("input", "weight", "bias", "mask"), kinds, strict=True):
        if kind is None:
            continue
        if name != "mask" and kind[1] not in _checks.FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {kind[1]}")
        if kind[2] != input[2]:
            raise ValueError(f"{name} is on {kind[2]}, input is on {input[2]}")
    size, extents = tuple(input[0]), tuple(weight[0])
    spatial = SPATIAL[dims]
    if len(size) != dims + 2:
        raise ValueError(f"input must have shape (N, C, {spatial}), got {size}")
    if len(extents) != dims + 2:
        raise ValueError(
            f"weight must have shape (Cout, Cin / groups, k{spatial.lower().replace(', ', ', k')}), got {extents}"
        )
    if not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups must be a positive int, got {groups!r}")
    if extents[1] * groups != size[1] or extents[0] % groups:
        raise ValueError(
            f"weight {extents} with groups={groups} takes {extents[1] * groups} input channels and a multiple of "
            f"{groups} output channels; input has {size[1]} channels"
        )
    if bias is not None and tuple(bias[0]) != extents[:1]:
        raise ValueError(f"bias must have shape ({extents[0]},), got {tuple(bias[0])}")


def _check_mask(shape: tuple[int, ...], full: tuple[int, ...], multi_channel: bool | None) -> bool:
    """Whether windows count all channels of an input of shape `full`."""
    # No `shape[0] in (1, full[0])`: torch.compile finds no symbolic size in a tuple.
    fits = shape == full[2:] or (
        len(shape) == len(full)
        and (shape[0] == 1 or shape[0] == full[0])
        and (shape[1] == 1 or shape[1] == full[1])
        and shape[2:] == full[2:]
    )
    if not fits:
        spatial = SPATIAL[len(full) - 2]
        raise ValueError(
            f"mask has shape {shape}; for input {full} allowed: (N, 1, {spatial}), (1, 1, {spatial}), ({spatial}), "
            f"(N, Cin, {spatial})"
        )
    channels = shape[1] if len(shape) == len(full) else 1
    if multi_channel is None:
        return channels > 1
    if channels > 1 and not multi_channel:
        raise ValueError(
            f"mask has {channels} channels and multi_channel is False: give one channel, or multi_channel=True"
        )
    return multi_channel


def _sizes(name: str, value: Size, dims: int, least: int) -> tuple[int, ...]:
    """One int for each dimension."""
    sizes = tuple(value) if isinstance(value, Sequence) else (value,) * dims
    if len(sizes) != dims or not all(isinstance(n, (int, torch.SymInt)) and n >= least for n in sizes):
        raise ValueError(f"{name} must be an int or {dims} ints, each at least {least}, got {value!r}")
    return sizes


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
