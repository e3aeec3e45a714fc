"""Partial convolution in plain PyTorch; also what `torch.export` and ONNX see."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ._common import masked_input

ACTIVATIONS = ("none", "relu", "leaky_relu")


class Windows(NamedTuple):
    """Where the windows of a convolution lie; `kernel` to `dilation` have an entry for each spatial dimension."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int

    @staticmethod
    def of(packed: Sequence[int]) -> Windows:
        """The inverse of `packed`."""
        n = len(packed) // 4
        return Windows(
            packed[:n], packed[n : 2 * n], packed[2 * n : 3 * n], packed[3 * n : 4 * n], packed[4 * n]
        )

    def packed(self) -> tuple[int, ...]:
        """One list, as operators take it."""
        return (*self.kernel, *self.stride, *self.padding, *self.dilation, self.groups)

    def output_size(self, size: Sequence[int]) -> list[int]:
        """Spatial size of what the windows over an image of spatial size `size` give."""
        return [
            (extent + 2 * pad - spread * (k - 1) - 1) // step + 1
            for extent, k, step, pad, spread in zip(size, *self[:4], strict=True)
        ]


class Finish(NamedTuple):
    """What is done to the convolution's result."""

    weigh_bias: bool  # the bias is multiplied by the new mask
    scale_bias: bool  # bias and activation come before the ratio
    activation: str

    @staticmethod
    def of(packed: int) -> Finish:
        """The inverse of `packed`."""
        return Finish(bool(packed & 1), bool(packed & 2), ACTIVATIONS[packed >> 2])

    def packed(self) -> int:
        """One word, as operators take it; csrc/common/partial_conv_args.h reads it."""
        return self.weigh_bias + 2 * self.scale_bias + 4 * ACTIVATIONS.index(self.activation)


def box_sum(planes: Tensor, windows: Windows) -> Tensor:
    """Sum over the windows of a convolution, zeros outside; one dimension after the other.

    Additions of shifted slices, not a convolution with ones: cuDNN would round its input to TF32.
    """
    for axis, (size, step, pad, spread) in enumerate(zip(*windows[:4], strict=True)):
        dim = axis - len(windows.kernel)
        around = [0] * (-2 * dim)
        around[-2:] = [pad, pad]
        padded = F.pad(planes, around)
        count = (padded.shape[dim] - spread * (size - 1) - 1) // step + 1
        # Slices stop at the last element they need: `[start::step]` of a symbolic size has no known length.
        last = (count - 1) * step + 1
        index = [slice(None)] * planes.ndim
        parts = []
        for start in range(0, size * spread, spread):
            index[dim] = slice(start, start + last, step)
            parts.append(padded[tuple(index)])
        planes = functools.reduce(torch.add, parts)
    return planes


def window_planes(
    mask: Tensor, multiplicity: int, windows: Sequence[int], numerator: float, update: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(ratio, new_mask), each (N, 1 or groups, ...), from the mask summed over every window.

    A mask (N, 1, ...) stands for `multiplicity` equal channels; one of several is summed over each group's.
    `windows`: `Windows`, packed.
    """
    where = Windows.of(windows)
    planes = mask.to(dtype)
    if mask.shape[1] == 1:
        planes = planes * multiplicity
    else:
        multiplicity = mask.shape[1] // where.groups
        planes = planes.unflatten(1, (where.groups, multiplicity)).sum(2)
    covered = box_sum(planes, where)
    empty = covered == 0
    safe = torch.where(empty, 1.0, covered)
    # A tensor: torch takes a number by the reciprocal, and a full window would not give exactly 1.
    whole = torch.full_like(safe, numerator)
    if update == "clamp":
        # whole / s * min(s, 1), written so that it cannot overflow however small s is.
        ratio, new_mask = whole / safe.clamp(min=1), covered.clamp(max=1)
    else:
        ratio = (whole / safe).clamp(max=torch.finfo(dtype).max)
        new_mask = (
            covered / (multiplicity * math.prod(where.kernel))
            if update == "proportional"
            else torch.ones_like(covered)
        )
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(empty, zero, ratio), torch.where(empty, zero, new_mask)


def channel_planes(planes: Tensor, channels: int) -> Tensor:
    """Planes (N, 1 or groups, ...) for every output channel: broadcast, or repeated within each group."""
    groups = planes.shape[1]
    return planes if groups in (1, channels) else planes.repeat_interleave(channels // groups, 1)


def finish(
    raw: Tensor, ratio: Tensor, new_mask: Tensor, bias: Tensor | None, how: int, slope: float
) -> Tensor:
    """From the convolution's result to the layer's: ratio, bias, activation, zero where nothing was seen.

    `how`: `Finish`, packed.
    """
    weigh_bias, scale_bias, activation = Finish.of(how)
    channels = raw.shape[1]
    ratio, new_mask = channel_planes(ratio, channels), channel_planes(new_mask, channels)
    empty = new_mask == 0
    zero = torch.zeros((), dtype=ratio.dtype, device=raw.device)
    # Before any arithmetic: an Inf that is selected away later would send back NaN.
    x = torch.where(empty, zero, raw.to(ratio.dtype))
    if not scale_bias:
        x = x * ratio
    if bias is not None:
        x = x + bias.to(x.dtype).view(-1, *[1] * (raw.ndim - 2))
        if weigh_bias:
            x = x * new_mask
        elif not scale_bias:
            x = torch.where(empty, zero, x)
    if activation != "none":
        x = F.relu(x) if activation == "relu" else F.leaky_relu(x, slope)
    if scale_bias:
        x = x * ratio
    return x.to(raw.dtype)


def convolve(input: Tensor, weight: Tensor, windows: Windows) -> Tensor:
    """F.conv2d or F.conv3d without a bias, as the number of dimensions has it."""
    convolution = F.conv2d if input.ndim == 4 else F.conv3d
    stride, padding, dilation = (tuple(sizes) for sizes in windows[1:4])
    out: Tensor = convolution(input, weight, None, stride, padding, dilation, windows.groups)
    return out


def partial_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    ratio: Tensor,
    new_mask: Tensor,
    windows: Sequence[int],
    how: int,
    slope: float,
) -> Tensor:
    """Masks the input (unless `mask` is None), convolves and finishes with the planes of `window_planes`."""
    x = input if mask is None else masked_input(input, mask)
    return finish(convolve(x, weight, Windows.of(windows)), ratio, new_mask, bias, how, slope)
