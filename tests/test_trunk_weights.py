"""vgg16, vgg19, alexnet: torchvision's structure, weights from files, and files that are not what they should be."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaint_kernels.features import alexnet, vgg16, vgg19

# Output channels of the convolutions, each with a ReLU behind it, and M for pooling; from torchvision 0.20.
STACKS = {
    vgg16: "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
    vgg19: "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M",
    alexnet: "64 M 192 M 384 256 256 M",
}
# (kernel, stride, padding)
KERNELS = {alexnet: [(11, 4, 2), (5, 1, 2), *[(3, 1, 1)] * 3]}
POOLING = {alexnet: (3, 2)}  # (kernel, stride)
NETS = {load.__name__: load for load in STACKS}
every_net = pytest.mark.parametrize("net", NETS)


def convolutions(net: str) -> dict[int, tuple[int, ...]]:
    """{child: shape of its weight}"""
    load = NETS[net]
    kernels = iter(KERNELS.get(load, [(3, 1, 1)] * 16))
    shapes: dict[int, tuple[int, ...]] = {}
    child, channels = 0, 3
    for layer in STACKS[load].split():
        if layer == "M":
            child += 1
            continue
        kernel, _, _ = next(kernels)
        shapes[child] = (int(layer), channels, kernel, kernel)
        child, channels = child + 2, int(layer)
    return shapes


CLASSIFIER = {"classifier.6.weight": (1000, 4096), "classifier.6.bias": (1000,)}


def state_dict(net: str) -> dict[str, Tensor]:
    """All keys and shapes of the official file, each tensor one number expanded: a file of a few kilobytes."""
    shapes: dict[str, tuple[int, ...]] = {}
    for child, shape in convolutions(net).items():
        shapes |= {f"features.{child}.weight": shape, f"features.{child}.bias": shape[:1]}
    return {
        key: torch.full((1,), 0.01 + 0.001 * i).expand(shape)
        for i, (key, shape) in enumerate((shapes | CLASSIFIER).items())
    }


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@every_net
def test_keys_and_shapes_are_torchvisions(net: str) -> None:
    trunk = NETS[net](("pool5",), weights=None)
    shapes = {key: tuple(value.shape) for key, value in trunk.state_dict().items()}
    assert shapes == {key: value.shape for key, value in state_dict(net).items() if key not in CLASSIFIER}


@every_net
def test_layers_are_torchvisions(net: str) -> None:
    """Kinds, strides, paddings and pooling, which no state dict tells."""
    load = NETS[net]
    children = list(load(("pool5",), weights=None).features)
    kinds = "".join("M" if layer == "M" else "CR" for layer in STACKS[load].split())
    assert "".join(type(m).__name__[0] for m in children) == kinds
    kernels = iter(KERNELS.get(load, [(3, 1, 1)] * 16))
    for module in children:
        if isinstance(module, torch.nn.MaxPool2d):
            assert (module.kernel_size, module.stride) == POOLING.get(load, (2, 2))
            assert (module.padding, module.ceil_mode) == (0, False)
        elif isinstance(module, torch.nn.Conv2d):
            assert (module.kernel_size[0], module.stride[0], module.padding[0]) == next(kernels)


def test_layers_by_name_and_number() -> None:
    names = {
        vgg16: "relu1_1=1 pool1=4 relu2_2=8 pool2=9 relu3_3=15 pool3=16",
        vgg19: "relu1_1=1 relu2_1=6 relu3_1=11 relu4_1=20 relu5_1=29 conv4_2=21",
        alexnet: "relu1=1 relu2=4 relu3=7 relu4=9 relu5=11",
    }
    for load, known in names.items():
        by_name, by_number = zip(*(layer.split("=") for layer in known.split()), strict=True)
        for taps in (by_name, by_number):
            assert load(taps, weights=None).taps == by_number
    with pytest.raises(ValueError, match=r"taps.*conv9_9.*vgg16 has conv1_1"):
        vgg16(("conv9_9",), weights=None)
    with pytest.raises(ValueError, match=r"taps.*31.*0 to 30"):
        vgg16(("31",), weights=None)


@every_net
@pytest.mark.parametrize("as_string", [True, False])
def test_weights_from_a_file(tmp_path: Path, net: str, as_string: bool) -> None:
    """Every parameter, in its place; what the trunk does not use may be there or not."""
    content = state_dict(net)
    path = saved(tmp_path / "net.pth", content)
    for tap in ("pool5", "1"):
        trunk = NETS[net]((tap,), weights=str(path) if as_string else path)
        for key, value in trunk.state_dict().items():
            assert torch.equal(value, content[key])
        assert not any(p.requires_grad for p in trunk.parameters())


def test_half_weights_are_read_into_float32(tmp_path: Path) -> None:
    content = {key: value.half() for key, value in state_dict("alexnet").items()}
    trunk = alexnet(("relu1",), weights=saved(tmp_path / "net.pth", content))
    assert all(p.dtype == torch.float32 for p in trunk.parameters())
    assert torch.equal(trunk.features[0].weight, content["features.0.weight"].float())


ADVICE = r"(.|\n)*weights=None for random"


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match="weights.*" + str(path) + ADVICE):
            vgg16(weights=path)


@pytest.mark.parametrize("content", ["truncated", "text", "empty"])
def test_damaged_file(tmp_path: Path, content: str) -> None:
    path = saved(tmp_path / "net.pth", state_dict("vgg16"))
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "text": b"<html>404</html>", "empty": b""}[content]
    )
    with pytest.raises(ValueError, match="weights.*" + str(path) + ADVICE):
        vgg16(weights=path)


class Malicious:
    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.marker,))


@pytest.mark.parametrize("protocol", ["zip", "pickle"])
def test_code_in_a_file_never_runs(tmp_path: Path, protocol: str) -> None:
    marker = tmp_path / "ran"
    path = tmp_path / "net.pth"
    content = state_dict("alexnet") | {"features.0.weight": Malicious(str(marker))}
    if protocol == "zip":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"x": Malicious(str(marker))}))
    with pytest.raises(ValueError, match="weights.*" + str(path) + ADVICE):
        alexnet(weights=path)
    assert not marker.exists()


@pytest.mark.parametrize("content", [3, b"net.pth", torch.zeros(3), [("features.0.weight", torch.zeros(3))]])
def test_weights_of_a_wrong_type(content: Any) -> None:
    with pytest.raises(TypeError, match="weights: got " + type(content).__name__ + ADVICE):
        vgg16(weights=content)


def test_a_name_that_is_no_file() -> None:
    with pytest.raises(FileNotFoundError, match="weights: no file 'ab'" + ADVICE):
        vgg16(weights="ab")


def test_a_state_dict_itself() -> None:
    """For weights that are in memory already, torchvision's or others."""
    content = state_dict("vgg16")
    for key, value in vgg16(("pool3",), weights=content).state_dict().items():
        assert torch.equal(value, content[key])
    with pytest.raises(ValueError, match="weights: the state dict holds vgg19 weights, not vgg16's" + ADVICE):
        vgg16(("pool1",), weights=state_dict("vgg19"))


