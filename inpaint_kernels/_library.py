"""Registers an op once: one schema, one fake, one autograd formula for all its compiled backends."""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils import _python_dispatch

from . import _backend

NAMESPACE = "inpaint_kernels"
BACKENDS = ("cpu", "triton", "cuda")
OPS: dict[str, Op] = {}
# What `define_kernel` made, by op.
KERNELS: dict[str, list[dict[str, Any]]] = {}
_library = torch.library.Library(NAMESPACE, "FRAGMENT")

# A registered autograd rule costs about 7 us a call even without a gradient. Calls that need no rule, or whose
# rule is `_Route.function`, go below it. Should the private name go away, they are slower and still right.
below_autograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)


class _Route:
    """One backend of one op: its forward and backward operators, and the eager autograd node over them."""

    def __init__(self, op: Op, backend: str) -> None:
        self.forward = forward_op = _define(
            f"{op.name}_{backend}", op.schema, functools.partial(op.fake, backend)
        )
        self.backward = backward_op = _define(
            f"{op.name}_backward_{backend}", op.backward_schema, op.backward_fake
        )
        self.composed: Callable[..., Any] | None = None
        run_backward: Callable[..., Any] = backward_op
        if op.implement is not None:
            self.composed, run_backward = (functools.partial(f, backend) for f in op.implement)

        nothing = (None,) * len(forward_op._schema.arguments)

        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            needs = ctx.needs_input_grad
            direct = op.implement is not None and is_plain(grads)
            found = op.backward(ctx, run_backward if direct else backward_op, needs, *grads[: op.outputs])
            if op.lists:
                return found + tuple(
                    [None] * len(n) if isinstance(n, list) else None for n in needs[len(found) :]
                )
            return found + nothing[len(found) :]

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            output = _as_tuple(output)
            ctx.set_materialize_grads(False)
            ctx.mark_non_differentiable(*_flatten(output[op.outputs :])[1])
            ctx.backend = backend
            op.save(ctx, inputs, output)

        torch.library.register_autograd(forward_op._schema.name, backward, setup_context=setup, lib=_library)

        class Function(torch.autograd.Function):
            # The `forward(ctx, ...)` form: the `setup_context` form inspects signatures on every call (+45 us).
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = _as_tuple(self.run(args))
                ctx.set_materialize_grads(False)
                ctx.backend = backend
                op.save(ctx, args, output)
                return output[0] if op.outputs == 1 else output[: op.outputs]

        Function.backward = staticmethod(backward)  # type: ignore[method-assign]

        class ListFunction(torch.autograd.Function):
            # Lists of tensors are invisible to autograd.Function: they travel flat, with their lengths in front.
            @staticmethod
            def forward(ctx: Any, lengths: tuple[int, ...], *flat: Any) -> Any:
                ctx.lengths = lengths
                return Function.forward(ctx, *_unflatten(lengths, flat))

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> Any:
                needs = _unflatten(ctx.lengths, ctx.needs_input_grad[1:])
                found = op.backward(ctx, backward_op, needs, *grads[: op.outputs])
                given = _flatten(found)[1]
                return (None, *given, *(None,) * (len(ctx.needs_input_grad) - 1 - len(given)))

        self.function = Function
        self.list_function = ListFunction

    def run(self, args: tuple[Any, ...]) -> Any:
        """The forward without autograd; where nobody watches, without the dispatcher, which converts a score of
        arguments twice."""
        with below_autograd():
            if self.composed is not None and is_plain(args):
                return self.composed(*args)
            return self.forward(*args)

    def differentiable(self, *args: Any) -> Any:
        """The differentiable outputs of an op with list arguments, connected to the graph."""
        lengths, flat = _flatten(args)
        return self.list_function.apply(lengths, *flat)


_PLAIN = frozenset(
    (Tensor, Parameter, type(None), bool, int, float, str, list, tuple, torch.Size, torch.dtype)
)


def is_plain(args: tuple[Any, ...]) -> bool:
    """No compiler, trace, mode or transform (vmap) of torch, and no subclass among the arguments, wants to see the
    operators that are called."""
    return (
        not torch.compiler.is_compiling()
        and _python_dispatch._get_current_dispatch_mode() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._are_functorch_transforms_active()
        and _PLAIN.issuperset(map(type, args))
    )


def _flatten(args: tuple[Any, ...]) -> tuple[tuple[int, ...], list[Any]]:
    """(lengths, flat): lists of tensors (or gradients) spliced in; length -1 marks what was no such list."""
    lengths: list[int] = []
    flat: list[Any] = []
    for arg in args:
        if isinstance(arg, list) and all(item is None or isinstance(item, Tensor) for item in arg):
            lengths.append(len(arg))
            flat += arg
        else:
            lengths.append(-1)
            flat.append(arg)
    return tuple(lengths), flat


