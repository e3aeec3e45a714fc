"""Frozen trunks for the examples: with weights, or random ones and a warning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from errors import InputError

if TYPE_CHECKING:
    from inpaint_kernels.features import FrozenTrunk

NAMES = ("vgg16", "vgg19", "alexnet")
RANDOM_WARNING = (
    "warning: {name} has random weights, so its terms mean nothing perceptually; {option} FILE takes a state dict "
    "with torchvision's keys, {option} default torch's own download"
)


def load_trunk(
    name: str,
    weights: str | None,
    device: torch.device,
    *,
    option: str,
    taps: Sequence[str] | None = None,
    preprocess: str = "imagenet",
    channels_last: bool | None = False,
    random_scale: float = 1.0,
) -> FrozenTrunk:
    """A trunk for pictures in [0, 1], with ``preprocess="none"`` for normalised ones.

    Args:
        name: one of ``NAMES``.
        weights: a file, "default" for torch's own download, None for random values, the same in every process.
        device: where it runs.
        option: the command-line option the weights came from, for messages.
        taps: layer names such as "relu1_1"; None for the trunk's own.
        preprocess, channels_last: of the trunk.
        random_scale: what features of random values are multiplied by.
    """
    import inpaint_kernels as ik

    make = {"vgg16": ik.features.vgg16, "vgg19": ik.features.vgg19, "alexnet": ik.features.alexnet}[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            of_trunk: dict[str, Any] = {"preprocess": preprocess, "channels_last": channels_last}
            if taps is not None:
                of_trunk["taps"] = taps
            trunk = make(weights=weights, **of_trunk)
        except (OSError, ValueError, RuntimeError) as error:
            raise InputError(f"{option}: {' '.join(str(error).split())}") from error
        if weights is None:
            layers = [layer for layer in trunk.modules() if isinstance(layer, torch.nn.Conv2d)]
            for layer in layers:
                # The default initialisation halves the features in every layer.
                torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                assert layer.bias is not None
                torch.nn.init.zeros_(layer.bias)
            with torch.no_grad():
                # Everything behind it follows in proportion.
                layers[0].weight.mul_(random_scale)
    return trunk.to(device)
