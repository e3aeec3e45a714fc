"""The CUDA kernels of partial convolution on the CPU: sizes, strides and arguments at which they alone change.

What any backend has to do, the tests of the op and of its kernels ask of the emulated one: `make test-emulated`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import cuda_emulation
import pytest
import torch
import torch.nn.functional as F
from harness import (
    DTYPES,
    EMULATING,
    INTERPRETING,
    assert_within_budget,
    covering,
    generator,
    poisoned_allocations,
    same_bits,
)
from pixel_cases import MASK_DTYPES
from torch import Tensor

from inpaint_kernels.reference import partial_conv as reference

pytestmark = pytest.mark.skipif(INTERPRETING or EMULATING, reason="runs with the compiled backends")

OPS = torch.ops.inpaint_kernels
FORMS = {"weighed": (True, False), "plain": (False, False), "scaled": (False, True)}
SLOPE = 0.3
ODD, VECTORS = (2, 6, 5, 7), (2, 16, 4, 6)
LAYOUTS = ("nchw", "nhwc", "nchw+1", "nhwc+1")


@pytest.fixture(autouse=True, scope="module")
def emulation() -> Iterator[None]:
    with cuda_emulation.install():
        yield


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


def packed(form: tuple[bool, bool], activation: str) -> tuple[int, float]:
    """`how` and `slope` of the operators."""
    return reference.Finish(*form, activation).packed(), 0.0 if activation == "relu" else SLOPE


def check_finish(
    raw: Tensor,
    planes: tuple[Tensor, Tensor],
    bias: Tensor | None,
    out: Tensor,
    activation: str = "none",
    how: tuple[bool, bool] = (True, False),
) -> None:
    keep = raw.clone()

    def formula(dtype: torch.dtype, act: str = activation, size: bool = False) -> Tensor:
        values = [t if t is None else t.to(dtype) for t in (keep, *planes, bias)]
        if size:
            values = [t if t is None else t.abs() for t in values]
        return reference.finish(*values, *packed(how, act))  # type: ignore[arg-type]

    OPS.partial_conv_finish_cuda(raw, *planes, bias, *packed(how, activation), out)
    terms = formula(torch.float64, "none", True)
    within(out, formula(torch.float32), formula(torch.float64), "finish", terms)


def check_backward(
    grad: Tensor,
    planes: tuple[Tensor, Tensor],
    out: Tensor,
    activation: str = "none",
    how: tuple[bool, bool] = (True, False),
    output_layout: str = "nchw",
    output_dtype: str = "f32",
    need_bias: bool = True,
) -> Tensor:
    raw = torch.randn(grad.shape, generator=generator(9))
    bias = torch.randn(grad.shape[1], generator=generator(10))
    output = None
    if activation != "none":
        output = reference.finish(raw, *planes, bias, *packed(how, activation))
        output = dense(output.to(DTYPES[output_dtype]), output_layout)
    keep = grad.clone()

    def formula(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (raw, bias)]
        planes_there = [t.to(dtype) for t in planes]
        value = reference.finish(leaves[0], *planes_there, leaves[1], *packed(how, activation))
        by_raw, by_bias = torch.autograd.grad(value, leaves, keep.to(dtype))
        return by_raw, by_bias

    with poisoned_allocations():
        bias_grad = OPS.partial_conv_finish_backward_cuda(
            grad, output, *planes, *packed(how, activation), need_bias, out
        )
    plain, truth = formula(torch.float32), formula(torch.float64)
    within(out, plain[0], truth[0], "gradient by the convolution")
    if not need_bias:
        assert bias_grad.shape == (0,)
        return bias_grad
    assert bias_grad.dtype == torch.float32
    others = [0, *range(2, grad.ndim)]
    scale = reference.channel_planes(planes[0 if how[1] else 1], grad.shape[1]).double()
    terms = (keep.double().nan_to_num(0, 0, 0) * scale.clamp(min=1)).abs().sum(others)
    within(bias_grad, plain[1], truth[1], "gradient by the bias", terms)
    return bias_grad


def check_both(
    size: tuple[int, ...],
    planes: tuple[Tensor, Tensor],
    dtype: str,
    layout: str,
    activation: str = "none",
    how: str = "weighed",
) -> None:
    source = image(size, dtype, layout)
    bias = torch.randn(size[1], generator=generator(1)).to(DTYPES[dtype])
    check_finish(source, planes, bias, empty(source, layout, dtype), activation, FORMS[how])
    to = empty(source, layout, dtype)
    check_backward(source, planes, to, activation, FORMS[how], layout, dtype)


def test_many_channels() -> None:
    """Interleaved: more vectors than a block has threads."""
    size = (1, 1056, 1, 3)
    check_both(size, planes_for(size), "f32", "nhwc")


@covering(groups=(1, 2, 4, 8, 16), batch=(1, 2), layout=("nchw", "nhwc", "nhwc+1"), dtype=("f32", "bf16"))
def test_groups(groups: int, batch: int, layout: str, dtype: str) -> None:
    for size in ((2, 16, 4, 6), (2, 16, 3, 5), (2, 48, 2, 2, 2)):
        check_both(size, planes_for(size, groups, batch), dtype, layout)


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
    ratio, new_mask = planes_for(size, batch=1)
    grad = image(size, "f32", layout)
    out = empty(grad, layout, "f32")
    settings = (ratio, new_mask, *packed((True, False), "none"))
    bias_grad = OPS.partial_conv_finish_backward_cuda(grad, None, *settings, True, out)
    terms = grad * new_mask
    torch.testing.assert_close(out, terms * ratio, rtol=1e-6, atol=0)
    others = (0, 2, 3)
    error = (bias_grad.double() - terms.sum(others, dtype=torch.float64)).abs()
    assert bool((error <= 1e-6 * terms.abs().sum(others, dtype=torch.float64)).all())
    if size[1] == 9:
        raw = image((size[0], 17, *size[2:]), "f32", layout)
        out = empty(raw, layout, "f32")
        OPS.partial_conv_finish_cuda(raw, ratio, new_mask, None, *packed((False, False), "none"), out)
        torch.testing.assert_close(out, raw * ratio, rtol=1e-6, atol=0)


@covering(bias=("f64", "bf16", "strided"), layout=LAYOUTS)
def test_biases(bias: str, layout: str) -> None:
    size = VECTORS
    values = torch.randn(32, generator=generator(5), dtype=DTYPES.get(bias, torch.float32))
    source = image(size, "f16", layout)
    given = values[::2] if bias == "strided" else values[:16]
    check_finish(source, planes_for(size), given, empty(source, layout, "f16"))


@covering(layout=LAYOUTS, dtype=("f32", "f16"), size=(ODD, VECTORS))
def test_in_place(layout: str, dtype: str, size: tuple[int, ...]) -> None:
    """The result may overwrite the source, bit for bit as elsewhere."""
    planes = planes_for(size)
    source = image(size, dtype, layout)
    bias = torch.randn(source.shape[1])
    masks = [planes[1], image(size, "f32", layout).clamp(min=0)]

    def finish(x: Tensor, out: Tensor) -> None:
        OPS.partial_conv_finish_cuda(x, *planes, bias, *packed((True, False), "relu"), out)

    def backward(x: Tensor, out: Tensor) -> None:
        OPS.partial_conv_finish_backward_cuda(x, source, *planes, *packed((True, False), "relu"), True, out)

    def mask(x: Tensor, out: Tensor, k: int) -> None:
        OPS.partial_conv_mask_input_cuda(x, masks[k], out)

    for run in (finish, backward, lambda x, o: mask(x, o, 0), lambda x, o: mask(x, o, 1)):
        out, same = empty(source, layout, dtype), dense(source.clone(), layout)
        run(source, out)
        run(same, same)
        assert same_bits(out, same)


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
        within(got, usual, want.clamp(max=torch.finfo(torch.float32).max), what)


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
            found = []
            for mask in (ones, bytes_.view(torch.bool)):
                out = empty(x, layout, "f32")
                OPS.partial_conv_mask_input_cuda(x, mask, out)
                found.append((out, *run_windows(mask)))
            assert all(map(same_bits, *found))


def test_errors() -> None:
    x, planes = image(VECTORS, "f32"), planes_for(VECTORS)
    with pytest.raises(RuntimeError, match="float16, bfloat16 and float32"):
        OPS.partial_conv_mask_input_cuda(x.double(), None, x.double())
    with pytest.raises(RuntimeError, match="differ in shape"):
        OPS.partial_conv_mask_input_cuda(x, None, x[:1].clone())
    with pytest.raises(RuntimeError, match="does not fit"):
        OPS.partial_conv_mask_input_cuda(x, torch.ones(2, 3, 4, 6), x)
    with pytest.raises(RuntimeError, match="contiguous or channels_last"):
        OPS.partial_conv_mask_input_cuda(x.transpose(2, 3), None, x.transpose(2, 3))
    with pytest.raises(RuntimeError, match="output is needed"):
        OPS.partial_conv_finish_backward_cuda(x, None, *planes, *packed((True, False), "relu"), True, x)
    with pytest.raises(RuntimeError, match="bias must be"):
        OPS.partial_conv_finish_cuda(x, *planes, torch.ones(3), *packed((True, False), "none"), x)
    with pytest.raises(RuntimeError, match="float32"):
        run_windows(planes[0], dtype=torch.float64)
