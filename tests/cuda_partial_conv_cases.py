"""What the tests of partial convolution's emulated CUDA kernels share."""

from __future__ import annotations

from typing import Any

import torch
from harness import DTYPES, assert_within_budget, generator
from torch import Tensor

OPS = torch.ops.inpaint_kernels
FLOATS = ("f32", "f16", "bf16")
MASK_DTYPES = {**DTYPES, "bool": torch.bool, "u8": torch.uint8}
ACTIVATIONS = ("none", "relu", "leaky_relu")
BIASES = {"weighed": (True, False), "plain": (False, False), "scaled": (False, True)}
SLOPE = 0.3

# (N, C, ...) by the path it takes: planar blocks have 128 threads with 16 bytes each, interleaved ones 256.
SIZES = {
    "1x1": (2, 5, 1, 1),
    "odd": (2, 6, 5, 7),  # no whole vectors, in neither layout
    "vectors": (2, 16, 4, 6),  # whole vectors in both, a few threads a plane
    "half_block": (2, 8, 8, 32),  # planar: one and two warps a plane
    "wide": (1, 3, 24, 40),  # planar: four warps a plane, the second tile partial
    "c24": (2, 24, 3, 4),  # interleaved: 6 or 3 threads a pixel, the last of them idle
    "any_tiles": (1, 37, 5, 13),  # tiles of 32 x 32, partial both ways
    "volume": (2, 8, 2, 4, 6),
    "odd_volume": (1, 3, 3, 3, 5),
}
LAYOUTS = ("nchw", "nhwc", "nchw+1", "nhwc+1")


def dense(x: Tensor, layout: str) -> Tensor:
    """The values in a layout, "+1" starting one element past an aligned address."""
    order = [0, *range(2, x.ndim), 1] if layout.startswith("nhwc") else list(range(x.ndim))
    values = x.permute(order).contiguous()
    if layout.endswith("+1"):
        values = values.new_zeros(values.numel() + 1)[1:].view(values.shape).copy_(values)
    return values.permute([order.index(i) for i in range(x.ndim)])


def empty(like: Tensor, layout: str, dtype: str) -> Tensor:
    return dense(torch.full(like.shape, torch.nan, dtype=DTYPES[dtype]), layout)


def image(size: tuple[int, ...], dtype: str, layout: str = "nchw", seed: int = 0) -> Tensor:
    return dense(torch.randn(size, generator=generator(seed)).to(DTYPES[dtype]), layout)


def planes_for(size: tuple[int, ...], groups: int = 1, batch: int | None = None) -> tuple[Tensor, Tensor]:
    """A third of the windows empty."""
    shape = (size[0] if batch is None else batch, groups, *size[2:])
    rng = generator(3)
    new_mask = (torch.rand(shape, generator=rng) * 1.5 - 0.5).clamp(min=0)
    ratio = torch.where(new_mask == 0, 0.0, torch.rand(shape, generator=rng) * 8 + 0.5)
    return ratio, new_mask


def within(actual: Tensor, plain: Tensor, truth: Tensor, what: str, magnitude: Tensor | None = None) -> None:
    assert_within_budget(actual, plain, truth, acc=torch.float32, what=what, magnitude=magnitude)


def mask_of(shape: tuple[int, ...], dtype: str, layout: str = "nchw") -> Tensor:
    rng = generator(7)
    holes = torch.rand(shape, generator=rng) < 0.4
    values = torch.rand(shape, generator=rng) * (5 if dtype == "u8" else 1) + (dtype == "u8")
    return dense(torch.where(holes, 0.0, values).to(MASK_DTYPES[dtype]), layout)


def run_windows(mask: Tensor, call: Any = None, **settings: Any) -> tuple[Tensor, Tensor]:
    dims = mask.ndim - 2
    found = {
        "groups": 1,
        "multiplicity": 1,
        "kernel": (3,) * dims,
        "stride": (1,) * dims,
        "padding": (0,) * dims,
        "dilation": (1,) * dims,
        "numerator": 9.0,
        "update": "clamp",
        "dtype": torch.float32,
        **settings,
    }
    ratio, new_mask = (call or OPS.partial_conv_window_cuda)(mask, *found.values())
    return ratio, new_mask
