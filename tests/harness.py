"""Checks shared by the tests of every op: what is right, for any op, on any backend.

A test file describes its op (cases, a plain formula, the calls) and hands it to the `check_*` functions here.
The formula is evaluated twice, in float64 as the truth and in the accumulation dtype as the error a user has
today; a kernel may be wrong by at most twice the latter plus a floor (`value_budget`).
"""

from __future__ import annotations

import ctypes
import heapq
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
ROWS = os.environ.get("INPAINT_KERNELS_TEST_ROWS")
# Instead of every case those that see every value: where each is slow, or time is short.
COVERING = INTERPRETING or ROWS == "covering"
# More cases of what is slow and hardly differs from op to op: compilers, the registration.
ALL_ROWS = ROWS == "all"

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64}

Call = Callable[..., Any]


@dataclass(frozen=True)
class Backend:
    """A backend under test and the device its tensors live on."""

    name: str
    device: str

    def __str__(self) -> str:
        return "emulated" if self == EMULATED else self.name


# The CUDA kernels, compiled as C++ and run on tensors of the CPU: `cuda_emulation`.
EMULATED = Backend("cuda", "cpu")
EMULATING = os.environ.get("INPAINT_KERNELS_TEST_BACKENDS") == "emulated"


def backends_under_test() -> list[Backend]:
    """From INPAINT_KERNELS_TEST_BACKENDS ("cpu,triton"; "emulated" alone), else everything this machine can run."""
    if EMULATING:
        return [EMULATED]
    gpu = torch.cuda.is_available()
    default = "triton" if INTERPRETING else "reference,cpu,triton,cuda" if gpu else "reference,cpu"
    names = os.environ.get("INPAINT_KERNELS_TEST_BACKENDS", default).split(",")
    on_gpu = {"cuda": True, "triton": not INTERPRETING, "cpu": False, "reference": False}
    unknown = [name for name in names if name not in on_gpu]
    if unknown:
        raise pytest.UsageError(f"INPAINT_KERNELS_TEST_BACKENDS: unknown {unknown}, allowed {list(on_gpu)}")
    without_gpu = [name for name in names if on_gpu[name] and not gpu]
    if without_gpu:
        raise pytest.UsageError(f"{without_gpu} need a GPU (triton: or TRITON_INTERPRET=1)")
    return [Backend(name, "cuda" if on_gpu[name] else "cpu") for name in names]


# Public functions, and settings of them, without CUDA kernels.
WITHOUT_CUDA = ("stacked_images", "composite", "masked_l1 none", "lpips_distance", "ssim")


def backend_for(function: str, backend: Backend | None) -> str | None:
    """What a public function takes as `backend=`; a test of kernels that it does not have is skipped."""
    if backend is not None and backend.name == "cuda" and function in WITHOUT_CUDA:
        pytest.skip(f"{function} has no CUDA kernels")
    return backend and backend.name


def grid(**axes: Iterable[object]) -> pytest.MarkDecorator:
    """Parametrize over rows of the product that hold every pair of values: all of it for one axis or two.

    Where three values decide together, two of them are one axis. `covering` where there is no time even for that.
    """
    lists = {name: list(axis) for name, axis in axes.items()}
    return (
        covering(**lists)
        if COVERING
        else _parametrize(axes, spread(list(itertools.product(*lists.values()))))
    )


def covering(**axes: Iterable[object]) -> pytest.MarkDecorator:
    """Parametrize over those rows of the product that see every value about twice: for what is slow everywhere."""
    lists = {name: list(axis) for name, axis in axes.items()}
    longest = max(map(len, lists.values()))
    return _parametrize(axes, spread(list(itertools.product(*lists.values())), 2 * longest))


def _parametrize(names: Iterable[str], rows: Sequence[tuple[object, ...]]) -> pytest.MarkDecorator:
    params = [pytest.param(*row, id="-".join(map(str, row))) for row in rows]
    return pytest.mark.parametrize(list(names), params)


