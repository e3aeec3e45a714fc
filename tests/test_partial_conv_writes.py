"""What is written into a mask, or into a new mask, between two calls: each call computes with what its mask holds.

By ways that torch's version counters do not see, as collectives, other libraries and replayed CUDA graphs have them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Backend, evaluate, grid, same_bits
from partial_conv_cases import (
    Case,
    exact_convolutions,  # noqa: F401
    make_tensors,
    output_of,
    run,
)
from pixel_cases import on_device
from torch import Tensor

CASE = Case(size=(2, 3, 9, 10), outputs=3)


def through_data(mask: Tensor, values: Tensor) -> None:
    mask.data.copy_(values)


def through_storage(mask: Tensor, values: Tensor) -> None:
    mask.untyped_storage().copy_(values.contiguous().untyped_storage())


def through_dlpack(mask: Tensor, values: Tensor) -> None:
    torch.from_dlpack(mask).copy_(values)


def through_numpy(mask: Tensor, values: Tensor) -> None:
    if mask.device.type != "cpu":
        pytest.skip("NumPy sees no memory of a GPU")
    mask.numpy()[...] = values.numpy()


def through_graph(mask: Tensor, values: Tensor) -> None:
    if mask.device.type != "cuda":
        pytest.skip("CUDA graphs need a GPU")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mask.copy_(values)
    graph.replay()


def in_place(mask: Tensor, values: Tensor) -> None:
    mask.copy_(values)


WRITES: dict[str, Callable[[Tensor, Tensor], None]] = {
    "data": through_data,
    "storage": through_storage,
    "dlpack": through_dlpack,
    "numpy": through_numpy,
    "graph": through_graph,
    "in-place": in_place,
}


def results(backend: Backend, given: list[Any], upstream: Tensor | None = None) -> list[Tensor]:
    """Output, new mask, and the gradients of input, weight and bias."""
    new_mask = run(backend, CASE, given).new_mask.clone()
    sent = None if upstream is None else [upstream]
    outputs, gradients, _ = evaluate(output_of(backend, CASE, given[3]), given[:3], (0, 1, 2), sent)
    return [*outputs, new_mask, *gradients]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert same_bits(a, b)


@grid(write=WRITES, mask=("n1", "nc", "plane"))
def test_a_mask_written_between_calls(backend: Backend, write: str, mask: str) -> None:
    given = on_device(backend, *make_tensors(CASE, mask=mask))
    other = 1 - (given[3] > 0).float()
    upstream = torch.ones(2, 3, 9, 10, device=backend.device)
    before = results(backend, given, upstream)
    want = results(backend, [*given[:3], other.clone()], upstream)
    WRITES[write](given[3], other)
    assert torch.equal(given[3], other)
    after = results(backend, given, upstream)
    assert_same(after, want)
    assert not same_bits(before[0], after[0])


@grid(write=WRITES, mask=("none", "n1", "nc"))
def test_a_new_mask_written_between_calls(backend: Backend, write: str, mask: str) -> None:
    """The next call of the layer before it gives what it gave; the next layer sees what was written."""
    given = on_device(backend, *make_tensors(CASE, mask=mask))
    upstream = torch.ones(2, 3, 9, 10, device=backend.device)
    before = results(backend, given, upstream)
    new_mask = run(backend, CASE, given).new_mask
    # A multi-channel one is an expanded view.
    plane = new_mask[:, :1]
    next_layer = [*given[:3], new_mask]
    results(backend, next_layer, upstream)
    other = 0.25 * plane.clone().flip(-1)
    WRITES[write](plane, other)
    assert_same(results(backend, given, upstream), before)
    want = results(backend, [*given[:3], other.expand(new_mask.shape).clone()], upstream)
    for got, expected in zip(results(backend, next_layer, upstream), want, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_two_calls_share_no_new_mask(backend: Backend) -> None:
    given = on_device(backend, *make_tensors(CASE))
    first, second = (run(backend, CASE, given).new_mask for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    first.requires_grad_()
    assert not second.requires_grad and not run(backend, CASE, given).new_mask.requires_grad


@pytest.mark.parametrize("part", ["mask", "new mask"])
def test_backward_after_a_change_is_refused(backend: Backend, part: str) -> None:
    """As for every tensor that autograd has saved."""
    x, w, b, mask = on_device(backend, *make_tensors(CASE))
    output, new_mask = run(backend, CASE, [x.requires_grad_(), w, b, mask])
    (mask if part == "mask" else new_mask).zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
