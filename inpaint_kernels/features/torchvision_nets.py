"""VGG16, VGG19 and AlexNet feature stacks with torchvision's layer numbering and state-dict keys."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .trunk import FrozenTrunk

Weights = str | os.PathLike[str] | Mapping[str, Tensor]

# A number is a 3 x 3 convolution of so many channels, a tuple (channels, kernel, stride, padding) another one, "M" a
# pooling. A ReLU follows every convolution.
_CONFIGS: dict[str, tuple[Any, ...]] = {
    "vgg16": (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
    "vgg19": (
        *(64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M"),
        *(512, 512, 512, 512, "M", 512, 512, 512, 512, "M"),
    ),
    "alexnet": ((64, 11, 4, 2), "M", (192, 5, 1, 2), "M", 384, 256, 256, "M"),
}
# The hash in each name is the start of the file's SHA-256, which torch's loader verifies.
_URL = "https://download.pytorch.org/models/"
_FILES = {
    "vgg16": "vgg16-397923af.pth",
    "vgg19": "vgg19-dcbb9e9d.pth",
    "alexnet": "alexnet-owt-7be5be79.pth",
}


def _layers(net: str) -> tuple[list[nn.Module], dict[str, str]]:
    """Children and {layer name: child name}, with names as in the papers: conv1_1, relu1_1, pool1 of a VGG, which
    counts by blocks that end with a pooling, and conv1, relu1, pool1, conv2, ..., pool5 of AlexNet."""
    layers: list[nn.Module] = []
    names: dict[str, str] = {}
    is_vgg = net != "alexnet"
    channels, number, block, index = 3, 0, 1, 0
    for item in _CONFIGS[net]:
        if item == "M":
            names[f"pool{block if is_vgg else number}"] = str(len(layers))
            layers.append(nn.MaxPool2d(2 if is_vgg else 3, 2))
            block, index = block + 1, 0
            continue
        width, kernel, stride, padding = (item, 3, 1, 1) if isinstance(item, int) else item
        number, index = number + 1, index + 1
        name = f"{block}_{index}" if is_vgg else str(number)
        names[f"conv{name}"] = str(len(layers))
        names[f"relu{name}"] = str(len(layers) + 1)
        layers += [nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU(inplace=True)]
        channels = width
    return layers, names


def _shapes(net: str) -> dict[str, tuple[int, ...]]:
    """{key: shape} of everything under "features." in torchvision's file."""
    with torch.device("meta"):
        features = nn.Sequential(*_layers(net)[0])
    return {f"features.{key}": tuple(value.shape) for key, value in features.state_dict().items()}


def _advice(net: str) -> str:
    return (
        f"Pass a state dict with torchvision's keys, or the path of one (for example {_FILES[net]} from {_URL}), "
        "or weights=None for random values"
    )


def _loaded(net: str, weights: Weights) -> tuple[str, Any]:
    """(what was given, as an error names it; its content)."""
    if isinstance(weights, Mapping):
        return "weights: the state dict", weights
    if isinstance(weights, str) and weights == "default":
        try:
            loaded = torch.hub.load_state_dict_from_url(
                _URL + _FILES[net], map_location="cpu", check_hash=True, weights_only=True
            )
        except Exception as error:
            raise RuntimeError(
                f"weights: those of {net} could not be loaded: {error}. {_advice(net)}"
            ) from error
        return f"weights: {_FILES[net]!r}", loaded
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


def _mismatch(net: str, content: dict[str, Any]) -> str | None:
    """What is wrong with a file for `net`, as the rest of a sentence."""
    values = {key: value for key, value in content.items() if str(key).startswith("features.")}
    if not values:
        first = ", ".join(map(repr, list(content)[:3])) or "nothing"
        return f"has no keys under 'features.', it holds {first}"
    for key, value in values.items():
        if not isinstance(value, Tensor):
            return f"holds a {type(value).__name__} under {key!r}, expected a Tensor"
    shapes = {key: tuple(value.shape) for key, value in values.items()}
    want = _shapes(net)
    if shapes == want:
        return None
    for other in _FILES:
        if shapes == _shapes(other):
            return f"holds {other} weights, not {net}'s; {other}() takes them"
    if any(key.endswith(".running_mean") for key in shapes):
        return f"holds a network with batch normalisation, {net} has none"
    for key, shape in want.items():
        if key not in shapes:
            return f"has no {key!r}, it does not hold the whole {net}"
        if shapes[key] != shape:
            return f"has {key!r} of shape {shapes[key]}, {net} needs {shape}"
    return f"has {next(key for key in shapes if key not in want)!r}, which {net} has not"


def _load(net: str, features: nn.Sequential, weights: Weights) -> None:
    """The whole file must fit, not only the layers that are used: the first ones of vgg16 and vgg19 are alike."""
    source, content = _loaded(net, weights)
    if not isinstance(content, Mapping):
        raise ValueError(f"{source} is a {type(content).__name__}, not a state dict. {_advice(net)}")
    wrong = _mismatch(net, dict(content))
    if wrong is not None:
        raise ValueError(f"{source} {wrong}. {_advice(net)}")
    features.load_state_dict({key: content[f"features.{key}"] for key in features.state_dict()})


