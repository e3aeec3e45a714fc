"""The CUDA kernels of the pixel losses, run on the CPU: what proves their index logic without a GPU."""

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
from pixel_cases import (
    MASK_DTYPES,
    MASK_SHAPES,
    MODES,
    NORMALIZATIONS,
    PENALTIES,
    hole_valid_call,
    hole_valid_formula,
    image_cases,
    image_pair,
    make_mask,
    masked_call,
    masked_formula,
    with_specials,
)
from torch import Tensor

pytestmark = pytest.mark.skipif(INTERPRETING, reason="has nothing to do with Triton")

EMULATED = Backend("cuda", "cpu")
BOTH = ("contiguous", "channels_last")

# A thread does 2 vectors of 4 or 8 elements in 2 segments, or in 2 stretches of the only segment; a block has
# 128 threads.
SIZES = {
    "1x1": (1, 1, 1, 1),
    "odd": (2, 3, 9, 13),  # planes of 117: rows of 16 threads, elements one by one
    "halves": (2, 3, 6, 10),  # planes of 60: vectors of 4 but not of 8, a sign group cut in the middle
    "vectors": (2, 3, 16, 32),  # planes of 512: whole vectors, less than a block
    "tiles": (1, 2, 48, 56),  # planes of 2688: several tiles a plane, the last one partial
    "gray": (2, 1, 40, 60),  # one segment a sample also in NCHW
    "c17": (2, 17, 4, 6),  # more channels than rows of threads
    "c70": (1, 70, 12, 12),  # several tiles across the channels
}
LARGE = {
    "rounds": (264, 3, 23, 24),  # enough tiles that a block goes over the channels twice
    "samples": (1100, 1, 1, 3),  # more samples than threads in the last stage
    "wide": (1, 1, 300, 300),  # more than 32 tiles a sample: the last stage adds across warps
}


@pytest.fixture(autouse=True, scope="module")
def emulation() -> Iterator[None]:
    with cuda_emulation.install():
        yield


def check_masked(
    pred: Tensor, target: Tensor, mask: Tensor | None, penalty: str = "l1", mode: str = "mask"
) -> None:
    check_against_truth(
        masked_call(EMULATED, penalty=penalty, mode=mode),
        partial(masked_formula, penalty=penalty, mode=mode),
        [pred, target, mask],
    )


def check_hole_valid(
    pred: Tensor, target: Tensor, mask: Tensor, penalty: str = "l1", **settings: str
) -> None:
    settings = {"normalize": "mask", **settings}
    check_against_truth(
        hole_valid_call(EMULATED, penalty=penalty, **settings),
        partial(hole_valid_formula, penalty=penalty, **settings),
        [pred, target, mask],
    )


@covering(size=SIZES, layout=BOTH, dtype=("f32", "bf16"))
def test_sizes(size: str, layout: str, dtype: str) -> None:
    pair = image_pair(SIZES[size], f"{dtype}/{dtype}", f"{layout}/{layout}")
    for kind in ("n1hw", "nomask", "nchw"):
        mask = make_mask(kind, SIZES[size])
        for penalty, mode in (("l1", "sample"), ("charbonnier", "mask"), ("l1", "none")):
            if penalty == "l1" or kind == "n1hw":
                check_masked(*pair, mask, penalty, mode)
        if mask is not None:
            check_hole_valid(*pair, mask)
            check_hole_valid(*pair, mask, "charbonnier", mask_is="hole")


@covering(size=LARGE, dtype=("f32", "bf16"))
def test_large_sizes(size: str, dtype: str) -> None:
    pair = image_pair(LARGE[size], f"{dtype}/{dtype}")
    mask = make_mask("n1hw", LARGE[size])
    check_masked(*pair, mask, "l1", "mask")
    check_hole_valid(*pair, mask, "l1", normalize="sample")


@covering(penalty=PENALTIES, mode=MODES, layout=BOTH)
def test_penalties(penalty: str, mode: str, layout: str) -> None:
    size = SIZES["odd"]
    check_masked(*image_pair(size, layouts=f"{layout}/{layout}"), make_mask("n1hw", size), penalty, mode)


@covering(penalty=PENALTIES, normalize=NORMALIZATIONS, mask_is=("hole", "valid"))
def test_regions(penalty: str, normalize: str, mask_is: str) -> None:
    size = SIZES["vectors"]
    check_hole_valid(
        *image_pair(size), make_mask("n1hw", size), penalty, normalize=normalize, mask_is=mask_is
    )


