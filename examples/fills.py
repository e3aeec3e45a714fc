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


# One known pixel of four makes a pixel of the next level known.
KNOWN_GAIN = 4.0
# Of the descent that smooths a level: below 2 (1 + MOMENTUM) / 4 it cannot diverge.
RATE, MOMENTUM = 0.5, 0.8


def pull_push(images: Tensor, masks: Tensor, sweeps: int = 0) -> Tensor:
    """Holes take the colour of the finest level of an image pyramid that knows one.

    A pixel of a level is the mean of the known pixels among four of the level below. On the way down, what is not
    known of a level comes from the level above, by bilinear interpolation. With ``sweeps`` the holes of each level
    are then smoothed: so many steps of a gradient descent with momentum toward the least sum of squared Laplacians,
    the biharmonic surface, which the coarser levels have brought near.

    Gortler et al., "The Lumigraph", 1996.
    """
    colours, known = images * masks, masks
    levels = []
    while max(known.shape[2:]) > 1:
        levels.append((colours, known))
        colours, known = (F.avg_pool2d(plane, 2, ceil_mode=True) for plane in (colours, known))
        more = (KNOWN_GAIN * known).clamp(max=1)
        colours, known = colours * (more / known.clamp(min=1e-12)), more
    filled = colours / known.clamp(min=1e-12)
    for colours, known in reversed(levels):
        height, width = known.shape[2:]
        above = F.interpolate(filled, scale_factor=2.0, mode="bilinear")[:, :, :height, :width]
        filled = colours + (1 - known) * above
        speed, rates = torch.zeros_like(filled), RATE * (1 - known)
        for _ in range(sweeps):
            speed = torch.addcmul(MOMENTUM * speed, rates, _laplacian(_laplacian(filled)), value=-1)
            filled = filled + speed
    return filled


def _laplacian(planes: Tensor) -> Tensor:
    """Mean of the four neighbours minus the pixel."""
    around = F.pad(planes, (1, 1, 1, 1), mode="replicate")
    rows, columns = around[:, :, :, 1:-1], around[:, :, 1:-1]
    return (rows[:, :, 2:] + rows[:, :, :-2] + columns[..., 2:] + columns[..., :-2]) / 4 - planes


def smooth_pull_push(images: Tensor, masks: Tensor) -> Tensor:
    """The fill that the network corrects."""
    return pull_push(images, masks, sweeps=20)


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
    "smooth pull-push": smooth_pull_push,
    "biharmonic": biharmonic,
}
