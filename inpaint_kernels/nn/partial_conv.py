"""Partial convolution layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops import _checks
from ..ops._partial_conv_plan import ACTIVATIONS, NUMERATORS, UPDATES
from ..ops.partial_conv import partial_conv2d, partial_conv3d


class _Options:
    """What a partial convolution has besides a convolution: keyword arguments, kept as attributes."""

    padding_mode: Any

    def __init__(
        self,
        *args: Any,
        multi_channel: bool = False,
        return_mask: bool = False,
        numerator: str = "window",
        mask_update: str = "clamp",
        mask_input: bool = True,
        scale_bias: bool = False,
        activation: str = "none",
        negative_slope: float = 0.01,
        backend: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', got {self.padding_mode!r}")
        _checks.check_choice("numerator", numerator, NUMERATORS)
        _checks.check_choice("mask_update", mask_update, UPDATES)
        _checks.check_choice("activation", activation, ACTIVATIONS)
        self.multi_channel, self.return_mask = multi_channel, return_mask
        self.numerator, self.mask_update, self.mask_input = numerator, mask_update, mask_input
        self.scale_bias, self.activation, self.negative_slope = scale_bias, activation, negative_slope
        self.backend = backend

    def _options(self) -> dict[str, Any]:
        return {
            "multi_channel": self.multi_channel,
            "numerator": self.numerator,
            "mask_update": self.mask_update,
            "mask_input": self.mask_input,
            "scale_bias": self.scale_bias,
            "activation": self.activation,
            "negative_slope": self.negative_slope,
            "backend": self.backend,
        }


class PartialConv2d(_Options, nn.Conv2d):
    """Partial convolution layer: `ik.partial_conv2d` with the parameters and the constructor of torch.nn.Conv2d.

    Drop-in for NVIDIA's ``PartialConv2d``: same arguments, same values. The state dict holds ``weight`` and ``bias``,
    so that of a plain ``Conv2d`` loads here and the other way round.

    Args:
        multi_channel: the mask has a channel for every input channel (one with a single channel is spread over them)
            instead of one for all.
        return_mask: return ``(output, new_mask)`` instead of ``output`` alone.
        numerator, mask_update, mask_input, scale_bias, activation, negative_slope, backend: as in
            `ik.partial_conv2d`, all by default as NVIDIA has it.
        Everything else as ``torch.nn.Conv2d``; `padding_mode` must be "zeros".

    ``forward(input, mask=None)`` takes (N, Cin, H, W) and a mask (1 = known) as in `ik.partial_conv2d` and returns
    the output (N, Cout, Ho, Wo), or a `PartialConvOutput` with `return_mask`. Differentiable in input, weight and
    bias, and in a mask that requires a gradient. Raises ValueError for shapes that do not fit and for unknown
    options.

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

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Any:
        found = partial_conv2d(
            input, self.weight, self.bias, mask, self.stride, self.padding, self.dilation, self.groups,
            **self._options(),
        )  # fmt: skip
        return found if self.return_mask else found.output


class PartialConv3d(_Options, nn.Conv3d):
    """Partial convolution layer for volumes: `ik.partial_conv3d` with the constructor of torch.nn.Conv3d.

    Args:
        multi_channel, return_mask, numerator, mask_update, mask_input, scale_bias, activation, negative_slope,
            backend: as in `PartialConv2d`.
        Everything else as ``torch.nn.Conv3d``; `padding_mode` must be "zeros".

    ``forward(input, mask=None)`` takes (N, Cin, D, H, W) and a mask (N, 1, D, H, W), or (N, Cin, D, H, W) with
    `multi_channel`; what is returned, gradients and errors are as in `PartialConv2d`.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> layer = ik.nn.PartialConv3d(2, 4, 3, padding=1)
        >>> layer(torch.rand(1, 2, 5, 6, 7)).shape
        torch.Size([1, 4, 5, 6, 7])
    """

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Any:
        found = partial_conv3d(
            input, self.weight, self.bias, mask, self.stride, self.padding, self.dilation, self.groups,
            **self._options(),
        )  # fmt: skip
        return found if self.return_mask else found.output
