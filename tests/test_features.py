"""FrozenTrunk: taps, preprocessing, layouts, autocast."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

import inpaint_kernels as ik
from inpaint_kernels.features import FrozenTrunk

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


def small_net(seed: int = 0) -> nn.Sequential:
    """A VGG of two blocks, in-place activations included."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class Hooked(nn.Module):
    """The same network behind a forward of its own, so that it can only be tapped by hooks."""

    def __init__(self, net: nn.Sequential) -> None:
        super().__init__()
        self.first, self.second = net[:4], net[4:]

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)).mean((2, 3))


def names_in_hooked(taps: Sequence[str]) -> list[str]:
    return [f"first.{tap}" if int(tap) < 4 else f"second.{tap}" for tap in taps]


def outputs_of(net: nn.Sequential, x: Tensor) -> list[Tensor]:
    """Every child's output, which nothing afterwards can change."""
    found = []
    for child in net:
        x = child(x.clone())
        found.append(x.clone())
    return found


def images(*size: int) -> Tensor:
    return torch.rand(*(size or (2, 3, 12, 10)), generator=torch.Generator().manual_seed(1))


TAPS = (("0",), ("0", "1", "2"), ("3", "0"), ("2", "4", "6"), ("4", "4"), ("1", "5"))


@pytest.mark.parametrize("taps", TAPS, ids="-".join)
@pytest.mark.parametrize("kind", ["sequential", "hooked"])
def test_taps(taps: tuple[str, ...], kind: str) -> None:
    """In the order asked for, and what the submodule returned, whatever the in-place ReLU after it did."""
    x = images()
    want = [outputs_of(small_net(), x)[int(tap)] for tap in taps]
    hooked = kind == "hooked"
    module = Hooked(small_net()) if hooked else small_net()
    trunk = FrozenTrunk(module, names_in_hooked(taps) if hooked else taps)
    for _ in range(2):
        for got, expected in zip(trunk(x), want, strict=True):
            assert torch.equal(got, expected)
    assert torch.equal(x, images())


@pytest.mark.parametrize("taps", TAPS, ids="-".join)
def test_gradients_of_both_kinds(taps: tuple[str, ...]) -> None:
    found = []
    for trunk in (
        FrozenTrunk(small_net(), taps),
        FrozenTrunk(Hooked(small_net()), names_in_hooked(taps)),
    ):
        x = images().requires_grad_()
        sum((f * f).sum() for f in trunk(x)).backward()
        found.append(x.grad)
    x = images().requires_grad_()
    outputs = outputs_of(small_net(), x)
    sum((outputs[int(tap)] ** 2).sum() for tap in taps).backward()
    for got in found:
        torch.testing.assert_close(got, x.grad)


