"""What every benchmark shares: cases, providers, the correctness gate and the interleaved measurement.

A `bench_<op>.py` defines one `BENCHMARK`. All providers of a case get the same inputs, give the same scalar
and the same gradients, and are timed in one run, in a new random order every round, so that a slow phase of
the machine or what one provider leaves in caches and heap falls on all alike. A provider whose loss or
gradients are off is not timed.
"""

from __future__ import annotations

import gc
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .measure import (
    CopyMeter,
    Inputs,
    Samples,
    Step,
    cache_bytes,
    clear_gradients,
    count_launches,
    measure_memory,
    run_step,
    tensors,
    time_burst,
)

Terms = tuple[Tensor, ...]
Formula = Callable[..., Terms]

MODES = ("forward", "backward", "full")
# Small enough that the host's work, not the arithmetic, is what a call costs.
SMALL_NUMEL = 1 << 17
_BURST_MS = 40.0
_COMPILE_TUNED = {"triton.cooperative_reductions": True, "combo_kernels": True}
# Own implementations, by device type.
_BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


@dataclass(frozen=True)
class Case:
    """One row group of the tables: a shape, what is special about it, and a dtype."""

    shape: tuple[int, int, int, int]
    variant: str = "mask"
    dtype: torch.dtype = torch.float32
    layout: str = "nchw"
    options: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.shape_name} {self.variant}"

    @property
    def shape_name(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def numel(self) -> int:
        n, c, h, w = self.shape
        return n * c * h * w


@dataclass(frozen=True)
class Bytes:
    """The fewest bytes any implementation moves: the model that bandwidths are counted by."""

    forward: int
    backward: int

    def of(self, mode: str) -> int:
        return {"forward": self.forward, "backward": self.backward, "full": self.forward + self.backward}[
            mode
        ]


@dataclass(frozen=True)
class Benchmark:
    """One op. `eager`, `rewrite` and `fused` build, for a case, a function `(**inputs) -> terms`.

    The loss that is timed and differentiated is the sum of the terms times `weights`. `tolerances` maps a
    dtype to the largest relative error of the loss and of the gradients against float64.
    """

    op: str
    cases: Sequence[Case]
    make_inputs: Callable[[Case, torch.device, torch.Generator], dict[str, Tensor | None]]
    eager: Callable[[Case], Formula]
    fused: Callable[[Case, str], Formula]
    minimum_bytes: Callable[[Case], Bytes]
    tolerances: Mapping[torch.dtype, float]
    rewrite: Callable[[Case], Formula | None] = lambda case: None
    weights: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Provider:
    """`step` gives the loss and is what is timed; `formula` gives its terms."""

    name: str
    formula: Formula
    step: Step


@dataclass(frozen=True)
class Refusal:
    """Why a provider has no times: `red` when it ran and was wrong or crashed, else it cannot run here."""

    provider: str
    reason: str
    red: bool


@dataclass
class Report:
    """Everything measured about one case; rows are dictionaries with the columns of the CSV."""

    rows: list[dict[str, object]] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def weighted_sum(terms: Terms, weights: tuple[float, ...]) -> Tensor:
    """The loss, added up as in a training script: no multiplication by 1."""
    total = terms[0] if weights[0] == 1.0 else weights[0] * terms[0]
    for term, weight in zip(terms[1:], weights[1:]):
        total = total + (term if weight == 1.0 else weight * term)
    return total


def image_inputs(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Tensor | None]:
    """A prediction that needs its gradient, a target and a 0/1 mask with rectangular holes, all of one dtype.

    About a third of the pixels are holes. The mask has the dtype of the images, so that the plain formula is
    not slowed down by type promotion.
    """
    n, c, h, w = case.shape
    memory_format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format

    def image() -> Tensor:
        values = torch.rand((n, c, h, w), generator=generator) * 2 - 1
        return values.to(device, case.dtype).contiguous(memory_format=memory_format)

    mask = torch.ones(n, 1, h, w)
    for sample in mask:
        for _ in range(4):
            top, left = (int(torch.randint(0, size, (), generator=generator)) for size in (h, w))
            sample[:, top : top + h // 2, left : left + w // 2] = 0
    with_mask = bool(case.options.get("mask", True))
    return {
        "pred": image().requires_grad_(),
        "target": image(),
        "mask": mask.to(device, case.dtype) if with_mask else None,
    }


def providers(benchmark: Benchmark, case: Case, device: torch.device) -> list[str]:
    """Names of all providers of a case, baselines first."""
    names = ["eager", "compile"]
    if benchmark.rewrite(case) is not None:
        names += ["rewrite", "compile-rewrite"]
    if device.type == "cuda":
        names.append("compile-tuned")
    return names + [f"ik-{backend}" for backend in _BACKENDS[device.type]]


def build(benchmark: Benchmark, case: Case, name: str) -> Provider:
    """One provider; a compiled one is compiled by its first call."""
    if name.startswith("ik-"):
        formula: Formula | None = benchmark.fused(case, name.removeprefix("ik-"))
    elif name.endswith("rewrite"):
        formula = benchmark.rewrite(case)
    else:
        formula = benchmark.eager(case)
    assert formula is not None, f"{benchmark.op} has no {name}"
    terms, weights = formula, benchmark.weights

    # Refers to nothing but these two: torch.compile guards whatever a closure reaches, in every call.
    def step(**inputs: Tensor | None) -> Tensor:
        return weighted_sum(terms(**inputs), weights)

    if name.startswith("compile"):
        options: dict[str, Any] | None = dict(_COMPILE_TUNED) if name == "compile-tuned" else None
        return Provider(name, terms, torch.compile(step, fullgraph=True, dynamic=False, options=options))
    return Provider(name, terms, step)


def _leaves(inputs: Inputs) -> dict[str, Tensor]:
    return {name: t for name, t in inputs.items() if t is not None and t.requires_grad}


def _truth(benchmark: Benchmark, case: Case, inputs: Inputs) -> tuple[list[float], dict[str, Tensor]]:
    """Terms and gradients of the eager formula in float64."""
    exact: dict[str, Tensor | None] = {
        name: None if t is None else t.detach().double().requires_grad_(t.requires_grad)
        for name, t in inputs.items()
    }
    terms = benchmark.eager(case)(**exact)
    weighted_sum(terms, benchmark.weights).backward()
    return [float(t.detach()) for t in terms], {
        name: t.grad for name, t in _leaves(exact).items() if t.grad is not None
    }


def gate(benchmark: Benchmark, case: Case, provider: Provider, inputs: Inputs) -> str | None:
    """None when the provider computes the loss and every gradient, else what is wrong with it."""
    tolerance = benchmark.tolerances[case.dtype]
    exact_terms, exact_gradients = _truth(benchmark, case, inputs)
    # Memory that the provider gets but fails to write then holds NaN.
    poison = [torch.full_like(t, float("nan")) for t in tensors(inputs)]
    del poison
    with torch.no_grad():
        terms = [float(t) for t in provider.formula(**inputs)]
    loss = provider.step(**inputs)
    loss.backward()
    gradients = {name: t.grad for name, t in _leaves(inputs).items()}
    clear_gradients(inputs)

    if len(terms) != len(exact_terms):
        return f"{len(terms)} terms, {len(exact_terms)} expected"
    exact_loss = sum(w * t for w, t in zip(benchmark.weights, exact_terms))
    for got, exact in zip([float(loss.detach()), *terms], [exact_loss, *exact_terms]):
        # Written so that NaN fails.
        if not abs(got - exact) <= tolerance * abs(exact):
            return f"got {got:.9g} where float64 gives {exact:.9g}"
    if gradients.keys() != exact_gradients.keys():
        return f"gradients of {sorted(gradients)}, {sorted(exact_gradients)} expected"
    for name, exact_gradient in exact_gradients.items():
        gradient = gradients[name]
        if gradient is None or gradient.shape != exact_gradient.shape or gradient.dtype != case.dtype:
            return f"gradient of {name} is missing or has the wrong shape or dtype"
        difference = gradient.double() - exact_gradient
        for norm, kind in ((float("inf"), "largest"), (2.0, "L2")):
            error, scale = (float(torch.linalg.vector_norm(t, norm)) for t in (difference, exact_gradient))
            if not error <= tolerance * scale:
                return f"gradient of {name} is off: {kind} error {error:.3g} of {scale:.3g}"
    return None


def admit(benchmark: Benchmark, case: Case, name: str, inputs: Inputs) -> Provider | Refusal:
    """A provider that is worth timing, or the reason why it is not."""
    try:
        provider = build(benchmark, case, name)
        wrong = gate(benchmark, case, provider, inputs)
    # Whatever a provider dies of is the reason why it is not timed; the run goes on.
    except Exception as error:
        clear_gradients(inputs)
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return Refusal(name, f"{type(error).__name__}: {first_line}", red="cannot run" not in first_line)
    return Refusal(name, wrong, red=True) if wrong else provider


def _ring(
    benchmark: Benchmark, case: Case, device: torch.device, seed: int
) -> list[dict[str, Tensor | None]]:
    """Several input sets to rotate over: a large case must find none of its data in the last-level cache."""
    generator = torch.Generator().manual_seed(seed)
    ring = [benchmark.make_inputs(case, device, generator)]
    size = sum(t.untyped_storage().nbytes() for t in tensors(ring[0]))
    if case.numel > SMALL_NUMEL:
        copies = min(16, -(-4 * cache_bytes(device) // size))
        ring += [benchmark.make_inputs(case, device, generator) for _ in range(copies)]
    return ring


def measure_case(
    benchmark: Benchmark,
    case: Case,
    device: torch.device,
    *,
    names: Sequence[str] | None = None,
    rounds: int = 30,
    burst_ms: float = _BURST_MS,
    copy_bytes: int | None = None,
    seed: int = 0,
) -> Iterator[Report | None]:
    """Yields None after every piece of work, for a progress bar (see `work_units`), and the report last."""
    # Compiled code of another case would count against the limit of recompilations and turn shapes dynamic.
    torch.compiler.reset()
    ring = _ring(benchmark, case, device, seed)
    asked = [n for n in providers(benchmark, case, device) if names is None or n in names]
    report = Report()
    admitted: list[Provider] = []
    for name in asked:
        found = admit(benchmark, case, name, ring[0])
        if isinstance(found, Refusal):
            report.refusals.append(found)
        else:
            _warm_up(found, ring)
            admitted.append(found)
        yield None

    samples = {p.name: Samples() for p in admitted}
    copy = CopyMeter(device, copy_bytes or (512 << 20 if device.type == "cuda" else 128 << 20))
    calls = _burst_calls(admitted, ring, device, burst_ms)
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


def _warm_up(provider: Provider, ring: Sequence[Inputs]) -> None:
    for inputs in (*ring, ring[0]):
        run_step(provider.step, inputs)
    # What compiles now would compile in the timed rounds, too; those run without this check, for it costs.
    with torch.compiler.set_stance("fail_on_recompile"):
        for inputs in ring:
            run_step(provider.step, inputs)


def work_units(
    benchmark: Benchmark, case: Case, device: torch.device, names: Sequence[str] | None, rounds: int
) -> int:
    """How many times `measure_case` yields None."""
    return rounds + sum(names is None or n in names for n in providers(benchmark, case, device))


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
    minimum = benchmark.minimum_bytes(case)
    for mode in MODES:
        times: list[float] = getattr(samples, f"{mode}_ms")
        row = {**_labels(benchmark, case, provider.name, mode), **_percentiles(times)}
        gbps = minimum.of(mode) / statistics.median(times) / 1e6
        peak = memory.peak[mode]
        yield row | {
            "host_us": statistics.median(getattr(samples, f"{mode}_host_us")) if host_matters else None,
            "gbps": gbps,
            "copy_share": gbps / copy_gbps,
            "peak_mb": None if peak is None else peak / 1e6,
            "saved_bytes": memory.saved,
            "saved_with_inputs_bytes": memory.saved_with_inputs,
            "launches": launches if mode == "full" else None,
        }
