"""Frozen trunks for the examples: with trained weights where some are at hand, else random ones and a warning."""

from __future__ import annotations

import importlib.metadata
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from errors import InputError

if TYPE_CHECKING:
    from inpaint_kernels.features import FrozenTrunk

NAMES = ("vgg16", "vgg19", "alexnet")
RANDOM_WARNING = (
    "warning: {name} has random weights, so its terms mean nothing perceptually; {option} FILE takes a state dict "
    "with torchvision's keys, {option} default torch's own download"
)
# A VGG16 that was trained on to bear with shifts of a pixel, in a package of PyPI that [demo] installs.
SHIFT_TOLERANT = "shift-tolerant VGG16 (Ghildyal and Liu 2022)"
PACKAGE, FILE = "stlpips-pytorch", "vgg_shift_tolerant.pth"


class Found(NamedTuple):
    """Weights for `load_trunk`, and what reports call the trunk with them."""

    weights: Any
    label: str


def find_weights(name: str, weights: str | None, *, option: str) -> Found:
    """What the command line asks for: a file, "default", "random", or with None what is `at_hand`."""
    source = at_hand(name) if weights is None else weights
    if isinstance(source, Path):
        try:
            return Found(shift_tolerant(source), SHIFT_TOLERANT)
        except Exception as error:
            raise InputError(
                f"{source} cannot be read: {' '.join(str(error).split())}; {option} random does without"
            ) from error
    if source in (None, "random"):
        return Found(None, f"{name}, weights random")
    return Found(source, f"{name}, weights {source}")


def at_hand(name: str) -> Path | str | None:
    """Trained weights that need no download: torch's own of an earlier one, for vgg16 else the file of `PACKAGE`."""
    from inpaint_kernels.features.trunk_weights import FILES

    if (Path(torch.hub.get_dir()) / "checkpoints" / FILES[name]).is_file():
        return "default"
    if name != "vgg16":
        return None
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.name == FILE]
    return next((path for path in paths if path.is_file()), None)


def shift_tolerant(path: Path) -> dict[str, torch.Tensor]:
    """The convolutions in the package's file under the names of VGG16's layers.

    Its keys are such as "net.slice2.6.weight", with one slice for each of VGG16's blocks. The blur filters, which
    stand in front of its poolings, and the heads are left out: the trunk pools as VGG16 does.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    found: dict[str, torch.Tensor] = {}
    counts: Counter[str] = Counter()
    for key, value in content.items():
        convolution = re.fullmatch(r"net\.slice(\d)\.\d+\.(weight|bias)", key)
        if convolution:
            block, kind = convolution.groups()
            counts[block] += kind == "weight"
            found[f"conv{block}_{counts[block]}.{kind}"] = value
    return found


def load_trunk(
    name: str,
    weights: Any,
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
        weights: of `find_weights`: a file, "default" for torch's own download, a state dict, or None for random
            values, the same in every process.
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
