"""Lists of what to run first: `op | case | dtype | providers`, one a line, most important first, `#` for comments.

Of providers, names of `providers.py` separated by spaces, `ik-*` stands for all own ones of the device.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from .harness import Benchmark, Case
from .providers import providers

_DEVICES = ("cpu", "cuda")


class Entry(NamedTuple):
    """One case and the names, or patterns of names, of its providers."""

    benchmark: Benchmark
    case: Case
    providers: tuple[str, ...]


def read(path: Path, benchmarks: Mapping[str, Benchmark]) -> list[Entry]:
    """The entries of a list, in its order; ValueError where a line names what does not exist."""
    return list(_entries(path, benchmarks))


def _entries(path: Path, benchmarks: Mapping[str, Benchmark]) -> Iterator[Entry]:
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            yield _entry([part.strip() for part in text.split("|")], benchmarks)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None


def _entry(parts: list[str], benchmarks: Mapping[str, Benchmark]) -> Entry:
    if len(parts) != 4:
        raise ValueError(f"got {len(parts)} columns, expected op | case | dtype | providers")
    op, name, dtype, names = parts
    if op not in benchmarks:
        raise ValueError(f"no benchmark of {op!r}; there are: {', '.join(benchmarks)}")
    benchmark = benchmarks[op]
    named = [case for case in benchmark.cases if case.name == name]
    if not named:
        cases = dict.fromkeys(case.name for case in benchmark.cases)
        raise ValueError(f"{op} has no case {name!r}; there are: {', '.join(cases)}")
    matches = [case for case in named if case.dtype_name == dtype]
    if not matches:
        raise ValueError(f"{op}, {name}: no dtype {dtype!r}; there are: {[c.dtype_name for c in named]}")
    case, patterns = matches[0], tuple(names.split())
    known = {n for device in _DEVICES for n in providers(benchmark, case, torch.device(device))}
    unknown = [pattern for pattern in patterns if not fnmatch.filter(known, pattern)]
    if unknown or not patterns:
        raise ValueError(f"{op}, {name}: no provider {unknown or ''}; there are: {', '.join(sorted(known))}")
    return Entry(benchmark, case, patterns)