@covering(pred=("f32", "f16", "bf16"), target=("f32", "f16", "bf16"), size=("halves", "vectors"))
def test_dtypes(pred: str, target: str, size: str) -> None:
    pair, mask = image_pair(SIZES[size], f"{pred}/{target}"), make_mask("n1hw", SIZES[size])
    for penalty in ("l1", "l2"):
        check_masked(*pair, mask, penalty, "sample")
        check_masked(*pair, mask, penalty, "none")
        check_hole_valid(*pair, mask, penalty)


@covering(dtype=MASK_DTYPES, kind=("n1hw", "nchw", "hw"), layout=BOTH, images=("f32", "f16"))
def test_mask_dtypes(dtype: str, kind: str, layout: str, images: str) -> None:
    for size in (SIZES["odd"], SIZES["vectors"]):
        pair, mask = (
            image_pair(size, f"{images}/{images}", f"{layout}/{layout}"),
            make_mask(kind, size, dtype),
        )
        check_masked(*pair, mask)
        check_hole_valid(*pair, mask)


def test_bool_from_bytes() -> None:
    """A bool tensor may hold any byte; all but 0 are true."""
    size = SIZES["vectors"]
    pred, target = image_pair(size)
    mask = make_mask("n1hw", size, "u8", "binary")
    other = (mask * 255).view(torch.bool)
    for layout in BOTH:
        call = masked_call(EMULATED, penalty="l1", mode="mask")
        images = [laid_out(x, layout) for x in (pred, target)]
        assert same_bits(call(*images, mask), call(*images, other))


@covering(mask=MASK_SHAPES, layout=BOTH, mask_layout=LAYOUTS)
def test_mask_shapes(mask: str, layout: str, mask_layout: str) -> None:
    size = (2, 3, 8, 12)
    weights = make_mask(mask, size)
    weights = weights if weights is None else laid_out(weights, mask_layout)
    check_masked(*image_pair(size, layouts=f"{layout}/{layout}"), weights)


@covering(mask_dtype=("f32", "u8"), images=("f32", "bf16"), kind=("n1hw", "nchw"))
def test_odd_strides(mask_dtype: str, images: str, kind: str) -> None:
    """Dense planes of whole vectors that start at odd addresses: those of a mask and of a map's gradient."""
    size = SIZES["vectors"]
    mask = make_mask(kind, size, mask_dtype)
    n, c, h, w = mask.shape
    strides = (c * (h * w + 1) + 1, h * w + 1, w, 1)
    view = mask.new_full([n * strides[0]], 7).as_strided(mask.shape, strides)
    view.copy_(mask)
    check_masked(*image_pair(size, f"{images}/{images}"), view)
    check_masked(*image_pair(size, f"{images}/{images}"), view, "l2", "none")


@covering(pred=LAYOUTS, target=LAYOUTS, dtype=("f32", "f16"))
def test_layouts(pred: str, target: str, dtype: str) -> None:
    size = (2, 3, 8, 12)
    pair = image_pair(size, f"{dtype}/{dtype}", f"{pred}/{target}")
    for penalty in ("l1", "l2"):
        check_masked(*pair, make_mask("n1hw", size), penalty, "none")


def spread(values: Tensor, how: str) -> Tensor:
    """A scalar of the map whose gradient has other strides than the map."""
    if how == "expanded":
        return values.sum()
    if how == "by_sample":
        return (values.mean(dim=(1, 2, 3)) * torch.arange(1.0, 1 + values.shape[0])).sum()
    if how == "by_channel":
        return (values.mean(dim=(0, 2, 3)) * torch.arange(1.0, 1 + values.shape[1])).sum()
    if how == "by_column":
        return (values.mean(dim=(0, 1, 2)) * torch.arange(1.0, 1 + values.shape[3])).sum()
    coefficients = torch.arange(1.0, 1 + values.numel()).reshape(values.shape)
    return (values * laid_out(coefficients, how)).sum()


@covering(
    how=("expanded", "by_sample", "by_channel", "by_column", *LAYOUTS),
    layout=BOTH,
    size=("odd", "vectors", "c17"),
)
def test_map_gradients(how: str, layout: str, size: str) -> None:
    pair = image_pair(SIZES[size], layouts=f"{layout}/{layout}")
    for penalty in ("l1", "huber"):
        call = masked_call(EMULATED, penalty=penalty, mode="none")
        check_against_truth(
            lambda *x, call=call: spread(call(*x), how),
            lambda *x, penalty=penalty: spread(masked_formula(*x, penalty=penalty, mode="none"), how),
            [*pair, make_mask("n1hw", SIZES[size])],
        )


