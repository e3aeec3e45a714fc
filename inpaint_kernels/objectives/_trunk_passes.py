"""What the terms on features read: passes of a trunk, and the truth that they are compared with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..features.trunk import FrozenTrunk
from ..ops._named_tuples import serializable
from ._terms import TRUTH_OF, FeatureTerm, Maps, Term


@serializable
class Truth(NamedTuple):
    """What the feature terms of an objective compare with: for each of them tensors of batch N."""

    terms: tuple[list[Tensor], ...]

    def rows(self, begin: int, end: int) -> Truth:
        return Truth(tuple([value[begin:end] for value in values] for values in self.terms))


@dataclasses.dataclass
class TrunkPass:
    """Terms whose images overlap, and what they read together: the trunk runs once over all of it."""

    terms: dict[str, FeatureTerm]
    images: list[str]
    truths: list[str]
    layers: list[str]

    def picked(self, term: FeatureTerm, maps: Maps, parts: list[str], wanted: list[str]) -> Maps:
        """The maps of a term's layers, and of the parts of the batch that it reads."""
        own = [maps[self.layers.index(layer)] for layer in term.layers]
        if wanted == parts:
            return own
        rows = [parts.index(part) for part in wanted]
        return [torch.cat([m.chunk(len(parts))[row] for row in rows]) for m in own]


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
    if any(t.is_meta for t in trunk.features.state_dict().values()):
        raise ValueError(
            "trunk is on the meta device and has no weights, and no checkpoint of a model would bring them: "
            "build the objective outside of torch.device('meta')"
        )
    return trunk


def trunk_passes(terms: Mapping[str, Term]) -> list[TrunkPass]:
    """Terms that share an image share a pass. One over images that have no term in common would carry gradients that
    are zero, and run some of the images further than their own terms read."""
    passes: list[TrunkPass] = []
    for name, term in terms.items():
        if not isinstance(term, FeatureTerm):
            continue
        merged = TrunkPass({}, [], [], [])
        for other in [p for p in passes if set(p.images) & set(term.images)]:
            passes.remove(other)
            merged.terms |= other.terms
        merged.terms[name] = term
        for each in merged.terms.values():
            merged.images += [image for image in each.images if image not in merged.images]
            merged.layers += [layer for layer in each.layers if layer not in merged.layers]
        merged.truths = list(dict.fromkeys(TRUTH_OF[image] for image in merged.images))
        passes.append(merged)
    return passes
