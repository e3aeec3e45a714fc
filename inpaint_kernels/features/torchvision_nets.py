"""VGG16, VGG19 and AlexNet feature stacks with torchvision's layer numbering and state-dict keys."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .trunk import FrozenTrunk

_VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
_VGG19 = (
    *(64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M"),
    *(512, 512, 512, 512, "M", 512, 512, 512, 512, "M"),
)
# The hash in each name is the start of the file's SHA-256, which torch's loader verifies.
_URL = "https://download.pytorch.org/models/"
_FILES = {
    "vgg16": "vgg16-397923af.pth",
    "vgg19": "vgg19-dcbb9e9d.pth",
    "alexnet": "alexnet-owt-7be5be79.pth",
}


def _vgg_layers(config: Sequence[int | str]) -> tuple[list[nn.Module], dict[str, str]]:
    """Children and {layer name: child name}, with names as in the papers: conv1_1, relu1_1, pool1."""
    layers: list[nn.Module] = []
    names: dict[str, str] = {}
    channels, block, index = 3, 1, 1
    for item in config:
        if isinstance(item, str):
            names[f"pool{block}"] = str(len(layers))
            layers.append(nn.MaxPool2d(2, 2))
            block, index = block + 1, 1
            continue
        names[f"conv{block}_{index}"] = str(len(layers))
        names[f"relu{block}_{index}"] = str(len(layers) + 1)
        layers += [nn.Conv2d(channels, item, 3, padding=1), nn.ReLU(inplace=True)]
        channels, index = item, index + 1
    return layers, names


def _alexnet_layers() -> tuple[list[nn.Module], dict[str, str]]:
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
    ]
    places = {"pool1": 2, "pool2": 5, "pool5": 12}
    for layer, place in zip((1, 2, 3, 4, 5), (0, 3, 6, 8, 10), strict=True):
        places |= {f"conv{layer}": place, f"relu{layer}": place + 1}
    return layers, {name: str(place) for name, place in places.items()}


def _state_dict(net: str, weights: str | os.PathLike[str]) -> dict[str, Tensor]:
    advice = (
        f"Pass the path of a state dict with torchvision's keys (for example {_FILES[net]} from {_URL}), "
        "or weights=None for random values"
    )
    if weights == "default":
        try:
            loaded = torch.hub.load_state_dict_from_url(
                _URL + _FILES[net], map_location="cpu", check_hash=True, weights_only=True
            )
        except Exception as error:
            raise RuntimeError(f"the weights of {net} could not be loaded: {error}. {advice}") from error
    else:
        path = Path(weights)
        if not path.is_file():
            raise FileNotFoundError(f"weights: no file {str(path)!r}. {advice}")
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"weights: {str(path)!r} is not a state dict torch can read: {error}. {advice}"
            ) from error
    if not isinstance(loaded, dict):
        raise ValueError(f"weights: expected a state dict, got {type(loaded).__name__}. {advice}")
    return loaded


def _trunk(
    net: str,
    layers: list[nn.Module],
    names: dict[str, str],
    taps: Sequence[str],
    weights: str | os.PathLike[str] | None,
    preprocess: str,
    channels_last: bool,
    autocast: torch.dtype | None,
) -> FrozenTrunk:
    children = [names.get(tap, tap) for tap in taps]
    unknown = [
        tap
        for tap, child in zip(taps, children, strict=True)
        if not child.isdigit() or int(child) >= len(layers)
    ]
    if unknown or not taps:
        raise ValueError(
            f"taps: {unknown or 'empty'}; {net} has {', '.join(names)} and 0 to {len(layers) - 1}"
        )
    last = max(map(int, children))
    features = nn.Sequential(*layers[: last + 1])
    if weights is not None:
        loaded = _state_dict(net, weights)
        own = features.state_dict()
        missing = [key for key in own if f"features.{key}" not in loaded]
        if missing:
            raise ValueError(
                f"weights: no {missing[0]!r} under 'features.' in this file: it does not hold a {net} of torchvision"
            )
        wrong = [key for key in own if loaded[f"features.{key}"].shape != own[key].shape]
        if wrong:
            raise ValueError(
                f"weights: features.{wrong[0]} has shape {tuple(loaded[f'features.{wrong[0]}'].shape)}, "
                f"{net} needs {tuple(own[wrong[0]].shape)}"
            )
        features.load_state_dict({key: loaded[f"features.{key}"] for key in own})
    trunk = FrozenTrunk(features, children, preprocess, channels_last=channels_last, autocast=autocast)
    trunk.names = list(taps)
    return trunk


def vgg16(
    taps: Sequence[str] = ("pool1", "pool2", "pool3"),
    *,
    weights: str | os.PathLike[str] | None = "default",
    preprocess: str = "imagenet",
    channels_last: bool = False,
    autocast: torch.dtype | None = None,
) -> FrozenTrunk:
    """Frozen VGG16 features, run no further than the last tap.

    Args:
        taps: "conv1_1", "relu1_1", "pool1", ... or torchvision's numbers ("4" is ``features[4]``).
        weights: "default" loads the ImageNet weights with torch's own loader (from its cache, or from the
            official address; SHA-256 verified, ``weights_only``); a path loads a state dict with torchvision's
            keys (``features.0.weight``, ...; further keys are ignored); None keeps random values.
        preprocess: see `FrozenTrunk`; "imagenet" for images in [0, 1], "imagenet_tanh" for images in [-1, 1].
        channels_last: run the network in channels_last.
        autocast: None, or the dtype to run the network in.

    Returns:
        A `FrozenTrunk`; its forward maps (N, 3, H, W) or (N, 1, H, W) to a list of feature maps.

    Raises FileNotFoundError, ValueError or RuntimeError with what to do when the weights cannot be loaded.
    Simonyan and Zisserman, "Very Deep Convolutional Networks", 2015; numbering of torchvision.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> trunk = ik.features.vgg16(weights=None)
        >>> [tuple(f.shape) for f in trunk(torch.rand(1, 3, 32, 32))]
        [(1, 64, 16, 16), (1, 128, 8, 8), (1, 256, 4, 4)]
    """
    return _trunk("vgg16", *_vgg_layers(_VGG16), taps, weights, preprocess, channels_last, autocast)


def vgg19(
    taps: Sequence[str] = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1"),
    *,
    weights: str | os.PathLike[str] | None = "default",
    preprocess: str = "imagenet",
    channels_last: bool = False,
    autocast: torch.dtype | None = None,
) -> FrozenTrunk:
    """Frozen VGG19 features; arguments, returns and errors as `vgg16`.

    Args:
        taps: "conv1_1", "relu1_1", "pool1", ... or torchvision's numbers.
        weights: "default", a path, or None for random values.
        preprocess: see `FrozenTrunk`.
        channels_last: run the network in channels_last.
        autocast: None, or the dtype to run the network in.

    Returns:
        A `FrozenTrunk`.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> trunk = ik.features.vgg19(("relu2_2",), weights=None, preprocess="none")
        >>> trunk(torch.rand(1, 3, 16, 16))[0].shape
        torch.Size([1, 128, 8, 8])
    """
    return _trunk("vgg19", *_vgg_layers(_VGG19), taps, weights, preprocess, channels_last, autocast)


def alexnet(
    taps: Sequence[str] = ("relu1", "relu2", "relu3", "relu4", "relu5"),
    *,
    weights: str | os.PathLike[str] | None = "default",
    preprocess: str = "lpips",
    channels_last: bool = False,
    autocast: torch.dtype | None = None,
) -> FrozenTrunk:
    """Frozen AlexNet features (the trunk of LPIPS); arguments, returns and errors as `vgg16`.

    Args:
        taps: "conv1", "relu1", "pool1", ... or torchvision's numbers.
        weights: "default", a path, or None for random values.
        preprocess: see `FrozenTrunk`; "lpips" for images in [-1, 1].
        channels_last: run the network in channels_last.
        autocast: None, or the dtype to run the network in.

    Returns:
        A `FrozenTrunk`.

    Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014; numbering of torchvision.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> [tuple(f.shape) for f in ik.features.alexnet(weights=None)(torch.rand(1, 3, 64, 64))]
        [(1, 64, 15, 15), (1, 192, 7, 7), (1, 384, 3, 3), (1, 256, 3, 3), (1, 256, 3, 3)]
    """
    return _trunk("alexnet", *_alexnet_layers(), taps, weights, preprocess, channels_last, autocast)
