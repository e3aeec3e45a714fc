"""Every op: values and gradients for all layouts, dtypes, sizes and masks there are.

What one op alone does is in its own file, and all of partial convolution.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from feature_cases import CHANNELS, PLANES
from harness import (
    DTYPES,
    INTERPRETING,
    LAYOUTS,
    Backend,
    evaluate,
    grid,
    laid_out,
    same_bits,
)
from hypothesis import given
from hypothesis import strategies as st
from op_cases import OPS, Op
from op_choices import ALL_WAYS, FEATURE_WAYS, USUAL, WAYS, enough, ops, ways
from op_inputs import SIZE
from pairs_cases import SHAPES, dilated, region_cases, regions_of, tied_pair
from pairs_cases import SIZES as PAIR_SIZES
from pixel_cases import GPU_SIZES, MASK_DTYPES, image_cases, on_device, with_specials
from pixel_cases import SIZES as PIXEL_SIZES
from torch import Tensor

FORMATS = ("contiguous", "channels_last")
L1 = {name: l1 for name, rows in WAYS.items() if (l1 := [way for way in rows if "l1" in way])}


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
    op.check_on(backend, op.make())


# ---- memory: layouts, dtypes, sizes ------------------------------------------------------------------------------


@ways(ALL_WAYS, first=LAYOUTS, second=LAYOUTS)
def test_layouts(backend: Backend, op: Op, first: str, second: str) -> None:
    op.check_on(backend, op.make(layout=f"{first}/{second}"))


@ways(mask=("n1hw", "hw", "nchw"), mask_layout=LAYOUTS, layout=FORMATS, values=("mixed", "binary"))
def test_mask_layouts(
    backend: Backend, op: Op, mask: str, mask_layout: str, layout: str, values: str
) -> None:
    op.check_on(backend, op.make(mask=mask, mask_layout=mask_layout, layout=layout, values=values))


@ways(mask=SHAPES, layout=FORMATS, expanded=(False, True))
def test_mask_shapes(backend: Backend, op: Op, mask: str, layout: str, expanded: bool) -> None:
    """`expanded`: stride 0 over samples, channels, both, and over the picture itself."""
    op.check_on(backend, op.make(mask=mask, layout=layout, expanded=expanded))


@ways(ALL_WAYS, dtypes=[f"{a}/{b}" for a in DTYPES for b in DTYPES], layout=FORMATS)
def test_dtypes(backend: Backend, op: Op, dtypes: str, layout: str) -> None:
    op.check_on(backend, op.make(dtypes=dtypes, layout=layout))


@ways(mask_dtype=MASK_DTYPES, mask=("n1hw", "nchw"), dtype=("f32", "f16", "f64"), layout=FORMATS)
def test_mask_dtypes(backend: Backend, op: Op, mask_dtype: str, mask: str, dtype: str, layout: str) -> None:
    op.check_on(backend, op.make(dtypes=f"{dtype}/{dtype}", mask=mask, mask_dtype=mask_dtype, layout=layout))


# The CPU's sum of 600 000 Charbonnier terms is off by 10 roundings, where the budget is 8.
@ways(ALL_WAYS | {"feature_distance": ("l1 mask", "l1", "l2 mask", "l1 once")}, size=sizes, layout=FORMATS)
def test_sizes(backend: Backend, op: Op, size: tuple[int, ...], layout: str) -> None:
    op.check_on(backend, op.make(size, layout=layout))


@ways(size=GPU_SIZES, layout=FORMATS, dtype=("f32", "bf16"))
def test_large_sizes(kernel: Backend, op: Op, size: str, layout: str, dtype: str) -> None:
    if kernel.device != "cuda":
        pytest.skip("what a size changes on the CPU is in test_cpu_streaming.py")
    op.check_on(kernel, op.make(GPU_SIZES[size], f"{dtype}/{dtype}", layout))


@grid(
    op=ops(
        "masked_l1 l1 none",
        "masked_l1 huber none",
        "stacked_images all",
        "stacked_images swap",
        "composite",
        "gram chw",
    ),
    upstream=("expanded", *LAYOUTS),
    layout=FORMATS,
)
def test_any_strides_of_the_upstream_gradient(backend: Backend, op: Op, upstream: str, layout: str) -> None:
    """The gradient of a map arrives expanded from a sum, or in whatever layout the next op left it."""
    inputs = on_device(backend, *op.make(layout=layout))
    values = torch.randn(op.outputs(inputs, backend.name)[0].shape)
    if upstream == "expanded":
        values = values.flatten()[0].expand(values.shape)
    plain = values.contiguous().to(backend.device)
    (view,) = on_device(backend, values if upstream == "expanded" else laid_out(values, upstream))
    for got, want in zip(
        *(evaluate(op.by(backend), inputs, op.wanted, [u])[1] for u in (view, plain)), strict=True
    ):
        # A matrix product may add in another order.
        slack = 1e-6 * float(want.abs().max()) if op.name == "gram" else 0.0
        torch.testing.assert_close(got, want, rtol=0, atol=slack)


# ---- what a mask may be ------------------------------------------------------------------------------------------


@ways(L1, size=binary_sizes, mask=SHAPES, layout=FORMATS)
def test_masks_of_zeros_and_ones(
    backend: Backend, op: Op, size: tuple[int, ...], mask: str, layout: str
) -> None:
    """Which a backend may keep as bits; one fraction, in the last place, must undo that."""
    inputs = op.make(size, layout=layout, mask=mask, values="binary")
    op.check_on(backend, inputs)
    inputs[-1][(-1,) * inputs[-1].ndim] = 0.5
    op.check_on(backend, inputs)


@ways()
def test_whole_and_empty_masks(backend: Backend, op: Op) -> None:
    """A region without pixels gives 0 with zero gradient, never 0/0; also of one sample alone."""
    for values in ("zeros", "ones", "binary"):
        op.check_on(backend, op.make(values=values))
    for first, second in ((0, 1), (1, 0)):
        inputs = op.make()
        inputs[-1][0], inputs[-1][1] = first, second
        op.check_on(backend, inputs)


@grid(
    op=ops(
        "masked_l1", "total_variation l1 image-default image", "total_variation l2 image-image image",
        "gradient_loss image", "stacked_images raw", "stacked_images target",
    ),
    layout=LAYOUTS,
)  # fmt: skip
def test_without_a_mask(backend: Backend, op: Op, layout: str) -> None:
    op.check_on(backend, op.make(layout=layout, mask="nomask"))


# One setting of every op that takes a mask.
MASKED = [
    *(op for op in USUAL if op.name not in ("gram", "style")),
    *ops("composite", "partial_conv soft n1 2d", "masked_l1 huber sum"),
]
# What an integer mask holds where it is not 0: 255 is the "1" of an image file.
NONZERO = {"uint8": 255, "int8": -1, "int16": 100, "int32": 100, "int64": 100, "uint16": 100}


@grid(op=MASKED, dtype=NONZERO)
def test_nonzero_integers_count_as_one(backend: Backend, op: Op, dtype: str) -> None:
    inputs = on_device(backend, *op.make())
    images, known = inputs[: op.free], [mask != 0 for mask in inputs[op.free :]]
    integers = [mask.to(getattr(torch, dtype)) * NONZERO[dtype] for mask in known]
    want, got = (evaluate(op.by(backend), [*images, *masks], op.wanted) for masks in (known, integers))
    assert all(map(same_bits, (*got[0], *got[1]), (*want[0], *want[1])))


def empty(name: str) -> list[tuple[int, ...]]:
    """Of feature maps the first layer; the second one has channels."""
    sizes = ((0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (2, 0, 4, 5), (0, 0, 0, 0))
    return list(sizes[: 3 if name == "stacked_images" else 5])


@ways(WAYS | {name: FEATURE_WAYS[name] for name in ("gram", "style")}, size=empty)
def test_nothing_to_count(backend: Backend, op: Op, size: tuple[int, ...]) -> None:
    for mask in ("n1hw", "hw", "nchw", *(["nomask"] if op.name == "masked_l1" else [])):
        op.check_on(backend, op.make(size, mask=mask))


# ---- what images may hold ----------------------------------------------------------------------------------------


@ways(layout=FORMATS)
def test_equal_pixels(backend: Backend, op: Op, layout: str) -> None:
    """Where there is no difference no penalty has a slope: neighbours of three values, then flat, equal images."""
    mask = op.make()[-1]
    tied = [laid_out(t, layout) for t in tied_pair(SIZE)][: op.free]
    op.check_on(backend, [*tied, mask])
    if op.name in ("stacked_images", "composite"):  # images, not distances
        return
    flat = torch.full(SIZE, 0.3)
    inputs = on_device(backend, *[laid_out(flat, layout)] * op.free, mask)
    outputs, gradients, _ = evaluate(op.by(backend), inputs, op.wanted)
    assert "charbonnier" in op.id or not any(t.any() for t in outputs)
    assert not any(g.any() for g in gradients)


# Of each op: outputs, and the images that they do not read where the weight of this name is 0, by position.
UNREAD: dict[str, tuple[tuple[tuple[int, ...], dict[int, str]], ...]] = {
    "masked_l1": (((0,), {0: "mask"}), ((0,), {1: "mask"}), ((0,), {0: "mask", 1: "mask"})),
    "hole_valid": (((0,), {0: "hole"}), ((0,), {1: "hole"}), ((1,), {0: "valid"}), ((1,), {1: "valid"})),
    "total_variation composite": (((0,), {0: "hole"}), ((0,), {1: "valid"})),
    "total_variation image": (((0,), {0: "region"}),),
    "inpainting_pixel": (((1, 3), {0: "hole"}), ((2, 3), {1: "valid"})),
    "gradient_loss": (((0,), {0: "hole", 1: "hole"}),),
    "ssim": (((0,), {0: "mask", 1: "mask"}),),
    "stacked_images": (((0,), {0: "hole"}), ((0,), {1: "valid"})),
    "stacked_images holes": (((0,), {0: "hole", 1: "hole"}),),
    "composite": (((0,), {0: "hole"}), ((0,), {1: "valid"})),
}


def read_weights(op: Op, mask: Tensor) -> dict[str, Tensor]:
    hole, valid = regions_of(mask, SIZE, op.mask_is)
    region = dilated(hole) if "dilated" in op.id else hole.clone()
    if "first_pixel" in op.id:  # a pixel also ends the pairs of the pixel above it and of the one to its left
        region[..., 1:, :] += hole[..., :-1, :]
        region[..., 1:] += hole[..., :-1]
    return {"mask": mask.expand(SIZE), "hole": hole, "valid": valid, "region": region}


@ways(WAYS | {"stacked_images": ("composite", "holes")}, mask=("n1hw", "nchw"), layout=FORMATS)
def test_specials_where_nothing_reads(backend: Backend, op: Op, mask: str, layout: str) -> None:
    """NaN and infinity there change no bit of an output or of a gradient, which no higher derivative does either."""
    inputs = op.make(mask=mask, values="binary", layout=layout)
    inputs[-1][..., 5:, :] = op.mask_is == "valid"
    weights = read_weights(op, inputs[-1])
    kinds = [op.id, f"{op.name} {op.id.split()[-1]}", op.name]
    for numbers, places in next(UNREAD[kind] for kind in kinds if kind in UNREAD):

        def call(*t: Tensor, numbers: tuple[int, ...] = numbers) -> tuple[Tensor, ...]:
            outputs = op.outputs(t, backend.name)
            return tuple(outputs[i] for i in numbers)

        clean = evaluate(call, on_device(backend, *inputs), op.wanted)
        dirty = list(inputs)
        for i, name in places.items():
            assert 0 < (weights[name] == 0).sum() < weights[name].numel()
            dirty[i] = laid_out(with_specials(inputs[i], weights[name] == 0), layout)
        result = evaluate(call, on_device(backend, *dirty), op.wanted, clean[2])
        # The sign of a zero may follow what is not counted.
        same = torch.equal if op.name in ("masked_l1", "hole_valid", "inpainting_pixel") else same_bits
        for got, want in zip((*result[0], *result[1]), (*clean[0], *clean[1]), strict=True):
            assert same(got, want)
            assert got.isfinite().all()
        leaves = [t.requires_grad_(i in op.wanted) for i, t in enumerate(on_device(backend, *dirty))]
        outputs = call(*leaves)
        again = torch.autograd.grad(outputs, leaves[: op.free], clean[2], create_graph=True)
        for got, want in zip(again, clean[1], strict=True):
            torch.testing.assert_close(got.detach(), want, rtol=1e-6, atol=1e-6 * float(want.abs().max()))


def specials(name: str) -> tuple[str, ...]:
    """Differences of neighbours make NaN of infinity in an order of their own."""
    return ("nan", "inf", "-inf") if name in ("masked_l1", "hole_valid") else ("nan",)


# The formula of the gradient loss subtracts the truth twice, its kernels once: NaN of the truth, and NaN next to a
# known pixel, spread further in the formula.
@ways(
    WAYS | {"gradient_loss": ("ring l1", "hole l1", "image l1", "hole l2")}, special=specials, layout=FORMATS
)
def test_counted_specials_propagate(backend: Backend, op: Op, special: str, layout: str) -> None:
    """Into the outputs and the gradients that PyTorch lets them reach, where the sign of NaN is 0, no further."""
    inputs = op.make(layout=layout)
    last = 0 if op.name == "gradient_loss" else op.free - 1
    for image, place in ((0, (0, 0, 0, 0)), (0, (1, 1, 8, 13)), (last, (0, 2, 4, 5))):
        inputs[image][place] = float(special)
        inputs[-1][(place[0], 0, *place[2:])] = 0.5
    op.check_on(backend, inputs)


@ways(dtypes=("f16/f16", "f16/f32", "bf16/f16"))
def test_extremes_do_not_overflow(backend: Backend, op: Op, dtypes: str) -> None:
    """A difference of 131008 leaves float16, its square does too; the sums are float32."""
    inputs = op.make(dtypes=dtypes)
    for image, large in zip(inputs[: op.free], (65504, -65504), strict=False):
        image[0, 0, 0], image[0, 0, 1] = large, -large
        image[1, 2, 3] = 6e-8 if large > 0 else -6e-8
    op.check_on(backend, inputs)


@pytest.mark.parametrize("name", [name for name in WAYS if name != "stacked_images"])
@given(data=st.data())
def test_any_input(backend: Backend, name: str, data: Any) -> None:
    op = data.draw(st.sampled_from(ops(name)))
    arbitrary = op.name in ("masked_l1", "hole_valid")
    case = data.draw(image_cases(masks=SHAPES) if arbitrary else region_cases())
    if name == "ssim":
        # Pictures that are alike: where a window sees a single pixel, C2 alone divides the rounding of d * d.
        pred, target = case["pred"], case["target"]
        target.copy_(target / 64 + pred / 4 + 0.5)
        pred.mul_(0.25).add_(0.5)
    op.check_on(backend, [*list(case.values())[: op.free], case["mask"]])
