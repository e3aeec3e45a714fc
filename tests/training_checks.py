"""Checks of how an op behaves in training, shared by the tests of every op.

Registration, `torch.compile`, determinism, memory kept for the backward, host syncs, CUDA graphs. What an op
computes is checked by `harness`.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from harness import INTERPRETING, Call, as_tuple, evaluate, same_bits
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


class OperatorCall(NamedTuple):
    """A call of one of the package's operators, as it reached the dispatcher below autograd."""

    operator: Any
    arguments: tuple[Any, ...]
    results: list[Tensor]

    @property
    def name(self) -> str:
        return str(self.operator).split(".")[1]


class _CallLog(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[OperatorCall] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if func.namespace == "inpaint_kernels":
            tensors = [t for t in tree_leaves(results) if isinstance(t, Tensor)]
            self.calls.append(OperatorCall(func, args, tensors))
        return results


def operator_calls(run: Callable[[], object]) -> list[OperatorCall]:
    """The calls of the package's operators, one for each time."""
    with _CallLog() as log:
        run()
    return log.calls


def check_opcheck(call: OperatorCall) -> None:
    """torch.library.opcheck of an operator as it was called; the arguments of a backward are constant."""

    def ready(t: Any) -> Any:
        wanted = isinstance(t, Tensor) and t.requires_grad and "backward" not in call.name
        return t.detach().requires_grad_(wanted) if isinstance(t, Tensor) else t

    torch.library.opcheck(call.operator, tree_map(ready, call.arguments))


def check_compiles(
    call: Call,
    check: Callable[[Call, Sequence[Tensor]], None],
    cases: Sequence[Sequence[Tensor]],
    compiler: str = "aot_eager",
) -> None:
    """One graph, compiled once with dynamic shapes, passes `check` with every case (sizes of at least 2)."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for number, inputs in enumerate(cases):
        check(compiled, inputs)
        # The first call may count twice: a float argument restarts the analysis.
        if number == 0:
            frames = counter.frame_count
    assert counter.frame_count == frames, "another size was compiled again"


def check_deterministic(run: Callable[[], Sequence[Tensor]], threads: Sequence[int] = (1, 2, 3)) -> None:
    """The same bits from two runs, and from every number of CPU threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for count in (*threads, threads[-1]):
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert same_bits(a, b), "two runs differ"


class _StorageLog(TorchDispatchMode):
    """Remembers, without owning them, the storages that ops returned, and the names of the ops."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.ops.add(str(func))
        leaves = tree_leaves(args)
        if str(func).startswith("aten.index") and any(
            getattr(t, "dtype", None) == torch.bool for t in leaves
        ):
            self.ops.add("aten.nonzero of a bool index")
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                known = self.storages.get(storage._cdata)
                if known is None or known[0].expired():
                    self.storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result

    def alive(self) -> dict[int, int]:
        return {cdata: size for cdata, (ref, size) in self.storages.items() if not ref.expired()}


def kept_bytes(call: Call, *leaves: Tensor | None) -> int:
    """Bytes made during the forward of `call` and still alive for its backward, outputs and leaves excepted.

    To count an input as kept, let `call` make it from a leaf. Everything kept must go through
    save_for_backward, or activation offloading and checkpointing would not see it.
    """
    saved: set[int] = set()

    def pack(t: Tensor) -> Tensor:
        saved.add(t.untyped_storage()._cdata)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), _StorageLog() as log:
        outputs = as_tuple(call(*leaves))
    if INTERPRETING:
        gc.collect()  # the interpreter leaves tensors in reference cycles
    owned = {t.untyped_storage()._cdata for t in (*outputs, *leaves) if t is not None}
    kept = {cdata: size for cdata, size in log.alive().items() if cdata not in owned}
    hidden = [size for cdata, size in kept.items() if cdata not in saved and size > 256]
    assert not hidden, f"storages of {hidden} bytes are kept outside save_for_backward"
    return sum(kept.values())


def ops_called(run: Callable[[], object]) -> set[str]:
    """Names of the operators that reach a kernel, "namespace.op.overload"."""
    with _StorageLog() as log:
        run()
    return log.ops


def check_no_host_sync(run: Callable[[], object]) -> None:
    """No op that waits for the device. The dispatcher shows it on any device, the driver on a GPU."""
    called = ops_called(run)
    waiting = ("_local_scalar_dense", "aten.equal", "nonzero", "unique", "masked_select", "is_nonzero")
    found = sorted(op for op in called if any(name in op for name in waiting))
    assert not found, f"ops that wait for the device: {found}"
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def check_capturable(call: Call, inputs: Sequence[Tensor | None], wanted: Sequence[int] = (0, 1)) -> None:
    """Forward and backward captured in a CUDA graph follow new input values on replay."""
    static = [None if t is None else t.clone() for t in inputs]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        _, _, upstream = evaluate(call, static, wanted)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = evaluate(call, static, wanted, upstream)
    for t in (static[i] for i in wanted):
        if t is not None:
            t.copy_(t.flip(0) * 0.5)
    graph.replay()
    eager = evaluate(call, static, wanted, upstream)
    for got, want in zip((*captured[0], *captured[1]), (*eager[0], *eager[1]), strict=True):
        assert same_bits(got, want), "the replayed graph differs from the eager run"
