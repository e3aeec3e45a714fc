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
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int16: "i16",
}


class Launch(NamedTuple):
    """One recorded kernel launch."""

    kernel: Any
    arguments: dict[str, Any]
    warps: int


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
            arguments = dict(zip(kernel.arg_names, args, strict=False)) | options
            assert list(arguments) == kernel.arg_names
            launches.append(Launch(kernel, arguments, num_warps))

        return launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "__getitem__", getitem)
        call()
    return launches


def compile_launch(launch: Launch, capability: int, aligned: bool = True) -> Resources:
    """Compiles for one compute capability; pointers are taken as 16-byte aligned unless told otherwise."""
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: list[tuple[int, ...]] = []

    def describe(parameter: Any, value: Any, path: tuple[int, ...]) -> Any:
        # The launcher of Triton compiles a size of 1 in, and notes which sizes 16 divides.
        special = type(value) is int and not parameter.is_constexpr and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and value == 1):
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(describe(parameter, item, (*path, i)) for i, item in enumerate(value))
        if isinstance(value, torch.Tensor):
            if aligned:
                attributes.append(path)
            return "*" + TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if special and value % 16 == 0:
            attributes.append(path)
        return "i32" if value < 2**31 else "i64"

    for i, parameter in enumerate(launch.kernel.params):
        signature[parameter.name] = describe(parameter, launch.arguments[parameter.name], (i,))
    return _compile(
        launch.kernel,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(attributes),
        launch.warps,
        capability,
    )


@functools.cache
def _compile(
    kernel: Any,
    signature: tuple[tuple[str, Any], ...],
    constants: tuple[tuple[tuple[int, ...], Any], ...],
    attributes: tuple[tuple[int, ...], ...],
    warps: int,
    capability: int,
) -> Resources:
    source = ASTSource(
        fn=kernel,
        signature=dict(signature),
        constexprs=dict(constants),
        attrs={position: [["tt.divisibility", 16]] for position in attributes},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    usage = _resource_usage(compiled.asm["cubin"])
    return Resources(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        loads=_accesses(compiled.asm["ptx"], "ld"),
        stores=_accesses(compiled.asm["ptx"], "st"),
        ptx=compiled.asm["ptx"],
    )


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
