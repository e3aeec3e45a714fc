"""FrozenTrunk: what a tap returns, whatever stands behind it, and what runs for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training_checks import ops_called
from trunk_cases import (
    Hooked,
    Wrapped,
    both_kinds,
    images,
    names_in_hooked,
    outputs_of,
    small_net,
    small_trunk,
)

import inpaint_kernels as ik
from inpaint_kernels.features import FrozenTrunk

TAPS = (("0",), ("0", "1", "2"), ("3", "0"), ("2", "4", "6"), ("4", "4"), ("1", "5"))


@pytest.mark.parametrize("taps", TAPS, ids="-".join)
@both_kinds
def test_taps(taps: tuple[str, ...], kind: str) -> None:
    """In the order asked for, and what the submodule returned, whatever the in-place ReLU after it did."""
    x = images().requires_grad_()
    outputs = outputs_of(small_net(), x)
    want = [outputs[int(tap)] for tap in taps]
    trunk = small_trunk(kind, taps)
    for _ in range(2):
        features = trunk(x)
        assert all(map(torch.equal, features, want))
        assert torch.equal(x, images())
    gradients = [torch.autograd.grad(sum((f * f).sum() for f in each), x)[0] for each in (features, want)]
    torch.testing.assert_close(*gradients)


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
    net = nn.Sequential(conv, *behind, nn.Conv2d(6, 4, 1)).eval()
    taps = ["0", str(1 + len(behind))]
    x = images().requires_grad_()
    middle = conv(x)
    want = middle, net[1:](middle.clone())
    (exact,) = torch.autograd.grad(sum((f * f).sum() for f in want), x)
    for trunk in (FrozenTrunk(net, taps), FrozenTrunk(Wrapped(net), [f"net.{tap}" for tap in taps])):
        features = trunk(x)
        assert all(map(torch.equal, features, want))
        (gradient,) = torch.autograd.grad(sum((f * f).sum() for f in features), x)
        torch.testing.assert_close(gradient, exact)


@pytest.mark.parametrize("front", [k for k in BEHIND_A_TAP if k != "nested-sequential"])
@both_kinds
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


def repeating_net() -> nn.Sequential:
    """A ReLU without parameters is often one object in a whole network."""
    torch.manual_seed(0)
    relu = nn.ReLU(inplace=True)
    return nn.Sequential(nn.Conv2d(3, 6, 3), relu, nn.Conv2d(6, 6, 3), relu, nn.Conv2d(6, 4, 3))


@pytest.mark.parametrize("taps", ["3", "14", "31", "03"])
def test_one_module_in_several_places(taps: str) -> None:
    """Behind hooks its runs are in the order of its names."""
    net, x = repeating_net(), images()
    want = [outputs_of(net, x)[int(tap)] for tap in taps]
    for trunk in (FrozenTrunk(net, [*taps]), FrozenTrunk(Wrapped(net), [f"net.{tap}" for tap in taps])):
        assert all(map(torch.equal, trunk(x), want))


class Twice(nn.Module):
    """Runs one module twice under a single name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second, *_ = repeating_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(x))))


@pytest.mark.parametrize("taps", [["relu"], ["relu", "second"]])
def test_a_module_with_one_name_is_tapped_in_its_first_run(taps: list[str]) -> None:
    x = images()
    assert torch.equal(FrozenTrunk(Twice(), taps)(x)[0], outputs_of(repeating_net(), x)[1])


class Residual(nn.Module):
    """Changes the tensor in place that a tapped submodule passed through."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.same, self.last = nn.Conv2d(3, 6, 3), nn.Identity(), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x -= 0.5
        value = self.conv(x)
        other = self.same(value)
        value += 1
        return self.last(other)


def test_in_place_arithmetic_of_a_forward() -> None:
    """Neither reaches a tap nor the images, and the network computes what it does on its own."""
    torch.manual_seed(0)
    net = Residual()
    x = images()
    same, last = FrozenTrunk(net, ["same", "last"])(x)
    assert torch.equal(x, images())
    assert torch.equal(same, net.conv(x - 0.5))
    assert torch.equal(last, net(x.clone()))
    leaf = x.clone().requires_grad_()
    FrozenTrunk(net, ["same", "last"])(leaf)[1].sum().backward()
    assert leaf.grad is not None


def nested_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Sequential(nn.Conv2d(6, 6, 3), nn.ReLU(inplace=True)), nn.Conv2d(6, 4, 3)),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 4, 1),
    )


@pytest.mark.parametrize(
    ("taps", "convolutions"),
    [("0.0", 1), ("1.0.0 1.0", 2), ("0 1.0.1 1", 3), ("1 0.0", 3), ("2 1.1 1", 3)],
)
def test_taps_inside_nested_sequentials(taps: str, convolutions: int) -> None:
    """By dotted names, child by child: what runs keeps its names, and the rest is left out."""
    net = nested_net()
    trunk = FrozenTrunk(net, taps.split())
    assert trunk.sequential
    outputs: dict[str, Tensor] = {}
    watched = nested_net()
    for name, module in watched.named_modules():
        module.register_forward_hook(lambda _m, _i, out, name=name: outputs.update({name: out.clone()}))
    x = images()
    watched(x)
    assert all(map(torch.equal, trunk(x), [outputs[tap] for tap in taps.split()]))
    own = {f"features.{key}": value for key, value in net.state_dict().items()}
    state = trunk.state_dict()
    assert len(state) == 2 * convolutions
    assert all(torch.equal(value, own[key]) for key, value in state.items())


class Inherits(nn.Sequential):
    """As torchvision's Conv2dNormActivation: a Sequential in all but its type."""


