"""Speed and memory of every op against PyTorch: `benchmarks.run` measures, `benchmarks.report` tells."""

import os

# The profiler that counts allocations announces every start and stop on stderr, through the progress bar.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
