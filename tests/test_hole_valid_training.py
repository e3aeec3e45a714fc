"""hole_valid_loss in training: memory, determinism, torch.compile, CUDA graphs, autocast."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from harness import INTERPRETING, Backend, covering, evaluate, grid, same_bits
from pixel_cases import (
    NORMALIZATIONS,
    PARAMS,
    PENALTIES,
    SIZES,
    hole_valid_call,
    hole_valid_formula,
    image_pair,
    make_mask,
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


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("dtypes", ["f32/f32", "bf16/bf16"])
def test_l1_keeps_two_bits_an_element(kernel: Backend, normalize: str, dtypes: str) -> None:
    """For both terms together, and the scales [N, 2]; the caller's graph owns neither image."""
    pred, target, mask = on_device(kernel, *image_pair(KEPT_SIZE, dtypes), make_mask("n1hw", KEPT_SIZE))
    leaves = (pred.requires_grad_(), target.requires_grad_(), mask)
    call = hole_valid_call(kernel, penalty="l1", normalize=normalize)

    def step(pred: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return call(pred * 2, target * 2, mask)

    # cpu also keeps the mask as bits, to spare its backward the mask itself.
    assert kept_bytes(step, *leaves) <= pred.numel() / 4 + mask.numel() / 8 + 2 * 8 * 8
    with torch.no_grad():
        assert kept_bytes(step, *leaves) == 0


def test_smooth_penalties_keep_their_inputs_and_nothing_else(kernel: Backend) -> None:
    pred, target, mask = on_device(kernel, *image_pair(KEPT_SIZE), make_mask("n1hw", KEPT_SIZE))
    for penalty in ("l2", "charbonnier", "huber"):
        call = hole_valid_call(kernel, penalty=penalty, normalize="mask")
        assert kept_bytes(call, pred.requires_grad_(), target, mask) <= 8 * 2 * 8


@grid(penalty=("l1", "charbonnier"), normalize=NORMALIZATIONS, layout=("contiguous", "channels_last"))
def test_two_runs_give_the_same_bits(backend: Backend, penalty: str, normalize: str, layout: str) -> None:
    size = SIZES["tail"] if INTERPRETING else (3, 3, 150, 170)
    inputs = on_device(backend, *image_pair(size, layouts=f"{layout}/{layout}"), make_mask("n1hw", size))
    call = hole_valid_call(backend, penalty=penalty, normalize=normalize)

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
    gradient=("plain", "gradient"),
)
def test_opcheck(kernel: Backend, case: str, penalty: str, gradient: str) -> None:
    size, layout = case.split("-")
    shape, needs_grad = OPCHECK_SIZES[size], gradient == "gradient"
    ops = torch.ops.inpaint_kernels
    forward = getattr(ops, f"hole_valid_{kernel.name}").default
    backward = getattr(ops, f"hole_valid_backward_{kernel.name}").default
    pair = image_pair(shape, "f16/f32" if needs_grad else "f32/f32", f"{layout}/{layout}")
    pred, target, mask = on_device(kernel, *pair, make_mask("n1hw" if needs_grad else "nchw", shape))
    l1, param = penalty == "l1", PARAMS[penalty]
    arguments = (pred, target, mask, penalty, param, "mask", needs_grad, l1)
    check_opcheck(forward, arguments, (0, 1) if needs_grad else ())
    hole, valid, scale, signs = forward(*arguments)
    channels_last = layout == "channels_last" and not pred.is_contiguous()
    images = (signs, mask, None, None) if l1 else (None, mask, pred, target)
    rest = (
        list(shape),
        channels_last,
        pred.dtype,
        target.dtype,
        penalty,
        param,
        needs_grad,
        needs_grad,
        True,
    )
    check_opcheck(backward, (torch.ones_like(hole), torch.ones_like(valid), scale, *images, *rest))
    check_opcheck(backward, (None, torch.ones_like(valid), scale, *images, *rest))
    check_opcheck(backward, (torch.ones_like(hole), None, scale, *images, *rest))


COMPILED_SIZES = ((2, 3, 9, 14), (3, 4, 16, 10))


