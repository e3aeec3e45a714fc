"""Partial convolution: what other machines choose, the same bits in every run, and over 2^31 elements."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from harness import INTERPRETING, Backend, evaluate, grid
from partial_conv_cases import Case, check, exact_convolutions, make_tensors, output_of, run  # noqa: F401
from pixel_cases import on_device, skip_without_memory
from training_checks import check_deterministic

from inpaint_kernels import _torch_private
from inpaint_kernels.ops import _partial_conv
from inpaint_kernels.reference import partial_conv as reference


@pytest.fixture
def choose_anew() -> Iterator[None]:
    """The library's fastest dtype and layout are asked for once a process."""
    _partial_conv._inner.cache_clear()
    yield
    _partial_conv._inner.cache_clear()


@pytest.mark.skipif(INTERPRETING, reason="what a machine has is asked for on the CPU alone")
@grid(
    machine=("AVX2 f32", "AVX2 f16", "no-bfloat16 bf16"),
    size=((2, 32, 7, 5), (2, 6, 7, 5), (1, 6, 3, 4, 5)),
    layouts=[f"{a}/{b}" for a in ("contiguous", "channels_last") for b in ("contiguous", "channels_last")],
)
def test_the_choices_of_other_machines(
    machine: str, size: tuple[int, ...], layouts: str, monkeypatch: pytest.MonkeyPatch, choose_anew: None
) -> None:
    """Dtype and layout of torch's convolution are chosen by what this machine has: here by what another one has."""
    has, dtype = machine.split()
    if has == "AVX2":
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    else:
        monkeypatch.setattr(_torch_private, "has_fast_bfloat16", lambda: False)
    case = Case(size=size, outputs=size[1], groups=2, options={"activation": "relu"})
    check(Backend("cpu", "cpu"), case, make_tensors(case, dtype, layouts=layouts))


@pytest.mark.skipif(INTERPRETING, reason="slow in the interpreter")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_memory_that_is_used_again(kernel: Backend, layout: str) -> None:
    """Temporaries of over 4 MiB."""
    case = Case(size=(1, 16, 264, 256), outputs=16, kernel=1, padding=0)
    given = make_tensors(case, layouts=f"{layout}/contiguous")
    for _ in range(2):
        check(kernel, case, given)


@grid(layout=("contiguous", "channels_last"), size=((2, 3, 150, 170), (3, 64, 31, 33)), dtype=("f32", "bf16"))
def test_the_same_bits_every_time(kernel: Backend, layout: str, size: tuple[int, ...], dtype: str) -> None:
    """The new mask, and the gradient of a bias, which is a sum over everything; for any number of threads.

    A convolution of the library may add in any order.
    """
    case = Case(size=(2, 3, 17, 19) if INTERPRETING else size, options={"mask_update": "proportional"})
    given = on_device(kernel, *make_tensors(case, dtype, mask="nc", layouts=f"{layout}/contiguous"))

    def results() -> list[Any]:
        gradients = evaluate(output_of(kernel, case, given[3]), given[:3], (2,))[1]
        return [run(kernel, case, given).new_mask, *gradients]

    check_deterministic(results, threads=(1,) if INTERPRETING else (1, 2, 3))


def kernel_of(backend: Backend, part: str) -> Any:
    """To be called by itself: a whole layer would take several times the memory."""
    return getattr(torch.ops.inpaint_kernels, f"partial_conv_{part}_{backend.name}").default


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="hours in the interpreter")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_more_than_two_billion_elements(kernel: Backend, layout: torch.memory_format) -> None:
    """In place, in bfloat16: 4 GiB."""
    skip_without_memory(kernel, 8 * 2**30)
    size = (2, 2**14 + 1, 2**8, 2**8)
    x = torch.empty(size, dtype=torch.bfloat16, device=kernel.device, memory_format=layout).fill_(1)
    plane = torch.ones(2, 1, *size[2:], device=kernel.device)
    plane[1, 0, -1, -1], plane[0, 0, 0, 0] = 0.0, 0.5
    kernel_of(kernel, "mask_input")(x, plane, x)
    assert not x[1, :, -1, -1].any() and bool((x[0, :, 0, 0] == 0.5).all()) and x[1, -1, -1, -2] == 1
    bias = torch.ones(size[1], device=kernel.device)
    how = reference.Finish(False, False, "none").packed()
    kernel_of(kernel, "finish")(x, plane, plane, bias, how, 0.0, x)
    assert not x[1, :, -1, -1].any() and bool((x[0, :, 0, 0] == 1.25).all()) and x[1, -1, -1, -2] == 2
    sums = kernel_of(kernel, "finish_backward")(x, None, plane, plane, how, 0.0, True, x)
    assert bool((sums == 2.0 * (2 * 2**16 - 2) + 1.25).all())
    assert not x[1, :, -1, -1].any() and bool((x[0, :, 0, 0] == 0.625).all())


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="hours in the interpreter")
def test_a_mask_of_more_than_two_billion_elements(kernel: Backend) -> None:
    skip_without_memory(kernel, 4 * 2**30)
    mask = torch.ones(1, 2**15 + 1, 2**8, 2**8, dtype=torch.bool, device=kernel.device)
    mask[0, -1, -1, -1] = 0
    windows = reference.Windows([1, 1], [1, 1], [0, 0], [1, 1], 1).packed()
    _, new_mask = kernel_of(kernel, "window")(mask, 1, windows, 1.0, "proportional", torch.float32)
    # Exact sums: the one pixel with a hole in one of its 32769 channels, and all others whole.
    assert round(float(new_mask[0, 0, -1, -1]) * (2**15 + 1)) == 2**15
    new_mask[0, 0, -1, -1] = 1
    assert bool((new_mask == 1).all())
