"""Picture and mask files: found in folders, read as they are stored, written as PNG.

Colours of 16 bits come from PNG and TIFF files; every other format is read with 8 bits, as Pillow does.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from errors import InputError
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# In these black is not exactly 0 beside what is drawn on it.
LOSSY = {"JPEG", "MPO", "WEBP"}
# Pillow reports some damaged PNG files as a SyntaxError.
UNREADABLE = (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError)
# What turns a picture upright, by the value of its EXIF orientation.
ORIENTATION = 0x0112
TURNS: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: np.rot90(pixels, 2).swapaxes(0, 1),
    8: np.rot90,
}
# Pillow keeps the high byte of a colour of 16 bits. A raw mode of the other byte order keeps the low one.
OTHER_BYTE = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}


@functools.cache
def note(text: str) -> None:
    """Says it on stderr, once."""
    print(f"note: {text}", file=sys.stderr, flush=True)


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def list_pictures(folder: Path, what: str) -> list[Path]:
    """All picture files under ``folder``, sorted; through links, each file once, without hidden ones.

    Hidden are files and folders whose name begins with a dot, such as the ``._photo.png`` that macOS leaves.
    """
    if not folder.is_dir():
        raise InputError(f"{what}: the folder {folder} does not exist")
    paths: dict[str, Path] = {}
    visited = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(where, name)
            if not name.startswith(".") and path.suffix.lower() in SUFFIXES and path.is_file():
                paths.setdefault(os.path.realpath(path), path)
    if not paths:
        raise InputError(f"{what}: no pictures ({', '.join(sorted(SUFFIXES))}) in {folder}")
    return sorted(paths.values())


@dataclass
class Stored:
    """A picture as its file holds it: 8 or 16 bits; gray, gray and alpha, RGB or RGBA."""

    pixels: NDArray[Any]  # uint8 or uint16 [H, W, 1 to 4]
    profile: bytes | None = None
    lossy: bool = False

    @property
    def colours(self) -> int:
        """Channels without that of transparency."""
        return 1 if self.pixels.shape[2] < 3 else 3

    @property
    def clear(self) -> bool:
        """Whether there is a channel of transparency."""
        return self.pixels.shape[2] % 2 == 0

    @property
    def white(self) -> int:
        return int(np.iinfo(self.pixels.dtype).max)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    if not path.is_file():
        raise InputError(f"there is no picture {path}")
    try:
        with Image.open(path) as image:
            yield image
    except UNREADABLE as error:
        raise InputError(f"cannot read the picture {path}: {first_line(error)}") from error


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) from the header alone."""
    with opened(path) as image:
        width, height = image.size
        return int(width), int(height)


def read(path: Path) -> Stored:
    """A picture, turned upright."""
    with opened(path) as image:
        mode, info = image.mode, image.info
        deep = _deep_raw_mode(path, image)
        image.load()
        turn = _turn(path, image)
        if mode in ("I", "F"):
            raise InputError(f"cannot use the picture {path}: mode {mode}, expected 8 or 16 bits")
        if deep is not None:
            pixels = _deep_colours(path, deep)
        elif mode.startswith("I;16"):
            pixels = np.asarray(image).astype(np.uint16)
        else:
            clear = mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in info
            plain = ("L" if mode in ("1", "L", "LA", "La") else "RGB") + "A" * clear
            pixels = np.array(image.convert(plain))
        pixels = pixels if pixels.ndim == 3 else pixels[:, :, None]
        if pixels.dtype == np.uint16 and "transparency" in info:
            # The one colour that stands for nothing.
            shown = (pixels != np.asarray(info["transparency"])).any(2, keepdims=True)
            pixels = np.concatenate([pixels, shown * np.uint16(65535)], 2)
        profile = None if mode in ("CMYK", "LAB", "YCbCr", "HSV") else info.get("icc_profile")
        return Stored(np.ascontiguousarray(turn(pixels)), profile, image.format in LOSSY)


def _turn(path: Path, image: Image.Image) -> Callable[[NDArray[Any]], NDArray[Any]]:
    """What turns the pixels of a picture that is read upright."""
    orientation: Any = 1
    try:
        orientation = image.getexif().get(ORIENTATION)
    # Every kind of damage to this block raises another type; the pixels are there.
    except Exception as error:
        note(f"{path}: its EXIF block is damaged ({first_line(error)}), so it is not turned upright")
    return TURNS.get(orientation, lambda pixels: pixels)


def _raw_mode(tile: Any) -> str:
    """How the bytes of a part of a file are arranged, in Pillow's words."""
    codec, _, _, options = tile
    name = options if isinstance(options, str) else (options or ("",))[0]
    return f"{name};16" if codec.startswith("ppm") and options[-1] > 255 else str(name)


