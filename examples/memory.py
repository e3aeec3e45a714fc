"""Counts of bytes: what a loss keeps for its backward, and the most a training step needs at a time."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import weakref
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from adversarial import Judgement, tensors
from methods import Objective
from torch import Tensor


class Kept(NamedTuple):
    """Bytes held between forward and backward: tensors the loss made, and inputs it holds on to."""

    made: int
    inputs: int


class _Held:
    """What a graph holds of a saved tensor; gone as soon as the graph is."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def bytes_kept(
    objective: Objective,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    fixed: Iterable[Tensor] = (),
    judged: Judgement | None = None,
) -> Kept:
    """Counts what one call of the objective saves for its backward; shared storage counts once.

    What is ``fixed``, such as the weights of a trunk, does not count: it is there anyway. What is ``judged`` by a
    discriminator is an input like the images.
    """
    pred = pred.detach().requires_grad_()
    fake, real = (judged.fake, judged.real) if judged else (None, None)
    inputs = [pred, target, mask, *tensors(fake), *tensors(real)]
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    ignored = {tensor.untyped_storage().data_ptr() for tensor in fixed}
    # A graph that lives and dies within the call, as when streaming, keeps nothing.
    saved: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        held = _Held(tensor)
        saved.add(held)
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor):
        terms = objective(pred, target, mask, fake, real)
    storages = [held.tensor.untyped_storage() for held in saved]
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del terms
    held_inputs = sum(size for pointer, size in sizes.items() if pointer in given)
    made = sum(size for pointer, size in sizes.items() if pointer not in given | ignored)
    return Kept(made, held_inputs)


class PeakMemory:
    """The most bytes held at a time within any of its ``with`` blocks.

    ``bytes`` is None until then, and where it cannot be told: on a CPU unless Linux lets a process reset its peak.
    """

    ALLOCATOR, PROCESS = "torch's CUDA allocator", "the process, resident"

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.of = self.ALLOCATOR if device.type == "cuda" else self.PROCESS
        self.bytes: int | None = None
        self._known = True

    def __enter__(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._known = False

    def __exit__(self, *_: object) -> None:
        peak = (
            torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else self._resident()
        )
        if peak is not None:
            self.bytes = max(peak, self.bytes or 0)

    def _resident(self) -> int | None:
        if not self._known:
            return None
        match = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        return None if match is None else int(match[1]) * 1024


def release_freed() -> None:
    """Gives freed memory back to the system, so that the next peak does not count what an earlier run left."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
