"""partial_conv2d and partial_conv3d: values, gradients and layouts of every combination, holes, empty windows."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import (
    COVERING,
    DTYPES,
    EMULATING,
    INTERPRETING,
    LAYOUTS,
    Backend,
    evaluate,
    generator,
    grid,
    laid_out,
)
from hypothesis import given
from hypothesis import strategies as st
from partial_conv_cases import (
    ACTIVATIONS,
    CONVOLUTIONS,
    MASKS,
    VOLUME,
    Case,
    check,
    definition,
    exact_convolutions,  # noqa: F401
    make_mask,
    make_tensors,
    output_of,
    run,
    with_options,
)
from pixel_cases import MASK_DTYPES, on_device, skip_unsupported, with_specials
from torch import Tensor

UPDATES = ("clamp", "binary", "proportional")

# Windows of the layers in networks (1x1 to 7x7, strided, dilated, grouped), and what no network would have.
GEOMETRIES: dict[str, dict[str, Any]] = {
    "k3": {},
    "k1": {"kernel": 1, "padding": 0},
    "k3-stride2": {"stride": [2, 2]},
    "k7-stride2": {"kernel": 7, "stride": torch.Size((2, 2)), "padding": 3},
    "k2": {"kernel": 2, "padding": 0},
    "k4-stride2": {"kernel": 4, "stride": 2, "padding": 1},
    "k3x1": {"kernel": (3, 1), "padding": (1, 0)},
    "uneven": {"kernel": (2, 5), "stride": (3, 1), "padding": (0, 3), "dilation": (2, 1)},
    "dilated": {"padding": 2, "dilation": 2},
    "dilated-stride2": {"padding": 3, "dilation": (3, 2), "stride": 2},
    "more-stride-than-window": {"kernel": 2, "stride": 4, "padding": 1},
    "windows-in-the-padding": {"kernel": 2, "padding": 3},
    "same": {"padding": "same"},
    "same-even": {"kernel": (4, 2), "padding": "same", "dilation": (1, 3)},
    "valid": {"padding": "valid"},
    "groups2": {"groups": 2},
    "depthwise": {"groups": 4, "outputs": 4},
    "depthwise-multiplier": {"groups": 4, "outputs": 8, "stride": 2},
    "one-channel": {"size": (2, 1, 7, 5), "outputs": 1},
    "odd": {"size": (3, 5, 13, 1), "outputs": 7},
    "1x1": {"size": (1, 3, 1, 1)},
    "1x1-k1": {"size": (2, 3, 1, 1), "kernel": 1, "padding": 0},
    "flat": {"size": (1, 2, 1, 37), "kernel": (1, 5), "padding": (0, 2)},
    "tall": {"size": (2, 2, 35, 2)},
    "batch0": {"size": (0, 4, 9, 11)},
    "wide": {"size": (1, 17, 4, 67), "outputs": 33},
    "volume": VOLUME,
    "volume-k1": {**VOLUME, "kernel": 1, "padding": 0},
    "volume-stride2": {**VOLUME, "stride": 2},
    "volume-uneven": {
        **VOLUME, "kernel": (1, 3, 2), "stride": (1, 2, 1), "padding": (0, 1, 1), "dilation": (1, 1, 2),
    },
    "volume-groups": {**VOLUME, "groups": 3},
    "volume-same": {**VOLUME, "kernel": (3, 2, 1), "padding": "same"},
    "volume-1x1x1": {"size": (2, 3, 1, 1, 1)},
    "volume-batch0": {"size": (0, 3, 4, 5, 6)},
}  # fmt: skip
# Of the CUDA kernels: planar blocks have 128 threads with 16 bytes each, interleaved ones 256.
if EMULATING:
    GEOMETRIES |= {
        # Whole vectors in both layouts, a few threads a plane.
        "vectors": {"size": (2, 48, 4, 6), "outputs": 48},
        # Planar: one and two warps a plane; four warps, the second tile partial.
        "half-block": {"size": (2, 12, 8, 32), "outputs": 12},
        "four-warps": {"size": (1, 6, 24, 40)},
        # Interleaved: 6 or 3 threads a pixel, the last one idle; more vectors than a block has threads.
        "c24": {"size": (2, 24, 3, 4), "outputs": 24},
        "many": {"size": (1, 1056, 1, 3), "outputs": 1056, "groups": 1056},
        # Tiles of 32 x 32, partial both ways.
        "any-tiles": {"size": (1, 42, 5, 13), "outputs": 42},
    }

# Options that decide what is multiplied and divided by what.
FORMS: dict[str, dict[str, Any]] = {
    "usual": {},
    "numerator-one": {"numerator": "one"},
    "no-masking": {"mask_input": False},
    "scale-bias": {"scale_bias": True},
    "all": {"numerator": "one", "mask_input": False, "scale_bias": True},
    "slope-0": {"negative_slope": 0},
}
# The first value of each axis is the usual one.
AXES: dict[str, Iterable[object]] = {
    "geometry": GEOMETRIES,
    "mask": ("n1", *(kind for kind in MASKS if kind != "n1")),
    "mask_dtype": ("f32", *(dtype for dtype in MASK_DTYPES if dtype != "f32")),
    "mask_values": ("mixed", "binary", "zeros", "ones"),
    "bias": ("same", None, *DTYPES),
    "layout": LAYOUTS,
    "weight_layout": ("contiguous", "channels_last"),
    "mask_layout": LAYOUTS,
    "upstream": ("contiguous", "channels_last", "sliced"),
    "update": UPDATES,
    "activation": ACTIVATIONS,
    "form": FORMS,
    "multi_channel": (None, True),
    "wanted": ((0, 1, 2), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2)),
    "create_graph": (False, True),
    "special": (None, "nan", "inf"),
}


def pairwise(few: bool = COVERING, **axes: Iterable[object]) -> list[Any]:
    """As `harness.grid`, for more axes than a product can have: rows by axis that hold every pair of values.

    A row begins with a pair that no row has yet; then each axis takes the value with most new pairs, its first value
    if no value has any. A new value has many: `few` rows, the first ones, see every value about twice.
    """
    lists = [list(axis) for axis in axes.values()]
    places = [[(i, value) for value in values] for i, values in enumerate(lists)]
    pairs = [pair for two in itertools.permutations(places, 2) for pair in itertools.product(*two)]
    rng = random.Random(0)
    rng.shuffle(pairs)
    # No set, whose order is another one in every process.
    unseen = dict.fromkeys(pairs)
    rows = []
    while unseen and not (few and len(rows) == 2 * max(map(len, lists))):
        row = dict(next(iter(unseen)))
        for i in rng.sample(range(len(lists)), len(lists)):
            if i not in row:
                new = [sum((place, other) in unseen for other in row.items()) for place in places[i]]
                row[i] = lists[i][new.index(max(new))]
        rows.append([row[i] for i in range(len(lists))])
        for pair in itertools.permutations(row.items(), 2):
            unseen.pop(pair, None)
    return [pytest.param(dict(zip(axes, row, strict=True)), id="-".join(map(str, row))) for row in rows]


# ---- against the definition --------------------------------------------------------------------------------------


ROWS = [
    *pairwise(dtype=("f32", "f16", "bf16"), **AXES),
    # Of its own, as kernels of GPUs skip it.
    *pairwise(few=True, dtype=("f64",), **AXES),
]


@pytest.mark.parametrize("row", ROWS)
def test_values(backend: Backend, row: dict[str, Any]) -> None:
    """`special` lies under the holes and is sent back into empty windows, where nothing may see it."""
    options = {**FORMS[row["form"]], **ACTIVATIONS[row["activation"]]}
    case = Case(
        **GEOMETRIES[row["geometry"]],
        options={"mask_update": row["update"], "multi_channel": row["multi_channel"], **options},
    )
    known = make_mask(row["mask"], case.size, row["mask_dtype"], row["mask_values"])
    if known is not None and not row["mask"].endswith("view"):
        known = laid_out(known, row["mask_layout"])
    x, w, b, _ = make_tensors(case, row["dtype"], mask=known, bias=row["bias"])
    special = row["special"] and float(row["special"])
    if special is not None and known is not None and options.get("mask_input", True):
        x = x.masked_fill(known == 0, special)
    check(
        backend,
        case,
        [laid_out(x, row["layout"]), laid_out(w, row["weight_layout"]), b, known],
        wanted=row["wanted"],
        upstream_layout=row["upstream"],
        create_graph=row["create_graph"],
        # The gradients of the formulas are not finite there.
        special=None if backend.name == "reference" else special,
    )


@pytest.mark.skipif(INTERPRETING, reason="slow in the interpreter")
@grid(mask=("none", "n1", "nc"), layout=("contiguous", "channels_last"))
def test_large(backend: Backend, mask: str, layout: str) -> None:
    """More than a tile of any kernel, and nothing divides it."""
    case = Case(size=(2, 5, 83, 151), outputs=9)
    check(backend, case, make_tensors(case, mask=mask, layouts=f"{layout}/contiguous"))


@st.composite
def windows(draw: Any) -> dict[str, Any]:
    """Any window that fits, in two or three dimensions."""
    dims = draw(st.sampled_from((2, 2, 3)))
    groups = draw(st.integers(1, 3))
    spatial = [draw(st.integers(1, 12 if dims == 2 else 6)) for _ in range(dims)]
    kernel, stride, padding, dilation = [], [], [], []
    for size in spatial:
        kernel.append(draw(st.integers(1, 5)))
        dilation.append(draw(st.integers(1, 3)))
        reach = dilation[-1] * (kernel[-1] - 1) + 1
        least = max(0, (reach - size + 1) // 2)
        padding.append(draw(st.integers(least, least + 3)))
        stride.append(draw(st.integers(1, 4)))
    return {
        "size": (draw(st.integers(0, 2)), groups * draw(st.integers(1, 3)), *spatial),
        "outputs": groups * draw(st.integers(1, 3)),
        "kernel": tuple(kernel),
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "groups": groups,
    }


@given(
    parts=windows(),
    mask=st.sampled_from(list(MASKS)),
    mask_dtype=st.sampled_from(list(MASK_DTYPES)),
    dtype=st.sampled_from(("f16", "bf16", "f32")),
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 3),
    bias=st.sampled_from((None, "same", "f32")),
    update=st.sampled_from(UPDATES),
    form=st.fixed_dictionaries({"mask_input": st.booleans(), "scale_bias": st.booleans()}),
)
def test_any_input(
    backend: Backend,
    parts: dict[str, Any],
    mask: str,
    mask_dtype: str,
    dtype: str,
    layouts: tuple[str, str, str],
    bias: str | None,
    update: str,
    form: dict[str, bool],
) -> None:
    case = Case(**parts, options={"mask_update": update, **form})
    known = make_mask(mask, case.size, mask_dtype)
    given = make_tensors(case, dtype, mask=known, bias=bias, layouts="/".join(layouts[:2]))
    check(backend, case, given, upstream_layout=layouts[2])


# ---- the definition ----------------------------------------------------------------------------------------------

# Added to the window sums by the layers in the wild, 1e-8 there. So small, it leaves float64 nothing to allow for.
EPSILON = 1e-13


def nvidia_layer(
    x: Tensor, w: Tensor, b: Tensor | None, mask: Tensor | None, multi_channel: bool, where: Any
) -> tuple[Tensor, Tensor]:
    """NVIDIA/partialconv: models/partialconv2d.py and partialconv3d.py."""
    conv = CONVOLUTIONS[x.dim() - 2]
    ones = torch.ones_like(w) if multi_channel else torch.ones_like(w[:1, :1])
    if mask is not None:
        seen = mask
    else:
        seen = torch.ones_like(x) if multi_channel else torch.ones_like(x[:1, :1])
    update = conv(seen, ones, None, *where)
    ratio = ones[0].numel() / (update + EPSILON)
    update = update.clamp(0, 1)
    ratio = ratio * update
    raw = conv(x if mask is None else x * mask, w, b, *where)
    if b is None:
        return raw * ratio, update
    bias = b.view(1, -1, *[1] * (x.dim() - 2))
    return ((raw - bias) * ratio + bias) * update, update


def naoto_layer(x: Tensor, w: Tensor, b: Tensor | None, mask: Tensor, where: Any) -> tuple[Tensor, Tensor]:
    """naoto0804/pytorch-inpainting-with-partial-conv: net.py. The mask has the channels of the input."""
    conv = CONVOLUTIONS[x.dim() - 2]
    raw = conv(x * mask, w, b, *where)
    bias = 0.0 if b is None else b.view(1, -1, *[1] * (x.dim() - 2))
    total = conv(mask, torch.ones_like(w), None, *where)
    empty = total == 0
    output = (raw - bias) / total.masked_fill(empty, 1.0) + bias
    return output.masked_fill(empty, 0.0), torch.ones_like(raw).masked_fill(empty, 0.0)


@grid(
    layer=("nvidia", "nvidia multi-channel", "naoto0804"),
    geometry=("k3", "k7-stride2", "dilated", "k2", "volume"),
    mask=("none", "binary", "fractional"),
    bias=(None, "same"),
)
def test_the_definition_is_that_of_layers_in_the_wild(
    layer: str, geometry: str, mask: str, bias: str | None
) -> None:
    if layer == "naoto0804" and mask == "none":
        pytest.skip("takes a mask")
    multi_channel = layer != "nvidia"
    options: dict[str, Any] = {"multi_channel": multi_channel}
    if layer == "naoto0804":
        options |= {"numerator": "one", "mask_update": "binary"}
    case = Case(**GEOMETRIES[geometry], options=options)
    kind = "none" if mask == "none" else "nc" if multi_channel else "n1"
    given = make_tensors(case, "f64", mask=make_mask(kind, case.size, "f64", values=mask), bias=bias)
    if layer == "naoto0804":
        want = naoto_layer(*given, case.geometry[:3])
    else:
        want = nvidia_layer(*given, multi_channel, case.geometry[:3])
    result = definition(case, *given)
    torch.testing.assert_close(result.output, want[0], rtol=1e-9, atol=1e-9)
    # Their new mask of no mask has a batch.
    torch.testing.assert_close(result.new_mask.expand(want[1].shape), want[1], rtol=1e-9, atol=1e-9)


def test_the_definition_is_a_convolution_without_holes() -> None:
    case = Case(padding=0)
    x, w, b, _ = make_tensors(case, "f64")
    torch.testing.assert_close(definition(case, x, w, b, None).output, CONVOLUTIONS[2](x, w, b))


# ---- what makes a partial convolution ----------------------------------------------------------------------------


@grid(special=("nan", "inf"), mask=("none", "n1"), activation=("none", "relu", "leaky"))
def test_known_specials_propagate(backend: Backend, special: str, mask: str, activation: str) -> None:
    """To the windows that see them, as far as ReLU lets them, and to no other."""
    case = Case(size=(1, 2, 9, 9), options=ACTIVATIONS[activation])
    x, w, b, known = make_tensors(case, mask=make_mask(mask, case.size, values="ones"))
    x[0, 1, 4, 4] = float(special)
    w = w.abs()
    output = run(backend, case, on_device(backend, x, w, b, known)).output.cpu()
    seen = torch.zeros(output.shape, dtype=torch.bool)
    seen[:, :, 3:6, 3:6] = True
    assert torch.equal(~output.isfinite(), seen)


@grid(dtype=("f16", "bf16", "f32"), mask=("n1", "nc"), mask_input=(False, True))
def test_empty_windows(backend: Backend, dtype: str, mask: str, mask_input: bool) -> None:
    """Exactly 0 next to windows that are not, whatever lies in them."""
    case = Case(options={"mask_input": mask_input})
    x, w, b, known = make_tensors(case, dtype, mask=make_mask(mask, case.size, values="binary"))
    known[..., 5:] = 0
    new_mask = definition(case, x, w, b, known).new_mask[:, :1]
    empty = (new_mask == 0).expand(-1, case.outputs, -1, -1)
    # No window that is not empty reaches these pixels.
    reached = F.conv_transpose2d(new_mask, torch.ones(1, 1, 3, 3), padding=1)
    x = with_specials(x, reached == 0)
    assert not x.isfinite().all()
    output = run(backend, case, on_device(backend, x, w, b, known)).output.cpu()
    assert empty.any() and not empty.all()
    assert not output[empty].any() and bool(output[~empty].all())


@grid(dtype=("f16", "bf16", "f32"), known=(2047, 2049, 2051, 2699, 257, 1, 0))
def test_large_sums_are_exact(backend: Backend, dtype: str, known: int) -> None:
    """float16 counts to 2048, bfloat16 to 256; a window of 300 channels holds 2700."""
    case = Case(size=(1, 300, 3, 3), outputs=1, padding=0)
    mask = torch.zeros(2700)
    mask[torch.randperm(2700, generator=generator(known))[:known]] = 1
    x, w = torch.ones(case.size), torch.full(case.size, 2.0**-12)
    tensors = [t.to(DTYPES[dtype]) for t in (x, w, mask.view(case.size))]
    tensors[2:2] = [None]
    tensors = on_device(backend, *tensors)
    ratios = run(backend, with_options(case, mask_update="proportional"), tensors).new_mask
    assert round(float(ratios) * 2700) == known
    output = run(backend, case, tensors).output
    # Every known pixel alike: the output is that of a whole window, or nothing.
    want = torch.tensor([[[[2700 * 2.0**-12 if known else 0.0]]]])
    torch.testing.assert_close(output.float().cpu(), want, rtol=2 * torch.finfo(DTYPES[dtype]).eps, atol=0)


@grid(update=("binary", "proportional"), dtype=("f32", "f64"), tiny=(1e-42, 1e-30, 1e-4))
def test_faint_masks_stay_finite(backend: Backend, update: str, dtype: str, tiny: float) -> None:
    """However little of a window is known, its ratio is finite."""
    case = Case(options={"mask_update": update})
    given = make_tensors(case, dtype, mask=torch.full((2, 1, 9, 11), tiny), bias=None)
    skip_unsupported(backend, given[0])
    tensors = on_device(backend, *given)
    outputs, gradients, _ = evaluate(output_of(backend, case, tensors[3]), tensors[:3], (0, 1))
    assert bool(outputs[0].isfinite().all())
    # A gradient times the largest ratio may be too large for float32.
    assert tiny == 1e-42 or all(bool(g.isfinite().all()) for g in gradients)
