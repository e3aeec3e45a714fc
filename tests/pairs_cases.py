"""Formulas and inputs shared by the tests of total_variation, inpainting_pixel, stacked_images and composite.

Written from the definition, without the package's reference, as those of `pixel_cases`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import DTYPES, EMULATING, INTERPRETING, Backend, backend_for, generator
from hypothesis import strategies as st
from pixel_cases import MASK_SHAPES, hole_valid_formula, image_cases, make_mask, penalty_map, ratio
from torch import Tensor

import inpaint_kernels as ik

PENALTIES = ("l1", "l2")
MASK_IS = ("valid", "hole")
REGIONS = ("image", "hole", "dilated_hole", "first_pixel")
# (region, normalize) by name: "image" has no summed region to divide by.
MODES = {
    f"{region}-{normalize or 'default'}": (region, normalize)
    for region in REGIONS
    for normalize in (None, "pairs", "image", "mask")
    if (region, normalize) != ("image", "mask")
}
SHAPES = tuple(kind for kind in MASK_SHAPES if kind != "nomask")

# (N, C, H, W) by the code path it takes.
SIZES = {
    "1x1": (1, 1, 1, 1),  # no pair at all
    "row": (3, 1, 1, 29),  # pairs across only, a whole vector and a rest
    "column": (2, 2, 33, 1),  # pairs down only; in channels_last no pixel but the last column
    "pair": (1, 2, 1, 2),  # rows shorter than any vector
    "7": (2, 3, 5, 7),  # one below a group of signs
    "17": (1, 2, 6, 17),  # one beyond 16 lanes; 34 in channels_last
    "33": (1, 1, 5, 33),  # one beyond 32 lanes, one channel
    "vectors": (2, 3, 16, 16),  # whole vectors only
    "c17": (1, 17, 9, 11),  # five CPU units of up to 4 planes each; a step of 17 in channels_last
}
# Of the CUDA kernels: a strip is 8, 16 or 32 threads of 4 pixels, a chunk 4 to 32 rows, a word of signs 4 x 4 pixels.
# A thread has 3 channels where C is 3 or more than 4, else 1.
if EMULATING:
    SIZES = {
        "1x1": (1, 1, 1, 1),  # no pair at all
        "row": (3, 1, 1, 29),  # pairs across only
        "column": (2, 3, 33, 1),  # pairs down only, several chunks
        "7": (2, 3, 9, 13),  # no row aligned: pixels one by one, words of signs cut in both directions
        "vectors": (2, 3, 8, 16),  # whole quads
        "halves": (2, 2, 6, 36),  # more quads than threads in the narrowest strip: 9 in two of 8
        "strips": (1, 3, 5, 132),  # 33 quads
        "wide": (1, 1, 3, 260),  # 65 quads
        "rgba": (1, 4, 6, 20),  # not a multiple of the channels a thread has
        "c5": (1, 5, 7, 12),  # a group of 3 channels and one of 2
        "c17": (1, 17, 5, 6),
        "samples": (1100, 1, 1, 3),  # more samples than threads in the last stage
    }
# Too large for the interpreter.
elif not INTERPRETING:
    SIZES["units"] = (
        2,
        2,
        260,
        131,
    )  # three CPU units of rows in NCHW, five in channels_last, the last ones partial
    SIZES["unitrows"] = (1, 1, 3, 16400)  # a row is more than a CPU unit holds


def regions_of(mask: Tensor, size: Sequence[int], mask_is: str) -> tuple[Tensor, Tensor]:
    """(hole, valid), of the size of the image."""
    given = mask.expand(size)
    return (1 - given, given) if mask_is == "valid" else (given, 1 - given)


def composite_formula(
    pred: Tensor, target: Tensor, mask: Tensor, *, mask_is: str = "valid", select: bool = True
) -> Tensor:
    """`select=False`: plain products, differentiable in the mask."""
    hole, valid = regions_of(mask, pred.shape, mask_is)
    if select:
        pred, target = pred.masked_fill(hole == 0, 0.0), target.masked_fill(valid == 0, 0.0)
    return hole * pred + valid * target


def dilated(hole: Tensor) -> Tensor:
    """The largest of the nine values around each pixel."""
    h, w = hole.shape[-2:]
    around = F.pad(hole, (1, 1, 1, 1), value=-torch.inf)
    return torch.stack([around[..., i : i + h, j : j + w] for i in range(3) for j in range(3)]).amax(0)


def total_variation_formula(
    image: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    *,
    mode: str,
    penalty: str,
    mask_is: str = "valid",
    select: bool = True,
) -> Tensor:
    region, normalize = MODES[mode]
    if target is not None:
        image = composite_formula(image, target, mask, mask_is=mask_is, select=select)
    loss = image[:0].sum()
    if image.numel() == 0:
        return loss
    weights = torch.ones_like(image)
    if region != "image":
        weights = regions_of(mask, image.shape, mask_is)[0]
        weights = dilated(weights) if region == "dilated_hole" else weights
    for dim in (2, 3):
        pairs = image.shape[dim] - 1
        if pairs == 0:
            continue
        weight = weights.narrow(dim, 0, pairs)
        if region != "first_pixel":
            weight = weight * weights.narrow(dim, 1, pairs)
        d = image.narrow(dim, 1, pairs) - image.narrow(dim, 0, pairs)
        values = weight * penalty_map(d.masked_fill(weight == 0, 0.0) if select else d, penalty)
        count = {
            "pairs": torch.tensor(values.numel()),
            "image": torch.tensor(image.numel()),
            "mask": weights.sum(),
        }[normalize or ("pairs" if region == "image" else "image")]
        loss = loss + ratio(values.sum(), count)
    return loss


def total_variation_call(
    backend: Backend | None, *, mode: str, penalty: str, mask_is: str = "valid", process_group: Any = None
) -> Callable[..., Tensor]:
    """The public function as a function of (image, target, mask)."""
    region, normalize = MODES[mode]

    def call(image: Tensor, target: Tensor | None, mask: Tensor | None) -> Tensor:
        return ik.total_variation_loss(
            image,
            None if region == "image" and target is None else mask,
            target=target,
            region=region,
            penalty=penalty,
            normalize=normalize,
            mask_is=mask_is,
            process_group=process_group,
            backend=backend and backend.name,
        )

    return call


GRADIENT_REGIONS = ("image", "hole", "dilated_hole", "ring")


def ring_of(hole: Tensor, ring: int) -> Tensor:
    """The hole and `ring` pixels on both sides of its border."""
    largest, smallest = (
        pick(
            F.pad(hole, (ring,) * 4, value=edge).unfold(2, 2 * ring + 1, 1).unfold(3, 2 * ring + 1, 1),
            (-1, -2),
        )
        for pick, edge in ((torch.amax, -torch.inf), (torch.amin, torch.inf))
    )
    return (hole + largest - smallest).clamp(0, 1)


def gradient_loss_formula(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    region: str = "ring",
    ring: int = 2,
    penalty: str = "l1",
    mask_is: str = "valid",
    select: bool = True,
) -> Tensor:
    image, weights = pred, torch.ones_like(pred)
    if pred.numel() == 0:
        return pred.sum() + target.sum()
    if mask is not None:
        image = composite_formula(pred, target, mask, mask_is=mask_is, select=select)
        hole = regions_of(mask, pred.shape, mask_is)[0]
        regions = {"image": lambda: weights, "hole": lambda: hole, "dilated_hole": lambda: dilated(hole)}
        weights = regions.get(region, lambda: ring_of(hole, ring))()
    numerator, denominator = image[:0].sum(), weights[:0].sum()
    for dim in (2, 3):
        weight = weights.narrow(dim, 1, image.shape[dim] - 1) * weights.narrow(dim, 0, image.shape[dim] - 1)
        d = image.diff(dim=dim) - target.diff(dim=dim)
        d = d.masked_fill(weight == 0, 0.0) if select else d
        numerator = numerator + (weight * penalty_map(d, penalty)).sum()
        denominator = denominator + weight.sum()
    return ratio(numerator, denominator)


def gradient_loss_call(backend: Backend | None, *, ring: int = 2, **options: Any) -> Callable[..., Tensor]:
    return partial(ik.gradient_loss, ring=ring, **options, backend=backend and backend.name)


# Unlike the defaults, so that an ignored one shows.
TERM_WEIGHTS = {"hole_weight": 5.0, "valid_weight": 0.75, "tv_weight": 0.5}
TERMS = ("total", "hole", "valid", "tv")


def inpainting_pixel_formula(
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    normalize: str,
    mode: str,
    penalty: str = "l1",
    mask_is: str = "valid",
    select: bool = True,
) -> tuple[Tensor, ...]:
    hole, valid = hole_valid_formula(
        pred, target, mask, penalty="l1", normalize=normalize, mask_is=mask_is, select=select
    )
    tv = total_variation_formula(
        pred, target, mask, mode=mode, penalty=penalty, mask_is=mask_is, select=select
    )
    by_hole, by_valid, by_tv = TERM_WEIGHTS.values()
    return by_hole * hole + by_valid * valid + by_tv * tv, hole, valid, tv


def inpainting_pixel_call(
    backend: Backend | None,
    *,
    normalize: str,
    mode: str,
    penalty: str = "l1",
    mask_is: str = "valid",
    process_group: Any = None,
) -> Callable[..., ik.InpaintingPixel]:
    region, tv_normalize = MODES[mode]
    return partial(
        ik.inpainting_pixel_loss,
        **TERM_WEIGHTS,
        normalize=normalize,
        tv_region=region,
        tv_penalty=penalty,
        tv_normalize=tv_normalize,
        mask_is=mask_is,
        process_group=process_group,
        backend=backend and backend.name,
    )


PARTS = ("raw", "composite", "target", "hole_raw", "hole_target")
# What makes three channels of one or three. The shifts are larger than what is shifted: a sum that cancels has no
# relative accuracy. The scales are no powers of two, so that a product rounds.
SCALE, SHIFT = (0.7, 1.3, 2.1), (12.0, -11.0, 13.0)


def stacked_images_formula(
    pred: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    parts: Sequence[str],
    scale: Sequence[float] | float | None = None,
    shift: Sequence[float] | float | None = None,
    swap_channels: bool = False,
    mask_is: str = "valid",
    select: bool = True,
) -> Tensor:
    made = {"raw": pred, "target": target}
    if mask is not None:
        hole, _ = regions_of(mask, pred.shape, mask_is)
        made["composite"] = composite_formula(pred, target, mask, mask_is=mask_is, select=select)
        for name, image in (("hole_raw", pred), ("hole_target", target)):
            made[name] = hole * (image.masked_fill(hole == 0, 0.0) if select else image)
    stacked = torch.cat([made[part] for part in parts])
    if swap_channels:
        stacked = stacked[:, list(range(stacked.shape[1]))[::-1]]
    for constant, combine in ((scale, torch.mul), (shift, torch.add)):
        if constant is not None:
            values = torch.tensor(constant, dtype=stacked.dtype).reshape(1, -1, 1, 1)
            stacked = combine(stacked, values)
    return stacked


def stacked_images_call(backend: Backend | None, **options: Any) -> Callable[..., Tensor]:
    return partial(ik.stacked_images, **options, backend=backend_for("stacked_images", backend))


def eighths(mask: Tensor) -> Tensor:
    """Fractions in eighths. A composite of equal images is then exactly these images in every dtype, and neighbours
    that are equal stay equal; otherwise the l1 gradient is the sign of a rounding error.
    """
    return (mask * 8).round() / 8 if mask.is_floating_point() else mask


def region_mask(
    kind: str, size: tuple[int, ...], dtype: str = "f32", values: str = "mixed", seed: int = 1
) -> Tensor:
    mask = make_mask(kind, size, dtype, values, seed)
    assert mask is not None
    return eighths(mask)


def tied_pair(size: tuple[int, ...], dtypes: str = "f32/f32", seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images of three values: a third of the neighbours are equal, and a third of pred equals target."""
    rng = generator(seed)
    images = [torch.randint(-1, 2, size, generator=rng) * 0.5 for _ in range(2)]
    return tuple(x.to(DTYPES[d]) for x, d in zip(images, dtypes.split("/"), strict=True))  # type: ignore[return-value]


@st.composite
def region_cases(draw: Any) -> dict[str, Any]:
    """Inputs of any size, layout, dtype and mask: {"pred", "target", "mask"}."""
    case: dict[str, Any] = draw(image_cases(masks=SHAPES))
    mask = case["mask"]
    # In place, so that the layout stays.
    mask.copy_(eighths(mask))
    if draw(st.booleans()):
        for t, tied in zip((case["pred"], case["target"]), tied_pair(tuple(case["pred"].shape)), strict=True):
            t.copy_(tied)
    return case
