"""The training example as a program: whole runs, exact continuation, wrong input."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_runs import (
    CPU,
    EXAMPLES,
    PIXEL,
    TINY,
    Run,
    assert_one_line,
    assert_same,
    light,
    load,
    narrow,
    photos,
    picks_its_own_backend,
    report,
    run,
    write_noise,
)
from PIL import Image

import inpaint_kernels as ik

sys.path.insert(0, str(EXAMPLES))

import data
import engine
import train
import trunks

pytestmark = picks_its_own_backend

FEATURES = ("--perceptual", "0.05", "--style", "120")


@pytest.fixture
def pixel_run(run: Run) -> Run:
    return lambda *options, **where: run(*PIXEL, *options, **where)


# -- whole runs -------------------------------------------------------------------------------


def test_run_writes_pictures_curves_report_and_checkpoint(
    tmp_path: Path, narrow: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("skimage")
    out = tmp_path / "deep" / "out"
    assert train.main([*TINY, *PIXEL, "--steps", "6", "--out", str(out)]) == 0
    for name in ("pictures.png", "curves.png"):
        with Image.open(out / name) as image:
            image.load()
            assert min(image.size) > 300
    content = report(out)
    assert content["largest_relative_difference"] < 1e-5
    assert content["compared_steps"] == 6
    assert set(content["variants"]) == {"fused", "eager"}
    assert [step for step, _ in content["held_out_hole_error"]] == [0, 2, 4, 6]
    assert load(out / "checkpoint.pt")["step"] == 6
    assert load(out / "checkpoint.previous.pt")["step"] == 4
    assert not list(out.glob(".*"))
    printed = capsys.readouterr().out
    for words in ("largest relative difference", "eager / fused", "peak memory of the process"):
        assert words in printed


def test_learns_from_every_kind_of_picture(pixel_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, mode in enumerate(("RGB", "L", "RGBA", "P") * 3):
        write_noise(folder / f"{i:02}.png", i)
        with Image.open(folder / f"{i:02}.png") as picture:
            picture.convert(mode).save(folder / f"{i:02}.png")
    Image.fromarray((np.arange(60 * 40).reshape(60, 40) * 27).astype(np.uint16)).save(folder / "deep.png")
    Image.new("RGB", (20, 50), "teal").save(folder / "small.jpg")
    options = ("--steps", 100, "--save-every", 100, "--width", 8, "--batch", 4, "--no-compare")
    assert pixel_run(*options, images=folder)[0] == 0
    content = report(tmp_path / "out")
    (_, before), (_, after) = content["held_out_hole_error"]
    assert after < before
    assert after < content["held_out_baselines"]["mean colour"]


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ((), 1e-5),
        # Autocast rounds activations, so a last bit of a gradient can move a loss by a few bfloat16 roundings.
        (("--normalize", "mask", "--amp", "bf16"), 2e-2),
        # Gradients at kinks differ, and training carries that on.
        ((*FEATURES, "--chunk", "1"), 1e-3),
        (("--style", "120", "--amp", "bf16"), 2e-2),
    ],
    ids=["image", "mask-bf16", "streamed", "style-bf16"],
)
def test_fused_and_eager_curves_of_the_pixel_objective_agree(
    pixel_run: Run, tmp_path: Path, options: tuple[str, ...], tolerance: float
) -> None:
    status, printed, _ = pixel_run("--steps", 6, *options)
    assert status == 0
    content = report(tmp_path / "out")
    assert content["largest_relative_difference"] < tolerance
    assert content["objective"] in printed
    weights = {"hole": 6.0, "valid": 1.0}
    given = dict(zip(options[::2], options[1::2], strict=True))
    weights |= {name: float(given[f"--{name}"]) for name in ("perceptual", "style") if f"--{name}" in given}
    assert ("warning: vgg16 has random weights" in printed) == ("style" in weights)
    for terms in content["last_terms"].values():
        assert set(terms) == {"total", *weights}
        weighed = [weight * terms[name] for name, weight in weights.items()]
        assert min(weighed) > 0
        assert terms["total"] == pytest.approx(sum(weighed), rel=1e-5)
        assert f"hole {content['last_terms']['eager']['hole']:.5g}" in printed


def test_fused_loss_keeps_a_twelfth_of_the_images(pixel_run: Run, tmp_path: Path) -> None:
    image = torch.zeros(1, 3, 8, 8)
    try:
        ik.hole_valid_loss(image, image, image[:, :1], backend="cpu")
    except RuntimeError as reason:
        pytest.skip(str(reason))
    assert pixel_run("--steps", 1)[0] == 0
    variants = report(tmp_path / "out")["variants"]
    pred_bytes = 2 * 3 * 32 * 32 * 4
    assert variants["fused"]["kept_bytes"] <= pred_bytes / 12
    assert variants["eager"]["kept_bytes"] >= pred_bytes


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


def test_trunk_weights_from_a_file(run: Run, tmp_path: Path) -> None:
    """The features are those of the file, and there is no warning."""
    path = tmp_path / "vgg16.pth"
    full = ik.features.vgg16(("pool5",), weights=None)
    torch.save({f"features.{key}": value for key, value in full.features.state_dict().items()}, path)
    status, printed, _ = run("--steps", 2, "--trunk-weights", path)
    assert status == 0
    assert "warning" not in printed
    assert str(path) in report(tmp_path / "out")["settings"]["trunk"]
    loaded = trunks.load_trunk("vgg16", str(path), CPU, option="--trunk-weights")
    weight = loaded.features.state_dict()["0.weight"]
    assert torch.equal(weight, full.features.state_dict()["0.weight"])


# -- continuation -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "half", "whole"),
    [
        (PIXEL, 4, 8),
        ((*PIXEL, *FEATURES, "--amp", "bf16"), 2, 4),
        # Across the next step in which a penalty is due, the 17th.
        (("--objective", "mat", "--amp", "fp16"), 9, 18),
    ],
    ids=["pixel", "features-bf16", "mat-fp16"],
)
def test_resumed_run_equals_an_unbroken_one(
    run: Run, tmp_path: Path, options: tuple[str, ...], half: int, whole: int
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    common = (*options, "--no-compare", "--save-every", half)
    assert run("--steps", whole, *common, out=unbroken)[0] == 0
    assert run("--steps", half, *common, out=broken)[0] == 0
    status, printed, _ = run("--steps", whole, *common, "--resume", out=broken)
    assert status == 0
    assert "resumed" in printed
    assert "note:" not in printed
    state = load(unbroken / "checkpoint.pt")
    assert_same(state, load(broken / "checkpoint.pt"))
    assert state["history"].shape == (whole, len(engine.RECORDED)) and (state["history"][:, 0] > 0).all()
    penalties = state["history"][:, engine.RECORDED.index("penalty")]
    assert len(penalties.unique_consecutive()) == (2 if "mat" in options else 1)


def test_resumed_comparison_repeats_only_the_new_steps(run: Run, tmp_path: Path) -> None:
    assert run("--steps", 2, "--compare-steps", 1)[0] == 0
    # A first step differs by roundings alone.
    assert report(tmp_path / "out")["largest_relative_difference"] < 1e-6
    assert run("--steps", 5, "--resume", tmp_path / "out" / "checkpoint.pt", "--compare-steps", 2)[0] == 0
    content = report(tmp_path / "out")
    assert [content[key] for key in ("compared_from", "terms_of_step", "compared_steps")] == [2, 4, 2]
    assert content["largest_at_step"] > 2
    assert content["largest_relative_difference"] < 1e-3


def test_other_settings_on_resume_are_noted(run: Run, tmp_path: Path) -> None:
    """Another method goes on with a new discriminator."""
    assert run("--steps", 2, "--no-compare", "--objective", "pconv")[0] == 0
    for steps, name, rate in ((3, "ctn", 4e-3), (4, "mat", 1e-4), (5, "transcnn-hae", 1e-4)):
        status, printed, _ = run(
            "--steps", steps, "--no-compare", "--objective", name, "--resume", "--lr", rate
        )
        assert status == 0
        assert "note: objective was" in printed and f", is {name}: the run goes on" in printed
        assert ("note: lr was 0.004, is 0.0001" in printed) == (name == "mat")
    assert load(tmp_path / "out" / "checkpoint.pt")["adversary"] is None


def test_checkpoint_of_an_earlier_version_is_taken(pixel_run: Run, tmp_path: Path) -> None:
    """It recorded fewer terms and settings."""
    assert pixel_run("--steps", 2, "--no-compare")[0] == 0
    path = tmp_path / "out" / "checkpoint.pt"
    state = load(path)
    state["history"] = state["history"][:, :3].clone()
    for name in ("objective", "tv", "perceptual", "style", "chunk", "trunk", "layer"):
        del state["settings"][name]
    del state["adversary"]
    torch.save(state, path)
    status, printed, _ = pixel_run("--steps", 4, "--no-compare", "--resume")
    assert status == 0
    assert "note:" not in printed
    assert load(path)["history"].shape == (4, len(engine.RECORDED))


def test_new_run_keeps_the_checkpoint_of_the_earlier_one(pixel_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert pixel_run("--steps", 5, "--no-compare")[0] == 0
    assert pixel_run("--steps", 6, "--no-compare", "--seed", 1)[0] == 0
    assert load(out / "checkpoint.earlier-run.pt")["step"] == 5
    assert load(out / "checkpoint.previous.pt")["settings"]["seed"] == 1


def test_diverged_run_is_not_saved(pixel_run: Run, tmp_path: Path) -> None:
    assert pixel_run("--steps", 2, "--no-compare")[0] == 0
    status, _, err = pixel_run("--steps", 8, "--save-every", 8, "--no-compare", "--lr", 1e30)
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
    write_noise(folder / "b.png")
    status, printed, err = pixel_run("--steps", 1, "--no-compare", images=folder)
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
    for seed, name in enumerate("abc"):
        write_noise(folder / f"{name}.png", seed)
    (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:2000])
    status, _, err = pixel_run("--steps", 2, "--no-compare", images=folder)
    assert status == 0
    assert err.count("a.png") == 1 and "skipped, 1 so far" in err
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:2000])
    status, _, err = pixel_run("--steps", 2, images=folder)
    assert status == 2
    assert "no picture is left" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_mask_files(pixel_run: Run, tmp_path: Path) -> None:
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
    stripe = np.zeros((64, 90), dtype=np.uint8)
    stripe[:, 20:40] = 255
    Image.fromarray(stripe).save(folder / "mask.png")
    assert pixel_run("--steps", 2, "--no-compare", "--masks", folder, "--mask-files-mark", "hole")[0] == 0
    assert "what is marked is hole" in report(tmp_path / "out")["settings"]["data"]


def test_unusable_checkpoints(pixel_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_one_line(pixel_run("--resume"), "there is no checkpoint", str(out))
    assert pixel_run("--steps", 4, "--no-compare")[0] == 0
    newest = out / "checkpoint.pt"
    content = newest.read_bytes()
    assert_one_line(pixel_run("--steps", 4, "--resume"), "at step 4 already")
    assert_one_line(pixel_run("--steps", 9, "--width", 6, "--resume"), "width 4", "width 6")
    for damaged in (content[: len(content) // 2], b"", b"garbage"):
        newest.write_bytes(damaged)
        result = pixel_run("--steps", 9, "--resume")
        assert_one_line(result, "checkpoint.pt is damaged", "checkpoint.previous.pt")
    torch.save({"weights": torch.ones(2)}, newest)
    assert_one_line(pixel_run("--steps", 9, "--resume"), "not written by train.py")


def test_unusable_options(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (
        (("--size", "33"), "multiple of 32"),
        (("--steps", "0"), "must be at least 1"),
        (("--batch", "two"), "invalid int value"),
        (("--compare-steps", "-1"), "must be at least 0"),
        (("--objective", "gan"), "invalid choice: 'gan'"),
        (("--objective", "ctn", "--style", "1"), "that of ctn is fixed"),
        (("--perceptual", "0.05"), "argument --perceptual: only with --objective pixel"),
        (("--normalize", "mask"), "argument --normalize: only with --objective pixel"),
        ((*PIXEL, "--trunk-weights", "x.pth"), "only with --perceptual or --style"),
        ((*PIXEL, "--chunk", "1"), "only with --perceptual or --style"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(*options)
        assert stop.value.code == 2
        assert words in capsys.readouterr().err.splitlines()[-1]
    assert_one_line(run("--backend", "cuda"), "--backend cuda", "cannot run")
    missing, damaged, other = (tmp_path / name for name in ("none.pth", "damaged.pth", "other.pth"))
    damaged.write_bytes(b"not a state dict")
    torch.save({"weight": torch.ones(1)}, other)
    for path in (missing, damaged, other):
        assert_one_line(run("--trunk-weights", path), "error: --trunk-weights: ", str(path))
    assert_one_line(run(out=damaged / "out"), "--out", "cannot create")
    if not torch.cuda.is_available():
        assert_one_line(run("--device", "cuda"), "no CUDA device")


# -- missing packages -------------------------------------------------------------------------

# The modules of the examples that import a package, which a test run has imported already.
IMPORTERS = ("job", "summary", "engine", "data", "pictures", "checkpoint", "trunks", "losses", "options")


def start(
    patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str, module: str, *options: str
) -> tuple[Any, str, str]:
    """Exit status and output of a program in a process without a module."""
    patch.setitem(sys.modules, module, None)
    for importer in IMPORTERS:
        patch.delitem(sys.modules, importer, raising=False)
    patch.setattr(sys, "argv", [f"{program}.py", *options])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / f"{program}.py"), run_name="__main__")
    return stop.value.code, *capsys.readouterr()


@pytest.mark.parametrize("module", ["PIL", "tqdm", "numpy"])
@pytest.mark.parametrize("program", ["train", "inpaint", "style_transfer"])
def test_missing_extras_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], program: str, module: str
) -> None:
    if (program, module) == ("inpaint", "tqdm"):
        pytest.skip("it has no progress bar")
    status, _, err = start(monkeypatch, capsys, program, module)
    assert status == 2
    assert err.startswith(f"{program}.py: error: ") and len(err.splitlines()) == 1
    assert module in err and "pip install '.[demo]'" in err


def test_help_needs_no_pillow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    status, printed, _ = start(monkeypatch, capsys, "train", "PIL", "--help")
    assert status == 0
    assert "--objective" in printed
