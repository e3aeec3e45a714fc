"""PNG files of 16 bits and of damaged metadata, written by zlib alone."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
# Colour type by number of channels.
COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
# (first column, first row, step across, step down) of the seven passes of an interlaced file.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def deep_pixels(height: int, width: int, channels: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 65536, (height, width, channels)).astype(np.uint16)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _lines(pixels: Array) -> bytes:
    """Rows of big-endian values, each behind the 0 that means no filter."""
    if not pixels.size:
        return b""
    rows = np.ascontiguousarray(pixels, ">u2").view(np.uint8).reshape(len(pixels), -1)
    return np.pad(rows, ((0, 0), (1, 0))).tobytes()


def write_deep_png(path: Path, pixels: Array, *chunks: bytes, interlaced: bool = False) -> None:
    """uint16 [H, W, 1 to 4] as a PNG file of 16 bits with further `chunks` before the pixels."""
    height, width, channels = pixels.shape
    parts = [pixels[y::down, x::across] for x, y, across, down in ADAM7] if interlaced else [pixels]
    content = zlib.compress(b"".join(map(_lines, parts)))
    header = struct.pack(">IIBBBBB", width, height, 16, COLOUR_TYPES[channels], 0, 0, interlaced)
    written = [chunk(b"IHDR", header), *chunks, chunk(b"IDAT", content), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(written))
