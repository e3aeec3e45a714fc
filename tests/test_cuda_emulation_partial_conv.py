"""The CUDA kernels of partial convolution, run on the CPU, against the formulas of the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import cuda_emulation
import pytest
import torch
from cuda_partial_conv_cases import (
    ACTIVATIONS,
    BIASES,
    FLOATS,
    LAYOUTS,
    MASK_DTYPES,
    OPS,
    SIZES,
    SLOPE,
    dense,
    empty,
    image,
    mask_of,
    planes_for,
    run_windows,
    within,
)
from harness import (
    DTYPES,
    INTERPRETING,
    covering,
    generator,
    poisoned_allocations,
    same_bits,
)
from torch import Tensor

import inpaint_kernels as ik
from inpaint_kernels.reference import partial_conv as reference

pytestmark = pytest.mark.skipif(INTERPRETING, reason="has nothing to do with Triton")


@pytest.fixture(autouse=True, scope="module")
def emulation() -> Iterator[None]:
    with cuda_emulation.install():
        yield


def check_finish(
    raw: Tensor,
    planes: tuple[Tensor, Tensor],
    bias: Tensor | None,
    out: Tensor,
    activation: str = "none",
    how: tuple[bool, bool] = (True, False),
) -> None:
    settings = (*how, activation, SLOPE)
    keep = raw.clone()

    def formula(dtype: torch.dtype, act: str = activation, size: bool = False) -> Tensor:
        values = [t if t is None else t.to(dtype) for t in (keep, *planes, bias)]
        if size:
            values = [t if t is None else t.abs() for t in values]
        return reference.finish(*values, *how, act, SLOPE)  # type: ignore[arg-type]

    OPS.partial_conv_finish_cuda(raw, *planes, bias, *settings, out)
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
        output = reference.finish(raw, *planes, bias, *how, activation, SLOPE)
        output = dense(output.to(DTYPES[output_dtype]), output_layout)
    keep = grad.clone()

    def formula(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (raw, bias)]
        planes_there = [t.to(dtype) for t in planes]
        value = reference.finish(leaves[0], *planes_there, leaves[1], *how, activation, SLOPE)
        by_raw, by_bias = torch.autograd.grad(value, leaves, keep.to(dtype))
        return by_raw, by_bias

    with poisoned_allocations():
        bias_grad = OPS.partial_conv_finish_backward_cuda(
            grad, output, *planes, *how, activation, SLOPE, need_bias, out
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
    check_finish(source, planes, bias, empty(source, layout, dtype), activation, BIASES[how])
    to = empty(source, layout, dtype)
    check_backward(source, planes, to, activation, BIASES[how], layout, dtype)


@covering(size=SIZES, layout=LAYOUTS, dtype=FLOATS)
def test_finish(size: str, layout: str, dtype: str) -> None:
    planes = planes_for(SIZES[size])
    for activation, how in (("none", "weighed"), ("leaky_relu", "plain"), ("relu", "scaled")):
        check_both(SIZES[size], planes, dtype, layout, activation, how)


def test_many_channels() -> None:
    """Interleaved: more vectors than a block has threads."""
    size = (1, 1056, 1, 3)
    check_both(size, planes_for(size), "f32", "nhwc")
    x = image(size, "f32", "nhwc")
    check_mask(x, mask_of((1, 1, 1, 3), "f32"), empty(x, "nhwc", "f32"))


@covering(activation=ACTIVATIONS, how=BIASES, layout=("nchw", "nhwc", "nchw+1"), dtype=("f32", "bf16"))
def test_settings(activation: str, how: str, layout: str, dtype: str) -> None:
    size = SIZES["vectors"]
    check_both(size, planes_for(size), dtype, layout, activation, how)
    source = image(size, dtype, layout)
    without = BIASES[how] if how == "scaled" else (False, False)
    check_finish(source, planes_for(size), None, empty(source, layout, dtype), activation, without)
    to = empty(source, layout, dtype)
    check_backward(source, planes_for(size), to, activation, BIASES[how], layout, dtype, need_bias=False)


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
    settings = (ratio, new_mask, True, False, "none", 0.0)
    bias_grad = OPS.partial_conv_finish_backward_cuda(grad, None, *settings, True, out)
    terms = grad * new_mask
    torch.testing.assert_close(out, terms * ratio, rtol=1e-6, atol=0)
    others = (0, 2, 3)
    error = (bias_grad.double() - terms.sum(others, dtype=torch.float64)).abs()
    assert bool((error <= 1e-6 * terms.abs().sum(others, dtype=torch.float64)).all())
    if size[1] == 9:
        raw = image((size[0], 17, *size[2:]), "f32", layout)
        out = empty(raw, layout, "f32")
        OPS.partial_conv_finish_cuda(raw, ratio, new_mask, None, False, False, "none", 0.0, out)
        torch.testing.assert_close(out, raw * ratio, rtol=1e-6, atol=0)


@covering(
    source=LAYOUTS[:3], output=LAYOUTS[:2], out=LAYOUTS[:2], size=("vectors", "any_tiles", "volume", "c24")
)
def test_two_layouts(source: str, output: str, out: str, size: str) -> None:
    planes = planes_for(SIZES[size])
    x = image(SIZES[size], "f32", source)
    check_finish(x, planes, torch.randn(x.shape[1]), empty(x, out, "f32"), "leaky_relu")
    check_backward(x, planes, empty(x, out, "f32"), "leaky_relu", output_layout=output)


@covering(source=FLOATS, output=FLOATS, out=FLOATS)
def test_mixed_dtypes(source: str, output: str, out: str) -> None:
    size = SIZES["vectors"]
    planes = planes_for(size, 2)
    x = image(size, source)
    check_finish(x, planes, torch.randn(16, dtype=DTYPES[output]), empty(x, "nchw", out))
    check_backward(x, planes, empty(x, "nchw", out), "relu", output_dtype=output)
    mask = image((2, 1, 4, 6), "f32").clamp(min=0)
    check_mask(x, mask, empty(x, "nchw", out))


@covering(bias=("f64", "bf16", "strided"), layout=LAYOUTS)
def test_biases(bias: str, layout: str) -> None:
    size = SIZES["vectors"]
    values = torch.randn(32, generator=generator(5), dtype=DTYPES.get(bias, torch.float32))
    source = image(size, "f16", layout)
    given = values[::2] if bias == "strided" else values[:16]
    check_finish(source, planes_for(size), given, empty(source, layout, "f16"))


@covering(layout=LAYOUTS, dtype=("f32", "f16"), size=("odd", "vectors"))
def test_in_place(layout: str, dtype: str, size: str) -> None:
    """The result may overwrite the source, bit for bit as elsewhere."""
    planes = planes_for(SIZES[size])
    source = image(SIZES[size], dtype, layout)
    bias = torch.randn(source.shape[1])
    masks = [planes[1], image(SIZES[size], "f32", layout).clamp(min=0)]

    def finish(x: Tensor, out: Tensor) -> None:
        OPS.partial_conv_finish_cuda(x, *planes, bias, True, False, "relu", 0.0, out)

    def backward(x: Tensor, out: Tensor) -> None:
        OPS.partial_conv_finish_backward_cuda(x, source, *planes, True, False, "relu", 0.0, True, out)

    def mask(x: Tensor, out: Tensor, k: int) -> None:
        OPS.partial_conv_mask_input_cuda(x, masks[k], out)

    for run in (finish, backward, lambda x, o: mask(x, o, 0), lambda x, o: mask(x, o, 1)):
        out, same = empty(source, layout, dtype), dense(source.clone(), layout)
        run(source, out)
        run(same, same)
        assert same_bits(out, same)


@covering(layout=LAYOUTS, dtype=FLOATS, how=BIASES, activation=("none", "leaky_relu"))
def test_specials(layout: str, dtype: str, how: str, activation: str) -> None:
    """NaN and Inf where nothing was seen change no bit; elsewhere they show."""
    size = SIZES["vectors"]
    planes = planes_for(size)
    unseen = (planes[1] == 0).expand(size)
    clean = image(size, dtype)
    bad = torch.where(torch.rand(size, generator=generator(2)) < 0.5, torch.nan, torch.inf).to(clean.dtype)
    dirty = dense(torch.where(unseen, bad, clean), layout)
    clean = dense(clean, layout)
    bias = torch.randn(size[1])
    settings = (*BIASES[how], activation, SLOPE)
    found = []
    for x in (clean, dirty):
        out, grad = empty(x, layout, dtype), empty(x, layout, dtype)
        OPS.partial_conv_finish_cuda(x, *planes, bias, *settings, out)
        bias_grad = OPS.partial_conv_finish_backward_cuda(x, x, *planes, *settings, True, grad)
        found.append((out, grad, bias_grad))
    for a, b in zip(*found, strict=True):
        assert same_bits(a, b) and bool(a.isfinite().all())
    assert not found[0][0][unseen].any()
    seen = dense(torch.where(unseen, clean, bad), layout)
    check_finish(seen, planes, bias, empty(seen, layout, dtype), activation, BIASES[how])


def check_mask(x: Tensor, mask: Tensor | None, out: Tensor) -> None:
    keep = x.clone()
    OPS.partial_conv_mask_input_cuda(x, mask, out)
    if mask is None:
        assert torch.equal(out, keep.to(out.dtype))
        return
    want = [
        torch.where(mask == 0, 0.0, keep.to(d)).to(d) * mask.to(d) for d in (torch.float32, torch.float64)
    ]
    within(out, *want, "masked input")
    assert not out[(mask == 0).expand(x.shape)].any()


def mask_shapes(size: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    n, c, *spatial = size
    return {
        "n1": (n, 1, *spatial),
        "11": (1, 1, *spatial),
        "nc": (n, c, *spatial),
        "1c": (1, c, *spatial),
    }


@covering(size=SIZES, layout=LAYOUTS, dtype=FLOATS)
def test_mask_input(size: str, layout: str, dtype: str) -> None:
    x = image(SIZES[size], dtype, layout)
    check_mask(x, None, empty(x, layout, dtype))
    for kind, mask_layout in product(("n1", "nc", "1c"), ("nchw", "nhwc")):
        mask = mask_of(mask_shapes(SIZES[size])[kind], "f32", mask_layout)
        check_mask(dense(x.masked_fill(mask == 0, torch.nan), layout), mask, empty(x, layout, dtype))


@covering(
    mask_dtype=MASK_DTYPES, kind=("n1", "11", "nc", "1c"), layout=("nchw", "nhwc"), dtype=("f32", "bf16")
)
def test_mask_dtypes(mask_dtype: str, kind: str, layout: str, dtype: str) -> None:
    for size in (SIZES["vectors"], SIZES["wide"], SIZES["odd"]):
        x = image(size, dtype, layout)
        for mask_layout in (layout, f"{layout}+1"):
            mask = mask_of(mask_shapes(size)[kind], mask_dtype, mask_layout)
            check_mask(x, mask, empty(x, layout, dtype))


@covering(
    source=LAYOUTS[:2],
    mask=LAYOUTS,
    out=LAYOUTS[:2],
    kind=("n1", "nc", "none"),
    dtypes=("f32/f16", "f16/f16"),
)
def test_mask_layouts(source: str, mask: str, out: str, kind: str, dtypes: str) -> None:
    for size in (SIZES["vectors"], SIZES["any_tiles"], SIZES["volume"]):
        x = image(size, dtypes[:3], source)
        weights = None if kind == "none" else mask_of(mask_shapes(size)[kind], "u8", mask)
        check_mask(x, weights, empty(x, out, dtypes[4:]))


def test_bool_from_bytes() -> None:
    """A bool tensor may hold any byte; all but 0 are true."""
    for size in (SIZES["vectors"], SIZES["odd"]):
        for kind, layout in product(mask_shapes(size).values(), ("nchw", "nhwc")):
            bytes_ = dense((mask_of(kind, "bool").to(torch.uint8) * 255), layout)
            ones = dense(bytes_ != 0, layout)
            x = image(size, "f32", layout)
            found = []
            for mask in (ones, bytes_.view(torch.bool)):
                out = empty(x, layout, "f32")
                OPS.partial_conv_mask_input_cuda(x, mask, out)
                found.append((out, *run_windows(mask, kernel=(3, 3), padding=(1, 1))))
            assert all(map(same_bits, *found))


@covering(
    dtype=FLOATS,
    layout=("nchw", "nhwc"),
    mask=("none", "hw", "n1", "nc"),
    groups=(1, 2),
    settings=("plain", "relu", "scaled", "unmasked", "binary"),
)
def test_whole_op(dtype: str, layout: str, mask: str, groups: int, settings: str) -> None:
    extra: dict[str, Any] = {
        "plain": {},
        "relu": {"activation": "relu", "numerator": "one"},
        "scaled": {"scale_bias": True, "activation": "leaky_relu"},
        "unmasked": {"mask_input": False, "mask_update": "proportional"},
        "binary": {"mask_update": "binary", "stride": 2},
    }[settings]
    check_op((2, 8, 7, 8), dtype, layout, mask, groups, extra)


@covering(dtype=("f32", "bf16"), layout=("nchw", "nhwc"), mask=("none", "n1", "nc"))
def test_whole_op_of_volumes(dtype: str, layout: str, mask: str) -> None:
    check_op((2, 4, 3, 5, 4), dtype, layout, mask, 2, {"activation": "relu"})


def check_op(
    size: tuple[int, ...], dtype: str, layout: str, mask: str, groups: int, extra: dict[str, Any]
) -> None:
    dims = len(size) - 2
    convolution = ik.partial_conv2d if dims == 2 else ik.partial_conv3d
    rng = generator(11)
    x = image(size, dtype, layout)
    weight = torch.randn((6, size[1] // groups, *[3] * dims), generator=rng).to(DTYPES[dtype])
    bias = torch.randn(6, generator=rng).to(DTYPES[dtype])
    shapes = {"none": None, "hw": size[2:], **mask_shapes(size)}
    shape = shapes[mask]
    known = None if shape is None else mask_of(shape, "bool")
    if known is not None:
        known[..., :3] = False  # windows that see nothing
    found = []
    for backend, wanted in (("cuda", x.dtype), ("reference", x.dtype), ("reference", torch.float64)):
        leaves = [t.detach().to(wanted).requires_grad_() for t in (x, weight, bias)]
        out, new_mask = convolution(*leaves, known, padding=1, groups=groups, **extra, backend=backend)
        upstream = torch.randn(out.shape, generator=generator(12)).to(x.dtype).to(wanted)
        found.append((out, new_mask, *torch.autograd.grad(out, leaves, upstream)))
    eps = torch.finfo(x.dtype).eps
    for got, usual, want in zip(*found, strict=True):
        assert got.shape == want.shape
        error, plain = ((t.double() - want).norm() for t in (got, usual))
        assert error <= 2 * plain + eps * want.norm()
    assert torch.equal(found[0][1].double(), found[2][1]) or extra.get("mask_update") == "proportional"


@covering(size=((0, 8, 4, 4), (2, 0, 4, 4), (2, 8, 0, 4), (0, 3, 2, 2, 2)))
def test_empty(size: tuple[int, ...]) -> None:
    ratio, new_mask = planes_for(size)
    for layout in ("nchw", "nhwc"):
        x = dense(torch.zeros(size), layout)
        for mask in (None, new_mask, torch.zeros(size)):
            OPS.partial_conv_mask_input_cuda(x, mask, x)
        OPS.partial_conv_finish_cuda(x, ratio, new_mask, torch.ones(size[1]), True, False, "none", 0.0, x)
        with poisoned_allocations():
            bias_grad = OPS.partial_conv_finish_backward_cuda(
                x, None, ratio, new_mask, True, False, "none", 0.0, True, x
            )
        assert same_bits(bias_grad, torch.zeros(size[1]))
    mask = torch.ones((0, 4, *size[2:]))
    if math.prod(size[2:]):
        for kept in (mask, mask[:, :1]):
            planes = run_windows(kept, kernel=(1,) * (len(size) - 2), groups=2)
            assert planes[0].shape == (0, 2 if kept.shape[1] > 1 else 1, *size[2:])


def test_errors() -> None:
    x, planes = image(SIZES["vectors"], "f32"), planes_for(SIZES["vectors"])
    with pytest.raises(RuntimeError, match="float16, bfloat16 and float32"):
        OPS.partial_conv_mask_input_cuda(x.double(), None, x.double())
    with pytest.raises(RuntimeError, match="differ in shape"):
        OPS.partial_conv_mask_input_cuda(x, None, x[:1].clone())
    with pytest.raises(RuntimeError, match="does not fit"):
        OPS.partial_conv_mask_input_cuda(x, torch.ones(2, 3, 4, 6), x)
    with pytest.raises(RuntimeError, match="contiguous or channels_last"):
        OPS.partial_conv_mask_input_cuda(x.transpose(2, 3), None, x.transpose(2, 3))
    with pytest.raises(RuntimeError, match="output is needed"):
        OPS.partial_conv_finish_backward_cuda(x, None, *planes, True, False, "relu", 0.0, True, x)
    with pytest.raises(RuntimeError, match="bias must be"):
        OPS.partial_conv_finish_cuda(x, *planes, torch.ones(3), True, False, "none", 0.0, x)
    with pytest.raises(RuntimeError, match="float32"):
        run_windows(planes[0], dtype=torch.float64)
