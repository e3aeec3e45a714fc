"""The kernels around the convolution, called by themselves: every combination of layouts and dtypes that the op may
choose on some device, the same bits in every run, and more elements than 32 bits count."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from harness import (
    DTYPES,
    EMULATING,
    INTERPRETING,
    Backend,
    assert_within_budget,
    covering,
    generator,
    grid,
    laid_out,
    poisoned_allocations,
    same_bits,
)
from partial_conv_cases import SLOPE, exact_convolutions, make_mask  # noqa: F401
from pixel_cases import on_device, skip_unsupported, skip_without_memory
from torch import Tensor
from training_checks import check_deterministic

from inpaint_kernels.reference import partial_conv as reference

SIZES = {"image": (2, 6, 5, 9), "volume": (2, 6, 3, 4, 5), "odd": (1, 6, 7, 1)}
# Of the CUDA kernels: planar blocks have 128 threads with 16 bytes each, interleaved ones 256.
if EMULATING:
    SIZES |= {
        "1x1": (2, 6, 1, 1),
        "vectors": (2, 48, 4, 6),  # whole vectors in both layouts, a few threads a plane
        "half_block": (2, 12, 8, 32),  # planar: one and two warps a plane
        "wide": (1, 6, 24, 40),  # planar: four warps a plane, the second tile partial
        "c24": (2, 24, 3, 4),  # interleaved: 6 or 3 threads a pixel, the last of them idle
        "any_tiles": (1, 42, 5, 13),  # tiles of 32 x 32, partial both ways
        "many": (1, 1056, 1, 3),  # interleaved: more vectors than a block has threads
    }
elif not INTERPRETING:
    SIZES["large"] = (2, 18, 61, 67)
# (weigh_bias, scale_bias, activation, slope), groups
FORMS: dict[str, tuple[tuple[bool, bool, str, float], int]] = {
    "plain": ((False, False, "none", 0.0), 1),
    "biased": ((True, False, "relu", 0.0), 2),
    "mat": ((False, True, "leaky_relu", SLOPE), 3),
}


def packed(weigh_bias: bool, scale_bias: bool, activation: str, slope: float) -> tuple[int, float]:
    """`how` and `slope` of the operators."""
    return reference.Finish(weigh_bias, scale_bias, activation).packed(), slope


def windows(kernel: Any, stride: Any, padding: Any, dilation: Any, groups: int = 1) -> tuple[int, ...]:
    return reference.Windows(kernel, stride, padding, dilation, groups).packed()


def kernel_of(backend: Backend, part: str) -> Any:
    return getattr(torch.ops.inpaint_kernels, f"partial_conv_{part}_{backend.name}").default


def format_of(dims: int, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if dims == 2 else torch.channels_last_3d


def values(size: tuple[int, ...], dtype: str, layout: str, seed: int = 0) -> Tensor:
    return laid_out(torch.randn(size, generator=generator(seed)).to(DTYPES[dtype]), layout)


def empty(like: Tensor, dtype: str, layout: str) -> Tensor:
    """Filled with NaN, so that a place nobody wrote shows."""
    return laid_out(torch.full(like.shape, float("nan"), dtype=DTYPES[dtype]), layout)


def mask_planes(size: tuple[int, ...], planes: int, wide: bool) -> tuple[Tensor, Tensor]:
    rng = generator(7)
    shape = (size[0], planes, *size[2:])
    known = (torch.rand(shape, generator=rng) < 0.7).float()
    new_mask = known * torch.where(torch.rand(shape, generator=rng) < 0.3, 0.4, 1.0)
    ratio = known * (0.5 + torch.rand(shape, generator=rng))
    kind = torch.float64 if wide else torch.float32
    return ratio.to(kind), new_mask.to(kind)


@grid(
    size=SIZES,
    dtypes=("f32/f32", "f16/f32", "bf16/f32", "f32/f16", "f32/bf16", "f16/f16", "f64/f64"),
    layouts=("contiguous/contiguous", "contiguous/channels_last", "channels_last/contiguous",
             "channels_last/channels_last"),
    mask=("none", "n1", "nc"),
)  # fmt: skip
def test_mask_input(kernel: Backend, size: str, dtypes: str, layouts: str, mask: str) -> None:
    given, stored = dtypes.split("/")
    before, after = layouts.split("/")
    x = values(SIZES[size], given, before)
    skip_unsupported(kernel, x)
    known = make_mask(mask, SIZES[size])
    out = empty(x, stored, after)
    moved = on_device(kernel, x, known, out)
    kernel_of(kernel, "mask_input")(*moved)
    acc = torch.float64 if given == "f64" else torch.float32
    weight = torch.ones(()) if known is None else known
    plain, truth = (x.to(kind) * weight.to(kind) for kind in (acc, torch.float64))
    assert_within_budget(moved[2], plain, truth, acc=acc, what="masked input")
    if dtypes in ("f32/f32", "f16/f16") and before == after:
        kernel_of(kernel, "mask_input")(moved[0], moved[1], moved[0])
        assert same_bits(moved[0], moved[2])


@grid(
    size=SIZES,
    dtypes=("f32/f32", "f32/f16", "f32/bf16", "bf16/bf16", "f16/f16", "f64/f64"),
    layouts=("contiguous/contiguous", "contiguous/channels_last", "channels_last/contiguous",
             "channels_last/channels_last"),
    form=FORMS,
)  # fmt: skip
def test_finish_and_its_backward(kernel: Backend, size: str, dtypes: str, layouts: str, form: str) -> None:
    given, stored = dtypes.split("/")
    before, after = layouts.split("/")
    full = SIZES[size]
    options, groups = FORMS[form]
    weigh, scale, activation, slope = options
    raw = values(full, given, before)
    skip_unsupported(kernel, raw)
    acc = torch.float64 if given == "f64" else torch.float32
    ratio, new_mask = mask_planes(full, groups, acc == torch.float64)
    bias = torch.randn(full[1], generator=generator(2)) if weigh or scale else None
    column = (slice(None), *[None] * (len(full) - 2))

    def formula(kind: torch.dtype, value: Tensor) -> Tensor:
        r, m = (p.to(kind).repeat_interleave(full[1] // groups, 1) for p in (ratio, new_mask))
        shift = 0.0 if bias is None else bias.to(kind)[column]
        value = value + shift if scale else value * r + shift
        value = value * m if weigh else torch.where(m == 0, 0.0, value)
        if activation != "none":
            value = torch.where(value > 0, value, slope * value)
        return value * r if scale else value

    moved = on_device(kernel, raw, ratio, new_mask, bias, empty(raw, stored, after))
    kernel_of(kernel, "finish")(*moved[:4], *packed(*options), moved[4])
    terms = formula(torch.float64, raw.double().abs()) + 2.0
    plain, truth = (formula(kind, raw.to(kind)) for kind in (acc, torch.float64))
    exact = terms if stored == given else None
    assert_within_budget(moved[4], plain, truth, acc=acc, what="output", magnitude=exact)

    output = truth.to(DTYPES[stored])
    grad = values(full, stored, after, seed=3)
    r, m = (p.double().repeat_interleave(full[1] // groups, 1) for p in (ratio, new_mask))
    sent = grad.double().masked_fill(m == 0, 0.0) * (r if scale else 1.0)
    if activation != "none":
        sent = torch.where(output > 0, sent, slope * sent)
    sent = sent * m if weigh else sent
    to_raw = sent if scale else sent * r
    back = on_device(
        kernel, grad, laid_out(output, before) if activation != "none" else None, ratio, new_mask
    )
    for need_bias in (True, False):
        out = on_device(kernel, empty(grad, given, before))[0]
        with poisoned_allocations():
            sums = kernel_of(kernel, "finish_backward")(*back, *packed(*options), need_bias, out)
        assert_within_budget(out, to_raw, to_raw, acc=acc, what="gradient")
        others = [0, *range(2, len(full))]
        assert sums.dtype == acc and sums.shape == ((full[1],) if need_bias else (0,))
        if need_bias:
            assert_within_budget(
                sums, sent.to(acc).sum(others), sent.sum(others), acc=acc, what="bias gradient",
                magnitude=sent.abs().sum(others),
            )  # fmt: skip


@grid(layout=("contiguous", "channels_last"), size=((2, 3, 150, 170), (3, 64, 31, 33)), dtype=("f32", "bf16"))
def test_the_same_bits_every_time(kernel: Backend, layout: str, size: tuple[int, ...], dtype: str) -> None:
    """The planes, and the gradient of a bias, which is a sum over everything; for any number of threads."""
    size = (2, 3, 17, 19) if INTERPRETING else size
    grad = values(size, dtype, layout)
    ratio, new_mask = mask_planes(size, 1, False)
    mask = make_mask("nc", size)
    moved = on_device(kernel, grad, ratio, new_mask, mask)

    def run() -> list[Tensor]:
        out = torch.empty_like(moved[0])
        sums = kernel_of(kernel, "finish_backward")(
            moved[0], None, moved[1], moved[2], *packed(True, False, "none", 0.0), True, out
        )
        window = kernel_of(kernel, "window")(
            moved[3], 1, windows([5, 3], [1, 2], [2, 1], [1, 1]), 15.0, "clamp", torch.float32
        )
        return [out, sums, *window]

    check_deterministic(run, threads=(1,) if INTERPRETING else (1, 2, 3))


@pytest.mark.skipif(INTERPRETING, reason="kernels of the CPU alone")
@covering(
    size=((2, 6, 7, 5), (1, 6, 3, 4, 5), (2, 16, 192, 176)),
    dtypes=("f32/f32", "f16/f32", "bf16/f32", "f64/f64"),
    layouts=list(product((False, True), repeat=4)),
    wanted=("both", "input", "weight", "neither"),
)
def test_layer_and_its_backward(
    size: tuple[int, ...], dtypes: str, layouts: tuple[bool, ...], wanted: str
) -> None:
    """The CPU's two passes in one call each, with every choice of layouts, whatever this machine would choose. The
    largest size has temporaries of over 4 MiB, whose memory is used again."""
    kernel = Backend("cpu", "cpu")
    given, computed = (DTYPES[name] for name in dtypes.split("/"))
    last, weight_last, outer, weight_outer = layouts
    dims = len(size) - 2
    rng = generator(11)
    x, w = (torch.randn(s, generator=rng).to(given) for s in (size, (size[1], size[1] // 2, *[3] * dims)))
    x, w = (
        laid_out(t, "channels_last" if flag else "contiguous") for t, flag in ((x, outer), (w, weight_outer))
    )
    bias, mask = torch.randn(size[1], generator=rng).to(given), make_mask("n1", size)
    acc = torch.float64 if given == torch.float64 else torch.float32
    ratio, new_mask = mask_planes(size, 1, acc == torch.float64)
    where = windows([3] * dims, [1] * dims, [1] * dims, [1] * dims, 2)
    how = packed(True, False, "relu", 0.0)
    run = lambda: kernel_of(kernel, "layer")(  # noqa: E731
        x, w, bias, mask, ratio, new_mask, where, *how, computed, last, outer
    )
    out = run()
    assert out.dtype == given and out.is_contiguous(memory_format=format_of(dims, outer))
    truth = [t.double().requires_grad_() for t in (x, w, bias)]
    expected = reference.partial_conv(*truth, mask.double(), ratio.double(), new_mask.double(), where, *how)
    tolerance = {"f32/f32": 1e-5, "f16/f32": 2e-3, "bf16/f32": 2e-2, "f64/f64": 1e-13}[dtypes]
    close = lambda a, b: torch.testing.assert_close(  # noqa: E731
        a.double(), b.double(), rtol=tolerance, atol=tolerance * float(b.detach().abs().max())
    )
    close(out, expected)
    grad = torch.randn(out.shape, generator=rng).to(given)
    gradients = torch.autograd.grad(expected, truth, torch.where(out > 0, grad, 0.0).double())
    need_input, need_weight = wanted in ("both", "input"), wanted in ("both", "weight")
    for _ in range(2):
        found = kernel_of(kernel, "layer_backward")(
            grad, x if need_weight else None, w if need_input else None, mask, out, ratio, new_mask, list(size),
            list(w.shape), outer, weight_outer, given, where, *how, True, computed, last, weight_last,
        )  # fmt: skip
        close(found[2], gradients[2])
        for got, want, needed, memory in zip(
            found, gradients, (need_input, need_weight), (outer, weight_outer), strict=False
        ):
            assert got.dtype == given
            if needed:
                assert got.is_contiguous(memory_format=format_of(dims, memory))
                close(got, want)
            else:
                assert got.numel() == 0
        assert same_bits(run(), out)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_more_than_two_billion_elements(kernel: Backend, layout: torch.memory_format) -> None:
    """In place, in bfloat16: 4 GiB."""
    if INTERPRETING:
        pytest.skip("hours in the interpreter")
    skip_without_memory(kernel, 8 * 2**30)
    size = (2, 2**14 + 1, 2**8, 2**8)
    x = torch.empty(size, dtype=torch.bfloat16, device=kernel.device, memory_format=layout).fill_(1)
    plane = torch.ones(2, 1, *size[2:], device=kernel.device)
    plane[1, 0, -1, -1], plane[0, 0, 0, 0] = 0.0, 0.5
    kernel_of(kernel, "mask_input")(x, plane, x)
    assert not x[1, :, -1, -1].any() and bool((x[0, :, 0, 0] == 0.5).all()) and x[1, -1, -1, -2] == 1
    bias = torch.ones(size[1], device=kernel.device)
    kernel_of(kernel, "finish")(x, plane, plane, bias, *packed(False, False, "none", 0.0), x)
    assert not x[1, :, -1, -1].any() and bool((x[0, :, 0, 0] == 1.25).all()) and x[1, -1, -1, -2] == 2
    how = packed(False, False, "none", 0.0)
    sums = kernel_of(kernel, "finish_backward")(x, None, plane, plane, *how, True, x)
    assert bool((sums == 2.0 * (2 * 2**16 - 2) + 1.25).all())
    assert not x[1, :, -1, -1].any() and bool((x[0, :, 0, 0] == 0.625).all())


@pytest.mark.slow
def test_a_mask_of_more_than_two_billion_elements(kernel: Backend) -> None:
    if INTERPRETING:
        pytest.skip("hours in the interpreter")
    skip_without_memory(kernel, 4 * 2**30)
    mask = torch.ones(1, 2**15 + 1, 2**8, 2**8, dtype=torch.bool, device=kernel.device)
    mask[0, -1, -1, -1] = 0
    _, new_mask = kernel_of(kernel, "window")(
        mask, 1, windows([1, 1], [1, 1], [0, 0], [1, 1]), 1.0, "proportional", torch.float32
    )
    # Exact sums: the one pixel with a hole in one of its 32769 channels, and all others whole.
    assert round(float(new_mask[0, 0, -1, -1]) * (2**15 + 1)) == 2**15
    new_mask[0, 0, -1, -1] = 1
    assert bool((new_mask == 1).all())
