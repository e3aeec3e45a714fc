"""Whether `_C_cuda.so` is chosen only where it can run: build records, GPUs and drivers are made up here."""

from __future__ import annotations

import ctypes
import types
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from inpaint_kernels import _backend, _cuda_support, _doctor, _extension
from inpaint_kernels._cuda_support import Built

AVAILABLE = ("cpu", "triton", "cuda")
HOPPER = Built((13, 0), ("9.0",), ("9.0",))
RELEASE = Built((13, 0), ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0"), ("8.0",))
NEWER_TOOLKIT = Built((13, 2), ("9.0",), ("9.0",))


def choose(index: int, backend: str | None = None, dtype: torch.dtype = torch.float32) -> str:
    return _backend.choose("masked_l1", AVAILABLE, backend, torch.device("cuda", index), dtype)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`machine(built, capabilities, driver)`: a machine with these GPUs, its library loaded, nothing chosen yet."""

    def pretend(
        built: Built | None, capabilities: list[tuple[int, int]], driver: tuple[int, int] | None = (13, 0)
    ) -> None:
        def capability(device: torch.device | int) -> tuple[int, int]:
            return capabilities[device if isinstance(device, int) else device.index]

        for module, name, value in (
            (torch.cuda, "device_count", lambda: len(capabilities)),
            (torch.cuda, "get_device_capability", capability),
            (torch.cuda, "get_device_name", lambda index: f"GPU of {capabilities[index]}"),
            (torch.version, "cuda", "13.0"),
            (_extension, "_problems", {"cpu": None, "cuda": None}),
            (_extension, "_built", built),
            (_extension, "_driver", driver),
            (_backend, "default_backend", None),
            (_backend, "_HAS_TRITON", True),
            (_backend, "_chosen", {}),
            (_backend, "_told", set()),
        ):
            monkeypatch.setattr(module, name, value)

    return pretend


@pytest.mark.parametrize(
    ("architectures", "ptx", "capability", "runs"),
    [
        (["9.0"], [], (9, 0), True),
        (["8.0"], [], (8, 6), True),
        (["8.6"], [], (8, 0), False),
        (["8.0"], [], (9, 0), False),
        (["9.0"], [], (8, 0), False),
        (["8.0", "9.0"], [], (8, 9), True),
        (["10.0"], [], (10, 3), True),
        (["10.0"], [], (12, 0), False),
        # Machine code of integrated GPUs and of the others is not the same.
        (["8.0"], [], (8, 7), False),
        (["8.7"], [], (8, 7), True),
        (["8.7"], [], (8, 9), False),
        # PTX runs on everything newer.
        (["9.0"], ["9.0"], (12, 0), True),
        (["9.0"], ["9.0"], (8, 9), False),
        (["8.0"], ["8.0"], (8, 7), True),
        # Features of one architecture ("a") or of its family ("f").
        (["9.0a"], [], (9, 0), True),
        (["10.0a"], [], (10, 3), False),
        (["10.0f"], [], (10, 3), True),
        (["9.0a"], ["9.0a"], (10, 0), False),
        (["10.0f"], ["10.0f"], (12, 0), False),
    ],
)
def test_architectures(
    architectures: list[str], ptx: list[str], capability: tuple[int, int], runs: bool
) -> None:
    built = Built((13, 0), tuple(architectures), tuple(ptx))
    reason = _cuda_support.refused_by_device(built, capability, (13, 0))
    assert (reason is None) == runs
    if not runs:
        assert reason is not None
        assert f"compute capability {', '.join(architectures)}, " in reason
        assert f"the GPU has {capability[0]}.{capability[1]}" in reason


@pytest.mark.parametrize(
    ("toolkit", "driver", "starts", "translates"),
    [
        ((13, 0), (13, 0), True, True),
        ((13, 2), (13, 0), True, False),
        ((13, 0), (12, 9), False, False),
        ((12, 8), (13, 0), True, True),
        ((12, 8), (12, 8), True, True),
        ((12, 10), (12, 9), True, False),
        # Without a driver there is no GPU, and nothing to refuse.
        ((13, 0), None, True, True),
    ],
)
def test_drivers(
    toolkit: tuple[int, int], driver: tuple[int, int] | None, starts: bool, translates: bool
) -> None:
    built = Built(toolkit, ("9.0",), ("9.0",))
    reason = _cuda_support.refused_by_driver(built, driver)
    assert (reason is None) == starts
    if reason is not None:
        assert driver is not None
        assert (
            f"CUDA {toolkit[0]}.{toolkit[1]}, and the driver supports CUDA {driver[0]}.{driver[1]}" in reason
        )
    assert (_cuda_support.refused_by_device(built, (12, 0), driver) is None) == translates
    assert _cuda_support.refused_by_device(built, (9, 0), driver) is None


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {},
        {"compiler": "nvcc", "flags": []},
        {"toolkit": 13.0, "architectures": ["9.0"], "ptx": []},
        {"toolkit": "13", "architectures": ["9.0"], "ptx": []},
        {"toolkit": "13.0", "architectures": "9.0", "ptx": []},
        {"toolkit": "13.0", "architectures": ["sm_90"], "ptx": []},
        {"toolkit": "13.0", "architectures": ["9.0"]},
    ],
)
def test_a_record_that_does_not_tell_refuses_nothing(record: object, machine: Any) -> None:
    assert _cuda_support.read(record) is None
    machine(_cuda_support.read(record), [(8, 0)])
    assert choose(0) == "cuda"


def test_record_is_read() -> None:
    record = {"toolkit": "13.0", "architectures": ["8.0", "9.0a"], "ptx": ["8.0"]}
    assert _cuda_support.read(record) == Built((13, 0), ("8.0", "9.0a"), ("8.0",))


@pytest.mark.parametrize(
    ("answer", "version"),
    [
        ((0, 12090), (12, 9)),
        ((0, 13000), (13, 0)),
        ((3, 13000), None),
        (AttributeError("a library without the function"), None),
        (OSError("no library"), None),
    ],
)
def test_driver_version(
    answer: tuple[int, int] | Exception, version: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(name: str) -> Any:
        if isinstance(answer, Exception):
            raise answer

        def query(pointer: Any) -> int:
            status, pointer._obj.value = answer
            return status

        return types.SimpleNamespace(cuDriverGetVersion=query)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert _cuda_support.driver_version() == version


OTHER_BUILD = 'To mend it: run `TORCH_CUDA_ARCH_LIST="8.0 9.0" make build`'
# By machine: the build, its GPUs, what each of them gets, and what the only warning says.
MACHINES: dict[str, tuple[Built, list[tuple[int, int]], list[str], tuple[str, ...]]] = {
    "each GPU by itself": (
        HOPPER,
        [(9, 0), (8, 0), (12, 0)],
        ["cuda", "triton", "cuda"],
        (
            "inpaint_kernels: cuda tensors run on 'triton' because _C_cuda.so was compiled for ",
            "compute capability 9.0, and the GPU has 8.0",
            OTHER_BUILD,
        ),
    ),
    "a release": (RELEASE, [(8, 0), (8, 9), (9, 0), (12, 1)], ["cuda"] * 4, ()),
    "a GPU older than the kernels": (RELEASE, [(7, 5)], ["triton"], ()),  # no other build would help
    "PTX newer than the driver": (
        NEWER_TOOLKIT,
        [(12, 0)],
        ["triton"],
        ("install an NVIDIA driver for CUDA 13.2 or later, or run `TORCH_CUDA_ARCH",),
    ),
    # Fake tensors name devices of another machine.
    "no GPU": (HOPPER, [], ["cuda"], ()),
    "a GPU that is not there": (HOPPER, [(9, 0)], ["cuda", "cuda"], ()),
}


@pytest.mark.parametrize("case", MACHINES)
def test_choice_and_its_only_warning(case: str, machine: Any) -> None:
    built, capabilities, backends, sentences = MACHINES[case]
    machine(built, capabilities)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert [choose(index, dtype=dtype) for index in range(len(backends))] == backends
    assert len(caught) == bool(sentences)
    for sentence in sentences:
        assert sentence in str(caught[0].message)


def test_a_gpu_older_than_the_kernels_gets_no_advice_to_build(machine: Any) -> None:
    machine(RELEASE, [(7, 5)])
    problem = _extension.problem("cuda", torch.device("cuda", 0))
    assert problem is not None
    assert "TORCH_CUDA_ARCH_LIST" not in problem.remedy


def test_forced_where_it_cannot_run(machine: Any) -> None:
    machine(HOPPER, [(8, 0), (9, 0)])
    sentence = (
        r"masked_l1: backend 'cuda' cannot run: _C_cuda.so was compiled for .* 9\.0, and the GPU has 8\.0"
    )
    with pytest.raises(RuntimeError, match=sentence):
        choose(0, "cuda")
    assert choose(1, "cuda") == "cuda"
    assert choose(0, "triton") == "triton"


def test_compiled_code_gets_the_same_answer(machine: Any) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        first, second = choose(0), choose(1)
        return x + (1 if first == "triton" else 0) + (10 if second == "cuda" else 0)

    machine(HOPPER, [(8, 0), (9, 0)])
    with pytest.warns(UserWarning, match="the GPU has 8.0"):
        assert torch.compile(run, fullgraph=True, backend="eager")(torch.zeros(())) == 11


def test_a_driver_older_than_the_runtime_keeps_the_library_out(
    machine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setenv("INPAINT_KERNELS_LIBRARY_DIR", str(tmp_path))
    (tmp_path / "_C_cuda.so").touch()
    machine(HOPPER, [(9, 0)], (13, 1))
    assert _extension._load("cuda") is None
    assert loaded == [str(tmp_path / "_C_cuda.so")]
    machine(HOPPER, [(9, 0)], (12, 8))
    problem = _extension._load("cuda")
    assert len(loaded) == 1
    assert problem is not None
    assert problem.kind == "unfit"
    assert "runtime of CUDA 13.0, and the driver supports CUDA 12.8" in problem.reason
    assert problem.remedy.startswith("install an NVIDIA driver for CUDA 13.0 or later, or ")
    _extension._problems["cuda"] = problem
    with pytest.warns(UserWarning, match="the driver supports CUDA 12.8"):
        assert choose(0) == "triton"


def test_doctor_tells_each_gpu_apart(machine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    machine(HOPPER, [(9, 0), (8, 0), (9, 0)])
    assert _doctor.main() == 0
    report = capsys.readouterr().out
    assert "2 x GPU of (9, 0) (compute capability 9.0); GPU of (8, 0) (compute capability 8.0)" in report
    assert "cuda:0, cuda:2 tensors: cuda\n" in report
    assert "cuda:1 tensors: triton\n        not cuda    _C_cuda.so was compiled for" in report
    assert (
        'the GPU has 8.0: run `TORCH_CUDA_ARCH_LIST="8.0 9.0" make build`'
        in report.partition("what to do")[2]
    )


def test_doctor_with_a_fitting_gpu_has_nothing_to_say(
    machine: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    machine(HOPPER, [(9, 0)])
    assert _doctor.main() == 0
    report = capsys.readouterr().out
    assert "    cuda tensors: cuda\n" in report
    assert "TORCH_CUDA_ARCH_LIST" not in report
