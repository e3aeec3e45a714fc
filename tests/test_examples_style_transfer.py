"""The style transfer example: its formula, whole small runs, wrong input."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from example_runs import CPU, EXAMPLES, Result, Run, assert_one_line, light, narrow, picks_its_own_backend
from PIL import Image

sys.path.insert(0, str(EXAMPLES))

import style_transfer as transfer
import trunks
from errors import InputError

import inpaint_kernels as ik

pytestmark = picks_its_own_backend
RANDOM = trunks.Found(None, "random")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i, name in enumerate(("content", "other", "style")):
        coarse = np.random.default_rng(i).integers(0, 256, (5, 7 - i, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((90, 70 + 5 * i), Image.Resampling.BICUBIC).save(
            tmp_path / f"{name}.png"
        )
    return tmp_path


@pytest.fixture
def run(photos: Path, capsys: pytest.CaptureFixture[str], light: None) -> Run:
    def call(*options: object, content: object = photos / "content.png") -> Result:
        fixed = ["--trunk", "alexnet", "--size", 64, "--device", "cpu", "--style", photos / "style.png"]
        status = transfer.main(
            [str(o) for o in (*fixed, "--content", content, "--out", photos / "out", *options)]
        )
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def arguments(photos: Path, *options: str) -> tuple[argparse.Namespace, torch.Tensor, torch.Tensor]:
    names = [str(photos / f"{name}.png") for name in ("content", "other")]
    args = transfer.parse(["--content", *names, "--style", str(photos / "style.png"), *options])
    contents = torch.cat([transfer.load_picture(name, 64) for name in names])
    return args, contents, transfer.load_picture(args.style, 64)


# -- objective --------------------------------------------------------------------------------


def test_objective_is_the_formula_of_gatys(photos: Path) -> None:
    args, contents, style = arguments(
        photos, "--trunk", "alexnet", "--style-weight", "7", "--tv-weight", "0.3"
    )
    rng = torch.Generator().manual_seed(0)
    images = (contents + 0.2 * torch.rand(contents.shape, generator=rng)).requires_grad_()
    terms = transfer.make_objective(args, RANDOM, contents, style)(images)
    taps, content_tap = transfer.TAPS["alexnet"]
    trunk = trunks.load_trunk("alexnet", None, CPU, option="--weights", taps=taps)
    tap = taps.index(content_tap)

    def content(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return ((trunk(x)[tap] - trunk(y)[tap]) ** 2).mean()

    def likeness(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        layers = []
        for a, b in zip(trunk(x), trunk(y), strict=True):
            n, c, h, w = a.shape
            gram = torch.einsum("nchw,ndhw->ncd", a, a) - torch.einsum("nchw,ndhw->ncd", b, b)
            layers.append((gram**2).sum() / (4 * c**2 * (h * w) ** 2) / n)
        return torch.stack(layers)

    expected_content = content(images, contents) / content(style.expand_as(contents), contents)
    expected_style = (likeness(images, style) / likeness(contents, style)).mean()
    torch.testing.assert_close(terms.content, expected_content, rtol=1e-4, atol=0)
    torch.testing.assert_close(terms.style, expected_style, rtol=1e-4, atol=0)
    rows, columns = images[:, :, 1:] - images[:, :, :-1], images[..., 1:] - images[..., :-1]
    torch.testing.assert_close(terms.variation, rows.abs().mean() + columns.abs().mean())
    total = expected_content + 7 * expected_style + 0.3 * terms.variation
    torch.testing.assert_close(terms.total, total, rtol=1e-4, atol=0)


def test_streamed_objective_equals_the_plain_one(photos: Path) -> None:
    results = []
    for options in ((), ("--chunk", "1")):
        args, contents, style = arguments(photos, "--trunk", "alexnet", *options)
        images = (contents * 0.9).requires_grad_()
        terms = transfer.make_objective(args, RANDOM, contents, style)(images)
        terms.total.backward()
        results.append((terms, images.grad))
    (plain, plain_grad), (streamed, streamed_grad) = results
    torch.testing.assert_close(streamed, plain, rtol=1e-4, atol=0)
    assert (streamed_grad - plain_grad).norm() < 5e-3 * plain_grad.norm()


# -- trained weights ---------------------------------------------------------------------------


def shift_tolerant_file(folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """An installed package with the keys and shapes of the true one, and what its convolutions hold."""
    convolutions = ik.features.vgg16(("pool5",), weights=None).features.state_dict()
    content, place = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, 0
    for key, value in convolutions.items():
        child, kind = key.split(".")
        block = 1 + sum(int(child) > pool for pool in (4, 9, 16, 23))
        if kind == "weight" and child in ("5", "10", "17", "24"):
            place += 1
            content[f"net.slice{block}.{int(child) + place - 1}.filt"] = torch.zeros(len(value), 1, 3, 3)
        content[f"net.slice{block}.{int(child) + place}.{kind}"] = value
    content["lin0.model.1.weight"] = torch.zeros(1, 64, 1, 1)
    path = folder / "stlpips_pytorch" / "weights" / trunks.FILE
    path.parent.mkdir(parents=True)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    (folder / "stlpips_pytorch" / "__init__.py").write_text("raise RuntimeError('imported')")
    info = folder / "stlpips_pytorch-0.0.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stlpips_pytorch\nVersion: 0.0.2\n")
    (info / "RECORD").write_text(f"stlpips_pytorch/weights/{trunks.FILE},,\n")
    return path, {f"features.{key}": value for key, value in convolutions.items()}


def test_trained_weights_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch has downloaded, else for VGG16 the package's file, whose code does not run; else nothing."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    for name in trunks.NAMES[1:]:
        assert trunks.find_weights(name, None, option="-w") == (None, f"{name}, weights random")
    path, convolutions = shift_tolerant_file(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert trunks.at_hand("vgg16") == path and trunks.at_hand("vgg19") is None
    found = trunks.find_weights("vgg16", None, option="-w")
    assert found.label == "shift-tolerant VGG16 (Ghildyal and Liu 2022)"
    trunk = trunks.load_trunk("vgg16", found.weights, CPU, option="-w", taps=["pool5"])
    assert all(torch.equal(convolutions[key], value) for key, value in trunk.state_dict().items())
    assert trunks.find_weights("vgg16", "random", option="-w").weights is None
    assert trunks.find_weights("vgg16", "a.pth", option="-w") == ("a.pth", "vgg16, weights a.pth")
    cached = tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"")
    assert trunks.find_weights("vgg16", None, option="-w") == ("default", "vgg16, weights default")
    cached.unlink()
    path.write_bytes(b"no weights")
    with pytest.raises(InputError, match=f"{trunks.FILE} cannot be read: .*; -w random does without"):
        trunks.find_weights("vgg16", None, option="-w")


# -- whole runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_loss_falls_and_pictures_are_written(
    photos: Path, capsys: pytest.CaptureFixture[str], optimizer: str
) -> None:
    out = photos / "deep" / "out"
    options = ["--trunk", "alexnet", "--size", "64", "--steps", "12", "--optimizer", optimizer]
    contents = [str(photos / f"{name}.png") for name in ("content", "other")]
    options += ["--content", *contents, "--style", str(photos / "style.png"), "--out", str(out)]
    assert transfer.main([*options, "--device", "cpu"]) == 0
    assert {p.name for p in out.iterdir()} == {
        "pictures.png", "curve.png", "result-content.png", "result-other.png",
    }  # fmt: skip
    with Image.open(out / "result-other.png") as image:
        assert image.size == (64, 64)
    printed = capsys.readouterr().out
    assert "warning: alexnet has random weights" in printed
    line = next(line for line in printed.splitlines() if line.startswith("total"))
    first, last = float(line.split()[1]), float(line.split()[4])
    assert last < 0.7 * first


def test_a_second_content_does_not_change_what_the_first_becomes(photos: Path) -> None:
    args, contents, style = arguments(photos, "--trunk", "alexnet", "--steps", "3", "--optimizer", "adam")
    results = []
    for batch in (contents[:1], contents[:1].repeat(2, 1, 1, 1)):
        pictures, history = transfer.optimize(
            args, transfer.make_objective(args, RANDOM, batch, style), batch
        )
        assert history.shape == (3, 4)
        results.append(pictures)
    assert not torch.equal(results[0], contents[:1])
    # Adam divides by the size of a gradient, so where that is nearly 0 rounding shows.
    difference = (results[1] - results[0]).abs()
    assert difference.mean() < 1e-3 * (results[0] - contents[:1]).abs().mean()


def test_stopped_run_writes_what_there_is(run: Run, monkeypatch: pytest.MonkeyPatch, photos: Path) -> None:
    variation, calls = transfer.total_variation, []

    def stop(images: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return variation(images)

    monkeypatch.setattr(transfer, "total_variation", stop)
    status, printed, err = run("--steps", 9)
    assert status == 0
    assert "stopped after 2 steps" in err
    assert "for 2 steps" in printed
    assert (photos / "out" / "result-content.png").is_file()


# -- wrong input ------------------------------------------------------------------------------


def test_wrong_input(run: Run, photos: Path) -> None:
    damaged, missing = photos / "damaged.png", photos / "none.pth"
    damaged.write_bytes(b"this is not a PNG")
    cases = [
        (run(content=damaged), "cannot read", "damaged.png"),
        (run(content="no-such-picture"), "no file no-such-picture", "skimage.data"),
        (run("--weights", missing), "--weights", "none.pth"),
        (run("--out", damaged / "out"), "--out", "cannot create"),
    ]
    if not torch.cuda.is_available():
        cases.append((run("--device", "cuda"), "no CUDA device"))
    for result, *words in cases:
        assert_one_line(result, *words, program="style_transfer.py")
    # Behind the warning of random weights, and a bar of progress.
    same = ("--style", photos / "content.png")
    diverges = ("--steps", 12, "--optimizer", "lbfgs", "--lr", 1e30, "--tv-weight", float("inf"))
    for options, word in ((same, "the same"), (diverges, "finite")):
        status, _, err = run(*options)
        last = err.splitlines()[-1]
        assert status == 2 and last.startswith("style_transfer.py: error: ") and word in last
        assert "Traceback" not in err


def test_pictures_of_one_name_are_told_apart() -> None:
    contents = ["x-2.png", "a/X.png", "b/x.png", "c/x-2.jpg", "y.png"]
    args = argparse.Namespace(content=contents, out=Path("out"))
    names = [path.name for path in transfer.result_paths(args)]
    # Also where files of other cases are the same.
    assert names == [f"result-{name}.png" for name in ("x-2", "X", "x-3", "x-2-2", "y")]


def test_results_of_an_earlier_run_stay(run: Run, photos: Path) -> None:
    left = {"out": "pictures.png", "out-2": "curve.png", "out-3": "result-cat.png"}
    for folder, name in left.items():
        (photos / folder).mkdir()
        (photos / folder / name).write_bytes(b"mine")
    status, printed, _ = run("--steps", 1)
    assert status == 0
    assert str(photos / "out-4" / "result-content.png") in printed
    assert (photos / "out-4" / "result-content.png").is_file()
    for folder, name in left.items():
        assert [path.name for path in (photos / folder).iterdir()] == [name]
        assert (photos / folder / name).read_bytes() == b"mine"


def test_shipped_pictures_are_found_by_name() -> None:
    pytest.importorskip("skimage")
    assert transfer.find_picture("chelsea").name == "chelsea.png"
    assert transfer.find_picture("ihc").name == "ihc.png"
