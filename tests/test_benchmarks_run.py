"""How the benchmarks run: by a list, up to a deadline, past what fails, compiled beforehand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmark_cases import CPU, FIRST, SECOND, benchmark, call, mean_l1
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks import harness, measure, priority, progress, providers, run
from benchmarks.harness import Case, Formula
from inpaint_kernels import _library

ROOT = Path(__file__).resolve().parent.parent
LIST = ROOT / "benchmarks" / "gpu_priority.txt"
BOTH = [FIRST, SECOND]


def order(rows: list[dict[str, str]]) -> list[tuple[str, str]]:
    return [(row["case"].split()[-1], row["provider"]) for row in rows if row["mode"] == "full"]


def test_every_entry_of_the_list_exists_on_a_gpu_and_is_there_once() -> None:
    entries = priority.read(LIST, run.discover())
    keys = [(entry.benchmark.op, entry.case.name, entry.case.dtype_name) for entry in entries]
    assert len(set(keys)) == len(keys) >= 20
    for entry in entries:
        assert "cuda" in entry.case.devices
        names = providers.providers(entry.benchmark, entry.case, torch.device("cuda"))
        chosen = run.matching(names, entry.providers)
        op = _library.OPS.get(entry.benchmark.op)
        own = {f"ik-{backend}" for backend in ("cuda", "triton") if op is None or backend in op.backends}
        assert {"eager", "compile"} | own <= set(chosen), entry
    # Every op with kernels is timed.
    assert {entry.benchmark.op for entry in entries} >= set(_library.OPS)


def test_a_case_is_known_by_name_and_dtype() -> None:
    for benchmark_of in run.discover().values():
        assert len({(case.name, case.dtype) for case in benchmark_of.cases}) == len(benchmark_of.cases), (
            benchmark_of.op
        )


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("op | 1x3x8x8 first | float32", "line 2: got 3 columns, expected op"),
        ("nope | 1x3x8x8 first | float32 | eager", "no benchmark of 'nope'; there are: op"),
        (
            "op | 1x3x8x8 third | float32 | eager",
            "op has no case '1x3x8x8 third'; there are: 1x3x8x8 first, 1x3",
        ),
        ("op | 1x3x8x8 first | float16 | eager", r"no dtype 'float16'; there are: \['float32'\]"),
        ("op | 1x3x8x8 first | float32 | eager fast", r"no provider \['fast'\]; there are: compile, comp"),
        ("op | 1x3x8x8 first | float32 |", "no provider ; there are"),
    ],
)
def test_a_wrong_line_of_a_list_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"# comment\n{line}\n")
    with pytest.raises(ValueError, match=complaint):
        priority.read(path, {"op": benchmark(cases=BOTH)})


def test_a_list_says_what_runs_and_in_which_order(tmp_path: Path, call, capsys) -> None:
    path = tmp_path / "list.txt"
    path.write_text(
        "op | 1x3x8x8 second | float32 | ik-* # own\nop | 1x3x8x8 first | float32 | ik-cpu eager\n"
    )
    status, rows, failures = call(benchmark(cases=BOTH), "--priority", str(path))
    assert (status, failures) == (0, "")
    assert order(rows) == [("second", "ik-cpu"), ("first", "eager"), ("first", "ik-cpu")]
    path.write_text("op | third | float32 | eager\n")
    assert call(benchmark(cases=BOTH), "--priority", str(path))[0] == 1
    assert f"{path}, line 1: op has no case 'third'" in capsys.readouterr().err


def test_after_the_deadline_no_case_begins_and_rows_are_saved(call, capsys, monkeypatch) -> None:
    # One look at the clock for the start of the run, one before each case.
    clock = iter([0.0, 1.0, 11.0])
    monkeypatch.setattr(run, "monotonic", lambda: next(clock))
    status, rows, _ = call(benchmark(cases=BOTH), "--providers", "eager", "--deadline", "10")
    assert status == 0
    assert order(rows) == [("first", "eager")]
    assert "time is up, 1 left out: op 1x3x8x8 second float32" in capsys.readouterr().out


def test_compile_only_runs_compiled_providers_and_saves_nothing(call, capsys, monkeypatch) -> None:
    compiled = []

    def compile(function: Callable[..., Tensor], **options: object) -> Callable[..., Tensor]:
        def step(**inputs: Tensor | None) -> Tensor:
            compiled.append(options)
            return function(**inputs)

        return step

    monkeypatch.setattr(torch, "compile", compile)
    status, rows, _ = call(benchmark(cases=BOTH, rewrite=mean_l1), "--compile-only")
    assert (status, rows) == (0, [])
    assert len(compiled) == 4
    assert "nothing timed" in capsys.readouterr().out

    def broken(case: Case) -> Formula:
        return lambda **inputs: 1 / 0

    status, _, failures = call(benchmark(cases=BOTH, eager=broken), "--compile-only", "--cases", "first")
    assert status == 1
    assert (
        failures == "op 1x3x8x8 first float32  compile: RED, not timed: ZeroDivisionError: division by zero\n"
    )


def test_a_case_that_cannot_be_made_does_not_stop_the_next(call) -> None:
    def inputs(case: Case, *arguments: object) -> dict[str, Tensor | None]:
        assert case is SECOND, "no memory"
        return harness.image_inputs(case, *arguments)

    status, rows, failures = call(benchmark(cases=BOTH, make_inputs=inputs), "--providers", "eager")
    assert status == 1
    assert order(rows) == [("second", "eager")]
    assert failures.startswith("op 1x3x8x8 first float32  AssertionError: no memory")


def test_a_run_that_lost_the_device_is_continued_behind_the_case(call, tmp_path, monkeypatch) -> None:
    def fused(case: Case, backend: str) -> Formula:
        return mean_l1(case) if case is SECOND else lambda **inputs: 1 / 0

    def lost(device: torch.device, cause: str) -> None:
        raise measure.DeviceLostError(f"the device is lost after {cause}")

    monkeypatch.setattr(providers, "raise_if_lost", lost)
    chosen = ("--providers", "ik-cpu", "--resume", str(tmp_path / "begun"))
    status, rows, failures = call(benchmark(cases=BOTH, fused=fused), *chosen)
    assert (status, rows) == (run.LOST, [])
    assert "the device is lost after ik-cpu: ZeroDivisionError" in failures
    status, rows, _ = call(benchmark(cases=BOTH, fused=fused), *chosen)
    assert status == 0
    assert order(rows) == [("second", "ik-cpu")]
    assert call(benchmark(cases=BOTH, fused=fused), *chosen)[0] == 0


def test_tiny_takes_every_case_on_every_device(call) -> None:
    large = Case((16, 3, 512, 512), "first", devices=("cuda",))
    _, rows, _ = call(benchmark(cases=[large]), "--providers", "eager", "--tiny", "--quick")
    assert not rows
    small = harness.tiny(large)
    assert (small.shape, small.devices) == ((2, 3, 64, 64), ("cpu", "cuda"))


class FactoriesOn(TorchFunctionMode):
    """Fails where random numbers are not made on the device asked for."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.calls = device, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.rand, torch.randn, torch.randint):
            self.calls += 1
            assert kwargs["device"] == kwargs["generator"].device == self.device
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("op", run.discover())
def test_inputs_are_made_on_the_device(op: str) -> None:
    benchmark_of = run.discover()[op]
    case = harness.tiny(next(case for case in benchmark_of.cases if case.quick))
    with FactoriesOn(CPU) as factories:
        benchmark_of.make_inputs(case, CPU, torch.Generator(CPU).manual_seed(0))
    assert factories.calls


def test_without_tqdm_there_are_lines(monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "tqdm", None)
    with progress.Progress(2) as lines:
        lines.at("gram")
        lines.step()
        lines.write("done")
    assert "s] gram\ndone\n" in capsys.readouterr().out
