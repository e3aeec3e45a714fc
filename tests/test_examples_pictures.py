"""Picture and mask files of the examples: depth, transparency, damage, links, thin marks."""

from __future__ import annotations

import os
import runpy
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("PIL", reason="the examples need pillow")
from example_runs import EXAMPLES, picks_its_own_backend
from picture_files import chunk, deep_pixels, write_deep_png
from PIL import Image

sys.path.insert(0, str(EXAMPLES))

import data
import pictures

pytestmark = picks_its_own_backend
Array = np.ndarray[Any, Any]


# -- depth ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [3, 4])
def test_tiff_of_16_bits_is_read_completely(
    tmp_path: Path, channels: int, order: str, compression: str | None
) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels, path = deep_pixels(11, 13, channels), tmp_path / "deep.tif"
    options = {"photometric": "rgb", "extrasamples": ["unassalpha"] * (channels - 3), "byteorder": order}
    # Orientation 6: to be turned a quarter.
    tifffile.imwrite(path, pixels, compression=compression, extratags=[(274, 3, 1, 6)], **options)
    assert np.array_equal(pictures.read(path).pixels, np.rot90(pixels, -1))


def test_depths_that_cannot_be_kept_are_refused_by_name(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "cmyk.tif", deep_pixels(4, 4, 4), photometric="separated")
    with pytest.raises(pictures.InputError, match=r"cmyk\.tif.*16 bits.*TIFF with CMYK;16.*save it as PNG"):
        pictures.read(tmp_path / "cmyk.tif")
    (tmp_path / "deep.ppm").write_bytes(
        b"P6 4 4 1023\n" + (deep_pixels(4, 4, 3) % 1024).astype(">u2").tobytes()
    )
    with pytest.raises(pictures.InputError, match=r"deep\.ppm.*16 bits.*PPM.*save it as PNG"):
        pictures.read(tmp_path / "deep.ppm")
    shallow = deep_pixels(4, 4, 3).astype(np.uint8)
    (tmp_path / "shallow.ppm").write_bytes(b"P6 4 4 255\n" + shallow.tobytes())
    assert np.array_equal(pictures.read(tmp_path / "shallow.ppm").pixels, shallow)


# -- orientation ------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_pillow_turns_them(tmp_path: Path, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[pictures.ORIENTATION] = orientation
    pixels = deep_pixels(4, 6, 3).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    with Image.open(tmp_path / "turned.png") as image:
        expected = np.array(ImageOps.exif_transpose(image))
    assert np.array_equal(pictures.read(tmp_path / "turned.png").pixels, expected)
    deep = pixels.astype(np.uint16) * 256 + 7
    write_deep_png(tmp_path / "deep.png", deep, chunk(b"eXIf", exif.tobytes()[6:]))
    turned = pictures.read(tmp_path / "deep.png").pixels
    assert np.array_equal(turned, expected.astype(np.uint16) * 256 + 7)


