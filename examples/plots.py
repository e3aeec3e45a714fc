"""The PNG files of the training example: a picture grid and the loss curves."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from checkpoint import write_atomically
from data import Batch
from fills import smooth_pull_push
from numpy.typing import NDArray
from options import weighed
from torch import Tensor

# Before pyplot is imported: there may be no display.
matplotlib.use("Agg")
import matplotlib.pyplot as plt

FUSED, EAGER = "#1f6fb4", "#e8871e"
BASELINES = ("#7a7a7a", "#3a9d5d", "#b04a8b", "#d9a400", "#c0392b")
EQUAL = 1e-9

Curves = dict[str, NDArray[np.float64]]


def write_png(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor="white")
    plt.close(figure)
    write_atomically(path, buffer.getvalue())


def picture_grid(path: Path, title: str, rows: list[tuple[str, Batch, Tensor]]) -> None:
    """One row per crop: masked input, the fill that the network corrects, what it makes of it, ground truth.

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
        base = smooth_pull_push(batch.images[i : i + 1], batch.masks[i : i + 1])[0].clamp(0, 1)
        image, mask, output = _pixels(batch.images[i]), _pixels(batch.masks[i]), _pixels(filled[i])
        # White holes are hard to tell from a bright sky.
        masked = np.where(mask > 0, image, np.array([0.85, 0.1, 0.55]))
        pictures = {
            "masked input": masked,
            "smooth pull-push": _pixels(base),
            "network": mask * image + (1 - mask) * output,
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
    weights: dict[str, float],
    fused: Curves,
    eager: Curves | None,
    first_compared: int,
    held_out: list[tuple[int, float]],
    baselines: dict[str, float],
) -> None:
    """Training loss, held-out error, each term and, with ``eager``, the difference of the two loss curves.

    Args:
        path: PNG file to write.
        title: above the plot.
        weights: of the terms in the total, 1 for what is drawn beside them.
        fused, eager: the "total" and each term of every step [steps]; ``eager`` counts from ``first_compared`` and
            may end earlier.
        first_compared: the comparison leaves out the steps before it.
        held_out: (step, error) pairs.
        baselines: held-out errors of fills without a network.
    """
    count = (2 if eager is None else 3) + len(weights)
    rows = 1 + count // 5
    columns = -(-count // rows)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.9 * columns, 3.3 * rows + 0.5), squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=10)
    free = iter(axes.flat)
    steps = np.arange(1, len(fused["total"]) + 1)

    def draw_loss(name: str, title: str, weight: float = 1.0) -> None:
        axis = next(free)
        # Without the first steps where they leave the term out.
        begin = int(np.argmax(fused[name] != 0))
        since, values = steps[begin:], weight * fused[name][begin:]
        axis.plot(since, values, color=FUSED, alpha=0.25, linewidth=0.8)
        axis.plot(*_smooth(since, values, since.size), color=FUSED, linewidth=2.4, label="fused")
        if eager is not None:
            compared = steps[first_compared : first_compared + len(eager[name])]
            smooth = _smooth(compared, weight * eager[name], since.size)
            axis.plot(*smooth, "--", color=EAGER, linewidth=1.4, label="eager formulas")
        # A penalty may not have been taken yet.
        axis.set(title=title, xlabel="step", yscale="log" if (fused[name] > 0).any() else "linear")
        axis.legend(fontsize=8)

    draw_loss("total", "training loss, running mean")
    axis = next(free)
    axis.plot(*zip(*held_out, strict=True), "o-", color=FUSED, markersize=4, label="network")
    for colour, (name, error) in zip(BASELINES, baselines.items(), strict=False):
        axis.axhline(error, color=colour, linestyle=":", label=name)
    axis.set(title="mean absolute error in held-out holes", xlabel="step", ylim=(0, None))
    axis.legend(fontsize=8)
    if eager is not None:
        _draw_difference(next(free), steps, fused["total"], eager["total"], first_compared)
    for name, weight in weights.items():
        draw_loss(name, weighed(name, weight), weight)
    for axis in free:
        axis.set_visible(False)
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.title.set_fontsize(10)
    write_png(figure, path)


def _draw_difference(
    axis: Any, steps: NDArray[Any], fused: NDArray[np.float64], eager: NDArray[np.float64], first: int
) -> None:
    compared = slice(first, first + len(eager))
    difference = np.abs(fused[compared] - eager) / np.abs(eager)
    # Equal losses would fall off a logarithmic axis.
    shown = np.maximum(difference, EQUAL)
    axis.plot(steps[compared], shown, ".", color=EAGER, markersize=3)
    axis.set(
        title=f"|fused - eager| / eager, at most {difference.max():.1e}",
        xlabel="step",
        yscale="log",
        ylim=(EQUAL / 2, max(1e-5, 3 * float(shown.max()))),
    )
    axis.annotate("equal", (0, EQUAL), (4, 3), ("axes fraction", "data"), "offset points", fontsize=8)


def _smooth(
    steps: NDArray[Any], values: NDArray[np.float64], run: int
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Means over a 25th of the ``run``, the same for both curves."""
    window = min(max(1, run // 25), len(values))
    mean = np.convolve(values, np.ones(window) / window, mode="valid")
    return steps[window - 1 :], mean