def vgg16_but(key: str, value: Any) -> dict[str, Any]:
    return state_dict("vgg16") | {f"features.{key}": value}


def vgg16_without(words: str) -> dict[str, Tensor]:
    return {key: value for key, value in state_dict("vgg16").items() if words not in key}


# (content, what the error says of the file)
WRONG_CONTENT: dict[str, tuple[Callable[[], Any], str]] = {
    "tensor": (lambda: torch.zeros(3), "is a Tensor, not a state dict"),
    "list": (lambda: [torch.zeros(3)], "is a list, not a state dict"),
    "no keys": (dict, "no keys under 'features.', it holds nothing"),
    "wrapped": (
        lambda: {"state_dict": state_dict("vgg16")},
        "no keys under 'features.', it holds 'state_dict'",
    ),
    "without prefix": (
        lambda: {key.removeprefix("features."): value for key, value in state_dict("vgg16").items()},
        "no keys under 'features.', it holds '0.weight', '0.bias', '2.weight'",
    ),
    "key missing": (lambda: vgg16_without("s.12.bias"), "no 'features.12.bias'"),
    "not a tensor": (lambda: vgg16_but("0.weight", 3), "holds a int under 'features.0.weight'"),
    "wrong shape": (
        lambda: vgg16_but("5.weight", torch.zeros(128, 64, 5, 5)),
        r"'features.5.weight' of shape \(128, 64, 5, 5\), vgg16 needs \(128, 64, 3, 3\)",
    ),
    "one channel": (
        lambda: vgg16_but("0.weight", torch.zeros(64, 1, 3, 3)),
        r"'features.0.weight' of shape \(64, 1, 3, 3\), vgg16 needs \(64, 3, 3, 3\)",
    ),
    "alexnet": (
        lambda: state_dict("alexnet"),
        r"holds alexnet weights, not vgg16's; alexnet\(\) takes them",
    ),
    "vgg19": (lambda: state_dict("vgg19"), r"holds vgg19 weights, not vgg16's; vgg19\(\) takes them"),
    "batch norm": (lambda: vgg16_but("1.running_mean", torch.zeros(64)), "batch normalisation"),
    "last layer missing": (lambda: vgg16_without(".28."), "no 'features.28.weight'"),
    "one layer more": (
        lambda: vgg16_but("31.weight", torch.zeros(1)),
        "has 'features.31.weight', which vgg16 has not",
    ),
    "last layer not a tensor": (
        lambda: vgg16_but("28.bias", None),
        "holds a NoneType under 'features.28.bias'",
    ),
}


