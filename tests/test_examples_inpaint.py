"""The program that fills the holes of a picture: what it keeps, what it fills, wrong input."""

from __future__ import annotations

import sys
import zlib
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
    Result,
    Run,
    picks_its_own_backend,
    write_noise,
)
from example_runs import assert_one_line as one_line
from picture_files import chunk, deep_pixels, write_deep_png
from PIL import Image

sys.path.insert(0, str(EXAMPLES))

import inpaint
import pictures
import plots
import train

pytestmark = picks_its_own_backend
WIDTH, HEIGHT = 53, 37


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a short run of train.py."""
    folder = tmp_path_factory.mktemp("trained")
    for i in range(2):
        write_noise(folder / f"{i}.png", i)
    options = [*TINY, *PIXEL, "--steps", "4", "--no-compare", "--images", str(folder), "--out", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "write_png", lambda figure, path: plots.plt.close(figure))
        assert train.main(options) == 0
    return folder


@pytest.fixture
def hole() -> np.ndarray[Any, Any]:
    hole = np.zeros((HEIGHT, WIDTH), dtype=bool)
    hole[3:20, 10:25] = hole[30:, 40:] = True
    return hole


@pytest.fixture
def folder(tmp_path: Path, hole: np.ndarray[Any, Any]) -> Path:
    Image.fromarray(hole.astype(np.uint8) * 255).save(tmp_path / "mask.png")
    picture().save(tmp_path / "photo.png")
    return tmp_path


@pytest.fixture
def run(folder: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(
        *options: object,
        image: str = "photo.png",
        mask: str = "mask.png",
        network: Path = trained,
        output: str | None = "out.png",
    ) -> tuple[int, str, str]:
        words = [folder / image, folder / mask, network, "--device", "cpu", *options]
        words += [] if output is None else ["--output", folder / output]
        status = inpaint.main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def picture() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as image:
        return np.array(image)


# -- pictures ---------------------------------------------------------------------------------


def test_holes_are_filled_by_the_network_and_the_rest_is_kept(
    run: Run, folder: Path, trained: Path, hole: np.ndarray[Any, Any]
) -> None:
    status, printed, err = run()
    assert (status, err) == (0, "")
    summary, written = printed.splitlines()
    assert f"filled {hole.sum()} of {hole.size:,} pixels" in summary
    assert f"{WIDTH}x{HEIGHT} with the network of step 4" in summary
    assert written == f"written: {folder / 'out.png'}"
    before, after = pixels(folder / "photo.png"), pixels(folder / "out.png")
    assert (after[~hole] == before[~hole]).all()
    # By hand: a larger canvas on which nothing outside the picture is known, and other values lie there.
    net, _ = inpaint.load_network(trained / "checkpoint.pt", CPU)
    image, known = torch.rand(1, 3, 64, 64), torch.zeros(1, 1, 64, 64)
    image[0, :, :HEIGHT, :WIDTH] = torch.from_numpy(before).permute(2, 0, 1) / 255
    known[0, 0, :HEIGHT, :WIDTH] = torch.from_numpy(~hole)
    with torch.no_grad():
        expected = (net(image, known)[0].clamp(0, 1) * 255).permute(1, 2, 0).numpy()[:HEIGHT, :WIDTH]
    assert (np.abs(after[hole] - expected[hole]) <= 0.5 + 1e-3).all()
    assert np.abs(after[hole].astype(int) - before[hole]).max() > 20


@pytest.mark.parametrize(
    ("mode", "result"),
    [
        ("1", "L"), ("L", "L"), ("LA", "LA"), ("P", "RGB"), ("P transparent", "RGBA"), ("L transparent", "LA"),
        ("RGBA", "RGBA"), ("I;16", "I;16"),
    ],
)  # fmt: skip
def test_every_kind_of_picture(
    run: Run, folder: Path, hole: np.ndarray[Any, Any], mode: str, result: str
) -> None:
    ramp = np.arange(HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    options = {}
    if mode == "I;16":
        image = Image.fromarray((ramp * 33).astype(np.uint16))
    else:
        image = picture().convert(mode.split()[0])
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray((ramp % 256).astype(np.uint8)))
    if "transparent" in mode:
        options["transparency"] = image.getpixel((0, 0))
    image.save(folder / "kind.png", **options)
    status, _, err = run(image="kind.png")
    assert status == 0, err
    with Image.open(folder / "out.png") as filled, Image.open(folder / "kind.png") as given:
        assert filled.mode == result
        assert filled.size == (WIDTH, HEIGHT)
        expected = np.array(given if given.mode == result else given.convert(result))
        filled_pixels = np.array(filled)
    assert (filled_pixels[~hole] == expected[~hole]).all()
    assert (filled_pixels[hole] != expected[hole]).any()
    if result.endswith("A"):
        assert (filled_pixels[hole][:, -1] == 255).all()
        assert (expected[..., -1] != 255).any()


@pytest.mark.parametrize(
    ("channels", "key"), [(1, False), (2, False), (3, False), (4, False), (1, True), (3, True)]
)
def test_every_kind_of_picture_of_16_bits(
    run: Run, folder: Path, hole: np.ndarray[Any, Any], channels: int, key: bool
) -> None:
    """A key is the one colour that is transparent; one that differs in its low byte alone is another colour."""
    before = deep_pixels(HEIGHT, WIDTH, channels)
    if key:
        before[0, 0] = before[1, 1] = before[0, 1] = before[5, 11]
        before[0, 1, -1] ^= 1
        chunks = [chunk(b"tRNS", before[0, 0].astype(">u2").tobytes())]
        shown = np.full((HEIGHT, WIDTH, 1), 65535, np.uint16)
        shown[0, 0] = shown[1, 1] = shown[5, 11] = 0
    profile = chunk(b"iCCP", b"name\0\0" + zlib.compress(b"a profile" * 9))
    write_deep_png(folder / "deep.png", before, profile, *(chunks if key else ()), interlaced=channels > 2)
    status, _, err = run(image="deep.png")
    assert status == 0, err
    if key:
        before = np.concatenate([before, shown], 2)
    result = pictures.read(folder / "out.png")
    after = result.pixels
    assert result.profile == b"a profile" * 9
    assert after.dtype == np.uint16 and after.shape == before.shape
    assert (after[~hole] == before[~hole]).all()
    assert (after[hole] % 256 != 0).any(), "what is filled has 16 bits, too"
    if after.shape[2] in (2, 4):
        assert (after[hole][:, -1] == 65535).all()


def test_marks_stand_for_what_the_option_says(run: Run, folder: Path, hole: np.ndarray[Any, Any]) -> None:
    deep = np.where(hole, 0, 1).astype(np.uint16)
    Image.fromarray(deep).save(folder / "valid.png")
    assert run()[0] == 0
    assert run("--mask-is", "valid", mask="valid.png", output="other.png")[0] == 0
    assert (folder / "out.png").read_bytes() == (folder / "other.png").read_bytes()


@pytest.mark.parametrize("size", [(1, 1), (31, 33), (64, 32), (100, 1)])
def test_any_size(trained: Path, size: tuple[int, int]) -> None:
    net, _ = inpaint.load_network(trained, CPU)
    known = (torch.arange(size[0] * size[1]) % 3 > 0).float().view(1, 1, *size)
    image = torch.rand(1, 3, *size)
    filled = inpaint.fill(net, image, known)
    assert filled.shape == image.shape
    assert filled.isfinite().all()
    assert torch.equal(inpaint.fill(net, image + 5 * (1 - known), known), filled)
    if size == (64, 32):
        with torch.no_grad():
            assert torch.equal(net(image, known).clamp(0, 1), filled)


def test_output_is_named_after_the_picture(run: Run, folder: Path, trained: Path) -> None:
    """One of another format has a name of its own."""
    picture().save(folder / "photo.jpg")
    for image in ("photo.png", "photo.jpg"):
        assert run(output=None, image=image, network=trained / "checkpoint.previous.pt")[0] == 0
    assert {path.name for path in folder.iterdir()} == {
        *("mask.png", "photo.png", "photo.jpg", "photo.png-filled.png", "photo.jpg-filled.png")
    }


def test_nothing_is_overwritten_unless_asked_for(run: Run, folder: Path) -> None:
    for output in ("out.png", None):
        path = folder / (output or "photo.png-filled.png")
        path.write_bytes(b"mine")
        assert_one_line(run(output=output), str(path), "exists", "--overwrite")
        assert path.read_bytes() == b"mine"
        assert run("--overwrite", output=output)[0] == 0
        assert pixels(path).shape == (HEIGHT, WIDTH, 3)


# -- wrong input ------------------------------------------------------------------------------


def assert_one_line(result: Result, *words: str) -> None:
    assert result[1] == ""
    one_line(result, *words, program="inpaint.py")


def test_unusable_pictures_and_masks(run: Run, folder: Path) -> None:
    assert_one_line(run(image="none.png"), "there is no picture", "none.png")
    assert_one_line(run(mask="none.png"), "there is no picture", "none.png")
    (folder / "damaged.png").write_bytes((folder / "photo.png").read_bytes()[:200])
    assert_one_line(run(image="damaged.png"), "cannot read", "damaged.png")
    assert_one_line(run(mask="damaged.png"), "cannot read", "damaged.png")
    content = bytearray((folder / "photo.png").read_bytes())
    length = content.index(b"IDAT") - 4
    # The chunk of pixels ends early, and what follows is no chunk: Pillow calls that bad syntax.
    content[length : length + 4] = (200).to_bytes(4, "big")
    (folder / "chunk.png").write_bytes(content)
    assert_one_line(run(mask="chunk.png"), "cannot read", "chunk.png")
    Image.new("I", (WIDTH, HEIGHT)).save(folder / "deep.tif")
    assert_one_line(run(image="deep.tif"), "mode I", "8 or 16 bits")
    Image.new("L", (40, 30), 255).save(folder / "small.png")
    assert_one_line(run(mask="small.png"), "small.png is 40x30", f"{WIDTH}x{HEIGHT}", "scale it")
    for value, words in ((0, "no pixel as hole"), (255, "every pixel as hole")):
        Image.new("L", (WIDTH, HEIGHT), value).save(folder / "flat.png")
        assert_one_line(run(mask="flat.png"), words, "--mask-is valid")
    assert_one_line(run("--mask-is", "valid", mask="flat.png"), "no pixel as hole", "--mask-is hole")
    assert not (folder / "out.png").exists()


def test_unusable_checkpoints(run: Run, folder: Path, trained: Path) -> None:
    assert_one_line(run(network=folder / "none.pt"), "there is no checkpoint", "none.pt", "train.py")
    state = torch.load(trained / "checkpoint.pt", weights_only=True)
    newest = folder / "checkpoint.pt"
    newest.write_bytes(b"garbage")
    assert_one_line(run(network=folder), "checkpoint.pt is damaged")
    (folder / "checkpoint.previous.pt").write_bytes(b"")
    result = run(network=folder)
    assert_one_line(result, f"is kept: {folder / 'checkpoint.previous.pt'}")
    assert "--resume" not in result[2]
    torch.save({"weights": torch.ones(2)}, newest)
    assert_one_line(run(network=newest), "not written by train.py")
    torch.save(state | {"architecture": state["architecture"] | {"width": 6}}, newest)
    assert_one_line(run(network=newest), "checkpoint.pt", "does not hold a network")
    torch.save(state | {"model": {k: v * float("nan") for k, v in state["model"].items()}}, newest)
    assert_one_line(run(network=newest), "not finite")


def test_unusable_outputs(run: Run, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "photo.png").read_bytes()
    assert_one_line(run(output="photo.png"), "would replace", "photo.png")
    assert_one_line(run(output="mask.png"), "would replace", "mask.png")
    assert_one_line(run(output="none/out.png"), "--output", "there is no folder")
    (folder / "busy.png").mkdir()
    assert_one_line(run(output="busy.png"), "cannot write", "busy.png")
    with pytest.raises(SystemExit):
        run(output="out.jpg")
    assert "must end in .png" in capsys.readouterr().err
    assert (folder / "photo.png").read_bytes() == before
    if not torch.cuda.is_available():
        assert_one_line(run("--device", "cuda"), "no CUDA device")
