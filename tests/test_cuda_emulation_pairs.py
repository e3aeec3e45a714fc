"""The CUDA kernels of total_variation and inpainting_pixel, run on the CPU: strips, chunks, borders, signs, sums."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import cuda_emulation
import pytest
import torch
from harness import (
    INTERPRETING,
    LAYOUTS,
    Backend,
    check_against_truth,
    covering,
    evaluate,
    gradient_of,
    laid_out,
    poisoned_allocations,
    same_bits,
)
from hypothesis import given
from hypothesis import strategies as st
from pairs_cases import (
    MASK_IS,
    MODES,
    PENALTIES,
    REGIONS,
    SHAPES,
    inpainting_pixel_call,
    inpainting_pixel_formula,
    region_cases,
    region_mask,
    tied_pair,
    total_variation_call,
    total_variation_formula,
)
from pixel_cases import MASK_DTYPES, NORMALIZATIONS, image_pair, with_specials
from torch import Tensor

pytestmark = pytest.mark.skipif(INTERPRETING, reason="has nothing to do with Triton")

EMULATED = Backend("cuda", "cpu")
BOTH = ("contiguous", "channels_last")

# A strip is 8, 16 or 32 threads of 4 pixels, a chunk 4 to 32 rows, a word of signs 4 x 4 pixels. A thread has 3
# channels where C is 3 or more than 4, else 1.
SIZES = {
    "1x1": (1, 1, 1, 1),  # no pair at all
    "row": (3, 1, 1, 29),  # pairs across only
    "column": (2, 3, 33, 1),  # pairs down only, several chunks
    "odd": (2, 3, 9, 13),  # no row aligned: pixels one by one, words of signs cut in both directions
    "vectors": (2, 3, 8, 16),  # whole quads
    "halves": (2, 2, 6, 36),  # more quads than threads in the narrowest strip: 9 in two of 8
    "strips": (1, 3, 5, 132),  # 33 quads
    "wide": (1, 1, 3, 260),  # 65 quads
    "rgba": (1, 4, 6, 20),  # not a multiple of the channels a thread has
    "c5": (1, 5, 7, 12),  # a group of 3 channels and one of 2
    "c17": (1, 17, 5, 6),
}
LARGE = {
    "chunks": (16, 3, 70, 20),  # chunks of several heights
    "samples": (1100, 1, 1, 3),  # more samples than threads in the last stage
    "blocks": (2, 3, 170, 260),  # many blocks a sample: the last stage adds across warps
}


@pytest.fixture(autouse=True, scope="module")
def emulation() -> Iterator[None]:
    with cuda_emulation.install():
        yield


def check_total_variation(
    image: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    mode: str,
    penalty: str = "l1",
    mask_is: str = "valid",
) -> None:
    settings = {"mode": mode, "penalty": penalty, "mask_is": mask_is}
    # The gradient of a pixel is a sum of both signs.
    check_against_truth(
        total_variation_call(EMULATED, **settings),
        partial(total_variation_formula, **settings),
        [image, target, mask],
        wanted=(0,) if target is None else (0, 1),
        magnitudes={0: None, 1: None},
    )


def check_inpainting_pixel(
    pred: Tensor, target: Tensor, mask: Tensor, mode: str, normalize: str = "image", mask_is: str = "valid"
) -> None:
    settings = {"mode": mode, "normalize": normalize, "mask_is": mask_is}
    check_against_truth(
        inpainting_pixel_call(EMULATED, **settings),
        partial(inpainting_pixel_formula, **settings),
        [pred, target, mask],
        magnitudes={0: None, 1: None},
    )


@covering(size=SIZES, layout=BOTH, region=REGIONS)
def test_sizes(size: str, layout: str, region: str) -> None:
    pair = image_pair(SIZES[size], layouts=f"{layout}/{layout}")
    mask = region_mask("n1hw", SIZES[size])
    mode = f"{region}-default"
    check_inpainting_pixel(*pair, mask, mode)
    for penalty in PENALTIES:
        check_total_variation(*pair, mask, mode, penalty)
        check_total_variation(pair[0], None, None if region == "image" else mask, mode, penalty)


@covering(size=LARGE, dtype=("f32", "bf16"))
def test_large_sizes(size: str, dtype: str) -> None:
    pair = image_pair(LARGE[size], f"{dtype}/{dtype}")
    mask = region_mask("n1hw", LARGE[size])
    check_inpainting_pixel(*pair, mask, "dilated_hole-default", "sample")
    check_total_variation(*pair, mask, "hole-mask", "l2")


@covering(mode=MODES, mask_is=MASK_IS)
def test_modes(mode: str, mask_is: str) -> None:
    size = SIZES["odd"]
    pair, mask = image_pair(size), region_mask("n1hw", size)
    for normalize in NORMALIZATIONS:
        check_inpainting_pixel(*pair, mask, mode, normalize, mask_is)
    for penalty in PENALTIES:
        check_total_variation(*pair, mask, mode, penalty, mask_is)


@covering(pred=("f32", "f16", "bf16"), target=("f32", "f16", "bf16"), size=("odd", "vectors"), layout=BOTH)
def test_dtypes(pred: str, target: str, size: str, layout: str) -> None:
    pair = image_pair(SIZES[size], f"{pred}/{target}", f"{layout}/{layout}")
    mask = region_mask("n1hw", SIZES[size])
    check_inpainting_pixel(*pair, mask, "dilated_hole-default")
    check_total_variation(*pair, mask, "hole-default", "l2")


@covering(dtype=MASK_DTYPES, kind=("n1hw", "nchw", "hw"), layout=BOTH)
def test_mask_dtypes(dtype: str, kind: str, layout: str) -> None:
    for size in (SIZES["odd"], SIZES["vectors"]):
        pair, mask = image_pair(size, layouts=f"{layout}/{layout}"), region_mask(kind, size, dtype)
        check_inpainting_pixel(*pair, mask, "dilated_hole-mask", "mask")


@covering(mask=SHAPES, layout=BOTH)
def test_mask_shapes(mask: str, layout: str) -> None:
    size = (2, 3, 8, 12)
    pair = image_pair(size, layouts=f"{layout}/{layout}")
    for mask_layout in LAYOUTS:
        check_inpainting_pixel(*pair, laid_out(region_mask(mask, size), mask_layout), "dilated_hole-mask")


@covering(pred=LAYOUTS, target=LAYOUTS)
def test_layouts(pred: str, target: str) -> None:
    size = (2, 3, 8, 12)
    pair = image_pair(size, "f32/f16", f"{pred}/{target}")
    check_inpainting_pixel(*pair, region_mask("n1hw", size), "dilated_hole-default")


def test_bool_of_any_byte() -> None:
    """A bool tensor may hold any byte, all but 0 are true."""
    size = SIZES["vectors"]
    pred, target = image_pair(size)
    mask = region_mask("n1hw", size, "u8", "binary")
    bytes_255 = mask * 255
    for layout in BOTH:
        call = inpainting_pixel_call(EMULATED, mode="dilated_hole-default", normalize="image")
        images = [laid_out(x, layout) for x in (pred, target)]
        truth = call(*images, mask)
        assert all(map(same_bits, truth, call(*images, bytes_255.view(torch.bool))))


@covering(size=SIZES, layout=BOTH, mask_is=MASK_IS)
def test_ties(size: str, layout: str, mask_is: str) -> None:
    """A third of the differences is 0, also as -0."""
    pred, target = (laid_out(x, layout) for x in tied_pair(SIZES[size]))
    pred = torch.where(pred == 0, -pred, pred)
    mask = region_mask("n1hw", SIZES[size], values="binary")
    check_inpainting_pixel(pred, target, mask, "dilated_hole-default", mask_is=mask_is)
    check_total_variation(pred, None, None, "image-default")


def test_equal_pixels_of_a_mixed_composite_are_a_tie() -> None:
    """0.3 a + 0.7 b rounds; beside a strip it must round in the same way."""
    size = (1, 3, 9, 132)
    pred, target, mask = (torch.full(s, v) for s, v in ((size, 0.1), (size, 0.7), ((1, 1, 9, 132), 0.3)))
    pred.requires_grad_()
    for penalty in PENALTIES:
        call = total_variation_call(EMULATED, mode="image-default", penalty=penalty)
        loss = call(pred, target, mask)
        assert loss.item() == 0 and not torch.autograd.grad(loss, pred)[0].any()


@covering(size=("odd", "strips", "chunks"), layout=BOTH, kind=("hole", "valid"))
def test_specials(size: str, layout: str, kind: str) -> None:
    """NaN and Inf where nothing is counted change no bit; where they are counted they show."""
    shape = {**SIZES, **LARGE}[size]
    mask = region_mask("n1hw", shape, values="binary")
    pred, target = image_pair(shape, layouts=f"{layout}/{layout}")
    # pred is not part of the composite where the mask is 1, nor of the hole term, the only one asked for here.
    dirty = laid_out(with_specials(pred, mask == 1), layout)
    for penalty in PENALTIES:
        call = total_variation_call(EMULATED, mode="dilated_hole-default", penalty=penalty)
        clean = evaluate(call, (pred, target, mask), (0, 1))
        found = evaluate(call, (dirty, target, mask), (0, 1), clean[2])
        assert all(map(same_bits, (*found[0], *found[1]), (*clean[0], *clean[1])))
        # An image of its own: where the region is 0.
        alone = total_variation_call(EMULATED, mode="hole-default", penalty=penalty)
        clean = evaluate(alone, (pred, None, mask), (0,))
        found = evaluate(alone, (dirty, None, mask), (0,), clean[2])
        assert all(map(same_bits, (*found[0], *found[1]), (*clean[0], *clean[1])))
    term = 1 if kind == "hole" else 2
    call = inpainting_pixel_call(EMULATED, mode="dilated_hole-default", normalize="image")
    dirty = laid_out(with_specials(pred, mask == (1 if kind == "hole" else 0)), layout)
    clean = evaluate(lambda *x: call(*x)[term], (pred, target, mask), ())
    found = evaluate(lambda *x: call(*x)[term], (dirty, target, mask), ())
    assert same_bits(found[0][0], clean[0][0])
    check_inpainting_pixel(
        laid_out(with_specials(pred, mask != 0), layout), target, mask, "dilated_hole-default"
    )


def unpacked_signs(signs: Tensor, size: tuple[int, ...]) -> Tensor:
    """(3, N, C, H, W) of +1, 0, -1 from what `ops/_pairs.py` says of the `cuda` signs of inpainting_pixel."""
    n, c, h, w = size
    rows, columns = (h + 3) // 4, (w + 3) // 4
    fields = signs.view(n, c, rows, 3, columns, 4, 1) >> torch.arange(0, 8, 2, dtype=torch.uint8)
    images = (fields & 3).permute(3, 0, 1, 2, 5, 4, 6).reshape(3, n, c, 4 * rows, 4 * columns)
    return images[..., :h, :w].float() - 1


@covering(size=SIZES, layout=BOTH)
def test_signs_are_all_written(size: str, layout: str) -> None:
    """And are those of the differences."""
    n, c, h, w = SIZES[size]
    pred, target = image_pair(SIZES[size], layouts=f"{layout}/{layout}")
    mask = region_mask("n1hw", SIZES[size], values="binary")
    op = torch.ops.inpaint_kernels.inpainting_pixel_cuda
    for is_hole in (False, True):

        def signs(is_hole: bool = is_hole) -> Tensor:
            weights = (1.0, 1.0, 1.0, "image", "image", "image", is_hole, True)
            with poisoned_allocations():
                return op(pred, target, mask, *weights)[6]

        first = signs()
        junk = [torch.full_like(first, 255) for _ in range(20)]
        del junk
        assert same_bits(first, signs())
        across, down, pixel = unpacked_signs(first, SIZES[size])
        image = torch.where((mask == 1) == is_hole, pred, target)
        assert torch.equal(pixel, (pred - target).sign())
        assert torch.equal(across[..., :-1], image.diff(dim=3).sign()) and not across[..., -1].any()
        assert torch.equal(down[..., :-1, :], image.diff(dim=2).sign()) and not down[..., -1, :].any()
        # No field but the three, and no sign beyond the image.
        whole = (n, c, (h + 3) // 4 * 4, (w + 3) // 4 * 4)
        for unpacked in unpacked_signs(first, whole):
            assert unpacked.abs().max() <= 1
            assert not unpacked[..., h:, :].any() and not unpacked[..., w:].any()


@covering(mode=("dilated_hole-default", "image-default"), layout=BOTH)
def test_second_derivatives(mode: str, layout: str) -> None:
    size = SIZES["odd"]
    pair, mask = image_pair(size, layouts=f"{layout}/{layout}"), region_mask("n1hw", size)
    for penalty in PENALTIES:
        settings = {"mode": mode, "penalty": penalty}
        check_against_truth(
            gradient_of(total_variation_call(EMULATED, **settings)),
            gradient_of(partial(total_variation_formula, **settings)),
            [*pair, mask, torch.tensor(0.7)],
            wanted=(0, 1, 3),
            magnitudes={0: None, 1: None, 3: None},
            output_magnitudes={0: None, 1: None},
        )


@covering(
    size=((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 5, 0)),
    layout=BOTH,
    mode=("image-pairs", "hole-mask"),
)
def test_empty(size: tuple[int, int, int, int], layout: str, mode: str) -> None:
    pair = image_pair(size, layouts=f"{layout}/{layout}")
    mask = torch.ones(size[0], 1, *size[2:])
    check_inpainting_pixel(*pair, mask, mode, "sample")
    check_total_variation(*pair, mask, mode)


@covering(values=("zeros", "ones"), mask_is=MASK_IS, mode=("dilated_hole-mask", "first_pixel-pairs"))
def test_whole_and_empty_masks(values: str, mask_is: str, mode: str) -> None:
    size = SIZES["odd"]
    mask = region_mask("n1hw", size, values=values)
    for normalize in NORMALIZATIONS:
        check_inpainting_pixel(*image_pair(size), mask, mode, normalize, mask_is)


@covering(term=range(4), needs=((True, False), (False, True)))
def test_one_gradient_alone(term: int, needs: tuple[bool, bool]) -> None:
    size = SIZES["odd"]
    settings = {"mode": "dilated_hole-default", "normalize": "sample"}
    check_against_truth(
        lambda *x: inpainting_pixel_call(EMULATED, **settings)(*x)[term],
        lambda *x: inpainting_pixel_formula(*x, **settings)[term],
        [*image_pair(size), region_mask("n1hw", size)],
        wanted=[i for i in (0, 1) if needs[i]],
        magnitudes={0: None, 1: None},
    )


@given(case=region_cases(), mode=st.sampled_from(list(MODES)), penalty=st.sampled_from(PENALTIES))
def test_any_total_variation(case: dict[str, Tensor], mode: str, penalty: str) -> None:
    check_total_variation(case["pred"], case["target"], case["mask"], mode, penalty)


@given(
    case=region_cases(),
    mode=st.sampled_from(list(MODES)),
    normalize=st.sampled_from(NORMALIZATIONS),
    mask_is=st.sampled_from(MASK_IS),
)
def test_any_inpainting_pixel(case: dict[str, Tensor], mode: str, normalize: str, mask_is: str) -> None:
    check_inpainting_pixel(case["pred"], case["target"], case["mask"], mode, normalize, mask_is)
