"""Inputs of the ops in `op_cases`, flat and on the CPU, from a size, dtypes, layouts and a mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from feature_cases import STYLES, distance_pair, feature_map, gram_formula, style_pair
from harness import laid_out
from pairs_cases import eighths
from partial_conv_cases import Case as Convolution
from partial_conv_cases import make_tensors
from pixel_cases import image_pair, make_mask
from torch import Tensor

Size = tuple[int, ...]
# Planes of 126 elements: several vectors of 8 or 16, then a tail.
SIZE = (2, 3, 9, 14)


def images(
    size: Size = SIZE,
    dtypes: str = "f32/f32",
    layout: str = "contiguous",
    mask: str = "n1hw",
    *,
    mask_dtype: str = "f32",
    mask_layout: str = "contiguous",
    values: str = "mixed",
    expanded: bool = False,
    exact: bool = False,
) -> list[Tensor]:
    """[pred, target, mask]; `layout` of both images, or "pred/target". `exact`: fractions in eighths."""
    layouts = layout if "/" in layout else f"{layout}/{layout}"
    pair, weights = image_pair(size, dtypes, layouts), make_mask(mask, size, mask_dtype, values)
    if weights is None:
        return [*pair]
    weights = laid_out(eighths(weights) if exact else weights, mask_layout)
    return [*pair, weights.expand(size) if expanded else weights]


# Equal neighbours of a composite stay equal, which decides the sign of l1.
exact_images = partial(images, exact=True)


def one_image(*args: Any, **options: Any) -> list[Tensor]:
    """[image, mask]"""
    return exact_images(*args, **options)[::2]


def unit_images(*args: Any, **options: Any) -> list[Tensor]:
    """As `images`, with values around 0.5, see `ssim_cases.unit_pair`."""
    found = images(*args, **options)
    for image in found[:2]:
        image.mul_(0.25).add_(0.5)
    return found


def layers_of(size: Size) -> tuple[Size, Size]:
    """No two sizes of `SIZE` and the second layer are equal: a compiler would expect that of every call."""
    n, c, h, w = size
    return size, (n or 2, c + 3, (h + 1) // 2, (w + 1) // 2)


def of_one_batch(size: Size) -> tuple[Size, Size]:
    """As `layers_of`, for what is added up sample by sample."""
    return size, (size[0], *layers_of(size)[1][1:])


def features(
    size: Size = SIZE,
    dtypes: str = "f32/f32",
    layout: str = "contiguous",
    *,
    pair: Callable[..., tuple[Tensor, Tensor]] = distance_pair,
    predictions: int = 2,
    sizes: Callable[[Size], tuple[Size, Size]] = layers_of,
    **_: str,
) -> list[Tensor]:
    """[*inputs, *targets] of two layers; `layout` of both sides, or "input/target"."""
    layouts = layout if "/" in layout else f"{layout}/{layout}"
    options = {"predictions": predictions, "dtypes": dtypes, "layouts": layouts}
    pairs = [pair(s, seed=i, **options) for i, s in enumerate(sizes(size))]
    return [*(x for x, _ in pairs), *(y for _, y in pairs)]


def masked_features(
    size: Size = SIZE,
    *args: Any,
    sizes: Callable[[Size], tuple[Size, Size]] = layers_of,
    **options: Any,
) -> list[Tensor]:
    masks = [make_mask("n1hw", s, seed=i) for i, s in enumerate(sizes(size))]
    return [*features(size, *args, sizes=sizes, **options), *masks]


def given_grams(*args: Any, style: str, **options: Any) -> list[Tensor]:
    flat = features(*args, pair=style_pair, **options)
    return flat[:2] + [gram_formula(y.double(), STYLES[style][0]).to(y.dtype) for y in flat[2:]]


def one_map(size: Size = SIZE, dtypes: str = "f32/f32", layout: str = "contiguous", **_: str) -> list[Tensor]:
    return [feature_map(size, dtypes.partition("/")[0], layout.partition("/")[0])]


def convolution(
    size: Size = SIZE,
    dtypes: str = "f32/f32",
    layout: str = "contiguous",
    *,
    holes: str,
    dims: int = 2,
    **_: str,
) -> list[Tensor]:
    """[input, weight, bias, mask]"""
    case = Convolution(size=(*size, 3)[: dims + 2], outputs=4)
    given = make_tensors(case, dtypes.partition("/")[0], mask=holes, layouts=f"{layout}/contiguous")
    return [t for t in given if t is not None]
