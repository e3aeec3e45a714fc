"""inpainting_pixel_loss in training: memory, determinism, torch.compile, CUDA graphs, autocast."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from harness import INTERPRETING, Backend, covering, evaluate, grid, same_bits
from pairs_cases import (
    MODES,
    PENALTIES,
    SIZES,
    TERM_WEIGHTS,
    inpainting_pixel_call,
    inpainting_pixel_formula,
)
from pixel_cases import NORMALIZATIONS, image_pair, make_mask, on_device, skip_without_memory
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
DEFAULT = "dilated_hole-default"


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("dtypes", ["f32/f32", "bf16/bf16"])
def test_keeps_six_bits_an_element(kernel: Backend, normalize: str, dtypes: str) -> None:
    """For all terms together, and the scales [N, 2] and [2]; the caller's graph owns neither image."""
    pred, target, mask = on_device(kernel, *image_pair(KEPT_SIZE, dtypes), make_mask("n1hw", KEPT_SIZE))
    leaves = (pred.requires_grad_(), target.requires_grad_(), mask)
    call = inpainting_pixel_call(kernel, normalize=normalize, mode=DEFAULT)

    def step(pred: Tensor, target: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return call(pred * 2, target * 2, mask)

    # cpu also keeps the mask as bits, to spare its backward the mask itself.
    assert kept_bytes(step, *leaves) <= pred.numel() * 6 / 8 + mask.numel() / 8 + 3 * 8 * 8
    with torch.no_grad():
        assert kept_bytes(step, *leaves) == 0


@grid(penalty=PENALTIES, normalize=NORMALIZATIONS, layout=("contiguous", "channels_last"))
def test_two_runs_give_the_same_bits(backend: Backend, penalty: str, normalize: str, layout: str) -> None:
    size = SIZES["7"] if INTERPRETING else (3, 3, 150, 170)
    inputs = on_device(backend, *image_pair(size, layouts=f"{layout}/{layout}"), make_mask("n1hw", size))
    call = inpainting_pixel_call(backend, normalize=normalize, mode=DEFAULT, penalty=penalty)

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


@covering(case=OPCHECK_CASES, gradient=("plain", "gradient"))
def test_opcheck(kernel: Backend, case: str, gradient: str) -> None:
    size, layout = case.split("-")
    shape, needs_grad = OPCHECK_SIZES[size], gradient == "gradient"
    region = "dilated_hole" if needs_grad else "image"
    ops = torch.ops.inpaint_kernels
    forward = getattr(ops, f"inpainting_pixel_{kernel.name}").default
    backward = getattr(ops, f"inpainting_pixel_backward_{kernel.name}").default
    pair = image_pair(shape, "f16/f32" if needs_grad else "f32/f32", f"{layout}/{layout}")
    pred, target, mask = on_device(kernel, *pair, make_mask("n1hw" if needs_grad else "nchw", shape))
    weights = tuple(TERM_WEIGHTS.values())
    arguments = (pred, target, mask, *weights, "mask", region, "image", needs_grad, needs_grad)
    check_opcheck(forward, arguments, (0, 1) if needs_grad else ())
    *terms, scale, tv_scale, signs = forward(*arguments)
    if not needs_grad:
        return
    channels_last = layout == "channels_last" and not pred.is_contiguous()
    rest = (list(shape), channels_last, pred.dtype, target.dtype, *weights, region, True)
    ones = [torch.ones_like(term) for term in terms]
    for number in (0, 3, 4):  # the gradient of a term that sends none is missing; the last time none is
        grads = [None if i == number else one for i, one in enumerate(ones)]
        check_opcheck(backward, (*grads, scale, tv_scale, signs, mask, *rest, True, number != 3))


COMPILED_SIZES = ((2, 3, 9, 14), (3, 4, 16, 10))


@pytest.mark.parametrize(
    ("normalize", "mode", "penalty", "mask", "layout", "compiler"),
    [
        ("image", DEFAULT, "l1", "n1hw", "contiguous", "inductor"),
        ("mask", "image-default", "l1", "n1hw", "channels_last", "aot_eager"),
        ("sample", "hole-mask", "l1", "nchw", "channels_last", "aot_eager"),
        ("mask", "first_pixel-mask", "l2", "hw", "contiguous", "aot_eager"),
    ],
)
def test_compile(
    backend: Backend, normalize: str, mode: str, penalty: str, mask: str, layout: str, compiler: str
) -> None:
    options = {"normalize": normalize, "mode": mode, "penalty": penalty}
    check_compiles(
        inpainting_pixel_call(backend, **options),
        partial(inpainting_pixel_formula, **options),
        [
            on_device(backend, *image_pair(size, layouts=f"{layout}/{layout}"), make_mask(mask, size))
            for size in COMPILED_SIZES
        ],
        compiler=compiler_for(backend, compiler),
        magnitudes={0: None, 1: None},
    )


@grid(normalize=NORMALIZATIONS, mode=(DEFAULT, "image-default", "hole-mask"), penalty=PENALTIES)
def test_no_host_sync(backend: Backend, normalize: str, mode: str, penalty: str) -> None:
    inputs = on_device(backend, *image_pair(SIZE), make_mask("n1hw", SIZE))
    call = inpainting_pixel_call(backend, normalize=normalize, mode=mode, penalty=penalty)
    upstream = evaluate(call, inputs, (0, 1))[2]
    check_no_host_sync(lambda: evaluate(call, inputs, (0, 1), upstream))


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_cuda_graph(kernel: Backend, normalize: str, mode: str) -> None:
    if kernel.device != "cuda":
        pytest.skip("CUDA graphs need tensors on the GPU")
    inputs = on_device(kernel, *image_pair(SIZE), make_mask("n1hw", SIZE))
    check_capturable(inpainting_pixel_call(kernel, normalize=normalize, mode=mode), inputs)


def test_autocast_changes_nothing(backend: Backend) -> None:
    for penalty in PENALTIES:
        inputs = on_device(backend, *image_pair(SIZE, "bf16/f32"), make_mask("n1hw", SIZE))
        call = inpainting_pixel_call(backend, normalize="mask", mode=DEFAULT, penalty=penalty)
        outside = evaluate(call, inputs, (0, 1))
        with torch.autocast(backend.device, torch.bfloat16):
            inside = evaluate(call, inputs, (0, 1), outside[2])
        for got, want in zip((*inside[0], *inside[1]), (*outside[0], *outside[1]), strict=True):
            assert same_bits(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1, 2**15 + 1, 2**16), (3, 1, 2**15, 2**15)], ids=["plane", "samples"])