def test_subclasses_that_inherit_the_forward_run_child_by_child() -> None:
    net = Inherits(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True))
    assert FrozenTrunk(net, ["0"]).sequential
    assert not FrozenTrunk(Reversed(nn.Conv2d(6, 4, 1), nn.Conv2d(3, 6, 1)), ["0"]).sequential
    inside = nn.Sequential(Reversed(nn.Conv2d(6, 4, 1), nn.Conv2d(3, 6, 1)), nn.Conv2d(4, 2, 1))
    x = images()
    for tap, want in (("0.1", inside[0][1](x)), ("1", inside(x))):
        torch.testing.assert_close(FrozenTrunk(inside, [tap])(x)[0], want)
    net.register_forward_pre_hook(lambda _m, inputs: (2 * inputs[0],))
    torch.testing.assert_close(FrozenTrunk(net, ["1"])(x)[0], net(x))


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


@pytest.mark.parametrize(
    ("load", "taps"),
    [
        (ik.features.vgg16, ("conv1_1", "relu1_1", "pool1", "conv2_1", "relu2_1")),
        (ik.features.vgg19, ("conv1_1", "relu1_1", "pool1", "conv2_1", "relu2_1")),
        (ik.features.alexnet, ("conv1", "relu2", "pool2", "conv5")),
    ],
    ids=["vgg16", "vgg19", "alexnet"],
)
@pytest.mark.parametrize("preprocess", ["none", "imagenet"])
def test_the_usual_networks_copy_nothing(
    load: Callable[..., FrozenTrunk], taps: tuple[str, ...], preprocess: str
) -> None:
    trunk = load(taps, weights=None, preprocess=preprocess)
    for requires_grad in (False, True):
        x = images(1, 3, 64, 64).requires_grad_(requires_grad)
        called = ops_called(lambda x=x: trunk(x))
        assert not [op for op in called if "clone" in op or "copy" in op]


@pytest.mark.parametrize(
    ("net", "taps", "options"),
    [
        (small_net, ["0", "1", "4"], {"autocast": torch.bfloat16}),
        (nested_net, ["0", "1.0.0", "2"], {}),
        (nested_net, ["0", "1.0.0", "2"], {"preprocess": "imagenet"}),
        (lambda: nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3), InPlaceInside()), ["1", "2"], {}),
    ],
    ids=["flat-autocast", "nested", "nested-imagenet", "copies"],
)
def test_sequential_trunks_compile_to_one_graph(
    net: Callable[[], nn.Module], taps: list[str], options: dict[str, Any]
) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    trunk = FrozenTrunk(net(), taps, **options)
    compiled = torch.compile(trunk, fullgraph=True, backend="aot_eager")
    x = images().requires_grad_()
    want, features = trunk(x), compiled(x)
    torch.testing.assert_close(features, want)
    gradients = [torch.autograd.grad(sum(f.float().sum() for f in fs), x)[0] for fs in (features, want)]
    torch.testing.assert_close(*gradients)
    assert torch.equal(x.detach(), images())


@both_kinds
def test_stops_after_the_last_tap(kind: str) -> None:
    trunk = small_trunk(kind, ["4", "1"])
    calls: Counter[str] = Counter()
    for name, module in trunk.features.named_modules():
        if not list(module.children()):
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    trunk(images())
    assert calls == dict.fromkeys(names_in_hooked("01234") if kind == "hooked" else "01234", 1)


def test_errors_inside_the_network_pass_through_and_leave_no_hook() -> None:
    trunk = FrozenTrunk(Hooked(small_net()), ["second.5"])
    with pytest.raises(RuntimeError, match="channels"):
        trunk(torch.rand(1, 5, 8, 8))
    assert not any(m._forward_hooks for m in trunk.features.modules())
    trunk(images())
    assert not any(m._forward_hooks for m in trunk.features.modules())