def _unflatten(lengths: tuple[int, ...], flat: tuple[Any, ...]) -> list[Any]:
    args: list[Any] = []
    at = 0
    for length in lengths:
        args.append(flat[at] if length < 0 else list(flat[at : at + length]))
        at += 1 if length < 0 else length
    return args


class Op:
    """An op with compiled backends.

    Args:
        name: the op's name in every folder.
        schema, backward_schema: arguments and returns, "(Tensor pred, ...) -> (Tensor, ...)".
        outputs: how many leading outputs are differentiable; the rest is what the backward needs.
        fake, backward_fake: the same functions on metadata alone. `fake(backend, ...)` is told the backend, for what
            a forward keeps for its own backward may differ.
        save: `save(ctx, inputs, output)` stores what the backward needs; `ctx.backend` is there already.
        backward: `backward(ctx, op, needs, *grads)` returns the gradients of the leading inputs (a list for a list);
            `needs` tells which are wanted, nested likewise. With grad mode on (`create_graph=True`) it must use
            differentiable torch functions instead of `op`.
        lists: whether an argument is a list of tensors.
        implement: for an op made of kernels (see `define_kernel`) around calls of torch: `(forward, backward)`, each
            called with the backend first. Without it, every backend registers the two functions itself.
        backends: those with kernels, besides `reference`.
    """

    def __init__(
        self,
        name: str,
        *,
        schema: str,
        backward_schema: str,
        outputs: int,
        fake: Callable[..., Any],
        backward_fake: Callable[..., Any],
        save: Callable[..., None],
        backward: Callable[..., tuple[Tensor | None, ...]],
        backends: tuple[str, ...] = BACKENDS,
        lists: bool = False,
        implement: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    ) -> None:
        self.name, self.schema, self.backward_schema, self.outputs = name, schema, backward_schema, outputs
        self.fake, self.backward_fake, self.save, self.backward = fake, backward_fake, save, backward
        self.backends = backends
        self.lists, self.implement = lists, implement
        self.routes = {backend: _Route(self, backend) for backend in backends}
        if implement is not None:
            for backend in backends:
                for suffix, composed in zip(("", "_backward"), implement, strict=True):
                    _implement(f"{name}{suffix}_{backend}", functools.partial(composed, backend))
        elif "triton" in backends:
            for suffix, function in (("", "forward"), ("_backward", "backward")):
                _implement(f"{name}{suffix}_triton", _lazy_triton(name, function))
        OPS[name] = self

    def choose(self, backend: str | None, device: torch.device, *dtypes: torch.dtype) -> str:
        """Backend of this call; raises when a forced one cannot run."""
        return _backend.choose(self.name, self.backends, backend, device, *dtypes)

    def __call__(self, backend: str, needs_grad: bool, *args: Any) -> Any:
        """Runs one compiled backend; returns the differentiable outputs (a tensor when there is one)."""
        route = self.routes[backend]
        if torch.compiler.is_compiling():
            output = route.forward(*args)
        elif needs_grad:
            return route.differentiable(*args) if self.lists else route.function.apply(*args)
        else:
            output = route.run(args)
        output = _as_tuple(output)
        return output[0] if self.outputs == 1 else output[: self.outputs]


def _as_tuple(output: Any) -> tuple[Any, ...]:
    """An operator with a single return gives it bare."""
    return (output,) if isinstance(output, Tensor) else output


def _define(name: str, schema: str, fake: Callable[..., Any] | None) -> Any:
    _library.define(name + schema)
    if fake is not None:
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def _implement(name: str, function: Callable[..., Any]) -> None:
    """Python code as the implementation of an operator, also on the CPU (Triton's interpreter)."""
    for key in ("CUDA", "CPU"):
        _library.impl(name, function, key)


def define_kernel(
    op: str,
    part: str,
    schema: str,
    *,
    fake: Callable[..., Any] | None = None,
    backends: tuple[str, ...] = BACKENDS,
) -> dict[str, Any]:
    """One kernel of an op that is composed of several: the operators `<op>_<part>_<backend>` by backend.

    No autograd of its own. `fake` is needed where a graph holds the kernel itself instead of the op around it.
    """
    found = {backend: _define(f"{op}_{part}_{backend}", schema, fake) for backend in backends}
    if "triton" in backends:
        _implement(f"{op}_{part}_triton", _lazy_triton(op, part))
    KERNELS.setdefault(op, []).append(found)
    return found


def define_setting(name: str, read: Callable[[], bool]) -> None:
    """The operator `<name>() -> bool`: a setting of torch for kernels in C++, whose stable ABI does not reach it."""
    _library.define(f"{name}() -> bool")
    _library.impl(name, read, "CompositeExplicitAutograd")


def _lazy_triton(module: str, function: str) -> Callable[..., Any]:
    """The Triton launcher, imported on its first call: importing this package must not import Triton."""
    found: list[Callable[..., Any]] = []

    def kernel(*args: Any) -> Any:
        if not found:
            found.append(getattr(importlib.import_module(f"{__package__}.triton_kernels.{module}"), function))
        return found[0](*args)

    return kernel
