"""What is timed: the plain formula, compiled and rewritten ones and the own kernels, each checked before.

A provider whose loss or gradients are off is not timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .harness import Benchmark, Case, Formula, weighted_sum
from .measure import Inputs, Step, clear_gradients, raise_if_lost, run_step, tensors

_COMPILE_TUNED = {"triton.cooperative_reductions": True, "combo_kernels": True}
# Own implementations, by device type.
_BACKENDS = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


# Values of the terms (the output, of a layer), and gradients by name of the input.
Exact = tuple[list[Tensor], dict[str, Tensor]]


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


def providers(benchmark: Benchmark, case: Case, device: torch.device) -> list[str]:
    """Names of all providers of a case, baselines first."""
    names = ["eager", "compile"] if benchmark.compiled else ["eager"]
    if benchmark.baseline(case) is not None:
        names.insert(0, "plain")
    if benchmark.rewrite(case) is not None:
        names += ["rewrite", "compile-rewrite"] if benchmark.compiled else ["rewrite"]
    if device.type == "cuda" and benchmark.compiled:
        names.append("compile-tuned")
    if benchmark.variants:
        return names + [f"ik-{own}" for own in benchmark.variants]
    from inpaint_kernels import _library

    op = _library.OPS.get(benchmark.op)
    return names + [f"ik-{own}" for own in _BACKENDS[device.type] if op is None or own in op.backends]


class _Upstream(torch.autograd.Function):
    """A scalar whose gradient by `output` is `upstream`: what follows a layer, at no cost."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, upstream: Tensor) -> Tensor:
        ctx.upstream = upstream
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor, None]:
        return ctx.upstream, None


def build(benchmark: Benchmark, case: Case, name: str) -> Provider:
    """One provider; a compiled one is compiled by its first call."""
    if name.startswith("ik-"):
        formula: Formula | None = benchmark.fused(case, name.removeprefix("ik-"))
    elif name.endswith("rewrite"):
        formula = benchmark.rewrite(case)
    elif name == "plain":
        formula = benchmark.baseline(case)
    else:
        formula = benchmark.eager(case)
    assert formula is not None, f"{benchmark.op} has no {name}"
    terms, weights = formula, benchmark.weights
    options: dict[str, Any] | None = dict(_COMPILE_TUNED) if name == "compile-tuned" else None
    if benchmark.layer:
        if name.startswith("compile"):
            terms = torch.compile(terms, fullgraph=True, dynamic=False, options=options)

        def layer_step(upstream: Tensor, **inputs: Tensor | None) -> Tensor:
            return _Upstream.apply(terms(**inputs)[0], upstream)

        return Provider(name, terms, layer_step)

    # Refers to nothing but these two: torch.compile guards whatever a closure reaches, in every call.
    def step(**inputs: Tensor | None) -> Tensor:
        return weighted_sum(terms(**inputs), weights)

    if name.startswith("compile"):
        return Provider(name, terms, torch.compile(step, fullgraph=True, dynamic=False, options=options))
    return Provider(name, terms, step)


def gradients_of(inputs: Inputs) -> dict[str, Tensor | None]:
    """Gradients by leaf; one whose parts a formula took instead (see `feature_inputs`) is put together."""
    gradients = {name: t.grad for name, t in inputs.items() if t is not None and t.requires_grad}
    for name in [n for n in gradients if f"{n}_part0" in gradients]:
        parts = [gradients.pop(part) for part in list(gradients) if part.startswith(f"{name}_part")]
        if gradients[name] is None:
            given = [part for part in parts if part is not None]
            gradients[name] = torch.cat(given) if len(given) == len(parts) else None
    return gradients


def truth_of(benchmark: Benchmark, case: Case, inputs: Inputs) -> Exact:
    """Terms and gradients of the eager formula in float64."""
    double: dict[str, Tensor | None] = {
        name: None if t is None else t.detach().double().requires_grad_(t.requires_grad)
        for name, t in inputs.items()
    }
    upstream = double.pop("upstream", None)
    terms = benchmark.eager(case)(**double)
    if benchmark.layer:
        terms[0].backward(upstream)
    else:
        weighted_sum(terms, benchmark.weights).backward()
    gradients = {name: grad for name, grad in gradients_of(double).items() if grad is not None}
    return [t.detach() for t in terms], gradients


def _poison(inputs: Inputs) -> None:
    """Memory that a provider gets next but fails to write holds NaN."""
    freed = [torch.full_like(t, float("nan")) for t in tensors(inputs)]
    # Sums and scalars, in the smallest blocks an allocator has.
    freed += [t.new_full((128,), float("nan"), dtype=torch.float32) for t in tensors(inputs)]
    del freed


