"""feature_distance in training: memory, determinism, registration, torch.compile, CUDA graphs, autocast."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from feature_cases import (
    check_autocast,
    check_compiles,
    distance_call,
    distance_formula,
    distance_pair,
    distance_settings,
    distance_sizes,
)
from harness import INTERPRETING, Backend, covering, evaluate, grid, same_bits
from pixel_cases import PARAMS, make_mask, on_device, skip_without_memory
from torch import Tensor
from training_checks import (
    check_capturable,
    check_deterministic,
    check_no_host_sync,
    check_opcheck,
    kept_bytes,
    ops_called,
)

from inpaint_kernels.ops import _checks

PENALTIES = ("l1", "l2", "charbonnier")
SIZES = ((2, 3, 16, 16), (2, 8, 8, 8))


def layers(
    backend: Backend, masked: bool = True, sizes: Any = SIZES, predictions: int = 2, **options: Any
) -> list[Tensor]:
    """(*inputs, *targets, *masks)"""
    pairs = [distance_pair(size, predictions=predictions, seed=i, **options) for i, size in enumerate(sizes)]
    masks = [make_mask("n1hw", size, seed=i) for i, size in enumerate(sizes)] if masked else []
    return on_device(backend, *(x for x, _ in pairs), *(y for _, y in pairs), *masks)


@grid(dtypes=("f32/f32", "bf16/bf16"), masked=(False, True), wanted=((0, 1), (0, 1, 2, 3), (1,)))
def test_l1_keeps_two_bits_an_element(
    kernel: Backend, dtypes: str, masked: bool, wanted: tuple[int, ...]
) -> None:
    """A twelfth of float32 features at most; neither the features nor the repeated target."""
    flat = layers(kernel, masked, dtypes=dtypes)
    leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(flat)]
    call = distance_call(kernel, 2, distance_settings())

    def step(*leaves: Tensor) -> Tensor:
        return call(*(t * 2 for t in leaves[:4]), *leaves[4:])

    elements = sum(x.numel() for x in leaves[:2])
    kept = kept_bytes(step, *leaves)
    assert kept <= elements / 4 + 2 * 8 * 8
    assert kept <= 4 * elements / 12
    with torch.no_grad():
        assert kept_bytes(step, *leaves) == 0


@grid(penalty=("l2", "charbonnier"), masked=(False, True))
def test_smooth_penalties_keep_their_inputs_and_nothing_else(
    kernel: Backend, penalty: str, masked: bool
) -> None:
    flat = layers(kernel, masked)
    leaves = [t.requires_grad_(i == 0) for i, t in enumerate(flat)]
    assert kept_bytes(distance_call(kernel, 2, distance_settings(penalty)), *leaves) <= 8 * 8


@grid(penalty=("l1", "charbonnier"), layout=("contiguous", "channels_last"), predictions=(1, 3))
def test_two_runs_give_the_same_bits(backend: Backend, penalty: str, layout: str, predictions: int) -> None:
    sizes = ((1, 3, 9, 14), (1, 5, 6, 5)) if INTERPRETING else ((2, 3, 150, 170), (2, 16, 31, 33))
    flat = layers(backend, sizes=sizes, predictions=predictions, layouts=f"{layout}/{layout}")
    call = distance_call(backend, 2, distance_settings(penalty))

    def run() -> tuple[Tensor, ...]:
        outputs, gradients, _ = evaluate(call, flat, (0, 1, 2, 3))
        return (*outputs, *gradients)

    check_deterministic(run, threads=(1,) if backend.name == "reference" else (1, 2, 3))


OPCHECK_SIZES = {"image": (2, 3, 4, 5), "1x1": (2, 3, 1, 1), "c1": (2, 1, 4, 5), "nothing": (0, 3, 4, 5)}


@covering(
    size=OPCHECK_SIZES,
    layout=("contiguous", "channels_last", "transposed"),
    penalty=("l1", "charbonnier"),
    gradient=("plain", "gradient"),
)
def test_opcheck(kernel: Backend, size: str, layout: str, penalty: str, gradient: str) -> None:
    needs_grad, l1 = gradient == "gradient", penalty == "l1"
    forward = getattr(torch.ops.inpaint_kernels, f"feature_distance_{kernel.name}").default
    backward = getattr(torch.ops.inpaint_kernels, f"feature_distance_backward_{kernel.name}").default
    options = {"dtypes": "f16/f32" if needs_grad else "f32/f32", "layouts": f"{layout}/{layout}"}
    sizes = (OPCHECK_SIZES[size], (2, 4, 3, 3))
    flat = layers(kernel, needs_grad, sizes, **options)
    inputs, targets, masks = flat[:2], flat[2:4], flat[4:]
    leaves = [[t.detach().requires_grad_(needs_grad) for t in some] for some in (inputs, targets)]
    param = 0.0 if l1 else PARAMS[penalty]
    rest = ([0.5, 2.0], penalty, param, "mask", l1)
    check_opcheck(forward, (*leaves, masks, *rest))
    with torch.no_grad():
        _, scale, signs = forward(inputs, targets, masks, *rest)
    channels_last = [int(not x.is_contiguous() and layout == "channels_last") for x in inputs]
    arguments = (
        torch.tensor(1.5, device=kernel.device),
        scale,
        signs if l1 else [],
        masks,
        [] if l1 else inputs,
        [] if l1 else targets,
        [n for x, y in zip(inputs, targets, strict=True) for n in (*x.shape, y.shape[0])],
        channels_last,
        [_checks.FLOATS.index(x.dtype) for x in inputs],
        penalty,
        param,
    )
    check_opcheck(backward, arguments)


# No two sizes of the first case are equal by chance: the compiler would expect that of every case.
COMPILED_SIZES = (((2, 3, 9, 14), (2, 5, 8, 7)), ((3, 4, 16, 10), (3, 7, 5, 11)))


@pytest.mark.parametrize(
    ("penalty", "layout", "masked"),
    [
        ("l1", "contiguous", True),
        ("l1", "channels_last", False),
        ("l2", "contiguous", False),
        ("charbonnier", "channels_last", True),
    ],
)
def test_compile(backend: Backend, penalty: str, layout: str, masked: bool) -> None:
    if backend.name == "reference" and penalty != "charbonnier":
        pytest.skip("slow to trace; once is enough")
    settings = distance_settings(penalty, weights=(0.5, 2.0))
    check_compiles(
        distance_call(backend, 2, settings),
        partial(distance_formula, layers=2, **settings),
        [layers(backend, masked, sizes, layouts=f"{layout}/{layout}") for sizes in COMPILED_SIZES],
        wanted=(0, 1, 2, 3),
        sizes=partial(distance_sizes, layers=2, **settings),
        compiler="aot_eager",
    )


@grid(penalty=PENALTIES, masked=(False, True))
def test_no_host_sync(backend: Backend, penalty: str, masked: bool) -> None:
    """Also where only some layers ask for a gradient."""
    flat = layers(backend, masked)
    call = distance_call(backend, 2, distance_settings(penalty))
    for wanted in ((0, 1, 2, 3), (1,), (0, 3)):
        run = partial(evaluate, call, flat, wanted, evaluate(call, flat, wanted)[2])
        check_no_host_sync(run)
        # A list of indices would be copied to the device, and the host would wait for that.
        assert not [op for op in ops_called(run) if op.startswith("aten.index.")]


@pytest.mark.parametrize("penalty", PENALTIES)
def test_cuda_graph(kernel: Backend, penalty: str) -> None:
    if kernel.device != "cuda":
        pytest.skip("CUDA graphs need tensors on the GPU")
    check_capturable(distance_call(kernel, 2, distance_settings(penalty)), layers(kernel), (0, 1, 2, 3))


@pytest.mark.parametrize("penalty", PENALTIES)
def test_autocast(backend: Backend, penalty: str) -> None:
    flat = layers(backend, dtypes="bf16/f32")
    check_autocast(backend, distance_call(backend, 2, distance_settings(penalty)), flat, (0, 1, 2, 3))


def test_inference_mode_and_no_grad_run_no_autograd(backend: Backend) -> None:
    flat = layers(backend)
    flat[0].requires_grad_()
    call = distance_call(backend, 2, distance_settings())
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = call(*flat)
        assert not out.requires_grad
        assert torch.equal(out, call(*flat).detach())


def test_activation_checkpointing(kernel: Backend) -> None:
    flat = layers(kernel)
    call = distance_call(kernel, 2, distance_settings())
    again = partial(torch.utils.checkpoint.checkpoint, call, use_reentrant=False)
    for got, want in zip(evaluate(again, flat, (0, 1))[1], evaluate(call, flat, (0, 1))[1], strict=True):
        assert same_bits(got, want)


def test_automatic_choice_is_the_kernel_of_the_device(kernel: Backend) -> None:
    first = {"cpu": "cpu", "cuda": "cuda"}[kernel.device]
    if kernel.name != first:
        pytest.skip(f"{first} comes before {kernel.name} on this device")
    call = distance_call(None, 2, distance_settings())
    flat = layers(kernel)
    called = ops_called(lambda: evaluate(call, flat, (0, 1)))
    assert f"inpaint_kernels.feature_distance_{first}.default" in called
    assert f"inpaint_kernels.feature_distance_backward_{first}.default" in called
    assert not [op for op in called if "repeat" in op or "sub" in op]


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1, 2, 2**30 + 8), (3, 1, 2**15, 2**15)], ids=["plane", "samples"])
def test_more_than_two_billion_elements(kernel: Backend, size: tuple[int, ...]) -> None:
    if INTERPRETING:
        pytest.skip("hours in the interpreter")
    skip_without_memory(kernel, 18 * 2**30)
    x = torch.zeros(size, dtype=torch.bfloat16, device=kernel.device)
    y = torch.zeros(size, dtype=torch.bfloat16, device=kernel.device)
    last, first = (size[0] - 1, 0, size[2] - 1, size[3] - 1), (0, 0, 0, 0)
    x[last], x[first], y[first] = 3.0, 1.0, 2.0
    x.requires_grad_()
    count = float(x.numel())
    loss = distance_call(kernel, 1, distance_settings(weights=(count,)))(x, y)
    assert loss == 4.0
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient[last] == 1.0
    assert gradient[first] == -1.0
    assert gradient.count_nonzero() == 2
