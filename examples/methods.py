"""Published training objectives as the example calls them: one interface, the fused and the eager side behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import published
from torch import Tensor

if TYPE_CHECKING:
    from inpaint_kernels.features import FrozenTrunk
    from inpaint_kernels.objectives import DiscriminatorOutput

    # What a discriminator returns: logits, those of several heads, or logits and features.
    Judged = Tensor | list[Tensor] | DiscriminatorOutput


class Terms(NamedTuple):
    """Scalars on the device: the weighted ``total`` and its unweighted terms, None for those left out.

    Checkpoints hold them in this order: what is new goes to the end.
    """

    total: Tensor
    hole: Tensor | None = None
    valid: Tensor | None = None
    perceptual: Tensor | None = None
    style: Tensor | None = None
    tv: Tensor | None = None
    l1: Tensor | None = None
    lpips: Tensor | None = None
    adversarial: Tensor | None = None
    feature_matching: Tensor | None = None


@dataclass(frozen=True)
class FeatureTerms:
    """The trunk, and how many samples are streamed at a time; for "pixel" also the weights of its terms, 0 for none.

    ``trunk`` takes pictures in [0, 1] for "pixel"; that of a published method takes what the method feeds it.
    """

    trunk: FrozenTrunk
    perceptual: float = 0.0
    style: float = 0.0
    chunk: int | None = None


class Objective:
    """A function of (pred [N, 3, H, W], target, mask [N, 1, H, W]): pictures in [0, 1], mask 1 = known.

    Where it is ``adversarial``, ``fake`` and ``real`` are what the discriminator returns for the prediction and, if
    its features are matched, for the truth.
    """

    adversarial = False

    def __init__(self, terms: Callable[[Tensor, Tensor, Tensor], Terms]) -> None:
        self._terms = terms

    def __call__(
        self,
        pred: Tensor,
        target: Tensor,
        mask: Tensor,
        fake: Judged | None = None,
        real: Judged | None = None,
    ) -> Terms:
        return self._terms(pred, target, mask)


@dataclass(frozen=True)
class Method:
    """A published method: where its two sides are found, and how the formulas of ``published`` differ.

    Args:
        objective: its class in ``inpaint_kernels.objectives``.
        trunk: the network its features come from.
        formula: in plain PyTorch, called with (trunk, pred, target, mask) and what the discriminator says by name.
        discriminator: the loss of its discriminator, called with logits (real, fake), None without one.
        critic_input: what goes into the discriminator, made of (image, known mask); None for the image alone.
        penalty: of (real logits, real images).
        heads: how many discriminators it has.
        tanh: it trains on pictures in [-1, 1], not [0, 1].
        hole_mask: its formula's masks are 1 in the hole.
        mask_labels: the loss of its discriminator reads the mask, too.
        changes: settings of the objective that differ from its first preset.
    """

    objective: str
    trunk: str
    formula: Callable[..., published.Terms]
    discriminator: Callable[..., published.Terms] | None = None
    critic_input: Callable[[Tensor, Tensor], Tensor] | None = None
    penalty: Callable[[Any, Tensor], Tensor] | None = None
    heads: int = 1
    tanh: bool = True
    hole_mask: bool = False
    mask_labels: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def objective_class(self) -> Any:
        import inpaint_kernels as ik

        return getattr(ik.objectives, self.objective)

    @property
    def settings(self) -> Any:
        """All numbers of the method, as its objective has them, with masks as they are here."""
        preset = next(iter(self.objective_class.presets.values()))
        return dataclasses.replace(preset, mask_is="valid", **self.changes)

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms of the total loss, without those of weight 0."""
        settings, (_, *terms) = self.settings, self.objective_class.result._fields
        weights = {term: getattr(settings, f"{term}_weight") for term in terms}
        return {term: weight for term, weight in weights.items() if weight}

    @property
    def layers(self) -> list[str]:
        """Of the trunk, what the terms read."""
        lists = [value for name, value in vars(self.settings).items() if name.endswith("layers")]
        return list(dict.fromkeys(layer for layers in lists for layer in layers))


