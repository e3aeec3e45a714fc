"""What the tests of the benchmark tools share: a benchmark of a tiny formula, and a run of it in this process."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import harness, run, table
from benchmarks.harness import Benchmark, Bytes, Case, Formula

CPU = torch.device("cpu")
FIRST, SECOND = Case((1, 3, 8, 8), "first", quick=True), Case((1, 3, 8, 8), "second", quick=True)

# Exit status, rows and failures of a run of the benchmarks.
Result = tuple[int, list[dict[str, str]], str]
Call = Callable[..., Result]


def mean_l1(case: Case, backend: str = "") -> Formula:
    return lambda pred, target, mask: (((pred - target).abs() * mask).sum() / (3 * mask.sum()),)


def benchmark(**changes: object) -> Benchmark:
    made = Benchmark(
        op="op",
        cases=[FIRST],
        make_inputs=harness.image_inputs,
        eager=mean_l1,
        fused=mean_l1,
        minimum_bytes=lambda case: Bytes(8 * case.numel, 4 * case.numel),
        tolerances={torch.float32: 1e-5},
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture
def call(tmp_path: Path) -> Call:
    def call(benchmarks: Benchmark | Mapping[str, Benchmark], *arguments: str) -> Result:
        if isinstance(benchmarks, Benchmark):
            benchmarks = {benchmarks.op: benchmarks}
        failures, threads = tmp_path / "failures.txt", torch.get_num_threads()
        command = ["--quick", "--threads", "1", "--out", str(tmp_path), "--failures", str(failures)]
        try:
            status = run.main([*command, *arguments], benchmarks)
        finally:
            torch.set_num_threads(threads)
        rows = [row for path in tmp_path.glob("*.csv") for row in table.read_rows(path)]
        return status, rows, failures.read_text() if failures.exists() else ""

    return call
