"""The base of the objectives: all terms of a table from one call, plain or streamed, and the discriminator's side."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..features.trunk import FrozenTrunk, check_size, scale_and_shift
from ..features.trunk_weights import Weights
from ..nn._streaming import Term as StreamedTerm
from ..nn._streaming import check_chunk, weighted_terms
from ..ops import _checks, _pixel
from ..ops.stacked_images import checked_images, serving
from ._discriminator_side import DiscriminatorSide
from ._pixel_terms import PixelTerms, reads_mask
from ._settings import chosen
from ._terms import (
    LPIPS,
    TRUTH_OF,
    Adversarial,
    FeatureMatching,
    FeatureTerm,
    Judged,
    Pixel,
    Term,
    TotalVariation,
    features_of,
    logits_of,
)
from ._trunk_passes import TrunkPass, Truth, check_trunk, trunk_passes

# What the docstring of every objective says of its arguments.
_ARGUMENTS = """
    Args:
        preset: a key of `presets`; the first by default.
        trunk: a `FrozenTrunk` with ``preprocess="none"`` that taps the settings' layers.
            {none} when the terms on features weigh 0.
        weights, channels_last, autocast: of the trunk that is built, see `ik.features.vgg16`.
        chunk: None keeps the trunk's activations for the backward. A number streams: trunk forward and backward run
            for so many samples at a time inside the forward, and of the terms on features only their gradient by
            `pred` is kept. Value and gradient are the same; those raw terms are then not differentiable, `total` is,
            once. Under ``torch.compile`` this breaks the graph.
        process_group: makes pixel terms means over all ranks, as `masked_l1_loss` does. The other terms are means
            over samples, right under DDP with equal batches.
        backend: None (automatic), "reference", "cpu", "triton" or "cuda", for every op; with "cuda" the images of the
            trunk and the discriminator, which have no CUDA kernels, are made by the automatic backend.
{settings}
            What is to differ from the preset; see the settings' class. A term that weighs 0 is not computed and
            returned as 0.

    ``forward(pred, target, mask=None, *, fake=None, real=None, truth=None)`` takes images (N, C, H, W), C = 3 or 1
    (replicated for the trunk), a mask as `hole_valid_loss`, and for terms with a discriminator what it returns for
    the prediction (`fake`) and for the truth (`real`): logits, a list of them, or ``DiscriminatorOutput(logits,
    features)``. It returns, unweighted but for the total,
    ``{result}({terms})``.
    ``truth = objective.prepare(target, mask)`` spares the trunk's pass over a target that is used again.
    ``discriminator_input(image, target, mask)`` is what the discriminator is shown of a prediction, or of the target
    itself, ``discriminator_loss(real=, fake=, mask=)`` its loss.

    Differentiable in `pred`, and in `fake` and, through it, the discriminator; `target` and `mask` get no gradient.
    `settings` shows every number. The trunk follows ``.to(...)`` but is no submodule: neither `parameters()` nor
    `state_dict()` of a model that holds the objective contain it. Hence `to_empty` keeps its weights, and an
    objective is not built on the meta device.

    Raises TypeError for an unknown setting, ValueError for a bad one, for a trunk that does not fit or is on the meta
    device, for what a term needs and does not get, and for images and masks as the ops do.