@pytest.mark.parametrize("content", WRONG_CONTENT)
@pytest.mark.parametrize("tap", ["relu1_1", "pool3", "pool5"])
def test_another_file(tmp_path: Path, content: str, tap: str) -> None:
    """Whatever part is used. The first convolutions of VGG19 fit into VGG16: wrong numbers, if nobody looked on."""
    make, words = WRONG_CONTENT[content]
    path = saved(tmp_path / "net.pth", make())
    with pytest.raises(ValueError, match=f"weights: '{path}' .*{words}" + ADVICE):
        vgg16((tap,), weights=path)


@pytest.mark.parametrize("tap", ["relu1_1", "relu3_1", "relu5_1"])
def test_vgg16_is_no_vgg19(tmp_path: Path, tap: str) -> None:
    with pytest.raises(ValueError, match=r"weights.*holds vgg16 weights, not vgg19's"):
        vgg19((tap,), weights=saved(tmp_path / "net.pth", state_dict("vgg16")))


OFFICIAL = {
    "vgg16": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "vgg19": "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth",
    "alexnet": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
}


@every_net
def test_default_weights_come_from_torchs_loader(monkeypatch: pytest.MonkeyPatch, net: str) -> None:
    """From the official address, its checksum verified, without running code."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def loader(url: str, **options: Any) -> dict[str, Tensor]:
        calls.append((url, options))
        return state_dict(net)

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", loader)
    trunk = NETS[net](("pool5",))
    assert torch.equal(trunk.features[0].weight, state_dict(net)["features.0.weight"])
    (url, options), *rest = calls
    assert not rest
    assert url == OFFICIAL[net]
    assert options["check_hash"] is True
    assert options["weights_only"] is True


def test_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def loader(url: str, **_: Any) -> dict[str, Tensor]:
        raise OSError("Name or service not known")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", loader)
    with pytest.raises(RuntimeError, match="vgg19.*Name or service not known" + ADVICE):
        vgg19()


@every_net
def test_torchvision_agrees(net: str) -> None:
    """Where it is installed."""
    theirs = getattr(pytest.importorskip("torchvision.models"), net)(weights=None).eval()
    trunk = NETS[net](("pool5",), weights=theirs.state_dict(), preprocess="none")
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(trunk(x)[0], theirs.features(x))
