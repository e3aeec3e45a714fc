"""Every private name of torch that this package uses, each with what takes over when torch drops it.

The names are looked up here alone, while the package is imported. A name that is gone costs speed, not right results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def _find(path: str) -> Any:
    """What torch has under this name, or None."""
    value: Any = torch
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


# An operator with a registered autograd rule costs about 7 us a call even without a gradient; below autograd it does
# not. Without the name every call goes through the rule.
below_autograd: Callable[[], Any] = _find("_C._AutoDispatchBelowAutograd") or contextlib.nullcontext

# The innermost mode, None without one. Without the name there may always be one: no call passes by the dispatcher.
current_mode: Callable[[], Any] = _find("utils._python_dispatch._get_current_dispatch_mode") or (lambda: True)
_mode_stack: Callable[[], list[Any]] | None = _find("utils._python_dispatch._get_current_dispatch_mode_stack")
# Without both names no counter is found; the caller then registers its formulas with torch.utils.flop_counter, which
# imports Triton.
FINDS_COUNTERS = _mode_stack is not None or current_mode() is not True


def flop_registries() -> list[dict[Any, Any]]:
    """Of every active FlopCounterMode, which took torch's registry when it was made: its formulas by operator."""
    modes = _mode_stack() if _mode_stack is not None else [current_mode()]
    registries = [getattr(getattr(mode, "counter", None), "flop_registry", None) for mode in modes]
    return [registry for registry in registries if isinstance(registry, dict)]


# Not None, or True, under torch.jit.trace; the public name takes 40 ns more. Torch.jit as a whole may go.
is_traced: Callable[[], Any] = _find("_C._get_tracing_state") or _find("jit.is_tracing") or (lambda: False)

_transforms_active: Callable[[], bool] | None = _find("_C._are_functorch_transforms_active")


def transformed(tensors: Iterable[Any]) -> bool:
    """Whether a transform of torch.func (grad, jvp, vmap, ...) is active; without the name, on one of the tensors."""
    if _transforms_active is not None:
        return _transforms_active()
    if torch.compiler.is_compiling():
        return False
    return any(isinstance(t, Tensor) and torch.func.debug_unwrap(t) is not t for t in tensors)


_is_batched: Callable[[Any], bool] | None = _find("_C._functorch.is_legacy_batchedtensor")


def is_batched(gradient: Tensor) -> bool:
    """Whether ``torch.autograd.grad(..., is_grads_batched=True)`` made this gradient, by a vmap of its own."""
    if _is_batched is not None:
        return _is_batched(gradient)
    try:
        gradient.untyped_storage()
    except NotImplementedError:
        return True
    return False


_KNOWS_LEVEL = hasattr(forward_ad, "_current_level")


def may_be_dual() -> bool:
    """Whether a level of forward-mode AD is open; without the name there may always be one."""
    return not _KNOWS_LEVEL or forward_ad._current_level >= 0


def is_of_a_tracer(kind: type) -> bool:
    """FakeTensor, FunctionalTensor: torch's own stand-ins for tensors, to which operators are registered.

    Were they to move, they would count as subclasses of the user, which get the formula instead of an operator.
    """
    return kind.__module__.startswith("torch._subclasses.")


_mkldnn_has_bfloat16: Callable[[], bool] | None = _find("ops.mkldnn._is_mkldnn_bf16_supported")


def has_fast_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 arithmetic on this CPU; without the name AVX-512 is taken for it."""
    if _mkldnn_has_bfloat16 is None:
        return "AVX512" in torch.backends.cpu.get_cpu_capability()
    return bool(_mkldnn_has_bfloat16())


# torch registers named tuples for torch.export.save by this name alone. Without it programs that return one still
# export, and torch.export.save refuses them.
register_named_tuple: Callable[..., None] | None = _find("utils._pytree._register_namedtuple")
