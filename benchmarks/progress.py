"""What a run shows while it works: tqdm's bar on a terminal, plain lines in a log or where tqdm is not installed."""

from __future__ import annotations

import sys
import time
from typing import Any

try:
    from tqdm import tqdm
except ImportError:
    tqdm = None


class Progress:
    """`total` steps; used as a context manager."""

    def __init__(self, total: int) -> None:
        self._started = time.monotonic()
        self._bar: Any = None
        if tqdm is not None and sys.stderr.isatty():
            self._bar = tqdm(total=total, unit="step", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def at(self, what: str) -> None:
        """Names the work that begins."""
        if self._bar is not None:
            self._bar.set_description(what)
        else:
            self.write(f"[{time.monotonic() - self._started:6.1f} s] {what}")

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def write(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text)
        else:
            print(text, flush=True)
