"""What total_variation and inpainting_pixel share: options, and how the signs of differences are packed.

Signs are packed, differently for `cuda`, whose threads walk down the rows of 4 columns. Kinds of signs: of the
difference across, next pixel minus this one, of the same downwards, and (inpainting_pixel alone) of pred - target. A
pair of weight 0 has no sign, the last column has none across, the last row none downwards.

Elsewhere: bit planes of the rows of an image, (N, C, H, planes, ceil(W / 8)) bytes in NCHW and (N, H, planes,
ceil(W C / 8)) in channels_last; a buffer has the size of the first in both layouts, unused bytes are 0. Bit i of
byte b belongs to element 8 b + i of its row. Planes 0 and 1: the difference across is positive, negative; planes 2
and 3: the same downwards; planes 4 and 5: pred - target.

`cuda`: (N, C, ceil(H / 4), kinds, ceil(W / 4), 4) bytes in both layouts, the last axis for the rows 4 i to 4 i + 3.
Bits 2 k and 2 k + 1 belong to the k-th of 4 pixels: 1 + sign, and so 1 beyond the image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.hole_valid import region_weights
from ..reference.total_variation import pair_weights
from . import _checks, _pixel

REGIONS = ("image", "hole", "dilated_hole", "first_pixel")
PENALTIES = ("l1", "l2")
NORMALIZATIONS = ("pairs", "image", "mask")


def check_options(prefix: str, region: str, penalty: str, normalize: str | None) -> str:
    """The options of total variation, called `<prefix>region` and so on; returns the denominator's name."""
    _checks.check_choice(prefix + "region", region, REGIONS)
    _checks.check_choice(prefix + "penalty", penalty, PENALTIES)
    if normalize is None:
        return "pairs" if region == "image" else "image"
    _checks.check_choice(prefix + "normalize", normalize, NORMALIZATIONS)
    if normalize == "mask" and region == "image":
        raise ValueError(
            f"{prefix}normalize='mask' divides by the summed region: it needs a {prefix}region other than 'image'"
        )
    return normalize


def pair_count(image: Tensor, mask: Tensor | None, region: str, normalize: str, mask_is: str) -> Tensor:
    """What total variation divides by, up to a factor that is the same on ranks with images of one size."""
    if normalize != "mask":
        return _pixel.mean_count(image, None, "image")
    assert mask is not None
    weights = pair_weights(region_weights(image, image, mask.detach(), mask_is)[0], region)[2]
    return _pixel.mean_count(image, weights, "mask")


def fake_signs(image: Tensor, planes: int, save_signs: bool, backend: str, mask: Tensor | None) -> Tensor:
    """Metadata of the signs.

    `cpu` appends a byte that tells whether the mask holds zeros and ones only, followed by the rows of such a mask
    packed into bits: its backward then reads neither the mask nor the weights of the pairs.
    """
    n, c, h, w = image.shape
    groups = (w + 7) // 8
    size = n * c * h * planes * groups
    if backend == "cuda":
        size = n * c * ((h + 3) // 4) * (planes // 2) * ((w + 3) // 4) * 4
    if backend == "cpu" and mask is not None:
        planes_of_mask = mask.shape[0] * mask.shape[1] if mask.ndim == 4 else 1
        size += 1 + planes_of_mask * h * groups
    return image.new_empty(size if save_signs else 0, dtype=torch.uint8)