class Published(Objective):
    """A published method, on its own range of pictures; `Fused` and `Eager` are the two ways to compute it."""

    def __init__(self, method: Method) -> None:
        self.method, self.settings = method, method.settings
        self.adversarial = self.method.discriminator is not None
        self.matches_features = getattr(self.settings, "feature_matching_weight", 0) > 0
        self.penalty_interval = getattr(self.settings, "penalty_interval", 0)

    def __call__(
        self,
        pred: Tensor,
        target: Tensor,
        mask: Tensor,
        fake: Judged | None = None,
        real: Judged | None = None,
    ) -> Terms:
        return self.terms(self.in_range(pred), self.in_range(target), mask, fake, real)

    def in_range(self, images: Tensor) -> Tensor:
        return 2 * images.float() - 1 if self.method.tanh else images

    def shown(self, image: Tensor, target: Tensor, mask: Tensor) -> Tensor | list[Tensor]:
        """What the discriminator, or each of several, is called with; of the truth, ``image`` is the target."""
        truth = self.in_range(target)
        return self.seen(truth if image is target else self.in_range(image), truth, mask)

    def penalty(self, discriminator: Callable[[Any], Judged], target: Tensor, mask: Tensor) -> Tensor:
        """Of the discriminator's gradient by true images, for every ``penalty_interval``-th step."""
        images = self.in_range(target).detach().requires_grad_()
        return self.gradient_penalty(discriminator(self.seen(images, images, mask)), images)

    # What the two sides compute, on pictures in the method's own range.

    def terms(
        self, pred: Tensor, target: Tensor, mask: Tensor, fake: Judged | None, real: Judged | None
    ) -> Terms:
        raise NotImplementedError

    def seen(self, image: Tensor, target: Tensor, mask: Tensor) -> Tensor | list[Tensor]:
        raise NotImplementedError

    def discriminator_loss(self, real: Judged, fake: Judged, mask: Tensor) -> Tensor:
        raise NotImplementedError

    def gradient_penalty(self, real: Judged, images: Tensor) -> Tensor:
        raise NotImplementedError


class Fused(Published):
    """The method's objective in ``inpaint_kernels.objectives``."""

    def __init__(self, method: Method, features: FeatureTerms, backend: str | None) -> None:
        super().__init__(method)
        objective = method.objective_class(
            trunk=features.trunk, chunk=features.chunk, backend=backend, mask_is="valid", **method.changes
        )
        # The trunk is there already, LPIPS' weights are not.
        self.objective = objective.to(features.trunk.scale.device)

    def terms(
        self, pred: Tensor, target: Tensor, mask: Tensor, fake: Judged | None, real: Judged | None
    ) -> Terms:
        return Terms(**self.objective(pred, target, mask, fake=fake, real=real)._asdict())

    def seen(self, image: Tensor, target: Tensor, mask: Tensor) -> Tensor | list[Tensor]:
        stages = [image] * self.method.heads if self.method.heads > 1 else image
        images: Tensor | list[Tensor] = self.objective.discriminator_input(stages, target, mask)
        return images

    def discriminator_loss(self, real: Judged, fake: Judged, mask: Tensor) -> Tensor:
        loss: Tensor = self.objective.discriminator_loss(real=real, fake=fake, mask=mask).total
        return loss

    def gradient_penalty(self, real: Judged, images: Tensor) -> Tensor:
        penalty: Tensor = self.objective.discriminator_penalty(real, images)
        return penalty


class Eager(Published):
    """The same as its training script computes it. Losses are in float32, as autocast has them."""

    def __init__(self, method: Method, features: FeatureTerms) -> None:
        super().__init__(method)
        self.trunk = features.trunk

    def terms(
        self, pred: Tensor, target: Tensor, mask: Tensor, fake: Judged | None, real: Judged | None
    ) -> Terms:
        judged: dict[str, Any] = {}
        if self.adversarial:
            judged["fake"] = _logits(fake)
        if self.matches_features:
            judged |= {"fake_features": _features(fake), "real_features": _features(real)}
        mask = 1 - mask if self.method.hole_mask else mask
        terms = self.method.formula(self.trunk, pred.float(), target, mask, **judged)
        if "adversarial_stage1" in terms:
            terms["adversarial"] = terms["adversarial"] + terms.pop("adversarial_stage1")
        return Terms(**terms)

    def seen(self, image: Tensor, target: Tensor, mask: Tensor) -> Tensor | list[Tensor]:
        if self.settings.discriminator_image == "composite" and image is not target:
            image = published.composite(image, target, mask)
        if self.method.critic_input is not None:
            image = self.method.critic_input(image, mask)
        return [image] * self.method.heads if self.method.heads > 1 else image

    def discriminator_loss(self, real: Judged, fake: Judged, mask: Tensor) -> Tensor:
        assert self.method.discriminator is not None
        mask = 1 - mask if self.method.hole_mask else mask
        masks = [mask] if self.method.mask_labels else []
        return self.method.discriminator(_logits(real), _logits(fake), *masks)["total"]

    def gradient_penalty(self, real: Judged, images: Tensor) -> Tensor:
        assert self.method.penalty is not None
        return self.method.penalty(_logits(real), images)


def _logits(judged: Any) -> Any:
    outputs = getattr(judged, "logits", judged)
    return outputs.float() if isinstance(outputs, Tensor) else [logits.float() for logits in outputs]


def _features(judged: Any) -> list[Tensor]:
    return [features.float() for features in judged.features]