class InPlaceInside(nn.Module):
    """An in-place activation that does not show from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


BEHIND_A_TAP = {
    "nested": lambda: [InPlaceInside()],
    "nested-sequential": lambda: [nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(6, 6, 1))],
    "identity": lambda: [nn.Identity(), nn.ReLU(inplace=True)],
    "dropout": lambda: [nn.Dropout(), nn.ReLU(inplace=True)],
    "leaky": lambda: [nn.LeakyReLU(inplace=True)],
    "hardtanh": lambda: [nn.ReLU6(inplace=True)],
}


@pytest.mark.parametrize("kind", BEHIND_A_TAP)
def test_in_place_work_reaches_no_tap(kind: str) -> None:
    """However it hides."""
    torch.manual_seed(0)
    conv, behind = nn.Conv2d(3, 6, 3), BEHIND_A_TAP[kind]()
    trunk = FrozenTrunk(nn.Sequential(conv, *behind, nn.Conv2d(6, 4, 1)), ["0", str(1 + len(behind))])
    x = images()
    assert torch.equal(trunk(x)[0], conv(x))


class Wrapped(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("front", [k for k in BEHIND_A_TAP if k != "nested-sequential"])
@pytest.mark.parametrize("kind", ["sequential", "hooked"])
def test_in_place_work_reaches_no_image(front: str, kind: str) -> None:
    first = BEHIND_A_TAP[front]()
    net = nn.Sequential(*first, nn.Conv2d(3, 6, 3))
    last = str(len(first))
    trunk = FrozenTrunk(net, [last]) if kind == "sequential" else FrozenTrunk(Wrapped(net), [f"net.{last}"])
    x = images() - 0.5
    before = x.clone()
    trunk(x)
    assert torch.equal(x, before)
    trunk(x.requires_grad_())[0].sum().backward()
    assert x.grad is not None


def test_one_module_in_several_places() -> None:
    """A ReLU without parameters is often one object in a whole network."""
    torch.manual_seed(0)
    relu = nn.ReLU(inplace=True)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), relu, nn.Conv2d(6, 6, 3), relu, nn.Conv2d(6, 4, 3))
    x = images()
    want = outputs_of(net, x)
    for got, expected in zip(FrozenTrunk(net, ["1", "4"])(x), (want[1], want[4]), strict=True):
        assert torch.equal(got, expected)


class Reversed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for child in reversed(list(self)):
            x = child(x)
        return x


def test_a_sequential_with_its_own_forward() -> None:
    net = Reversed(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(3, 6, 1))
    x = images()
    first, last = FrozenTrunk(net, ["2", "0"])(x)
    torch.testing.assert_close(first, net[2](x))
    torch.testing.assert_close(last, net(x))


def count_calls(trunk: FrozenTrunk) -> dict[str, int]:
    calls: dict[str, int] = {}
    for name, module in trunk.features.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(
                lambda _m, _i, name=name: calls.__setitem__(name, calls.get(name, 0) + 1)
            )
    return calls


@pytest.mark.parametrize("kind", ["sequential", "hooked"])
def test_stops_after_the_last_tap(kind: str) -> None:
    hooked = kind == "hooked"
    trunk = FrozenTrunk(
        Hooked(small_net()) if hooked else small_net(), names_in_hooked(["4", "1"]) if hooked else ["4", "1"]
    )
    calls = count_calls(trunk)
    trunk(images())
    assert calls == dict.fromkeys(names_in_hooked("01234") if hooked else "01234", 1)


def test_errors_inside_the_network_pass_through_and_leave_no_hook() -> None:
    trunk = FrozenTrunk(Hooked(small_net()), ["second.5"])
    with pytest.raises(RuntimeError, match="channels"):
        trunk(torch.rand(1, 5, 8, 8))
    assert not any(m._forward_hooks for m in trunk.features.modules())
    trunk(images())
    assert not any(m._forward_hooks for m in trunk.features.modules())


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


PREPROCESSING = {
    "none": lambda x: x,
    "imagenet": lambda x: (x - MEAN.to(x)) / STD.to(x),
    "imagenet_tanh": lambda x: ((x + 1) / 2 - MEAN.to(x)) / STD.to(x),
    "lpips": lambda x: (
        (x - x.new_tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        / x.new_tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    ),
}


@pytest.mark.parametrize("name", PREPROCESSING)
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_preprocessing(name: str, channels: int, dtype: torch.dtype) -> None:
    """Of the values the images hold, in float32; gray images count as three equal channels."""
    x = (images(2, channels, 6, 5) * 2 - 1).to(dtype)
    got = FrozenTrunk(nn.Sequential(nn.Identity()), ["0"], name)(x)[0]
    want = PREPROCESSING[name](x.double() if name == "none" else x.double().expand(-1, 3, -1, -1))
    assert got.dtype == (dtype if name == "none" else torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["imagenet", "imagenet_tanh", "lpips"])
def test_preprocessing_in_float64(name: str) -> None:
    x = images(2, 3, 6, 5).double()
    got = FrozenTrunk(nn.Sequential(nn.Identity()), ["0"], name).double()(x)[0]
    constants = {"imagenet": (0.485, 0.229), "imagenet_tanh": (-0.03, 0.458), "lpips": (-0.03, 0.458)}
    mean, std = constants[name]
    torch.testing.assert_close(got[:, 0], (x[:, 0] - mean) / std, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["imagenet", "lpips"])
def test_gradient_of_gray_images(name: str) -> None:
    x = images(2, 1, 6, 5).requires_grad_()
    weights = torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1)
    (FrozenTrunk(nn.Sequential(nn.Identity()), ["0"], name)(x)[0] * weights).sum().backward()
    std = STD if name == "imagenet" else torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    torch.testing.assert_close(x.grad, (weights / std).sum().expand_as(x))


@pytest.mark.parametrize("kind", ["sequential", "hooked"])
def test_channels_last(kind: str) -> None:
    taps = ["1", "4"]
    x = images()
    want = FrozenTrunk(small_net(), taps, "imagenet")(x)
    hooked = kind == "hooked"
    trunk = FrozenTrunk(
        Hooked(small_net()) if hooked else small_net(),
        names_in_hooked(taps) if hooked else taps,
        "imagenet",
        channels_last=True,
    )
    for got, expected in zip(trunk(x), want, strict=True):
        assert got.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    """Convolutions in the lower precision, preprocessing before it, gradients in the dtype of the images."""
    taps = ["1", "4"]
    x = images().requires_grad_()
    want = FrozenTrunk(small_net(), taps, "imagenet")(x)
    found = FrozenTrunk(small_net(), taps, "imagenet", autocast=dtype)(x)
    for got, expected in zip(found, want, strict=True):
        assert got.dtype == dtype
        error = (got.float() - expected).norm() / expected.norm()
        assert error < 2 * torch.finfo(dtype).eps
    (gradient,) = torch.autograd.grad(sum(f.float().sum() for f in found), x)
    assert gradient.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("kind", ["sequential", "hooked"])
def test_empty_batch(kind: str) -> None:
    trunk = (
        FrozenTrunk(small_net(), ["4"], "imagenet")
        if kind == "sequential"
        else FrozenTrunk(Hooked(small_net()), ["second.4"], "imagenet")
    )
    assert trunk(images(0, 3, 8, 8))[0].shape == (0, 6, 4, 4)


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


def test_moves_with_the_module() -> None:
    """The constants follow `.to()`, and none of them is in the state dict."""
    trunk = FrozenTrunk(small_net(), ["4"], "imagenet")
    assert list(trunk.state_dict()) == [f"features.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")]
    assert trunk.to("meta")(torch.rand(1, 3, 8, 8, device="meta"))[0].device.type == "meta"


def test_public_names() -> None:
    assert ik.features.FrozenTrunk is FrozenTrunk
    assert ik.features.vgg16.__module__.startswith("inpaint_kernels")
