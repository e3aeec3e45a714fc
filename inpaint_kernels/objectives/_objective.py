"""What the objectives share: settings with presets, terms on the features of a frozen trunk, plain or streamed."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..features.trunk import PREPROCESSINGS, FrozenTrunk, check_size, scale_and_shift
from ..nn._streaming import Term, check_chunk, weighted_terms
from ..ops import _checks
from ..ops._named_tuples import serializable
from ..ops.feature_distance import feature_distance
from ..ops.gram import gram_matrix
from ..ops.stacked_images import stacked_images
from ..ops.style import style_loss


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a trunk reads, where it is tapped, and what composites are made of."""

    layers: tuple[str, ...]
    predictions: tuple[str, ...] = ("raw", "composite")
    preprocess: str = "imagenet"
    swap_channels: bool = False
    mask_is: str = "valid"
    composite_from: str = "target"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_weight"):
                object.__setattr__(self, field.name, _checks.check_number(field.name, value))
        for name in ("layers", "predictions"):
            value = getattr(self, name)
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise TypeError(f"{name} must be a sequence of names, got {value!r}")
            if not value or len(set(value)) != len(value):
                raise ValueError(f"{name} must name at least one and none twice, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for part in self.predictions:
            _checks.check_choice("predictions", part, ("raw", "composite"))
        _checks.check_choice("preprocess", self.preprocess, PREPROCESSINGS)
        _checks.check_choice("mask_is", self.mask_is, ("valid", "hole"))
        _checks.check_choice("composite_from", self.composite_from, ("target", "masked_target"))
        if not isinstance(self.swap_channels, bool):
            raise TypeError(f"swap_channels must be True or False, got {self.swap_channels!r}")


AnySettings = TypeVar("AnySettings", bound=Settings)


def chosen(presets: Mapping[str, AnySettings], preset: str, given: Mapping[str, Any]) -> AnySettings:
    """The settings of a preset, with what is `given` for its fields in their place: the arguments of an objective,
    of which those that are None and those that are no field count for nothing here."""
    _checks.check_choice("preset", preset, tuple(presets))
    known = [field.name for field in dataclasses.fields(presets[preset])]
    return dataclasses.replace(
        presets[preset], **{name: given[name] for name in known if given[name] is not None}
    )


@dataclass(frozen=True)
class FeatureTerm:
    """A distance of feature maps, summed over `layers` and predictions; the ops take the mean over the latter."""

    layers: tuple[str, ...]
    predictions: int
    backend: str | None

    @property
    def weights(self) -> list[float]:
        return [float(self.predictions)] * len(self.layers)

    def prepared(self, maps: list[Tensor]) -> list[Tensor]:
        """What is worth keeping of the maps of a target that is used again."""
        return maps

    def distance(self, maps: list[Tensor], target: list[Tensor]) -> Tensor:
        """Of the predictions' maps from those of the target, prepared or not."""
        raise NotImplementedError


class Perceptual(FeatureTerm):
    """Mean absolute difference of the maps."""

    def distance(self, maps: list[Tensor], target: list[Tensor]) -> Tensor:
        return feature_distance(maps, target, weights=self.weights, backend=self.backend)


class Style(FeatureTerm):
    """Mean absolute difference of the Gram matrices, which are divided by C H W."""

    def prepared(self, maps: list[Tensor]) -> list[Tensor]:
        return [gram_matrix(features, backend=self.backend) for features in maps]

    def distance(self, maps: list[Tensor], target: list[Tensor]) -> Tensor:
        is_gram = target[0].ndim == 3
        return style_loss(maps, target, weights=self.weights, target_is_gram=is_gram, backend=self.backend)


@serializable
class Truth(NamedTuple):
    """What the feature terms of an objective compare with: for each of them tensors of batch N."""

    terms: tuple[list[Tensor], ...]

    def rows(self, begin: int, end: int) -> Truth:
        return Truth(tuple([value[begin:end] for value in values] for values in self.terms))


def check_trunk(trunk: FrozenTrunk, layers: Sequence[str]) -> FrozenTrunk:
    """A trunk that reads images as they are and is tapped at every one of `layers`."""
    if not isinstance(trunk, FrozenTrunk):
        raise TypeError(f"trunk must be a FrozenTrunk, got {type(trunk).__name__}")
    if trunk.preprocess != "none":
        raise ValueError(
            f"trunk has preprocess={trunk.preprocess!r}; the objective preprocesses the images itself, so give "
            "it one with preprocess='none'"
        )
    missing = [layer for layer in layers if layer not in trunk.names]
    if missing:
        raise ValueError(
            f"trunk does not tap {', '.join(missing)}, it taps {', '.join(trunk.names)}; give it these taps, or "
            "the objective other layers="
        )
    return trunk


def _moved(fn: Callable[[Tensor], Tensor], value: Tensor) -> Tensor:
    """`value` where `fn` takes it and as what, with its numbers: `to_empty` would leave them behind."""
    moved = fn(value)
    if moved is value or moved.is_meta:
        return moved
    if value.is_meta:
        raise RuntimeError(
            "the trunk of the objective was moved to the meta device, where its weights are lost, and no checkpoint "
            "brings them back: build the objective anew"
        )
    return moved.copy_(value)


class Objective(nn.Module):
    """Base of the objectives: the trunk, the images it reads and the terms on its features.

    The trunk moves and converts with the objective (`.to`, `.half`, ...) but is no submodule: it is fixed, so no
    optimizer, checkpoint, weight average or DDP broadcast of a model that holds the objective should see it. As no
    checkpoint would bring its weights, `to_empty` keeps them, and a trunk without any is refused.
    """

    settings: Settings

    def __init__(
        self,
        settings: Settings,
        terms: Mapping[str, tuple[float, FeatureTerm]],
        trunk: FrozenTrunk | None,
        chunk: int | None,
        backend: str | None,
    ) -> None:
        super().__init__()
        if trunk is not None and any(t.is_meta for t in trunk.features.state_dict().values()):
            raise ValueError(
                "trunk is on the meta device and has no weights, and no checkpoint of a model would bring them: "
                "build the objective outside of torch.device('meta')"
            )
        self.settings, self.backend, self.chunk = settings, backend, check_chunk(chunk)
        self._terms = {name: term for name, (weight, term) in terms.items() if weight}
        self._weights = [weight for weight, _ in terms.values() if weight]
        self._hidden = (trunk,)

    @property
    def trunk(self) -> FrozenTrunk | None:
        """None when no term needs one."""
        return self._hidden[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Objective:
        super()._apply(fn, recurse)
        if recurse and self.trunk is not None:
            self.trunk._apply(functools.partial(_moved, fn))
        return self

    def extra_repr(self) -> str:
        return f"{self.settings}, chunk={self.chunk}, backend={self.backend!r}"

    def prepare(self, target: Tensor) -> Truth:
        """What the feature terms need of a fixed target (N, C, H, W), for ``truth=`` of any number of calls.

        Of the style layers these are Gram matrices: against those, equal images differ by a rounding.
        """
        _checks.check_features("target", target)
        if self.trunk is not None:
            check_size(self.trunk, "target", target)
        with torch.no_grad():
            truth = self._maps(self._images(target, target, None, ("target",)))
            pairs = zip(self._terms.values(), truth.terms, strict=True)
            return Truth(tuple(term.prepared(maps) for term, maps in pairs))

    def _images(
        self,
        pred: Tensor,
        target: Tensor,
        mask: Tensor | None,
        parts: tuple[str, ...],
        preprocessed: bool = False,
    ) -> Tensor:
        """The parts as one batch for the trunk; `preprocessed`: pred and target are what it reads already."""
        s = self.settings
        gray = pred.shape[1] == 1
        as_given = preprocessed or (s.preprocess == "none" and not s.swap_channels and not gray)
        if as_given and parts in (("raw",), ("target",)):
            return pred if parts == ("raw",) else target
        scale = shift = None
        if s.preprocess != "none":
            scale, shift = scale_and_shift(s.preprocess)
        elif gray:
            scale = [1.0] * 3
        return stacked_images(
            pred,
            target,
            mask,
            parts=parts,
            scale=None if preprocessed else scale,
            shift=None if preprocessed else shift,
            swap_channels=s.swap_channels and not preprocessed,
            mask_is=s.mask_is,
            backend=self.backend,
        )

    def _composited(self, target: Tensor, mask: Tensor | None) -> Tensor:
        """What composites take their known pixels from."""
        # Masking twice is masking once where a mask has no fractions.
        if mask is None or self.settings.composite_from == "target" or not mask.is_floating_point():
            return target
        flipped = "valid" if self.settings.mask_is == "hole" else "hole"
        return stacked_images(
            target, target, mask, parts=("hole_target",), mask_is=flipped, backend=self.backend
        )

    def _picked(self, term: FeatureTerm, maps: list[Tensor]) -> list[Tensor]:
        assert self.trunk is not None
        return [maps[self.trunk.names.index(layer)] for layer in term.layers]

    def _maps(self, images: Tensor) -> Truth:
        if self.trunk is None:
            return Truth(())
        maps = self.trunk(images)
        return Truth(tuple(self._picked(term, maps) for term in self._terms.values()))

    def _check_truth(self, truth: Truth, samples: int) -> None:
        if not isinstance(truth, Truth):
            raise TypeError(f"truth must come from prepare(target), got {type(truth).__name__}")
        batches = {value.shape[0] for values in truth.terms for value in values}
        if len(truth.terms) != len(self._terms) or not batches <= {samples}:
            raise ValueError(
                f"truth holds {len(truth.terms)} terms of batch {sorted(batches)}; this objective compares "
                f"{', '.join(self._terms) or 'nothing'} with a target of batch {samples}: use its own prepare(target)"
            )

    def _feature_terms(
        self,
        pred: Tensor,
        target: Tensor,
        mask: Tensor | None,
        truth: Truth | None,
        preprocessed: bool = False,
        composited: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(weighted total, raw terms by name): predictions through the trunk in one pass, the target, without
        gradient, in another; that is left out if its `truth` is given. `composited` stands for the target in
        composites."""
        trunk, parts = self.trunk, self.settings.predictions
        assert trunk is not None
        if truth is not None:
            self._check_truth(truth, pred.shape[0])

        # Not one batch of predictions and target: its part without gradient would be kept with the others, and
        # filled with zeros on the way back.
        def inputs(rows: Tensor, begin: int, end: int) -> tuple[Tensor, Truth]:
            known = target[begin:end]
            if truth is None:
                with torch.no_grad():
                    goal = self._maps(self._images(known, known, None, ("target",), preprocessed))
            else:
                goal = truth.rows(begin, end)
            shared = mask is None or mask.ndim == 2 or mask.shape[0] == 1
            weights = mask if mask is None or shared else mask[begin:end]
            beside = known if composited is None else composited[begin:end]
            return self._images(rows, beside, weights, parts, preprocessed), goal

        def term_at(index: int, term: FeatureTerm) -> Term:
            return lambda maps, goal: term.distance(self._picked(term, maps), goal.terms[index])

        terms = [term_at(index, term) for index, term in enumerate(self._terms.values())]
        total, *found = weighted_terms(trunk, terms, self._weights, inputs, pred, pred.shape[0], self.chunk)
        return total, dict(zip(self._terms, found, strict=True))
