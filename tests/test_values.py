"""Every op: values and gradients for all layouts, dtypes, sizes and masks there are.

What one op alone does is in its own file, and all of partial convolution.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from feature_cases import CHANNELS, PLANES
from harness import COVERING, DTYPES, INTERPRETING, LAYOUTS, Backend, evaluate, grid, laid_out, spread
from hypothesis import given
from hypothesis import strategies as st
from op_cases import IMAGE_OPS, OPS, SIZE, Op, enough, ops
from pairs_cases import SHAPES, region_cases, tied_pair
from pairs_cases import SIZES as PAIR_SIZES
from pixel_cases import GPU_SIZES, MASK_DTYPES, image_cases, on_device, skip_unsupported
from pixel_cases import SIZES as PIXEL_SIZES

FORMATS = ("contiguous", "channels_last")
# Of every op a setting for each way through its kernels: signs or images kept, each region, each denominator.
WAYS = {
    "masked_l1": ("l1 mask", "l1 none", "l2 sample", "charbonnier image", "huber sum", "huber none"),
    "hole_valid": ("l1 image valid", "l1 sample hole", "charbonnier mask valid", "huber mask hole"),
    "total_variation": (
        "l1 dilated_hole-default composite",
        "l1 first_pixel-image image",
        "l1 hole-mask image",
        "l2 hole-mask composite",
        "l2 image-default composite",
        "l2 dilated_hole-mask image",
    ),
    "inpainting_pixel": (
        "image dilated_hole-default l1",
        "mask image-default l1",
        "sample hole-mask l2",
        "image first_pixel-mask l1",
    ),
    "gradient_loss": ("ring l1", "dilated_hole l2", "hole l1", "image l1"),
    "stacked_images": ("all", "swap", "composite"),
    "composite": ("valid", "hole"),
}
FEATURE_WAYS = {
    "gram": ("chw", "none"),
    "style": ("chw-l1", "hw-l2", "gatys", "hw-l1 gram", "gatys gram", "chw-l1 once"),
    "feature_distance": ("l1 mask", "l1", "l2 mask", "charbonnier", "l1 once"),
}
ALL_WAYS = WAYS | FEATURE_WAYS
L1 = {name: ways for name, rows in WAYS.items() if (ways := [way for way in rows if "l1" in way])}


def ways(chosen: dict[str, Iterable[str]] = WAYS, **axes: Any) -> pytest.MarkDecorator:
    """As `grid`, for each op by itself: its `WAYS` are one axis; an axis may be a function of the op's name."""
    rows: list[tuple[object, ...]] = []
    for name, settings in chosen.items():
        found = [OPS[f"{name} {setting}"] for setting in settings]
        lists = [found, *(list(axis(name) if callable(axis) else axis) for axis in axes.values())]
        rows += spread(list(itertools.product(*lists)), 2 * max(map(len, lists)) if COVERING else None)
    params = [pytest.param(*row, id="-".join(map(str, row))) for row in rows]
    return pytest.mark.parametrize(("op", *axes), params)


def check(backend: Backend, op: Op, inputs: list[Any]) -> None:
    skip_unsupported(backend, *inputs[: op.free])
    op.check(op.by(backend), on_device(backend, *inputs))


def sizes(name: str) -> list[tuple[int, ...]]:
    """By the code paths of an op's kernels; three constants of `stacked_images` need one or three channels."""
    if name in FEATURE_WAYS:
        # The largest plane and the most channels each cross their limits with the other small.
        rows = itertools.product(CHANNELS, PLANES.values())
        return [(2, c, h, w) for c, (h, w) in rows if c < 64 or h * w < 9000]
    found = PIXEL_SIZES if name in ("masked_l1", "hole_valid") else PAIR_SIZES
    return [size for size in found.values() if name != "stacked_images" or size[1] in (1, 3)]


def binary_sizes(name: str) -> list[tuple[int, ...]]:
    """Masks of zeros and ones are nothing special to Triton."""
    return sizes(name)[4:6] if INTERPRETING else sizes(name)


@grid(op=enough(op for op in OPS.values() if "own mask" not in op.id and op.name != "partial_conv"))
def test_core(backend: Backend, op: Op) -> None:
    check(backend, op, op.make())


# ---- memory: layouts, dtypes, sizes ------------------------------------------------------------------------------


@ways(ALL_WAYS, first=LAYOUTS, second=LAYOUTS)
def test_layouts(backend: Backend, op: Op, first: str, second: str) -> None:
    check(backend, op, op.make(layout=f"{first}/{second}"))


@ways(mask=("n1hw", "hw", "nchw"), mask_layout=LAYOUTS, layout=FORMATS, values=("mixed", "binary"))
def test_mask_layouts(
    backend: Backend, op: Op, mask: str, mask_layout: str, layout: str, values: str
) -> None:
    check(backend, op, op.make(mask=mask, mask_layout=mask_layout, layout=layout, values=values))


@ways(mask=SHAPES, layout=FORMATS, expanded=(False, True))
def test_mask_shapes(backend: Backend, op: Op, mask: str, layout: str, expanded: bool) -> None:
    """`expanded`: stride 0 over samples, channels, both, and over the picture itself."""
    check(backend, op, op.make(mask=mask, layout=layout, expanded=expanded))


@ways(ALL_WAYS, dtypes=[f"{a}/{b}" for a in DTYPES for b in DTYPES], layout=FORMATS)
def test_dtypes(backend: Backend, op: Op, dtypes: str, layout: str) -> None:
    check(backend, op, op.make(dtypes=dtypes, layout=layout))


