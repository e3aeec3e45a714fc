"""Loads the two compiled libraries and remembers why one cannot run, and what to do about it."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import _cuda_support

_HERE = Path(__file__).parent
_LIBRARIES = {"cpu": "_C.so", "cuda": "_C_cuda.so"}


class Problem(NamedTuple):
    """Why a library does not run, as a sentence; what to do; `kind` is "absent" (not built, or made for another
    torch), "broken" (damaged, or of other sources) or "unfit" (for this driver or this GPU)."""

    reason: str
    remedy: str
    kind: str


def build_info() -> dict[str, Any]:
    """What the build compiled and what it left out; empty when nothing was recorded."""
    try:
        record = json.loads((library_path("cpu").parent / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def library_path(name: str) -> Path:
    """Where library `name` ("cpu" or "cuda") is expected."""
    folder = os.environ.get("INPAINT_KERNELS_LIBRARY_DIR")
    return (Path(folder) if folder else _HERE) / _LIBRARIES[name]


def rebuild(name: str, settings: str = "") -> str:
    """How library `name` is built anew, such that a failing compile is an error and not a library left out."""
    if (_HERE.parent / "setup.py").is_file():
        how = f"run `{settings}make build`"
    else:
        command = f"{settings}INPAINT_KERNELS_BUILD={name} pip install --force-reinstall --no-deps ."
        how = f"run `{command}` in the source tree"
    if "INPAINT_KERNELS_LIBRARY_DIR" in os.environ:
        how += ", and unset INPAINT_KERNELS_LIBRARY_DIR or copy the library there"
    return how


def _load(name: str) -> Problem | None:
    path = library_path(name)
    if not path.exists():
        left_out = build_info().get("left_out", {}).get(name, "")
        tool, wanted = {"cpu": ("compiler", "a C++17 compiler"), "cuda": ("nvcc", "the CUDA toolkit")}[name]
        first = f"install {wanted}, then " if tool in left_out else ""
        why = f" ({left_out})" if left_out else ""
        return Problem(f"{path.name} is not installed{why}", first + rebuild(name), "absent")
    if name == "cuda" and torch.version.cuda is None:
        return Problem("this torch has no CUDA support", "install a CUDA build of torch", "absent")
    if name == "cuda" and _built is not None:
        reason = _cuda_support.refused_by_driver(_built, _driver)
        if reason is not None:
            driver = f"install an NVIDIA driver for CUDA {_built.toolkit[0]}.0 or later"
            older = f"with a CUDA toolkit that the driver supports {rebuild(name)}"
            return Problem(reason, f"{driver}, or {older}", "unfit")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return Problem(f"{path.name} is broken: {error}", rebuild(name), "broken")
    return None


def _device_problem(built: _cuda_support.Built, device: torch.device) -> Problem | None:
    # A fake tensor may name a GPU that is not there.
    if (device.index or 0) >= torch.cuda.device_count():
        return None
    capability = torch.cuda.get_device_capability(device)
    reason = _cuda_support.refused_by_device(built, capability, _driver)
    if reason is None:
        return None
    if capability < _cuda_support.OLDEST:
        return Problem(reason, "use a GPU of compute capability 8.0 or later", "absent")
    remedy = rebuild("cuda", f'TORCH_CUDA_ARCH_LIST="{_cuda_support.wanted(built, capability)}" ')
    if _cuda_support.refused_by_device(built, capability, built.toolkit) is None:
        version = ".".join(map(str, built.toolkit))
        remedy = f"install an NVIDIA driver for CUDA {version} or later, or {remedy}"
    return Problem(reason, remedy, "unfit")


def problem(name: str, device: torch.device) -> Problem | None:
    """Why library `name` cannot run on this device; None when it can."""
    problem = _problems[name]
    # torch.compile comes here only if it ignores the mark in `_backend`; it cannot trace a question to the driver.
    asks = name == device.type == "cuda" and not torch.compiler.is_dynamo_compiling()
    return _device_problem(_built, device) if problem is None and asks and _built is not None else problem


def problems() -> dict[str, Problem | None]:
    """For each library: None when it is loaded and complete, whatever the GPU, else the reason."""
    return dict(_problems)


def status() -> dict[str, str | None]:
    """The reasons of `problems()` alone."""
    return {name: found and found.reason for name, found in _problems.items()}


def refuse_incomplete(name: str, missing: list[str]) -> None:
    """Takes a loaded library out of use which lacks operators: its others may have other arguments, too."""
    kernels = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    reason = f"{_LIBRARIES[name]} was built from other sources: it lacks {kernels}"
    _problems[name] = Problem(reason, rebuild(name), "broken")


def cpu_isa() -> str:
    """Instruction set the CPU kernels use: "generic", "avx2", "avx512", or "none" without the library."""
    if _problems["cpu"] is not None:
        return "none"
    name = ctypes.CDLL(str(library_path("cpu"))).inpaint_kernels_cpu_isa
    name.restype = ctypes.c_char_p
    return str(name().decode())


_built = _cuda_support.read(build_info().get("cuda"))
# Asked only where the answer decides: elsewhere there may be no driver to load.
_driver = _cuda_support.driver_version() if torch.version.cuda is not None and _built is not None else None
_problems: dict[str, Problem | None] = {name: _load(name) for name in _LIBRARIES}
