"""total_variation_loss in training: memory, determinism, torch.compile, CUDA graphs, autocast."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from harness import INTERPRETING, Backend, covering, evaluate, grid, laid_out, poisoned_allocations, same_bits
from pairs_cases import MODES, PENALTIES, SIZES, total_variation_call, total_variation_formula
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
# Rows that are multiples of 8: no padding in the packed signs.
KEPT_SIZE = (8, 3, 8, 8) if INTERPRETING else (8, 3, 64, 64)
KINDS = ("image", "composite")


@pytest.mark.parametrize("mode", ["image-default", "dilated_hole-mask"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtypes", ["f32/f32", "bf16/bf16"])
def test_l1_keeps_four_bits_an_element(kernel: Backend, mode: str, kind: str, dtypes: str) -> None:
    """And the scales [2]; the caller's graph owns neither image."""
    image, target, mask = on_device(kernel, *image_pair(KEPT_SIZE, dtypes), make_mask("n1hw", KEPT_SIZE))
    leaves = (image.requires_grad_(), target.requires_grad_(), mask)
    call = total_variation_call(kernel, mode=mode, penalty="l1")

    def step(image: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        return call(image * 2, target * 2 if kind == "composite" else None, mask)

    # cpu also keeps the mask as bits, to spare its backward the mask itself.
    assert kept_bytes(step, *leaves) <= image.numel() / 2 + mask.numel() / 8 + 4 * 8
    with torch.no_grad():
        assert kept_bytes(step, *leaves) == 0


def test_l2_keeps_its_inputs_and_nothing_else(kernel: Backend) -> None:
    image, target, mask = on_device(kernel, *image_pair(KEPT_SIZE), make_mask("n1hw", KEPT_SIZE))
    call = total_variation_call(kernel, mode="dilated_hole-mask", penalty="l2")
    assert kept_bytes(call, image.requires_grad_(), target, mask) <= 2 * 8


@grid(
    penalty=PENALTIES,
    mode=("image-default", "dilated_hole-mask"),
    kind=KINDS,
    layout=("contiguous", "channels_last"),
)
def test_two_runs_give_the_same_bits(
    backend: Backend, penalty: str, mode: str, kind: str, layout: str
) -> None:
    size = SIZES["7"] if INTERPRETING else (3, 3, 150, 170)
    image, target = image_pair(size, layouts=f"{layout}/{layout}")
    inputs = on_device(backend, image, target if kind == "composite" else None, make_mask("n1hw", size))
    call = total_variation_call(backend, mode=mode, penalty=penalty)

    def run() -> tuple[Tensor, ...]:
        outputs, gradients, _ = evaluate(call, inputs, (0, 1) if kind == "composite" else (0,))
        return (*outputs, *gradients)

    # PyTorch's own sums, which the reference uses, depend on the number of threads.
    check_deterministic(run, threads=(1,) if backend.name == "reference" else (1, 2, 3))


@grid(size=("17", "c17"), layout=("contiguous", "channels_last"))
def test_every_byte_of_the_signs_is_written(kernel: Backend, size: str, layout: str) -> None:
    """Also where it belongs to no pixel: an output may not differ from run to run."""
    (image,) = on_device(kernel, laid_out(torch.full(SIZES[size], 0.3), layout))
    op = getattr(torch.ops.inpaint_kernels, f"total_variation_{kernel.name}")
    with poisoned_allocations():
        signs = op(image, None, None, "image", "l1", "pairs", False, True)[2]
    # Equal pixels, and no pixels, as `ops/_pairs.py` packs them.
    assert (signs == (0b01010101 if kernel.name == "cuda" else 0)).all()


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


@covering(case=OPCHECK_CASES, penalty=PENALTIES, kind=("whole", "composite"))
def test_opcheck(kernel: Backend, case: str, penalty: str, kind: str) -> None:
    size, layout = case.split("-")
    shape = OPCHECK_SIZES[size]
    ops = torch.ops.inpaint_kernels
    forward = getattr(ops, f"total_variation_{kernel.name}").default
    backward = getattr(ops, f"total_variation_backward_{kernel.name}").default
    pair = image_pair(shape, "f16/f32", f"{layout}/{layout}")
    image, target, mask = on_device(kernel, *pair, make_mask("n1hw", shape))
    composite, l1 = kind == "composite", penalty == "l1"
    region = "image" if kind == "whole" else "dilated_hole"
    target = target if composite else None
    mask = None if kind == "whole" else mask
    arguments = (image, target, mask, region, penalty, "image", False, l1)
    check_opcheck(forward, (*arguments[:-1], False))
    check_opcheck(forward, arguments, (0, 1) if composite else (0,))
    loss, scale, signs = forward(*arguments)
    channels_last = layout == "channels_last" and not image.is_contiguous()
    kept = (signs, mask, None, None) if l1 else (None, mask, image, target)
    dtypes = (image.dtype, target.dtype if composite else image.dtype)
    rest = (list(shape), channels_last, *dtypes, composite, region, penalty, False)
    check_opcheck(backward, (torch.ones_like(loss), scale, *kept, *rest, True, composite))


COMPILED_SIZES = ((2, 3, 9, 14), (3, 4, 16, 10))


@pytest.mark.parametrize(
    ("penalty", "mode", "mask", "layout", "kind", "compiler"),
    [
        ("l1", "image-default", "n1hw", "contiguous", "image", "inductor"),
        ("l1", "dilated_hole-default", "n1hw", "channels_last", "composite", "aot_eager"),
        ("l2", "hole-mask", "nchw", "channels_last", "composite", "aot_eager"),
        ("l2", "first_pixel-mask", "hw", "contiguous", "image", "aot_eager"),
    ],
)
def test_compile(
    backend: Backend, penalty: str, mode: str, mask: str, layout: str, kind: str, compiler: str
) -> None:
    cases = []
    for size in COMPILED_SIZES:
        image, target = image_pair(size, layouts=f"{layout}/{layout}")
        inputs = (image, target if kind == "composite" else None, make_mask(mask, size))
        cases.append(on_device(backend, *inputs))
    check_compiles(
        total_variation_call(backend, mode=mode, penalty=penalty),
        partial(total_variation_formula, mode=mode, penalty=penalty),
        cases,
        compiler=compiler_for(backend, compiler),
        wanted=(0, 1) if kind == "composite" else (0,),
        magnitudes={0: None, 1: None},
    )


@grid(penalty=PENALTIES, mode=MODES)
def test_no_host_sync(backend: Backend, penalty: str, mode: str) -> None:
    inputs = on_device(backend, *image_pair(SIZE), make_mask("n1hw", SIZE))
    call = total_variation_call(backend, mode=mode, penalty=penalty)
    upstream = evaluate(call, inputs, (0, 1))[2]
    check_no_host_sync(lambda: evaluate(call, inputs, (0, 1), upstream))


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("mode", MODES)
def test_cuda_graph(kernel: Backend, penalty: str, mode: str) -> None:
    if kernel.device != "cuda":
        pytest.skip("CUDA graphs need tensors on the GPU")
    inputs = on_device(kernel, *image_pair(SIZE), make_mask("n1hw", SIZE))
    check_capturable(total_variation_call(kernel, mode=mode, penalty=penalty), inputs)


def test_autocast_changes_nothing(backend: Backend) -> None:
    for penalty in PENALTIES:
        inputs = on_device(backend, *image_pair(SIZE, "bf16/f32"), make_mask("n1hw", SIZE))
        call = total_variation_call(backend, mode="dilated_hole-mask", penalty=penalty)
        outside = evaluate(call, inputs, (0, 1))
        with torch.autocast(backend.device, torch.bfloat16):
            inside = evaluate(call, inputs, (0, 1), outside[2])
        for got, want in zip((*inside[0], *inside[1]), (*outside[0], *outside[1]), strict=True):
            assert same_bits(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("size", [(1, 1, 2**15 + 1, 2**16), (3, 1, 2**15, 2**15)], ids=["plane", "samples"])
def test_more_than_two_billion_elements(kernel: Backend, size: tuple[int, ...], penalty: str) -> None:
    """An index past 2^31 inside one plane, and one made of sample and pixel."""
    if INTERPRETING:
        pytest.skip("hours in the interpreter")
    skip_without_memory(kernel, 16 * 2**30)
    image = torch.zeros(size, dtype=torch.bfloat16, device=kernel.device)
    last = (size[0] - 1, 0, size[2] - 1, size[3] - 1)
    image[last], image[0, 0, 0, 0] = 2.0, -1.0
    image.requires_grad_()
    loss = total_variation_call(kernel, mode="image-image", penalty=penalty)(image, None, None)
    (gradient,) = torch.autograd.grad(loss * image.numel(), image)
    # Two corners, each the end of a pair down and of one across.
    power = PENALTIES.index(penalty) + 1
    want = torch.tensor(2 * (2.0**power + 1.0))
    torch.testing.assert_close((loss * image.numel()).cpu(), want, rtol=1e-6, atol=0)
    assert gradient[last] == 2 * (1 if penalty == "l1" else 4)
    assert gradient[0, 0, 0, 0] == -2 * (1 if penalty == "l1" else 2)
    assert gradient.count_nonzero() == 6


def test_automatic_choice_is_the_kernel_of_the_device(kernel: Backend) -> None:
    inputs = on_device(kernel, *image_pair(SIZE), make_mask("n1hw", SIZE))
    first = {"cpu": "cpu", "cuda": "cuda"}[kernel.device]
    if kernel.name != first:
        pytest.skip(f"{first} comes before {kernel.name} on this device")
    call = total_variation_call(None, mode="hole-mask", penalty="l1")
    called = ops_called(lambda: evaluate(call, inputs, (0, 1)))
    assert f"inpaint_kernels.total_variation_{first}.default" in called
    assert f"inpaint_kernels.total_variation_backward_{first}.default" in called
