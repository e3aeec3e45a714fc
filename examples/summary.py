"""Measurements of the training example and the table they end in."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import checkpoint
import torch
from engine import HELD_OUT_CROPS, Stopwatch, Trainer, hole_error, mean_colour_fill, now
from losses import Objective, Terms, bytes_kept
from options import AMP_DTYPES
from torch import Tensor, nn

PICTURES, CURVES, REPORT = "pictures.png", "curves.png", "report.json"
ROUNDS = 100
# A trunk takes seconds where the pixel losses take milliseconds.
TRUNK_ROUNDS = 8


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' * (threads != 1)}"


def alternating_ms(
    objectives: list[Objective], pred: Tensor, target: Tensor, mask: Tensor, rounds: int
) -> list[float]:
    """Median forward plus backward time of each objective on the same tensors, taking turns."""
    watches = [Stopwatch(pred.device) for _ in objectives]
    for _ in range(rounds):
        for objective, watch in zip(objectives, watches, strict=True):
            leaf = pred.detach().requires_grad_()
            start = now(pred.device)
            objective(leaf, target, mask).total.backward()
            watch.spans.append((start, now(pred.device)))
    return [watch.median_ms() for watch in watches]


def measure(
    trainers: dict[str, Trainer], pred: Tensor, target: Tensor, mask: Tensor, trunk: nn.Module | None
) -> dict[str, dict[str, Any]]:
    """Figures of every trained variant, measured in its run and on one common batch."""
    rounds = ROUNDS if trunk is None else TRUNK_ROUNDS
    alone = alternating_ms([t.objective for t in trainers.values()], pred, target, mask, rounds)
    fixed = [] if trunk is None else list(trunk.parameters())
    figures = {}
    for (name, trainer), alone_ms in zip(trainers.items(), alone, strict=True):
        step_ms, loss_ms = trainer.step_watch.median_ms(), trainer.loss_watch.median_ms()
        kept = bytes_kept(trainer.objective, pred, target, mask, fixed)
        figures[name] = {
            "step_ms": step_ms,
            "loss_ms": loss_ms,
            "loss_share": loss_ms / step_ms,
            "loss_alone_ms": alone_ms,
            "kept_bytes": kept.made,
            "kept_input_bytes": kept.inputs,
        }
    return figures


def table(figures: dict[str, dict[str, Any]], backend: str) -> str:
    """One column per variant, and their ratio when there are two."""
    names = list(figures)
    titles = [f"fused ({backend})" if name == "fused" else name for name in names]
    lines = [
        ("time per step, median", "step_ms", lambda v: f"{v:.1f} ms"),
        ("  of it the loss, forward + backward", "loss_ms", lambda v: f"{v:.2f} ms"),
        ("  share of the step", "loss_share", lambda v: f"{100 * v:.1f} %"),
        ("loss alone, both taking turns", "loss_alone_ms", lambda v: f"{v:.2f} ms"),
        ("kept for backward besides the inputs", "kept_bytes", lambda v: f"{v / 1024:,.0f} KiB"),
    ]
    header = f"{'':38}" + "".join(f"{name:>18}" for name in titles)
    rows = [header + (f"{'eager / fused':>16}" if len(names) == 2 else "")]
    for label, key, spell in lines:
        values = [figures[name][key] for name in names]
        row = f"{label:38}" + "".join(f"{spell(value):>18}" for value in values)
        # Whole steps differ by the noise of the machine more than by the loss: no ratio for them.
        if len(values) == 2 and key in ("loss_ms", "loss_alone_ms", "kept_bytes") and values[0] > 0:
            row += f"{values[1] / values[0]:>15.2f}x"
        rows.append(row)
    return "\n".join(rows)


def largest_difference(fused: Tensor, eager: Tensor) -> tuple[float, int]:
    """max |fused - eager| / |eager| over the total losses [steps], and where."""
    difference = (fused - eager).abs() / eager.abs().clamp(min=torch.finfo(eager.dtype).tiny)
    where = int(difference.argmax())
    return float(difference[where]), where


def title(trainer: Trainer) -> str:
    """What was trained where, for the head of a picture."""
    settings, world = trainer.settings, trainer.world
    processes = f" x {world.size} processes" if world.size > 1 else ""
    return (
        f"{trainer.step} steps of {settings.batch * world.size} crops, {settings.size}x{settings.size}\n"
        f"{device_name(world.device)}{processes}"
    )


def last_terms(trainers: dict[str, Trainer], histories: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """The terms of the last step of every variant, without those that were left out."""
    settings = trainers["fused"].settings
    left_out = {name for name in ("perceptual", "style") if not getattr(settings, name)}
    return {
        variant: {
            name: float(value)
            for name, value in zip(Terms._fields, history[-1], strict=True)
            if name not in left_out
        }
        for variant, history in histories.items()
    }


def write(
    out: Path,
    trainers: dict[str, Trainer],
    *,
    first_step: int,
    backend: str,
    trunk: nn.Module | None = None,
) -> str:
    """Measures, writes the curves and the JSON file, and returns the text for the terminal.

    Every process calls it, because the objectives may talk to each other; only the first one writes.

    Args:
        out: the output folder.
        trainers: finished trainers, "fused" first and optionally "eager".
        first_step: where this call of the program began, after 0 when resumed.
        backend: what the fused loss ran on.
        trunk: of the perceptual and style terms, None without them.
    """
    fused = trainers["fused"]
    device = fused.world.device
    held_out = fused.sampler.held_out(HELD_OUT_CROPS).to(device)
    batch = fused.sampler.training(fused.step).to(device)
    pred = fused.fill(batch).to(AMP_DTYPES[fused.settings.amp])
    figures = measure(trainers, pred, batch.images, batch.masks, trunk)
    histories = {name: trainer.averaged_history().cpu() for name, trainer in trainers.items()}
    if not fused.world.leads:
        return ""

    import plots

    import inpaint_kernels as ik

    totals = {name: history[:, 0] for name, history in histories.items()}
    terms = last_terms(trainers, histories)
    yardstick = hole_error(mean_colour_fill(held_out), held_out)
    result: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "inpaint_kernels": ik.__version__,
        "backend": backend,
        "processes": fused.world.size,
        "settings": fused.state_settings(),
        "first_step": first_step,
        "variants": figures,
        "objective": fused.settings.formula,
        "last_losses": {name: values["total"] for name, values in terms.items()},
        "last_terms": terms,
        "held_out_hole_error": fused.held_out,
        "mean_colour_fill_error": yardstick,
    }
    lines = [table(figures, backend), f"loss = {fused.settings.formula}; at the last step:"]
    for name, values in terms.items():
        lines.append(f"  {name:6}" + ", ".join(f"{term} {value:.5g}" for term, value in values.items()))
    eager = None
    if "eager" in trainers:
        eager = totals["eager"][first_step:]
        difference, where = largest_difference(totals["fused"][first_step:], eager)
        result |= {"largest_relative_difference": difference, "largest_at_step": first_step + where + 1}
        at = f"at step {first_step + where + 1} of {fused.step}"
        lines.append(f"loss curves: largest relative difference {difference:.1e}, {at}")
    (begin, before), (end, after) = fused.held_out[0], fused.held_out[-1]
    lines.append(
        f"mean error in held-out holes: {before:.4f} at step {begin}, {after:.4f} at step {end}; "
        f"{yardstick:.4f} for the mean colour of the crop"
    )

    plots.loss_curves(
        out / CURVES,
        title(fused),
        fused.settings.formula,
        totals["fused"].numpy(),
        None if eager is None else eager.numpy(),
        first_step,
        fused.held_out,
        yardstick,
    )
    checkpoint.write_atomically(out / REPORT, json.dumps(result, indent=2).encode() + b"\n")
    names = (PICTURES, CURVES, REPORT, checkpoint.NAME)
    return "\n".join([*lines, f"written: {', '.join(str(out / name) for name in names)}"])
