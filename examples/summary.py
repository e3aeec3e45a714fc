"""Measurements of the training example and the table they end in."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import checkpoint
import torch
from adversarial import Judgement
from data import Batch
from engine import HELD_OUT_CROPS, RECORDED, Stopwatch, Trainer, hole_error, now
from fills import BASELINES
from losses import PIXEL_WEIGHTS
from memory import bytes_kept
from methods import Objective
from options import AMP_DTYPES, in_words
from torch import Tensor, nn

PICTURES, CURVES, REPORT = "pictures.png", "curves.png", "report.json"
ROUNDS = 100
# A trunk takes seconds where the pixel losses take milliseconds.
TRUNK_ROUNDS = 3
# Perceptual terms have kinks: a rounding that crosses one moves a gradient, and training amplifies what was moved.
FIRST_STEPS = 5


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
    objectives: list[Objective], pred: Tensor, batch: Batch, judged: Judgement | None, rounds: int
) -> list[float]:
    """Median forward plus backward time of each objective on the same tensors, taking turns."""
    watches = [Stopwatch(pred.device) for _ in objectives]
    fake, real = (judged.fake, judged.real) if judged else (None, None)
    for _ in range(rounds):
        for objective, watch in zip(objectives, watches, strict=True):
            leaf = pred.detach().requires_grad_()
            start = now(pred.device)
            objective(leaf, batch.images, batch.masks, fake, real).total.backward()
            watch.spans.append((start, now(pred.device)))
    return [watch.median_ms() for watch in watches]


def measure(
    trainers: dict[str, Trainer], pred: Tensor, batch: Batch, trunk: nn.Module | None
) -> dict[str, dict[str, Any]]:
    """Figures of every trained variant, measured in its run and on one common batch."""
    adversary = trainers["fused"].adversary
    judged = adversary.judge(pred, batch) if adversary else None
    rounds = ROUNDS if trunk is None else TRUNK_ROUNDS
    alone = alternating_ms([t.objective for t in trainers.values()], pred, batch, judged, rounds)
    fixed = [] if trunk is None else list(trunk.parameters())
    figures = {}
    for (name, trainer), alone_ms in zip(trainers.items(), alone, strict=True):
        step_ms, loss_ms = trainer.step_watch.median_ms(), trainer.loss_watch.median_ms()
        kept = bytes_kept(trainer.objective, pred, batch.images, batch.masks, fixed, judged)
        figures[name] = {
            "step_ms": step_ms,
            "loss_ms": loss_ms,
            "loss_share": loss_ms / step_ms,
            "loss_alone_ms": alone_ms,
            "kept_bytes": kept.made,
            "kept_input_bytes": kept.inputs,
            "peak_bytes": trainer.memory.bytes,
        }
    return figures


def table(figures: dict[str, dict[str, Any]], backend: str, peak_of: str) -> str:
    """One column per variant, and their ratio when there are two; ``peak_of`` says whose memory it is."""
    names = list(figures)
    titles = [f"fused ({backend})" if name == "fused" else name for name in names]
    lines = [
        ("time per step, median", "step_ms", lambda v: f"{v:.1f} ms"),
        ("  of it the loss, forward + backward", "loss_ms", lambda v: f"{v:.2f} ms"),
        ("  share of the step", "loss_share", lambda v: f"{100 * v:.1f} %"),
        ("loss alone, both taking turns", "loss_alone_ms", lambda v: f"{v:.2f} ms"),
        ("kept for backward besides the inputs", "kept_bytes", _bytes),
        (f"peak memory of {peak_of}", "peak_bytes", _bytes),
    ]
    header = f"{'':42}" + "".join(f"{name:>18}" for name in titles)
    rows = [header + (f"{'eager / fused':>16}" if len(names) == 2 else "")]
    for label, key, spell in lines:
        values = [figures[name][key] for name in names]
        row = f"{label:42}" + "".join(f"{spell(value):>18}" for value in values)
        # Whole steps differ by the noise of the machine more than by the loss: no ratio for them.
        if len(values) == 2 and key in ("loss_ms", "loss_alone_ms", "kept_bytes") and values[0] > 0:
            row += f"{values[1] / values[0]:>15.2f}x"
        rows.append(row)
    return "\n".join(rows)


def _bytes(value: int | None) -> str:
    if value is None:
        return "unknown"
    return f"{value / 2**10:,.0f} KiB" if value < 2**20 else f"{value / 2**20:,.1f} MiB"


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


def curves(trainer: Trainer) -> dict[str, Tensor]:
    """The total, every term that was not left out and the discriminator's, of all steps [steps].

    Of steps that leave a term out, it is 0.
    """
    history = trainer.averaged_history().cpu()
    named = dict(zip(RECORDED, history.unbind(1), strict=True))
    return {name: named[name] for name in ("total", *trainer.settings.all_weights, *trainer.of_discriminator)}


def terms_of(trainer: Trainer, curves: dict[str, Tensor], step: int) -> dict[str, float]:
    """What was recorded of the ``step``-th step, without terms it left out."""
    settings = trainer.settings
    beside = () if step <= settings.pixel_steps else trainer.of_discriminator
    return {
        name: float(curves[name][step - 1]) for name in ("total", *settings.weights_at(step - 1), *beside)
    }


def baseline_errors(batch: Batch) -> dict[str, float]:
    """Errors in the holes of fills without a network; without scikit-image, two of them are left out."""
    batch, errors = batch.to(torch.device("cpu")), {}
    for name, fill in BASELINES.items():
        try:
            errors[name] = hole_error(fill(batch.images, batch.masks).clamp(0, 1), batch)
        except ModuleNotFoundError:
            continue
    return errors


def write(
    out: Path,
    trainers: dict[str, Trainer],
    *,
    compared_from: int,
    backend: str,
    trunk: nn.Module | None = None,
) -> str:
    """Measures, writes the curves and the JSON file, and returns the text for the terminal.

    Every process calls it, because the objectives may talk to each other; only the first one writes.

    Args:
        out: the output folder.
        trainers: finished trainers, "fused" first and optionally "eager".
        compared_from: after how many steps the comparison of the two begins.
        backend: what the fused loss ran on.
        trunk: of the perceptual and style terms, None without them.
    """
    fused = trainers["fused"]
    device = fused.world.device
    held_out = fused.sampler.held_out(HELD_OUT_CROPS).to(device)
    batch = fused.sampler.training(fused.step).to(device)
    pred = fused.fill(batch).to(AMP_DTYPES[fused.settings.amp])
    figures = measure(trainers, pred, batch, trunk)
    all_curves = {name: curves(trainer) for name, trainer in trainers.items()}
    if not fused.world.leads:
        return ""

    import plots

    import inpaint_kernels as ik

    baselines = baseline_errors(held_out)
    # The comparison may have ended earlier.
    last = min(trainer.step for trainer in trainers.values())
    terms = {name: terms_of(trainer, all_curves[name], last) for name, trainer in trainers.items()}
    result: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "inpaint_kernels": ik.__version__,
        "backend": backend,
        "processes": fused.world.size,
        "settings": fused.state_settings(),
        "compared_from": compared_from,
        "variants": figures,
        "peak_bytes_of": fused.memory.of,
        "objective": fused.settings.formula,
        "terms_of_step": last,
        "last_losses": {variant: values["total"] for variant, values in terms.items()},
        "last_terms": terms,
        "held_out_hole_error": fused.held_out,
        "held_out_baselines": baselines,
        "pixel_step_ms": fused.pixel_step_ms,
    }
    lines = [table(figures, backend, fused.memory.of), f"loss = {fused.settings.formula}"]
    if trunk is not None:
        lines.append(f"  trunk: {fused.settings.trunk}")
    if fused.settings.pixel_steps:
        ms = "" if fused.pixel_step_ms is None else f", median {fused.pixel_step_ms:.1f} ms a step"
        lines.append(f"  of the first {fused.settings.pixel_steps} steps {in_words(PIXEL_WEIGHTS)}{ms}")
    shown = [(variant, last, values) for variant, values in terms.items()]
    if fused.step > last:
        shown.append(("fused", fused.step, terms_of(fused, all_curves["fused"], fused.step)))
    for variant, step, values in shown:
        spelled = ", ".join(f"{name} {value:.5g}" for name, value in values.items())
        lines.append(f"  {variant}, step {step}: {spelled}")
    if "eager" in trainers:
        pair = [all_curves[name]["total"][compared_from:last] for name in ("fused", "eager")]
        difference, where = largest_difference(*pair)
        first, _ = largest_difference(*(total[:FIRST_STEPS] for total in pair))
        result |= {
            "compared_steps": last - compared_from,
            "largest_relative_difference": difference,
            "largest_at_step": compared_from + where + 1,
            f"largest_relative_difference_of_first_{FIRST_STEPS}": first,
        }
        lines.append(
            f"loss curves: largest relative difference {first:.1e} in the first {FIRST_STEPS} steps compared, "
            f"{difference:.1e} in all {last - compared_from}, at step {compared_from + where + 1}"
        )
    (begin, before), (end, after) = fused.held_out[0], fused.held_out[-1]
    lines.append(
        f"mean error in held-out holes: {before:.4f} at step {begin}, {after:.4f} at step {end}; without a network"
    )
    lines += [f"  {error:.4f} {name}" for name, error in baselines.items()]

    arrays = {
        variant: {name: values.numpy() for name, values in named.items()}
        for variant, named in all_curves.items()
    }
    plots.loss_curves(
        out / CURVES,
        title(fused),
        fused.settings.all_weights | dict.fromkeys(fused.of_discriminator, 1.0),
        arrays["fused"],
        # The steps before are those of the fused run.
        {name: values[compared_from:] for name, values in arrays["eager"].items()}
        if "eager" in arrays
        else None,
        compared_from,
        fused.held_out,
        baselines,
    )
    checkpoint.write_atomically(out / REPORT, json.dumps(result, indent=2).encode() + b"\n")
    names = (PICTURES, CURVES, REPORT, checkpoint.NAME)
    return "\n".join([*lines, f"written: {', '.join(str(out / name) for name in names)}"])
