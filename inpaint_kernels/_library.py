"""Registers an op once: one schema, one fake, one autograd formula for all its compiled backends."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _backend, _extension, _torch_private
from ._torch_private import below_autograd as below_autograd

NAMESPACE = "inpaint_kernels"
BACKENDS = ("cpu", "triton", "cuda")
OPS: dict[str, Op] = {}
# What `define_kernel` made, by op: names of operators by backend.
KERNELS: dict[str, list[dict[str, Any]]] = {}
# Formulas of FlopCounterMode, by operator.
_FLOPS: dict[Any, Callable[..., int]] = {}

# Operators outlive the modules of this package: a later import finds them, and puts its own functions in the place of
# those that they call. Both are noted at the operators' namespace, which stays.
_namespace = getattr(torch.ops, NAMESPACE)
if "registered" not in vars(_namespace):
    _namespace.registered = (torch.library.Library(NAMESPACE, "FRAGMENT"), {})
_library: torch.library.Library
_functions: dict[str, dict[str, Any]]  # by operator: its schema, and Python's functions by part
_library, _functions = _namespace.registered


class _Route:
    """One backend of one op: its forward and backward operators, and the eager autograd node over them."""

    def __init__(self, op: Op, backend: str) -> None:
        name, backward_name = f"{op.name}_{backend}", f"{op.name}_backward_{backend}"
        self.forward = _define(name, op.schema, functools.partial(op.fake, backend))
        self.backward = backward_op = _define(backward_name, op.backward_schema, op.backward_fake)
        self.inputs, self.lists = op.inputs, op.lists
        self.composed: Callable[..., Any] | None = None
        run_backward: Callable[..., Any] = backward_op
        if op.implement is not None:
            self.composed, run_backward = (functools.partial(f, backend) for f in op.implement)
        for operator, formula in zip((name, backward_name), op.flops or (), strict=False):
            _count_flops(operator, formula)

        def gradients(ctx: Any, needs: Any, grads: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
            run: Callable[..., Any] | None = backward_op
            grads = grads[: op.outputs]
            if torch.is_grad_enabled():
                run = None
            elif is_plain(grads):
                run = run_backward
            elif unserved(grads) is not None:
                run = None
            for grad in grads:
                if grad is not None and _torch_private.is_batched(grad):
                    run = None
            return op.backward(ctx, run, needs, *grads)

        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
            needs = ctx.needs_input_grad
            leading = gradients(ctx, needs, grads)
            rest = needs[len(leading) :]
            return leading + tuple([None] * len(n) if isinstance(n, list) else None for n in rest)

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            output = _as_tuple(output)
            ctx.set_materialize_grads(False)
            kept = (x if isinstance(x, list) else [x] for x in output[op.outputs :])
            ctx.mark_non_differentiable(*itertools.chain(*kept))
            ctx.backend = backend
            op.save(ctx, inputs, output)

        _register(
            name,
            {"autograd": backward, "setup": setup},
            lambda f: torch.library.register_autograd(
                f"{NAMESPACE}::{name}", f["autograd"], setup_context=f["setup"], lib=_library
            ),
        )

        class Function(torch.autograd.Function):
            # `given` are the tensors that gradients are computed of, lists of them flat, as autograd.Function sees
            # no tensor inside a list, and then all arguments as one tuple: every argument costs time here.
            # The `forward(ctx, ...)` form: the `setup_context` form inspects signatures on every call (+45 us).
            @staticmethod
            def forward(ctx: Any, *given: Any) -> Any:
                args = given[-1]
                output = _as_tuple(self.run(args))
                ctx.set_materialize_grads(False)
                ctx.backend = backend
                op.save(ctx, args, output)
                if op.lists:
                    ctx.lengths = [len(arg) for arg in args[: op.inputs]]
                return output[0] if op.outputs == 1 else output[: op.outputs]

            @staticmethod
            def backward(ctx: Any, *grads: Tensor | None) -> Any:
                needs = ctx.needs_input_grad[:-1]
                if not op.lists:
                    return *gradients(ctx, needs, grads), None
                ends = list(itertools.accumulate(ctx.lengths))
                nested = [needs[end - length : end] for end, length in zip(ends, ctx.lengths, strict=True)]
                return *itertools.chain(*gradients(ctx, nested, grads)), None

        self.function = Function

    def run(self, args: tuple[Any, ...]) -> Any:
        """The forward without autograd; where nobody watches, without the dispatcher, which converts a score of
        arguments twice."""
        with below_autograd():
            if self.composed is not None and is_plain(args):
                return self.composed(*args)
            return self.forward(*args)

    def differentiable(self, args: tuple[Any, ...]) -> Any:
        """The differentiable outputs, connected to the graph."""
        tensors = args[: self.inputs]
        return self.function.apply(*(itertools.chain(*tensors) if self.lists else tensors), args)


_PLAIN = frozenset(
    (Tensor, Parameter, type(None), bool, int, float, str, list, tuple, torch.Size, torch.dtype)
)


def is_plain(args: Sequence[Any]) -> bool:
    """Nothing in torch watches this call: no compiler, trace, mode, transform or level of forward-mode AD, and no
    subclass among the arguments.

    This is the one test before a way around the dispatcher or below autograd. Where it fails, `unserved` tells
    whether a kernel will do at all.
    """
    return (
        not torch.compiler.is_compiling()
        and _torch_private.current_mode() is None
        and not _torch_private.transformed(args)
        and not _torch_private.may_be_dual()
        and not _torch_private.is_traced()
        and _PLAIN.issuperset(map(type, args))
    )


def transform_of(tensors: Sequence[Any]) -> str | None:
    """What takes other derivatives of this call than those of autograd's backward; None if nothing does."""
    if _torch_private.transformed(tensors):
        return "torch.func transforms"
    if _torch_private.may_be_dual() and (torch.compiler.is_compiling() or any(map(_is_dual, tensors))):
        return "forward-mode derivatives"
    return None