def _deep_raw_mode(path: Path, image: Image.Image) -> str | None:
    """The raw mode of colours of 16 bits, of which Pillow would keep 8; None for what it reads completely."""
    if image.mode.startswith("I"):
        return None
    raw_modes = {_raw_mode(tile) for tile in getattr(image, "tile", [])}
    deep = sorted(raw for raw in raw_modes if ";16" in raw)
    if not deep:
        return None
    colours, _, order = deep[0].partition(";")
    if len(raw_modes) == 1 and (deep[0] == "LA;16B" or (colours in ("RGB", "RGBA") and order in OTHER_BYTE)):
        return deep[0]
    raise InputError(
        f"cannot use the picture {path}: colours of 16 bits are read from PNG files, and from TIFF files in RGB and "
        f"RGBA, but not from {image.format} with {', '.join(deep)}; save it as PNG"
    )


def _deep_colours(path: Path, raw_mode: str) -> NDArray[np.uint16]:
    """[H, W, 2 to 4] of a file with colours of 16 bits, for which Pillow has no mode."""

    def stored(raw: str) -> Pixels:
        with Image.open(path) as image:
            for place, tile in enumerate(image.tile):
                options = raw if isinstance(tile.args, str) else (raw, *tile.args[1:])
                image.tile[place] = tile._replace(args=options)
            image.load()
            return np.asarray(image)

    if raw_mode == "LA;16B":
        # Two channels of two bytes are as long as four of one.
        return stored("RGBA").view(">u2").astype(np.uint16)
    colours, order = raw_mode.split(";")
    return stored(raw_mode) * np.uint16(256) + stored(f"{colours};{OTHER_BYTE[order]}")


def read_rgb(path: Path) -> Pixels:
    """uint8 [H, W, 3] of any picture; what is transparent shows the colour that is stored there."""
    picture = read(path)
    colours = picture.pixels[:, :, : picture.colours]
    if picture.white > 255:
        colours = (colours // 257).astype(np.uint8)
    return np.repeat(colours, 3, 2) if picture.colours == 1 else np.ascontiguousarray(colours)


def read_hole(path: Path, mark: str, option: str, size: tuple[int, int] | None = None) -> Mask:
    """[H, W], true in the hole, of a mask picture in which marks stand for the "hole" or what is "valid".

    Marked is what is drawn: every colour but black, and nothing where the picture is transparent. In JPEG and WebP
    files, where black is blurred, it is what is brighter than half of white.

    Args:
        path: the mask picture.
        mark: "hole" or "valid".
        option: the command-line option that tells ``mark``, for messages.
        size: (width, height) the mask must have; None for any.

    Raises:
        InputError: the mask has another size, or nothing or everything is hole.
    """
    mask = read(path)
    height, width = mask.pixels.shape[:2]
    if size not in (None, (width, height)):
        wanted = "{}x{}".format(*size)
        raise InputError(
            f"the mask {path} is {width}x{height}, the picture {wanted}: "
            f"draw the mask at {wanted}, or scale it to that"
        )
    brightest = mask.pixels[:, :, : mask.colours].max(2)
    marked = brightest > (mask.white // 2 if mask.lossy else 0)
    if mask.clear:
        marked &= mask.pixels[:, :, -1] > 0
    hole: Mask = marked == (mark == "hole")
    if hole.all() or not hole.any():
        other = "valid" if mark == "hole" else "hole"
        raise InputError(
            f"the mask {path} marks {'every pixel' if hole.all() else 'no pixel'} as hole, where what is marked is "
            f"{mark}; draw another one, or say {option} {other}"
        )
    return hole


def png(picture: Stored) -> bytes:
    """The content of a PNG file."""
    pixels, profile = picture.pixels, picture.profile
    if picture.white > 255 and pixels.shape[2] > 1:
        return _deep_png(pixels, profile)
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(
        buffer, format="png", icc_profile=profile
    )
    return buffer.getvalue()


def _deep_png(pixels: NDArray[np.uint16], profile: bytes | None) -> bytes:
    """Colours of 16 bits, which Pillow does not write."""
    height, width, channels = pixels.shape
    rows = np.ascontiguousarray(pixels, ">u2").view(np.uint8).reshape(height, -1)
    # Filter 2: every row but for the one above it.
    filtered = np.full((height, rows.shape[1] + 1), 2, np.uint8)
    filtered[0, 1:], filtered[1:, 1:] = rows[0], rows[1:] - rows[:-1]
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0))]
    if profile:
        chunks.append((b"iCCP", b"ICC profile\0\0" + zlib.compress(profile)))
    chunks += [(b"IDAT", zlib.compress(filtered.tobytes())), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
