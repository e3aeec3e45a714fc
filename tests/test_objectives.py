"""What all objectives share: settings, weights, masks, prepared targets, the discriminator's side, errors.

What they compute is in test_objective_parity.py and test_objective_partial_conv.py, how they train in
test_objective_training.py.
"""

from __future__ import annotations

import dataclasses
import doctest
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from harness import covering
from objective_table import (
    METHODS,
    WITH_CRITIC,
    WITH_TRUNK,
    assert_same,
    every_method,
    inputs,
    objective,
    settings_of,
    trunk,
)
from torch import Tensor
from training_checks import operator_calls
from trunk_cases import relative

import inpaint_kernels as ik
from inpaint_kernels.objectives import DiscriminatorOutput, Objective, Settings
from inpaint_kernels.objectives._terms import (
    LPIPS,
    Adversarial,
    FeatureMatching,
    FeatureTerm,
    Perceptual,
    Pixel,
    Style,
    TotalVariation,
)

CLASSES = [
    getattr(ik.objectives, name)
    for name in ik.objectives.__all__
    if name.endswith("Objective") and name != "Objective"
]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


# ---- settings ----------------------------------------------------------------------------------------------------


@every_class
def test_settings_can_be_looked_at(cls: Any) -> None:
    """And are fixed; each is an argument that None leaves to the preset."""
    off = {f"{term}_weight": 0.0 for term in cls.result._fields[1:]}  # which needs no trunk
    for preset, settings in cls.presets.items():
        assert isinstance(settings, Settings)
        names = [f.name for f in dataclasses.fields(settings)]
        loss = cls(preset, **dict.fromkeys(names) | off)
        assert loss.settings == dataclasses.replace(settings, **off)
        assert all(f"{name}={getattr(loss.settings, name)!r}" in repr(loss) for name in names)
        with pytest.raises(dataclasses.FrozenInstanceError):
            loss.settings.mask_is = "valid"
    assert cls(**off).settings == dataclasses.replace(next(iter(cls.presets.values())), **off)
    with pytest.raises(TypeError):
        cls.presets["new"] = settings


@every_class
def test_signature_and_docstrings_name_every_setting(cls: Any) -> None:
    arguments = inspect.signature(cls).parameters
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in arguments.values())
    assert arguments["preset"].default == next(iter(cls.presets))
    kind = type(cls.presets[arguments["preset"].default])
    documented = "".join(base.__doc__ for base in kind.__mro__ if base is not object)
    for f in dataclasses.fields(kind):
        assert arguments[f.name].default is None
        assert f.name in cls.__doc__ and f.name in documented
    for name in (*cls.presets, *cls.result._fields):
        assert name in cls.__doc__
    assert cls.__doc__.splitlines()[0].endswith(".") and cls.result.__doc__ and kind.__doc__
    assert not any(text in cls.__doc__ for text in ("{arguments}", "{settings}", "{result}", "{terms}"))


@every_class
def test_examples_in_docstrings(cls: Any) -> None:
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder(recurse=False).find(cls, cls.__name__):
        assert runner.run(example).failed == 0 and runner.tries > 1


# ---- weights -----------------------------------------------------------------------------------------------------

OPS = {
    Pixel: {"inpainting_pixel", "hole_valid", "masked_l1"},
    TotalVariation: {"total_variation", "stacked_images"},
    Perceptual: {"feature_distance", "stacked_images"},
    Style: {"style", "gram", "stacked_images"},
    LPIPS: {"lpips", "stacked_images"},
    FeatureMatching: {"feature_distance"},
}


def all_weights(name: str) -> dict[str, float]:
    """Of every term, those that a preset leaves out as well."""
    settings = settings_of(name)
    terms = METHODS[name].objective.result._fields[1:]
    return {f"{term}_weight": getattr(settings, f"{term}_weight") or 0.5 for term in terms}


