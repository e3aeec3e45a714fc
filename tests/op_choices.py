"""Which settings of `op_cases` a test takes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
from harness import COVERING, spread
from op_cases import OPS, Op


def ops(*beginnings: str) -> list[Op]:
    """The settings whose names begin with one of these."""
    found = [op for op in OPS.values() if op.id.startswith(beginnings)]
    assert all(any(op.id.startswith(b) for op in found) for b in beginnings), beginnings
    return found


# Of every op a setting for each way through its kernels: signs or images kept, each region, each denominator.
WAYS = {
    "masked_l1": ("l1 mask", "l1 none", "l2 sample", "charbonnier image", "huber sum", "huber none"),
    "hole_valid": ("l1 image valid", "l1 sample hole", "charbonnier mask valid", "huber mask hole"),
    "total_variation": (
        "l1 dilated_hole-default composite",
        "l1 first_pixel-image image",
        "l1 hole-mask image",
        "l2 hole-mask composite",
        "l2 image-default composite",
        "l2 dilated_hole-mask image",
    ),
    "inpainting_pixel": (
        "image dilated_hole-default l1",
        "mask image-default l1",
        "sample hole-mask l2",
        "image first_pixel-mask l1",
    ),
    "gradient_loss": ("ring l1", "dilated_hole l2", "hole l1", "image l1"),
    "ssim": ("same", "same l1"),
    "stacked_images": ("all", "swap", "composite", "holes"),
    "composite": ("valid", "hole"),
}
FEATURE_WAYS = {
    "gram": ("chw", "none"),
    "style": ("chw-l1", "hw-l2", "gatys", "hw-l1 gram", "gatys gram", "chw-l1 once"),
    "feature_distance": ("l1 mask", "l1", "l2 mask", "charbonnier", "l1 once"),
    "lpips": ("mask", "plain", "once"),
}
ALL_WAYS = WAYS | FEATURE_WAYS
SETTINGS = [OPS[f"{name} {way}"] for name, rows in ALL_WAYS.items() for way in rows]
# One setting of each op, that of its documentation's example.
USUAL = [OPS[f"{name} {settings[0]}"] for name, settings in ALL_WAYS.items() if name != "composite"]
USUAL.append(OPS["partial_conv usual n1 2d"])


def enough(chosen: Iterable[Op]) -> list[Op]:
    """All, or where there is no time for that six settings of each op, among them every value of an option."""
    if not COVERING:
        return list(chosen)
    by_name: dict[str, dict[tuple[object, ...], Op]] = {}
    for op in chosen:
        by_name.setdefault(op.name, {})[tuple(op.id.split())] = op
    return [rows[row] for rows in by_name.values() for row in spread(list(rows), 6)]


def ways(chosen: dict[str, Iterable[str]] = WAYS, **axes: Any) -> pytest.MarkDecorator:
    """As `grid`, for each op by itself: its `WAYS` are one axis; an axis may be a function of the op's name."""
    rows: list[tuple[object, ...]] = []
    for name, settings in chosen.items():
        found = [OPS[f"{name} {setting}"] for setting in settings]
        lists = [found, *(list(axis(name) if callable(axis) else axis) for axis in axes.values())]
        rows += spread(list(itertools.product(*lists)), 2 * max(map(len, lists)) if COVERING else None)
    params = [pytest.param(*row, id="-".join(map(str, row))) for row in rows]
    return pytest.mark.parametrize(("op", *axes), params)
