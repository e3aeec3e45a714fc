"""The training example as a program: whole runs, exact continuation, wrong input, DDP."""

from __future__ import annotations

import json
import os
import subprocess
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

import checkpoint
import data
import engine
import plots
import train

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the example picks its own backend")

EXAMPLES = Path(train.__file__).parent

# The smallest network and crops; every code path of a full-size run.
TINY = ["--device", "cpu", "--size", "32", "--width", "4", "--batch", "2", "--save-every", "2"]
# Without a trunk, for what has nothing to do with the objective; test_examples_features.py has the others.
PIXEL = ["--objective", "pixel"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve smooth colour pictures, of every kind a folder may hold."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(12):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        picture = coarse.resize((72, 66), Image.Resampling.BICUBIC)
        picture = picture.convert(("RGB", "L", "RGBA", "P")[i % 4])
        picture.save(folder / f"{i:02}.png")
    Image.fromarray((np.arange(60 * 40).reshape(60, 40) * 27).astype(np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (20, 50), "teal").save(folder / "small.jpg")
    return folder


@pytest.fixture
def run(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Calls the program in this process; drawing, the slow part, is left to the one test that looks at it."""
    monkeypatch.setattr(plots, "write_png", lambda figure, path: plots.plt.close(figure))

    def call(
        *options: object, out: Path = tmp_path / "out", images: Path | None = photos
    ) -> tuple[int, str, str]:
        where = ["--images", str(images)] if images else []
        status = train.main([*TINY, *PIXEL, *where, "--out", str(out), *map(str, options)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def assert_same(a: Any, b: Any, path: str = "state") -> None:
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


# -- a whole run ------------------------------------------------------------------------------


def test_run_writes_pictures_curves_report_and_checkpoint(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("skimage")
    out = tmp_path / "deep" / "out"
    assert train.main([*TINY, "--steps", "8", "--out", str(out)]) == 0
    for name in ("pictures.png", "curves.png"):
        with Image.open(out / name) as image:
            image.load()
            assert min(image.size) > 300
    report = json.loads((out / "report.json").read_text())
    assert report["largest_relative_difference_of_first_5"] < 1e-3
    assert report["compared_steps"] == 8
    assert set(report["variants"]) == {"fused", "eager"}
    assert [step for step, _ in report["held_out_hole_error"]] == [0, 2, 4, 6, 8]
    assert load(out / "checkpoint.pt")["step"] == 8
    assert load(out / "checkpoint.previous.pt")["step"] == 6
    assert not list(out.glob(".*"))
    printed = capsys.readouterr().out
    assert "largest relative difference" in printed
    assert "eager / fused" in printed


def test_fused_loss_keeps_a_twelfth_of_the_images(run: Run, tmp_path: Path) -> None:
    image = torch.zeros(1, 3, 8, 8)
    try:
        ik.hole_valid_loss(image, image, image[:, :1], backend="cpu")
    except RuntimeError as reason:
        pytest.skip(str(reason))
    assert run("--steps", 2)[0] == 0
    variants = json.loads((tmp_path / "out" / "report.json").read_text())["variants"]
    pred_bytes = 2 * 3 * 32 * 32 * 4
    assert variants["fused"]["kept_bytes"] <= pred_bytes / 12
    assert variants["eager"]["kept_bytes"] >= pred_bytes


@pytest.mark.parametrize("normalize", ["image", "mask"])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_fused_and_eager_curves_agree(run: Run, tmp_path: Path, normalize: str, amp: str) -> None:
    assert run("--steps", 6, "--normalize", normalize, "--amp", amp)[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    # Autocast rounds activations, so a last bit of a gradient can move a loss by a few bfloat16 roundings.
    assert report["largest_relative_difference"] < (1e-5 if amp == "off" else 2e-2)


def test_layer_trains_as_its_formulas_do(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, backends, curves = engine.make_network, [], []

    def make_network(settings: Any) -> torch.nn.Module:
        net = make(settings)
        backends.append({m.backend for m in net.modules() if isinstance(m, ik.nn.PartialConv2d)})
        return net

    monkeypatch.setattr(engine, "make_network", make_network)
    for layer in ("ik", "reference"):
        assert run("--steps", 8, "--no-compare", "--layer", layer, out=tmp_path / layer)[0] == 0
        curves.append(load(tmp_path / layer / "checkpoint.pt")["history"][:, 0])
    assert backends == [{None}, {"reference"}]
    # A few roundings of float32: changing the last bit of the weights moves the curve as far.
    torch.testing.assert_close(*curves, rtol=16 * 2**-24, atol=0)


def test_learns_to_fill_holes(run: Run, tmp_path: Path) -> None:
    assert run("--steps", 100, "--save-every", 100, "--width", 8, "--batch", 4, "--no-compare")[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (_, before), (_, after) = report["held_out_hole_error"]
    assert after < before
    assert after < report["mean_colour_fill_error"]


def test_runs_with_mask_files(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    folder.mkdir()
    white = np.zeros((64, 90), dtype=np.uint8)
    white[:, 20:40] = 255
    Image.fromarray(white).save(folder / "stripe.png")
    assert run("--steps", 2, "--masks", folder, "--mask-files-mark", "hole")[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "what is marked is hole" in report["settings"]["data"]


# -- continuation -----------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_resumed_run_equals_an_unbroken_one(run: Run, tmp_path: Path, amp: str) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ("--amp", amp, "--no-compare")
    assert run("--steps", 8, *options, out=whole)[0] == 0
    assert run("--steps", 4, *options, out=broken)[0] == 0
    status, printed, _ = run("--steps", 8, "--resume", *options, out=broken)
    assert status == 0
    assert "resumed" in printed
    assert "note:" not in printed
    a, b = load(whole / "checkpoint.pt"), load(broken / "checkpoint.pt")
    assert_same(a, b)


def test_resumed_comparison_repeats_only_the_new_steps(run: Run, tmp_path: Path) -> None:
    assert run("--steps", 4)[0] == 0
    assert run("--steps", 8, "--resume", tmp_path / "out" / "checkpoint.pt")[0] == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["first_step"] == 4
    assert report["largest_at_step"] > 4
    assert report["largest_relative_difference"] < 1e-5


def test_other_settings_on_resume_are_noted(run: Run) -> None:
    assert run("--steps", 2, "--no-compare")[0] == 0
    status, printed, _ = run("--steps", 4, "--no-compare", "--resume", "--lr", 1e-4)
    assert status == 0
    assert "note: lr was 0.004, is 0.0001" in printed


def test_new_run_keeps_the_checkpoint_of_the_earlier_one(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("--steps", 5, "--no-compare")[0] == 0
    assert run("--steps", 6, "--no-compare", "--seed", 1)[0] == 0
    assert load(out / "checkpoint.earlier-run.pt")["step"] == 5
    assert load(out / "checkpoint.previous.pt")["settings"]["seed"] == 1


def test_diverged_run_is_not_saved(run: Run, tmp_path: Path) -> None:
    assert run("--steps", 2, "--no-compare")[0] == 0
    status, _, err = run("--steps", 60, "--save-every", 60, "--no-compare", "--lr", 1e30)
    assert status == 2
    assert "not finite" in err.splitlines()[-1]
    assert load(tmp_path / "out" / "checkpoint.pt")["step"] == 2


# -- wrong input ------------------------------------------------------------------------------


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    status, _, err = result
    assert status == 2
    assert err.startswith("train.py: error: ")
    assert len(err.strip().splitlines()) == 1
    for word in words:
        assert word in err


def test_unusable_pictures(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    assert_one_line(run(images=folder), "--images", str(folder), "does not exist")
    folder.mkdir()
    (folder / "notes.txt").write_text("no picture")
    assert_one_line(run(images=folder), "no pictures", str(folder))
    (folder / "a.png").write_bytes(b"this is not a PNG")
    assert_one_line(run(images=folder), "cannot read", "a.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "b.png")
    status, printed, err = run("--steps", 2, "--no-compare", images=folder)
    assert status == 0
    assert "1 training and 1 held-out pictures (by region)" in printed
    assert "1 more could not be read" in printed
    assert err.startswith("note: cannot read the picture") and "a.png" in err.splitlines()[0]


def test_picture_that_breaks_during_training(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large collections are decoded while training; the error arrives through the thread that draws batches.

    The run goes on with the other pictures, if there are any.
    """
    monkeypatch.setattr(data, "KEEP_PIXELS", 0)
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in "abc":
        Image.fromarray(noise).save(folder / f"{name}.png")
    assert run("--steps", 2, "--no-compare", images=folder)[0] == 0
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:2000])
    status, _, err = run("--steps", 2, "--no-compare", images=folder)
    assert status == 0
    assert err.count("a.png") == 1 and "skipped, 1 so far" in err
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:2000])
    status, _, err = run("--steps", 2, images=folder)
    assert status == 2
    assert "no picture is left" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_unusable_masks(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    assert_one_line(run("--masks", folder), "--masks", "does not exist")
    folder.mkdir()
    for size in ((31, 31), (40, 31), (31, 50)):
        Image.new("L", size).save(folder / "mask.png")
        assert_one_line(run("--masks", folder), "mask.png", f"{size[0]}x{size[1]}", "--size 32")
    for value, words in ((0, "no pixel as hole"), (255, "every pixel as hole")):
        Image.new("L", (40, 32), value).save(folder / "mask.png")
        assert_one_line(run("--masks", folder), "mask.png", words, "--mask-files-mark valid")
    # What is transparent marks nothing, whatever its colour.
    Image.new("RGBA", (32, 32), (255, 255, 255, 0)).save(folder / "mask.png")
    assert_one_line(run("--masks", folder), "mask.png", "no pixel as hole")


def test_unusable_checkpoints(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_one_line(run("--resume"), "there is no checkpoint", str(out))
    assert run("--steps", 4, "--no-compare")[0] == 0
    newest = out / "checkpoint.pt"
    content = newest.read_bytes()
    result = run("--steps", 4, "--resume")
    assert_one_line(result, "at step 4 already")
    assert_one_line(run("--steps", 9, "--width", 6, "--resume"), "width 4", "width 6")
    for damaged in (content[: len(content) // 2], b"", b"garbage"):
        newest.write_bytes(damaged)
        assert_one_line(run("--steps", 9, "--resume"), "checkpoint.pt is damaged", "checkpoint.previous.pt")
    torch.save({"weights": torch.ones(2)}, newest)
    assert_one_line(run("--steps", 9, "--resume"), "not written by train.py")


def test_unusable_options(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (
        (["--size", "33"], "multiple of 32"),
        (["--steps", "0"], "must be at least 1"),
        (["--batch", "two"], "invalid int value"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(*options)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
    assert_one_line(run("--backend", "cuda"), "--backend cuda", "cannot run")
    (tmp_path / "file").write_text("")
    assert_one_line(run(out=tmp_path / "file" / "out"), "--out", "cannot create")
    if not torch.cuda.is_available():
        assert_one_line(run("--device", "cuda"), "no CUDA device")


# -- several processes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [["--objective", "pconv"], pytest.param([*PIXEL, "--normalize", "mask"], marks=pytest.mark.slow)],
    ids=["pconv", "pixel"],
)
def test_two_processes_train_what_one_does(
    run: Run, tmp_path: Path, photos: Path, options: list[str]
) -> None:
    """Two processes of batch 2, with region means over both shards, against one of batch 4."""
    out = tmp_path / "two"
    options = ["--steps", "4", *options]
    package = Path(ik.__file__).resolve().parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finished = subprocess.run(
        [*launch, str(EXAMPLES / "train.py"), *TINY, "--images", str(photos), "--out", str(out), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("largest relative difference") == 1
    assert json.loads((out / "report.json").read_text())["processes"] == 2
    assert run(*options, "--batch", 4, "--no-compare", out=tmp_path / "one")[0] == 0
    two, one = (load(tmp_path / name / "checkpoint.pt") for name in ("two", "one"))
    # Perceptual terms have kinks: after the first step roundings are amplified.
    rounded = slice(0, 1 if "pconv" in options else 4)
    torch.testing.assert_close(two["history"][rounded], one["history"][rounded], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(two["history"], one["history"], rtol=1e-3, atol=1e-6)
    for name, value in one["model"].items():
        torch.testing.assert_close(two["model"][name], value, rtol=1e-3, atol=1e-4)
    assert checkpoint.NAME in {path.name for path in out.iterdir()}