def spread(rows: Sequence[tuple[object, ...]], count: int | None = None) -> list[tuple[object, ...]]:
    """Again and again the row with most new pairs of values, among them that of rarer values.

    `count` rows, or as many as it takes to see every pair.
    """
    pairs = [set(itertools.combinations(enumerate(row), 2)) or {row} for row in rows]
    unseen: set[object] = set().union(*pairs)
    used: Counter[object] = Counter()
    chosen: list[tuple[object, ...]] = []

    def rank(i: int) -> tuple[int, int, int]:
        return -len(pairs[i] & unseen), sum(used[value] for value in enumerate(rows[i])), i

    # A rank only ever gets worse: the first row of the heap whose rank is still true is the best one.
    heap = [rank(i) for i in range(len(rows))]
    heapq.heapify(heap)
    while heap and (unseen if count is None else len(chosen) < count):
        i = heap[0][2]
        if (now := rank(i)) != heap[0]:
            heapq.heapreplace(heap, now)
            continue
        heapq.heappop(heap)
        unseen -= pairs[i]
        used.update(enumerate(rows[i]))
        chosen.append(rows[i])
    return chosen


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _sliced(x: Tensor) -> Tensor:
    big = x.new_full([*x.shape[:-2], x.shape[-2] + 2, 2 * x.shape[-1] + 1], 7)
    view = big[..., 1:-1, 1::2]
    view.copy_(x)
    return view


def _padded(x: Tensor) -> Tensor:
    view = x.new_full([*x.shape[:-1], x.shape[-1] + 3], 7)[..., : x.shape[-1]]
    view.copy_(x)
    return view


def _channel_of_larger(x: Tensor) -> Tensor:
    """As the alpha plane of an RGBA picture: the last channels of a tensor with more of them."""
    if x.dim() < 4:
        return _padded(x)
    big = x.new_full([x.shape[0], x.shape[1] + 3, *x.shape[2:]], 7)
    view = big[:, 3:]
    view.copy_(x)
    return view


def _misaligned(x: Tensor) -> Tensor:
    """Contiguous, one element past an aligned address: wide loads must not assume alignment."""
    view = x.new_full([x.numel() + 1], 7)[1:].view(x.shape)
    view.copy_(x)
    return view


