"""FrozenTrunk: preprocessing, layouts, dtypes, autocast, arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from training_checks import ops_called
from trunk_cases import both_kinds, images, relative, small_net, small_trunk

import inpaint_kernels as ik
from inpaint_kernels.features import FrozenTrunk


def test_stays_frozen_and_in_evaluation_mode() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 4, 1)).train()
    trunk = FrozenTrunk(net, ["3"])
    parent = nn.ModuleDict({"trunk": trunk, "other": nn.Dropout()})
    parent.train()
    assert parent["other"].training
    assert not any(m.training for m in trunk.modules())
    trunk.train(True)
    assert not any(m.training for m in trunk.modules())
    assert not any(p.requires_grad for p in trunk.parameters())
    mean = net[1].running_mean.clone()
    x = images().requires_grad_()
    a, b = trunk(x)[0], trunk(x)[0]
    assert torch.equal(a, b)
    assert torch.equal(net[1].running_mean, mean)
    a.sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in trunk.parameters())


IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LPIPS = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


def normalized(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Gray images count as three equal channels."""
    return (x - x.new_tensor(mean).view(1, 3, 1, 1)) / x.new_tensor(std).view(1, 3, 1, 1)


PREPROCESSING: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "imagenet": lambda x: normalized(x, *IMAGENET),
    "imagenet_tanh": lambda x: normalized((x + 1) / 2, *IMAGENET),
    "lpips": lambda x: normalized(x, *LPIPS),
}
NORMALIZATIONS = [name for name in PREPROCESSING if name != "none"]


def alone(name: str) -> FrozenTrunk:
    """A trunk that returns the images as it reads them."""
    return FrozenTrunk(nn.Sequential(nn.Identity()), ["0"], name)


