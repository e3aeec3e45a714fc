"""The GPU run: what it asks of its tools, and that no stage stops another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_cases import CPU, benchmark, mean_l1

from benchmarks import run
from benchmarks.harness import Case, Formula
from inpaint_kernels import _library

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import gpu_smoke
import gpu_smoke_checks

ROOT = Path(__file__).resolve().parent.parent

TESTS = """
import os, pathlib, pytest, pytest_gpu

if pathlib.Path("lost").exists():
    pytest_gpu.device_lost = lambda: True

@pytest.mark.parametrize("size", ["batch", "one", "two", "three"])
def test_size(size):
    assert size != "one", "not this one"

@pytest.mark.parametrize("kind", ["batch"])
def test_kind(kind):
    assert kind == "batch"
"""


def pytest_run(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Exit status, output and failures of pytest with the plugin."""
    (folder / "test_it.py").write_text(TESTS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pytest_gpu", "-p", "no:cacheprovider"]
    command += ["--no-summary", "--tb=short", "--failures", "failures.txt", "--without", "size=batch"]
    command += arguments
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    failures = folder / "failures.txt"
    return done.returncode, done.stdout + done.stderr, failures.read_text() if failures.exists() else ""


def test_plugin_notes_failures_counts_tests_and_leaves_out_a_parameter(tmp_path: Path) -> None:
    status, output, failures = pytest_run(tmp_path)
    assert status == 1
    assert "test_it.py: 1 failed, 3 passed\n" in output
    assert failures.startswith("FAILED test_it.py::test_size[one] (call)\n    test_it.py:9: in test_size\n")
    assert "E   AssertionError: not this one" in failures


def test_plugin_ends_a_run_in_order_when_time_is_up(tmp_path: Path) -> None:
    status, output, failures = pytest_run(tmp_path, "--until", "0")
    assert (status, failures) == (0, "")
    assert "test_it.py: none run, 4 left out\n" in output


def test_plugin_replaces_a_process_that_lost_its_device(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    (tmp_path / "lost").touch()
    status, output, failures = pytest_run(tmp_path, "-p", "xdist", "-n", "1")
    assert status == 1
    assert "node down" in output
    assert "2 failed, 3 passed" in output
    assert "E   AssertionError: not this one" in failures
    assert failures.count("\nFAILED") + 1 == 2
    # Alone it can only stop.
    status, output, _ = pytest_run(tmp_path)
    assert status == 3
    assert "the device is lost" in output


def test_smoke_has_every_op_and_what_breaks_kernels() -> None:
    assert set(gpu_smoke.OPS) == set(_library.OPS)
    assert set(gpu_smoke.WITHOUT_CUDA) == {n for n, op in _library.OPS.items() if "cuda" not in op.backends}
    for op in gpu_smoke.OPS:
        cases = list(gpu_smoke_checks.cases(run.discover()[op], tiny=False))
        kinds = {(case.dtype_name, case.layout) for case in cases}
        assert len(kinds) == 4
        for size in ((1, 1), (9, 8), (9, 1), (131, 203), (128, 256)):
            size = tuple(max(side, gpu_smoke_checks.LEAST.get(op, 1)) for side in size)
            assert {(c.dtype_name, c.layout) for c in cases if c.shape[2:] == size} == kinds, (op, size)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (lambda loss: loss, None),
        (lambda loss: loss * 1.001, "float64 gives"),
        (lambda loss: 0 * loss + torch.empty_like(loss), "got nan where float64 gives"),
        (lambda loss: loss + torch.rand(()) * 1e-7, "same bits"),
    ],
)
def test_smoke_finds_a_wrong_kernel(monkeypatch, capsys, wrong, complaint: str | None) -> None:
    def fused(case: Case, backend: str) -> Formula:
        right = mean_l1(case)
        return right if backend == "reference" else lambda **inputs: (wrong(right(**inputs)[0]),)

    made = benchmark(op="masked_l1", fused=fused, tolerances={torch.float32: 1e-5, torch.bfloat16: 2.0**-6})
    monkeypatch.setattr(gpu_smoke_checks, "discover", lambda: {"masked_l1": made})
    status = gpu_smoke_checks.check("masked_l1", "cpu", CPU, tiny=True, bare=False)
    output = capsys.readouterr().out
    assert status == (complaint is not None)
    assert complaint is None or complaint in output
    assert "ok  masked_l1 cpu float32 nchw 2x3x9x13 first" in output or "float64 gives" in complaint


