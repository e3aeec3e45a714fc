"""What follows from the shapes, dtypes and options of a partial convolution, with the checks of its arguments."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.partial_conv import weighs_bias
from . import _checks
from ._partial_conv import output_size

NUMERATORS = ("window", "one")
UPDATES = ("clamp", "binary", "proportional")
ACTIVATIONS = ("none", "relu", "leaky_relu")
Size = int | Sequence[int]
# Of a tensor what its values do not change: shape, dtype, device.
Kind = tuple[torch.Size, torch.dtype, torch.device]


class Plan(NamedTuple):
    """What a call does, whatever the values."""

    window: tuple[Any, ...]  # arguments of the window kernel after the mask
    where: tuple[Any, ...]  # stride, padding, dilation, groups
    weigh_bias: bool
    view: tuple[int, int]  # batch and channels of the new mask
    around: list[int] | None  # of F.pad: what "same" adds at the end for an even kernel
    slope: float


def check_types(input: Any, weight: Any, bias: Any, mask: Any) -> None:
    for name, value in (("input", input), ("weight", weight), ("bias", bias), ("mask", mask)):
        if not isinstance(value, Tensor) and (value is not None or name in ("input", "weight")):
            raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")


def make_plan(
    dims: int,
    input: Kind,
    weight: Kind,
    bias: Kind | None,
    mask: Kind | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    multi_channel: bool | None,
    numerator: str,
    update: str,
    scale_bias: bool,
    activation: str,
    slope: float,
) -> Plan:
    """Raises for arguments that do not fit together."""
    _check_layer(dims, input, weight, bias, groups)
    _checks.check_choice("numerator", numerator, NUMERATORS)
    _checks.check_choice("mask_update", update, UPDATES)
    _checks.check_choice("activation", activation, ACTIVATIONS)
    if not 0 <= slope <= 1e18:
        # The sign of the output has to tell the sign before the activation.
        raise ValueError(f"negative_slope must be a number from 0 on, got {slope!r}")
    if mask is not None:
        multi_channel = _check_mask(mask, input, multi_channel)
    size, channels = input[0][2:], weight[0][0]
    kernel = tuple(weight[0][2:])
    strides, dilations = _sizes("stride", stride, dims, 1), _sizes("dilation", dilation, dims, 1)
    pads, extra = _paddings(padding, strides, dilations, kernel)
    around = [side for pad in reversed(extra) for side in (0, pad)] if any(extra) else None
    padded = [extent + more for extent, more in zip(size, extra, strict=True)]
    if any(extent < 1 for extent in output_size(padded, kernel, strides, pads, dilations)):
        raise ValueError(
            f"weight's windows {kernel} (dilation {dilations}) do not fit into input {tuple(input[0])} with "
            f"padding {pads}"
        )
    if input[1] != weight[1]:
        raise TypeError(f"weight has dtype {weight[1]}, input has {input[1]}")
    members = input[0][1] // groups if multi_channel else 1
    numbers = float(members * math.prod(kernel)) if numerator == "window" else 1.0
    dtype = torch.float64 if input[1] == torch.float64 else torch.float32
    return Plan(
        (groups, members, kernel, strides, pads, dilations, numbers, update, dtype),
        (strides, pads, dilations, groups),
        weighs_bias(bias is not None, update, scale_bias),
        (1 if mask is None or len(mask[0]) == dims else mask[0][0], channels if multi_channel else 1),
        around,
        float(slope),
    )


# The checks and sizes of a layer took 40 us a call, 100 between convolutions that fill the caches.
_remembered = functools.lru_cache(maxsize=4096, typed=True)(make_plan)


def remembered_plan(dims: int, *arguments: Any) -> Plan:
    """`make_plan`, once for the same arguments. Only for sizes that are ints to the last: (1.0, 1.0) equals (1, 1),
    and is refused."""
    sizes = [tuple(value) if isinstance(value, list) else value for value in arguments[4:7]]
    kinds = {type(n) for value in sizes for n in (value if isinstance(value, tuple) else (value,))}
    if not kinds <= _HASHED:
        return make_plan(dims, *arguments)
    return _remembered(dims, *arguments[:4], *sizes, *arguments[7:])


_HASHED = {int, str}


def _check_layer(dims: int, input: Kind, weight: Kind, bias: Kind | None, groups: int) -> None:
    spatial = "D, H, W" if dims == 3 else "H, W"
    for name, kind in (("input", input), ("weight", weight), ("bias", bias)):
        if kind is None:
            continue
        if kind[1] not in _checks.FLOATS:
            raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {kind[1]}")
        if kind[2] != input[2]:
            raise ValueError(f"{name} is on {kind[2]}, input is on {input[2]}")
    size, extents = tuple(input[0]), tuple(weight[0])
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


def _check_mask(mask: Kind, input: Kind, multi_channel: bool | None) -> bool:
    """Whether windows count all channels."""
    if mask[2] != input[2]:
        raise ValueError(f"mask is on {mask[2]}, input is on {input[2]}")
    shape, full = tuple(mask[0]), tuple(input[0])
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
    found = tuple(value) if isinstance(value, Sequence) else (value,) * dims
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
