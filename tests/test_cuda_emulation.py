"""The CUDA kernels on the CPU: sizes and numbers at which a launch changes, which only those kernels have.

What any backend has to do, the tests of the ops ask of the emulated one: `make test-emulated`. Tensor-core
instructions follow the PTX manual and cut sums off as hardware may; asynchronous copies arrive as late as allowed.
Speed, races and the device's own rounding are for a GPU to show.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cuda_emulation import emulation  # noqa: F401
from feature_cases import (
    check,
    check_distance,
    check_style,
    distance_pair,
    distance_settings,
    feature_map,
    gram_call,
    gram_formula,
    gram_sizes,
    style_pair,
    style_settings,
)
from harness import (
    EMULATED,
    EMULATING,
    INTERPRETING,
    check_against_truth,
    covering,
    evaluate,
    laid_out,
    same_bits,
)
from pairs_cases import (
    PENALTIES,
    inpainting_pixel_call,
    inpainting_pixel_formula,
    region_mask,
    total_variation_call,
    total_variation_formula,
)
from pixel_cases import (
    hole_valid_call,
    hole_valid_formula,
    image_pair,
    make_mask,
    masked_call,
    masked_formula,
)

from inpaint_kernels.ops.gram import gram_matrix
from inpaint_kernels.ops.style import style_loss

pytestmark = pytest.mark.skipif(INTERPRETING or EMULATING, reason="runs with the compiled backends")

BOTH = ("contiguous", "channels_last")
HALF_AND_FULL = ("f32", "f16", "bf16")


# By op: its call and its formula, of (pred, target, mask).
CALLS = {
    "masked_l1": (masked_call, masked_formula, {"penalty": "l1", "mode": "mask"}),
    "hole_valid": (hole_valid_call, hole_valid_formula, {"penalty": "l1", "normalize": "sample"}),
    "inpainting_pixel": (
        inpainting_pixel_call,
        inpainting_pixel_formula,
        {"mode": "dilated_hole-default", "normalize": "sample"},
    ),
    "total_variation": (
        total_variation_call,
        total_variation_formula,
        {"mode": "hole-mask", "penalty": "l2"},
    ),
}
LARGE = {
    "rounds": (264, 3, 23, 24),  # enough tiles that a block goes over the channels twice
    "samples": (1100, 1, 1, 3),  # more samples than threads in the last stage
    "wide": (1, 1, 300, 300),  # more than 32 tiles a sample: the last stage adds across warps
    "chunks": (16, 3, 70, 20),  # chunks of pairs of several heights
    "blocks": (2, 3, 170, 260),  # many blocks of pairs a sample: the last stage adds across warps
}


@covering(op=CALLS, size=LARGE, dtype=("f32", "bf16"))
def test_large_sizes(op: str, size: str, dtype: str) -> None:
    call, formula, options = CALLS[op]
    pair = image_pair(LARGE[size], f"{dtype}/{dtype}")
    # The gradient of a pixel among pairs is a sum of both signs.
    magnitudes = {0: None, 1: None} if op in ("inpainting_pixel", "total_variation") else None
    check_against_truth(
        call(EMULATED, **options),
        partial(formula, **options),
        [*pair, region_mask("n1hw", LARGE[size])],
        magnitudes=magnitudes,
    )


@pytest.mark.parametrize("op", CALLS)
def test_bool_from_bytes(op: str) -> None:
    """A bool tensor may hold any byte; all but 0 are true."""
    size = (2, 3, 16, 32)
    call, _, options = CALLS[op]
    mask = region_mask("n1hw", size, "u8", "binary")
    for layout in BOTH:
        images = [laid_out(x, layout) for x in image_pair(size)]
        usual, other = (
            evaluate(call(EMULATED, **options), [*images, m], (0, 1))
            for m in (mask, (mask * 255).view(torch.bool))
        )
        assert all(map(same_bits, (*usual[0], *usual[1]), (*other[0], *other[1])))


@covering(mask_dtype=("f32", "u8"), images=("f32", "bf16"), kind=("n1hw", "nchw"))
def test_odd_strides(mask_dtype: str, images: str, kind: str) -> None:
    """A mask of dense planes of whole vectors that start at odd addresses."""
    mask = make_mask(kind, (2, 3, 16, 32), mask_dtype)
    assert mask is not None
    n, c, h, w = mask.shape
    strides = (c * (h * w + 1) + 1, h * w + 1, w, 1)
    view = mask.new_full([n * strides[0]], 7).as_strided(mask.shape, strides)
    view.copy_(mask)
    for options in ({"penalty": "l1", "mode": "mask"}, {"penalty": "l2", "mode": "sum"}):
        pair = image_pair((2, 3, 16, 32), f"{images}/{images}")
        check_against_truth(
            masked_call(EMULATED, **options), partial(masked_formula, **options), [*pair, view]
        )


def test_equal_pixels_of_a_mixed_composite_are_a_tie() -> None:
    """0.3 a + 0.7 b rounds; beside a strip it must round in the same way."""
    size = (1, 3, 9, 132)
    pred, target, mask = (torch.full(s, v) for s, v in ((size, 0.1), (size, 0.7), ((1, 1, 9, 132), 0.3)))
    pred.requires_grad_()
    for penalty in PENALTIES:
        call = total_variation_call(EMULATED, mode="image-default", penalty=penalty)
        loss = call(pred, target, mask)
        assert loss.item() == 0 and not torch.autograd.grad(loss, pred)[0].any()


# ---- gram, style, feature_distance ---------------------------------------------------------------------------------


@covering(dtype=HALF_AND_FULL)
def test_cancelling_gradients(dtype: str) -> None:
    """Elements of d / d X far below their terms show how many bits of the factor count."""
    for seed in range(12):
        check(
            gram_call(EMULATED, "chw"),
            partial(gram_formula, normalize="chw"),
            [feature_map((2, 24, 6, 11), dtype, seed=seed)],
            wanted=(0,),
            sizes=partial(gram_sizes, normalize="chw"),
        )


@covering(style=("chw-l1", "hw-l2"))
def test_style_of_given_matrices(style: str) -> None:
    """They need not be symmetric."""
    x, y = style_pair((2, 70, 4, 6), predictions=2)
    goal = gram_formula(y, style.partition("-")[0])
    goal = goal * (1 + 0.1 * torch.ones(70, 70).triu(1))
    check_style(EMULATED, [x, goal], style_settings(style, target_is_gram=True), wanted=(0,))


@covering(layout=BOTH, dtype=HALF_AND_FULL)
def test_same_sample_same_bits(layout: str, dtype: str) -> None:
    """A matrix does not depend on the batch, so equal features have distance and gradient exactly 0."""
    x = feature_map((2, 66, 10, 18), dtype, layout)
    grams = gram_matrix(x, backend="cuda")
    for i in range(2):
        one = laid_out(x[i : i + 1].contiguous(), layout)
        assert same_bits(gram_matrix(one, backend="cuda"), grams[i : i + 1])
    for target, given in ((x.clone(memory_format=torch.preserve_format), False), (grams, True)):

        def call(x: torch.Tensor, target: torch.Tensor = target, given: bool = given) -> torch.Tensor:
            return style_loss(x, target, target_is_gram=given, backend="cuda")

        (loss,), (gradient,), _ = evaluate(call, [x], [0])
        assert loss == 0 and not gradient.any()


def test_many_layers() -> None:
    """More than one launch holds."""
    pairs = [style_pair((1, 3 + i, 4, 4), seed=i) for i in range(19)]
    flat = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    check_style(EMULATED, flat, style_settings("chw-l1"))
    pairs = [distance_pair((1, 3 + i, 4, 4), seed=i) for i in range(19)]
    flat = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    check_distance(EMULATED, flat, 19, distance_settings())
