"""Partial convolution in training: memory, registration, compile, autocast."""

from __future__ import annotations

import math
from functools import partial
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
    FORMS,
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
from training_checks import (
    check_capturable,
    check_no_host_sync,
    check_opcheck,
    kept_bytes,
    ops_called,
    ops_inside,
)

import inpaint_kernels as ik
from inpaint_kernels.ops import _partial_conv as op_file

CASE = Case(size=(2, 3, 7, 8), outputs=4)
# ---- memory ------------------------------------------------------------------------------------------------------


@grid(
    wanted=((0, 1, 2), (0,), (1,), (2,), (0, 2), (1, 2)),
    mask=("none", "n1", "nc"),
    activation=("none", "relu"),
    layout=("contiguous", "channels_last"),
    dtype=("f32", "bf16"),
)
def test_saved_for_backward(
    kernel: Backend, wanted: tuple[int, ...], mask: str, activation: str, layout: str, dtype: str
) -> None:
    """The operands that the wanted gradients read, the mask, and two planes; no masked input."""
    case = with_options(CASE, activation=activation)
    x, w, b, known = on_device(kernel, *make_tensors(case, dtype, mask=mask, layouts=f"{layout}/contiguous"))
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate((x, w, b))]
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output, new_mask = run(kernel, case, [*leaves, known])
    reads_mask = known is not None and bool({0, 1} & set(wanted))
    kept = [t for t, read in ((x, 1 in wanted), (w, 0 in wanted), (known, reads_mask)) if read]
    kept += [output] if activation != "none" else []
    kept += [new_mask]
    ratio_bytes = new_mask.untyped_storage().nbytes()
    assert len(saved) == len(kept) + 1
    assert {t.untyped_storage().data_ptr() for t in kept} <= set(saved)
    assert sum(saved.values()) == sum(t.untyped_storage().nbytes() for t in kept) + ratio_bytes
    # Nor is anything kept outside of what hooks see: of memory that nobody else holds, the planes.
    assert kept_bytes(output_of(kernel, case, known), *leaves) == 2 * ratio_bytes


def test_saved_tensors_may_be_packed(kernel: Backend) -> None:
    """As by offloading: the mask comes back as another object."""
    x, w, b, known = on_device(kernel, *make_tensors(CASE))
    call = output_of(kernel, CASE, known)
    usual = evaluate(call, (x, w, b), (0, 1, 2))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        packed = evaluate(call, (x, w, b), (0, 1, 2), usual[2])
    for got, want in zip((*packed[0], *packed[1]), (*usual[0], *usual[1]), strict=True):
        assert same_bits(got, want)


def test_activation_checkpointing(kernel: Backend) -> None:
    x, w, b, known = on_device(kernel, *make_tensors(CASE))
    call = output_of(kernel, CASE, known)
    again = partial(torch.utils.checkpoint.checkpoint, call, use_reentrant=False)
    usual = evaluate(call, (x, w, b), (0, 1, 2))
    for got, want in zip(evaluate(again, (x, w, b), (0, 1, 2), usual[2])[1], usual[1], strict=True):
        assert same_bits(got, want)


# ---- registration ------------------------------------------------------------------------------------------------


def planes(backend: Backend, case: Case, mask: Tensor | None) -> tuple[list[list[int]], Tensor, Tensor]:
    """Stride, padding and dilation, and the two planes."""
    where = [[value] * case.dims for value in case.geometry[:3]]
    if mask is None:
        mask = torch.ones(1, 1, *case.size[2:], device=backend.device)
    members = case.size[1] if mask.shape[1] > 1 else 1
    size = float(members * math.prod(case.windows))
    ratio, new_mask = op_file.window[backend.name](
        mask, 1, members, case.windows, *where, size, "clamp", torch.float32
    )
    return where, ratio, new_mask


