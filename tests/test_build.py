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

ROOT = Path(__file__).resolve().parent.parent


def build_info(tmp_path: Path, **environment: str) -> dict[str, object] | str:
    """What `setup.py build_ext` records without compiling anything, or its error."""
    setuptools = pytest.importorskip("setuptools", minversion="77")
    del setuptools
    if not (ROOT / "setup.py").is_file():
        pytest.skip("not a checkout")
    arguments = ["build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp")]
    variables = {**os.environ, **environment}
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        variables.pop(name, None)
    run = subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
    )
    if run.returncode != 0:
        return run.stderr
    found: dict[str, object] = json.loads((tmp_path / "inpaint_kernels" / "_build_info.json").read_text())
    return found


def test_build_none_records_why(tmp_path: Path) -> None:
    info = build_info(tmp_path, INPAINT_KERNELS_BUILD="none")
    assert isinstance(info, dict)
    assert info["left_out"] == dict.fromkeys(("cpu", "cuda"), "INPAINT_KERNELS_BUILD=none")


def test_build_auto_without_a_compiler_records_why(tmp_path: Path) -> None:
    info = build_info(tmp_path, INPAINT_KERNELS_BUILD="auto", PATH=str(tmp_path))
    assert isinstance(info, dict), info
    assert "no C++17 compiler" in str(info["left_out"])


def test_build_by_name_fails_without_a_compiler(tmp_path: Path) -> None:
    error = build_info(tmp_path, INPAINT_KERNELS_BUILD="cpu", PATH=str(tmp_path))
    assert isinstance(error, str)
    assert "no C++17 compiler" in error


def test_build_mode_is_checked(tmp_path: Path) -> None:
    error = build_info(tmp_path, INPAINT_KERNELS_BUILD="gpu")
    assert isinstance(error, str)
    assert "allowed are auto, none, cpu, cuda" in error


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What building the package needs of this tree, with two libraries that were built before."""
    pytest.importorskip("setuptools", minversion="77")
    if not (ROOT / "setup.py").is_file():
        pytest.skip("not a checkout")
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


def run_setup(checkout: Path, *command: str, **environment: str) -> None:
    run = subprocess.run(
        [sys.executable, *command],
        cwd=checkout.parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr


# What `pip install -e .` calls; the Makefile does for each of its environments.
EDITABLE = "import setuptools.build_meta as backend; backend.build_editable('editable')"


@pytest.mark.parametrize("command", [("-c", EDITABLE), ("setup.py", "-q", "build_ext", "--inplace")], ids=len)
def test_a_call_that_builds_nothing_leaves_the_libraries_alone(
    checkout: Path, command: tuple[str, ...]
) -> None:
    before = {path.name: path.read_bytes() for path in checkout.iterdir() if path.is_file()}
    run_setup(checkout, *command, INPAINT_KERNELS_BUILD="none")
    # Nor does a machine without a compiler, where the libraries were copied to.
    run_setup(checkout, *command, INPAINT_KERNELS_BUILD="auto", PATH=str(checkout), CXX="", CUDA_HOME="")
    assert {path.name: path.read_bytes() for path in checkout.iterdir() if path.is_file()} == before


def test_a_fresh_tree_records_why_nothing_was_built(checkout: Path) -> None:
    for path in (checkout / "_C.so", checkout / "_C_cuda.so", checkout / "_build_info.json"):
        path.unlink()
    run_setup(checkout, "-c", EDITABLE, INPAINT_KERNELS_BUILD="none")
    info = json.loads((checkout / "_build_info.json").read_text())
    assert info == {"left_out": dict.fromkeys(("cpu", "cuda"), "INPAINT_KERNELS_BUILD=none")}


def test_building_one_library_keeps_the_other_and_its_record(checkout: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    (checkout.parent / "csrc/cpu").mkdir(parents=True)
    (checkout.parent / "csrc/cpu/one.cpp").write_text("[[maybe_unused]] static int one() { return 1; }\n")
    run_setup(checkout, "setup.py", "-q", "build_ext", "--inplace", INPAINT_KERNELS_BUILD="cpu", CXX="g++")
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
    command = (
        "setup.py",
        "-q",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "temp"),
    )
    run_setup(checkout, *command, INPAINT_KERNELS_BUILD="none")
    assert not (folder / "inpaint_kernels/_C.so").exists()
    assert (checkout / "_C.so").exists()


@pytest.fixture
def setup_py(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of setup.py, without running it."""
    setuptools = pytest.importorskip("setuptools", minversion="77")
    if not (ROOT / "setup.py").is_file():
        pytest.skip("not a checkout")
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    return runpy.run_path(str(ROOT / "setup.py"))


@pytest.mark.parametrize(
    ("archs", "flags", "code", "ptx"),
    [
        ("9.0", ["arch=compute_90,code=[compute_90,sm_90]"], ["9.0"], ["9.0"]),
        (
            "12.0;8.0, 9.0",
            ["arch=compute_80,code=[compute_80,sm_80,sm_90,sm_120]"],
            ["8.0", "9.0", "12.0"],
            ["8.0"],
        ),
        (
            "8.0 9.0a 10.0+PTX",
            [
                "arch=compute_80,code=[compute_80,sm_80,sm_100]",
                "arch=compute_90a,code=sm_90a",
                "arch=compute_100,code=compute_100",
            ],
            ["8.0", "10.0", "9.0a"],
            ["8.0", "10.0"],
        ),
    ],
)
def test_architectures_share_the_ptx_of_the_oldest(
    setup_py: dict[str, Any], archs: str, flags: list[str], code: list[str], ptx: list[str]
) -> None:
    found = setup_py["parse_archs"](archs)
    assert found == [f"-gencode={flag}" for flag in flags]
    assert setup_py["compiled_for"](found, "sm") == code
    assert setup_py["compiled_for"](found, "compute") == ptx
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
    monkeypatch.setenv("INPAINT_KERNELS_BUILD", "auto")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.9")
    monkeypatch.setitem(setup_py["make_plan"].__globals__, "default_archs", lambda nvcc: "9.0")
    monkeypatch.setitem(setup_py["make_plan"].__globals__, "find_cxx", lambda: ["g++"])
    plan = setup_py["make_plan"]
    assert plan().tools.archs == ["-gencode=arch=compute_89,code=[compute_89,sm_89]"]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    assert plan().tools.archs == ["-gencode=arch=compute_90,code=[compute_90,sm_90]"]