@pytest.mark.parametrize("name", PREPROCESSING)
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_preprocessing(name: str, channels: int, dtype: torch.dtype) -> None:
    """Of the values the images hold, in float32."""
    x = (images(2, channels, 6, 5) * 2 - 1).to(dtype)
    got = alone(name)(x)[0]
    assert got.dtype == (dtype if name == "none" else torch.float32)
    torch.testing.assert_close(got.double(), PREPROCESSING[name](x.double()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", NORMALIZATIONS)
@pytest.mark.parametrize("channels", [3, 1])
def test_constants_have_the_accuracy_of_the_images(name: str, channels: int) -> None:
    """Whatever was done to the trunk: rounding it to half and back must not round them."""
    x = images(2, channels, 6, 5).double()
    want = PREPROCESSING[name](x)
    trunk = alone(name)
    empty = alone(name).to("meta").to_empty(device="cpu")
    for module in (trunk, trunk.half(), trunk.double(), trunk.to(torch.bfloat16).float(), empty):
        torch.testing.assert_close(module(x)[0], want, rtol=1e-15, atol=1e-15)
        torch.testing.assert_close(module(x.float())[0].double(), want, rtol=0, atol=1e-6)


def test_preprocessing_makes_nothing_but_its_result() -> None:
    """No constant is computed or moved in a call, and the images are read once."""
    trunk = FrozenTrunk(nn.Sequential(nn.ReLU()), ["0"], "imagenet")
    x = images()
    assert ops_called(lambda: trunk(x)) <= {
        "aten.addcmul.default",
        "aten.relu.default",
        "aten.expand.default",
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preprocess", ["none", "imagenet"])
def test_half_networks(dtype: torch.dtype, preprocess: str) -> None:
    """Images of any lower precision are converted to that of the weights, behind the preprocessing."""
    x = images().to(dtype)
    want = FrozenTrunk(small_net(), ["4"], preprocess)(x)[0]
    assert want.dtype == torch.float32
    half = FrozenTrunk(small_net(), ["4"], preprocess).to(dtype)
    for given in (x, x.float()):
        got = half(given)[0]
        assert got.dtype == dtype
        assert relative(got, want) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", NORMALIZATIONS)
def test_gradient_of_gray_images(name: str) -> None:
    weights = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    gradients = []
    for read in (lambda x: alone(name)(x)[0], PREPROCESSING[name]):
        x = images(2, 1, 6, 5).requires_grad_()
        gradients += torch.autograd.grad((read(x) * weights).sum(), x)
    torch.testing.assert_close(*gradients)


@both_kinds
def test_channels_last(kind: str) -> None:
    x, taps = images(), ["1", "4"]
    want = FrozenTrunk(small_net(), taps, "imagenet")(x)
    trunk = small_trunk(kind, taps, "imagenet", channels_last=True)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in trunk.parameters() if p.ndim == 4)
    for got, expected in zip(trunk(x), want, strict=True):
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_weights_lie_as_the_images_do() -> None:
    """channels_last=None: channels_last on the CPU, and contiguous where it goes from there."""

    def last(trunk: FrozenTrunk) -> set[bool]:
        weights = [p for p in trunk.parameters() if p.ndim == 4 and p.shape[1] > 1]
        return {p.is_contiguous(memory_format=torch.channels_last) for p in weights}

    trunk = FrozenTrunk(small_net(), ["1", "4"], channels_last=None)
    assert last(trunk) == {True}
    assert last(trunk.to("meta")) == {False}
    assert last(FrozenTrunk(small_net(), ["1", "4"], channels_last=False)) == {False}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Convolutions in the lower precision, preprocessing before it, gradients in the dtype of the images."""
    taps = ["1", "4"]
    x = images().requires_grad_()
    want = FrozenTrunk(small_net(), taps, "imagenet")(x)
    features = FrozenTrunk(small_net(), taps, "imagenet", autocast=dtype)(x)
    for got, expected in zip(features, want, strict=True):
        assert got.dtype == dtype
        assert relative(got, expected) < 2 * torch.finfo(dtype).eps
    (gradient,) = torch.autograd.grad(sum(f.float().sum() for f in features), x)
    assert gradient.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


@both_kinds
def test_empty_batch(kind: str) -> None:
    assert small_trunk(kind, ["4"], "imagenet")(images(0, 3, 8, 8))[0].shape == (0, 6, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((["9"],), "taps.*9.*this module has 0, 1"),
        (([],), "taps.*empty"),
        (([""],), "taps"),
        ((["0"], "vgg"), "preprocess.*'vgg'.*none, imagenet"),
    ],
)
def test_bad_arguments(arguments: tuple[object, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FrozenTrunk(small_net(), *arguments)


def test_bad_types() -> None:
    with pytest.raises(TypeError, match=r"taps.*'4'.*\('4',\)"):
        FrozenTrunk(small_net(), "4")
    with pytest.raises(TypeError, match=r"taps.*'pool1'"):
        ik.features.vgg16("pool1", weights=None)
    pair = nn.Sequential(nn.MaxPool2d(2, return_indices=True))
    with pytest.raises(TypeError, match="taps: '0' returns a tuple"):
        FrozenTrunk(pair, ["0"])(images())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(2, 4, 8, 8), (3, 8, 8)])
def test_bad_images(size: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=r"images has shape.*imagenet.*\(N, 1, H, W\)"):
        FrozenTrunk(small_net(), ["4"], "imagenet")(images(*size).to(dtype))


def stack(*layers: nn.Module) -> FrozenTrunk:
    return FrozenTrunk(nn.Sequential(*layers), [str(len(layers) - 1)])


SMALLEST = {
    "vgg16": (lambda: ik.features.vgg16(weights=None), (8, 8)),
    "vgg16-relu5_1": (lambda: ik.features.vgg16(("relu5_1",), weights=None), (16, 16)),
    "vgg16-relu1_1": (lambda: ik.features.vgg16(("relu1_1",), weights=None), (1, 1)),
    "alexnet": (lambda: ik.features.alexnet(weights=None), (31, 31)),
    "squeezenet": (lambda: ik.features.squeezenet(weights=None), (17, 17)),
    "strided": (lambda: stack(nn.Conv2d(3, 4, (5, 3), (2, 1), dilation=(1, 2))), (5, 5)),
    "same": (lambda: stack(nn.Conv2d(3, 4, 5, padding="same")), (1, 1)),
    "valid": (lambda: stack(nn.Conv2d(3, 4, 5, padding="valid")), (5, 5)),
    "ceil": (lambda: stack(*(nn.MaxPool2d(3, 2, ceil_mode=True) for _ in range(3))), (8, 8)),
    "nested": (lambda: stack(nn.Sequential(nn.AvgPool2d(2), nn.ReLU()), nn.AvgPool2d(3)), (6, 6)),
    # Layers after one whose output size is not known may need more.
    "adaptive": (lambda: stack(nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(8), nn.MaxPool2d(4)), (2, 2)),
}


@pytest.mark.parametrize("kind", SMALLEST)
def test_images_that_are_too_small_are_refused_by_name(kind: str) -> None:
    """And none that torch would take."""
    make, (height, width) = SMALLEST[kind]
    trunk = make()
    assert all(side > 0 for tap in trunk(images(1, 3, height, width)) for side in tap.shape)
    for size in ((height - 1, width), (height, width - 1)):
        if min(size) > 0:
            with pytest.raises(RuntimeError):
                trunk.features(images(1, 3, *size))
            with pytest.raises(ValueError, match=rf"images.*{size[0]}, {size[1]}\).*{height}x{width}"):
                trunk(images(1, 3, *size))


def test_moves_with_the_module() -> None:
    """The constants follow `.to()`, and none of them is in the state dict."""
    trunk = FrozenTrunk(small_net(), ["4"], "imagenet")
    assert list(trunk.state_dict()) == [f"features.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")]
    assert trunk.to("meta")(torch.rand(1, 3, 8, 8, device="meta"))[0].device.type == "meta"
