"""Which implementation runs, what is said when the one asked for cannot, and that every CPU variant is right."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import INTERPRETING, Backend, backends_under_test
from pixel_cases import image_pair, make_mask, on_device
from processes import fresh_python
from training_checks import ops_called

import inpaint_kernels as ik
from inpaint_kernels import _backend, _extension

TESTS = Path(__file__).parent
SIZE = (2, 3, 9, 14)

PRELUDE = """
import importlib.util, json, sys, warnings
import torch
images = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
"""


def answer(code: str, **environment: str) -> Any:
    """What a fresh process, because backends and libraries are found at import, prints last, as JSON."""
    result = fresh_python(PRELUDE + code, **environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_every_backend_gives_the_same_loss(backend: Backend) -> None:
    pred, target, mask = on_device(backend, *image_pair(SIZE), make_mask("n1hw", SIZE))
    reference = ik.masked_l1_loss(pred, target, mask, backend="reference")
    torch.testing.assert_close(ik.masked_l1_loss(pred, target, mask, backend=backend.name), reference)


def test_forced_backend_is_the_one_that_runs(kernel: Backend) -> None:
    inputs = on_device(kernel, *image_pair(SIZE), make_mask("n1hw", SIZE))
    called = ops_called(lambda: ik.masked_l1_loss(*inputs, backend=kernel.name))
    assert {op for op in called if op.startswith("inpaint_kernels.")} == {
        f"inpaint_kernels.masked_l1_{kernel.name}.default"
    }


def test_reference_calls_no_kernel() -> None:
    called = ops_called(lambda: ik.masked_l1_loss(*image_pair(SIZE), backend="reference"))
    assert not any(op.startswith("inpaint_kernels.") for op in called)


@pytest.mark.parametrize("op", ["masked_l1", "hole_valid"])
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_gpu_backend_on_cpu_tensors_says_why_not(op: str, name: str) -> None:
    if name == "triton" and INTERPRETING:
        pytest.skip("the interpreter reads CPU tensors")
    loss = getattr(ik, f"{op}_loss")
    sentence = rf"{op}: backend '{name}' cannot run: .*CUDA tensors, not cpu"
    with pytest.raises(RuntimeError, match=sentence):
        loss(*image_pair(SIZE), make_mask("n1hw", SIZE), backend=name)


def test_backends_that_an_op_has_no_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [*image_pair(SIZE), make_mask("n1hw", SIZE)]
    others = "this op has no cuda kernels, only cpu, triton and reference"
    with pytest.raises(RuntimeError, match=f"stacked_images: backend 'cuda' cannot run: {others}"):
        ik.composite(*images, backend="cuda")
    with pytest.raises(RuntimeError, match=f"masked_l1 with reduction='none': .* cannot run: {others}"):
        ik.masked_l1_loss(*images, reduction="none", backend="cuda")
    # The default is for the ops that have its kernels.
    monkeypatch.setattr(_backend, "default_backend", "cuda")
    assert ik.composite(*images).shape == SIZE
    assert ik.masked_l1_loss(*images, reduction="none").shape == SIZE
    with pytest.raises(RuntimeError, match="CUDA tensors"):
        ik.masked_l1_loss(*images)


def test_gpu_kernels_say_that_they_have_no_float64(kernel: Backend) -> None:
    if kernel.name not in ("triton", "cuda"):
        pytest.skip("the cpu kernels compute in float64")
    images = on_device(kernel, *image_pair(SIZE, "f64/f64"))
    with pytest.raises(RuntimeError, match="float64"):
        ik.masked_l1_loss(*images, backend=kernel.name)
    assert ik.masked_l1_loss(*images).dtype == torch.float64


def test_unknown_backend_is_named_with_the_allowed_ones() -> None:
    with pytest.raises(ValueError, match=r"backend: got 'gpu', allowed: .*cuda.*triton.*cpu.*reference"):
        ik.masked_l1_loss(*image_pair(SIZE), backend="gpu")


RAN = """
import inpaint_kernels as ik
from inpaint_kernels import _library
ran, call = [], _library.Op.__call__
def logged(op, backend, *rest):
    ran.append(f"{op.name}_{backend}")
    return call(op, backend, *rest)
