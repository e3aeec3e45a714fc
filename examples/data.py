"""Pictures and masks for the training example.

Every sample is a pure function of (seed, step, index): two runs with the same seed see the same
batches, a resumed run continues the data order exactly, and each DDP process draws its own shard of
the same global batch. Pictures are float32 in [0, 1]; masks are 1 where a pixel is known, 0 in the hole.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

Pixels = NDArray[np.uint8]
MaskMaker = Callable[[np.random.Generator], Pixels]

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}

# Photographs inside the scikit-image wheel; its other pictures are drawings, or fetched on demand.
SHIPPED_TRAINING = (
    *("astronaut.png", "rocket.jpg", "motorcycle_left.png", "camera.png", "coins.png"),
    *("brick.png", "grass.png", "gravel.png", "moon.png"),
)
SHIPPED_HELD_OUT = ("chelsea.png", "coffee.png")

HELD_OUT_SHARE = 0.1
# Up to this many pixels are decoded once and kept; larger collections are decoded sample by sample.
KEEP_PIXELS = 200_000_000
TRAINING_DRAW, HELD_OUT_DRAW = 0, 1


class InputError(Exception):
    """Something the user gave cannot be used; the message is one line and says what to do."""


class Batch:
    """Pictures [N, 3, S, S] in [0, 1], masks [N, 1, S, S] (1 = known) and the name of each picture."""

    def __init__(self, images: torch.Tensor, masks: torch.Tensor, names: list[str]) -> None:
        self.images, self.masks, self.names = images, masks, names

    def to(self, device: torch.device) -> Batch:
        if device.type == "cuda":
            self.images, self.masks = self.images.pin_memory(), self.masks.pin_memory()
        images = self.images.to(device, non_blocking=True)
        return Batch(images, self.masks.to(device, non_blocking=True), self.names)


def list_pictures(folder: Path, what: str) -> list[Path]:
    """All picture files under ``folder``, sorted."""
    if not folder.is_dir():
        raise InputError(f"{what}: the folder {folder} does not exist")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not paths:
        raise InputError(f"{what}: no pictures ({', '.join(sorted(SUFFIXES))}) in {folder}")
    return paths


def picture_size(path: Path) -> tuple[int, int]:
    """(width, height) from the header alone."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            return int(width), int(height)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the picture {path}: {_first_line(error)}") from error