@every_method
def test_each_term_alone(name: str) -> None:
    """It has its own weight, runs its own ops, and the trunk once over the prediction and once over the truth.

    The other terms are zero and not computed, and only what reads a discriminator's output asks for it.
    """
    x, weights = inputs(name), all_weights(name)
    usual = objective(name, **weights)
    outputs = x.outputs(usual)
    want = x.terms(usual, **outputs)
    values = {key: getattr(want, key.removesuffix("_weight")) for key in weights}
    torch.testing.assert_close(want.total, sum(weights[key] * value for key, value in values.items()))
    table = usual.table(usual.settings)
    for key, value in values.items():
        term, weight = key.removesuffix("_weight"), weights[key] + 1.75
        loss = objective(name, **dict.fromkeys(weights, 0) | {key: weight})
        assert getattr(loss.settings, key) == weight
        passes: list[int] = []
        if loss.trunk is not None:
            loss.trunk.register_forward_hook(lambda *call, passes=passes: passes.append(1))
        call = functools.partial(loss, x.pred, x.target, x.mask)
        if isinstance(table[term], (Adversarial, FeatureMatching)):
            call = functools.partial(call, **outputs)
        results: list[Any] = []
        calls = operator_calls(lambda call=call, results=results: results.append(call()))
        of_features = isinstance(table[term], FeatureTerm)
        allowed = {op for kind, ops in OPS.items() if isinstance(table[term], kind) for op in ops}
        if of_features or name == "pconv-nvidia":  # which normalises all images
            allowed |= {"stacked_images"}
        assert {call.name.removesuffix("_backward").rpartition("_")[0] for call in calls} <= allowed
        assert len(passes) == (2 if of_features else 0)
        (terms,) = results
        assert value != 0
        torch.testing.assert_close(getattr(terms, term), value)
        torch.testing.assert_close(terms.total, weight * value)
        others = [other for key, other in terms._asdict().items() if key not in ("total", term)]
        assert all(other == 0 and other.dtype == terms.total.dtype for other in others)
    nothing = objective(name, **dict.fromkeys(weights, 0))
    assert nothing.trunk is None and not any(nothing(x.pred, x.target, x.mask))


# ---- images and masks --------------------------------------------------------------------------------------------


@every_method
def test_equal_images(name: str) -> None:
    """No distance is left, and none has a gradient."""
    x = inputs(name, mask="binary")
    x.leaves = [x.target.clone().requires_grad_() for _ in x.leaves]
    loss = objective(name, **{"tv_weight": 0} if "pconv" in name else {})
    truth = detached(x.judged(loss, x.target)) if x.critic else None
    terms = loss(x.pred, x.target, x.mask, fake=truth, real=truth)
    assert not any(value for term, value in terms._asdict().items() if term not in ("total", "adversarial"))
    assert not x.gradient(terms.total).any()


@every_method
def test_gray_images(name: str) -> None:
    """Three times for the trunk, once for the pixel terms."""
    x = inputs(name, channels=1)
    leaves = [leaf.detach().expand(-1, 3, -1, -1).clone().requires_grad_() for leaf in x.leaves]
    wide = x.changed(leaves=leaves, target=x.target.expand(-1, 3, -1, -1))
    loss = objective(name)
    judged = {key: detached(value) for key, value in x.outputs(loss).items()}
    gray, rgb = x.terms(loss, **judged), wide.terms(loss, **judged)
    torch.testing.assert_close(gray, rgb)
    assert relative(x.gradient(gray.total), wide.gradient(rgb.total).sum(1, keepdim=True)) < 1e-5


def detached(output: DiscriminatorOutput) -> DiscriminatorOutput:
    return torch.utils._pytree.tree_map(Tensor.detach, output)


@every_method
def test_channels_last(name: str) -> None:
    def view(x: Tensor) -> Tensor:
        return x.detach().contiguous(memory_format=torch.channels_last)

    x = inputs(name)
    leaves = [view(leaf).requires_grad_() for leaf in x.leaves]
    y = x.changed(target=view(x.target), leaves=leaves)
    want = x.terms(objective(name))
    terms = y.terms(objective(name, trunk=trunk(name, channels_last=True)))
    torch.testing.assert_close(terms, want)
    assert relative(y.gradient(terms.total), x.gradient(want.total)) < 1e-5
    if x.critic is None:
        (gradient,) = torch.autograd.grad(terms.total, leaves)
        assert gradient.is_contiguous(memory_format=torch.channels_last)


@every_method
def test_mask_is(name: str) -> None:
    """The same numbers from the inverse mask; hole and valid keep their names."""
    x = inputs(name)
    usual = objective(name)
    other = objective(name, mask_is={"valid": "hole", "hole": "valid"}[usual.settings.mask_is])
    y = x.changed(mask=1 - x.mask)
    assert_same(x, y.terms(other), x.terms(usual))
    if x.critic is not None:
        torch.testing.assert_close(y.discriminator_loss(other), x.discriminator_loss(usual))


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "shared": lambda m: m[:1],
    "row": lambda m: m[:1, :, :1],
    "plane": lambda m: m[0, 0],
    "bool": Tensor.bool,
    "bytes": lambda m: (255 * m).to(torch.uint8),
}


@covering(name=METHODS, form=FORMS)
def test_masks_of_every_form(name: str, form: str) -> None:
    x = inputs(name, mask="binary")
    x.mask = (x.mask[:1, :, 4:5] if form == "row" else x.mask[:1]).expand_as(x.mask)
    y = x.changed(mask=FORMS[form](x.mask))
    plain = objective(name)
    for loss in (plain, objective(name, chunk=2)):
        assert_same(x, y.terms(loss), x.terms(plain))
    if x.critic is not None and form != "row":
        torch.testing.assert_close(y.discriminator_loss(plain), x.discriminator_loss(plain))


