"""The PNG files of the training example: a picture grid and the loss curves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from checkpoint import write_atomically
from data import Batch
from numpy.typing import NDArray
from torch import Tensor

# Before pyplot is imported: there may be no display.
matplotlib.use("Agg")
import matplotlib.pyplot as plt

FUSED, EAGER, YARDSTICK = "#1f6fb4", "#e8871e", "#7a7a7a"
EQUAL = 1e-9


def write_png(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor="white")
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


def picture_grid(path: Path, title: str, rows: list[tuple[str, Batch, Tensor]]) -> None:
    """One row per crop: masked input, output, composite, ground truth.

    Args:
        path: PNG file to write.
        title: above the grid.
        rows: groups (label, batch on the CPU, filled pictures [N, 3, S, S]); the label says whether the
            network has seen these pictures.
    """
    lines = [(label, batch, filled, i) for label, batch, filled in rows for i in range(len(batch.names))]
    figure, axes = plt.subplots(
        len(lines), 4, figsize=(8.6, 2.05 * len(lines) + 0.8), squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=10)
    for index, (row, (label, batch, filled, i)) in enumerate(zip(axes, lines, strict=True)):
        image, mask, output = _pixels(batch.images[i]), _pixels(batch.masks[i]), _pixels(filled[i])
        # White holes are hard to tell from a bright sky.
        masked = np.where(mask > 0, image, np.array([0.85, 0.1, 0.55]))
        pictures = {
            "masked input": masked,
            "network output": output,
            "composite": mask * image + (1 - mask) * output,
            "ground truth": image,
        }
        for axis, (name, picture) in zip(row, pictures.items(), strict=True):
            axis.imshow(picture, interpolation="nearest", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
            if index == 0:
                axis.set_title(name, fontsize=10)
        row[0].set_ylabel(f"{batch.names[i]}\n{label}", fontsize=8)
    write_png(figure, path)


def _pixels(image: Tensor) -> NDArray[np.float32]:
    return image.permute(1, 2, 0).float().cpu().numpy()


def loss_curves(
    path: Path,
    title: str,
    formula: str,
    fused: NDArray[np.float64],
    eager: NDArray[np.float64] | None,
    first_compared: int,
    held_out: list[tuple[int, float]],
    yardstick: float,
) -> None:
    """Training loss, held-out error and, with ``eager``, the difference of the two loss curves.

    Args:
        path: PNG file to write.
        title: above the plot.
        formula: the total loss in words.
        fused, eager: total training loss of every step [steps]; ``eager`` counts from ``first_compared``.
        first_compared: steps before it were trained by an earlier, resumed run.
        held_out: (step, error) pairs.
        yardstick: held-out error of filling with the mean colour.
    """
    panels = 2 if eager is None else 3
    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 3.7), layout="constrained")
    figure.suptitle(title, fontsize=10)
    steps = np.arange(1, len(fused) + 1)

    axes[0].plot(steps, fused, color=FUSED, alpha=0.25, linewidth=0.8)
    axes[0].plot(*_smooth(steps, fused), color=FUSED, linewidth=2.4, label="fused loss")
    if eager is not None:
        axes[0].plot(
            *_smooth(steps[first_compared:], eager), "--", color=EAGER, linewidth=1.4, label="eager formulas"
        )
    axes[0].set(title=f"training loss (running mean)\n{formula}", xlabel="step", yscale="log")
    axes[0].legend()

    axes[1].plot(*zip(*held_out, strict=True), "o-", color=FUSED, markersize=4, label="network")
    axes[1].axhline(yardstick, color=YARDSTICK, linestyle=":", label="mean colour of the crop")
    axes[1].set(title="mean absolute error in held-out holes", xlabel="step", ylim=(0, None))
    axes[1].legend()

    if eager is not None:
        difference = np.abs(fused[first_compared:] - eager) / np.abs(eager)
        # Equal losses would fall off a logarithmic axis.
        shown = np.maximum(difference, EQUAL)
        axes[2].plot(steps[first_compared:], shown, ".", color=EAGER, markersize=3)
        axes[2].set(
            title=f"|fused - eager| / eager, at most {difference.max():.1e}",
            xlabel="step",
            yscale="log",
            ylim=(EQUAL / 2, max(1e-5, 3 * float(shown.max()))),
        )
        axes[2].annotate("equal", (0, EQUAL), (4, 3), ("axes fraction", "data"), "offset points", fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.title.set_fontsize(10)
    write_png(figure, path)


def _smooth(steps: NDArray[Any], values: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    window = max(1, len(values) // 25)
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    return steps[window - 1 :], mean
