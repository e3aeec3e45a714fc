"""The masked pixel losses in training: memory, determinism, torch.compile, CUDA graphs, autocast."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from harness import INTERPRETING, Backend, covering, evaluate, grid, same_bits
from pixel_cases import (
    MODES,
    PARAMS,
    PENALTIES,
    SIZES,
    image_pair,
    make_mask,
    masked_call,
    masked_formula,
    on_device,
    skip_without_memory,
)
from torch import Tensor
from training_checks import (
    check_capturable,
    check_compiles,
    check_deterministic,
    check_no_host_sync,
    check_opcheck,
    compiler_for,
    kept_bytes,
    ops_called,
)

SIZE = (2, 3, 9, 14)
# Planes that are multiples of 8: no padding in the packed signs.
KEPT_SIZE = (8, 3, 8, 8) if INTERPRETING else (8, 3, 64, 64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtypes", ["f32/f32", "bf16/bf16"])
def test_l1_keeps_two_bits_an_element(kernel: Backend, mode: str, dtypes: str) -> None:
    """1/16 of pred in float32, and the scales [N, 1]; the caller's graph owns neither image."""
    leaves = on_device(kernel, *image_pair(KEPT_SIZE, dtypes), make_mask("n1hw", KEPT_SIZE))
    leaves = [leaves[0].requires_grad_(), leaves[1].requires_grad_(), leaves[2]]
    call = masked_call(kernel, penalty="l1", mode=mode)

    def step(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return call(pred * 2, target * 2, mask)

    kept = kept_bytes(step, *leaves)
    assert kept <= leaves[0].numel() / 4 + 8 * 8
    with torch.no_grad():
        assert kept_bytes(step, *leaves) == 0


def test_smooth_penalties_keep_their_inputs_and_nothing_else(kernel: Backend) -> None:
    pred, target, mask = on_device(kernel, *image_pair(KEPT_SIZE), make_mask("n1hw", KEPT_SIZE))
    for penalty in ("l2", "charbonnier", "huber"):
        call = masked_call(kernel, penalty=penalty, mode="mask")
        assert kept_bytes(call, pred.requires_grad_(), target, mask) <= 8 * 8


@grid(penalty=("l1", "charbonnier"), mode=MODES, layout=("contiguous", "channels_last"))
def test_two_runs_give_the_same_bits(backend: Backend, penalty: str, mode: str, layout: str) -> None:
    size = SIZES["tail"] if INTERPRETING else (3, 3, 150, 170)
    inputs = on_device(backend, *image_pair(size, layouts=f"{layout}/{layout}"), make_mask("n1hw", size))
    call = masked_call(backend, penalty=penalty, mode=mode)

    def run() -> tuple[Tensor, ...]:
        outputs, gradients, _ = evaluate(call, inputs, (0, 1))
        return (*outputs, *gradients)

    # PyTorch's own sums, which the reference uses, depend on the number of threads.
    check_deterministic(run, threads=(1,) if backend.name == "reference" else (1, 2, 3))


OPCHECK_CASES = (
    "image-contiguous",
    "image-channels_last",
    "image-transposed",
    "1x1-contiguous",
    "c1-channels_last",
    "nothing-contiguous",
    "nothing-channels_last",
)
OPCHECK_SIZES = {"image": (2, 3, 4, 5), "1x1": (2, 3, 1, 1), "c1": (2, 1, 4, 5), "nothing": (0, 3, 4, 5)}


@covering(
    case=OPCHECK_CASES,
    penalty=("l1", "huber"),
    reduction=("mean", "none"),
    gradient=("plain", "gradient"),
)
def test_opcheck(kernel: Backend, case: str, penalty: str, reduction: str, gradient: str) -> None:
    size, layout = case.split("-")
    shape, needs_grad = OPCHECK_SIZES[size], gradient == "gradient"
    ops = torch.ops.inpaint_kernels
    forward = getattr(ops, f"masked_l1_{kernel.name}").default
    backward = getattr(ops, f"masked_l1_backward_{kernel.name}").default
    pair = image_pair(shape, "f16/f32" if needs_grad else "f32/f32", f"{layout}/{layout}")
    pred, target, mask = on_device(kernel, *pair, make_mask("n1hw" if needs_grad else "nchw", shape))
    l1, param = penalty == "l1", PARAMS[penalty]
    arguments = (pred, target, mask, penalty, param, reduction, "mask", l1)
    check_opcheck(forward, arguments, (0, 1) if needs_grad else ())
    out, scale, signs = forward(*arguments)
    channels_last = layout == "channels_last" and not pred.is_contiguous()
    images = (signs, mask, None, None) if l1 else (None, mask, pred, target)
    rest = (list(shape), channels_last, pred.dtype, target.dtype, penalty, param, needs_grad, True)
    check_opcheck(backward, (torch.ones_like(out), scale, *images, *rest))


COMPILED_SIZES = ((2, 3, 9, 14), (3, 4, 16, 10))


@pytest.mark.parametrize(
    ("penalty", "mode", "mask", "layout", "compiler"),
    [
        ("l1", "mask", "n1hw", "contiguous", "inductor"),
        ("l1", "mask", "n1hw", "channels_last", "aot_eager"),
        ("huber", "none", "nchw", "channels_last", "aot_eager"),
        ("l2", "sample", "hw", "contiguous", "aot_eager"),
        ("charbonnier", "image", "nomask", "contiguous", "aot_eager"),
    ],
)
def test_compile(backend: Backend, penalty: str, mode: str, mask: str, layout: str, compiler: str) -> None:
    check_compiles(
        masked_call(backend, penalty=penalty, mode=mode),
        partial(masked_formula, penalty=penalty, mode=mode),
        [
            on_device(backend, *image_pair(size, layouts=f"{layout}/{layout}"), make_mask(mask, size))
            for size in COMPILED_SIZES
        ],
        compiler=compiler_for(backend, compiler),
    )


@grid(penalty=PENALTIES, mode=MODES)
def test_no_host_sync(backend: Backend, penalty: str, mode: str) -> None:
    inputs = on_device(backend, *image_pair(SIZE), make_mask("n1hw", SIZE))
    call = masked_call(backend, penalty=penalty, mode=mode)
    upstream = evaluate(call, inputs, (0, 1))[2]
    check_no_host_sync(lambda: evaluate(call, inputs, (0, 1), upstream))


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("mode", MODES)
def test_cuda_graph(kernel: Backend, penalty: str, mode: str) -> None:
    if kernel.device != "cuda":
        pytest.skip("CUDA graphs need tensors on the GPU")
    inputs = on_device(kernel, *image_pair(SIZE), make_mask("n1hw", SIZE))
    check_capturable(masked_call(kernel, penalty=penalty, mode=mode), inputs)


def test_autocast_changes_nothing(backend: Backend) -> None:
    for penalty in PENALTIES:
        inputs = on_device(backend, *image_pair(SIZE, "bf16/f32"), make_mask("n1hw", SIZE))
        call = masked_call(backend, penalty=penalty, mode="mask")
        outside = evaluate(call, inputs, (0, 1))
        with torch.autocast(backend.device, torch.bfloat16):
            inside = evaluate(call, inputs, (0, 1), outside[2])
        for got, want in zip((*inside[0], *inside[1]), (*outside[0], *outside[1]), strict=True):
            assert same_bits(got, want)


def test_inference_mode_and_no_grad_run_no_autograd(backend: Backend) -> None:
    inputs = on_device(backend, *image_pair(SIZE), make_mask("n1hw", SIZE))
    inputs[0].requires_grad_()
    call = masked_call(backend, penalty="l1", mode="mask")
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            out = call(*inputs)
        assert not out.requires_grad
        assert torch.equal(out, call(*inputs).detach())


def test_activation_checkpointing(kernel: Backend) -> None:
    inputs = on_device(kernel, *image_pair(SIZE), make_mask("n1hw", SIZE))
    call = masked_call(kernel, penalty="l1", mode="mask")
    again = partial(torch.utils.checkpoint.checkpoint, call, use_reentrant=False)
    for got, want in zip(evaluate(again, inputs, (0, 1))[1], evaluate(call, inputs, (0, 1))[1], strict=True):
        assert same_bits(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1, 2, 2**30 + 8), (3, 1, 2**15, 2**15)], ids=["plane", "samples"])
