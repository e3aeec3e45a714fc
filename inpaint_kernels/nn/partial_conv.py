"""Partial convolution layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import _checks
from ..ops.partial_conv import (
    ACTIVATIONS,
    NUMERATORS,
    UPDATES,
    PartialConvOutput,
    Size,
    partial_conv2d,
    partial_conv3d,
)


class _PartialConv(nn.Module):
    """A convolution of torch.nn, which stands behind this class in the order of bases, that takes a mask."""

    _function: Any

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | str = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        *,
        multi_channel: bool = False,
        return_mask: bool = False,
        numerator: str = "window",
        mask_update: str = "clamp",
        mask_input: bool = True,
        scale_bias: bool = False,
        activation: str = "none",
        negative_slope: float = 0.01,
        backend: str | None = None,
    ) -> None:
        where: Any = (kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype)
        super().__init__(in_channels, out_channels, *where)
        if padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', got {padding_mode!r}")
        _checks.check_choice("numerator", numerator, NUMERATORS)
        _checks.check_choice("mask_update", mask_update, UPDATES)
        _checks.check_choice("activation", activation, ACTIVATIONS)
        self.multi_channel, self.return_mask = multi_channel, return_mask
        self.numerator, self.mask_update, self.mask_input = numerator, mask_update, mask_input
        self.scale_bias, self.activation, self.negative_slope = scale_bias, activation, negative_slope
        self.backend = backend

    def forward(self, input: Tensor, mask: Tensor | None = None, *, mask_in: Tensor | None = None) -> Any:
        layer: Any = self
        if mask_in is not None:
            if mask is not None:
                raise TypeError("mask and mask_in are one argument, got both")
            mask = mask_in
        result: PartialConvOutput = layer._function(
            input, layer.weight, layer.bias, mask, layer.stride, layer.padding, layer.dilation, layer.groups,
            multi_channel=self.multi_channel, numerator=self.numerator, mask_update=self.mask_update,
            mask_input=self.mask_input, scale_bias=self.scale_bias, activation=self.activation,
            negative_slope=self.negative_slope, backend=self.backend,
        )  # fmt: skip
        return result if self.return_mask else result.output


class PartialConv2d(_PartialConv, nn.Conv2d):
    """Partial convolution layer: `ik.partial_conv2d` with the parameters and the constructor of torch.nn.Conv2d.

    Drop-in for NVIDIA's ``PartialConv2d``: same arguments, same values, but for `multi_channel` with ``groups > 1``.
    NVIDIA's windows then count the known values of all input channels, these of the channels of their group, which
    are those the convolution sees. The state dict holds ``weight`` and ``bias``, so that of a plain ``Conv2d`` loads
    here and the other way round.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as ``torch.nn.Conv2d``; `padding_mode` must be "zeros".
        multi_channel: the mask has a channel for every input channel (one with a single channel is spread over them)
            instead of one for all.
        return_mask: return ``(output, new_mask)`` instead of ``output`` alone.
        numerator, mask_update, mask_input, scale_bias, activation, negative_slope, backend: as in
            `ik.partial_conv2d`, all by default as NVIDIA has it.

    ``forward(input, mask=None)`` takes (N, Cin, H, W) and a mask (1 = known) as in `ik.partial_conv2d` and returns
    the output (N, Cout, Ho, Wo), or a `PartialConvOutput` with `return_mask`; ``mask_in=`` is NVIDIA's name of
    `mask`. Differentiable in input, weight and bias, and in a mask that requires a gradient. Raises ValueError for
    shapes that do not fit and for unknown options, TypeError for `mask` together with `mask_in`.

    Code that initialises layers by class name (``classname.find("Conv") == 0`` in ``weight_init``) does not touch
    this layer, whose name begins with "Partial": ask ``isinstance(module, torch.nn.Conv2d)``, which holds for both.

    Liu et al., "Image Inpainting for Irregular Holes Using Partial Convolutions", 2018.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> layer = ik.nn.PartialConv2d(3, 8, 3, padding=1, return_mask=True)
        >>> mask = torch.ones(2, 1, 16, 16)
        >>> mask[..., 4:12, 4:12] = 0
        >>> output, new_mask = layer(torch.rand(2, 3, 16, 16), mask)
        >>> output.shape, int((new_mask == 0).sum())
        (torch.Size([2, 8, 16, 16]), 72)
    """

    _function = staticmethod(partial_conv2d)


class PartialConv3d(_PartialConv, nn.Conv3d):
    """Partial convolution layer for volumes: `ik.partial_conv3d` with the constructor of torch.nn.Conv3d.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as ``torch.nn.Conv3d``; `padding_mode` must be "zeros".
        multi_channel, return_mask, numerator, mask_update, mask_input, scale_bias, activation, negative_slope,
            backend: as in `PartialConv2d`.

    ``forward(input, mask=None)`` takes (N, Cin, D, H, W) and a mask (N, 1, D, H, W), or (N, Cin, D, H, W) with
    `multi_channel`; ``mask_in=``, what is returned, gradients, errors and NVIDIA's values with ``groups > 1`` are as
    in `PartialConv2d`.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> layer = ik.nn.PartialConv3d(2, 4, 3, padding=1)
        >>> layer(torch.rand(1, 2, 5, 6, 7)).shape
        torch.Size([1, 4, 5, 6, 7])
    """

    _function = staticmethod(partial_conv3d)
