"""Speed and memory of every op against PyTorch: `benchmarks.run` measures, `benchmarks.report` tells."""

import importlib.util
import os
import sys

# The profiler that counts allocations announces every start and stop on stderr, through the progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


def need(module: str) -> None:
    """Ends the program with what to install where a module of the extra is missing."""
    if importlib.util.find_spec(module) is None:
        print(
            f"bench: {module} is missing; install what the benchmarks need: pip install '.[bench]'",
            file=sys.stderr,
        )
        sys.exit(2)


need("tqdm")