DAMAGED = {
    "no-tiff": b"garbage, not a TIFF header",
    "cut": b"MM\0*\0\0\0\x08\0",
    "empty": b"",
    "far-away": b"MM\0*\xff\xff\xff\xff",
    "far-value": b"MM\0*"
    + struct.pack(">IHHHIIHHIII", 8, 2, 0x010F, 2, 60, 0xFFFFFF, 0x0112, 3, 1, 6 << 16, 0),
}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_exif_block_costs_nothing_but_the_orientation(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = deep_pixels(4, 6, 3)
    path = tmp_path / f"{kind}.png"
    write_deep_png(path, pixels, chunk(b"eXIf", DAMAGED[kind]))
    found = pictures.read(path).pixels
    # What can still be told of it may be heeded.
    assert any(np.array_equal(found, turned) for turned in (pixels, np.rot90(pixels, -1)))
    if kind == "no-tiff":
        assert np.array_equal(found, pixels)
        pictures.read(path)
        err = capsys.readouterr().err
        assert err.startswith("note: ") and str(path) in err and "EXIF" in err
        assert len(err.splitlines()) == 1, "said once"


# -- folders ----------------------------------------------------------------------------------


def test_listing_follows_links_and_leaves_out_what_is_hidden(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "photos", tmp_path / "elsewhere"
    for path in (folder / "sub", folder / ".thumbnails", elsewhere):
        path.mkdir(parents=True)
    for path in (
        folder / "b.png", folder / "._b.png", folder / "sub" / "a.JPG", folder / ".thumbnails" / "b.png",
        elsewhere / "c.png", elsewhere / "d.png", elsewhere / "notes.txt",
    ):  # fmt: skip
        path.write_bytes(b"")
    (folder / "link").symlink_to(elsewhere, target_is_directory=True)
    (folder / "z.png").symlink_to(elsewhere / "c.png")
    (elsewhere / "back").symlink_to(folder, target_is_directory=True)
    (folder / "gone.png").symlink_to(tmp_path / "none.png")
    found = pictures.list_pictures(folder, "--images")
    # Once, whatever leads to it: a held-out picture is trained on under no other name.
    assert found == [folder / name for name in ("b.png", "link/d.png", "sub/a.JPG", "z.png")]
    through = tmp_path / "through"
    through.symlink_to(folder, target_is_directory=True)
    assert len(pictures.list_pictures(through, "--images")) == 4


# -- masks ------------------------------------------------------------------------------------

SIZE = 32


def stroke() -> Array:
    hole = np.zeros((SIZE, SIZE), dtype=bool)
    hole[5:9, 3:30] = True
    return hole


def mask_picture(kind: str, hole: Array) -> Image.Image:
    ones = hole.astype(np.uint8)
    if kind == "0 and 255":
        return Image.fromarray(255 * ones)
    if kind == "0 and 1":
        return Image.fromarray(ones)
    if kind == "0 and 1, 16 bits":
        return Image.fromarray(ones.astype(np.uint16))
    if kind == "one channel":
        return Image.fromarray(np.stack([0 * ones, 0 * ones, 3 * ones], 2))
    if kind == "1 bit":
        return Image.fromarray(255 * ones).convert("1")
    if kind == "palette":
        image = Image.frombytes("P", hole.shape[::-1], ones.tobytes())
        image.putpalette([0, 0, 0, 128, 0, 0])
        return image
    # Drawn on a transparent sheet, whose own colour does not show.
    sheet = {"white strokes": 255, "strokes on a black sheet": 0}[kind]
    colour = np.where(hole, 255, sheet).astype(np.uint8)
    return Image.fromarray(np.stack([colour, colour, colour, 200 * ones], 2))


KINDS = (
    *("0 and 255", "0 and 1", "0 and 1, 16 bits", "one channel", "1 bit", "palette"),
    *("white strokes", "strokes on a black sheet"),
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mark", ["hole", "valid"])
def test_what_marks(tmp_path: Path, kind: str, mark: str) -> None:
    mask_picture(kind, stroke()).save(tmp_path / "mask.png")
    hole = pictures.read_hole(tmp_path / "mask.png", mark, "--mask-is")
    assert np.array_equal(hole, stroke() == (mark == "hole"))
    known = data.MaskFiles(tmp_path, SIZE, mark)(np.random.default_rng(0))
    assert known.mean() == (1 - hole).mean()


def test_files_that_blur_mark_from_half_of_white_on(tmp_path: Path) -> None:
    Image.fromarray(255 * stroke().astype(np.uint8)).save(tmp_path / "mask.jpg", quality=40)
    with Image.open(tmp_path / "mask.jpg") as image:
        assert ((np.array(image) > 0) != stroke()).any()
    assert np.array_equal(pictures.read_hole(tmp_path / "mask.jpg", "hole", "--mask-is"), stroke())


@pytest.mark.parametrize("size", [(512, 512), (512, 300), (77, 512), (32, 32)])
@pytest.mark.parametrize("mark", ["hole", "valid"])
def test_thin_holes_stay_when_a_mask_is_scaled(tmp_path: Path, size: tuple[int, int], mark: str) -> None:
    """Also of masks that are no square."""
    height, width = size
    hole = np.zeros(size, dtype=bool)
    hole[height // 3] = True
    hole[:, width // 2 : width // 2 + 3] = True
    Image.fromarray(255 * (hole == (mark == "hole")).astype(np.uint8)).save(tmp_path / "mask.png")
    masks = data.MaskFiles(tmp_path, SIZE, mark)
    for seed in range(5):
        known = masks(np.random.default_rng(seed))
        assert known.shape == (SIZE, SIZE) and set(np.unique(known)) == {0, 1}
        lines = [(known == 0).all(axis).nonzero()[0] for axis in (0, 1)]
        assert all(1 <= len(found) <= 4 for found in lines)
        assert known.sum() == (SIZE - len(lines[0])) * (SIZE - len(lines[1])), "nothing else is hole"


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "drawn"])
@pytest.mark.parametrize("kind", ["nothing", "everything", "everything once scaled"])
def test_masks_of_nothing_or_everything_are_refused_by_name(
    tmp_path: Path, kind: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr(data, "KEEP_PIXELS", 0)
    hole = np.full((128, 128), kind != "nothing")
    if kind == "everything once scaled":
        hole[1::2] = False
    Image.fromarray(255 * hole.astype(np.uint8)).save(tmp_path / "mask.png")
    words = {
        "nothing": "no pixel as hole.*--mask-files-mark valid",
        "everything": "every pixel as hole.*--mask-files-mark valid",
        "everything once scaled": "every pixel at --size 32",
    }[kind]
    with pytest.raises(data.InputError, match=rf"mask\.png.*{words}"):
        data.MaskFiles(tmp_path, SIZE, "hole")(np.random.default_rng(0))


# -- what else the examples need --------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "module", "importers"),
    [
        ("train", "tqdm", ("engine",)),
        ("train", "PIL", ("data", "pictures")),
        ("inpaint", "PIL", ("pictures", "checkpoint")),
        ("inpaint", "numpy", ()),
        ("style_transfer", "tqdm", ()),
    ],
)
def test_missing_extras_are_named(
    program: str,
    module: str,
    importers: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for importer in importers:
        monkeypatch.delitem(sys.modules, importer, raising=False)
    monkeypatch.setattr(sys, "argv", [f"{program}.py"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(os.fspath(EXAMPLES / f"{program}.py"), run_name="__main__")
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{program}.py: error: ") and len(err.splitlines()) == 1
    assert module in err and "pip install '.[demo]'" in err