# (input, mask, form, layout, positions that get a gradient)
OPCHECKS: dict[str, tuple[tuple[int, ...], str, str, str, tuple[int, ...]]] = {
    "forward": ((2, 3, 4, 5), "n1", "usual", "contiguous", ()),
    "all": ((2, 3, 4, 5), "nc", "usual", "contiguous", (0, 1, 2)),
    "channels_last": ((2, 3, 4, 5), "n1", "mat", "channels_last", (0, 1, 2)),
    "weight": ((2, 3, 4, 5), "none", "usual", "channels_last", (1,)),
    "1x1": ((2, 3, 1, 1), "n1", "mat", "contiguous", (0, 1, 2)),
    "batch0": ((0, 3, 4, 5), "n1", "usual", "channels_last", (0, 2)),
    "volume": ((2, 3, 3, 4, 2), "nc", "mat", "channels_last", (0, 1, 2)),
}


@pytest.mark.parametrize("case", ["all", "channels_last", "batch0"] if INTERPRETING else OPCHECKS)
def test_opcheck(kernel: Backend, case: str) -> None:
    size, mask, form, layout, wanted = OPCHECKS[case]
    call = Case(size=size, outputs=2)
    x, w, b, known = on_device(kernel, *make_tensors(call, mask=mask, layouts=f"{layout}/contiguous"))
    where, ratio, new_mask = planes(kernel, call, known)
    mat = form == "mat"
    known = None if mat else known
    how = [not mat, mat, "leaky_relu" if mat else "none", 0.2]
    forward = getattr(torch.ops.inpaint_kernels, f"partial_conv_{kernel.name}").default
    check_opcheck(forward, (x, w, b, known, ratio, new_mask, *where, 1, *how), wanted)
    backward = getattr(torch.ops.inpaint_kernels, f"partial_conv_backward_{kernel.name}").default
    grad = torch.randn(size[0], 2, *ratio.shape[2:], device=kernel.device)
    last = [layout == "channels_last" and not x.is_contiguous(), False]
    operands = (x if 1 in wanted else None, w if 0 in wanted else None, known, grad if mat else None)
    arguments = (
        grad, *operands, ratio, new_mask, list(x.shape), list(w.shape), last, x.dtype, w.dtype, *where, 1, *how,
        2 in wanted,
    )  # fmt: skip
    check_opcheck(backward, arguments)


@pytest.mark.parametrize(
    ("mask", "mask_dtype", "groups", "dims"),
    [("n1", "f32", 1, 2), ("nc", "bool", 3, 2), ("channel-view", "f16", 3, 2), ("nc", "f32", 1, 3)],
)
def test_opcheck_of_the_window_kernel(
    kernel: Backend, mask: str, mask_dtype: str, groups: int, dims: int
) -> None:
    size = (2, 3, 4, 5, 3)[: dims + 2]
    known = on_device(kernel, make_mask(mask, size, mask_dtype))[0]
    window = getattr(torch.ops.inpaint_kernels, f"partial_conv_window_{kernel.name}").default
    several = [list(t) for t in ((3, 2, 1)[:dims], (1, 2, 1)[:dims], (1, 0, 1)[:dims], (1, 1, 2)[:dims])]
    check_opcheck(window, (known, groups, 1, *several, 9.0, "binary", torch.float32))


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


@grid(mask=("none", "n1", "nc"), form=FORMS)
def test_no_host_sync(backend: Backend, mask: str, form: str) -> None:
    case = with_options(CASE, **FORMS[form])
    x, w, b, known = on_device(backend, *make_tensors(case, mask=mask))
    call = output_of(backend, case, known)
    for wanted in ((0, 1, 2), (1,), ()):
        _, _, upstream = evaluate(call, (x, w, b), wanted)
        check_no_host_sync(partial(evaluate, call, (x, w, b), wanted, upstream))


@pytest.mark.parametrize("mask", ["none", "n1"])
def test_cuda_graph(kernel: Backend, mask: str) -> None:
    if kernel.device != "cuda":
        pytest.skip("CUDA graphs need tensors on the GPU")
    x, w, b, known = on_device(kernel, *make_tensors(CASE, mask=mask))
    given = [x, w, b] if known is None else [x, w, b, known]
    check_capturable(lambda *t: run(kernel, CASE, [*t[:3], known and t[3]]).output, given, (0, 1, 2))


