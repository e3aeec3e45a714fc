"""The training loop: steps, timing, validation, checkpoints, exact continuation."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import signal
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import checkpoint
import torch
import torch.distributed as dist
from adversarial import Adversary
from data import Batch, Sampler
from errors import InputError
from memory import PeakMemory, release_freed
from methods import Objective, Published, Terms
from model import PartialConvUNet
from options import Settings
from torch import Tensor
from tqdm import tqdm
from world import World

WARMUP_STEPS = 20
# The rate falls with the step alone, so that a run does not depend on how long it was meant to be.
DECAY_STEPS = 200
HELD_OUT_CROPS = 16
# The latest steps are timed; a long run would otherwise hold a CUDA event for each of its steps.
SPANS = 2000
# So often several processes ask each other whether one of them is to stop.
STOP_STEPS = 10
# What is recorded of every step: the terms, 0 for those left out, the discriminator's loss and its gradient penalty.
RECORDED = (*Terms._fields, "discriminator", "penalty")


def now(device: torch.device) -> Any:
    """A point in time; an event on a GPU, so that timing never waits for the device."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class StopRequest:
    """Ctrl-C and SIGTERM within its ``with`` block are asked for, not obeyed; a second Ctrl-C is."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> None:
        # What a shell has the program ignore, as in the background, stays ignored.
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._ask) for number in numbers}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            # torchrun sends SIGTERM to the processes that end a moment later than the first.
            ignored = self.asked and number == signal.SIGTERM
            signal.signal(number, signal.SIG_IGN if ignored else handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        # torchrun hands on a SIGTERM of its own after the Ctrl-C that reached every process.
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


@dataclass
class Stopwatch:
    """Spans between two ``now``; the median leaves out the first few, which only warm up."""

    device: torch.device
    spans: deque[tuple[Any, Any]] = field(default_factory=lambda: deque(maxlen=SPANS))

    def median_ms(self) -> float:
        spans = list(self.spans)[min(5, len(self.spans) // 2) :]
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return float(statistics.median(start.elapsed_time(end) for start, end in spans))
        return float(statistics.median((end - start) * 1e3 for start, end in spans))


def make_network(settings: Settings) -> PartialConvUNet:
    import inpaint_kernels as ik

    backend = "reference" if settings.layer == "reference" else None
    return PartialConvUNet(settings.width, functools.partial(ik.nn.PartialConv2d, backend=backend))


class Trainer:
    """A network, its optimiser, an objective and the discriminator of one that has it.

    ``train`` runs from ``step`` to ``settings.steps``.
    """

    def __init__(
        self,
        settings: Settings,
        world: World,
        sampler: Sampler,
        objective: Objective,
        pixels: Objective | None = None,
    ) -> None:
        self.settings, self.world, self.sampler, self.objective = settings, world, sampler, objective
        # The objective of the first `settings.pixel_steps`.
        self.pixels = pixels or objective
        torch.manual_seed(settings.seed)
        self.net = make_network(settings).to(world.device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=settings.lr)
        self.scaler = world.scaler(settings.amp)
        self.adversary: Adversary | None = None
        if isinstance(objective, Published) and objective.adversarial:
            self.adversary = Adversary(objective, settings, world)
        self.step = 0
        self.history = torch.zeros(settings.steps, len(RECORDED), dtype=torch.float64, device=world.device)
        self.held_out: list[tuple[int, float]] = []
        self.step_watch, self.loss_watch = Stopwatch(world.device), Stopwatch(world.device)
        self.memory = PeakMemory(world.device)
        # How long a step with pixel terms alone takes, and the state after the last one, from which the comparison
        # with the eager formulas begins.
        self.pixel_step_ms: float | None = None
        self.state_after_pixels: dict[str, Any] | None = None
        # A heap fills with gaps over hundreds of steps: peaks are compared over the same ones.
        self.watch_memory_until = settings.steps
        self.saved_step: int | None = None
        self.stop = StopRequest()
        # False once the newest checkpoint in the output folder belongs to this run.
        self.new_run = True

    # -- state --------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything an exact continuation needs, as it is now; a copy."""
        rng = {"cpu": torch.get_rng_state()}
        if self.world.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.world.device)
        return copy.deepcopy(
            {
                "step": self.step,
                "architecture": self.settings.architecture,
                "settings": self.state_settings(),
                "model": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "adversary": None if self.adversary is None else self.adversary.state(),
                "rng": rng,
                "history": self.averaged_history().cpu(),
                "held_out": self.held_out,
            }
        )

    def state_settings(self) -> dict[str, Any]:
        return vars(self.settings) | {"crops_per_step": self.settings.batch * self.world.size}

    def restore(self, state: dict[str, Any]) -> None:
        if state["step"] >= self.settings.steps:
            raise InputError(
                f"the checkpoint is at step {state['step']} already; ask for more than that with --steps"
            )
        try:
            self.net.load_state_dict(state["model"])
            self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
            if state["scaler"] and self.scaler.is_enabled():
                self.scaler.load_state_dict(state["scaler"])
            # Another method's discriminator is of no use: this one begins anew.
            if self.adversary and state["settings"].get("objective") == self.settings.objective:
                self.adversary.restore(state["adversary"])
            torch.set_rng_state(state["rng"]["cpu"])
            if self.world.device.type == "cuda" and "cuda" in state["rng"]:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.world.device)
            self.step = int(state["step"])
            history = state["history"].to(self.history)
            # Runs of an earlier version recorded fewer terms.
            self.history[: self.step, : history.shape[1]] = history
            self.held_out = [(int(step), float(error)) for step, error in state["held_out"]]
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"the checkpoint does not fit this network: {reason}") from error

    @property
    def of_discriminator(self) -> tuple[str, ...]:
        """What is recorded beside the terms: the discriminator's loss, and its penalty as it was last taken."""
        if self.adversary is None:
            return ()
        return RECORDED[-2:] if self.adversary.objective.penalty_interval else RECORDED[-2:-1]

    def averaged_history(self) -> Tensor:
        """What was recorded of every step so far, averaged over the processes."""
        return self.world.average(self.history[: self.step].clone())

    # -- training -----------------------------------------------------------------------------

    def train(self, label: str, out: Path | None) -> None:
        """Runs the remaining steps; with ``out``, validates and writes checkpoints there.

        Raises KeyboardInterrupt after the step in which Ctrl-C is pressed; with ``out``, that step is saved.
        """
        release_freed()
        network = self.world.parallel(self.net)
        if self.adversary is not None:
            self.adversary.begin()
        with self.stop, self._progress(label) as bar, self._batches() as batches:
            if out is not None and self.step == 0:
                self.validate()
            for batch in batches:
                if 0 < self.step == self.settings.pixel_steps:
                    self._begin_whole_objective()
                with self.memory if self.step < self.watch_memory_until else contextlib.nullcontext():
                    self._one_step(network, batch)
                self.step += 1
                bar.update()
                if self.step % 10 == 0 or self.step == self.settings.steps:
                    bar.set_postfix_str(self._latest())
                if out is not None and self._is_due():
                    self.validate()
                    self._save(out)
                if self._is_stopped():
                    self.stop.asked = True
                    if out is not None and self.saved_step != self.step:
                        self._save(out)
                    if self.world.group is not None:
                        # The first process to end has torchrun end the others.
                        dist.barrier(self.world.group)
                    raise KeyboardInterrupt
        self._check_finite()

    def _begin_whole_objective(self) -> None:
        """What is timed, and compared with the eager formulas, are the steps from here on."""
        self.state_after_pixels = self.state()
        if self.step_watch.spans:
            self.pixel_step_ms = self.step_watch.median_ms()
        for watch in (self.step_watch, self.loss_watch):
            watch.spans.clear()
        self.memory.bytes = None
        release_freed()

    def _one_step(self, network: torch.nn.Module, batch: Batch) -> None:
        device = self.world.device
        whole = self.step >= self.settings.pixel_steps
        objective, adversary = (self.objective, self.adversary) if whole else (self.pixels, None)
        rate = self.settings.lr * min(1.0, (self.step + 1) / WARMUP_STEPS)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = rate / math.sqrt(1 + self.step / DECAY_STEPS)
        start = now(device)
        batch = batch.to(device)
        with self.world.autocast(self.settings.amp):
            output = network(batch.images * batch.masks, batch.masks)
        # The loss is differentiated on its own, so that its backward can be timed apart from the networks'.
        pred = output.detach().requires_grad_()
        judged = adversary.judge(pred, batch) if adversary else None
        fake, real = (judged.fake, judged.real) if judged else (None, None)
        loss_start = now(device)
        terms = objective(pred, batch.images, batch.masks, fake, real)
        self.scaler.scale(terms.total).backward()
        loss_end = now(device)
        if judged is not None:
            judged.backward(pred)
        output.backward(pred.grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        zero = terms.total.new_zeros(())
        recorded = [zero if term is None else term.detach() for term in terms]
        if adversary is not None:
            recorded += adversary.step(output.detach(), batch, rate, self.step)
        self.history[self.step, : len(recorded)] = torch.stack(recorded)
        self.loss_watch.spans.append((loss_start, loss_end))
        self.step_watch.spans.append((start, now(device)))

    @torch.no_grad()
    def validate(self) -> None:
        """Appends (step, mean absolute error inside the holes of the held-out crops)."""
        if not self.world.leads:
            return
        batch = self.sampler.held_out(HELD_OUT_CROPS).to(self.world.device)
        error = hole_error(self.fill(batch), batch)
        self.held_out.append((self.step, error))

    @torch.no_grad()
    def fill(self, batch: Batch) -> Tensor:
        """The network's pictures [N, 3, S, S] in [0, 1]."""
        with self.world.autocast(self.settings.amp):
            output = self.net(batch.images * batch.masks, batch.masks)
        filled: Tensor = output.float().clamp(0, 1)
        return filled

    # -- details ------------------------------------------------------------------------------

    def _is_due(self) -> bool:
        return self.step % self.settings.save_every == 0 or self.step == self.settings.steps

    def _is_stopped(self) -> bool:
        """In all processes after the same step. To ask them waits for the device, so it is not done every time."""
        if self.world.group is None:
            return self.stop.asked
        if self.step % STOP_STEPS:
            return False
        asked = torch.tensor(float(self.stop.asked), device=self.world.device)
        return bool(self.world.average(asked) > 0)

    def _save(self, out: Path) -> None:
        self._check_finite()
        state = self.state()
        if self.world.leads:
            checkpoint.save(out, state, new_run=self.new_run)
        self.new_run, self.saved_step = False, self.step

    def _check_finite(self) -> None:
        finite = self.averaged_history().isfinite().all(1)
        if not bool(finite.all()):
            step = int(finite.logical_not().nonzero()[0]) + 1
            raise InputError(
                f"the loss is not finite at step {step}; try a lower --lr (now {self.settings.lr:g})"
            )

    def _latest(self) -> str:
        """The total and the first of its terms, in words."""
        values = dict(zip(RECORDED, self.history[self.step - 1].tolist(), strict=True))
        term = next(iter(self.settings.weights_at(self.step - 1)))
        return f"loss {values['total']:.4f}, {term} {values[term]:.4f}"

    def _progress(self, label: str) -> tqdm[Any]:
        # A log file gets a line every few seconds instead of ten a second.
        interval = 0.1 if sys.stderr.isatty() else 10.0
        return tqdm(
            total=self.settings.steps,
            initial=self.step,
            desc=label,
            unit="step",
            mininterval=interval,
            disable=not self.world.leads,
        )

    @contextlib.contextmanager
    def _batches(self) -> Iterator[Iterator[Batch]]:
        """The remaining batches, each drawn while the step before it runs."""
        pool = ThreadPoolExecutor(1)

        def drawn() -> Iterator[Batch]:
            coming = pool.submit(self.sampler.training, self.step)
            for step in range(self.step, self.settings.steps):
                batch = coming.result()
                if step + 1 < self.settings.steps:
                    coming = pool.submit(self.sampler.training, step + 1)
                yield batch

        try:
            yield drawn()
        finally:
            pool.shutdown(cancel_futures=True)


def hole_error(filled: Tensor, batch: Batch) -> float:
    """Mean absolute error inside the holes, over all crops."""
    hole = 1 - batch.masks
    count = (hole.sum() * filled.shape[1]).clamp(min=1)
    return float((hole * (filled - batch.images).abs()).sum() / count)
