"""The package as a whole: imports, layers, documentation, doctor."""

from __future__ import annotations

import ast
import doctest
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ROOT, clean_environment
from processes import fresh_python as python

import inpaint_kernels as ik
from inpaint_kernels import __main__ as command_line
from inpaint_kernels import _library

PACKAGE = Path(ik.__file__).parent
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
FUNCTIONS = [name for name in ik.__all__ if isinstance(getattr(ik, name), types.FunctionType)]

# Design: imports only point downwards. What each part of the package may import from the package itself.
MAY_IMPORT = {
    "objectives": {"objectives", "nn", "features", "ops", "reference"},
    "nn": {"nn", "features", "ops"},
    "features": {"features", "ops"},
    "ops": {"ops", "reference", "plumbing"},
    "reference": {"reference"},
    "triton_kernels": {"triton_kernels"},
    "plumbing": {"plumbing"},
    "top": {"objectives", "nn", "features", "ops", "plumbing", "top"},
}
PLUMBING = {"_library", "_backend", "_extension", "_cuda_support", "_kernels", "_torch_private"}


# As `python -m inpaint_kernels doctor`.
DOCTOR = (
    "import runpy, sys; sys.argv[1:] = ['doctor']; runpy.run_module('inpaint_kernels', run_name='__main__')"
)


def layer(module: Path) -> str:
    if len(module.parts) > 1:
        return module.parts[0]
    return "plumbing" if module.stem in PLUMBING else "top"