def gate(
    benchmark: Benchmark, case: Case, provider: Provider, inputs: Inputs, truth: Exact | None = None
) -> str | None:
    """None when the provider computes the loss and every gradient, else what is wrong with it.

    `truth` is what `truth_of` gives for these inputs; several providers can share it.
    """
    tolerance = case.options.get("tolerance", benchmark.tolerances[case.dtype])
    exact_terms, exact_gradients = truth or truth_of(benchmark, case, inputs)
    given = {name: t for name, t in inputs.items() if name != "upstream"}
    # A compiled layer is checked as it will run, with the graph for its backward.
    _poison(inputs)
    with torch.set_grad_enabled(benchmark.layer):
        terms = [t.detach().double() for t in provider.formula(**given)]
    _poison(inputs)
    loss = provider.step(**inputs)
    _poison(inputs)
    loss.backward()
    gradients = gradients_of(inputs)
    clear_gradients(inputs)

    if len(terms) != len(exact_terms):
        return f"{len(terms)} terms, {len(exact_terms)} expected"
    if benchmark.layer:
        error = float(torch.linalg.vector_norm(terms[0] - exact_terms[0]))
        scale = float(torch.linalg.vector_norm(exact_terms[0]))
        if terms[0].shape != exact_terms[0].shape or not error <= tolerance * scale:
            return f"output is off: L2 error {error:.3g} of {scale:.3g}"
    else:
        exact_loss = sum(w * float(t) for w, t in zip(benchmark.weights, exact_terms))
        for got, exact in zip([loss.detach(), *terms], [exact_loss, *exact_terms]):
            # Written so that NaN fails.
            if not abs(float(got) - float(exact)) <= tolerance * abs(float(exact)):
                return f"got {float(got):.9g} where float64 gives {float(exact):.9g}"
    if gradients.keys() != exact_gradients.keys():
        return f"gradients of {sorted(gradients)}, {sorted(exact_gradients)} expected"
    # Rounding moves features of a deep trunk across kinks of ReLU, maximum and absolute value: a handful of pixels
    # then get another gradient in float64, whatever computes it.
    norms = [(2.0, "L2")] if benchmark.heavy else [(float("inf"), "largest"), (2.0, "L2")]
    for name, exact_gradient in exact_gradients.items():
        gradient = gradients[name]
        if gradient is None or gradient.shape != exact_gradient.shape or gradient.dtype != case.dtype:
            return f"gradient of {name} is missing or has the wrong shape or dtype"
        difference = gradient.double() - exact_gradient
        for norm, kind in norms:
            error, scale = (float(torch.linalg.vector_norm(t, norm)) for t in (difference, exact_gradient))
            if not error <= tolerance * scale:
                return f"gradient of {name} is off: {kind} error {error:.3g} of {scale:.3g}"
    return None


def admit(
    benchmark: Benchmark, case: Case, name: str, ring: Sequence[Inputs], truth: Exact | None = None
) -> Provider | Refusal:
    """A provider that is worth timing, checked and warmed up, or the reason why it is not."""
    try:
        provider = build(benchmark, case, name)
        wrong = None if name == "plain" else gate(benchmark, case, provider, ring[0], truth)
        if wrong is None and not benchmark.heavy:
            _warm_up(provider, ring)
    # Whatever a provider dies of is the reason why it is not timed; the run goes on.
    except Exception as error:
        return refusal(name, error, ring)
    return Refusal(name, wrong, red=True) if wrong else provider


def compile_once(benchmark: Benchmark, case: Case, name: str, inputs: Inputs) -> Refusal | None:
    """One step of a compiled provider, which leaves its kernels in the cache of torch.compile."""
    try:
        run_step(build(benchmark, case, name).step, inputs)
    except Exception as error:
        return refusal(name, error, [inputs])
    return None


def refusal(name: str, error: Exception, ring: Sequence[Inputs]) -> Refusal:
    """What a provider died of; raises when it took the device with it."""
    first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
    reason = f"{type(error).__name__}: {first_line}"
    raise_if_lost(tensors(ring[0])[0].device, f"{name}: {reason}")
    for inputs in ring:
        clear_gradients(inputs)
    return Refusal(name, reason, red="cannot run" not in first_line)


def _warm_up(provider: Provider, ring: Sequence[Inputs]) -> None:
    for inputs in (*ring, ring[0]):
        run_step(provider.step, inputs)
    # What compiles now would compile in the timed rounds, too; those run without this check, for it costs.
    with torch.compiler.set_stance("fail_on_recompile"):
        for inputs in ring:
            run_step(provider.step, inputs)
