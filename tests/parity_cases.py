"""Inputs, critics, trunks and figures of the released training codes, from the files in tests/parity.

    case = load("CTN")
    fake = case.critic(case.pred).logits
    published.ctn(case.maps, case.pred, case.target, case.masks["binary"], fake=fake)["style"]
    case.numbers["binary.style"]                      # what the released code computed, with its weight

`case.trunk(taps)` is the network behind `case.maps` as a `FrozenTrunk`, for the objectives of the package.
`load("CTN", torch.float32)` gives images, masks and networks in another dtype; the figures stay in float64.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inpaint_kernels.features import FrozenTrunk

FOLDER = Path(__file__).parent / "parity"


class _File(NamedTuple):
    pred: str
    target: str
    net: str  # whose features are compared
    unit: bool = False  # images in [0, 1], else in [-1, 1]


_FILES = {
    "CTN": _File("x", "y", "vgg19"),
    "T-former": _File("x", "y", "vgg19"),
    "TransCNN-HAE": _File("x", "y", "vgg19"),
    "CoordFill": _File("raw", "gt", "alexnet"),
    "MAT": _File("raw", "y", "vgg19"),
    "MAT_partial_conv": _File("x", "x", "vgg19"),
    "LaMa": _File("x", "y", "stages", unit=True),
    "AOT-GAN": _File("x", "y", "vgg19"),
    "EdgeConnect": _File("x", "y", "vgg19", unit=True),
}


class CriticOutput(NamedTuple):
    """Logits before any sigmoid, and the activations before the last convolution."""

    logits: Tensor
    features: list[Tensor]


class SmallCritic(nn.Module):
    """Of CTN, T-former, AOT-GAN and EdgeConnect."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(channels, 4, 4, stride=2, padding=1)
        self.b = nn.Conv2d(4, 1, 4, stride=2, padding=1)

    def forward(self, images: Tensor) -> CriticOutput:
        inner = F.leaky_relu(self.a(images), 0.2)
        return CriticOutput(self.b(inner), [inner])


class FiveConvolutions(nn.Module):
    """Of CoordFill."""

    def __init__(self) -> None:
        super().__init__()
        widths, strides = (3, 4, 4, 6, 6, 1), (2, 2, 2, 1, 1)
        self.c = nn.ModuleList(
            nn.Conv2d(widths[i], widths[i + 1], 4, stride=strides[i], padding=1) for i in range(5)
        )

    def forward(self, images: Tensor) -> CriticOutput:
        features = []
        for layer in list(self.c)[:-1]:
            images = F.leaky_relu(layer(images), 0.2)
            features.append(images)
        return CriticOutput(self.c[-1](images), features)


class LaMaCritic(nn.Module):
    """NLayerDiscriminator(3, ndf=4, n_layers=2), which trains with the statistics of its batch."""

    def __init__(self) -> None:
        super().__init__()
        slope = nn.LeakyReLU(0.2)
        self.model0 = nn.Sequential(nn.Conv2d(3, 4, 4, 2, 2), slope)
        self.model1 = nn.Sequential(nn.Conv2d(4, 8, 4, 2, 2), nn.BatchNorm2d(8), slope)
        self.model2 = nn.Sequential(nn.Conv2d(8, 16, 4, 1, 2), nn.BatchNorm2d(16), slope)
        self.model3 = nn.Sequential(nn.Conv2d(16, 1, 4, 1, 2))

    def forward(self, images: Tensor) -> CriticOutput:
        features = []
        for block in (self.model0, self.model1, self.model2):
            images = block(images)
            features.append(images)
        return CriticOutput(self.model3(images), features)


