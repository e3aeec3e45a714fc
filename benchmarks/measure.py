"""Stopwatches; they know nothing of ops, cases or providers.

A step is `loss = step(**inputs); loss.backward(); grads = None`, which is what a training loop does with a
loss. The three modes come from the stamps of one such step, so forward + backward = full, and nothing has to
be retained between the two halves that a user would not retain.

On CUDA the stamps are events, and a spinning kernel holds the device back until the host has queued the whole
burst: the events then time the device alone, however slow the host is. The host's own time is taken in the
same burst, in which it never waits for the device.
"""

from __future__ import annotations

import ctypes
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Inputs = Mapping[str, Tensor | None]
Step = Callable[..., Tensor]

_SPIN_CYCLES_PER_MS = 2_000_000
_SPIN_ATTEMPTS = 6


class DeviceLostError(RuntimeError):
    """After an illegal access a CUDA device answers this process with errors alone, whatever it asks."""


def raise_if_lost(device: torch.device, cause: str) -> None:
    """DeviceLostError, naming the cause, when the device is of no more use to this process."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise DeviceLostError(f"the device is lost after {cause}") from error


@dataclass
class Samples:
    """Times of single calls: device milliseconds (wall time on the CPU) and host microseconds."""

    forward_ms: list[float] = field(default_factory=list)
    backward_ms: list[float] = field(default_factory=list)
    full_ms: list[float] = field(default_factory=list)
    forward_host_us: list[float] = field(default_factory=list)
    backward_host_us: list[float] = field(default_factory=list)
    full_host_us: list[float] = field(default_factory=list)
    # How long the device has to spin before a burst of this provider; grows until it is enough.
    spin_ms: float = 2.0

    def add(self, forward_ms: float, backward_ms: float, forward_us: float, backward_us: float) -> None:
        self.forward_ms.append(forward_ms)
        self.backward_ms.append(backward_ms)
        self.full_ms.append(forward_ms + backward_ms)
        self.forward_host_us.append(forward_us)
        self.backward_host_us.append(backward_us)
        self.full_host_us.append(forward_us + backward_us)


def keep_heap() -> bool:
    """Tells glibc to keep freed memory instead of handing it back to the system; False on other C libraries.

    Without it a formula with many temporaries pays tens of thousands of page faults in one step and none in
    the next, as the heap happens to lie (seen: 0 to 43008 for the plain hole and valid terms of 8x3x512x512).
    With it nobody pays any, which favours the formulas with the most temporaries.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    m_trim_threshold, m_mmap_max = -1, -4
    return bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, 2**31 - 1))


def tensors(inputs: Inputs) -> list[Tensor]:
    return [t for t in inputs.values() if t is not None]


def clear_gradients(inputs: Inputs) -> None:
    for t in tensors(inputs):
        t.grad = None


def run_step(step: Step, inputs: Inputs) -> None:
    """One untimed step."""
    step(**inputs).backward()
    clear_gradients(inputs)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache, which a ring of inputs has to outgrow."""
    if device.type == "cuda":
        return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20))
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) << 10
    except (OSError, ValueError):
        return 32 << 20


def time_burst(
    step: Step, ring: Sequence[Inputs], calls: int, device: torch.device, samples: Samples
) -> None:
    """Times `calls` steps over the rotating inputs.

    One untimed step before them takes the caches, the heap and the threads over from the last provider.
    """
    if device.type == "cuda":
        _time_burst_cuda(step, ring, calls, samples)
        return
    clock = time.perf_counter_ns
    for i in range(calls + 1):
        inputs = ring[i % len(ring)]
        t0 = clock()
        loss = step(**inputs)
        t1 = clock()
        loss.backward()
        clear_gradients(inputs)
        del loss
        t2 = clock()
        if i:
            samples.add((t1 - t0) / 1e6, (t2 - t1) / 1e6, (t1 - t0) / 1e3, (t2 - t1) / 1e3)


def _time_burst_cuda(step: Step, ring: Sequence[Inputs], calls: int, samples: Samples) -> None:
    clock = time.perf_counter_ns
    for attempt in range(_SPIN_ATTEMPTS):
        begin, middle, end, stamps = _events(calls + 1), _events(calls + 1), _events(calls + 1), []
        awake = torch.cuda.Event()
        torch.cuda.synchronize()
        torch.cuda._sleep(int(samples.spin_ms * _SPIN_CYCLES_PER_MS))
        awake.record()
        for i in range(calls + 1):
            inputs = ring[i % len(ring)]
            begin[i].record()
            t0 = clock()
            loss = step(**inputs)
            t1 = clock()
            middle[i].record()
            t2 = clock()
            loss.backward()
            clear_gradients(inputs)
            del loss
            t3 = clock()
            end[i].record()
            stamps.append((t1 - t0, t3 - t2))
        too_short = awake.query()
        torch.cuda.synchronize()
        if too_short and attempt + 1 < _SPIN_ATTEMPTS:
            samples.spin_ms *= 2
            continue
        if too_short:
            warnings.warn(
                "the host was slower than the device: these device times contain gaps", stacklevel=2
            )
        for i in range(1, calls + 1):
            forward_ms, backward_ms = begin[i].elapsed_time(middle[i]), middle[i].elapsed_time(end[i])
            samples.add(forward_ms, backward_ms, stamps[i][0] / 1e3, stamps[i][1] / 1e3)
        return


def _events(n: int) -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(n)]


class CopyMeter:
    """Copies one large buffer into another: what this device can move, read plus written."""

    def __init__(self, device: torch.device, size: int) -> None:
        self.bytes = 2 * size
        self._device = device
        self._source = torch.ones(size, dtype=torch.uint8, device=device).view(torch.float32)
        self._destination = torch.zeros_like(self._source)
        self.times_ms: list[float] = []

    def burst(self, calls: int = 2) -> None:
        if self._device.type == "cuda":
            begin, end = _events(calls + 1), _events(calls + 1)
            torch.cuda._sleep(_SPIN_CYCLES_PER_MS)
            for i in range(calls + 1):
                begin[i].record()
                self._destination.copy_(self._source)
                end[i].record()
            torch.cuda.synchronize()
            self.times_ms += [begin[i].elapsed_time(end[i]) for i in range(1, calls + 1)]
            return
        for i in range(calls + 1):
            t0 = time.perf_counter_ns()
            self._destination.copy_(self._source)
            t1 = time.perf_counter_ns()
            if i:
                self.times_ms.append((t1 - t0) / 1e6)


def count_launches(step: Step, inputs: Inputs) -> int | None:
    """Kernels one step starts on the GPU, or None where the profiler sees none."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run_step(step, inputs)
        torch.cuda.synchronize()
    kernels = [
        e
        for e in profiler.events()
        if e.device_type.name == "CUDA" and not e.name.startswith(("Memcpy", "Memset"))
    ]
    return len(kernels) or None
