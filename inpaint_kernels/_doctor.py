"""`python -m inpaint_kernels doctor`: what is installed, which backend runs each op, and what to do."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import __all__ as PUBLIC
from . import __version__, _backend, _extension, _library

_SETTINGS = (
    "INPAINT_KERNELS_BACKEND",
    "INPAINT_KERNELS_CPU_ISA",
    "INPAINT_KERNELS_LIBRARY_DIR",
    "TRITON_INTERPRET",
)
# Functions without an op of their own, by the name of their file: the op whose kernels they run.
_KERNELS_OF = {
    "composite": "stacked_images",
    "feature_matching": "feature_distance",
    "gradient_loss": "total_variation",
    "ms_ssim": "ssim",
}


def _triton_version() -> str | None:
    """None when Triton is not there; raises what its import raises."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


def _gpus() -> dict[str, list[int]]:
    """Indices of the GPUs by name and compute capability, in words."""
    gpus: dict[str, list[int]] = {}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})"
        gpus.setdefault(name, []).append(index)
    return gpus


def _devices() -> dict[str, torch.device]:
    """What tensors may lie on, each kind of GPU once, by its name in the report."""
    kinds = list(_gpus().values())
    devices = {"cpu": torch.device("cpu")}
    if len(kinds) < 2:
        return {**devices, "cuda": torch.device("cuda", 0)}
    for indices in kinds:
        devices[", ".join(f"cuda:{index}" for index in indices)] = torch.device("cuda", indices[0])
    return devices


def _library_lines() -> tuple[list[str], list[str], list[str]]:
    """Lines about the libraries, what is broken, what to do."""
    lines, broken, todo = [], [], []
    info = _extension.build_info()
    for name, problem in _extension.problems().items():
        path = _extension.library_path(name)
        lines.append(f"{name:<9} {'not used: ' + problem.reason if problem else 'loaded'}")
        if path.exists():
            lines.append(f"          {path}")
        if name in info:
            lines += [f"          {line}" for line in _built_of(info[name])]
        if problem is not None and problem.kind == "broken":
            broken.append(problem.reason)
        if problem is not None and (
            problem.kind != "absent" or name == "cpu" or torch.version.cuda is not None
        ):
            todo.append(f"{problem.reason}: {problem.remedy}")
    for label, device in _devices().items():
        problem = _extension.problem("cuda", device) if device.type == "cuda" else None
        if problem is not None and problem != _extension.problems()["cuda"]:
            lines.append(f"          not used on {label}: {problem.reason}")
            todo.append(f"{problem.reason}: {problem.remedy}")
    if not info:
        lines.append("no build record: this is a source tree that was never built")
    if _extension.cpu_isa() != "none":
        lines.append(f"instruction set of the CPU kernels: {_extension.cpu_isa()}")
    return lines, broken, todo


def _built_of(record: dict[str, Any]) -> list[str]:
    """Compiler and flags of one library; what the CUDA library is for."""
    variants = f"; variants {' '.join(record['variants'])}" if "variants" in record else ""
    lines = [f"{record['compiler']}{variants}", " ".join(record["flags"])]
    if "toolkit" in record:
        ptx = f", PTX of {' '.join(record['ptx'])}" if record["ptx"] else ""
        architectures = " ".join(record["architectures"])
        lines.append(f"CUDA {record['toolkit']}, compute capability {architectures}{ptx}")
    return lines


def _missing_advice() -> list[str]:
    """What to do about an absent torch with CUDA or Triton; of the libraries `_library_lines` tells."""
    if torch.version.cuda is not None:
        installed = importlib.util.find_spec("triton") is not None
        return [] if installed else [f"{_backend.NO_TRITON.reason}: {_backend.NO_TRITON.remedy}"]
    if os.path.exists("/proc/driver/nvidia/version"):
        return ["this machine has an NVIDIA GPU and a torch without CUDA: install a CUDA build of torch"]
    return []


def _choice_lines(op: _library.Op, label: str, device: torch.device) -> list[str]:
    """Which backend automatic choice takes for this device, and why each of the others cannot run."""
    reasons = {name: _backend.unavailable(name, op.backends, device) for name in _backend.BACKENDS}
    forced = _backend.default_backend
    if forced is None:
        chosen = next(name for name in _backend.AUTOMATIC[device.type] if reasons[name] is None)
    else:
        fails = f", which fails: {reasons[forced]}" if reasons[forced] else ""
        chosen = f"{forced} (INPAINT_KERNELS_BACKEND){fails}"
    absent = device.type == "cuda" and torch.cuda.device_count() == 0
    lines = [f"  {label} tensors: {chosen}{' (this torch sees no CUDA device)' if absent else ''}"]
    return lines + [f"      not {name:<7} {reason}" for name, reason in reasons.items() if reason is not None]


def _function_lines() -> list[str]:
    """What runs every public function. Functions with the same answers share one block."""
    devices = _devices()
    blocks: dict[tuple[str, ...], list[str]] = {}
    for name in PUBLIC:
        function = getattr(sys.modules[__package__], name)
        if isinstance(function, types.FunctionType):
            file = function.__module__.rpartition(".")[2]
            op = _library.OPS.get(_KERNELS_OF.get(file, file))
            lines = [line for item in devices.items() for line in _choice_lines(op, *item)] if op else []
            blocks.setdefault(tuple(lines), []).append(name)
    plain = blocks.pop((), [])
    text = [line for lines, names in blocks.items() for line in (", ".join(names), *lines)]
    return [*text, ", ".join(plain), "  all tensors: plain PyTorch, which has no kernels to choose from"]


def _print(title: str, lines: Sequence[str]) -> None:
    print("\n".join([f"\n{title}", *(f"  {line}" for line in lines)]))


def main() -> int:
    """Prints the report; returns 1 when something installed is broken, else 0, also where it suits another GPU."""
    lines, broken, todo = _library_lines()
    todo += _missing_advice()
    try:
        triton = _triton_version() or "not installed"
    except Exception as error:
        triton = f"broken: {error}"
        broken.append(f"triton is installed and cannot be imported: {error}")
        todo.append("reinstall triton in the version your torch asks for")
    gpus = [f"{len(indices)} x {name}" if len(indices) > 1 else name for name, indices in _gpus().items()]
    print(f"inpaint_kernels {__version__}  ({Path(__file__).resolve().parent})")
    print(f"  python    {platform.python_version()}, {platform.system()} {platform.machine()}")
    print(f"  torch     {torch.__version__}, CUDA {torch.version.cuda or 'none'}")
    print(f"  triton    {triton}")
    print(f"  GPU       {'; '.join(gpus) or 'none'}")
    for name in _SETTINGS:
        if name in os.environ:
            print(f"  {name}={os.environ[name]}")
    _print("libraries", lines)
    _print("functions: what runs, and why the others cannot", _function_lines())
    if broken:
        _print("broken", broken)
    _print("what to do", todo or ["nothing"])
    return 1 if broken else 0
