"""Counts of bytes: what a step needs at most and what it keeps between its halves."""

from __future__ import annotations

import gc
import json
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Parameter
from torch.profiler import ProfilerActivity, profile

from .measure import Inputs, Step, clear_gradients, tensors

# Scalars, and blocks rounded up by the allocator, outlive a forward without being saved for the backward.
_SLACK_BYTES = 4096


@dataclass(frozen=True)
class Memory:
    """Bytes of one step beyond what lived before it; None where they cannot be measured."""

    peak: dict[str, int | None]
    saved: int
    saved_with_inputs: int


def storages(inputs: Inputs) -> dict[int, int]:
    """Bytes of the inputs by address; storage that several of them share counts once."""
    return dict(_storage(t) for t in tensors(inputs))


def _storage(t: Tensor) -> tuple[int, int]:
    storage = t.untyped_storage()
    return storage.data_ptr(), storage.nbytes()


class _Kept:
    """What a graph holds of a saved tensor; gone as soon as the graph is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def measure_memory(step: Step, inputs: Inputs, device: torch.device) -> Memory:
    """Peak bytes of one step, and the distinct bytes kept between its halves.

    Kept bytes are those autograd's hooks see and still hold after the forward: a graph that lives and dies
    within it keeps nothing. A provider that hides tensors from the hooks is found out by what stays allocated
    after its forward, and charged with that.
    """
    own = storages(inputs)
    # What was there before, the weights of a trunk above all, is not made by the step.
    plain = [t for t in gc.get_objects() if type(t) in (Tensor, Parameter) and t.layout == torch.strided]
    before = {_storage(t)[0] for t in plain} - own.keys()
    del plain
    graph: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(t: Tensor) -> _Kept:
        held = _Kept(t)
        graph.add(held)
        return held

    with saved_tensors_hooks(pack, lambda held: held.tensor):
        loss = step(**inputs)
    kept = {pointer: size for pointer, size in (_storage(h.tensor) for h in graph) if pointer not in before}
    saved = sum(size for pointer, size in kept.items() if pointer not in own)
    from_inputs = sum(size for pointer, size in kept.items() if pointer in own)
    loss.backward()
    clear_gradients(inputs)
    del loss
    peak, live = _peak_cuda(step, inputs) if device.type == "cuda" else _peak_cpu(step, inputs)
    if live is not None and live > saved + _SLACK_BYTES:
        saved = live
    return Memory(peak, saved, saved + from_inputs)


def _peak_cuda(step: Step, inputs: Inputs) -> tuple[dict[str, int | None], int | None]:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss = step(**inputs)
    forward = torch.cuda.max_memory_allocated() - before
    live = torch.cuda.memory_allocated() - before
    torch.cuda.reset_peak_memory_stats()
    loss.backward()
    backward = torch.cuda.max_memory_allocated() - before
    clear_gradients(inputs)
    return {"forward": forward, "backward": backward, "full": max(forward, backward)}, live


def _peak_cpu(step: Step, inputs: Inputs) -> tuple[dict[str, int | None], int | None]:
    """Tensor memory only: every allocation PyTorch's CPU allocator reports, no malloc of a library."""
    losses = []
    first = _allocations(lambda: losses.append(step(**inputs)))
    second = _allocations(lambda: losses.pop().backward())
    clear_gradients(inputs)
    if not first or not second:
        return {"forward": None, "backward": None, "full": None}, None
    live = sum(first)
    forward, backward = _highest(first, 0), _highest(second, live)
    return {"forward": forward, "backward": backward, "full": max(forward, backward)}, live


def _highest(changes: Sequence[int], start: int) -> int:
    level = highest = start
    for change in changes:
        level += change
        highest = max(highest, level)
    return highest


def _allocations(run: Callable[[], None]) -> list[int]:
    """Bytes allocated (positive) and freed (negative) by `run`, in order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]"]
    return [int(e["args"]["Bytes"]) for e in sorted(memory, key=lambda e: e["ts"])]
