"""What a feature trunk reads, in plain PyTorch: prediction, composite and truth, normalised, in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._common import accumulate_dtype, masked_input
from .composite import composite
from .hole_valid import region_weights

PARTS = ("raw", "composite", "target", "hole_raw", "hole_target")


def stacked_images(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None,
    *,
    parts: Sequence[str],
    scale: Tensor | None,
    shift: Tensor | None,
    swap: bool,
    mask_is: str,
) -> Tensor:
    """(len(parts) * N, C', H, W): the parts in the order of `torch.cat`, every one as ``scale * part + shift``.

    A single channel becomes as many as `scale` or `shift` has; `swap` reverses the channels (RGB and BGR). Both come
    before the affine map, masking before all of it. Wider dtype of the two images, computed in float32 or float64.
    """
    dtype = accumulate_dtype(pred, target)
    x, y = pred.to(dtype), target.to(dtype)
    images = []
    for part in parts:
        if part == "raw":
            image = x
        elif part == "target":
            image = y
        else:
            assert mask is not None
            if part == "composite":
                image = composite(x, y, mask, mask_is=mask_is)
            else:
                hole, _ = region_weights(x, y, mask, mask_is)
                image = masked_input(x if part == "hole_raw" else y, hole)
        images.append(image)
    stacked = torch.cat(images)
    if swap:
        stacked = stacked.flip(1)
    if scale is not None:
        stacked = stacked * scale.to(dtype).view(1, -1, 1, 1)
    if shift is not None:
        stacked = stacked + shift.to(dtype).view(1, -1, 1, 1)
    return stacked.to(torch.promote_types(pred.dtype, target.dtype))
