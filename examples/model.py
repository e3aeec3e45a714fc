"""A small U-Net of partial convolutions (Liu et al., 2018) for the training example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PartialConvUNet(nn.Module):
    """Five partial convolutions of stride 2 down, five on the way up, skips carry features and masks.

    Args:
        width: channels of the first level; the deeper ones have 2, 4, 4 and 4 times as many.
        layer: what the network is made of: called with the arguments of `ik.nn.PartialConv2d`, the default, it
            gives a module that takes ``(features, mask)`` and returns the output and its mask.

    Called with an image [N, 3, H, W] (H, W multiples of 32) and a mask [N, 1, H, W] (1 = known, 0 = hole,
    nothing in between); returns the filled-in image [N, 3, H, W], unclamped. No batch statistics: training
    with k processes of batch b computes what one process with batch k b computes.

    Features are 0 wherever their mask is: each layer leaves them so. Hence no layer has to mask its input. Do drop
    ``mask_input=False`` when you add what moves zeros, such as a normalisation.
    """

    DEPTH = 5

    def __init__(self, width: int = 32, layer: Callable[..., nn.Module] | None = None) -> None:
        super().__init__()
        if layer is None:
            import inpaint_kernels as ik

            layer = ik.nn.PartialConv2d
        common: dict[str, Any] = {"mask_input": False, "return_mask": True}
        encoder = [3, width, 2 * width, 4 * width, 4 * width, 4 * width]
        decoder = [3, width // 2, width, 2 * width, 4 * width, 4 * width]
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for level in range(self.DEPTH):
            kernel = 5 if level == 0 else 3
            self.down.append(
                layer(encoder[level], encoder[level + 1], kernel, 2, kernel // 2, activation="relu", **common)
            )
            below = encoder[-1] if level == self.DEPTH - 1 else decoder[level + 1]
            self.up.append(
                layer(
                    *(below + encoder[level], decoder[level], 3, 1, 1),
                    multi_channel=True,
                    activation="leaky_relu" if level > 0 else "none",
                    negative_slope=0.2,
                    **common,
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
        features = (image - colour) * mask
        skips = [(features, mask)]
        for level, layer in enumerate(self.down):
            features, mask = layer(features, mask)
            if level < self.DEPTH - 1:
                skips.append((features, mask))
        for level in reversed(range(self.DEPTH)):
            # The channels of a mask agree: one is resized.
            above, above_mask = (F.interpolate(t, scale_factor=2.0) for t in (features, mask[:, :1]))
            skip, skip_mask = skips[level]
            joined = self.join_masks(above, above_mask, skip, skip_mask)
            features, mask = self.up[level](torch.cat([above, skip], 1), joined)
        return features + colour

    def join_masks(self, above: Tensor, above_mask: Tensor, skip: Tensor, skip_mask: Tensor) -> Tensor:
        """The mask of ``torch.cat([above, skip], 1)``, one plane: the known share of the channels.

        A multi-channel window only counts what is known, and finds the same count in the plane as in a mask of all
        channels. A layer that masks its input needs those: ``torch.cat([above_mask.expand_as(above),
        skip_mask.expand_as(skip)], 1)``.
        """
        known = above.shape[1] * above_mask + skip.shape[1] * skip_mask
        return known / (above.shape[1] + skip.shape[1])
