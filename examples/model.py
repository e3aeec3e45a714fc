"""A small U-Net of partial convolutions (Liu et al., 2018) for the training example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from fills import smooth_pull_push
from torch import Tensor, nn

# Pixels along the side of the squares whose mean colours the network does not see.
AROUND = 8


class PartialConvUNet(nn.Module):
    """Corrects a smooth pull-push fill: five partial convolutions of stride 2 down, five back up, one at the end.

    Skips carry features and masks. The encoder sees the known pixels alone. The decoder sees the fill and the mask as
    well, at each level's size, as planes that are known everywhere; the last convolution begins as 0, so that an
    untrained network returns the fill. Of all colours, the network sees the difference from those around.

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
    # What a checkpoint says of a network beside its width.
    KIND = "PartialConvUNet over a smooth pull-push fill"

    def __init__(self, width: int = 32, layer: Callable[..., nn.Module] | None = None) -> None:
        super().__init__()
        if layer is None:
            import inpaint_kernels as ik

            layer = ik.nn.PartialConv2d
        common: dict[str, Any] = {"mask_input": False, "return_mask": True}
        leaky: dict[str, Any] = {"activation": "leaky_relu", "negative_slope": 0.2}
        encoder = [3, width, 2 * width, 4 * width, 4 * width, 4 * width]
        decoder = [width // 2, width // 2, width, 2 * width, 4 * width, 4 * width]
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for level in range(self.DEPTH):
            kernel = 5 if level == 0 else 3
            self.down.append(
                layer(encoder[level], encoder[level + 1], kernel, 2, kernel // 2, activation="relu", **common)
            )
            below = encoder[-1] if level == self.DEPTH - 1 else decoder[level + 1]
            # Features, skip, fill and mask.
            joined = below + encoder[level] + 4
            self.up.append(layer(joined, decoder[level], 3, 1, 1, multi_channel=True, **leaky, **common))
        self.last = layer(decoder[0], 3, 3, 1, 1, **common)
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and not name.startswith("last"):
                nn.init.kaiming_normal_(parameter, nonlinearity="relu")
            else:
                nn.init.zeros_(parameter)

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        base = smooth_pull_push(image, mask)
        # What remains is the difference from the colours around: the same for dark and bright places.
        around = F.interpolate(F.avg_pool2d(base, AROUND), scale_factor=float(AROUND), mode="bilinear")
        features, known = (image - around) * mask, mask
        skips = [(features, known)]
        planes = [torch.cat([base - around, mask], 1)]
        for _ in range(self.DEPTH - 1):
            planes.append(F.avg_pool2d(planes[-1], 2))
        for level, layer in enumerate(self.down):
            features, known = layer(features, known)
            if level < self.DEPTH - 1:
                skips.append((features, known))
        for level in reversed(range(self.DEPTH)):
            # The channels of a mask agree: one is resized.
            above, above_known = (F.interpolate(t, scale_factor=2.0) for t in (features, known[:, :1]))
            parts = [
                (above, above_known),
                skips[level],
                (planes[level], torch.ones_like(planes[level][:, :1])),
            ]
            features, known = self.up[level](
                torch.cat([plane for plane, _ in parts], 1), self.join_masks(parts)
            )
        correction, _ = self.last(features, known[:, :1])
        return base + correction

    def join_masks(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The mask of all features [N, Ci, H, W] side by side, each with its mask [N, 1, H, W], as one plane.

        It is the known share of the channels: a multi-channel window only counts what is known, and finds the same
        count in the plane as in a mask of all channels. A layer that masks its input needs those:
        ``torch.cat([known.expand_as(features) for features, known in parts], 1)``.
        """
        counts = [features.shape[1] * known[:, :1] for features, known in parts]
        return torch.stack(counts).sum(0) / sum(features.shape[1] for features, _ in parts)