def read_picture(path: Path) -> Pixels:
    """An RGB picture as uint8 [H, W, 3]."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # PIL clips 16-bit values to 255 instead of scaling them
                gray = (np.asarray(upright) // 257).astype(np.uint8)
                return np.repeat(gray[:, :, None], 3, axis=2)
            if upright.mode in ("I", "F"):
                raise InputError(f"cannot use the picture {path}: mode {upright.mode}, expected 8 or 16 bits")
            return np.array(upright.convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"cannot read the picture {path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class Picture:
    """One photograph, or the part of it given by ``columns``, available at full and at half size."""

    def __init__(self, path: Path, size: int, columns: tuple[float, float] = (0.0, 1.0)) -> None:
        self.path, self.size, self.columns = path, size, columns
        self.name = path.stem
        self._kept: list[Pixels] | None = None

    def keep(self) -> None:
        self._kept = self.levels()

    def levels(self) -> list[Pixels]:
        if self._kept is not None:
            return self._kept
        pixels = read_picture(self.path)
        width = pixels.shape[1]
        pixels = pixels[:, int(width * self.columns[0]) : max(1, int(width * self.columns[1]))]
        image = Image.fromarray(pixels)
        shorter = min(image.size)
        if shorter < self.size:
            scale = self.size / shorter
            image = image.resize((math.ceil(image.width * scale), math.ceil(image.height * scale)))
        levels = [np.array(image)]
        if min(image.size) >= 2 * self.size:
            levels.append(np.array(image.reduce(2)))
        return levels

    def crop(self, rng: np.random.Generator, vary: bool) -> Pixels:
        """A random crop [S, S, 3] from a random level; ``vary`` mirrors it and swaps its colours at random."""
        levels = self.levels()
        pixels = levels[int(rng.integers(len(levels)))]
        top = int(rng.integers(pixels.shape[0] - self.size + 1))
        left = int(rng.integers(pixels.shape[1] - self.size + 1))
        crop = pixels[top : top + self.size, left : left + self.size]
        if vary:
            # Few pictures have few colours: without swaps, holes in others are filled with those.
            crop = crop[:, :: int(rng.choice((-1, 1))), rng.permutation(3)]
        return crop


@dataclass(frozen=True)
class Photographs:
    """Training pictures and held-out pictures; no crop of a held-out picture is ever trained on."""

    training: Sequence[Picture]
    held_out: Sequence[Picture]
    source: str

    @property
    def held_out_by(self) -> str:
        return "region" if any(p.columns != (0.0, 1.0) for p in self.held_out) else "picture"


def load_photographs(folder: Path | None, size: int) -> Photographs:
    """The photographs in ``folder``, or those shipped with scikit-image, split into training and held out.

    Of a folder, every tenth picture (at least one) is held out; of a single picture, its right quarter.
    """
    if folder is None:
        training, held_out = _shipped(size)
        source = "scikit-image"
    else:
        paths = list_pictures(folder, "--images")
        source = str(folder)
        if len(paths) == 1:
            training = [Picture(paths[0], size, (0.0, 0.75))]
            held_out = [Picture(paths[0], size, (0.75, 1.0))]
        else:
            step = min(len(paths), round(1 / HELD_OUT_SHARE))
            held_out = [Picture(path, size) for path in paths[step - 1 :: step]]
            chosen = {picture.path for picture in held_out}
            training = [Picture(path, size) for path in paths if path not in chosen]
    pictures = [*training, *held_out]
    if sum(math.prod(picture_size(picture.path)) for picture in pictures) <= KEEP_PIXELS:
        for picture in pictures:
            picture.keep()
    return Photographs(training, held_out, source)


def _shipped(size: int) -> tuple[list[Picture], list[Picture]]:
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise InputError(
            "no scikit-image, whose photographs are the default: pip install it, or use --images DIR"
        )
    folder = Path(spec.origin).parent / "data"
    training = [Picture(folder / name, size) for name in SHIPPED_TRAINING if (folder / name).is_file()]
    held_out = [Picture(folder / name, size) for name in SHIPPED_HELD_OUT if (folder / name).is_file()]
    if not training or not held_out:
        raise InputError(f"this scikit-image ships no photographs in {folder}: use --images DIR")
    return training, held_out


def brush_mask(rng: np.random.Generator, size: int) -> Pixels:
    """Free-form strokes that cover 15 to 45 % of the square; uint8 [S, S], 1 = known."""
    hole = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(hole)
    least = rng.uniform(0.15, 0.3)
    while True:
        before = hole.copy()
        _draw_stroke(draw, rng, size)
        covered = float(np.asarray(hole).mean())
        if covered > 0.45:
            hole, covered = before, float(np.asarray(before).mean())
            draw = ImageDraw.Draw(hole)
        if covered >= least:
            return 1 - np.asarray(hole)


def _draw_stroke(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int) -> None:
    width = max(2, round(size * rng.uniform(0.05, 0.12)))
    x, y = (float(value) for value in rng.uniform(0, size, 2))
    heading = rng.uniform(0, 2 * math.pi)
    dots = [(x, y)]
    for _ in range(int(rng.integers(3, 9))):
        heading += rng.uniform(-1.2, 1.2)
        length = size * rng.uniform(0.08, 0.25)
        x = min(max(x + length * math.cos(heading), 0.0), size - 1.0)
        y = min(max(y + length * math.sin(heading), 0.0), size - 1.0)
        draw.line((*dots[-1], x, y), fill=1, width=width)
        dots.append((x, y))
    for x, y in dots:
        draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=1)


class MaskFiles:
    """Masks from a folder; ``mark`` says whether white (value >= 128) marks the hole or the known pixels.

    A file of exactly the training size is used as it is and a larger square one is scaled down
    (nearest neighbour); everything else is refused. Masks are flipped and turned at random.
    """

    def __init__(self, folder: Path, size: int, mark: str) -> None:
        self.paths = list_pictures(folder, "--masks")
        self.size, self.white_is_hole = size, mark == "hole"
        for path in self.paths:
            width, height = picture_size(path)
            if width != height or width < size:
                raise InputError(
                    f"the mask {path} is {width}x{height}; masks must be square and at least --size {size} wide"
                )

    def __call__(self, rng: np.random.Generator) -> Pixels:
        path = self.paths[int(rng.integers(len(self.paths)))]
        white = read_picture(path).max(axis=2) >= 128
        if white.shape[0] != self.size:
            rows = (np.arange(self.size) * white.shape[0]) // self.size
            white = white[np.ix_(rows, rows)]
        white = np.rot90(white, int(rng.integers(4)))
        if rng.integers(2):
            white = white[:, ::-1]
        known: Pixels = (white != self.white_is_hole).astype(np.uint8)
        return known


class Sampler:
    """Draws batches: ``training(step)`` and a fixed ``held_out(count)``."""

    def __init__(
        self, photographs: Photographs, masks: MaskMaker, *, seed: int, batch: int, rank: int = 0
    ) -> None:
        self.photographs, self.masks = photographs, masks
        self.seed, self.batch, self.rank = seed, batch, rank

    def training(self, step: int) -> Batch:
        first = self.rank * self.batch
        pictures = self.photographs.training
        return self._draw(pictures, [(TRAINING_DRAW, step, first + i) for i in range(self.batch)])

    def held_out(self, count: int) -> Batch:
        """The same ``count`` crops and masks on every call, the pictures taking turns."""
        return self._draw(
            self.photographs.held_out, [(HELD_OUT_DRAW, 0, i) for i in range(count)], in_turn=True
        )

    def seen(self, count: int) -> Batch:
        """Like ``held_out`` but from the training pictures, for the picture grid."""
        return self._draw(
            self.photographs.training, [(HELD_OUT_DRAW, 1, i) for i in range(count)], in_turn=True
        )

    def _draw(
        self, pictures: Sequence[Picture], keys: list[tuple[int, int, int]], in_turn: bool = False
    ) -> Batch:
        images, masks, names = [], [], []
        for key in keys:
            rng = np.random.default_rng([self.seed, *key])
            picture = pictures[key[-1] % len(pictures) if in_turn else int(rng.integers(len(pictures)))]
            images.append(picture.crop(rng, vary=not in_turn))
            masks.append(self.masks(rng))
            names.append(picture.name)
        # Already contiguous as NCHW: a transposed view would reach the network as channels_last.
        pixels = torch.from_numpy(np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)))
        known = torch.from_numpy(np.stack(masks))[:, None].float()
        return Batch(pixels.float() / 255, known, names)
