"""Picture and mask files of the examples: depth, transparency, damage, links, thin marks; what is trained on."""

from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_runs import EXAMPLES, picks_its_own_backend, write_noise
from picture_files import chunk, deep_pixels, write_deep_png
from PIL import Image

sys.path.insert(0, str(EXAMPLES))

import data
import pictures
from errors import InputError

pytestmark = picks_its_own_backend
Array = np.ndarray[Any, Any]


# -- depth ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "order", "compression"), [(3, "<", None), (3, ">", "zlib"), (4, "<", "zlib"), (4, ">", None)]
)
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
    with pytest.raises(InputError, match=r"cmyk\.tif.*16 bits.*TIFF with CMYK;16.*save it as PNG"):
        pictures.read(tmp_path / "cmyk.tif")
    (tmp_path / "deep.ppm").write_bytes(
        b"P6 4 4 1023\n" + (deep_pixels(4, 4, 3) % 1024).astype(">u2").tobytes()
    )
    with pytest.raises(InputError, match=r"deep\.ppm.*16 bits.*PPM.*save it as PNG"):
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
    read = pictures.read(path).pixels
    # What can still be told of it may be heeded.
    assert any(np.array_equal(read, turned) for turned in (pixels, np.rot90(pixels, -1)))
    if kind == "no-tiff":
        assert np.array_equal(read, pixels)
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
    listed = pictures.list_pictures(folder, "--images")
    # Once, whatever leads to it: a held-out picture is trained on under no other name.
    assert listed == [folder / name for name in ("b.png", "link/d.png", "sub/a.JPG", "z.png")]
    through = tmp_path / "through"
    through.symlink_to(folder, target_is_directory=True)
    assert len(pictures.list_pictures(through, "--images")) == 4


# -- masks ------------------------------------------------------------------------------------

SIZE = 32


def stroke() -> Array:
    hole = np.zeros((SIZE, SIZE), dtype=bool)
    hole[5:9, 3:30] = True
    return hole


def in_palette(ones: Array) -> Image.Image:
    image = Image.frombytes("P", ones.shape[::-1], ones.tobytes())
    image.putpalette([0, 0, 0, 128, 0, 0])
    return image


def on_a_sheet(ones: Array, sheet: int) -> Image.Image:
    """Drawn in white on a transparent sheet, whose own colour does not show."""
    colour = np.where(ones, 255, sheet).astype(np.uint8)
    return Image.fromarray(np.stack([colour, colour, colour, 200 * ones], 2))


# Pictures of marks, made of uint8 [H, W] with 1 where something is drawn.
MASKS: dict[str, Callable[[Array], Image.Image]] = {
    "0 and 255": lambda ones: Image.fromarray(255 * ones),
    "0 and 1": Image.fromarray,
    "0 and 1, 16 bits": lambda ones: Image.fromarray(ones.astype(np.uint16)),
    "one channel": lambda ones: Image.fromarray(np.stack([0 * ones, 0 * ones, 3 * ones], 2)),
    "1 bit": lambda ones: Image.fromarray(255 * ones).convert("1"),
    "palette": in_palette,
    "white strokes": lambda ones: on_a_sheet(ones, 255),
    "strokes on a black sheet": lambda ones: on_a_sheet(ones, 0),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("mark", ["hole", "valid"])
def test_what_marks(tmp_path: Path, kind: str, mark: str) -> None:
    MASKS[kind](stroke().astype(np.uint8)).save(tmp_path / "mask.png")
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
        assert all(1 <= len(line) <= 4 for line in lines)
        assert known.sum() == (SIZE - len(lines[0])) * (SIZE - len(lines[1])), "nothing else is hole"


def test_masks_of_everything_once_scaled_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a mask is first read, or when it is drawn."""
    hole = np.zeros((128, 128), np.uint8)
    hole[::2] = 255
    Image.fromarray(hole).save(tmp_path / "mask.png")
    words = r"mask\.png.*every pixel at --size 32"
    with pytest.raises(InputError, match=words):
        data.MaskFiles(tmp_path, SIZE, "hole")
    monkeypatch.setattr(data, "KEEP_PIXELS", 0)
    masks = data.MaskFiles(tmp_path, SIZE, "hole")
    with pytest.raises(InputError, match=words):
        masks(np.random.default_rng(0))


# -- what is trained on -----------------------------------------------------------------------


def brush(rng: np.random.Generator) -> Array:
    return data.brush_mask(rng, SIZE)


def test_held_out_pictures_are_never_trained_on(tmp_path: Path) -> None:
    for i in range(14):
        Image.new("RGB", (40, 40), (i, 0, 0)).save(tmp_path / f"{i:02}.png")
    many = data.load_photographs(tmp_path, SIZE)
    training, held_out = ({p.path for p in side} for side in (many.training, many.held_out))
    assert (len(training), len(held_out), many.held_out_by) == (13, 1, "picture")
    assert not training & held_out

    (tmp_path / "one").mkdir()
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "one" / "only.png")
    single = data.load_photographs(tmp_path / "one", SIZE)
    assert single.held_out_by == "region"
    sampler = data.Sampler(single, brush, seed=0, batch=16)
    assert sampler.training(0).images.max() * 255 < 192
    assert sampler.held_out(16).images.min() * 255 >= 192


def test_batches_depend_on_seed_step_and_index_alone(tmp_path: Path) -> None:
    for i in range(3):
        write_noise(tmp_path / f"{i}.png", i, 48)
    photographs = data.load_photographs(tmp_path, SIZE)

    def draw(step: int, batch: int, rank: int = 0, seed: int = 0) -> data.Batch:
        return data.Sampler(photographs, brush, seed=seed, batch=batch, rank=rank).training(step)

    whole, shards = draw(3, 4), [draw(3, 2, rank) for rank in (0, 1)]
    assert torch.equal(whole.images, torch.cat([shard.images for shard in shards]))
    assert torch.equal(whole.masks, torch.cat([shard.masks for shard in shards]))
    assert not torch.equal(whole.images, draw(4, 4).images)
    assert not torch.equal(whole.images, draw(3, 4, seed=1).images)
    assert whole.images.is_contiguous()
    assert 0 <= whole.images.min() <= whole.images.max() <= 1
