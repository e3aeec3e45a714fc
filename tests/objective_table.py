"""Every published objective of the package, with what the tests of all of them build and call it with.

loss, x = objective("CTN"), inputs("CTN")
terms = x.terms(loss)                    # through a small discriminator
x.gradient(terms.total)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from harness import generator
from parity_cases import SmallCritic, load
from torch import Tensor, nn
from trunk_cases import relative

from inpaint_kernels import objectives
from inpaint_kernels.features import FrozenTrunk
from inpaint_kernels.objectives import DiscriminatorOutput, Objective

N = 3


@dataclass(frozen=True)
class Method:
    """`net`: a network of tests/parity, narrow, for the trunk. `passes` of it over the predictions, which are `parts`
    images together; `written` images are made for it. The discriminators' `heads` read `extra` channels beside those
    of an image."""

    objective: type[Objective]
    preset: str
    net: str | None = None
    passes: int = 0
    parts: int = 0
    written: int = 0
    heads: int = 0
    extra: int = 0
    stages: int = 1
    channels: int = 3
    size: int = 16
    settings: Mapping[str, Any] = field(default_factory=dict)


LAMA_SWITCHES = {
    "hole_weight": 2.5,
    "perceptual_known_only": True,
    "feature_matching_known_only": True,
    "extra_hole_weight": 3.0,
    "mask_resize": "adaptive_max",
}
METHODS = {
    "pconv-paper": Method(objectives.PartialConvObjective, "paper", "vgg16", 1, 2, 3),
    "pconv-nvidia": Method(
        objectives.PartialConvObjective, "nvidia", "vgg16", 1, 1, 2, settings={"tv_weight": 0.1}
    ),
    "pconv-naoto0804": Method(objectives.PartialConvObjective, "naoto0804", "vgg16", 1, 2, 3),
    "pconv-mmagic": Method(objectives.PartialConvObjective, "mmagic", "vgg16", 1, 2, 3),
    "CTN": Method(objectives.CTNObjective, "released", "vgg19", 2, 2, 2, heads=1),
    "T-former": Method(objectives.TFormerObjective, "released", "vgg19", 2, 2, 2, heads=1),
    "MAT": Method(objectives.MATObjective, "released", "vgg19", 1, 1, 2, heads=2, extra=1, stages=2),
    "TransCNN-HAE": Method(objectives.TransCNNHAEObjective, "v1.0", "vgg19", 1, 1, 0),
    "CoordFill": Method(objectives.CoordFillObjective, "released", "alexnet", 1, 1, 2, heads=1, size=32),
    "CMT": Method(objectives.CMTObjective, "community", "vgg16", 1, 1, 1, heads=1),
    "LaMa": Method(objectives.LaMaObjective, "released", "stages", 1, 1, 2, heads=1),
    "LaMa-paper": Method(objectives.LaMaObjective, "paper", "stages", 1, 1, 2, heads=1),
    "LaMa-switches": Method(
        objectives.LaMaObjective, "paper", "stages", 1, 1, 2, heads=1, settings=LAMA_SWITCHES
    ),
    "EdgeConnect-edge": Method(objectives.EdgeConnectObjective, "edge", heads=1, extra=1, channels=1),
    "EdgeConnect-inpaint": Method(objectives.EdgeConnectObjective, "inpaint", "vgg19", 2, 2, 2, heads=1),
    "AOT-GAN-released": Method(objectives.AOTGANObjective, "released", "vgg19", 1, 1, 2, heads=1),
    "AOT-GAN-paper": Method(objectives.AOTGANObjective, "paper", "vgg19", 1, 1, 2, heads=1),
    "DeepFill-v1": Method(objectives.DeepFillObjective, "v1", heads=2, stages=2),
    "DeepFill-v2": Method(objectives.DeepFillObjective, "v2", heads=1, extra=1, stages=2),
}
every_method = pytest.mark.parametrize("name", METHODS)
WITH_TRUNK = [name for name, method in METHODS.items() if method.net]
WITH_CRITIC = [name for name, method in METHODS.items() if method.heads]
MASKS = ("binary", "fractional", "channels", "holes", "known")


def settings_of(name: str) -> Any:
    method = METHODS[name]
    return dataclasses.replace(method.objective.presets[method.preset], **method.settings)


def trunk(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> FrozenTrunk | None:
    """Tapped wherever the method's settings name a layer, of terms that weigh 0 as well."""
    settings = dataclasses.asdict(settings_of(name))
    taps = [tap for key, value in settings.items() if key.endswith("layers") for tap in value]
    net = METHODS[name].net or "vgg19"
    return load("LaMa", dtype).trunk(list(dict.fromkeys(taps)), net, **options) if taps else None


