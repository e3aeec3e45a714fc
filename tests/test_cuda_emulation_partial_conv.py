"""The CUDA kernels of partial convolution on the CPU: sizes, strides and arguments at which they alone change.

What any backend has to do, the tests of the op and of its kernels ask of the emulated one: `make test-emulated`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_emulation import emulation  # noqa: F401
from harness import (
    DTYPES,
    EMULATED,
    EMULATING,
    INTERPRETING,
    assert_within_budget,
    covering,
    generator,
    poisoned_allocations,
    same_bits,
)
from partial_conv_cases import Case, check, make_mask, make_tensors
from pixel_cases import MASK_DTYPES
from torch import Tensor

from inpaint_kernels.reference import partial_conv as reference

pytestmark = pytest.mark.skipif(INTERPRETING or EMULATING, reason="runs with the compiled backends")

OPS = torch.ops.inpaint_kernels
ODD, VECTORS = (2, 6, 5, 7), (2, 16, 4, 6)
LAYOUTS = ("nchw", "nhwc", "nchw+1", "nhwc+1")
# `how` and `slope` of the operators.
WEIGHED, PLAIN, RELU = (
    (reference.Finish(weigh, False, activation).packed(), 0.0)
    for weigh, activation in ((True, "none"), (False, "none"), (True, "relu"))
)


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


def planes_for(batch: int, *size: int) -> tuple[Tensor, Tensor]:
    """Ratio and new mask; a third of the windows empty."""
    shape = (batch, 1, *size)
    rng = generator(3)
    new_mask = (torch.rand(shape, generator=rng) * 1.5 - 0.5).clamp(min=0)
    ratio = torch.where(new_mask == 0, 0.0, torch.rand(shape, generator=rng) * 8 + 0.5)
    return ratio, new_mask


def mask_of(shape: tuple[int, ...], dtype: str, layout: str = "nchw") -> Tensor:
    rng = generator(7)
    holes = torch.rand(shape, generator=rng) < 0.4
    values = torch.rand(shape, generator=rng) * (5 if dtype == "u8" else 1) + (dtype == "u8")
    return dense(torch.where(holes, 0.0, values).to(MASK_DTYPES[dtype]), layout)


@covering(
    groups=(1, 2, 4, 8, 16),
    size=((2, 16, 4, 6), (2, 16, 3, 5), (2, 48, 2, 2, 2)),
    mask=("nc", "1c"),
    layout=("contiguous", "channels_last"),
    dtype=("f32", "bf16"),
)
def test_groups(groups: int, size: tuple[int, ...], mask: str, layout: str, dtype: str) -> None:
    """A plane may have fewer channels than a vector."""
    case = Case(size=size, outputs=size[1], groups=groups, options={"multi_channel": True})
    known = make_mask(mask, size)
    check(EMULATED, case, make_tensors(case, dtype, mask=known, layouts=f"{layout}/contiguous"))


# More than 2048 tiles, so that a block goes over its share in several rounds.
@covering(
    case=(
        ("nchw", (700, 1030, 2, 2)),  # a vector a plane
        ("nchw", (700, 9, 10, 26)),  # four warps a plane
        ("nhwc", (1, 8, 1025, 1024)),
    )
)
def test_rounds(case: tuple[str, tuple[int, ...]]) -> None:
    layout, size = case
    ratio, new_mask = planes_for(1, *size[2:])
    grad = image(size, "f32", layout)
    out = empty(grad, layout, "f32")
    settings = (ratio, new_mask, *WEIGHED)
    bias_grad = OPS.partial_conv_finish_backward_cuda(grad, None, *settings, True, out)
    terms = grad * new_mask
    torch.testing.assert_close(out, terms * ratio, rtol=1e-6, atol=0)
    others = (0, 2, 3)
    error = (bias_grad.double() - terms.sum(others, dtype=torch.float64)).abs()
    assert bool((error <= 1e-6 * terms.abs().sum(others, dtype=torch.float64)).all())
    if size[1] == 9:
        raw = image((size[0], 17, *size[2:]), "f32", layout)
        out = empty(raw, layout, "f32")
        OPS.partial_conv_finish_cuda(raw, ratio, new_mask, None, *PLAIN, out)
        torch.testing.assert_close(out, raw * ratio, rtol=1e-6, atol=0)


@covering(layout=LAYOUTS, dtype=("f32", "f16"), size=(ODD, VECTORS))
def test_place_in_memory(layout: str, dtype: str, size: tuple[int, ...]) -> None:
    """Neither the layout, nor where a tensor starts, nor a result that overwrites its source changes a bit."""
    batch, channels, *plane = size
    planes = planes_for(batch, *plane)
    bias = torch.randn(2 * channels, generator=generator(5))[::2]

    def run(layout: str, in_place: bool) -> list[Tensor]:
        output, wide = image(size, dtype, layout, seed=1), image(size, "f32", layout).clamp(min=0)
        results = []
        for kernel in (
            lambda x, out: OPS.partial_conv_mask_input_cuda(x, planes[1], out),
            lambda x, out: OPS.partial_conv_mask_input_cuda(x, wide, out),
            lambda x, out: OPS.partial_conv_finish_cuda(x, *planes, bias, *RELU, out),
            lambda x, out: OPS.partial_conv_finish_backward_cuda(x, output, *planes, *RELU, True, out),
        ):
            source = image(size, dtype, layout)
            out = source if in_place else empty(source, layout, dtype)
            bias_grad = kernel(source, out)
            results += [out.contiguous()] if bias_grad is None else [out.contiguous(), bias_grad]
        return results

    want = run("nchw", False)
    for in_place in (False, True):
        *got, bias_grad = run(layout, in_place)
        assert all(map(same_bits, got, want))
        torch.testing.assert_close(bias_grad, want[-1])


def run_windows(
    mask: Tensor,
    call: Any = None,
    groups: int = 1,
    update: str = "proportional",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    windows = reference.Windows((3, 3), (1, 1), (1, 1), (1, 1), groups).packed()
    ratio, new_mask = (call or OPS.partial_conv_window_cuda)(mask, 1, windows, 9.0, update, dtype)
    return ratio, new_mask


def check_windows(mask: Tensor, **settings: Any) -> None:
    with poisoned_allocations():
        actual = run_windows(mask, **settings)
    plain = run_windows(mask, reference.window_planes, **settings)
    truth = run_windows(mask, reference.window_planes, **{**settings, "dtype": torch.float64})
    for what, got, usual, want in zip(("ratio", "new mask"), actual, plain, truth, strict=True):
        assert got.is_contiguous() and got.dtype == torch.float32
        truth_in_range = want.clamp(max=torch.finfo(torch.float32).max)
        assert_within_budget(got, usual, truth_in_range, acc=torch.float32, what=what)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda m: m,
    "nhwc": lambda m: dense(m, "nhwc"),
    "nchw+1": lambda m: dense(m, "nchw+1"),
    "nhwc+1": lambda m: dense(m, "nhwc+1"),
    "transposed": lambda m: m.transpose(2, 3).contiguous().transpose(2, 3),
    "batch_inside": lambda m: m.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda m: torch.stack([m, m], -1)[..., 0],
    "cropped": lambda m: F.pad(m, (1, 2, 3, 0))[..., 3:, 1:-2],
    "odd_batches": lambda m: F.pad(m.flatten(1), (0, 1))[:, :-1].unflatten(1, m.shape[1:]),
    "odd_channels": lambda m: F.pad(m.flatten(2), (0, 1))[..., :-1].unflatten(2, m.shape[2:]),
    "expanded": lambda m: m[:, :1, :1].expand(m.shape),
    "channels_apart": lambda m: torch.cat([m, m], 1)[:, ::2],
}


@covering(strides=STRIDES, dtype=MASK_DTYPES, channels=(1, 3, 32, 80))
def test_window_strides(strides: str, dtype: str, channels: int) -> None:
    """Sums over channels by vectors, by elements, along pixels and along channels."""
    for batch, height, width in ((2, 4, 8), (1, 5, 7)):
        mask = STRIDES[strides](mask_of((batch, channels, height, width), dtype))
        for groups in (1,) if channels == 1 else (1, channels) if channels == 3 else (1, 2):
            check_windows(mask, groups=groups)


def test_larger_windows() -> None:
    """Several blocks of outputs, of pixels, and of channels."""
    for channels, layout in ((1, "nchw"), (40, "nchw"), (40, "nhwc"), (300, "nhwc"), (5, "nhwc")):
        mask = dense(mask_of((2, channels, 21, 20), "f32"), layout)
        check_windows(mask, update="clamp")


def mask_shapes(size: tuple[int, ...]) -> list[tuple[int, ...]]:
    n, c, *plane = size
    return [(n, 1, *plane), (1, 1, *plane), (n, c, *plane), (1, c, *plane)]


def test_bool_from_bytes() -> None:
    """A bool tensor may hold any byte; all but 0 are true."""
    for size in (VECTORS, ODD):
        for kind, layout in product(mask_shapes(size), ("nchw", "nhwc")):
            bytes_ = dense((mask_of(kind, "bool").to(torch.uint8) * 255), layout)
            ones = dense(bytes_ != 0, layout)
            x = image(size, "f32", layout)
            results = []
            for mask in (ones, bytes_.view(torch.bool)):
                out = empty(x, layout, "f32")
                OPS.partial_conv_mask_input_cuda(x, mask, out)
                results.append((out, *run_windows(mask)))
            assert all(map(same_bits, *results))


def test_errors() -> None:
    x, planes = image(VECTORS, "f32"), planes_for(2, 4, 6)
    sliced = x.transpose(2, 3)
    for message, call in (
        (
            "float16, bfloat16 and float32",
            lambda: OPS.partial_conv_mask_input_cuda(x.double(), None, x.double()),
        ),
        ("differ in shape", lambda: OPS.partial_conv_mask_input_cuda(x, None, x[:1].clone())),
        ("does not fit", lambda: OPS.partial_conv_mask_input_cuda(x, torch.ones(2, 3, 4, 6), x)),
        ("contiguous or channels_last", lambda: OPS.partial_conv_mask_input_cuda(sliced, None, sliced)),
        ("output is needed", lambda: OPS.partial_conv_finish_backward_cuda(x, None, *planes, *RELU, True, x)),
        ("bias must be", lambda: OPS.partial_conv_finish_cuda(x, *planes, torch.ones(3), *WEIGHED, x)),
        ("float32", lambda: run_windows(planes[0], dtype=torch.float64)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()
