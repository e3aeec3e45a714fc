"""Memory for tensors that live within one pass of an op on the CPU."""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# glibc serves blocks of this size from its heap, hands the top of the heap back to the system as soon as it can and
# faults in every page again: with temporaries of 16 MiB one layer took 20 000 page faults a step, 30 ms of 100.
# Smaller blocks stay in the heap, larger ones are mapped one by one whoever asks for them.
SMALLEST, LARGEST = 4 << 20, 32 << 20
_LENT_BACK = getattr(mmap, "MADV_FREE", None)
_HUGE_PAGES = getattr(mmap, "MADV_HUGEPAGE", None)


class _Idle(threading.local):
    """Mappings nobody uses. The system may take their pages when it runs short of memory."""

    def __init__(self) -> None:
        self.blocks: list[mmap.mmap] = []

    def take(self, size: int) -> mmap.mmap:
        for i, block in enumerate(self.blocks):
            if size <= len(block) <= 2 * size:
                return self.blocks.pop(i)
        block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(_HUGE_PAGES)  # type: ignore[arg-type]
        return block

    def give(self, block: mmap.mmap) -> None:
        block.madvise(_LENT_BACK)  # type: ignore[arg-type]
        self.blocks.append(block)
        while sum(map(len, self.blocks)) > 2 * LARGEST:
            self.blocks.pop(0)


_idle = _Idle()
Make = Callable[[Any, torch.dtype, torch.memory_format], Tensor]


@contextlib.contextmanager
def temporaries(device: torch.device) -> Iterator[Make]:
    """Gives a function `(size, dtype, memory_format) -> tensor`; the tensors must not be used after the context."""
    used: list[mmap.mmap] = []
    maps = device.type == "cpu" and _LENT_BACK is not None and _HUGE_PAGES is not None

    def make(size: Any, dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        count = math.prod(size)
        if not maps or not SMALLEST <= count * dtype.itemsize < LARGEST:
            return torch.empty(size, dtype=dtype, device=device, memory_format=memory_format)
        block = _idle.take(count * dtype.itemsize)
        used.append(block)
        strides = torch.empty(size, device="meta", memory_format=memory_format).stride()
        return torch.frombuffer(block, dtype=dtype, count=count).as_strided(size, strides)

    try:
        yield make
    finally:
        for block in used:
            _idle.give(block)
