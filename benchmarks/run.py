"""Runs benchmarks and writes their results: `python -m benchmarks.run --help`.

The heap is the one a training process has: what the C library hands back to the system has to be faulted in
again, page by page, and formulas with large temporaries pay for that in every step of a real training. Only
`--keep-heap` leaves these page faults out, to see the arithmetic alone; the column `heap` says which it was.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import torch
import torch._inductor.config

from . import __path__ as _package_path
from . import priority
from .harness import MODES, Benchmark, Case, tiny
from .machine import ROOT, environment, slug
from .measure import DeviceLostError, keep_heap
from .progress import Progress
from .providers import Refusal, providers
from .session import Report, compile_case, measure_case, work_units
from .table import Row, summary, write_rows

RESULTS = ROOT / "benchmarks" / "results"
# Exit status after an error that leaves the device unusable for this process.
LOST = 3


class Work(NamedTuple):
    """One case and the names of the providers to time."""

    benchmark: Benchmark
    case: Case
    names: list[str]

    def __str__(self) -> str:
        return f"{self.benchmark.op} {self.case.name} {self.case.dtype_name}"


def discover() -> dict[str, Benchmark]:
    """Every `bench_<op>.py` of this folder, by op."""
    modules = sorted(m.name for m in pkgutil.iter_modules(_package_path) if m.name.startswith("bench_"))
    benchmarks = [importlib.import_module(f"{__package__}.{name}").BENCHMARK for name in modules]
    return {benchmark.op: benchmark for benchmark in benchmarks}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.run", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    add = parser.add_argument
    add("ops", nargs="*", help="ops to run (default: all)")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--threads", type=int, default=2, help="CPU threads (default: 2)")
    add("--rounds", type=int, help="interleaved rounds a case (default: 30, of slow ops 5; --quick: 3 and 2)")
    add("--quick", action="store_true", help="smallest cases, few rounds; saved only with --out")
    add("--tiny", action="store_true", help="every case at a size for rehearsals; else like --quick")
    add("--out", type=Path, help=f"folder of the CSV (default: {RESULTS.relative_to(ROOT)})")
    add("--dtypes", nargs="+", metavar="DTYPE", help="only these, such as float32 bfloat16")
    add("--providers", nargs="+", metavar="NAME", help="only these, such as eager compile 'ik-*'")
    add("--cases", metavar="TEXT", help="only cases whose name contains this")
    add(
        "--priority",
        type=Path,
        metavar="FILE",
        help="only the cases and providers of this list, in its order",
    )
    add("--compile-only", action="store_true", help="fill torch.compile's cache; time and save nothing")
    add("--deadline", type=float, metavar="SECONDS", help="begin no case later than this")
    add(
        "--resume",
        type=Path,
        metavar="FILE",
        help="note cases there as they begin; leave out those noted before",
    )
    add("--failures", type=Path, metavar="FILE", help="append whatever is wrong to this file as it happens")
    add(
        "--keep-heap",
        action="store_true",
        help="keep freed memory, which spares every formula its page faults; saved only with --out",
    )
    add("--commit", help="recorded commit, where the tree has no git")
    return parser.parse_args(argv)


def matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _work(
    available: Mapping[str, Benchmark], device: torch.device, arguments: argparse.Namespace
) -> list[Work]:
    """What was asked for; ValueError when a name stands for nothing."""
    if unknown := [op for op in arguments.ops if op not in available]:
        raise ValueError(f"no benchmark of {', '.join(unknown)}; there are: {', '.join(available)}")
    if arguments.priority:
        entries = priority.read(arguments.priority, available)
    else:
        entries = [priority.Entry(b, case, ("*",)) for b in available.values() for case in b.cases]
    begun = (
        arguments.resume.read_text().splitlines() if arguments.resume and arguments.resume.exists() else []
    )
    work, known = [], set()
    for benchmark, case, patterns in entries:
        if (
            benchmark.op not in (arguments.ops or available)
            or (device.type not in case.devices and not arguments.tiny)
            or (arguments.quick and not case.quick)
            or (arguments.dtypes is not None and case.dtype_name not in arguments.dtypes)
            or (arguments.cases is not None and arguments.cases not in case.name)
        ):
            continue
        names = matching(providers(benchmark, case, device), patterns)
        known.update(names)
        if arguments.providers is not None:
            names = matching(names, arguments.providers)
        if arguments.compile_only:
            names = [name for name in names if name.startswith("compile")]
        item = Work(benchmark, tiny(case) if arguments.tiny else case, names)
        if names and str(item) not in begun:
            work.append(item)
    if missing := [name for name in arguments.providers or () if not fnmatch.filter(known, name)]:
        raise ValueError(f"nothing to run: no provider {', '.join(missing)}")
    if not work and not begun:
        raise ValueError("nothing to run: no such case")
    return work


def main(argv: Sequence[str] | None = None, benchmarks: Mapping[str, Benchmark] | None = None) -> int:
    """The command line; returns 1 when a provider was wrong, or none of what was asked for exists."""
    started = monotonic()
    arguments = parse(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("--device cuda: this torch sees no CUDA device", file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    if arguments.keep_heap and not keep_heap():
        print("--keep-heap: this C library cannot", file=sys.stderr)
        return 1
    if device.type == "cuda":
        # Its convolutions would round float32 to TF32, and no formula would pass its check.
        torch.backends.cudnn.allow_tf32 = False
        # What was fastest while others used the GPU, as beside `--compile-only`, would be taken for good.
        torch._inductor.config.autotune_local_cache = False
    try:
        work = _work(discover() if benchmarks is None else benchmarks, device, arguments)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    save = not (arguments.quick or arguments.tiny or arguments.keep_heap)
    folder = arguments.out or (RESULTS if save else None)
    path = (
        folder / f"{slug(device, arguments.threads)}.csv" if folder and not arguments.compile_only else None
    )
    return _Run(arguments, device, path, started).all(work)


class _Run:
    """What the cases of one call of `main` share."""

    def __init__(
        self, arguments: argparse.Namespace, device: torch.device, path: Path | None, started: float
    ) -> None:
        self.arguments, self.device, self.path = arguments, device, path
        self.end = None if arguments.deadline is None else started + arguments.deadline
        self.about = environment(device) | {"heap": "kept" if arguments.keep_heap else "stock"}
        if arguments.commit:
            self.about["commit"] = arguments.commit
        self.quick = arguments.quick or arguments.tiny
        self.red = False

    def rounds(self, benchmark: Benchmark) -> int:
        return self.arguments.rounds or benchmark.rounds(self.quick)

    def all(self, work: Sequence[Work]) -> int:
        """Every case in turn, whatever becomes of the ones before; the exit status."""
        total = sum(
            len(w.names) if self.arguments.compile_only else work_units(w.names, self.rounds(w.benchmark))
            for w in work
        )
        with Progress(total) as self.progress:
            for done, item in enumerate(work):
                if self.end is not None and monotonic() >= self.end:
                    left = "; ".join(map(str, work[done:]))
                    self.progress.write(f"time is up, {len(work) - done} left out: {left}")
                    break
                if self.arguments.resume:
                    _append(self.arguments.resume, str(item))
                self.progress.at(str(item))
                try:
                    self._one(item)
                except DeviceLostError as error:
                    self._failure(item, str(error))
                    return LOST
                # Whatever a case dies of, the next one may live.
                except Exception as error:
                    self._failure(item, f"{type(error).__name__}: {error}")
        if self.arguments.compile_only:
            print("nothing timed: --compile-only")
        else:
            print("not saved: give --out DIR" if self.path is None else f"saved to {self.path}")
        return int(self.red)

    def _one(self, item: Work) -> None:
        if self.arguments.compile_only:
            for refusal in compile_case(item.benchmark, item.case, self.device, item.names):
                if refusal is not None:
                    self._refusal(item, refusal)
                self.progress.step()
            return
        for report in measure_case(
            item.benchmark,
            item.case,
            self.device,
            names=item.names,
            rounds=self.rounds(item.benchmark),
            burst_ms=5.0 if self.quick else 40.0,
            copy_bytes=(8 << 20) if self.quick else None,
        ):
            if report is None:
                self.progress.step()
            else:
                self._publish(item, report)

    def _publish(self, item: Work, report: Report) -> None:
        """Prints and saves one case; what was refused loses the rows of runs before."""
        if text := summary(report.rows):
            self.progress.write(text)
        withdrawn: list[Row] = []
        for refusal in report.refusals:
            self._refusal(item, refusal)
            label = {"op": item.benchmark.op, "case": item.case.name, "dtype": item.case.dtype_name}
            label["provider"] = refusal.provider
            withdrawn += [{**self.about, **label, "mode": mode} for mode in MODES]
        if self.path is not None:
            write_rows(self.path, [{**row, **self.about} for row in report.rows], withdrawn)

    def _refusal(self, item: Work, refusal: Refusal) -> None:
        """Red when a provider was wrong, or was asked for by name and cannot run."""
        if refusal.red or self.arguments.providers is not None:
            kind = "RED, not timed" if refusal.red else "left out"
            self._failure(item, f"{refusal.provider}: {kind}: {refusal.reason}")
        else:
            self.progress.write(f"{item}  {refusal.provider}: left out: {refusal.reason}")

    def _failure(self, item: Work, text: str) -> None:
        self.red = True
        self.progress.write(f"{item}  {text}")
        if self.arguments.failures:
            _append(self.arguments.failures, f"{item}  {text}")


def _append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(f"{line}\n")


if __name__ == "__main__":
    raise SystemExit(main())
