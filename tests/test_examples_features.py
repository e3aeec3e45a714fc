"""Perceptual and style terms of the training example."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="the examples need pillow, matplotlib and tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
from harness import INTERPRETING
from PIL import Image

import inpaint_kernels as ik

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import losses
import plots
import train
import trunks

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the example picks its own backend")

TINY = ["--device", "cpu", "--size", "32", "--width", "4", "--batch", "2", "--save-every", "2"]
BOTH = ("--perceptual", "0.05", "--style", "120")
CPU = torch.device("cpu")

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setattr(plots, "write_png", lambda figure, path: plots.plt.close(figure))
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{i}.png")

    def call(*options: object, out: Path = tmp_path / "out") -> tuple[int, str, str]:
        status = train.main([*TINY, "--images", str(folder), "--out", str(out), *map(str, options)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


# -- formulas ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trunk() -> ik.features.FrozenTrunk:
    return trunks.load_trunk("vgg16", None, CPU, option="--trunk-weights")


@pytest.mark.parametrize(("perceptual", "style"), [(0.05, 120.0), (2.0, 0.0), (0.0, 50.0)])
@pytest.mark.parametrize("chunk", [None, 1, 2])
def test_fused_terms_equal_the_eager_ones(
    trunk: ik.features.FrozenTrunk, perceptual: float, style: float, chunk: int | None
) -> None:
    rng = torch.Generator().manual_seed(0)
    pred, target = (torch.rand(3, 3, 32, 32, generator=rng) for _ in range(2))
    mask = (torch.rand(3, 1, 32, 32, generator=rng) > 0.4).float()
    features = losses.FeatureTerms(trunk, perceptual, style, chunk)
    results = []
    for kind in ("fused", "eager"):
        leaf = pred.clone().requires_grad_()
        terms = losses.make_objective(kind, features=features)(leaf, target, mask)
        terms.total.backward()
        assert leaf.grad is not None
        results.append((terms, leaf.grad))
    (fused, fused_grad), (eager, eager_grad) = results
    assert [term is None for term in fused] == [False, False, False, not perceptual, not style]
    torch.testing.assert_close(fused, eager, rtol=1e-5, atol=0)
    # Single features may fall to the other side of a kink, which moves a few pixels.
    error = torch.linalg.vector_norm(fused_grad - eager_grad) / torch.linalg.vector_norm(eager_grad)
    assert error < 5e-3


def test_eager_terms_are_the_published_ones(trunk: ik.features.FrozenTrunk) -> None:
    rng = torch.Generator().manual_seed(1)
    pred, target = (torch.rand(2, 3, 32, 32, generator=rng) for _ in range(2))
    mask = (torch.rand(2, 1, 32, 32, generator=rng) > 0.4).float()
    found = losses.make_objective("eager", features=losses.FeatureTerms(trunk, 0.05, 120.0))(
        pred, target, mask
    )
    composite = torch.where(mask == 1, target, pred)
    perceptual = style = torch.zeros(())
    for image in (pred, composite):
        for x, y in zip(trunk(image), trunk(target), strict=True):
            _, c, h, w = x.shape
            perceptual = perceptual + (x - y).abs().mean()
            gram = torch.einsum("nchw,ndhw->ncd", x, x) - torch.einsum("nchw,ndhw->ncd", y, y)
            style = style + (gram / (c * h * w)).abs().mean()
    assert found.perceptual is not None
    assert found.style is not None
    torch.testing.assert_close(found.perceptual, perceptual, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.style, style, rtol=1e-4, atol=0)
    total = 6 * found.hole + found.valid + 0.05 * perceptual + 120 * style
    torch.testing.assert_close(found.total, total, rtol=1e-4, atol=0)


def test_streaming_keeps_the_gradient_alone_and_weights_do_not_count(
    trunk: ik.features.FrozenTrunk,
) -> None:
    images = torch.rand(2, 2, 3, 64, 64)
    mask = torch.ones(2, 1, 64, 64)
    kept = {}
    for chunk in (None, 1):
        objective = losses.make_objective("fused", features=losses.FeatureTerms(trunk, 0.05, 120.0, chunk))
        kept[chunk] = losses.bytes_kept(objective, *images, mask, fixed=trunk.parameters()).made
    stacked = 2 * images[0].numel() * 4
    # The stacked images, their gradient and what the pixel terms keep, against every activation.
    assert kept[1] <= 3.5 * stacked
    assert kept[None] > 20 * stacked


# -- whole runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [BOTH, (*BOTH, "--chunk", "1"), ("--style", "120", "--amp", "bf16")])
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


def test_resumed_run_with_features_equals_an_unbroken_one(run: Run, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run("--steps", 4, *BOTH, "--no-compare", out=whole)[0] == 0
    assert run("--steps", 2, *BOTH, "--no-compare", out=broken)[0] == 0
    status, printed, _ = run("--steps", 4, *BOTH, "--no-compare", "--resume", out=broken)
    assert status == 0
    assert "note:" not in printed
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (whole, broken))
    assert torch.equal(a["history"], b["history"])
    assert a["history"].shape == (4, 5)
    assert (a["history"] > 0).all()
    status, printed, _ = run("--steps", 5, "--style", 1, "--no-compare", "--resume", out=broken)
    assert status == 0
    assert "note: perceptual was 0.05, is 0.0" in printed


def test_checkpoint_with_fewer_terms_is_taken(run: Run, tmp_path: Path) -> None:
    assert run("--steps", 2, "--no-compare")[0] == 0
    path = tmp_path / "out" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["history"] = state["history"][:, :3].clone()
    torch.save(state, path)
    assert run("--steps", 4, "--no-compare", "--resume")[0] == 0
    assert torch.load(path, weights_only=True)["history"].shape == (4, 5)


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
        status, _, err = run("--steps", 2, *BOTH, "--trunk-weights", path)
        assert status == 2
        assert err.startswith("train.py: error: --trunk-weights: ")
        assert len(err.strip().splitlines()) == 1
        assert str(path) in err
    for options in (("--trunk-weights", "x.pth"), ("--chunk", "1")):
        with pytest.raises(SystemExit):
            run("--steps", 2, *options)
        assert "only with --perceptual or --style" in capsys.readouterr().err
