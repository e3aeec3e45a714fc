"""ik.nn.PartialConv2d and PartialConv3d: constructor, state, options."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import pytest
import torch
from harness import Backend, grid, same_bits
from partial_conv_cases import (
    FUNCTIONS,
    Case,
    exact_convolutions,  # noqa: F401
    make_tensors,
)
from pixel_cases import on_device
from torch import nn

import inpaint_kernels as ik

LAYERS: dict[int, tuple[Any, Any]] = {
    2: (ik.nn.PartialConv2d, nn.Conv2d),
    3: (ik.nn.PartialConv3d, nn.Conv3d),
}
OWN = {
    "multi_channel": False,
    "return_mask": False,
    "numerator": "window",
    "mask_update": "clamp",
    "mask_input": True,
    "scale_bias": False,
    "activation": "none",
    "negative_slope": 0.01,
    "backend": None,
}


def images(backend: Backend, dims: int = 2, mask: str = "n1") -> Any:
    case = Case(size=(2, 4, 6, 7, 5)[: dims + 2])
    x, _, _, known = on_device(backend, *make_tensors(case, mask=mask))
    return x, known


# Arguments of torch.nn.Conv2d, by position as well as by name.
CONSTRUCTORS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "few": ((4, 6, 3), {}),
    "positions": ((4, 6, 3, 2, 1, 1, 2, False), {}),
    "names": ((4, 6), {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2, "groups": 2}),
    "same": ((4, 6, 3), {"padding": "same", "bias": False}),
    "dtype": ((4, 6, 3), {"dtype": torch.float64}),
    "zeros": ((4, 6, 3, 1, 1), {"padding_mode": "zeros"}),
}


@pytest.mark.parametrize("dims", LAYERS)
@pytest.mark.parametrize("case", CONSTRUCTORS)
def test_constructor_is_that_of_a_convolution(case: str, dims: int) -> None:
    """The same parameters from the same seed, and the same description."""
    positions, names = CONSTRUCTORS[case]
    ours, plain = LAYERS[dims]
    torch.manual_seed(0)
    layer = ours(*positions, **names)
    torch.manual_seed(0)
    like = plain(*positions, **names)
    assert isinstance(layer, plain)
    assert list(layer.state_dict()) == list(like.state_dict())
    for got, want in zip(layer.parameters(), like.parameters(), strict=True):
        assert same_bits(got, want)
    assert layer.extra_repr() == like.extra_repr()
    assert repr(layer).startswith(f"PartialConv{dims}d(4, 6, kernel_size=(3, 3")
    for name in ("stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(layer, name) == getattr(like, name)
    assert {name: getattr(layer, name) for name in OWN} == OWN


def keyword_only(function: Any) -> dict[str, Any]:
    """Arguments and their defaults."""
    parameters = inspect.signature(function).parameters.items()
    return {name: p.default for name, p in parameters if p.kind is p.KEYWORD_ONLY}


@pytest.mark.parametrize("dims", LAYERS)
def test_signature(dims: int) -> None:
    """What editors show: the arguments of a convolution in their order, then the layer's own by name."""
    ours, plain = (inspect.signature(layer).parameters for layer in LAYERS[dims])
    shared = list(ours)[: len(plain)]
    assert shared == list(plain)
    assert [ours[name].default for name in shared] == [plain[name].default for name in shared]
    assert all(ours[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for name in shared)
    assert keyword_only(LAYERS[dims][0]) == OWN and len(ours) == len(plain) + len(OWN)
    # The function, too, has each option; NVIDIA's layer has False for `multi_channel`, where it looks at the mask.
    function = OWN | {"multi_channel": None}
    del function["return_mask"]
    assert keyword_only(FUNCTIONS[dims]) == function


@pytest.mark.parametrize("dims", LAYERS)
def test_skip_init(dims: int) -> None:
    """As for torch's own layers: made without a pass of initialisation, filled from a checkpoint."""
    ours, plain = LAYERS[dims]
    source = plain(3, 4, 3)
    layer = torch.nn.utils.skip_init(ours, 3, 4, 3, padding=1, multi_channel=True, return_mask=True)
    assert type(layer) is ours and layer.weight.device.type == "cpu" and layer.multi_channel
    layer.load_state_dict(source.state_dict())
    x = torch.rand(2, 3, *[6] * dims)
    want = FUNCTIONS[dims](x, source.weight, source.bias, None, padding=1, multi_channel=True)
    for got, expected in zip(layer(x), want, strict=True):
        assert same_bits(got, expected)
    assert torch.nn.utils.skip_init(ours, 3, 4, 3, device="meta").weight.is_meta


@pytest.mark.parametrize("dims", LAYERS)
def test_mask_in_is_nvidias_name_of_the_mask(backend: Backend, dims: int) -> None:
    x, mask = images(backend, dims)
    layer = LAYERS[dims][0](4, 6, 3, backend=backend.name).to(backend.device)
    assert same_bits(layer(x, mask_in=mask), layer(x, mask))
    assert not same_bits(layer(x, mask_in=mask), layer(x))
    with pytest.raises(TypeError, match=r"mask and mask_in"):
        layer(x, mask, mask_in=mask)


@grid(
    dims=(2, 3),
    padding=(1, "same", "valid"),
    groups=(1, 2),
    multi_channel=(False, True),
    form=("usual", "mat", "soft"),
)
def test_forward_is_the_function(
    backend: Backend, dims: int, padding: Any, groups: int, multi_channel: bool, form: str
) -> None:
    x, mask = images(backend, dims, "nc" if multi_channel else "n1")
    options: dict[str, Any] = {
        "usual": {},
        "mat": {"mask_input": False, "scale_bias": True, "activation": "leaky_relu", "negative_slope": 0.2},
        "soft": {"numerator": "one", "mask_update": "proportional", "activation": "relu"},
    }[form]
    options = {**options, "multi_channel": multi_channel, "backend": backend.name}
    layer = LAYERS[dims][0](4, 6, 3, padding=padding, groups=groups, return_mask=True, **options)
    layer = layer.to(backend.device)
    for known in (mask, None):
        got = layer(x, known)
        want = FUNCTIONS[dims](x, layer.weight, layer.bias, known, padding=padding, groups=groups, **options)
        assert isinstance(got, ik.PartialConvOutput)
        assert same_bits(got.output, want.output) and same_bits(got.new_mask, want.new_mask)
    layer.return_mask = False
    assert same_bits(layer(x, mask), layer(input=x, mask=mask))
    assert same_bits(layer(x), want.output)


@pytest.mark.parametrize("dims", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_of_a_plain_convolution(dims: int, bias: bool) -> None:
    """Both ways, strictly; a checkpoint is `weight` and `bias`."""
    ours, plain = LAYERS[dims]
    source, target = plain(4, 6, 3, bias=bias), plain(4, 6, 3, bias=bias)
    layer = ours(4, 6, 3, bias=bias)
    layer.load_state_dict(source.state_dict(), strict=True)
    target.load_state_dict(layer.state_dict(), strict=True)
    assert list(layer.state_dict()) == (["weight", "bias"] if bias else ["weight"])
    assert all(map(same_bits, source.parameters(), target.parameters()))


def through_file(layer: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_file])
def test_copies_are_layers_of_their_own(backend: Backend, copied: Any) -> None:
    """With all options, also after a call."""
    x, mask = images(backend)
    options = {"activation": "leaky_relu", "negative_slope": 0.3, "scale_bias": True}
    layer = ik.nn.PartialConv2d(4, 6, 3, **options, backend=backend.name).to(backend.device)
    before = layer(x, mask)
    twin = copied(layer)
    assert {name: getattr(twin, name) for name in OWN} == {name: getattr(layer, name) for name in OWN}
    assert same_bits(twin(x, mask), before)
    with torch.no_grad():
        twin.weight.zero_()
    assert layer.weight.any()


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "padding_mode": ({"padding_mode": "reflect"}, ValueError, "padding_mode.*'zeros'.*'reflect'"),
    "numerator": ({"numerator": "two"}, ValueError, "numerator.*'two'.*window.*one"),
    "mask_update": ({"mask_update": "max"}, ValueError, "mask_update.*'max'.*clamp.*binary.*proportional"),
    "activation": ({"activation": "elu"}, ValueError, "activation.*'elu'.*none.*relu.*leaky_relu"),
    "unknown": ({"mask_is": "hole"}, TypeError, "mask_is"),
    "groups": ({"groups": 3}, ValueError, "in_channels must be divisible by groups"),
}


@pytest.mark.parametrize("dims", LAYERS)
@pytest.mark.parametrize("case", BAD)
def test_bad_options(case: str, dims: int) -> None:
    options, error, words = BAD[case]
    with pytest.raises(error, match=words):
        LAYERS[dims][0](4, 6, 3, **options)