_library.Op.__call__ = logged
ik.masked_l1_loss(*images)
ik.masked_l1_loss(*images, backend="cpu")
print(json.dumps([ran, "triton" in sys.modules]))
"""


def test_environment_sets_the_default_and_the_argument_wins() -> None:
    """And no Triton is imported."""
    assert answer(RAN, INPAINT_KERNELS_BACKEND="reference") == [["masked_l1_cpu"], False]
    assert answer(RAN, INPAINT_KERNELS_BACKEND="") == [["masked_l1_cpu", "masked_l1_cpu"], False]


def test_environment_with_an_unknown_name_is_an_error() -> None:
    result = fresh_python("import inpaint_kernels", INPAINT_KERNELS_BACKEND="fast")
    assert result.returncode != 0
    assert "INPAINT_KERNELS_BACKEND is 'fast'; allowed: " in result.stderr


LOSSES_OF = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import inpaint_kernels as ik
    losses = []
    for _ in range(2):
        losses += [ik.masked_l1_loss(*images BACKEND), ik.masked_l1_loss(*(i.double() for i in images) BACKEND)]
        losses += [ik.total_variation_loss(images[1] BACKEND), sum(ik.hole_valid_loss(*images, images[1] BACKEND))]
said = [[str(w.message), w.filename] for w in caught if "inpaint_kernels" in str(w.message)]
try:
    ik.masked_l1_loss(*images, backend="cpu")
    forced = "ran"
except RuntimeError as error:
    forced = str(error)
print(json.dumps([[float(loss) for loss in losses], said, forced]))
"""
AUTOMATIC, REFERENCE = (LOSSES_OF.replace("BACKEND", text) for text in ("", ", backend='reference'"))
LOSSES = [1.0, 1.0, 0.0, 1.0]


def library_without_kernels(folder: Path) -> None:
    """It loads, as one of an older version of the package does."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    (folder / "empty.cpp").write_text("")
    command = [compiler, "-shared", "-fPIC", str(folder / "empty.cpp"), "-o", str(folder / "_C.so")]
    subprocess.run(command, check=True)


def spoil(state: str, folder: Path) -> str:
    """Makes a folder of libraries that cannot run; returns how the reason begins."""
    if state == "broken":
        (folder / "_C.so").write_text("no library")
        return "_C.so is broken: "
    if state == "empty":
        library_without_kernels(folder)
        return "_C.so was built from other sources: it lacks "
    if state == "left out":
        left_out = dict.fromkeys(("cpu", "cuda"), "INPAINT_KERNELS_BUILD=none")
        (folder / "_build_info.json").write_text(json.dumps({"left_out": left_out}))
        return "_C.so is not installed (INPAINT_KERNELS_BUILD=none)"
    return "_C.so is not installed"


@pytest.mark.parametrize("state", ["missing", "left out", "broken", "empty"])
def test_a_library_that_cannot_run_says_so_once(state: str, tmp_path: Path) -> None:
    """The automatic choice still answers; the backend asked for says what is wrong."""
    reason = spoil(state, tmp_path)
    losses, warned, forced = answer(AUTOMATIC, INPAINT_KERNELS_LIBRARY_DIR=str(tmp_path))
    assert losses == 2 * LOSSES
    assert len(warned) == 1
    message, blamed = warned[0]
    assert message.startswith(f"inpaint_kernels: cpu tensors run on 'reference' because {reason}")
    assert "To mend it: run `make build`, and unset INPAINT_KERNELS_LIBRARY_DIR" in message
    assert blamed == "<string>", "the warning should point at the user's line"
    assert f"cannot run: {reason}" in forced


@pytest.mark.parametrize(("code", "default"), [(REFERENCE, ""), (AUTOMATIC, "reference")])
def test_who_asks_for_the_reference_is_not_warned(code: str, default: str, tmp_path: Path) -> None:
    environment = {"INPAINT_KERNELS_LIBRARY_DIR": str(tmp_path), "INPAINT_KERNELS_BACKEND": default}
    assert answer(code, **environment)[:2] == [2 * LOSSES, []]


def test_a_library_that_runs_is_quiet() -> None:
    assert answer(AUTOMATIC) == [2 * LOSSES, [], "ran"]


COMPILED = """
import inpaint_kernels as ik
from inpaint_kernels import _backend
if FORGET:
    # A torch that does not know the mark: it traces the choice.
    del _backend.unavailable._dynamo_marked_constant, _backend._tell._dynamo_marked_constant
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    run = torch.compile(lambda *images: ik.masked_l1_loss(*images), fullgraph=True, backend="eager")
    losses = [float(run(*images)), float(run(*(i.double() for i in images)))]
