"""One call of train.py: from its options to the report, and what is said when it cannot go on."""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import checkpoint
import summary
import torch
import torch.distributed as dist
from data import MaskFiles, MaskMaker, Sampler, brush_mask, load_photographs
from engine import Trainer
from errors import InputError
from losses import METHODS, fused_backend, make_objective
from methods import FeatureTerms
from options import CPU_CHUNK, Settings
from trunks import RANDOM_WARNING, find_weights, load_trunk
from world import World

SAME_AS_OPTIONS = (
    *("steps", "batch", "size", "lr", "seed", "width", "amp", "normalize", "save_every"),
    *("layer", "objective", "pixel_steps"),
)


def join_world(choice: str) -> World:
    """The device of this process, and its group when started by torchrun."""
    if choice == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    cuda = choice != "cpu" and torch.cuda.is_available()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(torch.device("cuda" if cuda else "cpu"))
    device = torch.device("cpu")
    if cuda:
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise InputError(
                f"process {local} of this machine has no GPU: only {torch.cuda.device_count()} found"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    return World(device, dist.get_rank(), size, dist.group.WORLD)


def make_output_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: cannot create the folder {out}: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise InputError(f"--out: the folder {out} is not writable")


def warn_of_changes(then: dict[str, Any], now: dict[str, Any]) -> None:
    for name in sorted(set(now) - {"steps", "batch", "save_every", "chunk"}):
        # What an earlier version did not record was as a setting is by default.
        before = then.get(name, getattr(Settings, name, None))
        if before != now[name]:
            change = f"{name.replace('_', ' ')} was {before}, is {now[name]}"
            print(f"note: {change}: the run goes on, but not exactly as it would have")


class Job:
    """One call of the program: everything between the options and the report."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        # None for "pixel", which has a trunk only when it is asked for.
        self.method = METHODS.get(args.objective)
        self.trunk_name = self.method.trunk if self.method else "vgg16"
        self.world = World(torch.device("cpu"))
        self.trainer: Trainer | None = None
        self.trained = False

    def run(self) -> None:
        args = self.args
        try:
            # Both are used late; a missing one should not cost the run its report.
            import plots  # noqa: F401

            import inpaint_kernels  # noqa: F401
        except ImportError as error:
            raise InputError(
                f"{error}; install the package with what the demo needs: pip install '.[demo]'"
            ) from error
        if args.device != "cpu" and torch.cuda.is_available():
            # An exact continuation needs the same convolution algorithms in both halves.
            torch.backends.cudnn.deterministic = True
        self.world = join_world(args.device)
        make_output_folder(args.out)
        photographs = load_photographs(args.images, args.size)
        masks: MaskMaker = (
            MaskFiles(args.masks, args.size, args.mask_files_mark)
            if args.masks is not None
            else lambda rng: brush_mask(rng, args.size)
        )
        masks_from = f"{args.masks}, what is marked is {args.mask_files_mark}" if args.masks else "brush"
        self.features = self._load_features()
        options: dict[str, Any] = {name: getattr(args, name) for name in SAME_AS_OPTIONS}
        weights = self.method.weights if self.method else vars(args)
        options |= {name: weights.get(name) or 0.0 for name in ("perceptual", "style", "tv")}
        settings = Settings(
            **options,
            chunk=self._chunk,
            data=f"pictures {photographs.source}, masks {masks_from}",
            trunk=self.trunk_label if self.features else "none",
        )
        self.backend = fused_backend(self.world.device, args.backend, args.objective, self.features)
        self.sampler = Sampler(photographs, masks, seed=args.seed, batch=args.batch, rank=self.world.rank)
        self.trainer = self._make_trainer(settings, "fused")
        if args.resume is not None:
            self._resume(self.trainer)
        unread = len(photographs.skipped)
        processes = f" x {self.world.size} processes" if self.world.size > 1 else ""
        self._say(
            f"{summary.device_name(self.world.device)}{processes}, fused loss on {self.backend!r}; "
            f"{len(photographs.training)} training and {len(photographs.held_out)} held-out pictures "
            f"(by {photographs.held_out_by}) from {photographs.source}"
            f"{f', {unread} more could not be read' if unread else ''}"
        )
        start = self.trainer.state()
        # Whole objectives are compared, if this call comes to them.
        compared_from = int(start["step"])
        if args.pixel_steps < args.steps:
            compared_from = max(compared_from, args.pixel_steps)
        last = args.steps
        if args.compare_steps:
            last = min(last, compared_from + args.compare_steps)
        self.trainer.watch_memory_until = last
        self.trainer.train("fused loss", args.out)
        self.trained = True
        self._write_pictures(self.trainer, photographs.held_out_by)
        trainers = {"fused": self.trainer}
        if args.compare_steps != 0:
            trainers["eager"] = self._make_trainer(replace(settings, steps=last), "eager")
            trainers["eager"].restore(self.trainer.state_after_pixels or start)
            trainers["eager"].train("eager loss", None)
        trunk = self.features.trunk if self.features is not None else None
        text = summary.write(
            args.out, trainers, compared_from=compared_from, backend=self.backend, trunk=trunk
        )
        self._say(f"\n{text}")

    @property
    def _chunk(self) -> int | None:
        if self.args.chunk is None and self.method is not None and self.world.device.type == "cpu":
            return CPU_CHUNK
        return self.args.chunk or None

    def _load_features(self) -> FeatureTerms | None:
        args, option, name = self.args, "--trunk-weights", self.trunk_name
        if self.method is None and not args.perceptual and not args.style:
            return None
        weights, self.trunk_label = find_weights(name, args.trunk_weights, option=option)
        if weights is None:
            self._say(RANDOM_WARNING.format(name=name, option=option))
            if args.objective == "pconv" and not args.pixel_steps_given:
                # Seen: after 30 of its steps the error in held-out holes was 2 % larger than before them.
                self._say(
                    "with it fills become worse, so this run is one of --objective pixel; --pixel-steps "
                    f"{args.pixel_steps} has the steps after these train with all terms"
                )
                args.objective, args.pixel_steps, self.method = "pixel", 0, None
                return None
        options: dict[str, Any] = {}
        if self.method is not None:
            # The objective normalises, once for all of its passes, and its own trunk has this layout. A style term
            # grows with the square of the features: of random ones as large as normalised pictures it would be nine
            # tenths of the loss.
            taps = self.method.layers
            options = {"taps": taps, "preprocess": "none", "channels_last": None, "random_scale": 1 / 3}
        trunk = load_trunk(name, weights, self.world.device, option=option, **options)
        if self.method is not None:
            return FeatureTerms(trunk, chunk=self._chunk)
        return FeatureTerms(trunk, args.perceptual, args.style, self._chunk)

    def _make_trainer(self, settings: Settings, kind: str) -> Trainer:
        make = functools.partial(
            make_objective, kind, normalize=settings.normalize, backend=self.backend, group=self.world.group
        )
        objective = make(settings.objective, features=self.features)
        return Trainer(settings, self.world, self.sampler, objective, make("pixel"))

    def _resume(self, trainer: Trainer) -> None:
        path = Path(self.args.resume or self.args.out)
        state = checkpoint.load(path, trainer.settings.architecture)
        trainer.restore(state)
        trainer.new_run = (path if path.is_dir() else path.parent).resolve() != self.args.out.resolve()
        if self.world.leads:
            warn_of_changes(state["settings"], trainer.state_settings())
        self._say(f"resumed {path} at step {trainer.step}")

    def _write_pictures(self, trainer: Trainer, held_out_by: str) -> None:
        if not self.world.leads:
            return
        import plots

        rows = []
        for label, batch in (
            (f"held out (by {held_out_by})", self.sampler.held_out(4)),
            ("trained on", self.sampler.seen(2)),
        ):
            rows.append((label, batch, trainer.fill(batch.to(self.world.device)).cpu()))
        plots.picture_grid(self.args.out / summary.PICTURES, summary.title(trainer), rows)

    def _say(self, text: str) -> None:
        if self.world.leads:
            print(text, flush=True)

    def stopped(self, argv: Sequence[str]) -> str:
        """What a stopped run leaves, and how to go on."""
        path = self.args.out / checkpoint.NAME
        if self.trained or (self.trainer is not None and self.trainer.saved_step == self.args.steps):
            return f"stopped during the comparison; the training is finished: {path}"
        if self.trainer is None or self.trainer.saved_step is None:
            return "stopped before this run's first checkpoint; earlier checkpoints are untouched"
        command = f"python {shlex.join([sys.argv[0], *_without_resume(argv), '--resume'])}"
        if self.world.size > 1:
            command = "the same torchrun command and --resume"
        saved = self.trainer.saved_step
        where = f"stopped at step {self.trainer.step}"
        if saved != self.trainer.step:
            where += f"; the checkpoint is at step {saved}"
        return f"{where}. {path} is saved; go on with: {command}"


def _without_resume(argv: Sequence[str]) -> list[str]:
    words: list[str] = []
    for word, before in zip(argv, ["", *argv], strict=False):
        is_path = before == "--resume" and not word.startswith("-")
        if not is_path and word.split("=")[0] != "--resume":
            words.append(word)
    return words


def _on_sigterm(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """Returns the exit status: 0, or 2 with one line on stderr."""
    job = Job(args)
    handler = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        job.run()
        return 0
    except InputError as error:
        message = f"error: {error}"
    except KeyboardInterrupt:
        message = job.stopped(argv) if job.world.leads else ""
    except RuntimeError as error:
        text = str(error).lower()
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text:
            message = "error: out of memory; try a smaller --batch or --size"
        # Gloo and NCCL report a companion that died as RuntimeError, with their name in the text.
        elif job.world.size > 1 and ("gloo" in text or "nccl" in text):
            message = f"error: another process of this run ended; {job.stopped(argv)}"
        else:
            raise
    finally:
        signal.signal(signal.SIGTERM, handler)
        if dist.is_initialized():
            dist.destroy_process_group()
    rank = f" [process {job.world.rank}]" if job.world.size > 1 else ""
    if message:
        print(f"train.py{rank}: {message}", file=sys.stderr, flush=True)
    return 2
