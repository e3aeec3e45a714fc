"""PNG files of 16 bits and of damaged metadata, written and read by zlib alone."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Colour type by number of channels.
KINDS = {1: 0, 2: 4, 3: 2, 4: 6}
# (first column, first row, step across, step down) of the seven passes of an interlaced file.
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def deep_pixels(height: int, width: int, channels: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).integers(0, 65536, (height, width, channels)).astype(np.uint16)


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _paeth(before: int, above: int, corner: int) -> int:
    guess = before + above - corner
    return min((before, above, corner), key=lambda value: abs(guess - value))


def _neighbours(rows: list[list[int]], y: int, x: int, step: int) -> tuple[int, int, int]:
    before = rows[y][x - step] if x >= step else 0
    above = rows[y - 1][x] if y else 0
    return before, above, rows[y - 1][x - step] if y and x >= step else 0


def _predicted(filter_type: int, before: int, above: int, corner: int) -> int:
    return (0, before, above, (before + above) // 2, _paeth(before, above, corner))[filter_type]


def _lines(pixels: Array, step: int) -> bytes:
    """Rows with their filters, which take turns; `step` bytes a pixel."""
    if not pixels.size:
        return b""
    rows = np.ascontiguousarray(pixels, ">u2").view(np.uint8).reshape(len(pixels), -1).tolist()
    lines = b""
    for y, row in enumerate(rows):
        kind = (4, 1, 3, 2, 0)[y % 5]
        parts = [(v - _predicted(kind, *_neighbours(rows, y, x, step))) % 256 for x, v in enumerate(row)]
        lines += bytes([kind, *parts])
    return lines


def write_deep_png(path: Path, pixels: Array, *chunks: bytes, interlaced: bool = False) -> None:
    """uint16 [H, W, 1 to 4] as a PNG file of 16 bits with further `chunks` before the pixels."""
    height, width, channels = pixels.shape
    step = 2 * channels
    parts = [pixels[y::down, x::across] for x, y, across, down in ADAM7] if interlaced else [pixels]
    content = b"".join(_lines(part, step) for part in parts)
    header = struct.pack(">IIBBBBB", width, height, 16, KINDS[channels], 0, 0, interlaced)
    ends = chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")
    path.write_bytes(SIGNATURE + chunk(b"IHDR", header) + b"".join(chunks) + ends)


def read_png(path: Path) -> tuple[Array, dict[bytes, bytes]]:
    """Pixels [H, W, C] of a plain PNG file of 8 or 16 bits, and its chunks."""
    content, chunks, at = path.read_bytes(), {}, 8
    assert content.startswith(SIGNATURE)
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, inside = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert struct.unpack(">I", content[at + 8 + length : at + 12 + length]) == (
            zlib.crc32(kind + inside),
        )
        chunks[kind] = chunks.get(kind, b"") + inside
        at += 12 + length
    width, height, bits, kind_of_colour, _, _, interlaced = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert bits in (8, 16) and not interlaced
    channels = {colour: number for number, colour in KINDS.items()}[kind_of_colour]
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1).tolist()
    step = channels * bits // 8
    rows: list[list[int]] = [[0] * (len(line) - 1) for line in lines]
    for y, (filter_type, *line) in enumerate(lines):
        for x, value in enumerate(line):
            rows[y][x] = (value + _predicted(filter_type, *_neighbours(rows, y, x, step))) % 256
    found = np.array(rows, np.uint8).view(">u2" if bits == 16 else np.uint8)
    return found.reshape(height, width, channels).astype(np.uint16 if bits == 16 else np.uint8), chunks
