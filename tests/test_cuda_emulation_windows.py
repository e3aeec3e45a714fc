"""The CUDA kernels that sum a partial convolution's mask over windows, run on the CPU, against the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cuda_emulation
import pytest
import torch
from cuda_partial_conv_cases import MASK_DTYPES, dense, mask_of, run_windows, within
from harness import INTERPRETING, covering, poisoned_allocations
from torch import Tensor

from inpaint_kernels.reference import partial_conv as reference

pytestmark = pytest.mark.skipif(INTERPRETING, reason="has nothing to do with Triton")


@pytest.fixture(autouse=True, scope="module")
def emulation() -> Iterator[None]:
    with cuda_emulation.install():
        yield


def check_windows(mask: Tensor, **settings: Any) -> None:
    with poisoned_allocations():
        actual = run_windows(mask, **settings)
    plain = run_windows(mask, reference.window_planes, **settings)
    truth = run_windows(mask, reference.window_planes, **{**settings, "dtype": torch.float64})
    for what, got, usual, want in zip(("ratio", "new mask"), actual, plain, truth, strict=True):
        assert got.is_contiguous() and got.dtype == torch.float32
        within(got, usual, want.clamp(max=torch.finfo(torch.float32).max), what)


WINDOWS: dict[str, dict[str, Any]] = {
    "1x1": {"kernel": (1, 1)},
    "3x3": {"kernel": (3, 3), "padding": (1, 1)},
    "5x2": {"kernel": (5, 2), "padding": (2, 3), "stride": (2, 1)},
    "dilated": {"kernel": (3, 3), "dilation": (2, 3), "padding": (4, 3), "stride": (1, 2)},
    "beyond": {"kernel": (7, 7), "padding": (6, 6), "stride": (3, 2)},
    "whole": {"kernel": (6, 8), "numerator": 1.0},
}


@covering(windows=WINDOWS, update=("clamp", "binary", "proportional"), channels=(1, 6), groups=(1, 3))
def test_windows(windows: str, update: str, channels: int, groups: int) -> None:
    settings = {**WINDOWS[windows], "update": update, "groups": groups}
    settings["multiplicity"] = 1 if channels > 1 else 4
    size = (2, channels, 6, 8)
    for dtype in ("f32", "bool"):
        check_windows(mask_of(size, dtype), **settings)
    # Subnormal sums: the ratio stays finite.
    check_windows(mask_of(size, "f32") * 1e-39, **settings)


@covering(update=("clamp", "proportional"), channels=(1, 4), groups=(1, 2, 4))
def test_windows_of_volumes(update: str, channels: int, groups: int) -> None:
    mask = mask_of((2, channels, 4, 5, 6), "f32")
    settings = {"update": update, "groups": groups, "kernel": (2, 3, 3), "padding": (1, 0, 1)}
    for layout in ("nchw", "nhwc"):
        check_windows(dense(mask, layout), **settings, stride=(1, 2, 1), dilation=(3, 1, 2))


STRIDES = {
    "nchw": lambda m: m,
    "nhwc": lambda m: dense(m, "nhwc"),
    "nchw+1": lambda m: dense(m, "nchw+1"),
    "nhwc+1": lambda m: dense(m, "nhwc+1"),
    "transposed": lambda m: m.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_inside": lambda m: m.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda m: torch.stack([m, m], -1)[..., 0],
    "cropped": lambda m: torch.nn.functional.pad(m, (1, 2, 3, 0))[..., 3:, 1:-2],
    "odd_batches": lambda m: torch.nn.functional.pad(m.flatten(1), (0, 1))[:, :-1].unflatten(1, m.shape[1:]),
    "odd_channels": lambda m: torch.nn.functional.pad(m.flatten(2), (0, 1))[..., :-1].unflatten(
        2, m.shape[2:]
    ),
    "expanded": lambda m: m[:, :1, :1].expand(m.shape),
    "channels_apart": lambda m: torch.cat([m, m], 1)[:, ::2],
}


@covering(strides=STRIDES, dtype=MASK_DTYPES, channels=(1, 3, 32, 80))
def test_window_strides(strides: str, dtype: str, channels: int) -> None:
    """Sums over channels by vectors, by elements, along pixels and along channels."""
    for batch, height, width in ((2, 4, 8), (1, 5, 7)):
        mask = STRIDES[strides](mask_of((batch, channels, height, width), dtype))
        for groups in (1,) if channels == 1 else (1, channels) if channels == 3 else (1, 2):
            check_windows(mask, groups=groups, padding=(1, 1), update="proportional")


def test_larger_windows() -> None:
    """Several blocks of outputs, of pixels, and of channels."""
    for channels, layout in ((1, "nchw"), (40, "nchw"), (40, "nhwc"), (300, "nhwc"), (5, "nhwc")):
        mask = dense(mask_of((2, channels, 21, 20), "f32"), layout)
        check_windows(mask, padding=(1, 1), stride=(1, 1))