def test_smoke_waits_for_nobody(tmp_path: Path, capsys, monkeypatch) -> None:
    def jobs(arguments: object, folder: Path) -> list[gpu_smoke.Job]:
        commands = {"good": "echo ok  one", "bad": "echo ok  one; echo RED two; exit 1", "slow": "sleep 60"}
        shell = [(name, ["sh", "-c", command]) for name, command in commands.items()]
        return [gpu_smoke.Job(name, command, dict(os.environ), folder / name) for name, command in shell]

    monkeypatch.setattr(gpu_smoke, "jobs", jobs)
    monkeypatch.setattr(gpu_smoke.signal, "signal", lambda *arguments: None)
    failures, until = tmp_path / "failures.txt", gpu_smoke.time.time() + 1
    assert gpu_smoke.main(["--until", str(until), "--failures", str(failures)]) == 1
    output = capsys.readouterr().out
    assert "ok  good: 1 checks passed" in output
    assert "RED bad: 1 checks passed" in output
    assert "slow did not end in time\nRED slow" in output
    assert failures.read_text() == "FAILED smoke bad\n    RED two\nFAILED smoke slow\n"


STAGES = ("report", "smoke", "sanitizer", "cuda", "triton", "fill", "bench")
needs_timeout = pytest.mark.skipif(shutil.which("timeout") is None, reason="needs GNU timeout")
FAKE_PYTHON = """#!/bin/sh
echo "$*" >>"$LOG"
case "$*" in
  *--sanitizer*) exit 0 ;;
  *gpu_smoke*) echo "no kernel" >&2; exit 1 ;;
  *--compile-only*) exit 0 ;;
  *benchmarks.run*) [ -e "$LOG.second" ] || { touch "$LOG.second"; exit ${BENCH_CODE:-0}; } ;;
  *pytest*) sleep "${PYTEST_SECONDS:-0}" ;;
esac
"""


def gpu_run(folder: Path, *arguments: str, **environment: str) -> tuple[int, dict[str, str], list[str]]:
    """Exit code, what became of each stage, and the commands, of the script with a Python that does nothing."""
    python, out, log = folder / "python", folder / "out", folder / "log"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    variables = {**os.environ, "PYTHON": str(python), "OUT": str(out), "LOG": str(log), **environment}
    done = subprocess.run(
        [str(ROOT / "tools" / "gpu_run.sh"), "--device", "cpu", *arguments],
        env=variables,
        capture_output=True,
        text=True,
    )
    summary = out / "summary.txt"
    lines = summary.read_text().splitlines() if summary.exists() else []
    stages = {line.split()[1].rstrip(":"): line.partition(": ")[2].partition(",")[0] for line in lines}
    return done.returncode, stages, log.read_text().splitlines() if log.exists() else [done.stdout]


@needs_timeout
def test_no_stage_stops_another_and_the_exit_code_says_which_were_red(tmp_path: Path) -> None:
    code, stages, commands = gpu_run(tmp_path)
    assert code == 2
    assert stages == dict.fromkeys(STAGES, "ok") | {"smoke": "RED (1)"}
    tests = [command for command in commands if "-m pytest" in command]
    assert len(tests) == 2
    for command in tests:
        files = [word for word in command.split() if word.startswith("tests/")]
        assert all((ROOT / name).is_file() for name in files)
        assert len(set(files)) == len(files)
        assert files[0] == "tests/test_partial_conv_kernels.py"
        assert {f"tests/test_{op}.py" for op in _library.OPS} <= set(files)
    timed = [command for command in commands if "benchmarks.run" in command]
    assert len(timed) == 2
    assert ["--compile-only" in command for command in timed] == [True, False]
    assert all("--priority benchmarks/gpu_priority.txt" in command for command in timed)
    assert "no kernel" in (tmp_path / "out" / "smoke.txt").read_text()


@needs_timeout
def test_benchmarks_go_on_behind_a_case_that_took_the_device(tmp_path: Path) -> None:
    code, stages, commands = gpu_run(tmp_path, "bench", BENCH_CODE="3")
    assert (code, stages) == (64, {"bench": "RED (3)"})
    assert len(commands) == 2
    assert all("--resume" in command for command in commands)
    assert gpu_run(tmp_path, "report", "cuda")[1] == {"report": "ok", "cuda": "ok"}


@needs_timeout
def test_a_stage_ends_at_its_time(tmp_path: Path) -> None:
    code, stages, _ = gpu_run(tmp_path, "cuda", "bench", PYTEST_SECONDS="60", ENDS="1 1 2 2 30")
    assert code == 8
    assert stages == {"cuda": "RED (stopped at its time limit)", "bench": "ok"}


@needs_timeout
def test_an_unknown_stage_is_named(tmp_path: Path) -> None:
    code, _, output = gpu_run(tmp_path, "smok")
    assert code == 128
    assert "no stage smok; there are: report smoke sanitizer cuda" in output[0]
