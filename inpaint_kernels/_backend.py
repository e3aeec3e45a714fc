"""Chooses the implementation of an op, and says why the others cannot run."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings

import torch

from . import _extension

BACKENDS = ("cuda", "triton", "cpu", "reference")
AUTOMATIC = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_log = logging.getLogger("inpaint_kernels")
_chosen: dict[tuple[object, ...], str] = {}
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _read_default() -> str | None:
    name = os.environ.get("INPAINT_KERNELS_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"INPAINT_KERNELS_BACKEND is {name!r}; allowed: {', '.join(BACKENDS)}")
    return name


default_backend: str | None = _read_default()


def unavailable(
    backend: str, available: tuple[str, ...], device: str, dtypes: tuple[torch.dtype, ...] = ()
) -> str | None:
    """None when `backend` can run on this device type and these dtypes, else the reason as a sentence.

    `available` are the backends the op has kernels for.
    """
    if backend == "reference":
        return None
    if backend not in available:
        return f"this op has no {backend} kernels"
    if backend == "cpu":
        if device != "cpu":
            return f"the cpu kernels read CPU tensors, not {device}"
        return _extension.status()["cpu"]
    if device != "cuda" and not (backend == "triton" and _INTERPRETED and device == "cpu"):
        return f"the {backend} kernels read CUDA tensors, not {device}"
    if torch.float64 in dtypes:
        return f"the {backend} kernels do not compute in float64"
    if backend == "triton":
        return None if _HAS_TRITON else "triton is not installed"
    return _extension.status()["cuda"]


def _caller_level() -> int:
    """`stacklevel` of the first frame outside this package, counted from the function that warns."""
    package = __name__.rpartition(".")[0] + "."
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(package):
        level, frame = level + 1, frame.f_back
    return level


def _resolve(
    op: str, available: tuple[str, ...], backend: str | None, device: str, dtypes: tuple[torch.dtype, ...]
) -> str:
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: got {backend!r}, allowed: {', '.join(BACKENDS)}")
        reason = unavailable(backend, available, device, dtypes)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}")
        return backend
    reasons = []
    for candidate in AUTOMATIC.get(device, ("reference",)):
        reason = unavailable(candidate, available, device, dtypes)
        if reason is None:
            break
        reasons.append(f"{candidate}: {reason}")
    if reasons and not torch.compiler.is_compiling():
        message = f"{op} runs on {candidate!r} because " + "; ".join(reasons)
        if candidate == "reference" and device == "cuda":
            message += ". `python -m inpaint_kernels doctor` tells what to do."
            warnings.warn(message, stacklevel=_caller_level())
        else:
            _log.debug(message)
    return candidate


def choose(
    op: str, available: tuple[str, ...], backend: str | None, device: torch.device, *dtypes: torch.dtype
) -> str:
    """Backend of this call. The answer depends only on the arguments, so it is worked out (and a fallback to
    `reference` on a GPU is warned of) once for each combination."""
    if backend is None:
        backend = default_backend
    if torch.compiler.is_compiling():
        return _resolve(op, available, backend, device.type, dtypes)
    key = (op, backend, device.type, dtypes)
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _resolve(op, available, backend, device.type, dtypes)
    return found
