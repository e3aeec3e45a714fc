"""The training example on the features of a trunk: the published objective, and single terms with the pixel one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from example_runs import (
    CPU,
    EXAMPLES,
    PIXEL,
    Run,
    assert_one_line,
    no_plots,
    photos,
    picks_its_own_backend,
    report,
    run,
)

import inpaint_kernels as ik

sys.path.insert(0, str(EXAMPLES))

import engine
import trunks

pytestmark = picks_its_own_backend

BOTH = (*PIXEL, "--perceptual", "0.05", "--style", "120")


@pytest.mark.parametrize("options", [("--chunk", "0"), ("--chunk", "1", "--amp", "bf16")])
def test_run_of_the_published_objective(run: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    status, printed, _ = run("--steps", 6, "--compare-steps", 4, *options)
    assert status == 0
    assert "warning: vgg16 has random weights" in printed
    found = report(tmp_path / "out")
    assert found["objective"] == "6 hole + valid + 0.1 tv + 0.05 perceptual + 120 style"
    assert found["objective"] in printed
    assert (found["terms_of_step"], found["compared_steps"]) == (4, 4)
    weights = {"hole": 6, "valid": 1, "tv": 0.1, "perceptual": 0.05, "style": 120}
    for terms in found["last_terms"].values():
        assert set(terms) == {"total", *weights}
        weighed = [weight * terms[name] for name, weight in weights.items()]
        assert min(weighed) > 0
        assert terms["total"] == pytest.approx(sum(weighed), rel=1e-5)
    assert f"tv {found['last_terms']['eager']['tv']:.5g}" in printed
    rounded = "bf16" in options
    assert found["largest_relative_difference_of_first_5"] < (2e-2 if rounded else 1e-3)
    history = torch.load(tmp_path / "out" / "checkpoint.pt", weights_only=True)["history"]
    assert history.shape == (6, len(engine.RECORDED))
    kept = {name: figures["kept_bytes"] for name, figures in found["variants"].items()}
    assert kept["eager"] > (20 if "1" in options else 1) * kept["fused"]
    assert "peak memory of the process" in printed


@pytest.mark.parametrize(
    "options", [BOTH, (*BOTH, "--chunk", "1"), (*PIXEL, "--style", "120", "--amp", "bf16")]
)
def test_run_with_features(run: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    status, printed, _ = run("--steps", 4, *options)
    assert status == 0
    assert "warning: vgg16 has random weights" in printed
    assert "mean nothing perceptually" in printed
    found = report(tmp_path / "out")
    names = {name.removeprefix("--") for name in options if name in ("--perceptual", "--style")}
    for variant in ("fused", "eager"):
        terms = found["last_terms"][variant]
        assert set(terms) == {"total", "hole", "valid"} | names
        assert all(terms[name] > 0 for name in names)
    assert f"style {found['last_terms']['fused']['style']:.5g}" in printed
    assert "120 style" in found["objective"]
    assert found["objective"] in printed
    # Gradients at kinks differ, and training carries that on; autocast rounds the activations, too.
    assert found["largest_relative_difference"] < (2e-2 if "bf16" in options else 1e-3)


@pytest.mark.parametrize("options", [(), BOTH])
def test_resumed_run_with_features_equals_an_unbroken_one(
    run: Run, tmp_path: Path, options: tuple[str, ...]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run("--steps", 4, *options, "--no-compare", out=whole)[0] == 0
    assert run("--steps", 2, *options, "--no-compare", out=broken)[0] == 0
    status, printed, _ = run("--steps", 4, *options, "--no-compare", "--resume", out=broken)
    assert status == 0
    assert "note:" not in printed
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, broken))
    assert torch.equal(a["history"], b["history"])
    assert a["history"].shape == (4, len(engine.RECORDED))
    assert (a["history"] > 0).all(0).tolist()[:6] == [True] * 5 + [not options]
    status, printed, _ = run("--steps", 5, *PIXEL, "--style", 1, "--no-compare", "--resume", out=broken)
    assert status == 0
    assert "note: perceptual was 0.05, is 0.0" in printed
    assert ("note: objective was pconv, is pixel" in printed) == (not options)


def test_resumed_comparison_begins_where_the_run_does(run: Run, tmp_path: Path) -> None:
    assert run("--steps", 2, "--compare-steps", 1)[0] == 0
    assert (
        report(tmp_path / "out")["largest_relative_difference"] < 1e-6
    )  # a first step differs by roundings alone
    assert run("--steps", 5, "--resume", "--compare-steps", 2)[0] == 0
    found = report(tmp_path / "out")
    assert [found[key] for key in ("first_step", "terms_of_step", "compared_steps")] == [2, 4, 2]
    assert found["largest_relative_difference"] < 1e-3


def test_checkpoint_of_an_earlier_version_is_taken(run: Run, tmp_path: Path) -> None:
    """It recorded fewer terms and settings."""
    assert run("--steps", 2, "--no-compare", *PIXEL)[0] == 0
    path = tmp_path / "out" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["history"] = state["history"][:, :3].clone()
    for name in ("objective", "tv", "perceptual", "style", "chunk", "trunk", "layer"):
        del state["settings"][name]
    del state["adversary"]
    torch.save(state, path)
    status, printed, _ = run("--steps", 4, "--no-compare", "--resume", *PIXEL)
    assert status == 0
    assert "note:" not in printed
    assert torch.load(path, weights_only=True)["history"].shape == (4, len(engine.RECORDED))


def test_trunk_weights_from_a_file(run: Run, tmp_path: Path) -> None:
    """The features are those of the file: the same objective as with the file's trunk, and no warning."""
    path = tmp_path / "vgg16.pth"
    full = ik.features.vgg16(("pool5",), weights=None)
    torch.save({f"features.{key}": value for key, value in full.features.state_dict().items()}, path)
    status, printed, _ = run("--steps", 2, *BOTH, "--trunk-weights", path)
    assert status == 0
    assert "warning" not in printed
    loaded = trunks.load_trunk("vgg16", str(path), CPU, option="--trunk-weights")
    weight = loaded.features.state_dict()["0.weight"]
    assert torch.equal(weight, full.features.state_dict()["0.weight"])
    assert str(path) in report(tmp_path / "out")["settings"]["trunk"]


def test_unusable_trunk_weights(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, damaged, other = (tmp_path / name for name in ("none.pth", "damaged.pth", "other.pth"))
    damaged.write_bytes(b"not a state dict")
    torch.save({"weight": torch.ones(1)}, other)
    for path in (missing, damaged, other):
        assert_one_line(run("--steps", 2, "--trunk-weights", path), "error: --trunk-weights: ", str(path))
    for options, words in (
        ((*PIXEL, "--trunk-weights", "x.pth"), "only with --perceptual or --style"),
        ((*PIXEL, "--chunk", "1"), "only with --perceptual or --style"),
        (("--perceptual", "0.05"), "argument --perceptual: only with --objective pixel"),
        (("--style", "0"), "argument --style: only with --objective pixel"),
        (("--normalize", "mask"), "argument --normalize: only with --objective pixel"),
        (("--objective", "gan"), "invalid choice: 'gan'"),
        (("--objective", "ctn", "--style", "1"), "that of ctn is fixed"),
        (("--compare-steps", "-1"), "must be at least 0"),
        (("--chunk", "-1"), "must be at least 0"),
    ):
        with pytest.raises(SystemExit):
            run("--steps", 2, *options)
        assert words in capsys.readouterr().err.splitlines()[-1]
