"""Chooses the implementation of an op, and says why the others cannot run."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from typing import Any

import torch

from . import _extension

BACKENDS = ("cuda", "triton", "cpu", "reference")
AUTOMATIC = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_DOCTOR = "`python -m inpaint_kernels doctor` tells what to do"
NO_TRITON = _extension.Problem(
    "triton is not installed", "`pip install triton`, in the version your torch asks for", "absent"
)
_log = logging.getLogger("inpaint_kernels")
_chosen: dict[tuple[object, ...], str] = {}
_told: set[tuple[str, str]] = set()
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _read_default() -> str | None:
    name = os.environ.get("INPAINT_KERNELS_BACKEND") or None
    if name is not None and name not in BACKENDS:
        raise ValueError(f"INPAINT_KERNELS_BACKEND is {name!r}; allowed: {', '.join(BACKENDS)}")
    return name


default_backend: str | None = _read_default()


def unavailable(
    backend: str, available: tuple[str, ...], device: torch.device, dtypes: tuple[torch.dtype, ...] = ()
) -> str | None:
    """None when `backend` can run on this device and these dtypes, else the reason as a sentence.

    `available` are the backends the op has kernels for.
    """
    if backend == "reference":
        return None
    if backend not in available:
        return f"this op has no {backend} kernels, only {', '.join(available)} and reference"
    on = device.type
    if backend == "cpu" and on != "cpu":
        return f"the cpu kernels read CPU tensors, not {on}"
    if backend != "cpu":
        if on != "cuda" and not (backend == "triton" and _INTERPRETED and on == "cpu"):
            return f"the {backend} kernels read CUDA tensors, not {on}"
        if torch.float64 in dtypes:
            return f"the {backend} kernels do not compute in float64"
    problem = _problem(backend, device)
    return None if problem is None else problem.reason


def _problem(backend: str, device: torch.device) -> _extension.Problem | None:
    """Why the kernels of a backend cannot run, whatever tensors they are called with."""
    if backend == "triton":
        return None if _HAS_TRITON else NO_TRITON
    return _extension.problem(backend, device)


def _warn_once(message: str, key: tuple[str, str]) -> None:
    if key not in _told:
        _told.add(key)
        warnings.warn(message, stacklevel=_caller_level())


def _caller_level() -> int:
    """`stacklevel` of the first frame outside this package, counted from the function that warns."""
    package = __name__.rpartition(".")[0] + "."
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(package):
        level, frame = level + 1, frame.f_back
    return level


def _tell(op: str, chosen: str, device: torch.device, reasons: tuple[tuple[str, str], ...]) -> None:
    """Says why a better backend does not run. A library that cannot run, or that is missing where the reference
    takes over, is warned of once; the reference on a GPU for every op."""
    if torch.compiler.is_dynamo_compiling():
        return
    if chosen == "reference" and device.type == "cuda":
        because = "; ".join(f"{name}: {reason}" for name, reason in reasons)
        _warn_once(f"{op} runs on {chosen!r} because {because}. {_DOCTOR}.", (op, because))
        return
    for name, reason in reasons:
        problem = _problem(name, device)
        # Of another reason, such as float64, the library is not guilty.
        if problem is None or problem.reason != reason:
            continue
        if problem.kind != "absent" or chosen == "reference":
            message = f"inpaint_kernels: {device.type} tensors run on {chosen!r} because {reason}."
            _warn_once(f"{message} To mend it: {problem.remedy}.", (name, reason))
    _log.debug("%s runs on %r because %s", op, chosen, reasons)


# What `torch.compiler.assume_constant_result` sets; that function imports the compiler, which takes seconds. With
# the mark, torch.compile calls these two while it traces instead of looking into them, so that they may ask the
# driver and warn. Without it they ask and warn less.
_function: Any
for _function in (unavailable, _tell):
    _function._dynamo_marked_constant = True


def _resolve(
    op: str,
    available: tuple[str, ...],
    backend: str | None,
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
) -> str:
    if backend is not None:
        if backend not in BACKENDS:
            raise ValueError(f"backend: got {backend!r}, allowed: {', '.join(BACKENDS)}")
        reason = unavailable(backend, available, device, dtypes)
        if reason is not None:
            if backend not in available:
                raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}")
            problem, remedy = _problem(backend, device), ""
            if problem is not None and problem.reason == reason:
                remedy = f" To mend it: {problem.remedy}."
            elif problem is not None:
                # What it would take is no help where the tensors do not suit the backend.
                reason += f"; moreover {problem.reason}"
            raise RuntimeError(f"{op}: backend {backend!r} cannot run: {reason}.{remedy} {_DOCTOR}.")
        return backend
    reasons: tuple[tuple[str, str], ...] = ()
    for candidate in AUTOMATIC.get(device.type, ("reference",)):
        reason = unavailable(candidate, available, device, dtypes)
        if reason is None:
            break
        reasons += ((candidate, reason),)
    if reasons:
        _tell(op, candidate, device, reasons)
    return candidate


def choose(
    op: str, available: tuple[str, ...], backend: str | None, device: torch.device, *dtypes: torch.dtype
) -> str:
    """Backend of this call. The answer depends only on the arguments, so it is worked out once for each
    combination."""
    if backend is None and default_backend in (*available, "reference"):
        backend = default_backend
    if torch.compiler.is_compiling():
        return _resolve(op, available, backend, device, dtypes)
    key = (op, backend, device, dtypes)
    chosen = _chosen.get(key)
    if chosen is None:
        chosen = _chosen[key] = _resolve(op, available, backend, device, dtypes)
    return chosen
