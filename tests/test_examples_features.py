"""The training example on the features of a trunk: the published objective, and single terms with the pixel one."""

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

import engine
import losses
import memory
import plots
import train
import trunks

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the example picks its own backend")

TINY = ["--device", "cpu", "--size", "32", "--width", "4", "--batch", "2", "--save-every", "2"]
PIXEL = ("--objective", "pixel")
BOTH = (*PIXEL, "--perceptual", "0.05", "--style", "120")
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


@pytest.fixture(scope="module")
def plain_trunk() -> ik.features.FrozenTrunk:
    """The one the published objective reads normalised pictures with."""
    return trunks.load_trunk("vgg16", None, CPU, option="--trunk-weights", preprocess="none")


def draw(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    pred, target = (torch.rand(samples, 3, 32, 32, generator=rng) for _ in range(2))
    return pred, target, (torch.rand(samples, 1, 32, 32, generator=rng) > 0.4).float()


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize(
    ("name", "perceptual", "style"),
    [("pconv", 0.05, 120.0), ("pixel", 0.05, 120.0), ("pixel", 2.0, 0.0), ("pixel", 0.0, 50.0)],
)
def test_fused_terms_equal_the_eager_ones(
    trunk: ik.features.FrozenTrunk,
    plain_trunk: ik.features.FrozenTrunk,
    name: str,
    perceptual: float,
    style: float,
    chunk: int | None,
) -> None:
    pred, target, mask = draw(3, 0)
    reads = plain_trunk if name == "pconv" else trunk
    features = losses.FeatureTerms(reads, perceptual, style, chunk)
    results = []
    for kind in ("fused", "eager"):
        leaf = pred.clone().requires_grad_()
        terms = losses.make_objective(kind, name, features=features)(leaf, target, mask)
        terms.total.backward()
        assert leaf.grad is not None
        results.append((terms, leaf.grad))
    (fused, fused_grad), (eager, eager_grad) = results
    assert [term is None for term in fused] == [
        *(False, False, False),
        *(not perceptual, not style, name != "pconv"),
        *(True,) * (len(fused) - 6),
    ]
    torch.testing.assert_close(fused, eager, rtol=1e-5, atol=0)
    # Single features may fall to the other side of a kink, which moves a few pixels.
    error = torch.linalg.vector_norm(fused_grad - eager_grad) / torch.linalg.vector_norm(eager_grad)
    assert error < 5e-3


@pytest.mark.parametrize("name", ["pconv", "pixel"])
def test_eager_terms_are_the_published_ones(
    trunk: ik.features.FrozenTrunk, plain_trunk: ik.features.FrozenTrunk, name: str
) -> None:
    pred, target, mask = draw(2, 1)
    reads = plain_trunk if name == "pconv" else trunk
    found = losses.make_objective("eager", name, features=losses.FeatureTerms(reads, 0.05, 120.0))(
        pred, target, mask
    )
    composite = torch.where(mask == 1, target, pred)
    perceptual = style = tv = torch.zeros(())
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
    if name == "pconv":
        tv = variation(composite, mask)
        assert found.tv is not None
        torch.testing.assert_close(found.tv, tv, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.total, total + 0.1 * tv, rtol=1e-4, atol=0)


def variation(image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Pixel by pixel: pairs of neighbours that both touch the hole, over all elements of the image."""
    total = torch.zeros(())
    for picture, known in zip(image, mask[:, 0] == 1, strict=True):
        height, width = known.shape
        near = [
            [not bool(known[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].all()) for j in range(width)]
            for i in range(height)
        ]
        for i in range(height):
            for j in range(width):
                if j + 1 < width and near[i][j] and near[i][j + 1]:
                    total = total + (picture[:, i, j] - picture[:, i, j + 1]).abs().sum()
                if i + 1 < height and near[i][j] and near[i + 1][j]:
                    total = total + (picture[:, i, j] - picture[:, i + 1, j]).abs().sum()
    return total / image.numel()


def test_streaming_keeps_the_gradient_alone_and_weights_do_not_count(
    trunk: ik.features.FrozenTrunk,
) -> None:
    images = torch.rand(2, 2, 3, 64, 64)
    mask = torch.ones(2, 1, 64, 64)
    kept = {}
    for chunk in (None, 1):
        objective = losses.make_objective("fused", features=losses.FeatureTerms(trunk, 0.05, 120.0, chunk))
        kept[chunk] = memory.bytes_kept(objective, *images, mask, fixed=trunk.parameters()).made
    stacked = 2 * images[0].numel() * 4
    # The stacked images, their gradient and what the pixel terms keep, against every activation.
    assert kept[1] <= 3.5 * stacked
    assert kept[None] > 20 * stacked


def test_peak_memory_is_that_of_its_blocks() -> None:
    outside, inside, unit = memory.PeakMemory(CPU), memory.PeakMemory(CPU), 2**26
    assert inside.bytes is None
    with outside:
        large = torch.ones(3 * unit, dtype=torch.uint8)
    if outside.bytes is None:
        pytest.skip("this system does not tell a process its peak memory")
    del large
    with inside:
        before = torch.ones(unit, dtype=torch.uint8)
    peak = inside.bytes
    assert peak is not None
    del before
    with inside:
        pass
    assert inside.bytes == peak
    assert 1.5 * unit < outside.bytes - peak < 2.5 * unit


# -- whole runs -------------------------------------------------------------------------------


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


def test_first_step_agrees_to_rounding(run: Run, tmp_path: Path) -> None:
    assert run("--steps", 3, "--compare-steps", 1)[0] == 0
    assert report(tmp_path / "out")["largest_relative_difference"] < 1e-6


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
    assert run("--steps", 2, "--compare-steps", 0)[0] == 0
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
        status, _, err = run("--steps", 2, "--trunk-weights", path)
        assert status == 2
        assert err.startswith("train.py: error: --trunk-weights: ")
        assert len(err.strip().splitlines()) == 1
        assert str(path) in err
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
