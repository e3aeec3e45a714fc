"""Tables and plots from the CSV files of `benchmarks/results`, and from nothing else.

python -m benchmarks.report            rewrites the block of README.md and the plots
python -m benchmarks.report --check    fails when the block does not match the CSV files
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import need
from .harness import SMALL_NUMEL
from .machine import ROOT
from .run import RESULTS
from .table import read_rows

# What is generated in the README, by what stands in its markers.
MARKERS = {name: (f"<!-- {name}:start -->", f"<!-- {name}:end -->") for name in ("bench", "methods")}
START, END = MARKERS["bench"]
_OWN = "ik-"
_HEADER = (
    "op", "case", "dtype", "eager", "rewrite", "compile", "ours", "variant", "vs eager", "vs compile", "of plain",
    "forward / backward, share of a copy", "kept for backward, MB: ours / eager / compile",
)  # fmt: skip
_HOST_HEADER = "host: ours / eager / compile"
_METHOD = """\
Forward + backward, medians of one interleaved run per case. *eager*: the formula as published code writes it;
*rewrite*: the best way known to write it by hand; *compile*: the fastest of `torch.compile` of either, under
several settings on a GPU; *of plain*: our time as a share of that of the plain convolutions alone, without masks;
*variant*: the backend of ours, or for `perceptual` how many samples it streams at a time. Each one is checked
against float64 before it is timed. Share of a copy: the fewest bytes any implementation has to move, per second,
against a large copy measured in the same run; left out where the data fit in the caches or convolutions take the
time. Stock heap: freed memory goes back to the system, as in a training, so that temporaries cost page faults; with
a kept heap nobody pays for them. Kept for backward: what autograd holds between the two passes, and in brackets the
same with the inputs it holds on to."""
_HOST = """\
On a GPU, times are those of the device alone and the host's is a column of its own; for the smallest images,
where a step takes as long as the slower of the two, the times are those of the slower one."""
_COLORS = {
    "plain": "#dadce0", "eager": "#9aa0a6", "rewrite": "#5f6368", "compile": "#f2a65a", "compile-rewrite": "#d9792b",
    "compile-tuned": "#a85414", "ik-cpu": "#1a73e8", "ik-triton": "#34a0a4", "ik-cuda": "#1a73e8",
    "ik-plain": "#1a73e8", "ik-chunk1": "#0b3d91", "ik-chunk2": "#34a0a4", "ik-chunk4": "#8ecae6",
}  # fmt: skip

Row = dict[str, str]


@dataclass(frozen=True)
class Group:
    """All rows of one op, case and dtype on one device, by (provider, mode)."""

    op: str
    case: str
    dtype: str
    rows: dict[tuple[str, str], Row]

    def names(self, wanted: Callable[[str], bool], mode: str = "full") -> list[str]:
        return [name for name, of_mode in self.rows if of_mode == mode and wanted(name)]

    def ms(self, name: str) -> float | None:
        """What a step costs: the device's time, but at least the host's where the host is the bottleneck."""
        row = self.rows.get((name, "full"))
        if row is None:
            return None
        p50 = float(row["p50_ms"])
        return max(p50, float(row["host_us"]) / 1e3) if _is_small(row) else p50

    def fastest(self, wanted: Callable[[str], bool]) -> str | None:
        return min(self.names(wanted), key=lambda name: self.ms(name) or math.inf, default=None)


def groups(rows: Sequence[Row]) -> list[Group]:
    """Ops in alphabetic order, cases in the order they stand in the file."""
    by_case: dict[tuple[str, str, str], Group] = {}
    for row in rows:
        key = row["op"], row["case"], row["dtype"]
        group = by_case.setdefault(key, Group(*key, rows={}))
        group.rows[row["provider"], row["mode"]] = row
    return sorted(by_case.values(), key=lambda group: group.op)


def title(rows: Sequence[Row]) -> str:
    """The device, and the versions that all its rows were measured with."""
    first = rows[0]
    device = first["device"] if first["cuda"] else f"{first['device']}, {first['threads']} threads"
    about = [f"torch {_all(rows, 'torch')}"]
    if first["cuda"]:
        about += [f"CUDA {_all(rows, 'cuda')}", f"Triton {_all(rows, 'triton')}"]
    else:
        about.append(f"{_all(rows, 'heap')} heap")
    about += [f"commit {_all(rows, 'commit')}", _all(rows, "date")]
    return f"{device} ({', '.join(about)})"


def _all(rows: Sequence[Row], column: str) -> str:
    return " and ".join(sorted({row[column] for row in rows}))


def table(rows: Sequence[Row]) -> str:
    """Markdown of one device: a line for every case and own backend."""
    on_gpu = bool(rows[0]["cuda"])
    header = [*_HEADER, *([_HOST_HEADER] if on_gpu else [])]
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * 3 + " ---: |" * (len(header) - 3)]
    for group in groups(rows):
        own: list[str | None] = [*group.names(_is_own)]
        for name in own or [None]:
            lines.append("| " + " | ".join(_cells(group, name, on_gpu)) + " |")
    return "\n".join(lines)


def _is_small(row: Row) -> bool:
    return math.prod(int(n) for n in row["shape"].split("x")) <= SMALL_NUMEL


def _is_compile(name: str) -> bool:
    return name.startswith("compile")


def _is_own(name: str) -> bool:
    return name.startswith(_OWN)


def _cells(group: Group, own: str | None, on_gpu: bool) -> list[str]:
    compiled = group.fastest(_is_compile)
    eager, ours = group.ms("eager"), group.ms(own) if own else None
    compile_ms = group.ms(compiled) if compiled else None
    trio = [group.rows.get((name, "full")) if name else None for name in (own, "eager", compiled)]
    cells = [
        f"`{group.op}`",
        group.case,
        group.dtype,
        duration(eager),
        duration(group.ms("rewrite")),
        duration(compile_ms),
        f"**{duration(ours)}**" if ours else "",
        f"`{own.removeprefix(_OWN)}`" if own else "",
        ratio(eager, ours),
        ratio(compile_ms, ours),
        _of_plain(group, ours),
        " / ".join(_share(group, own, mode) for mode in ("forward", "backward")) if own else "",
        " / ".join(_kept(row) for row in trio),
    ]
    if on_gpu:
        cells.append(" / ".join(duration(float(row["host_us"]) / 1e3) if row else "-" for row in trio))
    return cells


def three_digits(value: float) -> str:
    decimals = 2 - math.floor(math.log10(value)) if value > 0 else 0
    return f"{value:.{max(0, decimals)}f}"


def duration(ms: float | None) -> str:
    """Three digits; microseconds below half a millisecond."""
    if ms is None:
        return ""
    return f"{three_digits(ms * 1e3)} µs" if ms < 0.5 else f"{three_digits(ms)} ms"


def ratio(baseline: float | None, ours: float | None) -> str:
    """How many times faster; two decimals where the question is whether it is faster at all."""
    if not baseline or not ours:
        return ""
    times = baseline / ours
    return f"{times:.2f}x" if times < 2 else f"{times:.1f}x" if times < 10 else f"{times:.0f}x"


def _of_plain(group: Group, ours: float | None) -> str:
    plain = group.ms("plain")
    return f"{ours / plain:.2f}" if plain and ours else ""


def _share(group: Group, own: str, mode: str) -> str:
    row = group.rows.get((own, mode))
    if row is None or _is_small(row) or not row["copy_share"] or ("plain", "full") in group.rows:
        return "-"
    return f"{100 * float(row['copy_share']):.0f} %"


def _kept(row: Row | None) -> str:
    if row is None:
        return "-"
    saved, with_inputs = (int(row[c]) / 1e6 for c in ("saved_bytes", "saved_with_inputs_bytes"))
    return f"{saved:.3g} ({with_inputs:.3g})"


def block(results: Path) -> str:
    """What stands between the two markers of README.md."""
    parts = [START]
    for path in sorted(results.glob("*.csv")):
        if rows := read_rows(path):
            copy = statistics.median(float(row["gbps"]) for row in rows if row["provider"] == "copy")
            parts += [f"**{title(rows)}**, copy {copy:.3g} GB/s", table(rows)]
            parts.append(f"![Times on {rows[0]['device']}](benchmarks/results/{path.stem}.png)")
            parts += [_HOST] if rows[0]["cuda"] else []
    parts.append(_METHOD if len(parts) > 1 else "Nothing has been measured yet.")
    return "\n\n".join([*parts, END])


_METHODS_HEADER = (
    "objective", "outside the trunk", "vs eager", "vs compile", "whole loss", "vs eager", "streamed", "vs eager",
    "kept, MB: whole / streamed / eager",
)  # fmt: skip


def methods_block(results: Path) -> str:
    """A line for every method whose objective was timed: outside its trunk, whole, streamed."""
    start, end = MARKERS["methods"]
    parts = [start]
    for path in sorted(results.glob("*.csv")):
        all_groups = groups(read_rows(path))
        # The smallest images show what a call costs the host.
        large = [g for g in all_groups if not _is_small(next(iter(g.rows.values())))]
        outside = {g.case: g for g in large if g.op == "objective_terms"}
        whole = {g.case: g for g in all_groups if g.op == "objective"}
        lines = [
            "| " + " | ".join(_METHODS_HEADER) + " |",
            "| --- |" + " ---: |" * (len(_METHODS_HEADER) - 1),
        ]
        for case in dict.fromkeys([*outside, *whole]):
            lines.append("| " + " | ".join(_method_cells(case, whole.get(case), outside.get(case))) + " |")
        if whole or outside:
            rows = [row for g in (*whole.values(), *outside.values()) for row in g.rows.values()]
            parts += [f"**{title(rows)}**", "\n".join(lines)]
    return "\n\n".join([*parts, end])


def _method_cells(case: str, whole: Group | None, outside: Group | None) -> list[str]:
    cells = [case, "", "", ""]
    if outside is not None:
        ours = outside.ms(outside.fastest(_is_own) or "")
        compiled = outside.ms(outside.fastest(_is_compile) or "")
        cells[1:] = [duration(ours), ratio(outside.ms("eager"), ours), ratio(compiled, ours)]
    if whole is None:
        return [*cells, "", "", "", "", ""]
    for name in ("ik-plain", "ik-chunk1"):
        cells += [duration(whole.ms(name)), ratio(whole.ms("eager"), whole.ms(name))]
    kept = [whole.rows.get((name, "full")) for name in ("ik-plain", "ik-chunk1", "eager")]
    return [*cells, " / ".join(f"{int(row['saved_bytes']) / 1e6:.3g}" if row else "-" for row in kept)]


def update(text: str, new_block: str, markers: tuple[str, str] = (START, END)) -> str:
    """The text with the part between the markers, themselves included, replaced."""
    before, start, rest = text.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not start or not end:
        raise ValueError(f"no {markers[0]} ... {markers[1]} in the README")
    return before + new_block + after


def plot(rows: Sequence[Row], path: Path) -> None:
    """Grouped bars of the forward + backward times: one panel per op, one group per case."""
    need("matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    every = groups(rows)
    ops = sorted({group.op for group in every})
    widest = max(sum(group.op == op for group in every) for op in ops)
    figure, axes = pyplot.subplots(len(ops), 1, figsize=(3.5 + 1.7 * widest, 3.6 * len(ops)), squeeze=False)
    for axis, op in zip(axes[:, 0], ops):
        _panel(axis, [group for group in every if group.op == op])
    handles = {label: h for axis in axes[:, 0] for h, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper right", ncols=len(handles), frameon=False
    )
    figure.suptitle(title(rows), x=0.01, ha="left", fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(axis, cases: list[Group]) -> None:  # type: ignore[no-untyped-def]
    names = [n for n in _COLORS if any((n, "full") in group.rows for group in cases)]
    width = 0.84 / max(1, len(names))
    for i, name in enumerate(names):
        at = [(x, ms, g.rows[name, "full"]) for x, g in enumerate(cases) if (ms := g.ms(name)) is not None]
        xs = [x + (i - (len(names) - 1) / 2) * width for x, _, _ in at]
        times = [ms for _, ms, _ in at]
        spread = [_spread(ms, row) for _, ms, row in at]
        label = f"ours ({name.removeprefix(_OWN)})" if _is_own(name) else name
        bars = axis.bar(xs, times, width * 0.92, color=_COLORS[name], label=label)
        axis.errorbar(xs, times, yerr=list(zip(*spread)), fmt="none", ecolor="black", elinewidth=0.8)
        texts = [three_digits(ms) for ms in times]
        axis.bar_label(bars, texts, padding=2, fontsize=7, rotation=90 if len(names) > 5 else 0)
    axis.set_yscale("log")
    axis.margins(y=0.22)
    axis.set_title(cases[0].op, loc="left", fontsize=10, fontweight="bold")
    axis.set_ylabel("forward + backward, ms")
    axis.set_xticks(
        range(len(cases)), [f"{g.case.replace(' ', chr(10), 1)}\n{g.dtype}" for g in cases], fontsize=8
    )
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)


def _spread(ms: float, row: Row) -> tuple[float, float]:
    """Down to p20 and up to p80; none where the time is the host's, whose spread is not in the file."""
    p50, p20, p80 = (float(row[column]) for column in ("p50_ms", "p20_ms", "p80_ms"))
    return (p50 - p20, p80 - p50) if ms <= p50 * 1.001 else (0.0, 0.0)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.report", description="Tables and plots from the CSV files."
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the CSV files")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument(
        "--check", action="store_true", help="change nothing, fail when README is out of date"
    )
    arguments = parser.parse_args(argv)
    if not arguments.readme.exists():
        print(f"{arguments.readme} does not exist", file=sys.stderr)
        return 1
    text = arguments.readme.read_text(encoding="utf-8")
    try:
        updated = update(text, block(arguments.results))
        if MARKERS["methods"][0] in text:
            updated = update(updated, methods_block(arguments.results), MARKERS["methods"])
    except ValueError as error:
        print(f"{arguments.readme}: {error}", file=sys.stderr)
        return 1
    if arguments.check:
        if updated != text:
            print(f"{arguments.readme} is out of date: run `python -m benchmarks.report`", file=sys.stderr)
        return int(updated != text)
    arguments.readme.write_text(updated, encoding="utf-8")
    for path in sorted(arguments.results.glob("*.csv")):
        if rows := read_rows(path):
            plot(rows, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
