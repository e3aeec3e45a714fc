"""The checks of `gpu_smoke.py` for one op on one backend, in this process."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from harness import poisoned_allocations, same_bits  # type: ignore[import-not-found]

from benchmarks import providers
from benchmarks.harness import Benchmark, Case, weighted_sum
from benchmarks.measure import DeviceLostError, Inputs, clear_gradients, raise_if_lost, tensors
from benchmarks.providers import Provider
from benchmarks.run import discover

# Of images (H, W), first those of all tests, then one for tools that slow a kernel down a hundredfold.
_SIDES = {"odd": (131, 203), "aligned": (128, 256), "row of 8": (9, 8), "column": (9, 1), "pixel": (1, 1)}
_TINY = {**_SIDES, "odd": (9, 13), "aligned": (16, 16)}
_FEATURES = {"gram", "style", "feature_distance", "lpips"}
# Options of cases with all maps that are read of a network.
_NETWORK = {"vgg16", "net"}
# The smallest side of an image with a whole window; of one for five scales.
LEAST, _LEAST_OF_SCALES = {"ssim": 11}, 176
# The binder of Triton treats a row of channels_last with 8 elements as it treats one of 8 pixels.
_PAIRS = {"total_variation", "inpainting_pixel"}


def _channels(op: str, aligned: bool) -> int:
    if op in _FEATURES:
        return 64 if aligned else 19
    if op == "partial_conv":
        return 32 if aligned else 5
    return 3


def cases(benchmark: Benchmark, tiny: bool) -> Iterator[Case]:
    """The first variant in every dtype, layout and size; each other one in two of them."""
    plain = [case for case in benchmark.cases if case.layout == "nchw"]
    variants = {(case.variant, *case.options.items()): case for case in reversed(plain)}
    first, *others = reversed(variants.values())
    least = LEAST.get(benchmark.op, 1)
    sides = {n: (max(h, least), max(w, least)) for n, (h, w) in (_TINY if tiny else _SIDES).items()}
    shapes = {name: (2, _channels(benchmark.op, name == "aligned"), *side) for name, side in sides.items()}
    if benchmark.op in _PAIRS:
        shapes["row of 8 elements"] = (2, 2, 5, 4)

    def one(case: Case, shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str) -> Case:
        return dataclasses.replace(case, shape=shape, dtype=dtype, layout=layout)

    # Layers of a whole network take several maps; a single map has every size.
    single = dataclasses.replace(first, options={k: v for k, v in first.options.items() if k not in _NETWORK})
    dtypes, layouts = (torch.float32, torch.bfloat16), ("nchw", "channels_last")
    for shape, dtype, layout in itertools.product(shapes.values(), dtypes, layouts):
        yield one(single, shape, dtype, layout)
    for case in others + [first] * bool(_NETWORK & first.options.keys()):
        layers = (2, 3, 64, 64) if tiny else (2, 3, 256, 256)
        for name, dtype, layout in zip(("odd", "aligned"), dtypes, layouts):
            if case.variant == "ms_ssim":
                shape = (1, 2, _LEAST_OF_SCALES, _LEAST_OF_SCALES + 5)
            else:
                shape = layers if _NETWORK & case.options.keys() else shapes[name]
            yield one(case, shape, dtype, layout)


def evaluate(benchmark: Benchmark, provider: Provider, inputs: Inputs) -> list[Tensor]:
    """Terms and gradients of one call."""
    terms = provider.formula(**{name: t for name, t in inputs.items() if name != "upstream"})
    if benchmark.layer:
        terms[0].backward(inputs["upstream"])
    else:
        weighted_sum(terms, benchmark.weights).backward()
    gradients = providers.gradients_of(inputs)
    clear_gradients(inputs)
    return [t.detach() for t in (*terms, *gradients.values()) if t is not None]


def against_float64(benchmark: Benchmark, case: Case, provider: Provider, inputs: Inputs) -> str | None:
    """None, or what is wrong with value or gradients, the truth being the reference's."""
    truth_is_reference = dataclasses.replace(benchmark, eager=lambda case: benchmark.fused(case, "reference"))
    truth = providers.truth_of(truth_is_reference, case, inputs)
    with poisoned_allocations():
        return providers.gate(benchmark, case, provider, inputs, truth)


def same_twice(benchmark: Benchmark, provider: Provider, inputs: Inputs) -> str | None:
    with poisoned_allocations():
        first, second = (evaluate(benchmark, provider, inputs) for _ in range(2))
    equal = [same_bits(a, b) for a, b in zip(first, second, strict=True)]
    return None if all(equal) else f"terms and gradients have the same bits twice: {equal}"


def captured(benchmark: Benchmark, case: Case, provider: Provider, device: torch.device) -> str | None:
    """None when a CUDA graph of a step, replayed on other inputs, gives what a call on them gives."""
    rng = torch.Generator(device).manual_seed(1)
    inputs, others = (benchmark.make_inputs(case, device, rng) for _ in range(2))
    expected = [t.clone() for t in evaluate(benchmark, provider, others)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            evaluate(benchmark, provider, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = evaluate(benchmark, provider, inputs)
    with torch.no_grad():
        for t, other in zip(tensors(inputs), tensors(others), strict=True):
            t.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for got, want in zip(replayed, expected, strict=True):
        # Convolutions may take another algorithm while they are captured.
        if not (got - want).abs().max() <= 1e-5 * want.abs().max():
            return f"a replayed graph is off by {float((got - want).abs().max()):.3g}"
    return None


def only_run(benchmark: Benchmark, provider: Provider, inputs: Inputs) -> None:
    evaluate(benchmark, provider, inputs)


class Checks:
    """Runs checks one after the other and prints a line about each; `red` when one of them was."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name, self.device, self.red = name, device, False

    def __call__(self, what: str, check: Callable[..., str | None], *arguments: Any) -> None:
        started, name = time.perf_counter(), f"{self.name} {what}"
        try:
            wrong = check(*arguments)
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        # The next check may pass all the same.
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        if wrong is None:
            print(f"ok  {name}: {time.perf_counter() - started:.2f} s", flush=True)
            return
        print(f"RED {name}: {wrong}", flush=True)
        self.red = True
        raise_if_lost(self.device, name)


def check(op: str, backend: str, device: torch.device, *, tiny: bool, bare: bool) -> int:
    """All checks; 1 when one of them was red."""
    # Convolutions would round float32 to TF32. What is slower under these checks is no news.
    torch.backends.cudnn.allow_tf32 = False
    warnings.filterwarnings("ignore", message=".*deterministic")
    benchmark = discover()[op]
    checks = Checks(f"{op} {backend}", device)
    try:
        for number, case in enumerate(cases(benchmark, tiny)):
            what = f"{case.dtype_name} {case.layout} {case.name}"
            inputs = benchmark.make_inputs(case, device, torch.Generator(device).manual_seed(number))
            provider = providers.build(benchmark, case, f"ik-{backend}")
            if bare:
                checks(what, only_run, benchmark, provider, inputs)
                continue
            checks(what, against_float64, benchmark, case, provider, inputs)
            checks(f"{what}, twice", same_twice, benchmark, provider, inputs)
            if number == 0 and device.type == "cuda":
                checks(f"{what}, graph", captured, benchmark, case, provider, device)
    except DeviceLostError as error:
        print(f"RED {error}", flush=True)
    return int(checks.red)
