"""stacked_images in training: memory, determinism, torch.compile, CUDA graphs, autocast."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from harness import INTERPRETING, Backend, covering, evaluate, grid, same_bits
from pairs_cases import PARTS, SCALE, SHIFT, SIZES, stacked_images_call, stacked_images_formula
from pixel_cases import image_pair, make_mask, on_device, skip_without_memory
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
KEPT_SIZE = (8, 3, 8, 8) if INTERPRETING else (8, 3, 64, 64)
OPTIONS = {"parts": PARTS, "scale": SCALE, "shift": SHIFT}


@pytest.mark.parametrize("dtypes", ["f32/f32", "bf16/bf16"])
@pytest.mark.parametrize("parts", [PARTS, ("raw", "target")], ids="-".join)
def test_keeps_the_mask_and_nothing_else(kernel: Backend, dtypes: str, parts: tuple[str, ...]) -> None:
    pred, target, mask = on_device(kernel, *image_pair(KEPT_SIZE, dtypes), make_mask("n1hw", KEPT_SIZE))
    call = stacked_images_call(kernel, **(OPTIONS | {"parts": parts}))

    def step(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return call(pred * 2, target * 2, mask)

    assert kept_bytes(step, pred.requires_grad_(), target.requires_grad_(), mask) == 0

    def step_with_its_own_mask(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return call(pred, target, 1 - mask)

    kept = 4 * mask.numel() if parts == PARTS else 0
    assert kept_bytes(step_with_its_own_mask, pred, target, mask) == kept


@grid(layout=("contiguous", "channels_last"), dtype=("f32", "bf16"), swap=(False, True))
def test_two_runs_give_the_same_bits(backend: Backend, layout: str, dtype: str, swap: bool) -> None:
    size = SIZES["7"] if INTERPRETING else (3, 3, 150, 170)
    pair = image_pair(size, f"{dtype}/{dtype}", f"{layout}/{layout}")
    inputs = on_device(backend, *pair, make_mask("n1hw", size))
    call = stacked_images_call(backend, **OPTIONS, swap_channels=swap)

    def run() -> tuple[Tensor, ...]:
        outputs, gradients, _ = evaluate(call, inputs, (0, 1))
        return (*outputs, *gradients)

    check_deterministic(run)


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


@covering(case=OPCHECK_CASES, parts=("all", "without a mask"))
def test_opcheck(kernel: Backend, case: str, parts: str) -> None:
    size, layout = case.split("-")
    shape = OPCHECK_SIZES[size]
    ops = torch.ops.inpaint_kernels
    forward = getattr(ops, f"stacked_images_{kernel.name}").default
    backward = getattr(ops, f"stacked_images_backward_{kernel.name}").default
    pair = image_pair(shape, "f16/f32", f"{layout}/{layout}")
    pred, target, mask = on_device(kernel, *pair, make_mask("n1hw", shape))
    chosen = [0, 2] if parts == "without a mask" else [0, 1, 2, 3, 4, 1]
    mask = None if parts == "without a mask" else mask
    for scale, shift, swap in ((list(SCALE), list(SHIFT), True), ([], [], False)):
        arguments = (pred, target, mask, chosen, scale, shift, swap, False)
        check_opcheck(forward, arguments)
        check_opcheck(forward, arguments, (0, 1))
        grad = torch.ones_like(forward(*arguments))
        channels_last = layout == "channels_last" and not pred.is_contiguous()
        rest = (mask, list(shape), channels_last, pred.dtype, target.dtype, chosen, scale, swap, False)
        check_opcheck(backward, (grad, *rest, True, swap))


COMPILED_SIZES = ((2, 3, 9, 14), (3, 3, 16, 10))


@pytest.mark.parametrize(
    ("options", "mask", "layout", "compiler"),
    [
        (OPTIONS, "n1hw", "contiguous", "inductor"),
        (OPTIONS | {"swap_channels": True}, "nchw", "channels_last", "aot_eager"),
        ({"parts": ("composite",)}, "hw", "contiguous", "aot_eager"),
        ({"parts": ("target", "raw"), "scale": 2.0}, "nomask", "channels_last", "aot_eager"),
    ],
    ids=["all", "swap", "composite", "nomask"],
)
def test_compile(backend: Backend, options: dict[str, Any], mask: str, layout: str, compiler: str) -> None:
    check_compiles(
        stacked_images_call(backend, **options),
        partial(stacked_images_formula, **options),
        [
            on_device(backend, *image_pair(size, layouts=f"{layout}/{layout}"), make_mask(mask, size))
            for size in COMPILED_SIZES
        ],
        compiler=compiler_for(backend, compiler),
    )


@grid(parts=(PARTS, ("raw", "target")), swap=(False, True))
def test_no_host_sync(backend: Backend, parts: tuple[str, ...], swap: bool) -> None:
    inputs = on_device(backend, *image_pair(SIZE), make_mask("n1hw", SIZE))
    call = stacked_images_call(backend, **(OPTIONS | {"parts": parts}), swap_channels=swap)
    upstream = evaluate(call, inputs, (0, 1))[2]
    check_no_host_sync(lambda: evaluate(call, inputs, (0, 1), upstream))


@pytest.mark.parametrize("parts", [PARTS, ("composite",), ("raw", "target")], ids="-".join)
def test_cuda_graph(kernel: Backend, parts: tuple[str, ...]) -> None:
    if kernel.device != "cuda":
        pytest.skip("CUDA graphs need tensors on the GPU")
    inputs = on_device(kernel, *image_pair(SIZE), make_mask("n1hw", SIZE))
    check_capturable(stacked_images_call(kernel, **(OPTIONS | {"parts": parts})), inputs)


def test_autocast_changes_nothing(backend: Backend) -> None:
    inputs = on_device(backend, *image_pair(SIZE, "bf16/f32"), make_mask("n1hw", SIZE))
    call = stacked_images_call(backend, **OPTIONS)
    outside = evaluate(call, inputs, (0, 1))
    with torch.autocast(backend.device, torch.bfloat16):
        inside = evaluate(call, inputs, (0, 1), outside[2])
    for got, want in zip((*inside[0], *inside[1]), (*outside[0], *outside[1]), strict=True):
        assert same_bits(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1, 2**15 + 1, 2**16), (3, 1, 2**15, 2**15)], ids=["plane", "samples"])
def test_more_than_two_billion_elements(kernel: Backend, size: tuple[int, ...]) -> None:
    """An index past 2^31 inside one plane, one made of sample and pixel, and one of part and sample."""
    if INTERPRETING:
        pytest.skip("hours in the interpreter")
    skip_without_memory(kernel, 40 * 2**30)
    pred = torch.zeros(size, dtype=torch.bfloat16, device=kernel.device)
    target = torch.zeros(size, dtype=torch.bfloat16, device=kernel.device)
    mask = torch.zeros(size[-2:], dtype=torch.bool, device=kernel.device)
    last = (size[0] - 1, 0, size[2] - 1, size[3] - 1)
    pred[last], target[last] = 3.0, 2.0
    mask[-1, -1] = True
    pred.requires_grad_()
    stacked = stacked_images_call(kernel, parts=("raw", "composite"), scale=0.5)(pred, target, mask)
    assert stacked[last] == 1.5
    assert stacked[size[0] + last[0], 0, last[2], last[3]] == 1.0
    assert stacked.count_nonzero() == 2
    (gradient,) = torch.autograd.grad(stacked, pred, torch.ones_like(stacked))
    assert gradient[last] == 0.5
    assert gradient[0, 0, 0, 0] == 1.0
    assert (gradient == 1).sum() == gradient.numel() - size[0]


def test_automatic_choice_is_the_kernel_of_the_device(kernel: Backend) -> None:
    inputs = on_device(kernel, *image_pair(SIZE), make_mask("n1hw", SIZE))
    first = {"cpu": "cpu", "cuda": "cuda"}[kernel.device]
    if kernel.name != first:
        pytest.skip(f"{first} comes before {kernel.name} on this device")
    called = ops_called(lambda: evaluate(stacked_images_call(None, **OPTIONS), inputs, (0, 1)))
    assert f"inpaint_kernels.stacked_images_{first}.default" in called
    assert f"inpaint_kernels.stacked_images_backward_{first}.default" in called