def _is_dual(value: Any) -> bool:
    return isinstance(value, Tensor) and torch.autograd.forward_ad.unpack_dual(value).tangent is not None


def unserved(tensors: Sequence[Any]) -> str | None:
    """What no kernel serves in a call that is not plain, so that it takes the formula; None if kernels will do."""
    if not torch.compiler.is_compiling():
        for registry in _torch_private.flop_registries():
            for operator, formula in _FLOPS.items():
                registry.setdefault(operator, formula)
    transform = transform_of(tensors)
    if transform is not None:
        return transform
    for tensor in tensors:
        kind = type(tensor)
        if kind not in _PLAIN and not _torch_private.is_of_a_tracer(kind):
            return f"tensors of type {kind.__name__}"
    return None


def save_for_backward(ctx: Any, *tensors: Tensor | None) -> None:
    """As ``ctx.save_for_backward``; inference tensors, which autograd cannot keep, as copies."""
    ctx.save_for_backward(*[t.clone() if t is not None and t.is_inference() else t for t in tensors])


@dataclasses.dataclass(eq=False)
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
            `needs` tells which are wanted, nested likewise. `op` is None where the gradients are differentiated again
            (`create_graph=True`, forward-mode AD, torch.func): differentiable torch functions then take its place, or
            what the op's own backward makes of ones, see `ops/_pixel.py`.
        inputs: how many leading arguments get gradients.
        lists: whether those are lists of tensors.
        implement: for an op made of kernels (see `define_kernel`) around calls of torch: `(forward, backward)`, each
            called with the backend first. Without it, every backend registers the two functions itself.
        backends: those with kernels, besides `reference`.
        flops: for FlopCounterMode, `(forward, backward)`: each takes the operator's arguments and the keyword
            `out_val`, its output. Nothing is counted without them.
    """

    name: str
    _: dataclasses.KW_ONLY
    schema: str
    backward_schema: str
    outputs: int
    fake: Callable[..., Any]
    backward_fake: Callable[..., Any]
    save: Callable[..., None]
    backward: Callable[..., tuple[Tensor | None, ...]]
    backends: tuple[str, ...] = BACKENDS
    inputs: int = 2
    lists: bool = False
    implement: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    flops: tuple[Callable[..., int], Callable[..., int]] | None = None

    def __post_init__(self) -> None:
        self.routes = {backend: _Route(self, backend) for backend in self.backends}
        for i, suffix in enumerate(("", "_backward")):
            if self.implement is not None:
                for backend in self.backends:
                    composed = functools.partial(self.implement[i], backend)
                    _implement(f"{self.name}{suffix}_{backend}", composed)
            elif "triton" in self.backends:
                launcher = _lazy_triton(self.name, ("forward", "backward")[i])
                _implement(f"{self.name}{suffix}_triton", launcher)
        OPS[self.name] = self

    def choose(
        self,
        backend: str | None,
        tensors: Sequence[Tensor | None],
        *dtypes: torch.dtype,
        refused: str | None = None,
        form: str = "",
        backends: tuple[str, ...] | None = None,
        **fixed: Tensor | Sequence[Tensor] | None,
    ) -> str:
        """Backend of this call, the reference where no kernel will do; raises when a forced one cannot run.

        Args:
            backend: as the caller of the public function gave it.
            tensors: all of the call, which tell the device and whether anything watches.
            dtypes: what has to be computed in.
            refused: what kernels do not do in this call.
            form, backends: for a form of the op that not all its backends have, what it is and those that do.
            fixed: by argument, the tensors that kernels compute no gradient to.
        """
        if refused is None and torch.is_grad_enabled():
            for name, value in fixed.items():
                given = [value] if isinstance(value, Tensor) else value or ()
                if any(t.requires_grad for t in given):
                    refused = f"computes no gradient to {name}; use backend='reference' or {name}.detach()"
        if refused is None and not is_plain(tensors):
            watcher = unserved(tensors)
            if watcher is not None:
                refused = f"does not serve {watcher}; use backend='reference'"
        if refused is not None and backend is None:
            return "reference"
        first = tensors[0]
        assert first is not None
        served = self.backends if backends is None else backends
        chosen = _backend.choose(self.name + form, served, backend, first.device, *dtypes)
        if refused is not None and chosen != "reference":
            raise RuntimeError(f"{self.name}: backend {chosen!r} {refused}")
        return chosen

    def __call__(self, backend: str, needs_grad: bool, *args: Any) -> Any:
        """Runs one compiled backend; returns the differentiable outputs (a tensor when there is one)."""
        route = self.routes[backend]
        # torch.jit.trace records the operator. Of the node it would keep the tuple, with this call's tensors in it.
        if torch.compiler.is_compiling() or _torch_private.is_traced():
            output = route.forward(*args)
        elif needs_grad:
            return route.differentiable(args)
        else:
            output = route.run(args)
        output = _as_tuple(output)
        return output[0] if self.outputs == 1 else output[: self.outputs]


def _as_tuple(output: Any) -> tuple[Any, ...]:
    """An operator with a single return gives it bare."""
    return (output,) if isinstance(output, Tensor) else output


def _define(name: str, schema: str, fake: Callable[..., Any] | None) -> Any:
    if name not in _functions:
        _library.define(name + schema)
        _functions[name] = {"schema": schema}
    elif _functions[name]["schema"] != schema:
        raise ImportError(
            f"{NAMESPACE}::{name} was registered with another schema by an earlier import; start Python anew"
        )
    if fake is not None:
        _register(
            name,
            {"fake": fake},
            lambda f: torch.library.register_fake(f"{NAMESPACE}::{name}", f["fake"], lib=_library),
        )
    return getattr(_namespace, name).default


def _register(
    name: str, given: dict[str, Callable[..., Any]], register: Callable[[dict[str, Callable[..., Any]]], Any]
) -> None:
    """Notes Python's functions of an operator; the first time, registers ones that call what is noted."""
    noted = _functions[name]
    known = noted.keys() >= given.keys()
    noted.update(given)
    if not known:
        register({part: functools.partial(_call, noted, part) for part in given})


