"""Partial convolution in training, beyond what `test_training.py` asks of all ops.

Geometries, networks, autocast, and masks that change from call to call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from harness import DTYPES, INTERPRETING, Backend, evaluate, grid, same_bits
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
from training_checks import check_compiles, check_opcheck, operator_calls

import inpaint_kernels as ik

CASE = Case(size=(2, 3, 7, 8), outputs=3)


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
    ("multi_channel", "layout", "compiler"),
    [(False, "contiguous", "inductor"), (True, "channels_last", "aot_eager")],
    ids=["one", "many"],
)
def test_compile(backend: Backend, multi_channel: bool, layout: str, compiler: str) -> None:
    """One graph, compiled once for all sizes, is the same kernels called one by one, also with a changed mask."""
    if (backend.name == "reference" or INTERPRETING) and not multi_channel:
        pytest.skip("slow to trace or to run; once is enough")
    network = Network(backend.name, multi_channel).to(backend.device)

    def check(compiled: Any, given: Sequence[Tensor]) -> None:
        for _ in range(2):
            want = step(network, network, *given)
            for got, expected in zip(step(compiled, network, *given), want, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
            given[1].data.zero_()
        assert not want[0].any()

    sizes = ((2, 3, 12, 14), (4, 3, 16, 22))
    compiler = "eager" if backend.name == "reference" else compiler
    check_compiles(network, check, [batch(backend, multi_channel, size, layout) for size in sizes], compiler)


@pytest.mark.parametrize(("dims", "mask"), [(2, "none"), (3, "plane")])
def test_compile_of_the_function(backend: Backend, dims: int, mask: str) -> None:
    if backend.name == "reference" and dims == 3:
        pytest.skip("slow to trace; once is enough")
    case = Case(size=(2, 3, 6, 7, 5)[: dims + 2], options={"activation": "leaky_relu"})
    x, w, b, known = on_device(backend, *make_tensors(case, mask=mask))
    call = output_of(backend, case, known)

    def check(compiled: Any, given: Sequence[Tensor]) -> None:
        want = evaluate(call, given, (0, 1, 2))
        got = evaluate(compiled, given, (0, 1, 2), want[2])
        for a, e in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)

    check_compiles(call, check, [(x, w, b)], "eager" if backend.name == "reference" else "aot_eager")


# ---- autocast ----------------------------------------------------------------------------------------------------


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


# ---- nothing is remembered from call to call ---------------------------------------------------------------------


def through_numpy(mask: Tensor, values: Tensor) -> None:
    if mask.device.type != "cpu":
        pytest.skip("NumPy sees no memory of a GPU")
    mask.numpy()[...] = values.numpy()


def through_graph(mask: Tensor, values: Tensor) -> None:
    if mask.device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask.copy_(values)
    graph.replay()


# All but the last in ways that torch's version counters do not see, as collectives and other libraries have them.
WRITES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "data": lambda mask, values: mask.data.copy_(values),
    "dlpack": lambda mask, values: torch.from_dlpack(mask).copy_(values),
    "numpy": through_numpy,
    "graph": through_graph,
    "in place": Tensor.copy_,
}


def results(backend: Backend, given: list[Any]) -> list[Tensor]:
    """Output, new mask, and the gradients of input, weight and bias."""
    new_mask = run(backend, CASE, given).new_mask.clone()
    outputs, gradients, _ = evaluate(output_of(backend, CASE, given[3]), given[:3], (0, 1, 2))
    return [*outputs, new_mask, *gradients]


@grid(write=WRITES, mask=("n1", "nc", "plane"), written=("mask", "new mask"))
def test_writes_between_calls(backend: Backend, write: str, mask: str, written: str) -> None:
    """Each call computes with what its mask holds, also where that is the new mask of the layer before it."""
    given = on_device(backend, *make_tensors(CASE, mask=mask))
    before = results(backend, given)
    known = given[3] if written == "mask" else run(backend, CASE, given).new_mask
    following = [*given[:3], known]
    old = results(backend, following)
    # A multi-channel new mask is an expanded view.
    plane = known if written == "mask" else known[:, :1]
    values = 0.25 * (1 - (plane > 0).float())
    WRITES[write](plane, values)
    if written == "new mask":
        assert all(map(same_bits, results(backend, given), before))
    new = results(backend, following)
    for got, want in zip(
        new, results(backend, [*given[:3], values.expand(known.shape).clone()]), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not same_bits(old[0], new[0])


def test_two_calls_share_no_new_mask(backend: Backend) -> None:
    given = on_device(backend, *make_tensors(CASE))
    first, second = (run(backend, CASE, given).new_mask for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    first.requires_grad_()
    assert not second.requires_grad and not run(backend, CASE, given).new_mask.requires_grad


@pytest.mark.parametrize("part", ["mask", "new mask"])
def test_backward_after_a_change_is_refused(backend: Backend, part: str) -> None:
    """As for every tensor that autograd has saved."""
    x, w, b, mask = on_device(backend, *make_tensors(CASE))
    output, new_mask = run(backend, CASE, [x.requires_grad_(), w, b, mask])
    (mask if part == "mask" else new_mask).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
