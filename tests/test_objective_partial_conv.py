"""PartialConvObjective: every term of every preset against what the sources compute, overrides, bad arguments."""

from __future__ import annotations

import unittest.mock
from typing import Any

import pytest
import torch
from harness import DTYPES, Backend, assert_within_budget, grid
from objective_cases import (
    FORMULAS,
    MASKS,
    TERMS,
    gradients,
    images,
    known,
    mask_for,
    narrow_stack,
    objective,
    relative,
    trunk,
    vgg_maps,
    whitened,
)
from pixel_cases import skip_unsupported
from torch import Tensor

import inpaint_kernels as ik
from inpaint_kernels.features import FrozenTrunk
from inpaint_kernels.objectives import _pixel_terms

PRESETS = tuple(FORMULAS)
Objective = ik.objectives.PartialConvObjective


def check(found: Any, formula: Any, inputs: tuple[Tensor, Tensor, Tensor | None], pred: Tensor) -> None:
    """Values and gradients of all terms within budget of the formula in float64."""
    acc = torch.float64 if pred.dtype == torch.float64 else torch.float32

    def evaluated(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        x, y, mask = (None if t is None else t.detach().cpu().to(dtype) for t in inputs)
        x.requires_grad_()
        terms = formula(x, y, mask)
        return tuple(t.detach() for t in terms), gradients(terms, x)

    plain, truth = evaluated(acc), evaluated(torch.float64)
    got = gradients(found, pred)
    for i, name in enumerate(("total", *TERMS)):
        assert found[i].shape == () and found[i].dtype == acc, name
        assert_within_budget(found[i], plain[0][i], truth[0][i], acc=acc, what=name)
        # Over many layers roundings add up, and a sign that they turn is one in 10^5.
        floor = 100 * torch.finfo(acc).eps
        error, usual = relative(got[i].cpu(), truth[1][i]), relative(plain[1][i], truth[1][i])
        assert error <= 2 * usual + floor, f"gradient of {name}: {error:.3g}, plain {usual:.3g}"


@pytest.fixture(autouse=True)
def _exact_convolutions() -> Any:
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@grid(preset=PRESETS, mask=MASKS, dtype=("f32", "f64"))
def test_every_term_is_as_published(preset: str, mask: str, dtype: str, backend: Backend) -> None:
    pred, target, weights = (t.to(DTYPES[dtype]) for t in (*images(preset), mask_for(preset, mask)))
    skip_unsupported(backend, pred)
    loss = objective(preset, backend=backend.name).to(backend.device, DTYPES[dtype])
    leaf = pred.to(backend.device).requires_grad_()
    found = loss(leaf, target.to(backend.device), weights.to(backend.device))
    check(found, lambda *i: FORMULAS[preset](narrow_stack(), *i), (pred, target, weights), leaf)


@pytest.mark.parametrize("preset", PRESETS)
def test_with_vgg16_itself(preset: str) -> None:
    """The trunk that is built is tapped where the sources tap it."""
    size = (1, 3, 32, 24)
    pred, target, mask = *images(preset, size), mask_for(preset, "binary", size)
    torch.manual_seed(1)
    loss = Objective(preset, weights=None).double()
    stack = loss.trunk.features
    leaf = pred.double().requires_grad_()
    found = loss(leaf, target.double(), mask.double())
    check(found, lambda *i: FORMULAS[preset](stack, *i), (pred, target, mask), leaf)


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("preset", ["paper", "naoto0804", "mmagic"])
def test_composites_of_the_masked_target(preset: str, chunk: int | None) -> None:
    """A setting, on in one preset. Composites read it, the truth that they are compared with stays."""
    assert (Objective.presets[preset].composite_from == "masked_target") == (preset == "naoto0804")
    pred, target = images(preset)
    mask = mask_for(preset, "fractional")
    valid = 1 - mask if preset == "mmagic" else mask
    alone = {"chunk": chunk, "hole_weight": 0, "valid_weight": 0}
    plain = objective(preset, composite_from="target", **alone)
    leaf = pred.requires_grad_()
    found = objective(preset, composite_from="masked_target", **alone)(leaf, target, mask)
    want = plain(leaf, valid * target, mask, truth=plain.prepare(target))
    torch.testing.assert_close(found, want)
    gradients_of = [torch.autograd.grad(terms.total, leaf)[0] for terms in (found, want)]
    assert relative(*gradients_of) < 1e-5
    usual = plain(leaf, target, mask)
    for name in ("tv", "perceptual", "style"):
        assert relative(getattr(found, name).detach(), getattr(usual, name).detach()) > 1e-3


def test_nan_in_holes_stays_out_of_composites_of_the_masked_target() -> None:
    pred, target = images("naoto0804")
    mask = known("fractional")
    mask[..., :4, :4] = 0
    loss = objective("naoto0804", hole_weight=0, valid_weight=0)
    truth = loss.prepare(target)
    want = loss(pred, target, mask, truth=truth)
    target[..., :4, :4] = float("nan")
    assert loss(pred, target, mask, truth=truth) == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_masks_without_fractions_make_the_usual_composite(dtype: torch.dtype) -> None:
    """A bool mask has none for sure, so the pixel terms stay one op."""
    pred, target = images("naoto0804")
    mask = known("binary").to(dtype)
    loss = objective("naoto0804")
    want = objective("naoto0804", composite_from="target")(pred, target, mask)
    torch.testing.assert_close(loss(pred, target, mask), want)
    with unittest.mock.patch.object(
        _pixel_terms, "inpainting_pixel_loss", wraps=ik.inpainting_pixel_loss
    ) as one:
        loss(pred, target, mask)
    assert one.called == (dtype == torch.bool)


def test_nvidia_takes_no_mask() -> None:
    pred, target = images("nvidia")
    leaf = pred.requires_grad_()
    found = objective("nvidia")(leaf, target)
    check(found, lambda *i: FORMULAS["nvidia"](narrow_stack(), *i), (pred, target, None), leaf)
    assert found.hole == 0


def test_nvidia_smoothness() -> None:
    """On the normalised prediction."""
    pred, target = images("nvidia")
    leaf = pred.requires_grad_()
    mask = known("binary")
    for given in (mask, None):
        found = objective("nvidia", tv_weight=0.3)(leaf, target, given)
        formula = lambda *i: FORMULAS["nvidia"](narrow_stack(), *i, smooth=0.3)  # noqa: E731
        check(found, formula, (pred, target, given), leaf)


# Overrides


def test_without_feature_terms_no_trunk_is_built() -> None:
    """Nor weights looked for."""
    loss = Objective("paper", perceptual_weight=0, style_weight=0, weights="/no/such/file")
    assert loss.trunk is None
    pred, target = images("paper")
    found, usual = (o(pred, target, known("binary")) for o in (loss, objective()))
    assert found.hole == usual.hole and found.tv == usual.tv and found.style == 0
    torch.testing.assert_close(found.total, 6 * usual.hole + usual.valid + 0.1 * usual.tv)
    assert loss(pred, target, known("binary"), truth=loss.prepare(target)).total == found.total


@pytest.mark.parametrize("preset", PRESETS)
def test_swap_channels_is_for_the_trunk_alone(preset: str) -> None:
    pred, target = images(preset)
    mask = mask_for(preset, "binary")
    found = objective(preset, swap_channels=True)(pred, target, mask)
    usual, flipped = (
        objective(preset)(pred, target, mask),
        objective(preset)(pred.flip(1), target.flip(1), mask),
    )
    for name in ("perceptual", "style"):
        torch.testing.assert_close(getattr(found, name), getattr(flipped, name))
        assert getattr(found, name) != getattr(usual, name)
    if preset != "nvidia":
        assert found[1:4] == usual[1:4]


def test_predictions() -> None:
    """One of them alone: the term of that one."""
    pred, target = images("paper")
    mask = known("binary")
    composite = mask * target + (1 - mask) * pred
    goal = vgg_maps(narrow_stack(), whitened(target))
    for name, image in (("raw", pred), ("composite", composite)):
        found = objective(predictions=[name])(pred, target, mask)
        maps = vgg_maps(narrow_stack(), whitened(image))
        want = sum((a - b).abs().mean() for a, b in zip(maps, goal, strict=True))
        torch.testing.assert_close(found.perceptual, want.detach())


def test_layers() -> None:
    """Any of the trunk's, under the names the trunk knows them by."""
    pred, target = images("paper")
    mask = known("binary")
    found = objective(layers=["pool3"])(pred, target, mask)
    numbered = FrozenTrunk(narrow_stack(), ["9", "16"])
    assert objective(layers=("16",), trunk=numbered)(pred, target, mask).style == found.style
    vgg = Objective(layers=("relu2_2", "relu1_1"), weights=None).trunk
    assert vgg.names == ["relu2_2", "relu1_1"] and vgg.preprocess == "none"


@pytest.mark.parametrize(
    ("preset", "overrides"),
    [
        ("paper", {"normalize": "mask", "tv_region": "first_pixel", "tv_normalize": "mask"}),
        ("paper", {"tv_region": "image", "tv_normalize": "pairs", "normalize": "sample"}),
        ("paper", {"tv_image": "raw", "tv_region": "hole"}),
        ("naoto0804", {"pixel_space": "trunk"}),
        ("mmagic", {"pixel_space": "trunk", "swap_channels": True}),
        ("nvidia", {"predictions": ("raw", "composite"), "tv_weight": 0.2, "tv_image": "composite"}),
    ],
)
def test_denominators_regions_and_spaces(preset: str, overrides: dict[str, Any]) -> None:
    pred, target = images(preset)
    mask = mask_for(preset, "binary")
    loss = objective(preset, **overrides)
    s = loss.settings
    found = loss(pred, target, mask)
    if s.pixel_space == "trunk" and preset != "naoto0804":
        unit = [(t + 1) / 2 if preset == "mmagic" else t for t in (pred, target)]
        pred, target = (whitened(t.flip(1) if s.swap_channels else t) for t in unit)
        # Once: the trunk reads the same images.
        as_given = {"preprocess": "none", "swap_channels": False, "pixel_space": "image"}
        plain = objective(preset, **overrides | as_given)(pred, target, mask)
        torch.testing.assert_close((found.perceptual, found.style), (plain.perceptual, plain.style))
    hole, valid = ik.hole_valid_loss(pred, target, mask, normalize=s.normalize, mask_is=s.mask_is)
    of = target if s.tv_image == "composite" else None
    options = {"region": s.tv_region, "normalize": s.tv_normalize, "mask_is": s.mask_is}
    read = None if of is None and s.tv_region == "image" else mask
    tv = ik.total_variation_loss(pred, read, target=of, **options)
    for got, want in zip(found[1:4], (hole, valid, tv), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"preset": "liu"}, ValueError, "preset.*'liu'.*'paper', 'nvidia', 'naoto0804', 'mmagic'"),
        ({"styleweight": 1.0}, TypeError, "unexpected keyword argument 'styleweight'"),
        ({"style_weight": "120"}, TypeError, "style_weight.*str"),
        ({"style_weight": float("nan")}, ValueError, "style_weight.*nan"),
        ({"hole_weight": True}, TypeError, "hole_weight.*bool"),
        ({"normalize": "pairs"}, ValueError, "normalize.*'pairs'.*'image'"),
        ({"preprocess": "caffe"}, ValueError, "preprocess.*'caffe'.*'imagenet_tanh'"),
        ({"mask_is": "known"}, ValueError, "mask_is.*'known'.*'hole'"),
        ({"tv_region": "all"}, ValueError, "tv_region.*'all'.*'dilated_hole'"),
        ({"tv_normalize": "sample"}, ValueError, "tv_normalize.*'sample'.*'pairs'"),
        ({"tv_region": "image", "tv_normalize": "mask"}, ValueError, "tv_normalize.*tv_region"),
        ({"tv_image": "target"}, ValueError, "tv_image.*'target'.*'raw'"),
        ({"composite_from": "pred"}, ValueError, "composite_from.*'pred'.*'masked_target'"),
        ({"process_group": "gloo"}, TypeError, "process_group.*ProcessGroup.*'gloo'"),
        ({"pixel_space": "vgg"}, ValueError, "pixel_space.*'vgg'.*'trunk'"),
        ({"predictions": "raw"}, TypeError, "predictions.*'raw'"),
        ({"predictions": ["raw", "target"]}, ValueError, "predictions.*'target'.*'composite'"),
        ({"predictions": []}, ValueError, "predictions.*at least one"),
        ({"predictions": ["raw", "raw"]}, ValueError, "predictions.*twice"),
        ({"layers": "pool1"}, TypeError, "layers.*'pool1'"),
        ({"swap_channels": 1}, TypeError, "swap_channels.*1"),
        ({"chunk": 0}, ValueError, "chunk.*0"),
        ({"layers": ["pool4"]}, ValueError, "trunk.*pool4.*taps pool1, pool2, pool3.*layers="),
        ({"trunk": trunk(preprocess="imagenet")}, ValueError, "trunk.*'imagenet'.*preprocess='none'"),
        ({"trunk": torch.nn.Identity()}, TypeError, "trunk.*FrozenTrunk.*Identity"),
        ({"weights": None}, ValueError, "weights.*trunk="),
        ({"channels_last": True}, ValueError, "channels_last.*trunk="),
        ({"trunk": None, "weights": "/no/file"}, FileNotFoundError, "weights.*/no/file"),
        ({"trunk": None, "weights": None, "layers": ["pool9"]}, ValueError, "pool9.*vgg16"),
    ],
)
def test_bad_settings(options: dict[str, Any], error: type[Exception], words: str) -> None:
    given = {"trunk": trunk()} | options
    with pytest.raises(error, match=words):
        Objective(**given)
