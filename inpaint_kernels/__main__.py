"""`python -m inpaint_kernels doctor` and `python -m inpaint_kernels bench`."""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from . import __version__, _doctor


def _bench(arguments: list[str]) -> int:
    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "run.py").is_file():
        print(
            "bench: the benchmarks are part of the source repository, not of the installed package. "
            "Run it from a checkout that is installed with `pip install -e .`, or `make bench` there.",
            file=sys.stderr,
        )
        return 2
    sys.path.insert(0, str(root))
    sys.argv = ["python -m inpaint_kernels bench", *arguments]
    runpy.run_module("benchmarks.run", run_name="__main__")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    # Forwarded as it stands: its options, --help included, are the benchmarks' own.
    if argv[:1] == ["bench"]:
        return _bench(argv[1:])
    parser = argparse.ArgumentParser(prog="python -m inpaint_kernels")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="doctor | bench")
    commands.add_parser("doctor", help="what is installed, which backend runs, why others cannot, what to do")
    commands.add_parser(
        "bench", help="time the kernels against eager and compiled PyTorch (needs a checkout)"
    )
    parser.parse_args(argv)
    return _doctor.main()


if __name__ == "__main__":
    sys.exit(main())
