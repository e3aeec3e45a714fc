"""What the code bases beside the paper compute for partial convolution, for the tests of PartialConvObjective.

The signature is that of `published.partial_conv`, which is the paper's formula.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from published import IMAGENET, Terms, Trunk, composite, normalized, perceptual_l1, region_mean, style_l1


def compared(trunk: Trunk, predictions: list[Tensor], truth: Tensor) -> Terms:
    """The perceptual and the style term of images as VGG16 reads them."""
    *maps, wanted = (trunk(image, ("pool1", "pool2", "pool3")) for image in (*predictions, truth))
    return {
        "perceptual": torch.stack([perceptual_l1(each, wanted, (1, 1, 1)) for each in maps]).sum(),
        "style": torch.stack([style_l1(each, wanted) for each in maps]).sum(),
    }


def weighed(terms: Terms, hole: float = 6, valid: float = 1) -> Terms:
    weights = {"hole": hole, "valid": valid, "tv": 0.1, "perceptual": 0.05, "style": 120}
    return terms | {"total": torch.stack([weights[name] * value for name, value in terms.items()]).sum()}


def variation(image: Tensor) -> Tensor:
    across = (image[..., 1:] - image[..., :-1]).abs()
    down = (image[..., 1:, :] - image[..., :-1, :]).abs()
    return across.mean() + down.mean()


def nvidia(trunk: Trunk, x: Tensor, y: Tensor, valid: Tensor) -> Terms:
    """models/loss.py, smoothness on: one normalised pair feeds every term; the mask only splits the pixel error."""
    x, y = normalized(x, IMAGENET), normalized(y, IMAGENET)
    hole, known = ((weight * (x - y).abs()).mean() for weight in (1 - valid, valid))
    terms = {"hole": hole, "valid": known, "tv": variation(x)} | compared(trunk, [x], y)
    return weighed(terms, 5, 5)


def naoto0804(trunk: Trunk, x: Tensor, y: Tensor, valid: Tensor) -> Terms:
    """loss.py: means of masked images, which are normalised.

    Its composite is made of the network's input, which places2.py masks: ``gt_img * mask``.
    """
    c = composite(x, y * valid, valid)
    hole = ((1 - valid) * x - (1 - valid) * y).abs().mean()
    known = (valid * x - valid * y).abs().mean()
    return weighed({"hole": hole, "valid": known, "tv": variation(c)} | compared(trunk, [x, c], y))


def mmagic(trunk: Trunk, x: Tensor, y: Tensor, hole: Tensor) -> Terms:
    """partial_conv: means over regions, images in [-1, 1], mask 1 = hole.

    It divides total variation by the weights of the pairs, `total_variation_loss` by those of the region. They are
    the same for holes that leave out the last row and column; a hole that is the whole image is divided as the op
    does.
    """
    c = composite(x, y, 1 - hole)
    error = (x - y).abs()
    down = region_mean((c[:, :, :-1] - c[:, :, 1:]).abs(), hole[:, :, :-1])
    across = region_mean((c[:, :, :, :-1] - c[:, :, :, 1:]).abs(), hole[:, :, :, :-1])
    if bool((hole == 1).all()):
        down, across = down * (1 - 1 / hole.shape[2]), across * (1 - 1 / hole.shape[3])
    terms = {"hole": region_mean(error, hole), "valid": region_mean(error, 1 - hole), "tv": down + across}
    unit = [normalized((image + 1) * 0.5, IMAGENET) for image in (x, c, y)]
    return weighed(terms | compared(trunk, unit[:2], unit[2]))
