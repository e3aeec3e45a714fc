"""Loads the two compiled libraries and remembers why one is missing."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import Any

import torch

_HERE = Path(__file__).parent
_LIBRARIES = {"cpu": "_C.so", "cuda": "_C_cuda.so"}
_reasons: dict[str, str | None] = {}


def build_info() -> dict[str, Any]:
    """What the build compiled and what it left out; empty when nothing was recorded."""
    try:
        return json.loads((library_path("cpu").parent / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


def library_path(name: str) -> Path:
    """Where library `name` ("cpu" or "cuda") is expected."""
    folder = os.environ.get("INPAINT_KERNELS_LIBRARY_DIR")
    return (Path(folder) if folder else _HERE) / _LIBRARIES[name]


def _load(name: str) -> str | None:
    path = library_path(name)
    if not path.exists():
        left_out = build_info().get("left_out", {}).get(name)
        return f"{path.name} is not installed" + (f" ({left_out})" if left_out else "")
    if name == "cuda" and torch.version.cuda is None:
        return "this torch has no CUDA support"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} is broken: {error}"
    return None


def status() -> dict[str, str | None]:
    """For each library: None when loaded, else the reason."""
    return dict(_reasons)


def broken() -> list[str]:
    """Libraries that are installed and fail to load."""
    return [reason for reason in _reasons.values() if reason is not None and "is broken" in reason]


def cpu_isa() -> str:
    """Instruction set the CPU kernels use: "generic", "avx2", "avx512", or "none" without the library."""
    if _reasons.get("cpu") is not None:
        return "none"
    name = ctypes.CDLL(str(library_path("cpu"))).inpaint_kernels_cpu_isa
    name.restype = ctypes.c_char_p
    return str(name().decode())


for _name in _LIBRARIES:
    _reasons[_name] = _load(_name)
