"""Settings of every op for the tests of transforms, modes and kinds of tensors, each formula of a gradient once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from feature_cases import distance_call, distance_settings, style_call, style_settings
from harness import Backend, generator
from op_cases import DEFAULT, OPS, SMALL, Op
from torch import Tensor


def with_weights() -> Iterator[Op]:
    """The weights of the layers in a tensor, which kernels take as numbers only."""
    for like, call in (
        (OPS["style chw-l2"], lambda backend, w: style_call(backend, style_settings("chw-l2", w))),
        (
            OPS["feature_distance l1"],
            lambda backend, w: distance_call(backend, 2, distance_settings(weights=w)),
        ),
    ):
        yield replace(
            like,
            id=f"{like.name} with weights",
            by=lambda backend, call=call: lambda *t: call(backend, t[-1])(*t[:-1]),
            make=lambda *args, like=like: [*like.make(*args), torch.ones(2, dtype=torch.float64)],
        )


# Every differentiable function, and every formula of its gradients.
CASES = [
    *(
        OPS[f"masked_l1 {setting}"]
        for setting in ("l1 mask", "l1 none", "l2 mask", "charbonnier sample", "huber image")
    ),
    *(OPS[f"hole_valid {setting}"] for setting in ("l1 image valid", "l2 mask hole")),
    OPS["total_variation l1 hole-default image"],
    OPS["total_variation l2 dilated_hole-mask image"],
    OPS["total_variation l1 image-default composite"],
    OPS["total_variation l2 first_pixel-default composite"],
    *(OPS[f"inpainting_pixel image {DEFAULT} {penalty}"] for penalty in ("l1", "l2")),
    *(OPS[f"gradient_loss {setting}"] for setting in ("ring l1", "dilated_hole l2")),
    *(OPS[f"ssim {setting}"] for setting in ("same l1", "valid")),
    OPS["composite valid"],
    OPS["stacked_images all"],
    OPS["gram chw"],
    *(OPS[f"style {setting}"] for setting in ("chw-l1", "gatys", "chw-l2 gram")),
    *(OPS[f"feature_distance {setting}"] for setting in ("l1", "l2", "charbonnier mask")),
    *(OPS[f"lpips {setting}"] for setting in ("mask", "plain")),
    *with_weights(),
    *(OPS[f"partial_conv {setting}"] for setting in ("usual n1 2d", "mat n1 2d", "soft n1 3d")),
]
# One of each shape of work.
COMPILED = [
    op
    for op in CASES
    if op.id
    in (
        "masked_l1 l2 mask",
        "total_variation l2 first_pixel-default composite",
        "stacked_images all",
        "style with weights",
        "partial_conv usual n1 2d",
    )
]


def tensors_of(
    op: Op, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu"
) -> list[Tensor]:
    """Images without ties; masks of zeros, ones and fractions."""
    rng = generator(seed)
    found = []
    for i, like in enumerate(op.make(SMALL, "f64/f64")):
        value = torch.rand(like.shape, generator=rng, dtype=torch.float64) + 0.1 * (i + 1)
        if i >= op.free and like.ndim >= 4:
            value = (2 * torch.rand(like.shape, generator=rng, dtype=torch.float64) - 0.5).clamp(0, 1)
        found.append(value.to(device, dtype))
    return found


def forced(op: Op, backend: Backend) -> str | None:
    """The backend's name where it can be forced."""
    return None if "weights" in op.id else backend.name
