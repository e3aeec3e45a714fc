"""Runs benchmarks and writes their results: `python -m benchmarks.run --help`.

The heap is the one a training process has: what the C library hands back to the system has to be faulted in
again, page by page, and formulas with large temporaries pay for that in every step of a real training. Only
`--keep-heap` leaves these page faults out, to see the arithmetic alone; the column `heap` says which it was.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib
import importlib.metadata
import os
import pkgutil
import platform
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from . import __path__ as _package_path
from .harness import MODES, Benchmark, Case
from .measure import keep_heap
from .providers import providers
from .session import Report, measure_case, work_units

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

COLUMNS = (
    "op", "case", "provider", "mode", "shape", "dtype", "layout",
    "p50_ms", "p20_ms", "p80_ms", "host_us", "gbps", "copy_share", "peak_mb",
    "saved_bytes", "saved_with_inputs_bytes", "launches",
    "device", "threads", "heap", "torch", "triton", "cuda", "commit", "date",
)  # fmt: skip
_KEY = ("op", "case", "provider", "mode", "dtype", "device", "threads")

Row = Mapping[str, object]


def discover() -> dict[str, Benchmark]:
    """Every `bench_<op>.py` of this folder, by op."""
    modules = sorted(m.name for m in pkgutil.iter_modules(_package_path) if m.name.startswith("bench_"))
    found = [importlib.import_module(f"{__package__}.{name}").BENCHMARK for name in modules]
    return {benchmark.op: benchmark for benchmark in found}


def device_name(device: torch.device) -> str:
    """The model as its driver or the system calls it; of a CPU the instruction set that torch uses as well."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    model = " ".join(found[1].split()) if found else platform.processor() or platform.machine()
    # Virtual machines call several generations of a processor by one name.
    return f"{model} {torch.backends.cpu.get_cpu_capability()}"


def slug(device: torch.device, threads: int) -> str:
    """File name of a device's results."""
    name = device_name(device) if device.type == "cuda" else f"cpu {device_name(device)} {threads}threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The short commit of the working tree, `+dirty` if something other than results was changed since."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+dirty" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def environment(device: torch.device) -> dict[str, object]:
    """The columns that are the same in every row of a run."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": (torch.version.cuda or torch.version.hip or "") if device.type == "cuda" else "",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }


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


def summary(report: Report) -> str:
    """A few lines for the terminal about one case."""
    full = {str(r["provider"]): r for r in report.rows if r["mode"] == "full"}
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


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.run", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("ops", nargs="*", help="ops to run (default: all)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument(
        "--rounds",
        type=int,
        help="interleaved rounds a case (default: 30, of slow ops 5; with --quick 3 and 2)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="smallest cases, few rounds; saved only with --out"
    )
    parser.add_argument("--out", type=Path, help=f"folder of the CSV (default: {RESULTS.relative_to(ROOT)})")
    parser.add_argument("--dtypes", nargs="+", metavar="DTYPE", help="only these, such as float32 bfloat16")
    parser.add_argument(
        "--providers", nargs="+", metavar="NAME", help="only these, such as eager compile ik-cpu"
    )
    parser.add_argument("--cases", metavar="TEXT", help="only cases whose name contains this")
    parser.add_argument(
        "--keep-heap",
        action="store_true",
        help="keep freed memory, which spares every formula its page faults; saved only with --out",
    )
    parser.add_argument("--commit", help="recorded commit, where the tree has no git")
    return parser.parse_args(argv)


def _selected(benchmark: Benchmark, arguments: argparse.Namespace) -> list[Case]:
    return [
        case
        for case in benchmark.cases
        if arguments.device in case.devices
        and (case.quick or not arguments.quick)
        and (arguments.dtypes is None or case.dtype_name in arguments.dtypes)
        and (arguments.cases is None or arguments.cases in case.name)
    ]


def main(argv: Sequence[str] | None = None, benchmarks: Mapping[str, Benchmark] | None = None) -> int:
    """The command line; returns 1 when a provider was wrong, or none of what was asked for exists."""
    arguments = parse(argv)
    available = discover() if benchmarks is None else benchmarks
    unknown = [op for op in arguments.ops if op not in available]
    if unknown:
        print(f"no benchmark of {', '.join(unknown)}; there are: {', '.join(available)}", file=sys.stderr)
        return 1
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: this torch sees no CUDA device", file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    if arguments.keep_heap and not keep_heap():
        print("--keep-heap: this C library cannot", file=sys.stderr)
        return 1
    device = torch.device(arguments.device)
    work = [
        (b, case)
        for op, b in available.items()
        if op in (arguments.ops or available)
        for case in _selected(b, arguments)
    ]
    known = {name for b, case in work for name in providers(b, case, device)}
    missing = [name for name in arguments.providers or () if name not in known]
    if not work or missing:
        print(
            f"nothing to run: {'no provider ' + ', '.join(missing) if missing else 'no such case'}",
            file=sys.stderr,
        )
        return 1
    if arguments.out is None and not arguments.quick and not arguments.keep_heap:
        arguments.out = RESULTS
    path = arguments.out / f"{slug(device, arguments.threads)}.csv" if arguments.out else None
    return _run(work, device, path, arguments)


def _run(
    work: Sequence[tuple[Benchmark, Case]],
    device: torch.device,
    path: Path | None,
    arguments: argparse.Namespace,
) -> int:
    about = environment(device) | {"heap": "kept" if arguments.keep_heap else "stock"}
    if arguments.commit:
        about["commit"] = arguments.commit
    red = False
    rounds = {b.op: arguments.rounds or b.rounds(arguments.quick) for b, _ in work}
    total = sum(work_units(b, case, device, arguments.providers, rounds[b.op]) for b, case in work)
    with tqdm(total=total, unit="step", dynamic_ncols=True, disable=None) as bar:
        for benchmark, case in work:
            bar.set_description(f"{benchmark.op} {case.name} {case.dtype_name}")
            for report in measure_case(
                benchmark,
                case,
                device,
                names=arguments.providers,
                rounds=rounds[benchmark.op],
                burst_ms=5.0 if arguments.quick else 40.0,
                copy_bytes=(8 << 20) if arguments.quick else None,
            ):
                if report is None:
                    bar.update()
                    continue
                red |= _publish(bar, benchmark, case, report, about, path, arguments.providers)
    if path is None:
        print("not saved: give --out DIR")
    else:
        print(f"saved to {path}")
    return int(red)


def _publish(
    bar: tqdm,
    benchmark: Benchmark,
    case: Case,
    report: Report,
    about: Row,
    path: Path | None,
    asked_by_name: Sequence[str] | None,
) -> bool:
    """Prints and saves one case; True when a provider was wrong, or was asked for by name and cannot run."""
    if text := summary(report):
        bar.write(text)
    bad = False
    withdrawn = []
    for refusal in report.refusals:
        bad |= refusal.red or asked_by_name is not None
        kind = "RED, not timed" if refusal.red else "left out"
        bar.write(f"{benchmark.op}  {case.name}  {case.dtype_name}")
        bar.write(f"  {refusal.provider:<16} {kind}: {refusal.reason}")
        for mode in MODES:
            label = {"op": benchmark.op, "case": case.name, "provider": refusal.provider, "mode": mode}
            withdrawn.append({**about, **label, "dtype": case.dtype_name})
    if path is not None:
        write_rows(path, [{**row, **about} for row in report.rows], withdrawn)
    return bad


if __name__ == "__main__":
    raise SystemExit(main())
