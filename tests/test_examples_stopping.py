"""The training example stopped by Ctrl-C or SIGTERM: what it saves, and how the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="the examples need pillow, matplotlib and tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
from harness import INTERPRETING
from PIL import Image

import inpaint_kernels as ik

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import engine
import plots
import train

pytestmark = pytest.mark.skipif(INTERPRETING, reason="the example picks its own backend")

TINY = ["--device", "cpu", "--size", "32", "--width", "4", "--batch", "2", "--save-every", "2"]
TINY += ["--objective", "pixel"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def run(
    tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    monkeypatch.setattr(plots, "write_png", lambda figure, path: plots.plt.close(figure))

    def call(*options: object, out: Path = tmp_path / "out") -> tuple[int, str, str]:
        status = train.main([*TINY, "--images", str(photos), "--out", str(out), *map(str, options)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def stop_in_step(patch: pytest.MonkeyPatch, at: int, *signals: signal.Signals) -> None:
    """Sends the signals to this process while the step after `at` runs, that is before it counts."""
    step = engine.Trainer._one_step

    def stopped(trainer: engine.Trainer, *args: Any) -> None:
        step(trainer, *args)
        if trainer.step == at:
            for number in signals:
                signal.raise_signal(number)

    patch.setattr(engine.Trainer, "_one_step", stopped)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_stopped_run_saves_the_step_it_was_in(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    # A background job of a shell ignores SIGINT, and so do the tests started by one.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with monkeypatch.context() as patch:
            stop_in_step(patch, 6, number)
            status, _, err = run("--steps", 10, "--no-compare")
    finally:
        signal.signal(signal.SIGINT, handler)
    out = tmp_path / "out"
    last = err.splitlines()[-1]
    assert status == 2
    assert f"stopped at step 7. {out / 'checkpoint.pt'} is saved" in last
    assert last.endswith(f"--out {out} --steps 10 --no-compare --resume")
    assert load(out / "checkpoint.pt")["step"] == 7
    assert load(out / "checkpoint.previous.pt")["step"] == 6
    assert run("--steps", 10, "--no-compare", "--resume")[0] == 0
    assert run("--steps", 10, "--no-compare", out=tmp_path / "whole")[0] == 0
    whole, stopped = (load(folder / "checkpoint.pt") for folder in (tmp_path / "whole", out))
    assert torch.equal(whole["history"], stopped["history"]) and whole["held_out"] == stopped["held_out"]
    for name, value in whole["model"].items():
        assert torch.equal(value, stopped["model"][name])


def test_stopped_before_the_first_checkpoint_was_due(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second SIGTERM, which torchrun sends, changes nothing."""
    stop_in_step(monkeypatch, 0, signal.SIGTERM, signal.SIGTERM)
    assert run("--steps", 10, "--save-every", 10, "--no-compare")[0] == 2
    assert load(tmp_path / "out" / "checkpoint.pt")["step"] == 1


def test_second_interrupt_stops_at_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_in_step(monkeypatch, 3, signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
    status, _, err = run("--steps", 10, "--no-compare")
    assert status == 2
    assert "stopped at step 3; the checkpoint is at step 2" in err.splitlines()[-1]
    assert load(tmp_path / "out" / "checkpoint.pt")["step"] == 2


def test_stopped_in_the_last_step(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_in_step(monkeypatch, 3, signal.SIGTERM)
    status, _, err = run("--steps", 4)
    assert status == 2
    assert "the training is finished" in err.splitlines()[-1]


def test_what_the_shell_has_ignored_stays_ignored(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_in_step(monkeypatch, 1, signal.SIGINT)
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert run("--steps", 4, "--no-compare")[0] == 0
    finally:
        signal.signal(signal.SIGINT, handler)


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
    status, _, err = run("--steps", 10, "--no-compare")
    assert status == 2
    assert "is at step 4" in err.splitlines()[-1]
    assert load(out / "checkpoint.pt")["step"] == 4
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.previous.pt", "checkpoint.pt"]


def test_stop_during_the_comparison(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = train.Job._write_pictures

    def stopped(job: train.Job, *args: Any) -> None:
        validate(job, *args)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Job, "_write_pictures", stopped)
    status, _, err = run("--steps", 2)
    assert status == 2
    assert "the training is finished" in err


@pytest.mark.slow
def test_processes_stop_after_the_same_step(tmp_path: Path, photos: Path) -> None:
    """One of them is told to; all save, and none waits for another."""
    out = tmp_path / "two"
    package = Path(ik.__file__).resolve().parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    program = [train.__file__, *TINY, "--images", str(photos), "--out", str(out), "--steps", "100000"]
    job = subprocess.Popen(
        [*launch, *program, "--save-every", "5"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
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
