"""The training example stopped by Ctrl-C or SIGTERM: what it saves, and how the run goes on."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from example_runs import (
    EXAMPLES,
    PIXEL,
    Run,
    assert_same,
    light,
    load,
    narrow,
    photos,
    picks_its_own_backend,
    run,
    two_processes,
)
from torch.optim.optimizer import register_optimizer_step_post_hook

sys.path.insert(0, str(EXAMPLES))

import plots

pytestmark = picks_its_own_backend

Stop = Callable[..., None]


@pytest.fixture
def stop() -> Iterator[Stop]:
    """`stop(at, *signals)` sends the signals to this process while the step after `at` runs, once."""
    hooks = []
    # A background job of a shell ignores SIGINT, and so do the tests started by one.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)

    def stop(at: int, *signals: signal.Signals) -> None:
        steps: list[None] = []

        def hook(*_: Any) -> None:
            steps.append(None)
            if len(steps) == at + 1:
                for number in signals:
                    signal.raise_signal(number)

        hooks.append(register_optimizer_step_post_hook(hook))

    yield stop
    signal.signal(signal.SIGINT, handler)
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_stopped_run_saves_the_step_it_was_in(
    run: Run, tmp_path: Path, stop: Stop, number: signal.Signals
) -> None:
    options = (*PIXEL, "--steps", 10, "--no-compare")
    stop(6, number)
    status, _, err = run(*options)
    out, whole = tmp_path / "out", tmp_path / "whole"
    last = err.splitlines()[-1]
    assert status == 2
    assert f"stopped at step 7. {out / 'checkpoint.pt'} is saved" in last
    assert last.endswith(f"--out {out} --objective pixel --steps 10 --no-compare --resume")
    assert load(out / "checkpoint.pt")["step"] == 7
    assert load(out / "checkpoint.previous.pt")["step"] == 6
    assert run(*options, "--resume")[0] == 0
    assert run(*options, out=whole)[0] == 0
    assert_same(load(whole / "checkpoint.pt"), load(out / "checkpoint.pt"))


def test_second_interrupt_stops_at_once(run: Run, tmp_path: Path, stop: Stop) -> None:
    """A second SIGTERM, which torchrun sends, changes nothing."""
    stop(3, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
    status, _, err = run(*PIXEL, "--steps", 10, "--no-compare")
    assert status == 2
    assert "stopped at step 3; the checkpoint is at step 2" in err.splitlines()[-1]
    assert load(tmp_path / "out" / "checkpoint.pt")["step"] == 2


def test_what_the_shell_has_ignored_stays_ignored(run: Run, stop: Stop) -> None:
    stop(1, signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    assert run(*PIXEL, "--steps", 4, "--no-compare")[0] == 0


def test_stop_while_writing_a_checkpoint(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    sync, calls = os.fsync, []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        # The fifth file written is the checkpoint of step 6, after the two before it and their copies.
        if len(calls) == 5:
            raise KeyboardInterrupt
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    status, _, err = run(*PIXEL, "--steps", 10, "--no-compare")
    assert status == 2
    assert "is at step 4" in err.splitlines()[-1]
    assert load(out / "checkpoint.pt")["step"] == 4
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]


def test_stop_during_the_comparison(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plots, "write_png", interrupted)
    status, _, err = run(*PIXEL, "--steps", 2)
    assert status == 2
    assert "the training is finished" in err


@pytest.mark.slow
def test_processes_stop_after_the_same_step(tmp_path: Path, photos: Path) -> None:
    """One of them is told to; all save, and none waits for another."""
    out = tmp_path / "two"
    options = (*PIXEL, "--images", photos, "--out", out, "--steps", "100000", "--save-every", "5")
    job = two_processes(tmp_path, *options)
    try:
        begin = time.monotonic()
        while not (out / "checkpoint.pt").exists():
            assert job.poll() is None and time.monotonic() - begin < 240, job.communicate()
            time.sleep(0.2)
        workers = [
            int(child)
            for task in Path(f"/proc/{job.pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
        os.kill(workers[-1], signal.SIGTERM)
        _, err = job.communicate(timeout=120)
    finally:
        job.kill()
    stopped = [line for line in err.splitlines() if "stopped at step" in line]
    assert len(stopped) == 1 and "the same torchrun command and --resume" in stopped[0], err
    step = load(out / "checkpoint.pt")["step"]
    assert step % 10 == 0 and f"stopped at step {step}." in stopped[0]
