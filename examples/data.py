"""Pictures and masks for the training example.

Every sample is a pure function of (seed, step, index): two runs with the same seed see the same
batches, a resumed run continues the data order exactly, and each DDP process draws its own shard of
the same global batch. Pictures are float32 in [0, 1]; masks are 1 where a pixel is known, 0 in the hole.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from errors import InputError
from pictures import Mask, Pixels, list_pictures, note, picture_size, read_hole, read_rgb
from PIL import Image, ImageDraw

MaskMaker = Callable[[np.random.Generator], Pixels]

# Photographs inside the wheels of scikit-image and matplotlib. The former's other pictures are drawings, fetched on
# demand, or textures such as grass, in whose holes there is nothing to learn but noise.
SHIPPED_TRAINING = (
    *(
        "astronaut.png",
        "rocket.jpg",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "camera.png",
        "coins.png",
    ),
    *("hubble_deep_field.jpg", "grace_hopper.jpg"),
)
SHIPPED_HELD_OUT = ("chelsea.png", "coffee.png")
SHIPPED_IN = {"skimage": "data", "matplotlib": "mpl-data/sample_data"}

HELD_OUT_SHARE = 0.1
# So many pixels of a collection are decoded once and kept; the rest is decoded sample by sample.
KEEP_PIXELS = 200_000_000
TRAINING_DRAW, HELD_OUT_DRAW = 0, 1


class Batch:
    """Pictures [N, 3, S, S] in [0, 1], masks [N, 1, S, S] (1 = known) and the name of each picture."""

    def __init__(self, images: torch.Tensor, masks: torch.Tensor, names: list[str]) -> None:
        self.images, self.masks, self.names = images, masks, names

    def to(self, device: torch.device) -> Batch:
        if device.type == "cuda":
            self.images, self.masks = self.images.pin_memory(), self.masks.pin_memory()
        images = self.images.to(device, non_blocking=True)
        return Batch(images, self.masks.to(device, non_blocking=True), self.names)


class Picture:
    """One photograph, or the part of it given by ``columns``, available at full and at half size."""

    def __init__(self, path: Path, size: int, columns: tuple[float, float] = (0.0, 1.0)) -> None:
        self.path, self.size, self.columns = path, size, columns
        self.name = path.stem
        self._kept: list[Pixels] | None = None

    def keep(self) -> None:
        self._kept = self.levels()

    def split(self, at: float) -> list[Picture]:
        """The parts of a whole picture on both sides of a column."""
        parts = [Picture(self.path, self.size, columns) for columns in ((0.0, at), (at, 1.0))]
        if self._kept is not None:
            for part in parts:
                part.keep()
        return parts

    def levels(self) -> list[Pixels]:
        if self._kept is not None:
            return self._kept
        pixels = read_rgb(self.path)
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
        """A random crop [S, S, 3] from a random level; ``vary`` turns, mirrors and recolours it at random."""
        levels = self.levels()
        pixels = levels[int(rng.integers(len(levels)))]
        top = int(rng.integers(pixels.shape[0] - self.size + 1))
        left = int(rng.integers(pixels.shape[1] - self.size + 1))
        crop = pixels[top : top + self.size, left : left + self.size]
        if vary:
            # Few pictures have few colours: without swaps, holes in others are filled with those.
            crop = np.rot90(crop, int(rng.integers(4)))
            crop = crop[:, :: int(rng.choice((-1, 1))), rng.permutation(3)]
        return crop


@dataclass(frozen=True)
class Photographs:
    """Training pictures and held-out pictures; no crop of a held-out picture is ever trained on."""

    training: Sequence[Picture]
    held_out: Sequence[Picture]
    source: str
    # Files that could not be read, and why.
    skipped: dict[Path, InputError] = field(default_factory=dict)

    @property
    def held_out_by(self) -> str:
        return "region" if any(p.columns != (0.0, 1.0) for p in self.held_out) else "picture"

    def skip(self, path: Path, error: InputError) -> None:
        if path not in self.skipped:
            self.skipped[path] = error
            note(f"{error}; skipped, {len(self.skipped)} so far")


def load_photographs(folder: Path | None, size: int) -> Photographs:
    """The photographs in ``folder``, or those of ``SHIPPED_IN``, split into training and held out.

    Of a folder, every tenth picture (at least one) is held out; of a single picture, its right quarter. Files that
    cannot be read are left out.
    """
    if folder is None:
        return _shipped(size)
    pictures: list[Picture] = []
    skipped: dict[Path, InputError] = {}
    pixels = 0
    for path in list_pictures(folder, "--images"):
        picture = Picture(path, size)
        try:
            pixels += math.prod(picture_size(path))
            if pixels <= KEEP_PIXELS:
                picture.keep()
            pictures.append(picture)
        except InputError as error:
            skipped[path] = error
    if not pictures:
        raise next(iter(skipped.values()))
    if len(pictures) == 1:
        left, right = pictures[0].split(0.75)
        photographs = Photographs([left], [right], str(folder))
    else:
        step = min(len(pictures), round(1 / HELD_OUT_SHARE))
        training = [picture for i, picture in enumerate(pictures) if i % step != step - 1]
        photographs = Photographs(training, pictures[step - 1 :: step], str(folder))
    for path, why in skipped.items():
        photographs.skip(path, why)
    return photographs


def _shipped(size: int) -> Photographs:
    folders = []
    for package, folder in SHIPPED_IN.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise InputError(
                f"no {package}, whose photographs are the default: pip install '.[demo]', or use --images DIR"
            )
        folders.append(Path(spec.origin).parent / folder)

    def found(names: Sequence[str]) -> list[Picture]:
        paths = [folder / name for name in names for folder in folders]
        return [Picture(path, size) for path in paths if path.is_file()]

    training, held_out = found(SHIPPED_TRAINING), found(SHIPPED_HELD_OUT)
    if not training or not held_out:
        raise InputError(f"no photographs in {' and '.join(map(str, folders))}: use --images DIR")
    for picture in (*training, *held_out):
        picture.keep()
    return Photographs(training, held_out, "scikit-image and matplotlib")


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
    """Masks from a folder; ``mark`` says whether what is drawn there marks the "hole" or what is "valid".

    What counts as drawn is told by `pictures.read_hole`. A larger mask, of any proportions, is scaled to the square
    of the training size; a pixel there is hole if any that it covers is, so that thin holes stay. Masks are flipped
    and turned at random.
    """

    def __init__(self, folder: Path, size: int, mark: str) -> None:
        self.paths = list_pictures(folder, "--masks")
        self.size, self.mark = size, mark
        self._kept: dict[Path, Mask] = {}
        pixels = 0
        for path in self.paths:
            width, height = picture_size(path)
            if min(width, height) < size:
                raise InputError(
                    f"the mask {path} is {width}x{height}; masks must be at least --size {size} wide and high"
                )
            pixels += width * height
            # The rest of a large collection is looked at when it is drawn.
            if pixels <= KEEP_PIXELS:
                self._kept[path] = self._hole(path)

    def _hole(self, path: Path) -> Mask:
        import inpaint_kernels as ik

        hole = torch.from_numpy(read_hole(path, self.mark, "--mask-files-mark"))
        scaled: Mask = ik.resize_mask(hole, self.size, "adaptive_max").numpy()
        if scaled.all():
            raise InputError(
                f"the holes of the mask {path} cover every pixel at --size {self.size}; draw another one, or train "
                "at a larger size"
            )
        return scaled

    def __call__(self, rng: np.random.Generator) -> Pixels:
        path = self.paths[int(rng.integers(len(self.paths)))]
        hole = self._kept[path] if path in self._kept else self._hole(path)
        hole = np.rot90(hole, int(rng.integers(4)))
        if rng.integers(2):
            hole = hole[:, ::-1]
        known: Pixels = (~hole).astype(np.uint8)
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
            place = key[-1] % len(pictures) if in_turn else int(rng.integers(len(pictures)))
            picture, crop = self._crop(pictures, place, rng, vary=not in_turn)
            images.append(crop)
            masks.append(self.masks(rng))
            names.append(picture.name)
        # Already contiguous as NCHW: a transposed view would reach the network as channels_last.
        pixels = torch.from_numpy(np.ascontiguousarray(np.stack(images).transpose(0, 3, 1, 2)))
        known = torch.from_numpy(np.stack(masks))[:, None].float()
        return Batch(pixels.float() / 255, known, names)

    def _crop(
        self, pictures: Sequence[Picture], place: int, rng: np.random.Generator, vary: bool
    ) -> tuple[Picture, Pixels]:
        """Of the first picture from ``place`` on that can be read: files may break during training."""
        for turn in range(len(pictures)):
            picture = pictures[(place + turn) % len(pictures)]
            try:
                return picture, picture.crop(rng, vary)
            except InputError as error:
                self.photographs.skip(picture.path, error)
        raise InputError(f"no picture is left that can be read; {self.photographs.skipped[picture.path]}")