@every_method
def test_masks_with_channels(name: str) -> None:
    """Right for what is computed pixel by pixel, refused where a mask stands for a plane."""
    x = inputs(name)
    loss = objective(name)
    y = x.changed(mask=x.mask.expand(-1, x.target.shape[1], -1, -1))
    if name in ("MAT", "LaMa-switches", "AOT-GAN-released", "AOT-GAN-paper", "DeepFill-v2"):
        with pytest.raises(ValueError, match=r"mask has shape \(3, 3, 16, 16\).*\(N, 1, H, W\)"):
            y.terms(loss)
    else:
        assert_same(x, y.terms(loss), x.terms(loss))


@every_method
def test_no_mask(name: str) -> None:
    """An error that says so, or every pixel is known."""
    x = inputs(name, mask="known")
    loss = objective(name)
    outputs = x.outputs(loss)
    if name in ("pconv-nvidia", "TransCNN-HAE", "LaMa-paper", "EdgeConnect-edge"):
        assert_same(x, loss(x.pred, x.target, **outputs), x.terms(loss))
    else:
        with pytest.raises(ValueError, match="mask is missing"):
            loss(x.pred, x.target, **outputs)


@pytest.mark.parametrize("kind", ["holes", "known"])
@every_method
def test_masks_of_one_kind(name: str, kind: str) -> None:
    """All hole, or no hole at all."""
    x = inputs(name, mask=kind)
    loss = objective(name)
    found = x.terms(loss)
    assert all(map(torch.isfinite, found)) and bool(x.gradient(found.total).isfinite().all())
    if x.critic is not None:
        assert all(map(torch.isfinite, x.discriminator_loss(loss)))
    if kind == "known" and hasattr(found, "hole"):
        assert found.hole == 0
    if kind == "known" and name in ("EdgeConnect-inpaint", "CMT"):
        assert (found.l1 if name == "EdgeConnect-inpaint" else found.perceptual) == 0


# ---- a target that is used again ---------------------------------------------------------------------------------

MASKED = ("CTN", "T-former", "EdgeConnect-inpaint")


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("name", WITH_TRUNK)
def test_truth_that_was_prepared(name: str, chunk: int | None) -> None:
    x = inputs(name)
    loss = objective(name, chunk=chunk)
    want = x.terms(loss)
    passes: list[int] = []
    loss.trunk.register_forward_hook(lambda _m, images, _o: passes.append(len(images[0])))
    if name in MASKED:
        with pytest.raises(ValueError, match="mask is missing: style compares images that are masked"):
            loss.prepare(x.target)
    passes.clear()
    truth = loss.prepare(x.target, x.mask if name in MASKED else None)
    assert passes == [len(x.target)] * METHODS[name].passes
    assert not any(value.requires_grad for values in truth.terms for value in values)
    passes.clear()
    found = x.terms(loss, truth=truth)
    assert sum(passes) == METHODS[name].parts * len(x.target)
    assert_same(x, found, want)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in WITH_TRUNK])
def test_nothing_to_prepare(name: str) -> None:
    x = inputs(name)
    loss = objective(name)
    assert_same(x, x.terms(loss, truth=loss.prepare(x.target)), x.terms(loss))


class _Terms(NamedTuple):
    total: Tensor
    perceptual: Tensor
    style: Tensor
    masked: Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Settings(Settings):
    """Of `_Overlapping`."""


class _Overlapping(Objective):
    """Terms of which two share an image, and a third has its own."""

    presets = types.MappingProxyType({"one": _Settings()})
    result = _Terms

    def table(self, s: Any) -> dict[str, Any]:
        return {
            "style": Style(3.0, ("layer2",), ("raw", "composite")),
            "perceptual": Perceptual(2.0, ("layer1", "layer3"), ("composite",), (0.5, 3.0)),
            "masked": Perceptual(4.0, ("layer4",), ("hole_raw",)),
        }


