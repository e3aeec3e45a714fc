"""Rows of results: their columns, the CSV they are kept in, and a few lines of them for the terminal."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

COLUMNS = (
    "op", "case", "provider", "mode", "shape", "dtype", "layout",
    "p50_ms", "p20_ms", "p80_ms", "host_us", "gbps", "copy_share", "peak_mb",
    "saved_bytes", "saved_with_inputs_bytes", "launches",
    "device", "threads", "heap", "torch", "triton", "cuda", "commit", "date",
)  # fmt: skip
_KEY = ("op", "case", "provider", "mode", "dtype", "device", "threads")

Row = Mapping[str, object]


def read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        # Files from before the column was there were measured with a kept heap.
        return [row | {"heap": row.get("heap") or "kept"} for row in csv.DictReader(file)]


def _key(row: Row) -> tuple[str, ...]:
    return tuple(str(row.get(column, "")) for column in _KEY)


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def write_rows(path: Path, rows: Iterable[Row], withdrawn: Iterable[Row] = ()) -> None:
    """Merges rows into the file: a new row replaces the one with its key; `withdrawn` ones lose theirs.

    The file is replaced in one piece, so a run that is killed leaves the results of the cases before.
    """
    merged: dict[tuple[str, ...], Row] = {_key(row): row for row in read_rows(path)}
    for row in withdrawn:
        merged.pop(_key(row), None)
    merged |= {_key(row): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".csv.partial")
    with partial.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([_text(row.get(column)) for column in COLUMNS] for row in merged.values())
    os.replace(partial, path)


def summary(rows: Sequence[Row]) -> str:
    """A few lines for the terminal about one case."""
    full = {str(r["provider"]): r for r in rows if r["mode"] == "full"}
    if not full:
        return ""
    first = next(iter(full.values()))
    lines = [f"{first['op']}  {first['case']}  {first['dtype']}"]
    for name, row in full.items():
        p50, p20, p80 = (float(str(row[c])) for c in ("p50_ms", "p20_ms", "p80_ms"))
        saved = int(str(row["saved_bytes"])) / 1e6
        share = f"  {100 * float(str(row['copy_share'])):5.1f}% of a copy" if row["copy_share"] else ""
        host = "" if row["host_us"] is None else f"  host {float(str(row['host_us'])):7.1f} us"
        lines.append(
            f"  {name:<16} {p50:9.4f} ms ({p20:.4f} - {p80:.4f}){share}  keeps {saved:7.2f} MB{host}"
        )
    return "\n".join(lines)
