"""style_loss in training: memory, determinism, registration, torch.compile, CUDA graphs, autocast."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from feature_cases import (
    STYLES,
    check_autocast,
    check_compiles,
    check_matmul_precision,
    gram_formula,
    style_call,
    style_formula,
    style_pair,
    style_settings,
    style_sizes,
)
from harness import INTERPRETING, Backend, covering, evaluate, grid, same_bits
from pixel_cases import on_device, skip_without_memory
from torch import Tensor
from training_checks import (
    check_capturable,
    check_deterministic,
    check_no_host_sync,
    check_opcheck,
    compiler_for,
    kept_bytes,
    ops_called,
)

SIZES = ((2, 5, 9, 14), (2, 17, 6, 5))


def two_layers(backend: Backend, predictions: int = 2, **options: Any) -> list[Tensor]:
    """(*inputs, *targets)"""
    pairs = [style_pair(size, predictions=predictions, seed=i, **options) for i, size in enumerate(SIZES)]
    return on_device(backend, *(x for x, _ in pairs), *(y for _, y in pairs))


@grid(style=STYLES, cached=(False, True))
def test_keeps_one_matrix_a_layer(kernel: Backend, style: str, cached: bool) -> None:
    """Besides references to the features; nothing of a target that asks for no gradient."""
    flat = two_layers(kernel)
    settings = style_settings(style, target_is_gram=cached)
    inputs = [x.requires_grad_() for x in flat[:2]]
    call = style_call(kernel, settings)

    def step(*inputs: Tensor) -> Tensor:
        targets = [2 * y for y in flat[2:]]
        return call(*inputs, *([gram_formula(y, "chw") for y in targets] if cached else targets))

    matrices = sum(4 * x.shape[0] * x.shape[1] ** 2 for x in inputs)
    assert kept_bytes(step, *inputs) <= matrices
    with torch.no_grad():
        assert kept_bytes(step, *inputs) == 0


@grid(style=("chw-l1", "gatys"), layout=("contiguous", "channels_last"), predictions=(1, 3))
def test_two_runs_give_the_same_bits(backend: Backend, style: str, layout: str, predictions: int) -> None:
    size = (1, 17, 9, 14) if INTERPRETING else (2, 35, 91, 101)
    flat = on_device(backend, *style_pair(size, predictions=predictions, layouts=f"{layout}/{layout}"))
    call = style_call(backend, style_settings(style))

    def run() -> tuple[Tensor, ...]:
        outputs, gradients, _ = evaluate(call, flat, (0, 1))
        return (*outputs, *gradients)

    check_deterministic(run, threads=(1,) if backend.name == "reference" else (1, 2, 3))


OPCHECK_SIZES = {"image": (2, 3, 4, 5), "1x1": (2, 3, 1, 1), "c1": (2, 1, 4, 5), "nothing": (0, 3, 4, 5)}


@covering(
    size=OPCHECK_SIZES,
    layout=("contiguous", "channels_last", "transposed"),
    style=("chw-l1", "gatys"),
    gradient=("plain", "gradient"),
)
def test_opcheck(kernel: Backend, size: str, layout: str, style: str, gradient: str) -> None:
    needs_grad, cached = gradient == "gradient", style == "gatys"
    forward = getattr(torch.ops.inpaint_kernels, f"style_{kernel.name}").default
    backward = getattr(torch.ops.inpaint_kernels, f"style_backward_{kernel.name}").default
    dtypes = "f16/f32" if needs_grad else "f32/f32"
    flat = on_device(
        kernel,
        *style_pair(OPCHECK_SIZES[size], predictions=2, dtypes=dtypes, layouts=f"{layout}/{layout}"),
        *style_pair((2, 4, 3, 3), seed=1),
    )
    inputs, targets = flat[::2], flat[1::2]
    if cached:
        targets = [gram_formula(y.float(), "none") for y in targets]
    leaves = [
        [t.detach().requires_grad_(wanted) for t in layers]
        for layers, wanted in ((inputs, needs_grad), (targets, needs_grad and not cached))
    ]
    normalize, penalty = STYLES[style]
    check_opcheck(forward, (*leaves, [0.5, 2.0], penalty, normalize, cached, True))
    with torch.no_grad():
        factors = forward(inputs, targets, [0.5, 2.0], penalty, normalize, cached, True)[1]
    upstream = torch.tensor(1.5, device=kernel.device)
    check_opcheck(backward, (upstream, factors, inputs, 1.0))
    if not cached:
        check_opcheck(backward, (upstream, factors, targets, -1.0))


# No two sizes of the first case are equal by chance: the compiler would expect that of every case.
COMPILED_SIZES = (((2, 3, 9, 14), (2, 5, 8, 7)), ((3, 4, 16, 10), (3, 7, 5, 11)))


@pytest.mark.parametrize(
    ("style", "layout", "cached", "compiler"),
    [
        ("chw-l1", "contiguous", False, "inductor"),
        ("chw-l1", "channels_last", False, "aot_eager"),
        ("hw-l2", "contiguous", True, "aot_eager"),
        ("gatys", "contiguous", False, "aot_eager"),
    ],
)
def test_compile(backend: Backend, style: str, layout: str, cached: bool, compiler: str) -> None:
    settings = style_settings(style, (0.5, 2.0), target_is_gram=cached)
    cases = []
    for sizes in COMPILED_SIZES:
        pairs = [style_pair(size, predictions=2, layouts=f"{layout}/{layout}") for size in sizes]
        goals = [gram_formula(y, settings["normalize"]) if cached else y for _, y in pairs]
        cases.append(on_device(backend, *(x for x, _ in pairs), *goals))
    check_compiles(
        style_call(backend, settings),
        partial(style_formula, **settings),
        cases,
        wanted=(0, 1) if cached else (0, 1, 2, 3),
        sizes=partial(style_sizes, **settings),
        compiler=compiler_for(backend, compiler),
    )


@grid(style=STYLES, cached=(False, True))
def test_no_host_sync(backend: Backend, style: str, cached: bool) -> None:
    """Also where only one of two layers asks for a gradient."""
    flat = two_layers(backend)
    if cached:
        flat[2:] = [gram_formula(y, "chw") for y in flat[2:]]
    call = style_call(backend, style_settings(style, target_is_gram=cached))
    for wanted in ((0, 1), (1,)) if cached else ((0, 1, 2, 3), (0, 3)):
        upstream = evaluate(call, flat, wanted)[2]
        check_no_host_sync(lambda wanted=wanted, upstream=upstream: evaluate(call, flat, wanted, upstream))


@pytest.mark.parametrize("style", STYLES)
def test_cuda_graph(kernel: Backend, style: str) -> None:
    if kernel.device != "cuda":
        pytest.skip("CUDA graphs need tensors on the GPU")
    check_capturable(style_call(kernel, style_settings(style)), two_layers(kernel), (0, 1, 2, 3))


@pytest.mark.parametrize("style", STYLES)
def test_autocast_and_matmul_precision(backend: Backend, style: str) -> None:
    flat = two_layers(backend, dtypes="bf16/f32")
    call = style_call(backend, style_settings(style))
    check_autocast(backend, call, flat, (0, 1, 2, 3))
    check_matmul_precision(call, flat, (0, 1, 2, 3))


def test_lower_matmul_precision_never_reaches_a_strict_result(kernel: Backend) -> None:
    """What ran under "medium" before leaves no trace in a strict run."""
    flat = two_layers(kernel)
    call = style_call(kernel, style_settings("chw-l1"))
    before = evaluate(call, flat, (0, 1))
    check_matmul_precision(call, flat, (0, 1))
    after = evaluate(call, flat, (0, 1), before[2])
    for got, want in zip((*after[0], *after[1]), (*before[0], *before[1]), strict=True):
        assert same_bits(got, want)


def test_inference_mode_and_no_grad_run_no_autograd(backend: Backend) -> None:
    flat = two_layers(backend)
    flat[0].requires_grad_()
    call = style_call(backend, style_settings("chw-l1"))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = call(*flat)
        assert not out.requires_grad
        assert torch.equal(out, call(*flat).detach())


def test_activation_checkpointing(kernel: Backend) -> None:
    flat = two_layers(kernel)
    call = style_call(kernel, style_settings("chw-l1"))
    again = partial(torch.utils.checkpoint.checkpoint, call, use_reentrant=False)
    for got, want in zip(evaluate(again, flat, (0, 1))[1], evaluate(call, flat, (0, 1))[1], strict=True):
        assert same_bits(got, want)


def test_automatic_choice_is_the_kernel_of_the_device(kernel: Backend) -> None:
    """One forward and one backward call for all layers."""
    first = {"cpu": "cpu", "cuda": "cuda"}[kernel.device]
    if kernel.name != first:
        pytest.skip(f"{first} comes before {kernel.name} on this device")
    flat = two_layers(kernel)
    called = ops_called(lambda: evaluate(style_call(None, style_settings("chw-l1")), flat, (0, 1)))
    assert f"inpaint_kernels.style_{first}.default" in called
    assert f"inpaint_kernels.style_backward_{first}.default" in called
    assert not [op for op in called if "bmm" in op or "gram" in op]


@pytest.mark.slow
def test_more_than_two_billion_elements(kernel: Backend) -> None:
    if INTERPRETING:
        pytest.skip("hours in the interpreter")
    size = (3, 1, 2**15, 2**15)
    skip_without_memory(kernel, 20 * 2**30)
    x = torch.zeros(size, dtype=torch.bfloat16, device=kernel.device)
    target = torch.zeros((3, 1, 2, 2), dtype=torch.bfloat16, device=kernel.device)
    x[2, 0, -1, -1], x[0, 0, 0, 0] = 3.0, 2.0
    x.requires_grad_()
    loss = style_call(kernel, style_settings("none-l1"))(x, target)
    assert loss == (9.0 + 4.0) / 3
    (gradient,) = torch.autograd.grad(loss, x)
    torch.testing.assert_close(
        gradient[[2, 0], 0, [-1, 0], [-1, 0]].cpu(), torch.tensor([2.0, 4 / 3], dtype=torch.bfloat16)
    )
    assert gradient.count_nonzero() == 2
