"""`python -m inpaint_kernels doctor`: what is installed, which backend runs each op, and what to do."""

from __future__ import annotations

import importlib.util
import os
import platform
from pathlib import Path

import torch

from . import __version__, _backend, _extension, _library

_SETTINGS = (
    "INPAINT_KERNELS_BACKEND",
    "INPAINT_KERNELS_CPU_ISA",
    "INPAINT_KERNELS_LIBRARY_DIR",
    "TRITON_INTERPRET",
)
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def _triton_version() -> str | None:
    """None when Triton is not there; raises what its import raises."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    return str(triton.__version__)


def _gpus() -> list[str]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found.append(f"{torch.cuda.get_device_name(index)} (compute capability {major}.{minor})")
    return found


def _missing_kernels(name: str) -> list[str]:
    """Operators the loaded library `name` should implement and does not: it is older than its sources."""
    operators = [
        kernel[name] for kernels in _library.KERNELS.values() for kernel in kernels if name in kernel
    ]
    for op in _library.OPS.values():
        if name in op.routes:
            operators += [op.routes[name].forward, op.routes[name].backward]
    key = _DISPATCH_KEYS[name]
    # A torch that does not tell is trusted, and so is the library.
    return [
        operator.name().partition("::")[2]
        for operator in operators
        if hasattr(operator, "has_kernel_for_dispatch_key") and not operator.has_kernel_for_dispatch_key(key)
    ]


def _rebuild(name: str) -> str:
    """How library `name` is built anew, such that a failing compile is an error and not a library left out."""
    if (Path(__file__).resolve().parent.parent / "setup.py").is_file():
        return "run `make build`"
    return f"run `INPAINT_KERNELS_BUILD={name} pip install --force-reinstall --no-deps .` in the source tree"


def _library_lines() -> tuple[list[str], list[str], list[str]]:
    """Lines about the libraries, what is broken, what to do."""
    lines, broken, todo = [], [], []
    info = _extension.build_info()
    for name, reason in _extension.status().items():
        path = _extension.library_path(name)
        lines.append(f"  {name:<9} {'not loaded: ' + reason if reason else 'loaded'}")
        if path.exists():
            lines.append(f"            {path}")
        if name in info:
            variants = f"; variants {' '.join(info[name]['variants'])}" if "variants" in info[name] else ""
            lines.append(f"            {info[name]['compiler']}{variants}")
            lines.append(f"            {' '.join(info[name]['flags'])}")
        if reason is None and (missing := _missing_kernels(name)):
            broken.append(f"{path.name} lacks {', '.join(missing)}: it was built from other sources")
            todo.append(f"{path.name} does not match the Python files: {_rebuild(name)}")
        if reason in _extension.broken():
            broken.append(str(reason))
            todo.append(f"{path.name} is installed and cannot be loaded: {_rebuild(name)}")
    if not info:
        lines.append("  no build record: this is a source tree that was never built")
    if _extension.cpu_isa() != "none":
        lines.append(f"  instruction set of the CPU kernels: {_extension.cpu_isa()}")
    return lines, broken, todo


def _missing_advice() -> list[str]:
    """What to do about parts that are absent without being broken."""
    todo = []
    left_out = _extension.build_info().get("left_out", {})
    if not _extension.library_path("cpu").exists():
        first = "install a C++17 compiler, then " if "compiler" in left_out.get("cpu", "") else ""
        todo.append(f"CPU tensors run on the slower reference formulas: {first}{_rebuild('cpu')}")
    has_cuda = torch.version.cuda is not None
    if os.path.exists("/proc/driver/nvidia/version") and not has_cuda:
        todo.append("this machine has an NVIDIA GPU and a torch without CUDA: install a CUDA build of torch")
    if has_cuda and not _extension.library_path("cuda").exists():
        first = "install the CUDA toolkit, then " if "nvcc" in left_out.get("cuda", "") else ""
        todo.append(f"the compiled CUDA kernels are not there: {first}{_rebuild('cuda')}")
    if has_cuda and importlib.util.find_spec("triton") is None:
        todo.append(
            "the Triton kernels need Triton: `pip install triton`, in the version your torch asks for"
        )
    return todo


def _choice_lines(op: _library.Op, device: str) -> list[str]:
    """Which backend automatic choice takes for this device, and why each of the others cannot run."""
    reasons = {name: _backend.unavailable(name, op.backends, device) for name in _backend.BACKENDS}
    forced = _backend.default_backend
    if forced is not None:
        chosen = f"{forced} (INPAINT_KERNELS_BACKEND)" + (
            f", which fails: {reasons[forced]}" if reasons[forced] else ""
        )
    else:
        order = _backend.AUTOMATIC[device]
        chosen = next(name for name in order if reasons[name] is None)
    absent = " (this torch sees no CUDA device)" if device == "cuda" and not torch.cuda.is_available() else ""
    lines = [f"    {device} tensors: {chosen}{absent}"]
    lines += [f"        not {name:<7} {reason}" for name, reason in reasons.items() if reason is not None]
    return lines


def _op_lines() -> list[str]:
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, op in _library.OPS.items():
        text = tuple(line for device in ("cpu", "cuda") for line in _choice_lines(op, device))
        groups.setdefault(text, []).append(name)
    # Ops with the same answers share one block: reasons mostly hold for all of them.
    return [line for text, names in groups.items() for line in (f"  {', '.join(names)}", *text)]


def main() -> int:
    """Prints the report; returns 1 when something installed is broken, else 0."""
    broken, todo = [], []
    try:
        triton = _triton_version() or "not installed"
    except Exception as error:
        triton = f"broken: {error}"
        broken.append(f"triton is installed and cannot be imported: {error}")
        todo.append("reinstall triton in the version your torch asks for")
    gpus = _gpus()
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
