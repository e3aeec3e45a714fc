"""partial_conv2d and partial_conv3d: values and gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from harness import DTYPES, INTERPRETING, LAYOUTS, Backend, evaluate, grid, laid_out
from partial_conv_cases import (
    ACTIVATIONS,
    VOLUME,
    Case,
    check,
    exact_convolutions,  # noqa: F401
    make_mask,
    make_tensors,
    mat_layer,
    naoto_layer,
    nvidia_layer,
    run,
)
from pixel_cases import MASK_DTYPES, on_device

# Windows of the layers in networks (1x1 to 7x7, strided, dilated, grouped), and what no network would have.
GEOMETRIES = {
    "k1": {"kernel": 1, "padding": 0},
    "k3": {},
    "k3-nopad": {"padding": 0},
    "k3-stride2": {"stride": 2},
    "k5-stride2": {"kernel": 5, "stride": 2, "padding": 2},
    "k7-stride2": {"kernel": 7, "stride": 2, "padding": 3},
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
}
if not INTERPRETING:
    # More than a tile of any kernel, and nothing divides it.
    GEOMETRIES["large"] = {"size": (2, 5, 83, 151), "outputs": 9}

VOLUMES = {
    "k3": {},
    "k1": {"kernel": 1, "padding": 0},
    "stride2": {"stride": 2},
    "uneven": {"kernel": (1, 3, 2), "stride": (1, 2, 1), "padding": (0, 1, 1), "dilation": (1, 1, 2)},
    "groups": {"groups": 3},
    "same": {"kernel": (3, 2, 1), "padding": "same"},
    "1x1x1": {"size": (2, 3, 1, 1, 1)},
    "batch0": {"size": (0, 3, 4, 5, 6)},
}


# ---- layers in the wild ------------------------------------------------------------------------------------------


def compare(backend: Backend, case: Case, given: list[Any], layer: Any, scale: float = 1.0) -> None:
    """The values, the new mask and the gradients of a layer in the wild."""
    wide = given[0].dtype == torch.float64
    given = on_device(backend, *given)
    wanted = [i for i in range(3) if given[i] is not None]
    masks = []

    def call(found: Any) -> Any:
        masks.append(found.new_mask)
        return found.output

    def ours(x: Any, w: Any, b: Any) -> Any:
        factor = (w * scale, b if b is None else b * math.sqrt(2)) if scale != 1 else (w, b)
        return call(run(backend, case, [x, *factor, given[3]]))

    (got,), gradients, upstream = evaluate(ours, given[:3], wanted)
    (want,), true_gradients, _ = evaluate(lambda *t: call(layer(*t, given[3])), given[:3], wanted, upstream)
    close = {"rtol": 1e-9, "atol": 1e-9} if wide else {"rtol": 2e-5, "atol": 2e-5}
    for a, b in zip((got, *gradients), (want, *true_gradients), strict=True):
        torch.testing.assert_close(a, b, **close)
    # Theirs, of no mask, has a batch.
    torch.testing.assert_close(masks[0].expand(masks[1].shape), masks[1].to(masks[0].dtype), **close)


def wild_dtype(backend: Backend) -> str:
    return "f64" if backend.name in ("reference", "cpu") else "f32"


WILD = {
    "k3": {},
    "k5-stride2": {"kernel": 5, "stride": 2, "padding": 2},
    "dilated": {"padding": 2, "dilation": 2},
    "k4": {"kernel": 4, "padding": 0},
    "volume": VOLUME,
}


@grid(
    windows=WILD,
    multi_channel=(False, True),
    mask=("none", "binary", "fractional"),
    bias=(None, "same"),
)
def test_layer_of_nvidia(
    backend: Backend, windows: str, multi_channel: bool, mask: str, bias: str | None
) -> None:
    case = Case(**WILD[windows], options={"multi_channel": multi_channel})
    kind = "none" if mask == "none" else "nc" if multi_channel else "n1"
    dtype = wild_dtype(backend)
    known = make_mask(kind, case.size, dtype, values=mask)
    where = {"stride": case.stride, "padding": case.padding, "dilation": case.dilation}
    compare(
        backend,
        case,
        make_tensors(case, dtype, mask=known, bias=bias),
        lambda *t: nvidia_layer(*t, multi_channel=multi_channel, **where),
    )


@grid(stride=(1, 2), extent=(3, 7), values=("binary", "fractional"), bias=(None, "same"))
def test_layer_of_naoto0804(
    backend: Backend, stride: int, extent: int, values: str, bias: str | None
) -> None:
    options = {"numerator": "one", "mask_update": "binary", "multi_channel": True}
    case = Case(kernel=extent, stride=stride, padding=extent // 2, options=options)
    dtype = wild_dtype(backend)
    mask = make_mask("nc", case.size, dtype, values=values)
    compare(
        backend,
        case,
        make_tensors(case, dtype, mask=mask, bias=bias),
        lambda *t: naoto_layer(*t, stride=stride, padding=extent // 2),
    )


@grid(stride=(1, 2), values=("binary", "fractional"), bias=(None, "same"))
def test_layer_of_mat(backend: Backend, stride: int, values: str, bias: str | None) -> None:
    """Its gains go into weight and bias: leaky ReLU commutes with a positive factor."""
    options = {"mask_input": False, "scale_bias": True, "activation": "leaky_relu", "negative_slope": 0.2}
    case = Case(stride=stride, options=options)
    dtype = wild_dtype(backend)
    gains = (1 / math.sqrt(9 * case.size[1]), math.sqrt(2))
    mask = make_mask("n1", case.size, dtype, values=values)
    compare(
        backend,
        case,
        make_tensors(case, dtype, mask=mask, bias=bias),
        lambda *t: mat_layer(*t, gains, stride=stride, padding=1),
        scale=gains[0] * gains[1],
    )


# ---- against the definition --------------------------------------------------------------------------------------


@grid(geometry=GEOMETRIES, mask=("none", "n1", "nc"))
def test_geometries(backend: Backend, geometry: str, mask: str) -> None:
    case = Case(**GEOMETRIES[geometry])
    check(backend, case, make_tensors(case, mask=mask))


@grid(geometry=VOLUMES, mask=("none", "n1", "plane", "nc"))
def test_volumes(backend: Backend, geometry: str, mask: str) -> None:
    case = Case(**{**VOLUME, **VOLUMES[geometry]})
    check(backend, case, make_tensors(case, mask=mask))


@grid(
    dtype=DTYPES,
    bias=(None, *DTYPES),
    mask=("none", "n1", "nc"),
    windows=("k3", "k7-stride2"),
)
def test_dtypes(backend: Backend, dtype: str, bias: str | None, mask: str, windows: str) -> None:
    case = Case(**GEOMETRIES[windows])
    check(backend, case, make_tensors(case, dtype, mask=mask, bias=bias))


@grid(dtype=DTYPES, values=("binary", "fractional"), layout=("contiguous", "channels_last"))
def test_volume_dtypes(backend: Backend, dtype: str, values: str, layout: str) -> None:
    case = Case(**VOLUME)
    mask = make_mask("nc", case.size, values=values)
    check(backend, case, make_tensors(case, dtype, mask=mask, layouts=f"{layout}/contiguous"))


@grid(
    layout=LAYOUTS,
    weight_layout=("contiguous", "channels_last"),
    upstream=("contiguous", "channels_last", "sliced"),
    dtype=("f32", "bf16"),
)
def test_layouts(backend: Backend, layout: str, weight_layout: str, upstream: str, dtype: str) -> None:
    case = Case()
    given = make_tensors(case, dtype, layouts=f"{layout}/{weight_layout}")
    check(backend, case, given, upstream_layout=upstream)


@grid(mask=("n1", "plane", "nc", "1c"), layout=LAYOUTS, input_layout=("contiguous", "channels_last"))
def test_mask_layouts(backend: Backend, mask: str, layout: str, input_layout: str) -> None:
    case = Case()
    known = laid_out(make_mask(mask, case.size), layout)
    check(backend, case, make_tensors(case, mask=known, layouts=f"{input_layout}/contiguous"))


@grid(mask=("channel-view", "batch-view"), layout=("contiguous", "channels_last"), dtype=("f32", "f16"))
def test_expanded_masks(backend: Backend, mask: str, layout: str, dtype: str) -> None:
    case = Case()
    given = make_tensors(case, dtype, mask=mask, layouts=f"{layout}/contiguous")
    assert 0 in given[3].stride()
    check(backend, case, given)


@grid(mask=("n1", "plane", "nc", "channel-view"), mask_dtype=MASK_DTYPES, dtype=("f32", "f16", "f64"))
def test_mask_dtypes(backend: Backend, mask: str, mask_dtype: str, dtype: str) -> None:
    case = Case()
    check(backend, case, make_tensors(case, dtype, mask=make_mask(mask, case.size, mask_dtype)))


FORMS: dict[str, dict[str, Any]] = {
    "usual": {},
    "numerator-one": {"numerator": "one"},
    "no-masking": {"mask_input": False},
    "scale-bias": {"scale_bias": True},
    "all": {"numerator": "one", "mask_input": False, "scale_bias": True},
}


@grid(
    update=("clamp", "binary", "proportional"),
    activation=("none", "relu", "leaky"),
    form=FORMS,
    bias=(None, "same"),
    mask=("n1", "nc"),
)
def test_options(
    backend: Backend, update: str, activation: str, form: str, bias: str | None, mask: str
) -> None:
    options = {"mask_update": update, **FORMS[form], **ACTIVATIONS[activation]}
    case = Case(size=(2, 4, 7, 10), stride=2, groups=2, options=options)
    check(backend, case, make_tensors(case, mask=mask, bias=bias))


@grid(update=("clamp", "binary", "proportional"), form=FORMS)
def test_options_without_a_mask(backend: Backend, update: str, form: str) -> None:
    case = Case(options={"mask_update": update, **FORMS[form]})
    check(backend, case, make_tensors(case, mask="none"))


@grid(
    dtype=("f16", "bf16", "f64"),
    activation=ACTIVATIONS,
    scale_bias=(False, True),
    layout=("contiguous", "channels_last"),
)
def test_activations_of_other_dtypes(
    backend: Backend, dtype: str, activation: str, scale_bias: bool, layout: str
) -> None:
    case = Case(options={"scale_bias": scale_bias, **ACTIVATIONS[activation]})
    check(backend, case, make_tensors(case, dtype, layouts=f"{layout}/contiguous"), upstream_layout=layout)


@grid(multi_channel=(True, False), groups=(1, 2, 4), mask=("none", "n1", "plane", "channel-view", "nc"))
def test_multi_channel(backend: Backend, multi_channel: bool, groups: int, mask: str) -> None:
    """A mask with one channel may stand for all of them; a window counts the channels of its own group."""
    if not multi_channel and mask in ("channel-view", "nc"):
        pytest.skip(
            "several channels with multi_channel=False are an error, which the tests of arguments expect"
        )
    case = Case(outputs=8, groups=groups, options={"multi_channel": multi_channel})
    given = make_tensors(case, mask=mask)
    check(backend, case, given)
    found = run(backend, case, on_device(backend, *given))
    assert found.new_mask.shape[1] == (8 if multi_channel else 1)
    if multi_channel and (groups == 1 or mask != "nc"):
        assert found.new_mask.stride(1) == 0
