"""Fills the holes of a picture with a network trained by train.py.

    python examples/inpaint.py photo.jpg mask.png runs/demo                         # writes photo-filled.png
    python examples/inpaint.py photo.jpg mask.png runs/demo/checkpoint.pt --output repaired.png
    python examples/inpaint.py photo.jpg mask.png runs/demo --mask-is valid         # white = known

The mask is a picture of the same size: white (>= 128 in any channel) marks the holes, as in the mask files of
train.py, or with ``--mask-is valid`` the known pixels. Pictures may have any size, be gray or coloured, with 8 or 16
bits and with transparency; known pixels come out as they went in, filled ones are opaque.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import checkpoint
import numpy as np
import torch
import torch.nn.functional as F
from data import InputError
from model import PartialConvUNet
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

SIZE_STEP = 2**PartialConvUNet.DEPTH


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fill the holes of a picture with a trained network.")
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="the picture, of any size")
    add("mask", type=Path, metavar="MASK", help="a picture of the same size: white where IMAGE has holes")
    add(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="what train.py wrote: a checkpoint, or the folder with the newest one",
    )
    add(
        "--output",
        type=Path,
        metavar="OUT.png",
        help="PNG, which keeps known pixels as they are (default: NAME-filled.png beside IMAGE)",
    )
    add(
        "--mask-is",
        choices=("hole", "valid"),
        default="hole",
        help="what white (>= 128) stands for in MASK (default: hole)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    args.output = args.output or args.image.with_name(f"{args.image.stem}-filled.png")
    if args.output.suffix.lower() != ".png":
        parser.error(f"argument --output: must end in .png, got {args.output}")
    return args


class Picture:
    """A picture to fill: 8 or 16 bits; one gray or three colour channels, and one of transparency if it has that."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"there is no picture {path}")
        try:
            with Image.open(path) as image:
                upright = ImageOps.exif_transpose(image)
        # Pillow reports some damaged PNG files as a SyntaxError.
        except (
            UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError
        ) as error:  # fmt: skip
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"cannot read the picture {path}: {reason}") from error
        mode, info = upright.mode, upright.info
        if mode in ("I", "F"):
            raise InputError(f"cannot use the picture {path}: mode {mode}, expected 8 or 16 bits")
        if not mode.startswith("I;16"):
            clear = mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in info
            upright = upright.convert(("L" if mode in ("1", "L", "LA", "La") else "RGB") + "A" * clear)
        self.profile = None if mode in ("CMYK", "LAB", "YCbCr", "HSV") else info.get("icc_profile")
        pixels = np.array(upright)
        self.pixels: NDArray[Any] = pixels if pixels.ndim == 3 else pixels[:, :, None]
        self.colours = 1 if self.pixels.shape[2] < 3 else 3

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.pixels.shape[1], self.pixels.shape[0]

    @property
    def white(self) -> int:
        return int(np.iinfo(self.pixels.dtype).max)

    def image(self) -> Tensor:
        """[1, 3, H, W] in [0, 1], gray pictures with three equal channels."""
        colours = self.pixels[:, :, : self.colours].astype(np.float32) / self.white
        return torch.from_numpy(colours).permute(2, 0, 1)[None].expand(1, 3, -1, -1).contiguous()

    def fill(self, hole: NDArray[np.bool_], filled: Tensor) -> None:
        """Puts pixels of ``filled`` [1, 3, H, W] into the hole [H, W], and nothing anywhere else."""
        if self.colours == 1:
            filled = filled.mean(1, keepdim=True)
        values = (filled[0].permute(1, 2, 0).numpy() * self.white).round().astype(self.pixels.dtype)
        self.pixels[:, :, : self.colours][hole] = values[hole]
        self.pixels[:, :, self.colours :][hole] = self.white

    def png(self) -> bytes:
        buffer = io.BytesIO()
        pixels = self.pixels[:, :, 0] if self.pixels.shape[2] == 1 else self.pixels
        Image.fromarray(pixels).save(buffer, format="png", icc_profile=self.profile)
        return buffer.getvalue()


def read_hole(path: Path, mark: str, size: tuple[int, int]) -> NDArray[np.bool_]:
    """[H, W], true in the hole; ``mark`` says whether white is "hole" or "valid"."""
    mask = Picture(path)
    if mask.size != size:
        (width, height), wanted = mask.size, f"{size[0]}x{size[1]}"
        raise InputError(
            f"the mask {path} is {width}x{height}, the picture {wanted}: "
            f"draw the mask at {wanted}, or scale it to that"
        )
    white = mask.pixels[:, :, : mask.colours].max(axis=2) > mask.white // 2
    hole: NDArray[np.bool_] = white == (mark == "hole")
    other = "valid" if mark == "hole" else "hole"
    if not hole.any() or hole.all():
        raise InputError(
            f"the mask {path} marks {'every pixel' if hole.all() else 'no pixel'} as hole, where white stands for "
            f"{mark}; draw another one, or say --mask-is {other}"
        )
    return hole


def load_network(path: Path, device: torch.device) -> tuple[PartialConvUNet, int]:
    """The network of a checkpoint, and the step it was trained to."""
    state = checkpoint.read(path)
    try:
        net = PartialConvUNet(int(state["architecture"]["width"]))
        net.load_state_dict(state["model"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} does not hold a network of train.py: {reason}") from error
    return net.to(device).eval(), int(state["step"])


@torch.no_grad()
def fill(net: PartialConvUNet, image: Tensor, known: Tensor) -> Tensor:
    """The network's picture [1, 3, H, W] in [0, 1] for an image and a mask [1, 1, H, W] (1 = known) of any size."""
    height, width = image.shape[2:]
    # What is added counts as hole, like everything outside a picture.
    around = (0, -width % SIZE_STEP, 0, -height % SIZE_STEP)
    output = net(F.pad(image, around), F.pad(known, around))
    filled: Tensor = output[:, :, :height, :width].float().clamp(0, 1)
    return filled


def run(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if not args.output.parent.is_dir():
        raise InputError(f"--output: there is no folder {args.output.parent}")
    for path in (args.image, args.mask):
        if args.output.exists() and path.exists() and args.output.samefile(path):
            raise InputError(f"--output: {args.output} would replace {path}; choose another name")
    picture = Picture(args.image)
    hole = read_hole(args.mask, args.mask_is, picture.size)
    net, step = load_network(args.checkpoint, device)
    begin = time.perf_counter()
    known = torch.from_numpy(~hole)[None, None].float()
    filled = fill(net, picture.image().to(device), known.to(device)).cpu()
    if not bool(filled.isfinite().all()):
        raise InputError(
            f"the network in {args.checkpoint} gives values that are not finite; train another one"
        )
    picture.fill(hole, filled)
    seconds = time.perf_counter() - begin
    checkpoint.write_atomically(args.output, picture.png())
    width, height = picture.size
    print(
        f"filled {hole.sum():,} of {hole.size:,} pixels ({100 * hole.mean():.1f} %) of {width}x{height} with the "
        f"network of step {step}, {seconds:.1f} s on {device.type}"
    )
    print(f"written: {args.output}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 with one line on stderr."""
    try:
        run(parse(argv))
        return 0
    except ImportError as error:
        message = f"{error}; install the package with what the examples need: pip install '.[demo]'"
    except InputError as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "stopped, nothing was written"
    except (RuntimeError, MemoryError) as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not out_of_memory and "allocate memory" not in str(error).lower():
            raise
        message = "out of memory; scale the picture and its mask down"
    print(f"inpaint.py: error: {message}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