@pytest.mark.parametrize("chunk", [None, 2])
def test_terms_that_share_an_image_share_a_pass(chunk: int | None) -> None:
    """Each with its own rows of it."""
    x = inputs("TransCNN-HAE")
    trunk = objective("LaMa").trunk
    calls: list[int] = []
    trunk.register_forward_hook(lambda _m, images, _o: calls.append(len(images[0])))
    loss = _Overlapping(trunk=trunk, chunk=chunk)
    found = loss(x.pred, x.target, x.mask)
    n = len(x.target)
    assert sum(calls) == 2 * n + n + n + n  # raw and composite, the truth, the raw hole, that of the truth
    composite = ik.composite(x.pred, x.target, x.mask)
    raw, mixed, truth, hole, hole_truth = (
        trunk(image) for image in (x.pred, composite, x.target, (1 - x.mask) * x.pred, (1 - x.mask) * x.target)
    )  # fmt: skip
    gram = ik.gram_matrix
    want = [
        0.5 * (mixed[0] - truth[0]).abs().mean() + 3 * (mixed[2] - truth[2]).abs().mean(),
        sum((gram(image[1]) - gram(truth[1])).abs().mean() for image in (raw, mixed)),
        (hole[3] - hole_truth[3]).abs().mean(),
    ]
    total = 2 * want[0] + 3 * want[1] + 4 * want[2]
    assert_same(x, found, _Terms(total, *want))
    truths = loss.prepare(x.target, x.mask)
    assert_same(x, loss(x.pred, x.target, x.mask, truth=truths), found)


# ---- the discriminator's side ------------------------------------------------------------------------------------


COMPOSED = [name for name in WITH_CRITIC if settings_of(name).discriminator_image == "composite"]


@pytest.mark.parametrize("name", WITH_CRITIC)
def test_what_the_discriminator_is_shown(name: str) -> None:
    """The composite or the raw prediction, and what else a method's discriminator reads; the truth as it is."""
    x = inputs(name)
    loss = objective(name)
    x.target.requires_grad_()
    x.mask.requires_grad_()
    valid = (x.mask if loss.settings.mask_is == "valid" else 1 - x.mask).detach()

    def with_more(image: Tensor) -> Tensor:
        before = {"MAT": valid - 0.5, "EdgeConnect-edge": x.condition}.get(name, image[:, :0])
        return torch.cat([before, image, (1 - valid) if name == "DeepFill-v2" else image[:, :0]], 1)

    def shown(image: Any) -> Any:
        return loss.discriminator_input(image, x.target, x.mask, condition=x.condition)

    for image in (x.target, x.target.detach()):
        assert torch.equal(shown(image), with_more(image))
    assert shown(x.target).requires_grad
    y = (valid * x.target if name.startswith("DeepFill") else x.target).detach()
    found = shown(x.pred)
    assert isinstance(found, list) == (name == "MAT")
    stages = x.leaves if name == "MAT" else x.leaves[-1:]
    for got, leaf in zip(found if name == "MAT" else [found], stages, strict=True):
        torch.testing.assert_close(
            got, with_more(valid * y + (1 - valid) * leaf if name in COMPOSED else leaf)
        )
        gradient, *others = torch.autograd.grad(got.sum(), [leaf, x.target, x.mask], allow_unused=True)
        want = 1 - valid if name in COMPOSED else torch.ones_like(valid)
        torch.testing.assert_close(gradient, want.expand_as(leaf))
        assert others == [None, None]


@pytest.mark.parametrize("name", COMPOSED)
def test_composites_that_are_shown_select(name: str) -> None:
    """Where the mask is 0 or 1, nothing is mixed: what is there to be seen is exact, and NaN elsewhere stays away."""
    x = inputs(name, mask="binary")
    loss = objective(name)
    valid = (x.mask if loss.settings.mask_is == "valid" else 1 - x.mask).bool().expand_as(x.target)
    last = x.leaves[-1].detach()
    want = torch.where(valid, x.target, last)
    target, pred = x.target.where(valid, float("nan")), last.where(~valid, float("nan"))
    shown = loss.discriminator_input(pred, target, x.mask)
    begin = 1 if name == "MAT" else 0
    assert torch.equal(shown[:, begin : begin + 3], want)


@pytest.mark.parametrize("name", WITH_CRITIC)
def test_the_discriminator_learns_from_its_own_loss_and_the_generator_through_it(name: str) -> None:
    x = inputs(name)
    loss = objective(name)
    parameters = list(x.critic.parameters())
    terms = x.terms(loss)
    assert any(g.any() for g in torch.autograd.grad(terms.total, parameters, retain_graph=True))
    assert x.gradient(terms.adversarial).any()
    found = x.discriminator_loss(loss)
    assert not x.gradient(found.total).any()
    assert any(g.any() for g in torch.autograd.grad(found.total, parameters))


def test_labels_of_aot_gan_under_autocast() -> None:
    """Neither the blurred mask nor the loss is rounded to the half type."""
    x = inputs("AOT-GAN-paper")
    loss = objective("AOT-GAN-paper")
    logits = {"real": torch.ones(3, 1, 4, 4), "fake": torch.zeros(3, 1, 4, 4)}
    want = loss.discriminator_loss(**logits, mask=x.mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss.discriminator_loss(**logits, mask=x.mask) == want