def objective(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    method = METHODS[name]
    if "trunk" not in options:
        options["trunk"] = trunk(name, dtype)
    if method.objective is objectives.CoordFillObjective:
        options.setdefault("heads", load("CoordFill", dtype).heads)
    return method.objective(method.preset, **{**method.settings, **options})


class Discriminators(nn.Module):
    """One or several, each of an image of its own or all of the same."""

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.heads = nn.ModuleList(SmallCritic(channels) for _ in range(heads))

    def forward(self, images: Tensor | list[Tensor]) -> DiscriminatorOutput:
        shown = images if isinstance(images, list) else [images] * len(self.heads)
        found = [head(image) for head, image in zip(self.heads, shown, strict=True)]
        logits, features = [f.logits for f in found], [f.features for f in found]
        return (
            DiscriminatorOutput(logits, features)
            if len(found) > 1
            else DiscriminatorOutput(logits[0], features[0])
        )


@dataclass
class Inputs:
    """What an objective is called with; `leaves` are the images of a network's stages, the last one its result."""

    leaves: list[Tensor]
    target: Tensor
    mask: Tensor
    critic: Any = None  # of what is shown, returns a DiscriminatorOutput
    condition: Tensor | None = None

    @property
    def pred(self) -> Any:
        return self.leaves if len(self.leaves) > 1 else self.leaves[0]

    def changed(self, **changes: Any) -> Inputs:
        return dataclasses.replace(self, **changes)

    def to(self, *place: Any) -> Inputs:
        """Images, mask and discriminator in another dtype or on another device; new leaves."""
        leaves = [leaf.detach().to(*place).requires_grad_() for leaf in self.leaves]
        condition = None if self.condition is None else self.condition.to(*place)
        critic = None if self.critic is None else self.critic.to(*place)
        return Inputs(leaves, self.target.to(*place), self.mask.to(*place), critic, condition)

    def judged(self, loss: Any, image: Any) -> Any:
        """What the discriminator says of a prediction or of the target."""
        return self.critic(loss.discriminator_input(image, self.target, self.mask, condition=self.condition))

    def outputs(self, loss: Any) -> dict[str, Any]:
        if self.critic is None:
            return {}
        return {"fake": self.judged(loss, self.pred), "real": self.judged(loss, self.target)}

    def terms(self, loss: Any, **options: Any) -> Any:
        judged = {} if "fake" in options else self.outputs(loss)
        return loss(self.pred, self.target, self.mask, **judged, **options)

    def discriminator_loss(self, loss: Any) -> Any:
        detached = self.changed(leaves=[leaf.detach() for leaf in self.leaves])
        return loss.discriminator_loss(**detached.outputs(loss), mask=self.mask)

    def gradient(self, value: Tensor) -> Tensor:
        """By all leaves, one after the other; zeros where it does not depend on them."""
        if not value.requires_grad:
            return torch.cat([torch.zeros_like(leaf) for leaf in self.leaves])
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        return torch.cat(torch.autograd.grad(value, self.leaves, **options))


def known(kind: str, size: tuple[int, ...]) -> Tensor:
    """A mask of MASKS, 1 = known. Holes end above the last row and left of the last column, but for "holes"."""
    n, c, h, w = size
    rng = generator(8)
    mask = torch.ones(n, c if kind == "channels" else 1, h, w)
    if kind == "holes":
        return mask.zero_()
    if kind == "known":
        return mask
    inner = torch.rand(mask[..., :-1, :-1].shape, generator=rng)
    mask[..., :-1, :-1] = inner if kind == "fractional" else (inner < 0.6).to(mask)
    mask[..., 3 : h // 2, 2 : w // 2] = 0.25 if kind == "fractional" else 0
    return mask


def inputs(
    name: str,
    n: int = N,
    *,
    mask: str = "fractional",
    channels: int | None = None,
    size: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Images in [0, 1]; `mask` is one of MASKS, turned to the method's polarity."""
    method = METHODS[name]
    channels, size = channels or method.channels, size or method.size
    rng = generator(3)
    target, *leaves = (torch.rand(n, channels, size, size, generator=rng) for _ in range(1 + method.stages))
    weights = known(mask, (n, channels, size, size))
    if settings_of(name).mask_is == "hole":
        weights = 1 - weights
    critic = Discriminators(method.heads, channels + method.extra) if method.heads else None
    condition = torch.rand(n, 1, size, size, generator=rng) if method.channels == 1 else None
    return Inputs(leaves, target, weights, critic, condition).to(dtype)


def assert_same(x: Inputs, got: Any, want: Any) -> None:
    """All terms, and the gradients of the totals."""
    torch.testing.assert_close(got, want)
    assert relative(x.gradient(got.total), x.gradient(want.total)) < 1e-5