@pytest.mark.parametrize("mode", ["mask", "none"])
def test_more_than_two_billion_elements(kernel: Backend, size: tuple[int, ...], mode: str) -> None:
    """An index past 2^31 inside one plane, and one made of sample and pixel."""
    if INTERPRETING:
        pytest.skip("hours in the interpreter")
    skip_without_memory(kernel, (28 if mode == "none" else 16) * 2**30)
    pred = torch.zeros(size, dtype=torch.bfloat16, device=kernel.device)
    target = torch.zeros((), dtype=torch.bfloat16, device=kernel.device).expand(size).contiguous()
    last, first = (size[0] - 1, 0, size[2] - 1, size[3] - 1), (0, 0, 0, 0)
    pred[last], pred[first], target[first] = 3.0, 1.0, 2.0
    pred.requires_grad_()
    loss = masked_call(kernel, penalty="l1", mode="sum" if mode == "mask" else mode)(pred, target)
    if mode == "none":
        assert loss[last] == 3.0
        assert loss[first] == 1.0
        assert loss.sum() == 4.0
        (gradient,) = torch.autograd.grad(loss, pred, torch.ones((), device=kernel.device).expand(size))
    else:
        assert loss == 4.0
        (gradient,) = torch.autograd.grad(loss, pred)
    assert gradient[last] == 1.0
    assert gradient[first] == -1.0
    assert gradient.count_nonzero() == 2


def test_automatic_choice_is_the_kernel_of_the_device(kernel: Backend) -> None:
    inputs = on_device(kernel, *image_pair(SIZE), make_mask("n1hw", SIZE))
    first = {"cpu": "cpu", "cuda": "cuda"}[kernel.device]
    if kernel.name != first:
        pytest.skip(f"{first} comes before {kernel.name} on this device")
    called = ops_called(lambda: evaluate(masked_call(None, penalty="l1", mode="mask"), inputs, (0, 1)))
    assert f"inpaint_kernels.masked_l1_{first}.default" in called
    assert f"inpaint_kernels.masked_l1_backward_{first}.default" in called
