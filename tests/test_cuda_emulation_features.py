"""The CUDA kernels of gram, style and feature_distance, run on the CPU: fragments, pipelines and sums of the source.

Tensor-core instructions follow the PTX manual and cut sums off as hardware may; asynchronous copies arrive as late
as allowed. Speed, races within a stage and the device's own rounding are for a GPU to show.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import cuda_emulation
import pytest
import torch
from feature_cases import (
    STYLES,
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
    INTERPRETING,
    LAYOUTS,
    Backend,
    covering,
    evaluate,
    laid_out,
    poisoned_allocations,
    same_bits,
)
from pixel_cases import make_mask

from inpaint_kernels.ops.gram import gram_matrix
from inpaint_kernels.ops.style import style_loss

pytestmark = pytest.mark.skipif(INTERPRETING, reason="has nothing to do with Triton")

EMULATED = Backend("cuda", "cpu")
BOTH = ("contiguous", "channels_last")
HALF_AND_FULL = ("f32", "f16", "bf16")

# Tiles are 64 channels; a stage is 64 bytes along the pixels, a part at least 512 pixels, a product 128 pixels wide.
SIZES = {
    "1x1": (2, 1, 1, 1),
    "odd": (2, 9, 5, 7),  # no row aligned: elements one by one
    "tile": (1, 64, 8, 16),  # whole tiles, one wide copy each
    "two_tiles": (1, 72, 9, 16),  # off-diagonal tile, the last one partial, two tiles of pixels
    "three_tiles": (1, 136, 4, 8),
    "parts": (1, 8, 32, 34),  # more pixels than a part, the last part and the last stage short
}


@pytest.fixture(autouse=True, scope="module")
def emulation() -> Iterator[None]:
    with cuda_emulation.install():
        yield


def check_gram(x: torch.Tensor, normalize: str = "chw") -> None:
    check(
        gram_call(EMULATED, normalize),
        partial(gram_formula, normalize=normalize),
        [x],
        wanted=(0,),
        sizes=partial(gram_sizes, normalize=normalize),
    )


@covering(size=SIZES, layout=BOTH, dtype=HALF_AND_FULL)
def test_gram_sizes(size: str, layout: str, dtype: str) -> None:
    check_gram(feature_map(SIZES[size], dtype, layout, signed=size != "parts"))


@covering(layout=LAYOUTS, dtype=HALF_AND_FULL)
def test_gram_layouts(layout: str, dtype: str) -> None:
    check_gram(feature_map((2, 20, 6, 8), dtype, layout), "hw")


@covering(dtype=HALF_AND_FULL)
def test_cancelling_gradients(dtype: str) -> None:
    """Elements of d / d X far below their terms show how many bits of the factor count."""
    for seed in range(12):
        check_gram(feature_map((2, 24, 6, 11), dtype, seed=seed))


@covering(style=STYLES, kind=("1-contiguous", "2-channels_last"), dtypes=("f32/f32", "bf16/bf16", "f16/f32"))
def test_style(style: str, kind: str, dtypes: str) -> None:
    """Predictions and the layout of the input change together: they meet in no kernel."""
    predictions, layout = int(kind[0]), kind[2:]
    pairs = [
        style_pair(size, predictions=predictions, dtypes=dtypes, layouts=f"{layout}/contiguous")
        for size in ((2, 9, 5, 6), (2, 70, 4, 4))
    ]
    flat = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    check_style(EMULATED, flat, style_settings(style, weights=[1.0, 0.3]))


@covering(style=("chw-l1", "hw-l2"))
def test_style_of_given_matrices(style: str) -> None:
    """They need not be symmetric."""
    x, y = style_pair((2, 70, 4, 6), predictions=2)
    goal = gram_formula(y, STYLES[style][0])
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


@covering(
    penalty=("l1", "l2", "charbonnier"), predictions=(1, 2, 3), mask=("none", "1", "n", "kn", "nc", "knc")
)
def test_feature_distance(penalty: str, predictions: int, mask: str) -> None:
    """Layers of three dtypes and both layouts; the mask shared by all, by the predictions, or by nobody."""
    sizes = ((2, 16, 12, 12), (2, 3, 9, 13), (1, 70, 4, 6))
    layouts = ("contiguous", "channels_last", "contiguous")
    pairs = [
        distance_pair(s, predictions=predictions, dtypes=f"{d}/{d}", layouts=f"{layout}/contiguous")
        for s, d, layout in zip(sizes, HALF_AND_FULL, layouts, strict=True)
    ]
    flat = [pair[0] for pair in pairs] + [pair[1] for pair in pairs]
    if mask != "none":
        batch = {"1": 0, "n": 1, "k": predictions}[mask[0]]
        for n, c, h, w in sizes:
            weights = make_mask("nchw", (max(batch * n, 1), c if mask.endswith("c") else 1, h, w))
            assert weights is not None
            flat.append(weights)
    check_distance(EMULATED, flat, len(sizes), distance_settings(penalty, weights=[1.0, 0.5, 2.0]))


@covering(dtypes=("f32/f16", "bf16/f32", "f16/bf16"), penalty=("l1", "l2"), predictions=(1, 2))
def test_mixed_dtypes(dtypes: str, penalty: str, predictions: int) -> None:
    x, y = distance_pair((2, 5, 6, 8), predictions=predictions, dtypes=dtypes)
    for wanted in ((0, 1), (0,), (1,)):
        check_distance(EMULATED, [x, y], 1, distance_settings(penalty), wanted)


@covering(layout=LAYOUTS, target_layout=LAYOUTS, dtype=("f32", "f16"))
def test_feature_distance_layouts(layout: str, target_layout: str, dtype: str) -> None:
    pair = distance_pair(
        (2, 3, 4, 8), predictions=2, dtypes=f"{dtype}/{dtype}", layouts=f"{layout}/{target_layout}"
    )
    for penalty in ("l1", "l2"):
        check_distance(EMULATED, pair, 1, distance_settings(penalty))


@covering(size=SIZES, layout=BOTH)
def test_signs_are_all_written(size: str, layout: str) -> None:
    """Also the bytes that channels_last does not need: an op must not return what the memory held before."""
    n, c = SIZES[size][:2]
    x, y = distance_pair(SIZES[size], predictions=2, layouts=f"{layout}/{layout}")
    with poisoned_allocations():
        signs = torch.ops.inpaint_kernels.feature_distance_cuda([x], [y], [], [1.0], "l1", 0.0, "mask", True)[
            2
        ][0]
    d = x - y.repeat(2, 1, 1, 1)
    whole = layout == "channels_last" and not x.is_contiguous()
    d = d.permute(0, 2, 3, 1).reshape(2 * n, -1) if whole else d.reshape(2 * n * c, -1)
    d = torch.nn.functional.pad(d, (0, -d.shape[1] % 8)).view(-1, 1, 8)
    bits = torch.cat([d > 0, d < 0], 1).to(torch.int32) << torch.arange(8, dtype=torch.int32)
    words = bits.sum(-1).to(torch.uint8).flatten()
    assert torch.equal(signs[: words.numel()], words)
    assert not signs[words.numel() :].any()


@covering(size=((0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)))
def test_empty(size: tuple[int, int, int, int]) -> None:
    x = torch.rand(size)
    check_gram(x)
    check_style(EMULATED, [x, x.clone()], style_settings("chw-l1"))
    check_distance(EMULATED, [x, x.clone()], 1, distance_settings())