def test_more_than_two_billion_elements(kernel: Backend, size: tuple[int, ...]) -> None:
    """An index past 2^31 inside one plane, and one made of sample and pixel."""
    if INTERPRETING:
        pytest.skip("hours in the interpreter")
    skip_without_memory(kernel, 22 * 2**30)
    pred = torch.zeros(size, dtype=torch.bfloat16, device=kernel.device)
    target = torch.zeros(size, dtype=torch.bfloat16, device=kernel.device)
    mask = torch.zeros(size[-2:], dtype=torch.bool, device=kernel.device)
    last, first = (size[0] - 1, 0, size[2] - 1, size[3] - 1), (0, 0, 0, 0)
    pred[last], target[first] = 3.0, 2.0
    mask[-1, -1] = True  # known: the composite there is the target's 0
    pred.requires_grad_()
    terms = inpainting_pixel_call(kernel, normalize="image", mode="image-image")(pred, target, mask)
    count = pred.numel()
    for term, want in ((terms.hole, 2.0), (terms.valid, 3.0), (terms.tv, 0.0)):
        torch.testing.assert_close(term.cpu() * count, torch.tensor(want), rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(count * (terms.valid + 2 * terms.hole), pred)
    assert gradient[last] == 1
    assert gradient[first] == -2
    assert gradient.count_nonzero() == 2


def test_automatic_choice_is_the_kernel_of_the_device(kernel: Backend) -> None:
    inputs = on_device(kernel, *image_pair(SIZE), make_mask("n1hw", SIZE))
    first = {"cpu": "cpu", "cuda": "cuda"}[kernel.device]
    if kernel.name != first:
        pytest.skip(f"{first} comes before {kernel.name} on this device")
    call = inpainting_pixel_call(None, normalize="mask", mode=DEFAULT)
    called = ops_called(lambda: evaluate(call, inputs, (0, 1)))
    assert f"inpaint_kernels.inpainting_pixel_{first}.default" in called
    assert f"inpaint_kernels.inpainting_pixel_backward_{first}.default" in called
