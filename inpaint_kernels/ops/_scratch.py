"""Memory for tensors that live within one pass of an op on the CPU."""

from __future__ import annotations

import math
import mmap
import threading
from typing import Any

import torch
from torch import Tensor

# glibc serves blocks of this size from its heap, hands the top of the heap back to the system as soon as it can and
# faults in every page again: with temporaries of 16 MiB one layer took 20 000 page faults a step, 30 ms of 100.
# Smaller blocks stay in the heap, larger ones are mapped one by one whoever asks for them.
SMALLEST, LARGEST = 4 << 20, 32 << 20
_HUGE_PAGES: Any = getattr(mmap, "MADV_HUGEPAGE", None)


class _Idle(threading.local):
    """Mappings nobody uses, at most 64 MiB a thread."""

    def __init__(self) -> None:
        self.blocks: list[mmap.mmap] = []

    def take(self, size: int) -> mmap.mmap:
        for i, block in enumerate(self.blocks):
            if size <= len(block) <= 2 * size:
                return self.blocks.pop(i)
        block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        block.madvise(_HUGE_PAGES)
        return block

    def give(self, block: mmap.mmap) -> None:
        self.blocks.append(block)
        while sum(map(len, self.blocks)) > 2 * LARGEST:
            self.blocks.pop(0)


_idle = _Idle()


def temporary(
    used: list[mmap.mmap],
    device: torch.device,
    size: Any,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """A tensor to be written in full; not to be used any more once `used`, which it is noted in, is given back."""
    if device.type == "cpu" and _HUGE_PAGES is not None:
        count = math.prod(size)
        if SMALLEST <= count * dtype.itemsize < LARGEST:
            block = _idle.take(count * dtype.itemsize)
            used.append(block)
            strides = torch.empty(size, device="meta", memory_format=memory_format).stride()
            return torch.frombuffer(block, dtype=dtype, count=count).as_strided(size, strides)
    return torch.empty(size, dtype=dtype, device=device, memory_format=memory_format)


def give_back(used: list[mmap.mmap]) -> None:
    """Ends the life of the temporaries noted in `used`. Where an error comes first, their memory is just freed."""
    for block in used:
        _idle.give(block)
