"""setup.py: what is built, for which architectures, what is recorded, and what is left alone."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


pytest.importorskip("setuptools", minversion="77")
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="not a checkout")


def run_setup(folder: Path, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("none", "'cpu': 'INPAINT_KERNELS_BUILD=none', 'cuda': 'INPAINT_KERNELS_BUILD=none'"),
        ("auto", "no C++17 compiler"),
        ("cpu", "no C++17 compiler"),
        ("gpu", "allowed are auto, none, cpu, cuda"),
    ],
)
def test_what_a_machine_without_a_compiler_records(tmp_path: Path, mode: str, said: str) -> None:
    """A build that leaves everything out records why; one that was asked for by name, or misspelt, fails."""
    command = (
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(tmp_path),
        "--build-temp",
        str(tmp_path / "temp"),
    )
    run = run_setup(
        ROOT, *command, INPAINT_KERNELS_BUILD=mode, PATH=str(tmp_path), CXX="", CUDA_HOME="", CUDA_PATH=""
    )
    record = tmp_path / "inpaint_kernels" / "_build_info.json"
    assert (run.returncode == 0) == record.exists() == (mode in ("none", "auto"))
    assert said in (str(json.loads(record.read_text())["left_out"]) if record.exists() else run.stderr)


@pytest.mark.skipif(torch.version.cuda is not None, reason="a torch with CUDA")
def test_no_cuda_for_a_torch_without_it() -> None:
    """Unless it is asked for: the compiler alone does not make the library loadable."""
    code = "import sys; sys.argv = ['setup.py', '--version']; import setup; print(setup.make_plan().left_out['cuda'])"
    run = run_setup(ROOT, "-c", code, INPAINT_KERNELS_BUILD="auto")
    assert "the installed torch has no CUDA; INPAINT_KERNELS_BUILD=cuda" in run.stdout, run.stderr


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A package with two libraries that were built before, in a checkout that holds all but sources."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "tools", folder / "tools")
    for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / file, folder)
    package = folder / "inpaint_kernels"
    package.mkdir()
    (package / "__init__.py").write_text('__version__ = "0.1.0"\n')
    (package / "_C.so").write_text("built before")
    (package / "_C_cuda.so").write_text("built before")
    record = {"left_out": {}, "cpu": {"flags": ["before"]}, "cuda": {"architectures": ["9.0"]}}
    (package / "_build_info.json").write_text(json.dumps(record))
    return package


def build(checkout: Path, *command: str, **environment: str) -> None:
    run = run_setup(checkout.parent, *command, **environment)
    assert run.returncode == 0, run.stderr


# What `pip install -e .` calls; the Makefile does for each of its environments.
EDITABLE = ("-c", "import setuptools.build_meta as backend; backend.build_editable('editable')")
INPLACE = ("setup.py", "-q", "build_ext", "--inplace")


@pytest.mark.parametrize("command", [EDITABLE, INPLACE], ids=["editable", "inplace"])
def test_a_call_that_builds_nothing_leaves_the_libraries_alone(
    checkout: Path, command: tuple[str, ...]
) -> None:
    before = {path.name: path.read_bytes() for path in checkout.iterdir() if path.is_file()}
    build(checkout, *command, INPAINT_KERNELS_BUILD="none")
    # Nor does a machine without a compiler, where the libraries were copied to.
    build(checkout, *command, INPAINT_KERNELS_BUILD="auto", PATH=str(checkout), CXX="", CUDA_HOME="")
    assert {path.name: path.read_bytes() for path in checkout.iterdir() if path.is_file()} == before


def test_a_fresh_tree_records_why_nothing_was_built(checkout: Path) -> None:
    for path in (checkout / "_C.so", checkout / "_C_cuda.so", checkout / "_build_info.json"):
        path.unlink()
    build(checkout, *EDITABLE, INPAINT_KERNELS_BUILD="none")
    info = json.loads((checkout / "_build_info.json").read_text())
    assert info == {"left_out": dict.fromkeys(("cpu", "cuda"), "INPAINT_KERNELS_BUILD=none")}


def test_building_one_library_keeps_the_other_and_its_record(checkout: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    (checkout.parent / "csrc/cpu").mkdir(parents=True)
    (checkout.parent / "csrc/cpu/one.cpp").write_text("[[maybe_unused]] static int one() { return 1; }\n")
    build(checkout, *INPLACE, INPAINT_KERNELS_BUILD="cpu", CXX="g++")
    assert (checkout / "_C.so").read_bytes()[:4] == b"\x7fELF"
    assert (checkout / "_C_cuda.so").read_text() == "built before"
    info = json.loads((checkout / "_build_info.json").read_text())
    assert info["cuda"] == {"architectures": ["9.0"]}
    assert "variants" in info["cpu"]
    assert info["left_out"] == {}


def test_a_wheel_holds_no_library_of_the_tree(checkout: Path) -> None:
    folder = checkout.parent / "made"
    (folder / "inpaint_kernels").mkdir(parents=True)
    (folder / "inpaint_kernels/_C.so").write_text("of an older build")
    options = ("--build-lib", str(folder), "--build-temp", str(folder / "temp"))
    build(checkout, "setup.py", "-q", "build_ext", *options, INPAINT_KERNELS_BUILD="none")
    assert not (folder / "inpaint_kernels/_C.so").exists()
    assert (checkout / "_C.so").exists()


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of setup.py, without running it."""
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("archs", "flags", "code", "ptx"),
    [
        ("9.0", "arch=compute_90,code=[compute_90,sm_90]", "9.0", "9.0"),
        ("12.0;8.0, 9.0", "arch=compute_80,code=[compute_80,sm_80,sm_90,sm_120]", "8.0 9.0 12.0", "8.0"),
        (
            "8.0 9.0a 10.0+PTX",
            "arch=compute_80,code=[compute_80,sm_80,sm_100] arch=compute_90a,code=sm_90a "
            "arch=compute_100,code=compute_100",
            "8.0 10.0 9.0a",
            "8.0 10.0",
        ),
    ],
)
def test_architectures_share_the_ptx_of_the_oldest(
    setup_py: dict[str, Any], archs: str, flags: str, code: str, ptx: str
) -> None:
    parsed = setup_py["parse_archs"](archs)
    assert parsed == [f"-gencode={flag}" for flag in flags.split()]
    assert setup_py["compiled_for"](parsed, "sm") == code.split()
    assert setup_py["compiled_for"](parsed, "compute") == ptx.split()
    with pytest.raises(setup_py["SetupError"], match="cannot read"):
        setup_py["parse_archs"]("sm_90")


