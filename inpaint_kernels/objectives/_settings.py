"""Settings of the objectives: frozen dataclasses whose fields show every number, and presets of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..features.trunk import PREPROCESSINGS
from ..ops import _checks, _pairs
from ..ops.adversarial import MODES
from ..ops.mask_operators import RESIZE_MODES

# Fields that name one of a few things.
_CHOICES = {
    "preprocess": PREPROCESSINGS,
    "mask_is": ("valid", "hole"),
    "composite_from": ("target", "masked_target"),
    "normalize": _checks.NORMALIZATIONS,
    "tv_image": ("composite", "raw"),
    "pixel_space": ("image", "trunk"),
    "gan_mode": MODES,
    "layer_reduction": ("sum", "mean"),
    "mask_resize": RESIZE_MODES,
    "penalty": ("l1", "l2"),
    "labels": ("released", "paper"),
    "discriminator_image": ("raw", "composite"),
}
IMAGES = ("raw", "composite", "hole_raw")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every objective sets; a field called `..._weight` is the factor of that term in the total.

    Args:
        preprocess: what the trunk's images go through: "imagenet" for images in [0, 1], "imagenet_tanh" for [-1, 1],
            "lpips" for [-1, 1] as the lpips package shifts and scales them, "none" for images that are read as given.
        swap_channels: the trunk reads the channels in reverse order.
        mask_is: "valid" (1 = known) or "hole".
        composite_from: with v = 1 where a pixel is known, composites are ``v * y + (1 - v) * x`` ("target"), or made
            of the image that the network is given, ``v * (v * y) + (1 - v) * x`` ("masked_target"). They differ where
            a mask has fractions.
    """

    preprocess: str = "none"
    swap_channels: bool = False
    mask_is: str = "valid"
    composite_from: str = "target"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in _CHOICES:
                _checks.check_choice(name, value, _CHOICES[name])
            elif name.endswith(("_weight", "_gamma")):
                object.__setattr__(self, name, _checks.check_number(name, value))
            elif name.endswith("layer_weights"):
                if isinstance(value, str) or not isinstance(value, Sequence):
                    raise TypeError(
                        f"{name} must be a sequence of numbers, one for each layer, got {value!r}"
                    )
                object.__setattr__(self, name, tuple(_checks.check_number(name, w) for w in value))
            elif name.endswith(("layers", "predictions")):
                object.__setattr__(self, name, _names(name, value))
            elif isinstance(field.default, bool) and not isinstance(value, bool):
                raise TypeError(f"{name} must be True or False, got {value!r}")
        if hasattr(self, "tv_region"):
            _pairs.check_options("tv_", self.tv_region, "l1", self.tv_normalize)  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class AdversarialSettings(Settings):
    """What every objective with a discriminator sets, too.

    Args:
        adversarial_weight: factor of the generator's adversarial term.
        gan_mode: its formula and the discriminator's, as `generator_loss` names it.
        discriminator_image: what the discriminator is shown of a prediction: "raw" or "composite".
        penalty_interval: every how many steps of the discriminator its gradient penalty is taken; 0 = it has none.
    """

    adversarial_weight: float = 1.0
    gan_mode: str = "nonsaturating"
    discriminator_image: str = "raw"
    penalty_interval: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        interval = self.penalty_interval
        if not isinstance(interval, int) or isinstance(interval, bool) or interval < 0:
            raise ValueError(
                f"penalty_interval must be a number of steps, 0 for no penalty, got {interval!r}"
            )


def _names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence of names, got {value!r}")
    if not value or len(set(value)) != len(value):
        raise ValueError(f"{name} must name at least one and none twice, got {value!r}")
    if name.endswith("predictions"):
        for part in value:
            _checks.check_choice(name, part, IMAGES)
    return tuple(value)


AnySettings = TypeVar("AnySettings", bound=Settings)


def chosen(presets: Mapping[str, AnySettings], preset: str, given: Mapping[str, Any]) -> AnySettings:
    """The settings of a preset, with what is `given` in their place; None leaves a field to the preset."""
    _checks.check_choice("preset", preset, tuple(presets))
    known = [field.name for field in dataclasses.fields(presets[preset])]
    for name in given:
        if name not in known:
            raise TypeError(f"unexpected keyword argument {name!r}; the settings are {', '.join(known)}")
    return dataclasses.replace(
        presets[preset], **{name: value for name, value in given.items() if value is not None}
    )
