"""pytest plugin for runs that are short of time: `PYTHONPATH=tools pytest -p pytest_gpu ...`, alone or with xdist.

Every failure is in a file as soon as it happened, so that a run that is stopped loses none. After `--until` tests are
passed over and the run ends in order. A process whose device an illegal access has made useless ends, and xdist
starts another one in its place; else every later test would fail for it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

# Of each failure the end of its traceback, of the first failures; of the others the test's name.
_LINES, _TRACEBACKS = 20, 200


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failures", type=Path, metavar="FILE", help="append failures there as they happen")
    parser.addoption(
        "--until", type=float, metavar="TIME", help="begin no test after this time, as of time.time()"
    )
    parser.addoption("--without", metavar="NAME=VALUE", help="leave out tests with this parameter")


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        # What `timeout` sends ends pytest in order, with its report.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    config.pluginmanager.register(_Recorder(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    name, _, value = (config.getoption("--without") or "").partition("=")
    given = {
        item: item.callspec.params
        for item in items
        if isinstance(item, pytest.Function) and hasattr(item, "callspec")
    }
    dropped = {
        item for item, parameters in given.items() if name in parameters and str(parameters[name]) == value
    }
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


def device_lost() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


class _Recorder:
    def __init__(self, config: pytest.Config) -> None:
        self.path: Path | None = config.getoption("--failures")
        self.until: float | None = config.getoption("--until")
        self.is_worker = hasattr(config, "workerinput")
        self.counts: dict[str, Counter[str]] = {}
        self.collected: Counter[str] = Counter()
        self.failed = 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> bool | None:
        return True if self.until is not None and time.time() > self.until else None

    # Last, so that xdist has sent the report on.
    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if self.is_worker:
            if report.failed and device_lost():
                os._exit(1)
            return
        if report.when == "call" or report.outcome != "passed":
            self.counts.setdefault(_file(report.nodeid), Counter())[report.outcome] += 1
        if report.failed:
            self._failure(report.nodeid, str(report.when), report.longreprtext)
            if not hasattr(report, "node") and device_lost():
                pytest.exit("the device is lost", returncode=3)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.is_worker:
            self._failure(report.nodeid, "collection", report.longreprtext)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.collected.update(_file(item.nodeid) for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self.collected = Counter(map(_file, ids))

    # Not in the terminal's summary, which `--no-summary` leaves out with the tracebacks. First, because xdist then
    # waits for its processes, which may take longer than there is time.
    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        terminal: Any = session.config.pluginmanager.get_plugin("terminalreporter")
        if self.is_worker or terminal is None:
            return
        terminal.write_line("")
        for name, total in self.collected.items():
            counts = self.counts.get(name, Counter())
            left = total - sum(counts.values())
            text = ", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())) or "none run"
            terminal.write_line(f"{name}: {text}" + (f", {left} left out" if left > 0 else ""))

    def _failure(self, name: str, when: str, text: str) -> None:
        self.failed += 1
        if self.path is None:
            return
        shown = text.splitlines()[-_LINES:] if self.failed <= _TRACEBACKS else []
        with self.path.open("a") as file:
            file.write(
                "".join(f"{line}\n" for line in (f"FAILED {name} ({when})", *(f"    {s}" for s in shown)))
            )


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]
