"""A small U-Net of partial convolutions (Liu et al., 2018) for the training example."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PartialConv2d(nn.Conv2d):
    r"""Convolution that sees known pixels only and passes on a grown mask.

    With K the size of the window and s the mask summed over it (both over all input channels of the
    group when ``multi_channel``)::

        new_mask = clamp(s, 0, 1)
        ratio    = K / s * new_mask                                  where s > 0, else 0
        output   = conv(input * mask, weight) * ratio                without bias
        output   = (conv(input * mask, weight) * ratio + bias) * new_mask

    Args:
        multi_channel: the mask has one channel per input channel instead of one channel [N, 1, H, W].
        return_mask: return ``(output, new_mask)`` instead of ``output`` alone.
        Everything else as ``torch.nn.Conv2d``; only zero padding, which counts as hole, is supported.

    The new mask has 1 channel, or ``out_channels`` (an expanded view) when ``multi_channel``; it is
    float32 and carries no gradient. Formula: NVIDIA/partialconv, models/partialconv2d.py, except that
    empty windows are selected instead of guarded by an epsilon, which turns into NaN in float16.
    """

    def __init__(
        self, *args: Any, multi_channel: bool = False, return_mask: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros":
            raise ValueError(f"padding_mode must be 'zeros', got {self.padding_mode!r}")
        self.multi_channel, self.return_mask = multi_channel, return_mask

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Any:
        if mask is None:
            channels = self.in_channels if self.multi_channel else 1
            mask = torch.ones(1, 1, 1, 1, device=input.device).expand(1, channels, *input.shape[2:])
        ratio, new_mask = self._ratio(mask)
        raw = self._conv_forward(input * mask.to(input.dtype), self.weight, None)
        output = raw * ratio
        if self.bias is not None:
            output = (output + self.bias.view(1, -1, 1, 1)) * new_mask
        # Scaled in float32, handed on in the dtype autocast chose for the convolution.
        output = output.to(raw.dtype)
        return (output, new_mask) if self.return_mask else output

    @torch.no_grad()
    def _ratio(self, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The ratio and the new mask, in float32 whatever autocast says."""
        with torch.autocast(mask.device.type, enabled=False):
            planes = mask.float()
            count = float(self.kernel_size[0] * self.kernel_size[1])
            if self.multi_channel:
                # Summing the channels first makes the box sum as cheap as a single-channel one.
                planes = planes.unflatten(1, (self.groups, -1)).sum(2)
                count *= self.in_channels // self.groups
            channels = planes.shape[1]
            box = planes.new_ones((channels, 1, *self.kernel_size))
            covered = F.conv2d(planes, box, None, self.stride, self.padding, self.dilation, channels)
            new_mask = covered.clamp(0, 1)
            ratio = torch.where(covered > 0, count / covered * new_mask, 0.0)
            if self.multi_channel and channels > 1:
                ratio = ratio.repeat_interleave(self.out_channels // channels, 1)
                new_mask = new_mask.repeat_interleave(self.out_channels // channels, 1)
            elif self.multi_channel:
                new_mask = new_mask.expand(-1, self.out_channels, -1, -1)
        return ratio, new_mask


class PartialConvUNet(nn.Module):
    """Five partial convolutions of stride 2 down, five on the way up, skips carry features and masks.

    Args:
        width: channels of the first level; the deeper ones have 2, 4, 4 and 4 times as many.

    Called with an image [N, 3, H, W] (H, W multiples of 32) and a mask [N, 1, H, W] (1 = known); returns
    the filled-in image [N, 3, H, W], unclamped. No batch statistics: training with k processes of batch
    b computes what one process with batch k b computes.
    """

    DEPTH = 5

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        encoder = [3, width, 2 * width, 4 * width, 4 * width, 4 * width]
        decoder = [3, width // 2, width, 2 * width, 4 * width, 4 * width]
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for level in range(self.DEPTH):
            kernel = 5 if level == 0 else 3
            self.down.append(
                PartialConv2d(encoder[level], encoder[level + 1], kernel, 2, kernel // 2, return_mask=True)
            )
            below = encoder[-1] if level == self.DEPTH - 1 else decoder[level + 1]
            self.up.append(
                PartialConv2d(
                    below + encoder[level], decoder[level], 3, 1, 1, multi_channel=True, return_mask=True
                )
            )
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
            else:
                nn.init.zeros_(parameter)
        with torch.no_grad():
            # Starts from nearly flat pictures instead of noise.
            self.get_parameter("up.0.weight").mul_(0.1)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        # What remains is the difference from the mean known colour: the same for dark and bright pictures.
        colour = (image * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True).clamp(min=1)
        features = image - colour
        skips = [(features, mask)]
        for level, layer in enumerate(self.down):
            features, mask = layer(features, mask)
            features = F.relu(features)
            if level < self.DEPTH - 1:
                skips.append((features, mask))
        for level in reversed(range(self.DEPTH)):
            skip, skip_mask = skips[level]
            above = F.interpolate(features, scale_factor=2.0)
            # The channels of a mask agree within each source: one is resized, then all are expanded.
            above_mask = F.interpolate(mask[:, :1], scale_factor=2.0).expand(-1, above.shape[1], -1, -1)
            features, mask = self.up[level](
                torch.cat([above, skip], 1), torch.cat([above_mask, skip_mask.expand_as(skip)], 1)
            )
            if level > 0:
                features = F.leaky_relu(features, 0.2)
        return features + colour