@covering(penalty=PENALTIES, layout=BOTH, size=("odd", "vectors"))
def test_specials(penalty: str, layout: str, size: str) -> None:
    """NaN and Inf where nothing is counted change no bit; where they are counted they show."""
    mask = make_mask("n1hw", SIZES[size], values="binary")
    pred, target = image_pair(SIZES[size], layouts=f"{layout}/{layout}")
    for mode in MODES:
        call = masked_call(EMULATED, penalty=penalty, mode=mode)
        clean = evaluate(call, (pred, target, mask), (0, 1))
        dirty = laid_out(with_specials(pred, mask == 0), layout)
        outputs, gradients, _ = evaluate(call, (dirty, target, mask), (0, 1), clean[2])
        assert all(map(same_bits, (*outputs, *gradients), (*clean[0], *clean[1])))
        # Plain autograd turns the bounded slope of huber at Inf into 0 * Inf.
        marked = (
            torch.where(mask != 0, torch.nan, pred) if penalty == "huber" else with_specials(pred, mask != 0)
        )
        check_masked(laid_out(marked, layout), target, mask, penalty, mode)


@covering(size=SIZES, layout=BOTH)
def test_signs_are_all_written(size: str, layout: str) -> None:
    """Also the bytes that channels_last does not need: an op must not return what the memory held before."""
    pred, target = image_pair(SIZES[size], layouts=f"{layout}/{layout}")
    ops = torch.ops.inpaint_kernels

    def signs() -> tuple[Tensor, ...]:
        with poisoned_allocations():
            masked = ops.masked_l1_cuda(pred, target, None, "l1", 0.0, "none", "mask", True)[2]
            return masked, ops.hole_valid_cuda(pred, target, pred, "l1", 0.0, "mask", False, True)[3]

    first = signs()
    junk = [torch.full_like(s, 255) for s in first for _ in range(20)]
    del junk
    assert all(map(same_bits, first, signs()))
    n, c, h, w = SIZES[size]
    length, segments = (
        (h * w * c, n) if layout == "channels_last" and not pred.is_contiguous() else (h * w, n * c)
    )
    d = (pred - target).permute(0, 2, 3, 1) if segments == n else pred - target
    d = torch.nn.functional.pad(d.reshape(segments, length), (0, -length % 8))
    bits = torch.stack([d > 0, d < 0], 1).view(segments, 2, -1, 8).transpose(1, 2).to(torch.int32)
    words = (bits << torch.arange(8, dtype=torch.int32)).sum(-1).to(torch.uint8).flatten()
    for s in first:
        assert torch.equal(s[: words.numel()], words)
        assert not s[words.numel() :].any()


@covering(region=("hole", "valid"), penalty=("l1", "l2"))
def test_one_region_alone(region: str, penalty: str) -> None:
    """The other region gets no gradient, not a zero that NaN could spoil."""
    size = SIZES["vectors"]
    mask = make_mask("n1hw", size, values="binary")
    pred, target = image_pair(size)
    other = mask != 0 if region == "hole" else mask == 0
    pred = with_specials(pred, other)

    def call(function: Any, *x: Tensor) -> Tensor:
        return function(*x)[0 if region == "hole" else 1]

    settings: dict[str, Any] = {"penalty": penalty, "normalize": "image"}
    check_against_truth(
        partial(call, hole_valid_call(EMULATED, **settings)),
        partial(call, partial(hole_valid_formula, **settings)),
        [pred, target, mask],
    )


@covering(size=((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5)), mode=MODES, layout=BOTH)
def test_empty(size: tuple[int, ...], mode: str, layout: str) -> None:
    pair = image_pair(size, layouts=f"{layout}/{layout}")
    check_masked(*pair, make_mask("n1hw", size), "l1", mode)
    if mode in NORMALIZATIONS:
        check_hole_valid(*pair, make_mask("n1hw", size), normalize=mode)


@covering(values=("zeros", "ones"), mode=MODES, dtype=DTYPES)
def test_whole_and_empty_masks(values: str, mode: str, dtype: str) -> None:
    size = SIZES["odd"]
    mask = make_mask("n1hw", size, dtype, values)
    check_masked(*image_pair(size), mask, "l1", mode)
    if mode in NORMALIZATIONS:
        check_hole_valid(*image_pair(size), mask, normalize=mode)


@given(case=image_cases(), penalty=st.sampled_from(PENALTIES), mode=st.sampled_from(list(MODES)))
def test_any_masked(case: dict[str, Any], penalty: str, mode: str) -> None:
    check_masked(**case, penalty=penalty, mode=mode)


@given(
    case=image_cases(masks=[m for m in MASK_SHAPES if m != "nomask"]),
    penalty=st.sampled_from(PENALTIES),
    normalize=st.sampled_from(NORMALIZATIONS),
)
def test_any_hole_valid(case: dict[str, Any], penalty: str, normalize: str) -> None:
    check_hole_valid(**case, penalty=penalty, normalize=normalize)
