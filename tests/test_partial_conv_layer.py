"""ik.nn.PartialConv2d and PartialConv3d: constructor, state, options."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from harness import INTERPRETING, Backend, evaluate, generator, grid, same_bits
from partial_conv_cases import (
    FUNCTIONS,
    Case,
    definition,
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


@pytest.mark.parametrize("dims", LAYERS)
def test_signature(dims: int) -> None:
    """What editors show: the arguments of a convolution in their order, then the layer's own by name."""
    ours, plain = (inspect.signature(layer).parameters for layer in LAYERS[dims])
    shared = list(ours)[: len(plain)]
    assert shared == list(plain)
    assert [ours[name].default for name in shared] == [plain[name].default for name in shared]
    assert all(ours[name].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for name in shared)
    own = {name: p.default for name, p in ours.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    assert own == OWN and len(ours) == len(plain) + len(OWN)


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


def test_groups_count_their_own_channels(backend: Backend) -> None:
    """As the docstring says: NVIDIA's windows count those of the other groups as well."""
    layer = ik.nn.PartialConv2d(4, 2, 1, groups=2, multi_channel=True, return_mask=True, backend=backend.name)
    layer = layer.to(backend.device)
    mask = torch.ones(1, 4, 1, 1, device=backend.device)
    mask[:, :2] = 0
    new_mask = layer(torch.rand(1, 4, 1, 1, device=backend.device), mask).new_mask
    assert new_mask.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dims", LAYERS)
def test_every_own_option_is_one_of_the_function(dims: int) -> None:
    """With the same default; `multi_channel` is False as in NVIDIA's layer, where the function looks at the mask."""
    options = {
        name: p.default
        for name, p in inspect.signature(FUNCTIONS[dims]).parameters.items()
        if p.kind is p.KEYWORD_ONLY
    }
    assert options == {name: value for name, value in OWN.items() if name != "return_mask"} | {
        "multi_channel": None
    }


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
def test_a_spread_mask(backend: Backend, dims: int) -> None:
    """`multi_channel=True` takes a mask with one channel as well, and its windows count them all."""
    x, mask = images(backend, dims)
    many = LAYERS[dims][0](4, 6, 3, padding=1, multi_channel=True, return_mask=True, backend=backend.name)
    many = many.to(backend.device)
    spread, whole = many(x, mask), many(x, mask.expand(x.shape).clone())
    torch.testing.assert_close(spread.output, whole.output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(spread.new_mask, whole.new_mask)
    assert spread.new_mask.shape[1] == 6


def test_default_layer_refuses_a_mask_of_many_channels(backend: Backend) -> None:
    x, mask = images(backend, 2, "nc")
    layer = ik.nn.PartialConv2d(4, 6, 3, backend=backend.name).to(backend.device)
    with pytest.raises(ValueError, match="mask has 4 channels and multi_channel is False"):
        layer(x, mask)


@pytest.mark.parametrize("dims", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_of_a_plain_convolution(backend: Backend, dims: int, bias: bool) -> None:
    """Both ways, strictly; a checkpoint is `weight` and `bias`."""
    ours, plain = LAYERS[dims]
    source, target = plain(4, 6, 3, bias=bias), plain(4, 6, 3, bias=bias)
    layer = ours(4, 6, 3, bias=bias, padding=1, backend=backend.name)
    layer.load_state_dict(source.state_dict(), strict=True)
    target.load_state_dict(layer.state_dict(), strict=True)
    assert list(layer.state_dict()) == (["weight", "bias"] if bias else ["weight"])
    assert not list(layer.buffers())
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        assert same_bits(a, b)
    x, mask = images(backend, dims)
    case = Case(size=tuple(x.shape))
    want = definition(case, x.cpu(), source.weight, source.bias, mask.cpu()).output
    got = layer.to(backend.device)(x, mask)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)


def step(layer: nn.Module, x: Any, mask: Any) -> list[Any]:
    layer.zero_grad()
    (output,), (gradient,), _ = evaluate(lambda x: layer(x, mask), [x], (0,))
    layer(x, mask).square().sum().backward()
    return [output, gradient, *(p.grad.clone() for p in layer.parameters())]


def through_pickle(layer: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(layer))


def through_file(layer: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_file])
def test_copies_are_layers_of_their_own(backend: Backend, copied: Any) -> None:
    """With all options, and after a call has left planes behind."""
    x, mask = images(backend)
    layer = ik.nn.PartialConv2d(
        4, 6, 3, padding=1, activation="leaky_relu", negative_slope=0.3, scale_bias=True, backend=backend.name
    ).to(backend.device)
    before = step(layer, x, mask)
    twin = copied(layer)
    assert {name: getattr(twin, name) for name in OWN} == {name: getattr(layer, name) for name in OWN}
    for got, want in zip(step(twin, x, mask), before, strict=True):
        assert same_bits(got, want)
    with torch.no_grad():
        twin.weight.zero_()
    assert layer.weight.any()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_channels_last_module(kernel: Backend, layout: torch.memory_format) -> None:
    """`.to(memory_format=torch.channels_last)` alone makes outputs and gradients of the weight channels_last."""
    x, mask = images(kernel)
    layer = ik.nn.PartialConv2d(4, 6, 3, padding=1, backend=kernel.name).to(
        kernel.device, memory_format=layout
    )
    output = layer(x, mask)
    output.sum().backward()
    assert output.is_contiguous(memory_format=layout)
    assert layer.weight.grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_module(backend: Backend, dtype: torch.dtype) -> None:
    """`.to(dtype)`: parameters and images in half, the new mask in float32."""
    x, mask = images(backend)
    layer = ik.nn.PartialConv2d(4, 6, 3, return_mask=True, backend=backend.name).to(backend.device, dtype)
    output, new_mask = layer(x.to(dtype), mask.to(dtype))
    assert output.dtype == dtype and new_mask.dtype == torch.float32
    output.sum().backward()
    assert layer.weight.grad.dtype == layer.bias.grad.dtype == dtype


def test_frozen_parameters(backend: Backend) -> None:
    x, mask = images(backend)
    layer = ik.nn.PartialConv2d(4, 6, 3, backend=backend.name).to(backend.device)
    layer.weight.requires_grad_(False)
    layer(x.requires_grad_(), mask).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad is not None and x.grad is not None
    layer.requires_grad_(False)
    assert not layer(x.detach(), mask).requires_grad


def test_training_moves_the_parameters(backend: Backend) -> None:
    """A layer in a Sequential, an optimizer, masks that change from step to step in place."""
    rng = generator(4)
    torch.manual_seed(1)
    first = ik.nn.PartialConv2d(3, 8, 3, padding=1, activation="relu", return_mask=True, backend=backend.name)
    second = ik.nn.PartialConv2d(8, 3, 3, padding=1, backend=backend.name)
    model = nn.ModuleList([first, second]).to(backend.device)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    picture = torch.rand(1, 3, 12, 12, generator=rng).to(backend.device)
    mask = torch.ones(1, 1, 12, 12, device=backend.device)
    losses = []
    for i in range(10 if INTERPRETING else 30):
        mask.fill_(1)
        mask[..., i % 6 : i % 6 + 4, 3:7] = 0
        value, seen = first(picture * mask, mask)
        loss = (second(value, seen) - picture).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < (0.5 if INTERPRETING else 0.25) * losses[0]


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


def test_padding_mode_by_position() -> None:
    """Ninth argument of torch.nn.Conv2d."""
    assert ik.nn.PartialConv2d(4, 6, 3, 1, 1, 1, 1, True, "zeros").padding_mode == "zeros"
    with pytest.raises(ValueError, match="padding_mode"):
        ik.nn.PartialConv2d(4, 6, 3, 1, 1, 1, 1, True, "reflect")


@pytest.mark.parametrize("dims", LAYERS)
def test_bad_backend_names_itself(dims: int) -> None:
    x, mask = images(Backend("reference", "cpu"), dims)
    with pytest.raises(ValueError, match=r"backend.*'gpu'"):
        LAYERS[dims][0](4, 6, 3, backend="gpu")(x, mask)