def _trunk(
    net: str, taps: Sequence[str], weights: Weights | None, preprocess: str, **options: Any
) -> FrozenTrunk:
    layers, names = _layers(net)
    if isinstance(taps, str):
        raise TypeError(f"taps: got the string {taps!r}, expected a sequence of names: ({taps!r},)")
    children = [names.get(tap, tap) for tap in taps]
    numbers = [str(place) for place in range(len(layers))]
    unknown = [tap for tap, child in zip(taps, children, strict=True) if child not in numbers]
    if unknown or not taps:
        raise ValueError(
            f"taps: {unknown or 'empty'}; {net} has {', '.join(names)} and 0 to {len(layers) - 1}"
        )
    features = nn.Sequential(*layers[: max(map(int, children)) + 1])
    if weights is not None:
        _load(net, features, weights)
    trunk = FrozenTrunk(features, children, preprocess, **options)
    trunk.names = list(taps)
    return trunk


def vgg16(
    taps: Sequence[str] = ("pool1", "pool2", "pool3"),
    *,
    weights: Weights | None = "default",
    preprocess: str = "imagenet",
    channels_last: bool | None = False,
    autocast: torch.dtype | None = None,
) -> FrozenTrunk:
    """Frozen VGG16 features, run no further than the last tap.

    Args:
        taps: "conv1_1", "relu1_1", "pool1", ... or torchvision's numbers ("4" is ``features[4]``).
        weights: "default" loads the ImageNet weights with torch's own loader (from its cache, or from the
            official address; SHA-256 verified, ``weights_only``); a path, or a state dict itself (such as
            ``torchvision.models.vgg16(weights="DEFAULT").state_dict()``), must have torchvision's keys and shapes
            under ``features.``, all of them, whatever is tapped (further keys are ignored); None keeps random values.
        preprocess: see `FrozenTrunk`; "imagenet" for images in [0, 1], "imagenet_tanh" for images in [-1, 1].
        channels_last: run the network in channels_last; None: on the CPU alone.
        autocast: None, or the dtype to run the network in.

    Returns:
        A `FrozenTrunk`; its forward maps (N, 3, H, W) or (N, 1, H, W) to a list of feature maps.

    Raises FileNotFoundError, TypeError, ValueError or RuntimeError with what to do when the weights cannot be loaded
    or belong to another network, ValueError for an unknown tap.
    Simonyan and Zisserman, "Very Deep Convolutional Networks", 2015; numbering of torchvision.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> trunk = ik.features.vgg16(weights=None)
        >>> [tuple(f.shape) for f in trunk(torch.rand(1, 3, 32, 32))]
        [(1, 64, 16, 16), (1, 128, 8, 8), (1, 256, 4, 4)]
    """
    return _trunk("vgg16", taps, weights, preprocess, channels_last=channels_last, autocast=autocast)


def vgg19(
    taps: Sequence[str] = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"),
    *,
    weights: Weights | None = "default",
    preprocess: str = "imagenet",
    channels_last: bool | None = False,
    autocast: torch.dtype | None = None,
) -> FrozenTrunk:
    """Frozen VGG19 features; arguments, returns and errors as `vgg16`.

    Args:
        taps: "conv1_1", "relu1_1", "pool1", ... or torchvision's numbers.
        weights: "default", a path, a state dict, or None for random values.
        preprocess: see `FrozenTrunk`.
        channels_last: run the network in channels_last; None: on the CPU alone.
        autocast: None, or the dtype to run the network in.

    Returns:
        A `FrozenTrunk`.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> trunk = ik.features.vgg19(("relu2_2",), weights=None, preprocess="none")
        >>> trunk(torch.rand(1, 3, 16, 16))[0].shape
        torch.Size([1, 128, 8, 8])
    """
    return _trunk("vgg19", taps, weights, preprocess, channels_last=channels_last, autocast=autocast)


def alexnet(
    taps: Sequence[str] = ("relu1", "relu2", "relu3", "relu4", "relu5"),
    *,
    weights: Weights | None = "default",
    preprocess: str = "lpips",
    channels_last: bool | None = False,
    autocast: torch.dtype | None = None,
) -> FrozenTrunk:
    """Frozen AlexNet features (the trunk of LPIPS); arguments, returns and errors as `vgg16`.

    Args:
        taps: "conv1", "relu1", "pool1", ... or torchvision's numbers.
        weights: "default", a path, a state dict, or None for random values.
        preprocess: see `FrozenTrunk`; "lpips" for images in [-1, 1].
        channels_last: run the network in channels_last; None: on the CPU alone.
        autocast: None, or the dtype to run the network in.

    Returns:
        A `FrozenTrunk`.

    Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014; numbering of torchvision.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> [tuple(f.shape) for f in ik.features.alexnet(weights=None)(torch.rand(1, 3, 64, 64))]
        [(1, 64, 15, 15), (1, 192, 7, 7), (1, 384, 3, 3), (1, 256, 3, 3), (1, 256, 3, 3)]
    """
    return _trunk("alexnet", taps, weights, preprocess, channels_last=channels_last, autocast=autocast)
