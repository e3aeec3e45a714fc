"""The CUDA kernels of stacked_images, run on the CPU: what proves their index logic without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import cuda_emulation
import pytest
import torch
from harness import (
    DTYPES,
    INTERPRETING,
    LAYOUTS,
    Backend,
    check_against_truth,
    covering,
    evaluate,
    laid_out,
    poisoned_allocations,
    same_bits,
)
from hypothesis import given
from hypothesis import strategies as st
from pairs_cases import (
    MASK_IS,
    PARTS,
    SCALE,
    SHIFT,
    region_cases,
    regions_of,
    stacked_images_call,
    stacked_images_formula,
)
from pixel_cases import MASK_DTYPES, MASK_SHAPES, image_pair, make_mask, with_specials
from torch import Tensor

import inpaint_kernels as ik
from inpaint_kernels.ops.stacked_images import MOST_ON_GPU

pytestmark = pytest.mark.skipif(INTERPRETING, reason="has nothing to do with Triton")

EMULATED = Backend("cuda", "cpu")
BOTH = ("contiguous", "channels_last")
NORMALIZED: dict[str, Any] = {"scale": SCALE, "shift": SHIFT}
MASKED = ("composite", "hole_raw", "hole_target")
TRAINING = ("raw", "composite", "target")

# A thread does 2 vectors of 4 or 8 elements in 2 segments, or in 2 stretches of the only segment; a block has
# 128 threads.
SIZES = {
    "1x1": (1, 1, 1, 1),
    "odd": (2, 3, 9, 13),  # planes of 117: rows of 16 threads, elements one by one
    "halves": (2, 3, 6, 10),  # planes of 60: vectors of 4 but not of 8
    "vectors": (2, 3, 16, 32),  # planes of 512: whole vectors, less than a block
    "tiles": (1, 2, 48, 56),  # planes of 2688: several tiles a plane, the last one partial
    "gray": (2, 1, 40, 60),  # one segment a sample also in NCHW
    "c17": (2, 17, 4, 6),  # more channels than rows of threads
    "c64": (1, 64, 12, 12),  # several tiles across the channels, as many constants as a launch takes
}


@pytest.fixture(autouse=True, scope="module")
def emulation() -> Iterator[None]:
    with cuda_emulation.install():
        yield


def check(pred: Tensor, target: Tensor, mask: Tensor | None, **options: Any) -> None:
    options.setdefault("parts", PARTS)
    check_against_truth(
        stacked_images_call(EMULATED, **options),
        partial(stacked_images_formula, **options),
        [pred, target, mask],
        out_dtype=torch.promote_types(pred.dtype, target.dtype),
    )


def by_channel(channels: int) -> dict[str, Any]:
    """Constants of every channel; the shifts do not cancel what is shifted."""
    return {
        "scale": [0.5 + 0.3 * i for i in range(channels)],
        "shift": [20.0 * (1 - 2 * (i % 2)) + 10 * i for i in range(channels)],
    }


@covering(size=SIZES, layout=BOTH, dtype=("f32", "bf16"))
def test_sizes(size: str, layout: str, dtype: str) -> None:
    pair = image_pair(SIZES[size], f"{dtype}/{dtype}", f"{layout}/{layout}")
    for kind in ("n1hw", "nchw"):
        for swap in (False, True):
            for constants in ({}, by_channel(SIZES[size][1])):
                check(*pair, make_mask(kind, SIZES[size]), swap_channels=swap, **constants)


def test_rounds() -> None:
    """Enough tiles that a block goes over the channels twice, with one mask for both rounds and with two."""
    size = (264, 3, 23, 24)
    for dtype in ("f32", "bf16"):
        for kind in ("n1hw", "nchw"):
            check(*image_pair(size, f"{dtype}/{dtype}"), make_mask(kind, size), parts=TRAINING, **NORMALIZED)


@covering(size=((2, 1, 9, 13), (1, 1, 48, 56)), dtypes=("f32/f32", "bf16/bf16"), swap=(False, True))
def test_one_channel_becomes_several(size: tuple[int, int, int, int], dtypes: str, swap: bool) -> None:
    pair, mask = image_pair(size, dtypes), make_mask("n1hw", size)
    for constants in (
        NORMALIZED,
        {"scale": 0.7, "shift": SHIFT},
        {"scale": SCALE},
        by_channel(MOST_ON_GPU["cuda"]),
    ):
        check(*pair, mask, swap_channels=swap, **constants)
    # As many parts as channels.
    check(*pair, mask, parts=TRAINING, swap_channels=swap, **NORMALIZED)


@covering(pred=("f32", "f16", "bf16"), target=("f32", "f16", "bf16"), size=("halves", "vectors"), layout=BOTH)
def test_dtypes(pred: str, target: str, size: str, layout: str) -> None:
    """Both gradients, and each alone: kernels of their own."""
    pair = image_pair(SIZES[size], f"{pred}/{target}", f"{layout}/{layout}")
    mask = make_mask("n1hw", SIZES[size])
    for wanted in ((0, 1), (0,), (1,)):
        check_against_truth(
            stacked_images_call(EMULATED, parts=PARTS, **NORMALIZED),
            partial(stacked_images_formula, parts=PARTS, **NORMALIZED),
            [*pair, mask],
            wanted=wanted,
            out_dtype=torch.promote_types(DTYPES[pred], DTYPES[target]),
        )


@covering(
    parts=(*((part,) for part in PARTS), TRAINING, PARTS[::-1], ("raw", "raw", "target")), wanted=(0, 1)
)
def test_parts(parts: tuple[str, ...], wanted: int) -> None:
    """The gradient to one image, of parts that show it and of parts that do not."""
    inputs = [*image_pair(SIZES["vectors"]), make_mask("n1hw", SIZES["vectors"])]
    call = stacked_images_call(EMULATED, parts=parts, **NORMALIZED)
    formula = partial(stacked_images_formula, parts=parts, **NORMALIZED)
    if any(part.endswith(("raw", "target")[wanted]) or part == "composite" for part in parts):
        check_against_truth(call, formula, inputs, wanted=(wanted,))
        return
    leaves = [t.requires_grad_(i == wanted) for i, t in enumerate(inputs)]
    with poisoned_allocations():
        call(*leaves).sum().backward()
    assert not leaves[wanted].grad.any()


@covering(dtype=MASK_DTYPES, kind=("n1hw", "nchw", "hw"), layout=BOTH, images=("f32", "f16"))
def test_mask_dtypes(dtype: str, kind: str, layout: str, images: str) -> None:
    for size in (SIZES["odd"], SIZES["vectors"]):
        pair = image_pair(size, f"{images}/{images}", f"{layout}/{layout}")
        check(*pair, make_mask(kind, size, dtype), parts=TRAINING, mask_is="hole")


@covering(mask=[kind for kind in MASK_SHAPES if kind != "nomask"], layout=BOTH, swap=(False, True))
def test_mask_shapes(mask: str, layout: str, swap: bool) -> None:
    """Also where the mask's channels have to be read in reverse with those of the images."""
    size = (2, 3, 8, 12)
    for mask_layout in ("contiguous", "channels_last", "padded"):
        weights = laid_out(make_mask(mask, size), mask_layout)
        for mask_is in MASK_IS:
            check(
                *image_pair(size, layouts=f"{layout}/{layout}"), weights, swap_channels=swap, mask_is=mask_is
            )