@pytest.mark.parametrize(
    ("gpus", "nvcc", "chosen"),
    [
        (["9.0"], ["75", "80", "90", "100"], "9.0"),
        (["12.0", "8.6", "8.6"], ["80", "86", "120"], "8.6 12.0"),
        # Too new for nvcc: the newest PTX it can write. Too old for the kernels: as if it were not there.
        (["10.0", "12.0"], ["80", "89", "90"], "9.0"),
        (["7.5", "8.9"], ["75", "80", "89"], "8.9"),
        (["7.5"], ["75", "80", "90"], "8.0 9.0"),
        ([], ["75", "80", "86", "87", "89", "90", "100", "120"], "8.0 8.6 8.9 9.0 10.0 12.0"),
        ([], ["80", "86", "89", "90"], "8.0 8.6 8.9 9.0"),
        (["[N/A]"], [], "8.0 8.6 8.9 9.0 10.0 12.0"),
        (["9.0"], [], "9.0"),
    ],
)
def test_default_architectures(
    setup_py: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    gpus: list[str],
    nvcc: list[str],
    chosen: str,
) -> None:
    """Those of the GPUs present, else all of a release."""
    answers = {"nvidia-smi": gpus, "nvcc": [f"compute_{arch}" for arch in nvcc]}
    for name, lines in answers.items():
        said = "".join(f"echo '{line}'\n" for line in lines)
        (tmp_path / name).write_text("#!/bin/sh\n" + (said or "exit 9\n"))
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert setup_py["default_archs"](str(tmp_path / "nvcc")) == chosen
    (tmp_path / "nvidia-smi").unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    release = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
    served = [arch for arch in release if not nvcc or arch.replace(".", "") in nvcc]
    assert setup_py["default_archs"](str(tmp_path / "nvcc")) == " ".join(served)


def test_a_given_list_of_architectures_wins(
    setup_py: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("INPAINT_KERNELS_BUILD", "cuda")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9")
    monkeypatch.setitem(setup_py["make_plan"].__globals__, "default_archs", lambda nvcc: "9.0")
    monkeypatch.setitem(setup_py["make_plan"].__globals__, "find_cxx", lambda: ["g++"])
    plan = setup_py["make_plan"]
    assert plan().tools.archs == ["-gencode=arch=compute_89,code=[compute_89,sm_89]"]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert plan().tools.archs == ["-gencode=arch=compute_90,code=[compute_90,sm_90]"]
