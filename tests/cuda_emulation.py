"""Runs the CUDA backend on CPU tensors: csrc/cuda compiled by g++, blocks and threads emulated (csrc/emulation).

`install()` makes `backend="cuda"` take CPU tensors, so any test of the ops can run on the kernel source as it
stands, launch logic included. Alignment of vector accesses is checked; races and speed are not.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from processes import locked

from inpaint_kernels import _backend

ROOT = Path(__file__).resolve().parent.parent
TORCH = Path(torch.__file__).parent
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
# -O1 costs half a minute of compilation more than -O0, and its kernels take a third of the time.
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-fno-strict-aliasing", "-fvisibility=hidden", *WARNINGS]
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def build() -> Path:
    """The library, compiled if the sources changed: about a minute on one core."""
    compiler = shutil.which("g++")
    if compiler is None or not (ROOT / "csrc/cuda").is_dir():
        pytest.skip("needs g++ and the sources")
    folders = ("csrc/cuda", "csrc/common", "tests/csrc/emulation")
    files = sorted(f for folder in folders for f in (ROOT / folder).rglob("*") if f.is_file())
    digest = hashlib.sha256(f"{torch.__version__} {FLAGS}".encode() + b"".join(f.read_bytes() for f in files))
    folder = ROOT / "build/emulation"
    library = folder / f"cuda_{digest.hexdigest()[:16]}.so"
    with locked(folder):
        if not library.is_file():
            _compile(compiler, folder, library)
    return library


def _compile(compiler: str, folder: Path, library: Path) -> None:
    includes = [f"-I{ROOT}/tests/csrc/emulation", f"-I{ROOT}/csrc", "-isystem", f"{TORCH}/include"]
    command = [compiler, *FLAGS, STABLE_ABI, *includes, "-x", "c++", "-c"]
    sources = (ROOT / "csrc/cuda").glob("*.cu")
    objects = {source: folder / f"{source.stem}.o" for source in sources}
    runs = [subprocess.Popen([*command, str(source), "-o", str(obj)]) for source, obj in objects.items()]
    codes = [run.wait() for run in runs]
    if any(codes):
        raise RuntimeError("the CUDA sources do not compile as C++")
    built = library.with_suffix(".new")
    libraries = [f"-L{TORCH}/lib", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run(
        [compiler, "-shared", "-o", str(built), *map(str, objects.values()), *libraries], check=True
    )
    for obj in objects.values():
        obj.unlink()
    built.replace(library)


@contextmanager
def install() -> Iterator[None]:
    """`backend="cuda"` runs on CPU tensors inside."""
    torch.ops.load_library(str(build()))
    unavailable, chosen = _backend.unavailable, _backend._chosen

    def emulated(
        backend: str, available: tuple[str, ...], device: torch.device, dtypes: tuple[torch.dtype, ...] = ()
    ) -> str | None:
        on_gpu = torch.device("cuda") if backend == "cuda" else device
        reason = unavailable(backend, available, on_gpu, dtypes)
        runs = backend == "cuda" and "cuda" in available and torch.float64 not in dtypes
        return None if runs else reason

    _backend.unavailable, _backend._chosen = emulated, {}
    try:
        yield
    finally:
        _backend.unavailable, _backend._chosen = unavailable, chosen


@pytest.fixture(autouse=True, scope="module")
def emulation() -> Iterator[None]:
    """Imported by a module of tests, which then run with the emulated kernels."""
    with install():
        yield
