"""The interleaved measurement of one case.

All providers are timed in one run, in a new random order every round, so that a slow phase of the machine or
what one provider leaves in caches and heap falls on all alike.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .harness import MODES, SMALL_NUMEL, Benchmark, Case
from .measure import (
    CopyMeter,
    Inputs,
    Samples,
    cache_bytes,
    count_launches,
    time_burst,
)
from .memory import measure_memory, storages
from .providers import Provider, Refusal, admit, compile_once, truth_of

_BURST_MS = 40.0


@dataclass
class Report:
    """Everything measured about one case; rows are dictionaries with the columns of the CSV."""

    rows: list[dict[str, object]] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def _ring(
    benchmark: Benchmark, case: Case, device: torch.device, seed: int
) -> list[dict[str, Tensor | None]]:
    """Several input sets to rotate over: a large case must find none of its data in the last-level cache."""
    generator = torch.Generator(device).manual_seed(seed)
    ring = [benchmark.make_inputs(case, device, generator)]
    # The activations of a heavy one fill the caches many times over.
    if case.numel > SMALL_NUMEL and not benchmark.heavy:
        copies = min(16, -(-4 * cache_bytes(device) // sum(storages(ring[0]).values())))
        ring += [benchmark.make_inputs(case, device, generator) for _ in range(copies)]
    return ring


def measure_case(
    benchmark: Benchmark,
    case: Case,
    device: torch.device,
    *,
    names: Sequence[str],
    rounds: int = 30,
    burst_ms: float = _BURST_MS,
    copy_bytes: int | None = None,
    seed: int = 0,
) -> Iterator[Report | None]:
    """Yields None after every piece of work, for a progress bar (see `work_units`), and the report last."""
    # Compiled code of another case would count against the limit of recompilations and turn shapes dynamic.
    torch.compiler.reset()
    ring = _ring(benchmark, case, device, seed)
    truth = truth_of(benchmark, case, ring[0])
    report = Report()
    admitted: list[Provider] = []
    for name in names:
        admission = admit(benchmark, case, name, ring, truth)
        if isinstance(admission, Refusal):
            report.refusals.append(admission)
        else:
            admitted.append(admission)
        yield None

    samples = {p.name: Samples() for p in admitted}
    copy = CopyMeter(device, copy_bytes or (512 << 20 if device.type == "cuda" else 128 << 20))
    del truth
    calls = 1 if benchmark.heavy else _burst_calls(admitted, ring, device, burst_ms)
    order = list(admitted)
    shuffle = random.Random(seed).shuffle
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            shuffle(order)
            copy.burst()
            for provider in order:
                time_burst(provider.step, ring, calls, device, samples[provider.name])
                yield None
    finally:
        gc.enable()

    copy_ms = statistics.median(copy.times_ms)
    copy_gbps = copy.bytes / copy_ms / 1e6
    for provider in admitted:
        report.rows += _rows(benchmark, case, provider, samples[provider.name], ring[0], device, copy_gbps)
    report.rows.append(
        {
            **_labels(benchmark, case, "copy", "forward"),
            **_percentiles(copy.times_ms),
            "gbps": copy_gbps,
            "copy_share": 1.0,
        }
    )
    yield report


def compile_case(
    benchmark: Benchmark, case: Case, device: torch.device, names: Sequence[str]
) -> Iterator[Refusal | None]:
    """Compiles the providers one by one, as `measure_case` would."""
    torch.compiler.reset()
    inputs = benchmark.make_inputs(case, device, torch.Generator(device).manual_seed(0))
    for name in names:
        yield compile_once(benchmark, case, name, inputs)


def work_units(names: Sequence[str], rounds: int) -> int:
    """How many times `measure_case` yields None, when no provider is refused."""
    return (rounds + 1) * len(names)


def _burst_calls(
    admitted: Sequence[Provider], ring: Sequence[Inputs], device: torch.device, burst_ms: float
) -> int:
    """Calls a burst, the same for every provider: as many as the slowest one makes in `burst_ms`."""
    # A GPU's launch queue holds about a thousand kernels, and a plain formula starts about thirty a step.
    limits = (2, 10) if device.type == "cuda" else (2, 200)
    slowest = 0.0
    for provider in admitted:
        probe = Samples()
        time_burst(provider.step, ring, 2, device, probe)
        slowest = max(slowest, min(probe.full_ms))
    return max(limits[0], min(limits[1], round(burst_ms / slowest) if slowest else limits[0]))


def _labels(benchmark: Benchmark, case: Case, provider: str, mode: str) -> dict[str, object]:
    return {
        "op": benchmark.op,
        "case": case.name,
        "provider": provider,
        "mode": mode,
        "shape": case.shape_name,
        "dtype": case.dtype_name,
        "layout": case.layout,
    }


def _percentiles(times_ms: Sequence[float]) -> dict[str, float]:
    fifths = statistics.quantiles(times_ms, n=5, method="inclusive")
    return {"p50_ms": statistics.median(times_ms), "p20_ms": fifths[0], "p80_ms": fifths[3]}


def _rows(
    benchmark: Benchmark,
    case: Case,
    provider: Provider,
    samples: Samples,
    inputs: Inputs,
    device: torch.device,
    copy_gbps: float,
) -> Iterator[dict[str, object]]:
    memory = measure_memory(provider.step, inputs, device)
    launches = count_launches(provider.step, inputs) if device.type == "cuda" else None
    host_matters = device.type == "cuda" or case.numel <= SMALL_NUMEL
    minimum = None if benchmark.heavy else benchmark.minimum_bytes(case)
    for mode in MODES:
        times: list[float] = getattr(samples, f"{mode}_ms")
        row = {**_labels(benchmark, case, provider.name, mode), **_percentiles(times)}
        gbps = None if minimum is None else minimum.of(mode) / statistics.median(times) / 1e6
        peak = memory.peak[mode]
        yield row | {
            "host_us": statistics.median(getattr(samples, f"{mode}_host_us")) if host_matters else None,
            "gbps": gbps,
            "copy_share": None if gbps is None else gbps / copy_gbps,
            "peak_mb": None if peak is None else peak / 1e6,
            "saved_bytes": memory.saved,
            "saved_with_inputs_bytes": memory.saved_with_inputs,
            "launches": launches if mode == "full" else None,
        }
