"""Compiles the Triton kernels for GPUs that are not there, exactly as the launchers would launch them."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from harness import INTERPRETING
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed")
if INTERPRETING:
    pytest.skip("interpreted kernels cannot be compiled: unset TRITON_INTERPRET", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

CAPABILITIES = (80, 90, 100)


def meta(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    """What the launchers run on."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)


class Launch(NamedTuple):
    """One recorded kernel launch."""

    kernel: Any
    arguments: dict[str, Any]
    warps: int
    options: dict[str, Any] = {}  # of the compiler


class Resources(NamedTuple):
    """What the compiler made of a kernel."""

    registers: int
    spilled: int  # bytes of stack and local memory a thread
    loads: Counter[int]  # bytes a thread loads from global memory, by the width of one access
    stores: Counter[int]
    ptx: str


def record(call: Callable[[], Any]) -> list[Launch]:
    """The kernel launches of `call`, which runs on tensors of the meta device and launches nothing."""
    launches: list[Launch] = []

    def getitem(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, num_warps: int, **options: Any) -> None:
            named = {name: options.pop(name) for name in kernel.arg_names if name in options}
            arguments = dict(zip(kernel.arg_names, args, strict=False)) | named
            assert list(arguments) == kernel.arg_names
            launches.append(Launch(kernel, arguments, num_warps, options))

        return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "__getitem__", getitem)
        call()
    return launches


def compile_launch(launch: Launch, capability: int, aligned: bool = True) -> Resources:
    """Compiles for one compute capability what Triton's launcher would compile for these arguments.

    The launcher's own binder decides what is specialised: a size of 1 becomes a constant, a multiple of 16 is noted,
    also inside tuples. Meta tensors count as 16-byte aligned, unless told otherwise.
    """
    backend, bind = _binder(launch.kernel, capability)
    options = {"num_warps": launch.warps, "debug": False, **launch.options}
    bound, specialization, rest = bind(**launch.arguments, **options)
    key = (*launch_key(launch, capability), capability, aligned)
    if key not in _COMPILED:
        packed = launch.kernel._pack_args(backend, options, bound, specialization, rest)
        _COMPILED[key] = _compile(launch.kernel, *packed, capability, aligned)
    return _COMPILED[key]


_COMPILED: dict[tuple[Any, ...], Resources] = {}


def launch_key(launch: Launch, capability: int = 90) -> tuple[Any, int, str]:
    """Under which the launcher keeps the compiled kernel: launches with the same key share one."""
    _, bind = _binder(launch.kernel, capability)
    options = str(launch.options)
    specialization = bind(**launch.arguments, num_warps=launch.warps, **launch.options)[1]
    return launch.kernel, launch.warps, options + str(specialization)


@functools.cache
def _binder(kernel: Any, capability: int) -> tuple[Any, Callable[..., Any]]:
    backend = make_backend(GPUTarget("cuda", capability, 32))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def _compile(
    kernel: Any,
    options: Any,
    signature: dict[str, Any],
    constants: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], Any],
    capability: int,
    aligned: bool,
) -> Resources:
    if not aligned:
        types = list(signature.values())
        attributes = {path: value for path, value in attributes.items() if not _is_pointer(types, path)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    usage = _resource_usage(compiled.asm["cubin"])
    return Resources(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        loads=_accesses(compiled.asm["ptx"], "ld"),
        stores=_accesses(compiled.asm["ptx"], "st"),
        ptx=compiled.asm["ptx"],
    )


def _is_pointer(types: Any, path: tuple[int, ...]) -> bool:
    for place in path:
        # Of a tuple that is a constant, Triton 3.6.0 keeps no types.
        if isinstance(types, str):
            break
        types = types[place]
    return str(types).startswith("*")


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report)}


def _accesses(ptx: str, operation: str) -> Counter[int]:
    found: Counter[int] = Counter()
    for count, bits in re.findall(rf"\b{operation}\.global(?:\.\w+)*?(?:\.v(\d+))?\.[bfsu](\d+)\b", ptx):
        width = int(count or 1) * int(bits) // 8
        found[width] += width
    if operation == "ld":
        # Loads that go to shared memory without passing through registers, as those of pipelined loops.
        for width in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], (0x[0-9a-f]+|\d+)", ptx):
            found[int(width, 0)] += int(width, 0)
    return found
