"""Command-line options of the training example, and the settings a run has from them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from losses import METHODS, PIXEL_WEIGHTS
from model import PartialConvUNet

AMP_DTYPES = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZE_STEP = 2**PartialConvUNet.DEPTH
# What a trunk works on then stays in the caches of a CPU.
CPU_CHUNK = 2
# What an option is where it is not given: with "pconv", with another published method, with "pixel". A step of a
# complete objective takes seconds where one of the pixel losses takes a fraction of one, almost all in the trunk.
DEFAULTS: dict[str, tuple[int | None, int | None, int | None]] = {
    "steps": (820, 160, 400),
    "pixel_steps": (800, 0, 0),
    "compare_steps": (10, 20, None),
    "batch": (4, 4, 8),
}


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
    objective: str = "pixel"
    tv: float = 0.0
    pixel_steps: int = 0

    @property
    def weights(self) -> dict[str, float]:
        """Of the terms of the total loss behind the first ``pixel_steps``, without those left out."""
        if self.objective != "pixel":
            return METHODS[self.objective].weights
        weights = {
            **PIXEL_WEIGHTS,
            "perceptual": self.perceptual,
            "style": self.style,
        }
        return {name: weight for name, weight in weights.items() if weight}

    def weights_at(self, step: int) -> dict[str, float]:
        """Of the terms of the total loss in the step that follows ``step`` others."""
        return PIXEL_WEIGHTS if step < self.pixel_steps else self.weights

    @property
    def all_weights(self) -> dict[str, float]:
        """Of every term that some step of a run has."""
        return self.weights_at(0) | self.weights

    @property
    def formula(self) -> str:
        """The total loss in words."""
        return in_words(self.weights)

    @property
    def architecture(self) -> dict[str, Any]:
        return {"network": PartialConvUNet.KIND, "width": self.width}


def weighed(name: str, weight: float) -> str:
    """A term in words."""
    return name if weight == 1 else f"{weight:g} {name}"


def in_words(weights: dict[str, float]) -> str:
    """A weighted sum of terms in words."""
    return " + ".join(weighed(name, weight) for name, weight in weights.items())


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
    add(
        "--objective",
        choices=(*METHODS, "pixel"),
        default="pconv",
        help="that of a published method, complete and with its discriminator, or errors in hole and known pixels "
        "alone (default: %(default)s)",
    )
    add("--images", type=Path, metavar="DIR", help="photographs to train on (default: those in scikit-image)")
    add(
        "--masks",
        type=Path,
        metavar="DIR",
        help="mask pictures, at least --size wide and high, scaled to a square; marked is what inpaint.py counts as "
        "marked (default: brush strokes)",
    )
    add(
        "--mask-files-mark",
        choices=("hole", "valid"),
        default="hole",
        help="what the marks in mask files stand for (default: hole)",
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
        help=f"total steps, resumed ones included (default: {_defaults('steps')})",
    )
    add(
        "--pixel-steps",
        type=number(int, 0),
        metavar="STEPS",
        help="of these, so many first ones with the loss of --objective pixel, which needs no trunk; the whole "
        f"objective comes after them (default: {_defaults('pixel_steps')}; all of pconv with a random trunk)",
    )
    add("--batch", type=number(int, 1), help=f"crops per step and process (default: {_defaults('batch')})")
    add(
        "--size",
        type=number(int, SIZE_STEP),
        default=128,
        help=f"crop size, a multiple of {SIZE_STEP} (default: %(default)s)",
    )
    add("--width", type=number(int, 2), default=24, help="channels of the first level (default: %(default)s)")
    add("--lr", type=number(float, 0), default=5e-4, help="peak learning rate (default: %(default)s)")
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
        help="divide the pixel losses by the image or by each region; with --objective pixel (default: image)",
    )
    add(
        "--perceptual",
        type=number(float, 0),
        metavar="WEIGHT",
        help="of the distance of VGG16 features, added to --objective pixel (default: none)",
    )
    add(
        "--style",
        type=number(float, 0),
        metavar="WEIGHT",
        help="of the distance of their Gram matrices, added to --objective pixel (default: none)",
    )
    add(
        "--trunk-weights",
        metavar="FILE",
        help="state dict of the objective's trunk (VGG16, VGG19 or AlexNet) with torchvision's keys, 'default' to "
        "download it, or 'random' (default: what was downloaded before, for VGG16 else the shift-tolerant one of the "
        "package stlpips-pytorch, else random values)",
    )
    add(
        "--chunk",
        type=number(int, 0),
        metavar="SAMPLES",
        help="stream the trunk so many samples at a time, to save memory, 0: all at once "
        f"(default: {CPU_CHUNK} with a published objective on a CPU, where it saves time, too; else 0)",
    )
    add(
        "--backend",
        choices=("reference", "cpu", "triton", "cuda"),
        help="of the fused losses, with --objective pixel of its pixel loss (default: by device; "
        "INPAINT_KERNELS_BACKEND sets it for everything)",
    )
    add(
        "--layer",
        choices=("ik", "reference"),
        default="ik",
        help="the partial convolutions: this package's kernels, or its formulas in plain PyTorch (default: ik)",
    )
    add("--save-every", type=number(int, 1), default=50, metavar="STEPS", help="(default: %(default)s)")
    add(
        "--compare-steps",
        type=number(int, 0),
        metavar="STEPS",
        help=f"repeat so many steps with the eager formulas (default: {_defaults('compare_steps')})",
    )
    add(
        "--no-compare",
        dest="compare_steps",
        action="store_const",
        const=0,
        help="the same as --compare-steps 0",
    )
    args = parser.parse_args(argv)
    if args.size % SIZE_STEP:
        parser.error(f"argument --size: must be a multiple of {SIZE_STEP}, got {args.size}")
    is_published = args.objective != "pixel"
    if is_published:
        for name in ("perceptual", "style", "normalize"):
            if getattr(args, name) is not None:
                parser.error(
                    f"argument --{name}: only with --objective pixel; that of {args.objective} is fixed"
                )
    elif args.pixel_steps is not None:
        parser.error("argument --pixel-steps: with --objective pixel, every step is one of these")
    elif not args.perceptual and not args.style:
        for option, value in (("--trunk-weights", args.trunk_weights), ("--chunk", args.chunk)):
            if value is not None:
                parser.error(f"argument {option}: with --objective pixel only with --perceptual or --style")
    args.pixel_steps_given = args.pixel_steps is not None
    for name, values in DEFAULTS.items():
        if getattr(args, name) is None:
            setattr(args, name, values[{"pconv": 0, "pixel": 2}.get(args.objective, 1)])
    args.normalize = args.normalize or "image"
    return args


def _defaults(name: str) -> str:
    pconv, published, pixel = ("all" if value is None else value for value in DEFAULTS[name])
    return f"{pconv} with pconv, {published} with other methods, {pixel} with pixel"
