"""Runs the example of every public function of the installed package; exit status 1 when one fails.

    python tools/smoke.py [--expect cpu|reference]

`--expect`: the backend automatic choice must take for every op on CPU tensors.
"""

from __future__ import annotations

import argparse
import doctest
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch

import inpaint_kernels
from inpaint_kernels import _library


def public(module: types.ModuleType) -> Iterator[tuple[str, Any]]:
    """Functions, modules with a forward and what subpackages export."""
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, types.ModuleType):
            yield from public(value)
        elif isinstance(value, types.FunctionType) or hasattr(value, "forward"):
            yield name, value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--expect", choices=("cpu", "reference"))
    arguments = parser.parse_args()
    print(f"{inpaint_kernels.__file__}, torch {torch.__version__}")
    problems = []
    for name, op in _library.OPS.items():
        backend = op.choose(None, [torch.zeros(())], torch.float32)
        print(f"  {name} runs on {backend}")
        if arguments.expect not in (None, backend):
            problems.append(f"{name} runs on {backend}, not on {arguments.expect}")
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    for name, value in public(inpaint_kernels):
        examples = [test for test in finder.find(value, name) if test.examples]
        if not examples:
            problems.append(f"{name} has no example")
        for test in examples:
            if runner.run(test).failed:
                problems.append(f"the example of {name} fails")
            else:
                print(f"  {name} works")
    print("\n".join(problems) or "every example works")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