@ways(mask_dtype=MASK_DTYPES, mask=("n1hw", "nchw"), dtype=("f32", "f16", "f64"), layout=FORMATS)
def test_mask_dtypes(backend: Backend, op: Op, mask_dtype: str, mask: str, dtype: str, layout: str) -> None:
    check(backend, op, op.make(dtypes=f"{dtype}/{dtype}", mask=mask, mask_dtype=mask_dtype, layout=layout))


# The CPU's sum of 600 000 Charbonnier terms is off by 10 roundings, where the budget is 8.
@ways(ALL_WAYS | {"feature_distance": ("l1 mask", "l1", "l2 mask", "l1 once")}, size=sizes, layout=FORMATS)
def test_sizes(backend: Backend, op: Op, size: tuple[int, ...], layout: str) -> None:
    check(backend, op, op.make(size, layout=layout))


@ways(size=GPU_SIZES, layout=FORMATS, dtype=("f32", "bf16"))
def test_large_sizes(kernel: Backend, op: Op, size: str, layout: str, dtype: str) -> None:
    if kernel.device != "cuda":
        pytest.skip("what a size changes on the CPU is in test_cpu_streaming.py")
    check(kernel, op, op.make(GPU_SIZES[size], f"{dtype}/{dtype}", layout))


@grid(
    op=ops(
        "masked_l1 l1 none", "masked_l1 huber none", "stacked_images all", "stacked_images swap", "composite"
    ),
    upstream=("expanded", *LAYOUTS),
    layout=FORMATS,
)
def test_any_strides_of_the_upstream_gradient(backend: Backend, op: Op, upstream: str, layout: str) -> None:
    """The gradient of a map arrives expanded from a sum, or in whatever layout the next op left it."""
    inputs = on_device(backend, *op.make(layout=layout))
    values = torch.randn(op.outputs(inputs, backend.name)[0].shape)
    if upstream == "expanded":
        values = values[:1, :1, :1, :1].expand(values.shape)
    plain = values.contiguous().to(backend.device)
    (view,) = on_device(backend, values if upstream == "expanded" else laid_out(values, upstream))
    got, want = (evaluate(op.by(backend), inputs, op.wanted, [u])[1] for u in (view, plain))
    assert all(map(torch.equal, got, want))


# ---- what a mask may be ------------------------------------------------------------------------------------------


@ways(L1, size=binary_sizes, mask=SHAPES, layout=FORMATS)
def test_masks_of_zeros_and_ones(
    backend: Backend, op: Op, size: tuple[int, ...], mask: str, layout: str
) -> None:
    """Which a backend may keep as bits; one fraction, in the last place, must undo that."""
    inputs = op.make(size, layout=layout, mask=mask, values="binary")
    check(backend, op, inputs)
    inputs[-1][(-1,) * inputs[-1].ndim] = 0.5
    check(backend, op, inputs)


@grid(op=enough(IMAGE_OPS))
def test_whole_and_empty_masks(backend: Backend, op: Op) -> None:
    """A region without pixels gives 0 with zero gradient, never 0/0; also of one sample alone."""
    for values in ("zeros", "ones", "binary"):
        check(backend, op, op.make(values=values))
    for first, second in ((0, 1), (1, 0)):
        inputs = op.make()
        inputs[-1][0], inputs[-1][1] = first, second
        check(backend, op, inputs)


def empty(name: str) -> list[tuple[int, ...]]:
    """Of feature maps the first layer; the second one has channels."""
    sizes = ((0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (2, 0, 4, 5), (0, 0, 0, 0))
    return list(sizes[: 3 if name == "stacked_images" else 5])


@ways(WAYS | {name: FEATURE_WAYS[name] for name in ("gram", "style")}, size=empty)
def test_nothing_to_count(backend: Backend, op: Op, size: tuple[int, ...]) -> None:
    for mask in ("n1hw", "hw", "nchw"):
        check(backend, op, op.make(size, mask=mask))


# ---- what images may hold ----------------------------------------------------------------------------------------


@ways(layout=FORMATS)
def test_equal_pixels(backend: Backend, op: Op, layout: str) -> None:
    """Where there is no difference no penalty has a slope: neighbours of three values, then flat, equal images."""
    mask = op.make()[-1]
    tied = [laid_out(t, layout) for t in tied_pair(SIZE)][: op.free]
    check(backend, op, [*tied, mask])
    if op.name in ("stacked_images", "composite"):  # images, not distances
        return
    flat = torch.full(SIZE, 0.3)
    inputs = on_device(backend, *[laid_out(flat, layout)] * op.free, mask)
    outputs, gradients, _ = evaluate(op.by(backend), inputs, op.wanted)
    assert "charbonnier" in op.id or not any(t.any() for t in outputs)
    assert not any(g.any() for g in gradients)


@ways(dtypes=("f16/f16", "f16/f32", "bf16/f16"))
def test_extremes_do_not_overflow(backend: Backend, op: Op, dtypes: str) -> None:
    """A difference of 131008 leaves float16, its square does too; the sums are float32."""
    inputs = op.make(dtypes=dtypes)
    for image, large in zip(inputs[: op.free], (65504, -65504), strict=False):
        image[0, 0, 0], image[0, 0, 1] = large, -large
        image[1, 2, 3] = 6e-8 if large > 0 else -6e-8
    check(backend, op, inputs)


@pytest.mark.parametrize("name", [name for name in WAYS if name != "stacked_images"])
@given(data=st.data())
def test_any_input(backend: Backend, name: str, data: Any) -> None:
    op = data.draw(st.sampled_from(ops(name)))
    arbitrary = op.name in ("masked_l1", "hole_valid")
    case = data.draw(image_cases(masks=SHAPES) if arbitrary else region_cases())
    check(backend, op, [*list(case.values())[: op.free], case["mask"]])
