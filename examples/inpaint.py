"""Fills the holes of a picture with a network trained by train.py.

    python examples/inpaint.py photo.jpg mask.png runs/demo                         # writes photo.jpg-filled.png
    python examples/inpaint.py photo.jpg mask.png runs/demo/checkpoint.pt --output repaired.png
    python examples/inpaint.py photo.jpg mask.png runs/demo --mask-is valid         # marks the known pixels

The mask is a picture of the same size, in which the holes are drawn, as in the mask files of train.py, or with
``--mask-is valid`` the known pixels. Every colour but black marks a pixel, also the 1 of a mask of 0 and 1; where the
mask is transparent nothing is marked. In JPEG and WebP files, which blur, what is brighter than half of white is.

Pictures may have any size, be gray or coloured and have transparency, with 8 bits, as PNG or TIFF also with 16; known
pixels come out as they went in, filled ones are opaque. Nothing is overwritten without ``--overwrite``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

try:
    import checkpoint
    import numpy as np
    import torch
    import torch.nn.functional as F
    from errors import InputError
    from model import PartialConvUNet
    from pictures import Mask, Stored, png, read, read_hole
    from torch import Tensor
except ModuleNotFoundError as error:
    print(
        f"inpaint.py: error: {error}; install what the examples need: pip install '.[demo]'", file=sys.stderr
    )
    sys.exit(2)

SIZE_STEP = 2**PartialConvUNet.DEPTH


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Fill the holes of a picture with a trained network.")
    add = parser.add_argument
    add("image", type=Path, metavar="IMAGE", help="the picture, of any size")
    add("mask", type=Path, metavar="MASK", help="a picture of the same size: not black where IMAGE has holes")
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
        help="PNG, which keeps known pixels as they are (default: IMAGE-filled.png)",
    )
    add("--overwrite", action="store_true", help="replace OUT.png if there is one")
    add(
        "--mask-is",
        choices=("hole", "valid"),
        default="hole",
        help="what the marks in MASK stand for (default: hole)",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    args.output = args.output or args.image.with_name(f"{args.image.name}-filled.png")
    if args.output.suffix.lower() != ".png":
        parser.error(f"argument --output: must end in .png, got {args.output}")
    return args


def as_image(picture: Stored) -> Tensor:
    """[1, 3, H, W] in [0, 1], gray pictures with three equal channels."""
    colours = picture.pixels[:, :, : picture.colours].astype(np.float32) / picture.white
    return torch.from_numpy(colours).permute(2, 0, 1)[None].expand(1, 3, -1, -1).contiguous()


def put_into(picture: Stored, hole: Mask, filled: Tensor) -> None:
    """Puts pixels of ``filled`` [1, 3, H, W] into the hole [H, W], and nothing anywhere else."""
    if picture.colours == 1:
        filled = filled.mean(1, keepdim=True)
    values = (filled[0].permute(1, 2, 0).numpy() * picture.white).round().astype(picture.pixels.dtype)
    picture.pixels[:, :, : picture.colours][hole] = values[hole]
    picture.pixels[:, :, picture.colours :][hole] = picture.white


def load_network(path: Path, device: torch.device) -> tuple[PartialConvUNet, int]:
    """The network of a checkpoint, and the step it was trained to."""
    state = checkpoint.read(path)
    try:
        if (kind := state["architecture"]["network"]) != PartialConvUNet.KIND:
            raise ValueError(
                f"it is a {kind}, of another version; train a {PartialConvUNet.KIND} with this one"
            )
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
    if args.output.is_file() and not args.overwrite:
        raise InputError(f"--output: {args.output} exists; choose another name, or say --overwrite")
    picture = read(args.image)
    height, width = picture.pixels.shape[:2]
    hole = read_hole(args.mask, args.mask_is, "--mask-is", (width, height))
    net, step = load_network(args.checkpoint, device)
    begin = time.perf_counter()
    known = torch.from_numpy(~hole)[None, None].float()
    filled = fill(net, as_image(picture).to(device), known.to(device)).cpu()
    if not bool(filled.isfinite().all()):
        raise InputError(
            f"the network in {args.checkpoint} gives values that are not finite; train another one"
        )
    put_into(picture, hole, filled)
    seconds = time.perf_counter() - begin
    checkpoint.write_atomically(args.output, png(picture))
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
