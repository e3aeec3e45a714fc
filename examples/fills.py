"""Fills of holes without a network: the base that the network corrects, and what its error is compared with.

Each takes images [N, C, H, W] and masks [N, 1, H, W] (1 = known, 0 = hole, nothing in between), reads known pixels
alone and returns filled images. All but ``mean_colour``, which returns the colour everywhere, keep known pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


def mean_colour(images: Tensor, masks: Tensor) -> Tensor:
    """The mean colour of the known pixels of each image; 0 where nothing is known."""
    known = masks.sum((2, 3), keepdim=True).clamp(min=1)
    return ((images * masks).sum((2, 3), keepdim=True) / known).expand_as(images)


def pull_push(images: Tensor, masks: Tensor) -> Tensor:
    """Holes take the colour of the finest level of an image pyramid that knows one, blended over the levels.

    A pixel of a level is the mean of the known pixels among four of the level below, and counts as known as far as
    those are. On the way down, what is not known of a pixel comes from the level above, by bilinear interpolation.

    Gortler et al., "The Lumigraph", 1996.
    """
    colours, known = images * masks, masks
    levels = []
    while max(known.shape[2:]) > 1:
        levels.append((colours, known))
        colours, known = (F.avg_pool2d(plane, 2, ceil_mode=True) for plane in (colours, known))
        # One known pixel of four makes a pixel known: colours are products with how far each is known.
        more = (KNOWN_GAIN * known).clamp(max=1)
        colours, known = colours * (more / known.clamp(min=1e-12)), more
    filled = colours / known.clamp(min=1e-12)
    for colours, known in reversed(levels):
        height, width = known.shape[2:]
        above = F.interpolate(filled, scale_factor=2.0, mode="bilinear")[:, :, :height, :width]
        filled = colours + (1 - known) * above
    return filled


KNOWN_GAIN = 4.0


def nearest_pixel(images: Tensor, masks: Tensor) -> Tensor:
    """Every hole pixel is a copy of the known pixel nearest to it."""
    from scipy.ndimage import distance_transform_edt

    filled = []
    for image, mask in zip(images, masks, strict=True):
        rows, columns = distance_transform_edt(
            mask[0].numpy() == 0, return_distances=False, return_indices=True
        )
        filled.append(image[:, torch.from_numpy(rows).long(), torch.from_numpy(columns).long()])
    return torch.stack(filled)


def biharmonic(images: Tensor, masks: Tensor) -> Tensor:
    """scikit-image's ``inpaint_biharmonic``: the smoothest surface through the known pixels."""
    from skimage.restoration import inpaint_biharmonic

    filled = [
        inpaint_biharmonic(image.permute(1, 2, 0).double().numpy(), mask[0].numpy() == 0, channel_axis=-1)
        for image, mask in zip(images, masks, strict=True)
    ]
    return torch.from_numpy(np.stack(filled)).permute(0, 3, 1, 2).to(images.dtype)


BASELINES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean colour": mean_colour,
    "nearest known pixel": nearest_pixel,
    "pull-push": pull_push,
    "biharmonic": biharmonic,
}