class MATCritics(nn.Module):
    """Both heads of MAT: from a pair of inputs, (final, stage 1), the pair of their logits (N, 1)."""

    def __init__(self) -> None:
        super().__init__()
        for head in (0, 1):
            for name, size in (("w", (4, 4, 4, 4)), ("b", (4,)), ("v", (4,))):
                self.register_parameter(f"{name}{head}", nn.Parameter(torch.empty(size)))

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        final, stage1 = inputs
        return _mat_head(final, self.w0, self.b0, self.v0), _mat_head(stage1, self.w1, self.b1, self.v1)


def _mat_head(images: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    inner = torch.tanh(F.conv2d(images, w, b, stride=2, padding=1)).mean((2, 3))
    return 4 * (inner * v).sum(1, keepdim=True)


@dataclass(frozen=True)
class Parity:
    """One file; images, masks and networks in `dtype`."""

    name: str
    about: dict[str, Any]  # where the figures come from, and what each is
    arrays: dict[str, np.ndarray[Any, Any]]  # as stored
    dtype: torch.dtype

    @property
    def numbers(self) -> dict[str, Tensor]:
        """All that is no picture, in float64: what the released code computed, and weights."""
        return {
            key: torch.from_numpy(value.astype(np.float64))
            for key, value in self.arrays.items()
            if value.dtype != np.uint8
        }

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The numbers whose names begin with `prefix`, by the rest of the name."""
        return {
            key.removeprefix(prefix): value for key, value in self.numbers.items() if key.startswith(prefix)
        }

    def images(self, key: str) -> Tensor:
        """A picture of the file in the range its method trains in."""
        values = torch.from_numpy(self.arrays[key].astype(np.float64))
        return (values / 255 if _FILES[self.name].unit else values / 127.5 - 1).to(self.dtype)

    @property
    def pred(self) -> Tensor:
        """What the network returned; a new leaf that requires its gradient."""
        return self.images(_FILES[self.name].pred).requires_grad_()

    @property
    def target(self) -> Tensor:
        return self.images(_FILES[self.name].target)

    @property
    def masks(self) -> dict[str, Tensor]:
        """What their 1 means is up to the method: "binary", and "fractional" where the file has one."""
        keys = {"mask": "binary", "binary.mask": "binary", "fractional.mask": "fractional"}
        return {
            kind: torch.from_numpy(self.arrays[key].astype(np.float64) / 255).to(self.dtype)
            for key, kind in keys.items()
            if key in self.arrays
        }

    @functools.cached_property
    def critic(self) -> Any:
        """Called with images it returns a `CriticOutput`, but for MAT's two, see `MATCritics`."""
        return self._critic("critic.")

    @functools.cached_property
    def edge_critic(self) -> Any:
        """Of EdgeConnect's edge stage; it reads [gray, edges]."""
        return self._critic("edge.critic.")

    def _critic(self, prefix: str) -> nn.Module:
        state = self.under(prefix)
        module: nn.Module
        if self.name == "CoordFill":
            module = FiveConvolutions()
        elif self.name == "LaMa":
            module = LaMaCritic()
        elif self.name == "MAT":
            module = MATCritics()
        else:
            module = SmallCritic(state["a.weight"].shape[1])
        module.load_state_dict(state)
        return module.to(self.dtype)

    @property
    def heads(self) -> list[Tensor]:
        """CoordFill's weights of the channels of LPIPS' five layers, (1, C, 1, 1)."""
        return [self.numbers[f"lin.{layer}"].to(self.dtype) for layer in range(5)]

    def trunk(self, taps: Sequence[str], net: str | None = None, **options: Any) -> FrozenTrunk:
        """The network of the file, or another `net`; `options` of FrozenTrunk, whose default is no normalisation."""
        layers, names = _stack(net or _FILES[self.name].net)
        trunk = FrozenTrunk(layers.to(self.dtype), [names[tap] for tap in taps], **options)
        trunk.names = list(taps)
        return trunk

    def maps(
        self, images: Tensor, taps: Sequence[str], net: str | None = None, average_pooling: bool = False
    ) -> list[Tensor]:
        """The same by a loop over the layers that uses nothing of the package: a trunk for examples/published."""
        layers, names = _frozen_stack(net or _FILES[self.name].net, average_pooling, self.dtype)
        found = {}
        for name, layer in layers.named_children():
            # A copy, because ReLUs work in place, as torchvision's do.
            images = layer(images.clone())
            found[name] = images
        return [found[names[tap]] for tap in taps]


def load(name: str, dtype: torch.dtype = torch.float64) -> Parity:
    """A file of tests/parity by its name without the ending."""
    arrays = dict(_read(name))
    return Parity(name, json.loads(str(arrays.pop("about"))), arrays, dtype)


@functools.cache
def _read(name: str) -> dict[str, np.ndarray[Any, Any]]:
    with np.load(FOLDER / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def _stack(net: str, average_pooling: bool = False) -> tuple[nn.Sequential, dict[str, str]]:
    """(network, {layer name: name of the child}), in float64."""
    return _stages() if net == "stages" else _torchvision_stack(net, average_pooling)


@functools.cache
def _frozen_stack(
    net: str, average_pooling: bool, dtype: torch.dtype
) -> tuple[nn.Sequential, dict[str, str]]:
    layers, names = _stack(net, average_pooling)
    return layers.to(dtype).requires_grad_(False), names


def _torchvision_stack(net: str, average_pooling: bool) -> tuple[nn.Sequential, dict[str, str]]:
    """VGG or AlexNet with the channels of the file, its children numbered as torchvision numbers them."""
    state = {key: torch.from_numpy(value) for key, value in _read(f"trunk_{net}").items() if key != "about"}
    alexnet = net == "alexnet"
    layers: list[nn.Module] = []
    names: dict[str, str] = {}
    block = index = 1
    for place in sorted({int(key.split(".")[0]) for key in state}):
        if place > len(layers):
            # The numbers of the convolutions leave room for a pooling.
            names[f"pool{index - 1 if alexnet else block}"] = str(len(layers))
            layers.append(nn.AvgPool2d(2, 2) if average_pooling else nn.MaxPool2d(3 if alexnet else 2, 2))
            block, index = (block, index) if alexnet else (block + 1, 1)
        label = f"{index}" if alexnet else f"{block}_{index}"
        names |= {f"conv{label}": str(place), f"relu{label}": str(place + 1)}
        out, channels, kernel, _ = state[f"{place}.weight"].shape
        stride, padding = (4, 2) if kernel == 11 else (1, kernel // 2)
        with torch.device("meta"):  # no time for random weights
            layers += [nn.Conv2d(channels, out, kernel, stride, padding), nn.ReLU(inplace=True)]
        index += 1
    found = nn.Sequential(*layers)
    found.load_state_dict(state, assign=True)
    return found.double(), names


def _stages() -> tuple[nn.Sequential, dict[str, str]]:
    """In place of LaMa's segmentation network: four convolutions with ReLUs, named as its residual stages."""
    state = load("LaMa").under("stages.c.")
    found = nn.Sequential()
    for i in range(4):
        out, channels, kernel, _ = state[f"{i}.weight"].shape
        stride, padding = (1, 1) if kernel == 3 else (kernel, 0)
        convolution = nn.Conv2d(channels, out, kernel, stride, padding).double()
        convolution.load_state_dict({key: state[f"{i}.{key}"] for key in ("weight", "bias")})
        found.add_module(f"layer{i + 1}", nn.Sequential(convolution, nn.ReLU(inplace=True)))
    return found, {name: name for name, _ in found.named_children()}


# ---- figures as terms of objectives ------------------------------------------------------------------------------

VGG = tuple(f"relu{b}_{i + 1}" for b, n in ((1, 2), (2, 2), (3, 4), (4, 4), (5, 1)) for i in range(n))
ABLATION = {
    "perceptual_layers": VGG,
    "perceptual_known_only": True,
    "perceptual_weight": 0.03,
    "hole_weight": 2.5,
    "feature_matching_known_only": True,
    "extra_hole_weight": 3,
    "mask_resize": "adaptive_max",
}


@dataclass(frozen=True)
class Figures:
    """Figures of `file` in tests/parity, whose keys follow a `prefix`, as equations with the terms of `method`."""

    method: str
    file: str
    terms: str
    gradients: str = "grad_total = total"  # by the prediction, of a term
    prefix: str = ""
    mask: str = "binary"
    settings: Mapping[str, Any] = field(default_factory=dict)
    discriminator: str = ""  # the keys without the prefix
    critic_gradients: str = ""


def _ctn(name: str, mask: str, style: str) -> Figures:
    return Figures(
        name,
        name,
        f"l1 = l1; perceptual = perceptual; style = {style}; adversarial = 0.1 adversarial; total = total",
        "grad_total = total; grad_style_unweighted = style; grad_perceptual = perceptual",
        prefix=f"{mask}.",
        mask=mask,
        discriminator="loss_D = total; loss_D + loss_D = real + fake",
        critic_gradients="grad_D.",
    )


_LAMA = "G_adversarial = 10 adversarial; G_feature_matching = 100 feature_matching; G_total = total; "
FIGURES = {
    "CTN-binary": _ctn("CTN", "binary", "style"),
    "CTN-fractional": _ctn("CTN", "fractional", "style"),
    "T-former-binary": _ctn("T-former", "binary", "250 style"),
    "T-former-fractional": _ctn("T-former", "fractional", "250 style"),
    "MAT": Figures(
        "MAT",
        "MAT",
        "G_adv + G_adv_stage1 = adversarial; G_perceptual = perceptual; G_total = total",
        "grad_raw_stage1 | grad_raw = total; zero | grad_perceptual_unweighted = perceptual",
        discriminator="D_loss + D_loss_stage1 = total",
        critic_gradients="Dmain.grad.",
    ),
    "TransCNN-HAE": Figures(
        "TransCNN-HAE",
        "TransCNN-HAE",
        "l1 = 2 l1; perceptual = perceptual; style = 250 style; total = total",
        "grad_total = total; grad_style_unweighted = style; grad_perceptual = perceptual",
    ),
    "CoordFill": Figures(
        "CoordFill",
        "CoordFill",
        "lpips = 10 lpips; adversarial = adversarial; feature_matching = 100 feature_matching; total = total",
        "grad_raw = total; grad_lpips_unweighted = lpips",
        discriminator="loss_D = total; loss_D_real = real; loss_D_fake = fake",
    ),
    "LaMa": Figures("LaMa", "LaMa", _LAMA + "G_l1 = 10 valid; G_resnet_pl = 30 perceptual"),
    "LaMa-ablation": Figures(
        "LaMa",
        "LaMa",
        _LAMA + "G_l1 = 10 valid + 2.5 hole; G_vgg = 0.03 perceptual",
        prefix="opt_",
        settings=ABLATION,
    ),
    "EdgeConnect-inpaint": Figures(
        "EdgeConnect-inpaint",
        "EdgeConnect",
        "l_l1 = l1; l_per = 0.1 perceptual; l_sty = 250 style; l_g2 = 0.1 adversarial; total = total",
        prefix="inpaint.",
        discriminator="inpaint.l_d2 = total; inpaint.D = total",
    ),
    "EdgeConnect-edge": Figures(
        "EdgeConnect-edge",
        "EdgeConnect",
        "l_g1 = adversarial; l_fm = 10 feature_matching; total = total",
        prefix="edge.",
        discriminator="edge.l_d1 = total; edge.D = total",
    ),
    "AOT-GAN": Figures(
        "AOT-GAN-released",
        "AOT-GAN",
        "L1 = l1; Style = 250 style; Perceptual = 0.1 perceptual; advg = 0.01 adversarial; total = total",
        discriminator="D_loss = total",
        critic_gradients="grad_D_alone.",
    ),
}
