"""Registers, spills and shared memory of every CUDA kernel; exit status 1 when one spills.

    INPAINT_KERNELS_BUILD=cuda python setup.py build_ext --inplace && python tools/ptxas_report.py

Reads build/ptxas.log, which every build of `_C_cuda` writes.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass
class Kernel:
    """What ptxas says about one kernel on one architecture."""

    name: str
    arch: str
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    registers: int = 0
    shared: int = 0

    @property
    def spills(self) -> bool:
        return self.spill_stores > 0 or self.spill_loads > 0


def parse(log: str) -> list[Kernel]:
    kernels: list[Kernel] = []
    for line in log.splitlines():
        if match := ENTRY.search(line):
            kernels.append(Kernel(match[1], match[2]))
        elif kernels and (match := MEMORY.search(line)):
            # A called function has a line of its own; what it spills, its kernel spills.
            last = kernels[-1]
            last.stack = max(last.stack, int(match[1]))
            last.spill_stores += int(match[2])
            last.spill_loads += int(match[3])
        elif kernels and (match := USED.search(line)):
            kernels[-1].registers = int(match[1])
            shared = SHARED.search(line)
            kernels[-1].shared = int(shared[1]) if shared else 0
    return kernels


def demangle(names: list[str]) -> list[str]:
    tool = shutil.which("c++filt")
    if tool is None:
        return names
    run = subprocess.run([tool], input="\n".join(names), text=True, capture_output=True, check=True)
    return run.stdout.splitlines()


def short(name: str) -> str:
    """`void ik::forward<float, (ik::Layout)1>(float const*)` -> `forward<float, (Layout)1>`."""
    depth, end = 0, len(name)
    for index, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            end = index
            break
    return re.sub(r"\b(ik|cuda|c10)::", "", name[:end].removeprefix("void "))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("log", nargs="?", type=Path, default=Path("build/ptxas.log"))
    parser.add_argument("--all", action="store_true", help="every kernel, not only the largest of each file")
    arguments = parser.parse_args()
    if not arguments.log.is_file():
        sys.exit(f"{arguments.log} is missing; build with INPAINT_KERNELS_BUILD=cuda first")
    kernels = parse(arguments.log.read_text())
    if not kernels:
        sys.exit(f"{arguments.log} names no kernel; delete build/ and build again")
    spilling = [kernel for kernel in kernels if kernel.spills]
    largest = sorted(kernels, key=lambda kernel: -kernel.registers)
    rows = largest if arguments.all else spilling + [k for k in largest[:12] if not k.spills]
    print(f"{'arch':<8}{'registers':>10}{'stack':>7}{'spill st/ld':>13}{'shared':>8}  kernel")
    for kernel, name in zip(rows, demangle([kernel.name for kernel in rows]), strict=True):
        spills = f"{kernel.spill_stores}/{kernel.spill_loads}"
        numbers = f"{kernel.registers:>10}{kernel.stack:>7}{spills:>13}{kernel.shared:>8}"
        print(f"{kernel.arch:<8}{numbers}  {short(name)}")
    archs = ", ".join(sorted({kernel.arch for kernel in kernels}))
    print(f"{len(kernels)} kernels for {archs}; {len(spilling)} spill; most registers {largest[0].registers}")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