@pytest.mark.parametrize(
    ("penalty", "normalize", "mask", "layout", "compiler"),
    [
        ("l1", "image", "n1hw", "contiguous", "inductor"),
        ("l1", "mask", "n1hw", "channels_last", "aot_eager"),
        ("charbonnier", "sample", "nchw", "channels_last", "aot_eager"),
        ("huber", "mask", "hw", "contiguous", "aot_eager"),
    ],
)
def test_compile(
    backend: Backend, penalty: str, normalize: str, mask: str, layout: str, compiler: str
) -> None:
    check_compiles(
        hole_valid_call(backend, penalty=penalty, normalize=normalize),
        partial(hole_valid_formula, penalty=penalty, normalize=normalize),
        [
            on_device(backend, *image_pair(size, layouts=f"{layout}/{layout}"), make_mask(mask, size))
            for size in COMPILED_SIZES
        ],
        compiler=compiler_for(backend, compiler),
    )


@grid(penalty=PENALTIES, normalize=NORMALIZATIONS)
def test_no_host_sync(backend: Backend, penalty: str, normalize: str) -> None:
    inputs = on_device(backend, *image_pair(SIZE), make_mask("n1hw", SIZE))
    call = hole_valid_call(backend, penalty=penalty, normalize=normalize)
    upstream = evaluate(call, inputs, (0, 1))[2]
    check_no_host_sync(lambda: evaluate(call, inputs, (0, 1), upstream))


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_cuda_graph(kernel: Backend, penalty: str, normalize: str) -> None:
    if kernel.device != "cuda":
        pytest.skip("CUDA graphs need tensors on the GPU")
    inputs = on_device(kernel, *image_pair(SIZE), make_mask("n1hw", SIZE))
    check_capturable(hole_valid_call(kernel, penalty=penalty, normalize=normalize), inputs)


def test_autocast_changes_nothing(backend: Backend) -> None:
    for penalty in PENALTIES:
        inputs = on_device(backend, *image_pair(SIZE, "bf16/f32"), make_mask("n1hw", SIZE))
        call = hole_valid_call(backend, penalty=penalty, normalize="mask")
        outside = evaluate(call, inputs, (0, 1))
        with torch.autocast(backend.device, torch.bfloat16):
            inside = evaluate(call, inputs, (0, 1), outside[2])
        for got, want in zip((*inside[0], *inside[1]), (*outside[0], *outside[1]), strict=True):
            assert same_bits(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1, 2, 2**30 + 8), (3, 1, 2**15, 2**15)], ids=["plane", "samples"])
def test_more_than_two_billion_elements(kernel: Backend, size: tuple[int, ...]) -> None:
    """An index past 2^31 inside one plane, and one made of sample and pixel."""
    if INTERPRETING:
        pytest.skip("hours in the interpreter")
    skip_without_memory(kernel, 18 * 2**30)
    pred = torch.zeros(size, dtype=torch.bfloat16, device=kernel.device)
    target = torch.zeros(size, dtype=torch.bfloat16, device=kernel.device)
    mask = torch.zeros(size[-2:], dtype=torch.bool, device=kernel.device)
    last, first = (size[0] - 1, 0, size[2] - 1, size[3] - 1), (0, 0, 0, 0)
    pred[last], target[first] = 3.0, 2.0
    mask[-1, -1] = True
    pred.requires_grad_()
    terms = hole_valid_call(kernel, penalty="l1", normalize="mask")(pred, target, mask)
    outside = pred.numel() - size[0]
    assert terms.valid == 3.0 / size[0]
    torch.testing.assert_close(terms.hole.cpu(), torch.tensor(2.0 / outside), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(terms.valid + outside * terms.hole, pred)
    torch.testing.assert_close(gradient[last].cpu().float(), torch.tensor(1 / size[0]), rtol=1e-2, atol=0)
    torch.testing.assert_close(gradient[first].cpu().float(), torch.tensor(-1.0), rtol=1e-2, atol=0)
    assert gradient.count_nonzero() == 2


def test_automatic_choice_is_the_kernel_of_the_device(kernel: Backend) -> None:
    inputs = on_device(kernel, *image_pair(SIZE), make_mask("n1hw", SIZE))
    first = {"cpu": "cpu", "cuda": "cuda"}[kernel.device]
    if kernel.name != first:
        pytest.skip(f"{first} comes before {kernel.name} on this device")
    called = ops_called(
        lambda: evaluate(hole_valid_call(None, penalty="l1", normalize="mask"), inputs, (0, 1))
    )
    assert f"inpaint_kernels.hole_valid_{first}.default" in called
    assert f"inpaint_kernels.hole_valid_backward_{first}.default" in called
