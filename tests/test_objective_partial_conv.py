"""What PartialConvObjective has beyond the other objectives: masked targets, denominators, regions and spaces.

Its presets are compared with what the sources compute in test_objective_parity.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from objective_table import METHODS, inputs, objective, settings_of, trunk
from parity_cases import load
from training_checks import ops_called
from trunk_cases import relative

import inpaint_kernels as ik

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import published

Objective = ik.objectives.PartialConvObjective
PRESETS = [name for name in METHODS if name.startswith("pconv")]
NAOTO = "pconv-naoto0804"


@pytest.fixture(autouse=True)
def _exact_convolutions() -> Any:
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


def test_trunk_that_is_built() -> None:
    """It is tapped where the sources tap it, or by the names of other layers of VGG16."""
    assert Objective(weights=None).trunk.taps == ("4", "9", "16")
    assert {settings.layers for settings in Objective.presets.values()} == {("pool1", "pool2", "pool3")}
    other = Objective(layers=("relu2_2", "relu1_1"), weights=None).trunk
    assert other.names == ["relu2_2", "relu1_1"] and other.preprocess == "none"


def test_nvidia_has_no_smoothness_by_default() -> None:
    assert Objective.presets["nvidia"].tv_weight == 0


# ---- composites of the masked target -----------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("name", ["pconv-paper", NAOTO, "pconv-mmagic"])
def test_composites_of_the_masked_target(name: str, chunk: int | None) -> None:
    """A setting, on in one preset. Composites read it, the truth that they are compared with stays."""
    assert (settings_of(name).composite_from == "masked_target") == (name == NAOTO)
    x = inputs(name)
    valid = 1 - x.mask if name == "pconv-mmagic" else x.mask
    alone = {"chunk": chunk, "hole_weight": 0, "valid_weight": 0}
    plain = objective(name, composite_from="target", **alone)
    masked = x.terms(objective(name, composite_from="masked_target", **alone))
    want = x.changed(target=valid * x.target).terms(plain, truth=plain.prepare(x.target))
    torch.testing.assert_close(masked, want)
    assert relative(x.gradient(masked.total), x.gradient(want.total)) < 1e-5
    usual = x.terms(plain)
    for term in ("tv", "perceptual", "style"):
        assert relative(getattr(masked, term).detach(), getattr(usual, term).detach()) > 1e-3


def test_nan_in_holes_stays_out_of_composites_of_the_masked_target() -> None:
    x = inputs(NAOTO)
    x.mask[..., :4, :4] = 0
    loss = objective(NAOTO, hole_weight=0, valid_weight=0)
    truth = loss.prepare(x.target)
    want = x.terms(loss, truth=truth)
    x.target[..., :4, :4] = float("nan")
    assert x.terms(loss, truth=truth) == want


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_masks_without_fractions_make_the_usual_composite(dtype: torch.dtype) -> None:
    """A bool mask has no fractions for sure, so the pixel terms stay one op."""
    x = inputs(NAOTO, mask="binary")
    x.mask = x.mask.to(dtype)
    loss = objective(NAOTO)
    torch.testing.assert_close(x.terms(loss), x.terms(objective(NAOTO, composite_from="target")))
    called = ops_called(lambda: x.terms(loss))
    assert any("inpainting_pixel" in op for op in called) == (dtype == torch.bool)


# ---- settings ----------------------------------------------------------------------------------------------------


def test_without_feature_terms_no_weights_are_looked_for() -> None:
    x = inputs("pconv-paper")
    loss = Objective("paper", perceptual_weight=0, style_weight=0, weights="/no/such/file")
    terms = x.terms(loss, truth=loss.prepare(x.target))
    torch.testing.assert_close(terms.total, 6 * terms.hole + terms.valid + 0.1 * terms.tv)


@pytest.mark.parametrize("name", PRESETS)
def test_swap_channels_is_for_the_trunk_alone(name: str) -> None:
    x = inputs(name)
    flipped = x.changed(leaves=[leaf.flip(1) for leaf in x.leaves], target=x.target.flip(1))
    swapped, usual = x.terms(objective(name, swap_channels=True)), x.terms(objective(name))
    want = flipped.terms(objective(name))
    for term in ("perceptual", "style"):
        torch.testing.assert_close(getattr(swapped, term), getattr(want, term))
        assert getattr(swapped, term) != getattr(usual, term)
    if name != "pconv-nvidia":
        assert swapped[1:4] == usual[1:4]


@pytest.mark.parametrize("prediction", ["raw", "composite"])
def test_predictions_and_layers(prediction: str) -> None:
    """One prediction alone, one layer alone: the term of that one."""
    x = inputs("pconv-paper")
    terms = x.terms(objective("pconv-paper", predictions=[prediction], layers=["pool2"]))
    image = x.pred if prediction == "raw" else published.composite(x.pred, x.target, x.mask)
    pool2 = [
        load("CTN", torch.float32).maps(published.normalized(each, published.IMAGENET), ["pool2"], "vgg16")
        for each in (image, x.target)
    ]
    torch.testing.assert_close(terms.perceptual, published.perceptual_l1(*pool2, [1]))
    torch.testing.assert_close(terms.style, published.style_l1(*pool2))


def test_layers_under_the_names_that_the_trunk_knows_them_by() -> None:
    x = inputs("pconv-paper")
    numbered = ik.features.FrozenTrunk(trunk("pconv-paper").features, ["9", "16"])
    by_number = x.terms(objective("pconv-paper", layers=("16",), trunk=numbered))
    assert by_number.style == x.terms(objective("pconv-paper", layers=["pool3"])).style


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("pconv-paper", {"normalize": "mask", "tv_region": "first_pixel", "tv_normalize": "mask"}),
        ("pconv-paper", {"tv_region": "image", "tv_normalize": "pairs", "normalize": "sample"}),
        ("pconv-paper", {"tv_image": "raw", "tv_region": "hole"}),
        (NAOTO, {"pixel_space": "trunk"}),
        ("pconv-mmagic", {"pixel_space": "trunk", "swap_channels": True}),
        ("pconv-nvidia", {"predictions": ("raw", "composite"), "tv_image": "composite"}),
    ],
)
def test_denominators_regions_and_spaces(name: str, overrides: dict[str, Any]) -> None:
    x = inputs(name, mask="binary")
    loss = objective(name, **overrides)
    terms, s = x.terms(loss), loss.settings
    if s.pixel_space == "trunk" and name != NAOTO:
        unit = [(image + 1) / 2 if name == "pconv-mmagic" else image for image in (x.pred, x.target)]
        pred, target = (
            published.normalized(image.flip(1) if s.swap_channels else image, published.IMAGENET)
            for image in unit
        )
        x = x.changed(leaves=[pred], target=target)
        # Images are normalised once: the trunk reads the same ones.
        as_given = {"preprocess": "none", "swap_channels": False, "pixel_space": "image"}
        plain = x.terms(objective(name, **overrides | as_given))
        torch.testing.assert_close((terms.perceptual, terms.style), (plain.perceptual, plain.style))
    options = {"mask_is": s.mask_is}
    hole, valid = ik.hole_valid_loss(x.pred, x.target, x.mask, normalize=s.normalize, **options)
    of = x.target if s.tv_image == "composite" else None
    mask = None if of is None and s.tv_region == "image" else x.mask
    options |= {"region": s.tv_region, "normalize": s.tv_normalize}
    tv = ik.total_variation_loss(x.pred, mask, target=of, **options)
    torch.testing.assert_close(terms[1:4], (hole, valid, tv))