@covering(pred=LAYOUTS, target=LAYOUTS, dtype=("f32", "f16"))
def test_layouts(pred: str, target: str, dtype: str) -> None:
    size = SIZES["vectors"]
    pair = image_pair(size, f"{dtype}/{dtype}", f"{pred}/{target}")
    for swap in (False, True):
        check(*pair, make_mask("n1hw", size), swap_channels=swap, **NORMALIZED)


@covering(upstream=LAYOUTS, layout=BOTH)
def test_upstream_layouts(upstream: str, layout: str) -> None:
    size = SIZES["vectors"]
    inputs = [*image_pair(size, layouts=f"{layout}/{layout}"), make_mask("n1hw", size)]
    for swap in (False, True):
        call = stacked_images_call(EMULATED, parts=PARTS, swap_channels=swap, **NORMALIZED)
        _, want, (grad,) = evaluate(call, inputs, (0, 1))
        leaves = [t.detach().requires_grad_(i < 2) for i, t in enumerate(inputs)]
        got = torch.autograd.grad(call(*leaves), leaves[:2], laid_out(grad, upstream))
        assert all(map(same_bits, got, want))


@covering(layout=BOTH, swap=(False, True), mask_is=MASK_IS, size=("odd", "vectors"))
def test_specials(layout: str, swap: bool, mask_is: str, size: str) -> None:
    """NaN and Inf where a part does not look change no bit of it, nor of any gradient."""
    mask = make_mask("nchw", SIZES[size], values="binary")
    hole, valid = regions_of(mask, SIZES[size], mask_is)
    pred, target = image_pair(SIZES[size], layouts=f"{layout}/{layout}")
    options = {"swap_channels": swap, "mask_is": mask_is, **NORMALIZED}
    for parts, dirty in (
        (("composite", "hole_raw"), (with_specials(pred, hole == 0), target)),
        (("composite",), (pred, with_specials(target, valid == 0))),
    ):
        call = stacked_images_call(EMULATED, parts=parts, **options)
        clean = evaluate(call, (pred, target, mask), (0, 1))
        images = [laid_out(x, layout) for x in dirty]
        outputs, gradients, _ = evaluate(call, (*images, mask), (0, 1), clean[2])
        assert all(map(same_bits, (*outputs, *gradients), (*clean[0], *clean[1])))


