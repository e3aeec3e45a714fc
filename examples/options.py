"""Command-line options of the training example, and the settings a run has from them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from losses import HOLE_WEIGHT
from model import PartialConvUNet

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZE_STEP = 2**PartialConvUNet.DEPTH


@dataclass(frozen=True)
class Settings:
    steps: int
    batch: int
    size: int
    lr: float
    seed: int
    width: int
    amp: str
    normalize: str
    save_every: int
    data: str
    perceptual: float = 0.0
    style: float = 0.0
    chunk: int | None = None
    trunk: str = "none"
    layer: str = "ik"

    @property
    def formula(self) -> str:
        """The total loss in words."""
        parts = [f"{HOLE_WEIGHT:g} hole", "valid"]
        for name, weight in (("perceptual", self.perceptual), ("style", self.style)):
            parts += [f"{weight:g} {name}"] if weight else []
        return " + ".join(parts)

    @property
    def architecture(self) -> dict[str, Any]:
        return {"network": "PartialConvUNet", "width": self.width}


def number(convert: Callable[[str], Any], least: float) -> Callable[[str], Any]:
    """A converter for argparse that also refuses what is below ``least``."""

    def check(text: str) -> Any:
        value = convert(text)
        if not value >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least:g}, got {text}")
        return value

    check.__name__ = convert.__name__
    return check


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Train an inpainting network with the fused losses, then repeat the steps with eager formulas."
    )
    add = parser.add_argument
    add("--images", type=Path, metavar="DIR", help="photographs to train on (default: those in scikit-image)")
    add(
        "--masks",
        type=Path,
        metavar="DIR",
        help="mask pictures, square, at least --size wide (default: brush strokes)",
    )
    add(
        "--mask-files-mark",
        choices=("hole", "valid"),
        default="hole",
        help="what white (>= 128) stands for in mask files (default: hole)",
    )
    add(
        "--out",
        type=Path,
        default=Path("runs/demo"),
        metavar="DIR",
        help="where results go (default: %(default)s)",
    )
    add(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="go on from this checkpoint (default: the newest in --out), with the other options unchanged",
    )
    add(
        "--steps",
        type=number(int, 1),
        default=400,
        help="total steps, resumed ones included (default: %(default)s)",
    )
    add("--batch", type=number(int, 1), default=8, help="crops per step and process (default: %(default)s)")
    add(
        "--size",
        type=number(int, SIZE_STEP),
        default=128,
        help=f"crop size, a multiple of {SIZE_STEP} (default: %(default)s)",
    )
    add("--width", type=number(int, 2), default=24, help="channels of the first level (default: %(default)s)")
    add("--lr", type=number(float, 0), default=4e-3, help="peak learning rate (default: %(default)s)")
    add("--seed", type=number(int, 0), default=0, help="(default: %(default)s)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add(
        "--amp",
        choices=tuple(AMP_DTYPES),
        default="off",
        help="mixed precision; fp16 scales the loss (default: off)",
    )
    add(
        "--normalize",
        choices=("image", "mask"),
        default="image",
        help="divide losses by the image or by each region",
    )
    add(
        "--perceptual",
        type=number(float, 0),
        default=0.0,
        metavar="WEIGHT",
        help="of the distance of VGG16 features, 0.05 in the partial-convolution paper (default: none)",
    )
    add(
        "--style",
        type=number(float, 0),
        default=0.0,
        metavar="WEIGHT",
        help="of the distance of their Gram matrices, 120 in the paper (default: none)",
    )
    add(
        "--trunk-weights",
        metavar="FILE",
        help="VGG16 state dict with torchvision's keys, or 'default' to download it (default: random values)",
    )
    add(
        "--chunk",
        type=number(int, 1),
        metavar="SAMPLES",
        help="stream the trunk so many samples at a time, to save memory (default: all at once)",
    )
    add(
        "--backend",
        choices=("reference", "cpu", "triton", "cuda"),
        help="of the fused pixel loss (default: by device; INPAINT_KERNELS_BACKEND sets it for every loss)",
    )
    add(
        "--layer",
        choices=("ik", "reference"),
        default="ik",
        help="the partial convolutions: this package's kernels, or its formulas in plain PyTorch (default: ik)",
    )
    add("--save-every", type=number(int, 1), default=50, metavar="STEPS", help="(default: %(default)s)")
    add("--no-compare", action="store_true", help="do not repeat the steps with the eager formulas")
    args = parser.parse_args(argv)
    if args.size % SIZE_STEP:
        parser.error(f"argument --size: must be a multiple of {SIZE_STEP}, got {args.size}")
    for name, value in (("--trunk-weights", args.trunk_weights), ("--chunk", args.chunk)):
        if value is not None and not args.perceptual and not args.style:
            parser.error(f"argument {name}: only with --perceptual or --style")
    return args