def _channels_last(x: Tensor) -> Tensor:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "channels_last": _channels_last,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "batch_inside": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": _sliced,
    "padded": _padded,
    "channel_of_larger": _channel_of_larger,
    "misaligned": _misaligned,
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The values of `x` in one of LAYOUTS; gaps of a view hold sevens, to show a kernel that reads them."""
    view = LAYOUTS[layout](x)
    assert same_bits(view, x)
    return view


# Rounding steps between exact inputs and a stored result that the plain formula shares but need not suffer in
# the same element: subtraction, penalty, weight, scale, partial sums.
FLOOR_ULPS = 8


def accumulate_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def value_budget(plain_error: Tensor, magnitude: Tensor, dtype: torch.dtype, acc: torch.dtype) -> Tensor:
    """2 * error of plain PyTorch + one rounding to `dtype` + FLOOR_ULPS of the accumulation dtype."""
    storage = torch.finfo(dtype).eps if dtype != acc else 0.0
    relative = storage + FLOOR_ULPS * torch.finfo(acc).eps
    return (
        2 * plain_error + relative * magnitude + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    )


def assert_within_budget(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    *,
    acc: torch.dtype,
    what: str,
    magnitude: Tensor | None = None,
) -> None:
    """Elementwise; NaN and Inf must be where the truth has them. `magnitude`: |truth| unless terms cancel."""
    dtype = actual.dtype
    got, want, usual = (t.detach().cpu().double() for t in (actual, truth, plain))
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    # A finite truth beyond the range of the stored dtype is rightly stored as Inf.
    want = want.to(dtype).double() if (want.abs() > torch.finfo(dtype).max).any() else want
    finite = want.isfinite()
    same_specials = torch.equal(
        got[~finite].nan_to_num(2.0, 1.0, -1.0), want[~finite].nan_to_num(2.0, 1.0, -1.0)
    )
    assert same_specials and bool(got[finite].isfinite().all()), (
        f"{what}: NaN or Inf in other places than the truth"
    )
    error = (got - want)[finite].abs()
    plain_error = (usual - want)[finite].abs().nan_to_num(0.0, 0.0, 0.0)
    size = (want.abs() if magnitude is None else magnitude.detach().cpu().double().expand_as(want))[finite]
    excess = error - value_budget(plain_error, size, dtype, acc)
    if excess.numel() and excess.max() > 0:
        worst = int(excess.argmax())
        raise AssertionError(
            f"{what}: {int((excess > 0).sum())} of {excess.numel()} elements over budget; worst: "
            f"got {got[finite][worst]:.9g}, truth {want[finite][worst]:.9g}, plain {usual[finite][worst]:.9g}"
        )


def assert_gradient(
    actual: Tensor,
    plain: Tensor,
    truth: Tensor,
    *,
    acc: torch.dtype,
    what: str,
    magnitude: Tensor | None = None,
) -> None:
    """Elementwise budget, then relative L2 error, cosine and signed bias of the whole gradient."""
    assert_within_budget(actual, plain, truth, acc=acc, what=what, magnitude=magnitude)
    got, want, usual = (t.detach().cpu().double().flatten() for t in (actual, truth, plain))
    size = (
        want.abs() if magnitude is None else magnitude.detach().cpu().double().expand(truth.shape).flatten()
    )
    norm, total, count = size.norm(), size.sum(), got.numel()
    if count == 0 or norm == 0 or not bool((got + want + usual).isfinite().all()):
        return
    info = torch.finfo(actual.dtype)
    tiny = info.smallest_normal * info.eps * count
    floor = (info.eps if actual.dtype != acc else 0.0) + FLOOR_ULPS * torch.finfo(acc).eps
    l2, plain_l2 = (got - want).norm() / norm, (usual - want).norm() / norm
    budget = 2 * plain_l2 + floor + tiny / norm
    assert l2 <= budget, f"{what}: relative L2 error {l2:.3g}, plain {plain_l2:.3g}"
    if magnitude is None:
        cosine = got @ want / (got.norm() * norm)
        assert 1 - cosine <= budget**2 + 1e-15 * count, f"{what}: cosine 1 - {1 - cosine:.3g}"
    # Roundings to nearest cancel over many elements, truncation does not; the interpreter's bfloat16 truncates.
    if INTERPRETING and actual.dtype == torch.bfloat16:
        return
    # Equal values have equal roundings, so each value counts once, weighted with the share of the sum that it has.
    values, group = want.abs().float().unique(return_inverse=True)
    shares = torch.zeros(len(values), dtype=torch.float64).index_add_(0, group, size) / total
    bias, plain_bias = (((g - want) * want.sign()).sum() / total for g in (got, usual))
    allowed = 2 * plain_bias.abs() + 4 * info.eps * shares.norm() + FLOOR_ULPS * torch.finfo(acc).eps
    assert bias.abs() <= allowed + tiny / total, f"{what}: signed bias {bias:.3g}, plain {plain_bias:.3g}"


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def bits(x: Tensor) -> Tensor:
    # clone: contiguous() keeps the odd strides of tensors with at most one element.
    return x.detach().cpu().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def _junk_fill() -> ctypes.c_bool | None:
    """Switch in libc10 that fills CPU allocations with 0x7fedbeef: NaN in float32, half of float16."""
    for path in Path(torch.__file__).parent.glob("lib/libc10.*"):
        try:
            return ctypes.c_bool.in_dll(ctypes.CDLL(str(path)), "FLAGS_caffe2_cpu_allocator_do_junk_fill")
        except ValueError:
            return None
    return None


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Fresh memory holds NaN or junk, for Python and C++ alike, so an unwritten output shows.

    torch's own fill stops at aten::empty; C++ kernels allocate below it. On a GPU the free blocks that the
    caching allocator will hand out are filled instead.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    junk = _junk_fill()
    torch.use_deterministic_algorithms(True, warn_only=True)
    if junk is not None:
        junk.value = True
    if torch.cuda.is_available():
        blocks = [
            torch.full((size,), 255, dtype=torch.uint8, device="cuda") for size in (2**20, 2**20, 40 * 2**20)
        ]
        del blocks
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if junk is not None:
            junk.value = False


def evaluate(
    call: Call,
    inputs: Sequence[Tensor | None],
    wanted: Sequence[int],
    upstream: Sequence[Tensor] | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[Tensor]]:
    """Outputs, gradients of the `wanted` inputs, and the random gradients that were sent into the outputs."""
    leaves = [
        t if t is None else t.detach().requires_grad_(i in wanted and t.is_floating_point())
        for i, t in enumerate(inputs)
    ]
    outputs = as_tuple(call(*leaves))
    if upstream is None:
        rng = generator(len(outputs))
        upstream = [(torch.rand(o.shape, generator=rng) + 0.5).to(o.device, o.dtype) for o in outputs]
    upstream = [u.to(o.device, o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    sources = [leaf for i, leaf in enumerate(leaves) if i in wanted and leaf is not None]
    # An input that the outputs do not depend on (the pred of a second derivative of L1) has gradient zero.
    unused = {"allow_unused": True, "materialize_grads": True}
    gradients = torch.autograd.grad(outputs, sources, upstream, **unused) if sources else ()
    return tuple(o.detach() for o in outputs), gradients, list(upstream)


def check_against_truth(
    call: Call,
    formula: Call,
    inputs: Sequence[Tensor | None],
    *,
    wanted: Sequence[int] = (0, 1),
    out_dtype: torch.dtype | None = None,
    magnitudes: Mapping[int, Tensor | None] | None = None,
    output_magnitudes: Mapping[int, Tensor | None] | None = None,
) -> None:
    """Values and gradients of `call` within budget of `formula` in float64; the inputs left as they were.

    Both take `inputs` (the formula: in one floating dtype, on the CPU) and return one or several tensors;
    `wanted` are the positions that get a gradient. `magnitudes`: for gradients that are sums of both signs,
    by position, the size of their terms (None: the largest element of the gradient). `output_magnitudes`: the
    same for outputs.
    """
    acc = accumulate_dtype([t for i, t in enumerate(inputs) if i in wanted and t is not None] or [inputs[0]])
    before = [None if t is None else (t.clone(), t._version) for t in inputs]
    with poisoned_allocations():
        actual, gradients, upstream = evaluate(call, inputs, wanted)
    for i, (t, old) in enumerate(zip(inputs, before, strict=True)):
        if t is not None and old is not None:
            assert t._version == old[1] and same_bits(t, old[0]), f"input {i} was changed in place"

    def in_dtype(dtype: torch.dtype) -> Call:
        return lambda *leaves: formula(*(None if t is None else t.to(dtype) for t in leaves))

    on_cpu = [None if t is None else t.detach().cpu() for t in inputs]
    plain, plain_gradients, _ = evaluate(in_dtype(acc), on_cpu, wanted, upstream)
    exact = [None if t is None else t.double() for t in on_cpu]
    truth, true_gradients, _ = evaluate(in_dtype(torch.float64), exact, wanted, upstream)
    for i, (got, usual, want) in enumerate(zip(actual, plain, truth, strict=True)):
        assert got.dtype == (out_dtype or acc), f"output {i} has dtype {got.dtype}"
        size = _magnitude(output_magnitudes, i, want)
        assert_within_budget(got, usual, want, acc=acc, what=f"output {i}", magnitude=size)
    for i, got, usual, want in zip(wanted, gradients, plain_gradients, true_gradients, strict=True):
        assert got.dtype == usual.dtype, f"gradient of input {i} has dtype {got.dtype}"
        size = _magnitude(magnitudes, i, want)
        assert_gradient(got, usual, want, acc=acc, what=f"gradient of input {i}", magnitude=size)


def _magnitude(given: Mapping[int, Tensor | None] | None, i: int, truth: Tensor) -> Tensor | None:
    if not given or i not in given or not truth.numel():
        return None
    size = given[i]
    return truth.abs().max() if size is None else size


def gradient_of(call: Call, wanted: Sequence[int] = (0, 1)) -> Call:
    """The gradients of `call` as a function of (*inputs, upstream), for second derivatives."""

    def gradients(*arguments: Tensor) -> tuple[Tensor, ...]:
        *inputs, upstream = arguments
        outputs = as_tuple(call(*inputs))
        sources = [inputs[i] for i in wanted]
        return torch.autograd.grad(
            outputs, sources, [upstream * (i + 1) for i in range(len(outputs))], create_graph=True
        )

    return gradients