def test_automatic_choice_is_the_kernel_of_the_device(kernel: Backend) -> None:
    first = {"cpu": "cpu", "cuda": "cuda"}[kernel.device]
    if kernel.name != first:
        pytest.skip(f"{first} comes before {kernel.name} on this device")
    x, w, b, known = on_device(kernel, *make_tensors(CASE, mask="nc"))
    called = ops_called(lambda: evaluate(output_of(None, CASE, known), (x, w, b), (0, 1, 2)))
    ours = {op.split(".")[1] for op in called if op.startswith("inpaint_kernels.")}
    assert ours == {f"partial_conv{part}_{first}" for part in ("", "_backward", "_window")}
    # The reference's way.
    assert not [
        op for op in called if op.startswith(("aten.mul", "aten.div", "aten.where", "aten.sum", "aten.conv"))
    ]


@grid(layout=("contiguous", "channels_last"), dtype=("f32", "bf16", "f16"), mask=("none", "nc"))
def test_inside_are_kernels_and_convolutions(kernel: Backend, layout: str, dtype: str, mask: str) -> None:
    """No other pass over the data than the library's, no wait for the device; a dispatch mode sees no operator
    inside another, so these are called as they are implemented. Those inside the CPU's own are in a profile."""
    x, w, b, known = on_device(kernel, *make_tensors(CASE, dtype, mask=mask, layouts=f"{layout}/{layout}"))
    _, ratio, new_mask = planes(kernel, CASE, known)
    where, how = ([1, 1], [1, 1], [1, 1], 1), ("none", 0.01)

    def forward() -> Tensor:
        return op_file.forward(kernel.name, x, w, b, known, ratio, new_mask, *where, True, False, *how)

    grad = torch.ones_like(forward())

    def backward() -> Any:
        return op_file.backward(
            kernel.name, grad, x, w, known, None, ratio, new_mask, list(x.shape), list(w.shape),
            [layout == "channels_last"] * 2, x.dtype, w.dtype, *where, True, False, *how, True,
        )  # fmt: skip

    for call, expected in ((forward, "convolution"), (backward, "convolution_backward")):
        check_no_host_sync(call)
        called = {op.split(".")[1] for op in ops_called(call) if op.startswith("aten.")}
        if kernel.name == "cpu":
            assert not called
            inside = ops_inside(call, "inpaint_kernels::partial_conv_layer")
            # The convolution's own operators are among them.
            passes_of_torch = {"mul", "mul_", "div", "where", "sum", "add", "add_", "copy_", "fill_", "clone"}
            assert not inside & passes_of_torch
            continue
        assert expected in called
        # Empty results, views, and the weight's conversions.
        assert called <= {
            "convolution", "convolution_backward", "empty", "empty_like", "new_empty", "_to_copy", "clone",
            "slice", "expand", "detach", "alias",
        }  # fmt: skip


# ---- modes and transforms ----------------------------------------------------------------------------------------


def test_inference_then_training(backend: Backend) -> None:
    """With one mask: what inference mode made cannot be saved for a backward, and must not come back there."""
    given = on_device(backend, *make_tensors(CASE))
    with torch.inference_mode():
        before = run(backend, CASE, given)
    leaves = [t.clone().requires_grad_() for t in given[:3]]
    after = run(backend, CASE, [*leaves, given[3]])
    after.output.sum().backward()
    run(backend, CASE, [*leaves, after.new_mask]).output.sum().backward()
    with torch.inference_mode():
        again = run(backend, CASE, given)
    for found in (after, again):
        assert same_bits(before.output, found.output) and same_bits(before.new_mask, found.new_mask)


def test_fake_tensors(kernel: Backend) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = on_device(kernel, *make_tensors(CASE))
    mode = FakeTensorMode()
    fake = [mode.from_tensor(t) for t in given]
    with mode:
        for known in (fake[3], None):
            found = run(kernel, CASE, [*fake[:3], known])
            assert found.output.shape == (2, 4, 7, 8)
            assert found.new_mask.shape == (2 if known is not None else 1, 1, 7, 8)
    assert type(run(kernel, CASE, given).new_mask) is Tensor


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