def imported(module: Path) -> set[str]:
    """Absolute names of everything a module imports, also inside its functions."""
    names: set[str] = set()
    # Of `a/b.py` the package is `inpaint_kernels.a`, of `a/__init__.py` likewise.
    parents = ["inpaint_kernels", *module.parts[:-1]]
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*parents[: len(parents) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            names |= {".".join([*base, alias.name]) for alias in node.names}
    return names


def forbidden_imports(module: Path) -> Iterator[str]:
    allowed = MAY_IMPORT[layer(module)]
    for name in imported(module):
        first, *rest = name.split(".")
        if first == "inpaint_kernels":
            if rest and (PACKAGE / rest[0]).is_dir():
                target = rest[0]
            else:
                target = "plumbing" if rest and rest[0] in PLUMBING else "top"
            fine = target in allowed
        elif first == "triton":
            fine = layer(module) == "triton_kernels" or module.name == "_doctor.py"
        else:
            fine = first in {"torch", "__future__"} | sys.stdlib_module_names
        if not fine:
            yield f"{module} ({layer(module)}) imports {name}"


def test_imports_point_downwards() -> None:
    assert not [name for module in MODULES for name in forbidden_imports(module)]


def test_import_is_light_and_quiet() -> None:
    """Needs neither Triton nor any optional package, prints nothing, starts no CUDA context."""
    code = """
import sys
for name in ("triton", "matplotlib", "skimage", "tqdm", "PIL"):
    sys.modules[name] = None
import torch
before = set(sys.modules)
import inpaint_kernels
assert not torch.cuda.is_initialized()
print(sorted({m.split(".")[0] for m in set(sys.modules) - before} - sys.stdlib_module_names))
"""
    # An interpreter of its own, not one forked from a process that has imported torch.
    arguments = ["-W", "error::UserWarning:inpaint_kernels", "-c", code]
    run = subprocess.run(
        [sys.executable, *arguments], env=clean_environment(), capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "['inpaint_kernels']"


def test_version_has_one_source() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+([ab]\d+|rc\d+)?", ik.__version__)
    try:
        installed = importlib.metadata.version("inpaint_kernels")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package runs from its source tree, it is not installed")
    assert installed == ik.__version__


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


@pytest.mark.parametrize("name", ik.__all__)
def test_public_names_are_documented(name: str) -> None:
    text = getattr(ik, name).__doc__
    assert text
    assert text.strip().splitlines()[0].endswith(".")
    if name in FUNCTIONS:
        for part in ("Args:", "Returns:", "Differentiable", "Raises", ">>> "):
            assert part in text, f"{name}: its docstring has no {part}"
        code = getattr(ik, name).__code__
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        missing = [argument for argument in arguments if not re.search(rf"\b{argument}\b", text)]
        assert not missing, f"{name}: its docstring does not mention {missing}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_examples_in_docstrings(name: str) -> None:
    runner = doctest.DocTestRunner()
    for example in doctest.DocTestFinder(recurse=False).find(getattr(ik, name), name):
        assert runner.run(example).failed == 0


def test_examples_in_readme() -> None:
    """In one namespace, top to bottom, as a reader would type them."""
    readme = ROOT / "README.md"
    if not readme.is_file():
        pytest.skip("not a checkout")
    text = readme.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
    assert blocks
    names: dict[str, object] = {"__name__": "readme"}
    for block in blocks:
        # So many empty lines that a failure shows the line of README.md.
        above = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(above + block[1], str(readme), "exec"), names)
    assert all(name in text for name in FUNCTIONS), "README.md leaves a public function out"


def test_doctor_tells_about_every_op() -> None:
    run = python(DOCTOR)
    assert run.returncode == 0, run.stdout + run.stderr
    for text in (
        ik.__version__,
        "torch ",
        "triton ",
        "cpu tensors:",
        "cuda tensors:",
        "what to do",
        *_library.OPS,
    ):
        assert text in run.stdout


def test_doctor_reports_a_broken_library(tmp_path: Path) -> None:
    """And the package still works, on the formulas."""
    (tmp_path / "_C.so").write_bytes(b"not a library")
    run = python(DOCTOR, INPAINT_KERNELS_LIBRARY_DIR=str(tmp_path))
    assert run.returncode == 1, run.stdout + run.stderr
    assert "_C.so is broken" in run.stdout
    assert "cpu tensors: reference" in run.stdout
    code = "import torch, inpaint_kernels as ik; print(float(ik.masked_l1_loss(*torch.ones(2, 1, 1, 2, 2))))"
    run = python(code, INPAINT_KERNELS_LIBRARY_DIR=str(tmp_path))
    assert run.stdout.strip() == "0.0", run.stderr


def test_doctor_reports_a_library_of_other_sources(tmp_path: Path) -> None:
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "old.cpp"
    source.write_text('extern "C" const char* inpaint_kernels_cpu_isa() { return "generic"; }\n')
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(tmp_path / "_C.so")], check=True)
    run = python(DOCTOR, INPAINT_KERNELS_LIBRARY_DIR=str(tmp_path))
    assert run.returncode == 1, run.stdout + run.stderr
    operators = [
        kernel["cpu"] for kernels in _library.KERNELS.values() for kernel in kernels if "cpu" in kernel
    ]
    for op in _library.OPS.values():
        if op.implement is None:
            operators += [op.routes["cpu"].forward, op.routes["cpu"].backward]
    first = operators[0].name().split("::")[1]
    sentence = (
        rf"_C\.so was built from other sources: it lacks {first}, \w+, \w+ and {len(operators) - 3} more"
    )
    assert re.search(sentence, run.stdout)
    assert "cpu tensors: reference" in run.stdout


def test_doctor_reports_a_triton_that_does_not_import(tmp_path: Path) -> None:
    (tmp_path / "triton.py").write_text("raise ImportError('libtriton.so: cannot open shared object file')\n")
    run = python(DOCTOR, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert run.returncode == 1, run.stdout + run.stderr
    assert "triton is installed and cannot be imported" in run.stdout


def test_bench_needs_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command_line, "__file__", str(tmp_path / "inpaint_kernels" / "__main__.py"))
    assert command_line.main(["bench"]) == 2
    assert "checkout" in capsys.readouterr().err


def test_bench_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys, "argv", ["bench"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stopped:
        command_line.main(["bench"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == (
        "bench: tqdm is missing; install what the benchmarks need: pip install '.[bench]'\n"
    )


def test_command_line_without_a_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line.main([])
    assert stopped.value.code == 2
    assert "doctor" in capsys.readouterr().err
