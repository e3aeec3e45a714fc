"""What total_variation and inpainting_pixel share: options, packed signs of neighbouring pixels, gradient formulas.

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

from typing import Any

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
        copies = mask.shape[0] * mask.shape[1] if mask.ndim == 4 else 1
        size += 1 + copies * h * groups
    return image.new_empty(size if save_signs else 0, dtype=torch.uint8)


def unpack_signs(
    signs: Tensor, planes: int, size: Any, channels_last: bool, dtype: torch.dtype, backend: str
) -> list[Tensor]:
    """planes / 2 images of +1, 0, -1; only a second derivative needs them unpacked."""
    n, c, h, w = size
    if backend == "cuda":
        kinds, rows, columns = planes // 2, (h + 3) // 4, (w + 3) // 4
        fields = signs.view(n, c, rows, kinds, columns, 4, 1) >> torch.arange(
            0, 8, 2, device=signs.device, dtype=torch.uint8
        )
        images = (fields & 3).permute(3, 0, 1, 2, 5, 4, 6).reshape(kinds, n, c, 4 * rows, 4 * columns)
        return list((images[..., :h, :w].to(dtype) - 1).unbind())
    segments, length = (n, w * c) if channels_last else (n * c, w)
    groups = (length + 7) // 8
    packed = signs[: segments * h * planes * groups].view(segments * h, planes, groups, 1)
    bits = (packed >> torch.arange(8, device=signs.device, dtype=torch.uint8)) & 1
    rows = bits.view(segments * h, planes // 2, 2, groups * 8)[..., :length].to(dtype)
    found = []
    for image in (rows[:, :, 0] - rows[:, :, 1]).unbind(1):
        found.append(
            image.reshape(n, h, w, c).permute(0, 3, 1, 2) if channels_last else image.reshape(n, c, h, w)
        )
    return found


def weights(
    like: Tensor, mask: Tensor | None, region: str, mask_is_hole: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Of the pairs across and downwards; None where every pair counts."""
    if region == "image":
        return None, None
    assert mask is not None
    hole, _ = region_weights(like, like, mask, "hole" if mask_is_hole else "valid")
    down, across, _ = pair_weights(hole, region)
    return across, down


def signs_gradient(
    across: Tensor, down: Tensor, mask: Tensor | None, region: str, mask_is_hole: bool
) -> Tensor:
    """Gradient of the weighted differences by the image, given what each of them is multiplied with."""
    across, down = across[..., :-1], down[..., :-1, :]
    across_weight, down_weight = weights(across, mask, region, mask_is_hole)
    if across_weight is not None and down_weight is not None:
        across, down = across * across_weight, down * down_weight
    return sum_gradient(across, down)


def sum_gradient(across: Tensor, down: Tensor) -> Tensor:
    """What the gradients by the differences, next pixel minus this one, add up to at each pixel."""
    pad = torch.nn.functional.pad
    return pad(across, (1, 0)) - pad(across, (0, 1)) + pad(down, (0, 0, 1, 0)) - pad(down, (0, 0, 0, 1))