"""


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


class Objective(DiscriminatorSide):
    """Base of the objectives, each of which is a table of terms (`table`) and presets of its settings.

    The trunk moves and converts with the objective (`.to`, `.half`, ...) but is no submodule: it is fixed, so no
    optimizer, checkpoint, weight average or DDP broadcast of a model that holds the objective should see it. As no
    checkpoint would bring its weights, `to_empty` keeps them, and a trunk without any is refused.

    Example:
        >>> import inpaint_kernels as ik
        >>> objective = ik.objectives.DeepFillObjective("v2", hole_weight=2.0)
        >>> isinstance(objective, ik.objectives.Objective), objective.settings.hole_weight, objective.trunk
        (True, 2.0, None)
    """

    presets: ClassVar[Mapping[str, Any]]
    result: ClassVar[type[Any]]  # a named tuple: total, then the terms of the table
    net: ClassVar[Callable[..., FrozenTrunk] | None] = None  # builds the trunk; None: the caller brings it
    staged: ClassVar[bool] = False  # takes a list of images, of all stages of a network
    settings: Any

    def __init_subclass__(cls, **options: Any) -> None:
        """The signature names every setting; each of them is an argument that None leaves to the preset."""
        super().__init_subclass__(**options)
        if "presets" not in vars(cls):
            return
        keyword = inspect.Parameter.KEYWORD_ONLY
        given = inspect.signature(Objective.__init__).parameters | inspect.signature(cls.__init__).parameters
        _, first, *others = [p for p in given.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        fields = dataclasses.fields(next(iter(cls.presets.values())))
        settings = [
            inspect.Parameter(f.name, keyword, default=None, annotation=f"{f.type} | None") for f in fields
        ]
        first = first.replace(default=next(iter(cls.presets)))
        cls.__signature__ = inspect.Signature([first, *others, *settings])  # type: ignore[attr-defined]
        if cls.__doc__:
            names = ", ".join(field.name for field in fields) + ":"
            arguments = _ARGUMENTS.format(
                none="None builds the one named above, and none at all" if cls.net else "Leave it out only",
                settings=textwrap.fill(names, 116, initial_indent=" " * 8, subsequent_indent=" " * 12),
                result=cls.result.__name__,
                terms=", ".join(cls.result._fields),
            )
            cls.__doc__ = cls.__doc__.replace("{arguments}", arguments.strip())

    def __init__(
        self,
        preset: str | None = None,
        *,
        trunk: FrozenTrunk | None = None,
        weights: Weights | None = "default",
        chunk: int | None = None,
        channels_last: bool | None = None,
        autocast: torch.dtype | None = None,
        process_group: Any = None,
        backend: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.settings = chosen(self.presets, next(iter(self.presets)) if preset is None else preset, settings)
        self._terms = {name: term for name, term in self.table(self.settings).items() if term.weight}
        self._passes = trunk_passes(self._terms)
        counts = [len(each.terms) for each in self._passes]
        # Where the terms of each pass begin in a `Truth`.
        self._places = [sum(counts[:i]) for i in range(len(counts))]
        self._judged = {n: t for n, t in self._terms.items() if isinstance(t, (Adversarial, FeatureMatching))}
        pixels = {n: t for n, t in self._terms.items() if isinstance(t, (Pixel, TotalVariation))}
        self._pixels = PixelTerms(
            pixels, self.settings.mask_is, {"process_group": process_group, "backend": backend}
        )
        self._reads_mask = reads_mask(pixels) or any(
            set(getattr(term, "images", ())) - {"raw"}
            or getattr(term, "known_only", False)
            or (isinstance(term, FeatureMatching) and term.reads_known)
            for term in self._terms.values()
        )
        self._composes = any(
            "composite" in (*getattr(term, "images", ()), getattr(term, "image", None))
            for term in self._terms.values()
        )
        if process_group is not None:
            _pixel.check_group(process_group)
        self.process_group, self.backend, self.chunk = process_group, backend, check_chunk(chunk)
        if trunk is not None and (weights != "default" or channels_last is not None or autocast is not None):
            raise ValueError(
                "weights, channels_last and autocast are those of a trunk that is built; trunk= has its own"
            )
        layers = list(dict.fromkeys(layer for each in self._passes for layer in each.layers))
        if not layers:
            trunk = None
        elif trunk is None:
            build = type(self).net
            if build is None:
                raise ValueError(
                    f"trunk is missing: {type(self).__name__} compares features of a network that you bring, as "
                    "FrozenTrunk(module, taps)"
                )
            options = {"channels_last": channels_last, "autocast": autocast}
            trunk = check_trunk(build(layers, weights=weights, preprocess="none", **options), layers)
        else:
            check_trunk(trunk, layers)
        self._hidden: tuple[Any, ...] = (trunk,)
        self._constants = scale_and_shift(getattr(self.settings, "preprocess", "none"))

    def table(self, s: Any) -> dict[str, Term]:
        """The terms by name, made of the settings; one of weight 0 is not computed and returned as 0."""
        raise NotImplementedError

    @property
    def trunk(self) -> FrozenTrunk | None:
        """None when no term needs one."""
        return self._hidden[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Objective:
        super()._apply(fn, recurse)
        if recurse and self.trunk is not None:
            self.trunk._apply(functools.partial(_moved, fn))
            for term in self._terms.values():
                if isinstance(term, LPIPS):
                    term.heads.follow(fn)
        return self

    def extra_repr(self) -> str:
        return f"{self.settings}, chunk={self.chunk}, backend={self.backend!r}"

    def prepare(self, target: Tensor, mask: Tensor | None = None) -> Truth:
        """What the feature terms need of a fixed target (N, C, H, W), for ``truth=`` of any number of calls.

        `mask` is needed where a term reads images that are masked. Of the style layers these are Gram matrices:
        against those, equal images differ by a rounding.
        """
        _checks.check_features("target", target)
        if self.trunk is not None:
            check_size(self.trunk, "target", target)
        masked = [name for each in self._passes if each.truths != ["target"] for name in each.terms]
        if masked and mask is None:
            raise ValueError(f"mask is missing: {', '.join(masked)} compares images that are masked")
        mask = None if mask is None else _checks.check_mask(mask, target).detach()
        with torch.no_grad():
            found = []
            for each in self._passes:
                for term, maps in zip(each.terms.values(), self._maps_of(each, target, mask), strict=True):
                    found.append(term.prepared(maps, self.backend))
            return Truth(tuple(found))

    def forward(
        self,
        pred: Tensor | Sequence[Tensor],
        target: Tensor,
        mask: Tensor | None = None,
        *,
        fake: Judged | None = None,
        real: Judged | None = None,
        truth: Truth | None = None,
    ) -> Any:
        """The weighted total and the raw terms; arguments as the class says."""
        stages = _checks.as_layers("pred", pred)
        if len(stages) > 1 and not self.staged:
            raise ValueError(f"pred is a list of {len(stages)} images; {type(self).__name__} compares one")
        for stage in stages:
            _checks.check_images(stage, target)
        last = stages[-1]
        if self.trunk is not None:
            check_size(self.trunk, "pred", last)
        if truth is not None:
            self._check_truth(truth, last.shape[0])
        mask = self._checked_mask(mask, last)
        if target.requires_grad:
            target = target.detach()
        preprocessed = getattr(self.settings, "pixel_space", "image") == "trunk"
        if preprocessed:
            last = self._images(last, target, None, ("raw",))
            target = self._images(target, target, None, ("target",))
        composited = self._composited(target, mask) if self._composes else target
        found = self._pixel_terms([*stages[:-1], last], target, composited, mask)
        for each, begin in zip(self._passes, self._places, strict=True):
            own = None if truth is None else Truth(truth.terms[begin : begin + len(each.terms)])
            found = _added(
                found, *self._feature_terms(each, last, target, mask, own, preprocessed, composited)
            )
        for name, term in self._judged.items():
            known = self._known(mask) if term.reads_known else None
            if isinstance(term, Adversarial):
                value = term.generator(logits_of("fake", fake), known)
            else:
                features = features_of("fake", fake), features_of("real", real)
                value = term.matched(*features, known, self.backend)
            found = _added(found, value, {name: value}, term.weight)
        missing = [name for name in self.result._fields if name not in found]
        if missing:
            zero = last.new_zeros((), dtype=_pixel.accumulate(last, target))
            found |= dict.fromkeys(missing, zero)
        return self.result(**found)

    def _checked_mask(self, mask: Tensor | None, pred: Tensor) -> Tensor | None:
        if mask is not None:
            mask = _checks.check_mask(mask, pred)
            return mask.detach() if mask.requires_grad else mask
        if self._reads_mask:
            raise ValueError(
                "mask is missing: these settings tell the hole from known pixels, which needs it"
            )
        return None

    def _pixel_terms(
        self, stages: list[Tensor], target: Tensor, composited: Tensor, mask: Tensor | None
    ) -> dict[str, Tensor]:
        """The pixel terms by name and their weighted total, summed over the stages that the objective compares."""
        found = self._pixels(stages[-1], target, composited, mask)
        for stage in stages[:-1] if getattr(self.settings, "every_stage", False) else ():
            new = self._pixels(stage, target, composited, mask)
            found = {name: value + new[name] for name, value in found.items()}
        return found

    def _images(
        self,
        pred: Tensor,
        target: Tensor,
        mask: Tensor | None,
        parts: Sequence[str],
        preprocessed: bool = False,
    ) -> Tensor:
        """The parts as one batch for the trunk; `preprocessed`: pred and target are what it reads already."""
        s = self.settings
        gray = pred.shape[1] == 1
        as_given = preprocessed or (s.preprocess == "none" and not s.swap_channels and not gray)
        if as_given and tuple(parts) in (("raw",), ("target",)):
            return pred if tuple(parts) == ("raw",) else target
        scale: list[float] = []
        shift: list[float] = []
        if not preprocessed and s.preprocess != "none":
            scale, shift = self._constants
        elif not preprocessed and gray:
            scale = [1.0] * 3
        if scale and not gray and pred.shape[1] != len(scale):
            raise ValueError(
                f"pred has {pred.shape[1]} channels; the trunk reads images of 1 or {len(scale)}"
            )
        return checked_images(
            pred,
            target,
            None if set(parts) <= {"raw", "target"} else mask,
            parts=parts,
            scale=scale,
            shift=shift,
            swap=s.swap_channels and not preprocessed,
            mask_is=s.mask_is,
            backend=serving(self.backend),
        )

    def _maps_of(
        self, each: TrunkPass, target: Tensor, mask: Tensor | None, preprocessed: bool = False
    ) -> list[list[Tensor]]:
        """The maps of a target that the terms of a pass compare with."""
        assert self.trunk is not None
        maps = self.trunk(self._images(target, target, mask, each.truths, preprocessed), each.layers)
        return [
            each.picked(term, maps, each.truths, [TRUTH_OF[term.images[0]]]) for term in each.terms.values()
        ]

    def _check_truth(self, truth: Truth, samples: int) -> None:
        if not isinstance(truth, Truth):
            raise TypeError(f"truth must come from prepare(target), got {type(truth).__name__}")
        batches = {value.shape[0] for values in truth.terms for value in values}
        names = [name for each in self._passes for name in each.terms]
        if len(truth.terms) != len(names) or not batches <= {samples}:
            raise ValueError(
                f"truth holds {len(truth.terms)} terms of batch {sorted(batches)}; this objective compares "
                f"{', '.join(names) or 'nothing'} with a target of batch {samples}: use its own prepare(target)"
            )

    def _feature_terms(
        self,
        each: TrunkPass,
        pred: Tensor,
        target: Tensor,
        mask: Tensor | None,
        truth: Truth | None,
        preprocessed: bool,
        composited: Tensor,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(weighted total, raw terms by name): predictions through the trunk in one pass, the target, without
        gradient, in another; that is left out if its `truth` is given. `composited` stands for the target in
        composites."""
        trunk = self.trunk
        assert trunk is not None

        # Not one batch of predictions and target: its part without gradient would be kept with the others, and
        # filled with zeros on the way back.
        def inputs(rows: Tensor, begin: int, end: int) -> tuple[Tensor, tuple[Truth, Tensor | None]]:
            known = target[begin:end]
            shared = mask is None or mask.ndim == 2 or mask.shape[0] == 1
            weights = mask if mask is None or shared else mask[begin:end]
            if truth is None:
                with torch.no_grad():
                    goal = Truth(tuple(self._maps_of(each, known, weights, preprocessed)))
            else:
                goal = truth.rows(begin, end)
            images = self._images(rows, composited[begin:end], weights, each.images, preprocessed)
            return images, (goal, self._known(weights))

        def term_at(index: int, term: FeatureTerm) -> StreamedTerm:
            def distance(maps: list[Tensor], goal: tuple[Truth, Tensor | None]) -> Tensor:
                own = each.picked(term, maps, each.images, list(term.images))
                truths, known = goal
                return term.distance(
                    own, truths.terms[index], known if term.known_only else None, self.backend
                )

            return distance

        samples = pred.shape[0]
        terms = [term_at(index, term) for index, term in enumerate(each.terms.values())]
        sizes = [samples if term.batch_sum else 1 for term in each.terms.values()]
        weights = [term.weight * size for term, size in zip(each.terms.values(), sizes, strict=True)]
        run = functools.partial(trunk, layers=each.layers)
        total, *found = weighted_terms(run, terms, weights, inputs, pred, samples, self.chunk)
        values = [value if size == 1 else value * size for value, size in zip(found, sizes, strict=True)]
        return total, dict(zip(each.terms, values, strict=True))


def _added(
    found: dict[str, Tensor], value: Tensor, terms: dict[str, Tensor], weight: float = 1.0
) -> dict[str, Tensor]:
    """`found` with more terms, and with their total times a weight added to its own."""
    if "total" in found:
        total = torch.add(found["total"], value, alpha=weight)
    else:
        total = value if weight == 1 else value * weight
    return {**found, **terms, "total": total}
