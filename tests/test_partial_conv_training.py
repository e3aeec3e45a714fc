"""Partial convolution in training, beyond what `test_training.py` asks of all ops: geometries, networks, autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import (
    DTYPES,
    INTERPRETING,
    Backend,
    evaluate,
    grid,
    same_bits,
)
from partial_conv_cases import (
    CONVOLUTIONS,
    Case,
    definition,
    exact_convolutions,  # noqa: F401
    make_mask,
    make_tensors,
    output_of,
    run,
    with_options,
)
from pixel_cases import on_device, skip_unsupported
from torch import Tensor, nn
from training_checks import check_opcheck, operator_calls

import inpaint_kernels as ik

CASE = Case(size=(2, 3, 7, 8), outputs=4)


@pytest.mark.parametrize(
    ("mask", "mask_dtype", "groups", "dims"),
    [("n1", "f32", 1, 2), ("nc", "bool", 3, 2), ("channel-view", "f16", 3, 2), ("nc", "f32", 1, 3)],
)
def test_opcheck_of_geometries(kernel: Backend, mask: str, mask_dtype: str, groups: int, dims: int) -> None:
    where = {"kernel": (3, 2, 1)[:dims], "stride": (1, 2, 1)[:dims], "padding": (1, 0, 1)[:dims]}
    case = Case((2, 3, 4, 5, 3)[: dims + 2], 3, **where, dilation=(1, 1, 2)[:dims], groups=groups)
    known = make_mask(mask, case.size, mask_dtype)
    x, w, b, known = on_device(kernel, *make_tensors(case, mask=known))
    for call in operator_calls(lambda: evaluate(output_of(kernel, case, known), (x, w, b), (0, 1, 2))):
        check_opcheck(call)


# ---- compile -----------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """Layers that share a mask, that hand it on, and that change its resolution."""

    def __init__(self, backend: str | None = None, multi_channel: bool = False) -> None:
        super().__init__()
        options = {"return_mask": True, "multi_channel": multi_channel, "backend": backend}
        torch.manual_seed(0)
        self.first = ik.nn.PartialConv2d(3, 6, 3, padding=1, activation="relu", **options)
        self.side = ik.nn.PartialConv2d(3, 6, 3, padding=1, bias=False, **options)
        self.down = ik.nn.PartialConv2d(6, 8, 4, stride=2, padding=1, groups=2, **options)
        self.last = ik.nn.PartialConv2d(8, 2, 1, **options)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        a, seen = self.first(x, mask)
        b, _ = self.side(x, mask)
        value, seen = self.down(a + b, seen)
        value, seen = self.last(value, seen)
        return value, seen


def step(model: Any, network: Network, x: Tensor, mask: Tensor) -> list[Tensor]:
    """Output, new mask, and all gradients."""
    network.zero_grad()
    leaf = x.detach().requires_grad_()
    output, seen = model(leaf, mask)
    (output * torch.linspace(-1, 1, output.numel(), device=x.device).view(output.shape)).sum().backward()
    return [output.detach(), seen, leaf.grad, *(p.grad.clone() for p in network.parameters())]


def batch(backend: Backend, multi_channel: bool, size: tuple[int, ...], layout: str) -> list[Any]:
    case = Case(size=size)
    kind = "nc" if multi_channel else "n1"
    x, _, _, mask = make_tensors(case, mask=kind, layouts=f"{layout}/contiguous")
    return on_device(backend, x, mask)


@pytest.mark.parametrize(
    ("multi_channel", "layout"), [(False, "contiguous"), (True, "channels_last")], ids=["one", "many"]
)
def test_compile(backend: Backend, multi_channel: bool, layout: str) -> None:
    """One graph, compiled once for all sizes, is the same kernels called one by one."""
    if (backend.name == "reference" or INTERPRETING) and not multi_channel:
        pytest.skip("slow to trace or to run; once is enough")
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    network = Network(backend.name, multi_channel).to(backend.device)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(network, fullgraph=True, dynamic=True, backend=counter)
    for number, size in enumerate(((2, 3, 12, 14), (4, 3, 16, 22))):
        given = batch(backend, multi_channel, size, layout)
        for got, want in zip(step(compiled, network, *given), step(network, network, *given), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
        if number == 0:
            frames = counter.frame_count
    assert counter.frame_count == frames, "another size was compiled again"


@pytest.mark.parametrize(("dims", "mask"), [(2, "none"), (2, "plane"), (3, "n1")])
def test_compile_of_the_function(backend: Backend, dims: int, mask: str) -> None:
    torch._dynamo.reset()
    case = Case(size=(2, 3, 6, 7, 5)[: dims + 2], options={"activation": "leaky_relu"})
    x, w, b, known = on_device(backend, *make_tensors(case, mask=mask))
    call = output_of(backend, case, known)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    want = evaluate(call, (x, w, b), (0, 1, 2))
    got = evaluate(compiled, (x, w, b), (0, 1, 2), want[2])
    for a, e in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


def test_inductor(kernel: Backend) -> None:
    if INTERPRETING:
        pytest.skip("inductor does not see Triton's interpreter")
    torch._dynamo.reset()
    network = Network(kernel.name).to(kernel.device)
    given = batch(kernel, False, (2, 3, 12, 14), "contiguous")
    compiled = torch.compile(network, fullgraph=True)
    for got, want in zip(step(compiled, network, *given), step(network, network, *given), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# ---- autocast and devices ----------------------------------------------------------------------------------------


@grid(
    dtype=("bf16", "f16"),
    mask=("none", "n1", "nc"),
    given=("f32", "bf16", "f64"),
    activation=("none", "relu"),
)
def test_autocast(backend: Backend, dtype: str, mask: str, given: str, activation: str) -> None:
    """The dtype of a convolution under autocast, the values of a call with operands cast before it."""
    case = with_options(CASE, activation=activation)
    tensors = make_tensors(case, given, mask=mask)
    skip_unsupported(backend, tensors[0])
    x, w, b, known = on_device(backend, *tensors)
    low = x.dtype if given == "f64" else DTYPES[dtype]
    call = output_of(backend, case, known)
    with torch.autocast(backend.device, DTYPES[dtype]):
        (got,), gradients, upstream = evaluate(call, (x, w, b), (0, 1, 2))
        if given != "f64":
            assert got.dtype == CONVOLUTIONS[2](x, w).dtype
        # A layer in the wild under autocast gives the same, up to the roundings of its own.
        plain = definition(case, x.to(low), w.to(low), b, known).output
    (want,), expected, _ = evaluate(call, (x.to(low), w.to(low), b), (0, 1, 2), upstream)
    assert got.dtype == low
    for a, e, like in zip((got, *gradients), (want, *expected), (want, x, w, b), strict=True):
        assert a.dtype == like.dtype
        assert same_bits(a, e.to(like.dtype))
    eps = torch.finfo(low).eps
    size = definition(case, *(t.abs() for t in (x, w, b)), known).output
    assert bool(((got.double() - plain.double()).abs() <= 2 * eps * size.double()).all())


# ---- modes and transforms ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("mask", ["n1", "channel-view"])
def test_masks_under_vmap(backend: Backend, mask: str) -> None:
    x, w, b, known = on_device(backend, *make_tensors(CASE, mask=mask))
    masks = torch.stack([known, 1 - known])
    one = [run(backend, CASE, [x, w, b, m]).output for m in masks]
    with torch.no_grad():
        found = torch.vmap(lambda m: run(None, CASE, [x, w, b, m]).output)(masks)
    torch.testing.assert_close(found, torch.stack(one), rtol=1e-6, atol=1e-6)


def test_compiled_code_sees_a_changed_mask(backend: Backend) -> None:
    torch._dynamo.reset()
    given = on_device(backend, *make_tensors(CASE))
    compiled = torch.compile(lambda *t: run(backend, CASE, list(t)), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        want = run(backend, CASE, given)
        for got, expected in zip(compiled(*given), want, strict=True):
            assert same_bits(got, expected)
        given[3].data.zero_()
    assert not want.output.any()
