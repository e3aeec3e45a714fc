"""`python -m inpaint_kernels doctor`: what is installed, which backend runs each op, and what to do."""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path
from typing import Any

import torch

from . import __version__, _backend, _extension, _library

_SETTINGS = (
    "INPAINT_KERNELS_BACKEND",
    "INPAINT_KERNELS_CPU_ISA",
    "INPAINT_KERNELS_LIBRARY_DIR",
    "TRITON_INTERPRET",
)


def _triton_version() -> str | None:
    """None when Triton is not there; raises what its import raises."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


def _gpus() -> dict[str, list[int]]:
    """Indices of the GPUs by name and compute capability, in words."""
    found: dict[str, list[int]] = {}
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        name = f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})"
        found.setdefault(name, []).append(index)
    return found


def _devices() -> dict[str, torch.device]:
    """What tensors may lie on, each kind of GPU once, by its name in the report."""
    kinds = list(_gpus().values())
    found = {"cpu": torch.device("cpu")}
    if len(kinds) < 2:
        return {**found, "cuda": torch.device("cuda", 0)}
    for indices in kinds:
        found[", ".join(f"cuda:{index}" for index in indices)] = torch.device("cuda", indices[0])
    return found


def _library_lines() -> tuple[list[str], list[str], list[str]]:
    """Lines about the libraries, what is broken, what to do."""
    lines, broken, todo = [], [], []
    info = _extension.build_info()
    for name, problem in _extension.problems().items():
        path = _extension.library_path(name)
        lines.append(f"  {name:<9} {'not used: ' + problem.reason if problem else 'loaded'}")
        if path.exists():
            lines.append(f"            {path}")
        if name in info:
            lines += [f"            {line}" for line in _built_of(info[name])]
        if problem is not None and problem.kind == "broken":
            broken.append(problem.reason)
        if problem is not None and problem.kind != "absent":
            todo.append(f"{problem.reason}: {problem.remedy}")
    for label, device in _devices().items():
        problem = _extension.problem("cuda", device) if device.type == "cuda" else None
        if problem is not None and problem != _extension.problems()["cuda"]:
            lines.append(f"            not used on {label}: {problem.reason}")
            todo.append(f"{problem.reason}: {problem.remedy}")
    if not info:
        lines.append("  no build record: this is a source tree that was never built")
    if _extension.cpu_isa() != "none":
        lines.append(f"  instruction set of the CPU kernels: {_extension.cpu_isa()}")
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
    """What to do about parts that are absent without being broken."""
    todo = []
    problems = _extension.problems()
    has_cuda = torch.version.cuda is not None
    if problems["cpu"] is not None and problems["cpu"].kind == "absent":
        todo.append(f"CPU tensors run on the slower reference formulas: {problems['cpu'].remedy}")
    if os.path.exists("/proc/driver/nvidia/version") and not has_cuda:
        todo.append("this machine has an NVIDIA GPU and a torch without CUDA: install a CUDA build of torch")
    if has_cuda and problems["cuda"] is not None and problems["cuda"].kind == "absent":
        todo.append(f"the compiled CUDA kernels are not there: {problems['cuda'].remedy}")
    if has_cuda and importlib.util.find_spec("triton") is None:
        todo.append(
            "the Triton kernels need Triton: `pip install triton`, in the version your torch asks for"
        )
    return todo


def _choice_lines(op: _library.Op, label: str, device: torch.device) -> list[str]:
    """Which backend automatic choice takes for this device, and why each of the others cannot run."""
    reasons = {name: _backend.unavailable(name, op.backends, device) for name in _backend.BACKENDS}
    forced = _backend.default_backend
    if forced is not None:
        chosen = f"{forced} (INPAINT_KERNELS_BACKEND)" + (
            f", which fails: {reasons[forced]}" if reasons[forced] else ""
        )
    else:
        order = _backend.AUTOMATIC[device.type]
        chosen = next(name for name in order if reasons[name] is None)
    absent = device.type == "cuda" and torch.cuda.device_count() == 0
    lines = [f"    {label} tensors: {chosen}{' (this torch sees no CUDA device)' if absent else ''}"]
    lines += [f"        not {name:<7} {reason}" for name, reason in reasons.items() if reason is not None]
    return lines


def _op_lines() -> list[str]:
    groups: dict[tuple[str, ...], list[str]] = {}
    devices = _devices()
    for name, op in _library.OPS.items():
        text = tuple(line for label, device in devices.items() for line in _choice_lines(op, label, device))
        groups.setdefault(text, []).append(name)
    # Ops with the same answers share one block: reasons mostly hold for all of them.
    return [line for text, names in groups.items() for line in (f"  {', '.join(names)}", *text)]


def main() -> int:
    """Prints the report; returns 1 when something installed is broken, else 0, also where it suits another GPU."""
    broken, todo = [], []
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
    lines, found, advice = _library_lines()
    broken += found
    todo += advice + _missing_advice()
    print("\nlibraries")
    print("\n".join(lines))
    print("\nops: what runs, and why the others cannot")
    print("\n".join(_op_lines()))
    if broken:
        print("\nbroken")
        print("\n".join(f"  {line}" for line in broken))
    print("\nwhat to do")
    print("\n".join(f"  {line}" for line in todo) or "  nothing")
    return 1 if broken else 0
