"""Whether `_C_cuda.so` can run on a driver and a GPU: NVIDIA's rules of compatibility over the build record."""

from __future__ import annotations

import ctypes
import re
from typing import Any, NamedTuple

Version = tuple[int, int]

# The kernels use instructions of this compute capability (csrc/cuda/tensor_core.cuh).
OLDEST: Version = (8, 0)
# Of integrated GPUs (Jetson): they and the others do not run each other's machine code.
INTEGRATED: frozenset[Version] = frozenset({(8, 7), (10, 1)})


class Built(NamedTuple):
    """What the library holds. `toolkit` is the version of CUDA its runtime and its PTX are of."""

    toolkit: Version
    architectures: tuple[str, ...]
    ptx: tuple[str, ...]


def read(record: Any) -> Built | None:
    """The part of the build record about `_C_cuda.so`; None, and nothing is refused, when it does not tell."""
    try:
        built = Built(_version(record["toolkit"]), tuple(record["architectures"]), tuple(record["ptx"]))
        for architecture in built.architectures + built.ptx:
            _parse(architecture)
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return built


def driver_version() -> Version | None:
    """The newest CUDA the driver supports; None without a driver. Starts no CUDA context."""
    number = ctypes.c_int()
    try:
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return number.value // 1000, number.value % 1000 // 10


def refused_by_driver(built: Built, driver: Version | None) -> str | None:
    """A runtime runs on every driver of its own major version and on newer ones."""
    if driver is None or driver[0] >= built.toolkit[0]:
        return None
    runtime = f"_C_cuda.so carries the runtime of CUDA {_text(built.toolkit)}"
    return f"{runtime}, and the driver supports CUDA {_text(driver)}"


def refused_by_device(built: Built, capability: Version, driver: Version | None) -> str | None:
    """Machine code runs within its major version, from its minor version on; PTX on everything newer, where the
    driver is as new as the toolkit that wrote it."""
    if any(_runs(architecture, capability) for architecture in built.architectures):
        return None
    usable = [architecture for architecture in built.ptx if _translates(architecture, capability)]
    if usable and (driver is None or driver >= built.toolkit):
        return None
    architectures = ", ".join(built.architectures) or "none"
    reason = (
        f"_C_cuda.so was compiled for compute capability {architectures}, and the GPU has {_text(capability)}"
    )
    if usable:
        reason += (
            f"; the driver of CUDA {_text(driver)} cannot compile its PTX of CUDA {_text(built.toolkit)}"
        )
    return reason


def wanted(built: Built, capability: Version) -> str:
    """TORCH_CUDA_ARCH_LIST of a library that runs on this GPU as well."""
    return " ".join(sorted({*built.architectures, _text(capability)}, key=_parse))


def _parse(architecture: str) -> tuple[int, int, str]:
    found = re.fullmatch(r"(\d+)\.(\d)([af]?)", architecture)
    if found is None:
        raise ValueError(f"architecture: got {architecture!r}, allowed: such as '9.0', '9.0a', '10.0f'")
    return int(found[1]), int(found[2]), found[3]


def _version(text: str) -> Version:
    major, minor = text.split(".")
    return int(major), int(minor)


def _text(version: Version | None) -> str:
    return "none" if version is None else f"{version[0]}.{version[1]}"


def _runs(architecture: str, capability: Version) -> bool:
    """Machine code; and PTX that is bound to one GPU ("a") or its family ("f")."""
    major, minor, feature = _parse(architecture)
    if feature == "a" or not INTEGRATED.isdisjoint({(major, minor), capability}):
        return capability == (major, minor)
    return capability[0] == major and capability[1] >= minor


def _translates(architecture: str, capability: Version) -> bool:
    major, minor, feature = _parse(architecture)
    return _runs(architecture, capability) if feature else capability >= (major, minor)