said = [str(w.message) for w in caught if "inpaint_kernels" in str(w.message)]
print(json.dumps([len(said), losses]))
"""


@pytest.mark.parametrize(("forget", "warnings"), [("0", 1), ("1", 0)])
def test_compiled_code_warns_once(forget: str, warnings: int, tmp_path: Path) -> None:
    """And its graph stays whole: warning happens while torch.compile traces, not inside what it traces."""
    code = COMPILED.replace("FORGET", forget)
    assert answer(code, INPAINT_KERNELS_LIBRARY_DIR=str(tmp_path)) == [warnings, [1.0, 1.0]]


FALLBACK = """
# A machine with a CUDA torch, without a working kernel: no Triton, no library, a GPU tensor without a GPU.
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import inpaint_kernels as ik
from torch._subclasses.fake_tensor import FakeTensorMode
with warnings.catch_warnings(record=True) as caught, FakeTensorMode():
    warnings.simplefilter("always")
    images = [torch.empty(1, 3, 4, 4, device="cuda") for _ in range(2)]
    for _ in range(3):
        loss = ik.masked_l1_loss(*images)
    assert loss.device.type == "cuda"
print(json.dumps([[str(w.message), w.filename] for w in caught if "masked_l1" in str(w.message)]))
"""


def test_fallback_on_a_gpu_warns_once_with_the_reasons(tmp_path: Path) -> None:
    warned = answer(FALLBACK, INPAINT_KERNELS_LIBRARY_DIR=str(tmp_path))
    assert len(warned) == 1
    message, blamed = warned[0]
    assert message.startswith("masked_l1 runs on 'reference' because ")
    assert "cuda: " in message
    assert "triton: triton is not installed" in message
    assert blamed == "<string>", "the warning should point at the user's line"


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_core_cases_on_every_instruction_set(isa: str) -> None:
    """The wheel carries all variants; each machine would otherwise only ever test its best one."""
    if "cpu" not in map(str, backends_under_test()):
        pytest.skip("cpu is not under test")
    offered = {"AVX2": ("generic", "avx2"), "AVX512": ("generic", "avx2", "avx512")}
    if isa not in offered.get(torch.backends.cpu.get_cpu_capability(), ("generic",)):
        pytest.skip(f"this machine has no {isa}")
    if isa == _extension.cpu_isa():
        pytest.skip(f"{isa} is what the other tests run")
    environment = {"INPAINT_KERNELS_CPU_ISA": isa}
    code = "from inpaint_kernels import _extension; print(json.dumps(_extension.cpu_isa()))"
    assert answer(code, **environment) == isa
    names = ("test_core", "test_dtypes", "test_sizes", "test_mask_dtypes")
    tests = [f"{TESTS / 'test_values.py'}::{name}" for name in names]
    tests += ["-k", "masked_l1 or hole_valid"]
    # One in four; tools/asan.sh runs every test of every op on every instruction set.
    plugin = ["-p", "pytest_share"]
    share = {"TEST_SHARE": "0/4", "PYTHONPATH": str(TESTS.parent / "tools")}
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *plugin, *tests],
        env={**os.environ, **environment, **share, "INPAINT_KERNELS_TEST_BACKENDS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        cwd=TESTS.parent,
        timeout=600,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:]