@covering(layout=BOTH, mask_is=MASK_IS)
def test_special_gradients(layout: str, mask_is: str) -> None:
    """What a trunk sends into a part stays with the image it shows there, even NaN."""
    size = SIZES["vectors"]
    mask = make_mask("n1hw", size, values="binary")
    hole, valid = regions_of(mask, size, mask_is)
    images = image_pair(size, layouts=f"{layout}/{layout}")
    for parts, index, weight in (
        (("composite",), 0, hole),
        (("composite",), 1, valid),
        (("hole_raw",), 0, hole),
        (("hole_target",), 1, hole),
    ):
        call = stacked_images_call(EMULATED, parts=parts, mask_is=mask_is)
        upstream = with_specials(torch.ones(size), weight == 0)
        _, (gradient,), _ = evaluate(call, (*images, mask), (index,), [upstream])
        assert torch.equal(gradient, weight)


@covering(size=((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)), layout=BOTH, scale=(None, 0.7))
def test_empty(size: tuple[int, ...], layout: str, scale: float | None) -> None:
    check(*image_pair(size, layouts=f"{layout}/{layout}"), make_mask("n1hw", size), scale=scale)


def test_as_many_parts_as_a_launch_takes() -> None:
    pair, mask = image_pair(SIZES["odd"]), make_mask("n1hw", SIZES["odd"])
    parts = (PARTS * MOST_ON_GPU["cuda"])[: MOST_ON_GPU["cuda"]]
    check_against_truth(
        stacked_images_call(EMULATED, parts=parts),
        partial(stacked_images_formula, parts=parts),
        [*pair, mask],
        # Sums of so many terms lose accuracy with the largest partial sum.
        magnitudes={0: torch.tensor(float(MOST_ON_GPU["cuda"])), 1: torch.tensor(float(MOST_ON_GPU["cuda"]))},
    )
    with pytest.raises(RuntimeError, match="at most 64 parts"):
        ik.stacked_images(*pair, mask, parts=[*parts, "raw"], backend="cuda")


def test_more_constants_than_a_launch_takes() -> None:
    size = (1, MOST_ON_GPU["cuda"] + 1, 2, 3)
    with pytest.raises(RuntimeError, match="at most 64 parts, and scale and shift"):
        check(*image_pair(size), make_mask("n1hw", size), **by_channel(size[1]))
    # One for all channels is one.
    check(*image_pair(size), make_mask("n1hw", size), scale=0.7, shift=12.0)


@pytest.mark.parametrize(
    ("parts", "scale", "shape", "message"),
    [
        ([5], [], (2, 3, 4, 5), "parts: unknown"),
        ([-1], [], (2, 3, 4, 5), "parts: unknown"),
        ([0] * 65, [], (2, 3, 4, 5), "parts: .* at most 64"),
        ([0], [1.0] * 65, (2, 1, 4, 5), "at most 64 channels"),
        ([0], [1.0] * 4, (2, 3, 4, 5), "several channels"),
        ([1], [], (2, 3, 4, 5), "needs a mask"),
    ],
)
def test_operator_checks_what_would_crash(
    parts: list[int], scale: list[float], shape: tuple[int, ...], message: str
) -> None:
    image = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.inpaint_kernels.stacked_images_cuda(image, image, None, parts, scale, [], False, False)


def test_operator_checks_the_gradient() -> None:
    backward = torch.ops.inpaint_kernels.stacked_images_backward_cuda
    half, single = torch.float16, torch.float32
    for grad in (torch.zeros(2, 3, 4, 5), torch.zeros(4, 3, 4, 5, dtype=half)):
        with pytest.raises(RuntimeError, match="grad: expected"):
            backward(grad, None, (2, 3, 4, 5), False, single, single, [0, 2], [], False, False, True, True)


@given(
    case=region_cases(),
    parts=st.lists(st.sampled_from(PARTS), min_size=1, max_size=6),
    constants=st.sampled_from(({}, {"scale": 0.7, "shift": 12.0})),
    swap=st.booleans(),
    mask_is=st.sampled_from(MASK_IS),
)
def test_any_input(
    case: dict[str, Any], parts: list[str], constants: dict[str, Any], swap: bool, mask_is: str
) -> None:
    check(**case, parts=parts, swap_channels=swap, mask_is=mask_is, **constants)


def test_deterministic() -> None:
    inputs = [*image_pair(SIZES["tiles"], "bf16/f32"), make_mask("n1hw", SIZES["tiles"])]
    call = stacked_images_call(EMULATED, parts=PARTS)
    first, second = evaluate(call, inputs, (0, 1)), evaluate(call, inputs, (0, 1))
    assert all(map(same_bits, (*first[0], *first[1]), (*second[0], *second[1])))