def _call(noted: dict[str, Any], part: str, /, *args: Any, **options: Any) -> Any:
    return noted[part](*args, **options)


def _count_flops(name: str, formula: Callable[..., int]) -> None:
    operator = getattr(_namespace, name)
    _FLOPS[operator] = formula
    if not _torch_private.FINDS_COUNTERS:
        from torch.utils.flop_counter import register_flop_formula

        add = register_flop_formula(operator, get_raw=True)
        _register(name, {"flops": formula}, lambda f: add(f["flops"]))


def _implement(name: str, function: Callable[..., Any]) -> None:
    """Python code as the implementation of an operator, also on the CPU (Triton's interpreter)."""

    def register(functions: dict[str, Callable[..., Any]]) -> None:
        for key in ("CUDA", "CPU"):
            _library.impl(name, functions["kernel"], key)

    _register(name, {"kernel": function}, register)


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
    operators = {backend: _define(f"{op}_{part}_{backend}", schema, fake) for backend in backends}
    if "triton" in backends:
        _implement(f"{op}_{part}_triton", _lazy_triton(op, part))
    KERNELS.setdefault(op, []).append(operators)
    return operators


def define_setting(name: str, read: Callable[[], bool]) -> None:
    """The operator `<name>() -> bool`: a setting of torch for kernels in C++, whose stable ABI does not reach it."""
    _define(name, "() -> bool", None)
    _register(name, {"read": read}, lambda f: _library.impl(name, f["read"], "CompositeExplicitAutograd"))


def _lazy_triton(module: str, function: str) -> Callable[..., Any]:
    """The Triton launcher, imported on its first call: importing this package must not import Triton."""
    launchers: list[Callable[..., Any]] = []

    def kernel(*args: Any) -> Any:
        if not launchers:
            imported = importlib.import_module(f"{__package__}.triton_kernels.{module}")
            launchers.append(getattr(imported, function))
        return launchers[0](*args)

    return kernel


def check_libraries() -> None:
    """Once all ops are defined: takes a loaded library out of use that lacks kernels, being of other sources."""
    for name, key in (("cpu", "CPU"), ("cuda", "CUDA")):
        if _extension.problems()[name] is not None:
            continue
        operators = [each[name] for kernels in KERNELS.values() for each in kernels if name in each]
        for op in OPS.values():
            if name in op.routes:
                operators += [op.routes[name].forward, op.routes[name].backward]
        # A torch that does not tell is trusted, and so is the library.
        missing = [
            operator.name().partition("::")[2]
            for operator in operators
            if hasattr(operator, "has_kernel_for_dispatch_key")
            and not operator.has_kernel_for_dispatch_key(key)
        ]
        if missing:
            _extension.refuse_incomplete(name, missing)
