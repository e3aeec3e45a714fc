"""The training example as a program: whole runs, exact continuation, wrong input, DDP."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_runs import (
    EXAMPLES,
    PIXEL,
    TINY,
    Run,
    assert_one_line,
    assert_same,
    check_two_processes,
    load,
    no_plots,
    picks_its_own_backend,
    report,
    run,
)
from PIL import Image

import inpaint_kernels as ik

sys.path.insert(0, str(EXAMPLES))

import checkpoint
import data
import engine
import train

pytestmark = picks_its_own_backend


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
def pixel_run(run: Run) -> Run:
    return lambda *options, **where: run(*PIXEL, *options, **where)


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
    found = report(out)
    assert found["largest_relative_difference_of_first_5"] < 1e-3
    assert found["compared_steps"] == 8
    assert set(found["variants"]) == {"fused", "eager"}
    assert [step for step, _ in found["held_out_hole_error"]] == [0, 2, 4, 6, 8]
    assert load(out / "checkpoint.pt")["step"] == 8
    assert load(out / "checkpoint.previous.pt")["step"] == 6
    assert not list(out.glob(".*"))
    printed = capsys.readouterr().out
    assert "largest relative difference" in printed
    assert "eager / fused" in printed


def test_fused_loss_keeps_a_twelfth_of_the_images(pixel_run: Run, tmp_path: Path) -> None:
    image = torch.zeros(1, 3, 8, 8)
    try:
        ik.hole_valid_loss(image, image, image[:, :1], backend="cpu")
    except RuntimeError as reason:
        pytest.skip(str(reason))
    assert pixel_run("--steps", 2)[0] == 0
    variants = report(tmp_path / "out")["variants"]
    pred_bytes = 2 * 3 * 32 * 32 * 4
    assert variants["fused"]["kept_bytes"] <= pred_bytes / 12
    assert variants["eager"]["kept_bytes"] >= pred_bytes


@pytest.mark.parametrize("normalize", ["image", "mask"])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_fused_and_eager_curves_agree(pixel_run: Run, tmp_path: Path, normalize: str, amp: str) -> None:
    assert pixel_run("--steps", 6, "--normalize", normalize, "--amp", amp)[0] == 0
    found = report(tmp_path / "out")
    # Autocast rounds activations, so a last bit of a gradient can move a loss by a few bfloat16 roundings.
    assert found["largest_relative_difference"] < (1e-5 if amp == "off" else 2e-2)


def test_layer_trains_as_its_formulas_do(
    pixel_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, backends, curves = engine.make_network, [], []

    def make_network(settings: Any) -> torch.nn.Module:
        net = make(settings)
        backends.append({m.backend for m in net.modules() if isinstance(m, ik.nn.PartialConv2d)})
        return net

    monkeypatch.setattr(engine, "make_network", make_network)
    for layer in ("ik", "reference"):
        assert pixel_run("--steps", 8, "--no-compare", "--layer", layer, out=tmp_path / layer)[0] == 0
        curves.append(load(tmp_path / layer / "checkpoint.pt")["history"][:, 0])
    assert backends == [{None}, {"reference"}]
    # A few roundings of float32: changing the last bit of the weights moves the curve as far.
    torch.testing.assert_close(*curves, rtol=16 * 2**-24, atol=0)


def test_learns_to_fill_holes(pixel_run: Run, tmp_path: Path) -> None:
    assert pixel_run("--steps", 100, "--save-every", 100, "--width", 8, "--batch", 4, "--no-compare")[0] == 0
    found = report(tmp_path / "out")
    (_, before), (_, after) = found["held_out_hole_error"]
    assert after < before
    assert after < found["mean_colour_fill_error"]


def test_runs_with_mask_files(pixel_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    folder.mkdir()
    white = np.zeros((64, 90), dtype=np.uint8)
    white[:, 20:40] = 255
    Image.fromarray(white).save(folder / "stripe.png")
    assert pixel_run("--steps", 2, "--masks", folder, "--mask-files-mark", "hole")[0] == 0
    found = report(tmp_path / "out")
    assert "what is marked is hole" in found["settings"]["data"]


# -- continuation -----------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_resumed_run_equals_an_unbroken_one(pixel_run: Run, tmp_path: Path, amp: str) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    options = ("--amp", amp, "--no-compare")
    assert pixel_run("--steps", 8, *options, out=whole)[0] == 0
    assert pixel_run("--steps", 4, *options, out=broken)[0] == 0
    status, printed, _ = pixel_run("--steps", 8, "--resume", *options, out=broken)
    assert status == 0
    assert "resumed" in printed
    assert "note:" not in printed
    a, b = load(whole / "checkpoint.pt"), load(broken / "checkpoint.pt")
    assert_same(a, b)


def test_resumed_comparison_repeats_only_the_new_steps(pixel_run: Run, tmp_path: Path) -> None:
    assert pixel_run("--steps", 4)[0] == 0
    assert pixel_run("--steps", 8, "--resume", tmp_path / "out" / "checkpoint.pt")[0] == 0
    found = report(tmp_path / "out")
    assert found["first_step"] == 4
    assert found["largest_at_step"] > 4
    assert found["largest_relative_difference"] < 1e-5


def test_other_settings_on_resume_are_noted(pixel_run: Run) -> None:
    assert pixel_run("--steps", 2, "--no-compare")[0] == 0
    status, printed, _ = pixel_run("--steps", 4, "--no-compare", "--resume", "--lr", 1e-4)
    assert status == 0
    assert "note: lr was 0.004, is 0.0001" in printed


def test_new_run_keeps_the_checkpoint_of_the_earlier_one(pixel_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pixel_run("--steps", 5, "--no-compare")[0] == 0
    assert pixel_run("--steps", 6, "--no-compare", "--seed", 1)[0] == 0
    assert load(out / "checkpoint.earlier-run.pt")["step"] == 5
    assert load(out / "checkpoint.previous.pt")["settings"]["seed"] == 1


def test_diverged_run_is_not_saved(pixel_run: Run, tmp_path: Path) -> None:
    assert pixel_run("--steps", 2, "--no-compare")[0] == 0
    status, _, err = pixel_run("--steps", 60, "--save-every", 60, "--no-compare", "--lr", 1e30)
    assert status == 2
    assert "not finite" in err.splitlines()[-1]
    assert load(tmp_path / "out" / "checkpoint.pt")["step"] == 2


# -- wrong input ------------------------------------------------------------------------------


def test_unusable_pictures(pixel_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    assert_one_line(pixel_run(images=folder), "--images", str(folder), "does not exist")
    folder.mkdir()
    (folder / "notes.txt").write_text("no picture")
    assert_one_line(pixel_run(images=folder), "no pictures", str(folder))
    (folder / "a.png").write_bytes(b"this is not a PNG")
    assert_one_line(pixel_run(images=folder), "cannot read", "a.png")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "b.png")
    status, printed, err = pixel_run("--steps", 2, "--no-compare", images=folder)
    assert status == 0
    assert "1 training and 1 held-out pictures (by region)" in printed
    assert "1 more could not be read" in printed
    assert err.startswith("note: cannot read the picture") and "a.png" in err.splitlines()[0]


def test_picture_that_breaks_during_training(
    pixel_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
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
    assert pixel_run("--steps", 2, "--no-compare", images=folder)[0] == 0
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:2000])
    status, _, err = pixel_run("--steps", 2, "--no-compare", images=folder)
    assert status == 0
    assert err.count("a.png") == 1 and "skipped, 1 so far" in err
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:2000])
    status, _, err = pixel_run("--steps", 2, images=folder)
    assert status == 2
    assert "no picture is left" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_unusable_masks(pixel_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    assert_one_line(pixel_run("--masks", folder), "--masks", "does not exist")
    folder.mkdir()
    for size in ((31, 31), (40, 31), (31, 50)):
        Image.new("L", size).save(folder / "mask.png")
        assert_one_line(pixel_run("--masks", folder), "mask.png", f"{size[0]}x{size[1]}", "--size 32")
    for value, words in ((0, "no pixel as hole"), (255, "every pixel as hole")):
        Image.new("L", (40, 32), value).save(folder / "mask.png")
        assert_one_line(pixel_run("--masks", folder), "mask.png", words, "--mask-files-mark valid")
    # What is transparent marks nothing, whatever its colour.
    Image.new("RGBA", (32, 32), (255, 255, 255, 0)).save(folder / "mask.png")
    assert_one_line(pixel_run("--masks", folder), "mask.png", "no pixel as hole")


def test_unusable_checkpoints(pixel_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_one_line(pixel_run("--resume"), "there is no checkpoint", str(out))
    assert pixel_run("--steps", 4, "--no-compare")[0] == 0
    newest = out / "checkpoint.pt"
    content = newest.read_bytes()
    result = pixel_run("--steps", 4, "--resume")
    assert_one_line(result, "at step 4 already")
    assert_one_line(pixel_run("--steps", 9, "--width", 6, "--resume"), "width 4", "width 6")
    for damaged in (content[: len(content) // 2], b"", b"garbage"):
        newest.write_bytes(damaged)
        assert_one_line(
            pixel_run("--steps", 9, "--resume"), "checkpoint.pt is damaged", "checkpoint.previous.pt"
        )
    torch.save({"weights": torch.ones(2)}, newest)
    assert_one_line(pixel_run("--steps", 9, "--resume"), "not written by train.py")


def test_unusable_options(pixel_run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (
        (["--size", "33"], "multiple of 32"),
        (["--steps", "0"], "must be at least 1"),
        (["--batch", "two"], "invalid int value"),
    ):
        with pytest.raises(SystemExit) as stop:
            pixel_run(*options)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err
    assert_one_line(pixel_run("--backend", "cuda"), "--backend cuda", "cannot run")
    (tmp_path / "file").write_text("")
    assert_one_line(pixel_run(out=tmp_path / "file" / "out"), "--out", "cannot create")
    if not torch.cuda.is_available():
        assert_one_line(pixel_run("--device", "cuda"), "no CUDA device")


# -- several processes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "exact"),
    [(["--objective", "pconv"], 1), pytest.param([*PIXEL, "--normalize", "mask"], 4, marks=pytest.mark.slow)],
    ids=["pconv", "pixel"],
)
def test_two_processes(run: Run, photos: Path, tmp_path: Path, options: list[str], exact: int) -> None:
    check_two_processes(run, photos, tmp_path, ["--steps", "4", *options], EXAMPLES / "train.py", exact)
    assert checkpoint.NAME in {path.name for path in (tmp_path / "two").iterdir()}
