"""Finds out, once all ops are defined, whether the loaded libraries hold their kernels."""

from __future__ import annotations

from . import _extension, _library

_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def missing(name: str) -> list[str]:
    """Operators library `name` should implement and does not: it was built from other sources."""
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


def check() -> None:
    """Takes a library out of use that lacks kernels."""
    for name, problem in _extension.problems().items():
        if problem is None and (lacking := missing(name)):
            _extension.refuse_incomplete(name, lacking)
