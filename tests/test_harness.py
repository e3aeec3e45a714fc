"""The checks themselves: each must pass a sound toy op and catch the fault it exists for."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import (
    LAYOUTS,
    _junk_fill,
    check_against_truth,
    evaluate,
    gradient_of,
    laid_out,
    poisoned_allocations,
    same_bits,
    spread,
)
from torch import Tensor
from training_checks import check_compiles, check_deterministic, check_no_host_sync, kept_bytes, ops_called


@pytest.mark.parametrize(
    "lengths", [(15, 2, 2, 2), (9, 2, 2), (8, 8, 2), (8, 8), (2, 4, 3), (3, 2), (5,)], ids=str
)
def test_rows_of_a_table(lengths: tuple[int, ...]) -> None:
    """`grid` holds every pair, one or two axes all of their product; `covering` every value."""
    product = list(itertools.product(*map(range, lengths)))
    longest, largest = max(lengths), sorted(lengths)[-2:]
    pairs, values = spread(product), spread(product, 2 * longest)
    assert len(set(pairs)) == len(pairs) <= 1.5 * math.prod(largest)
    assert len(set(values)) == len(values) <= 2 * longest
    assert len(lengths) > 2 or len(pairs) == len(product)
    for axis, length in enumerate(lengths):
        assert {row[axis] for row in values} == set(range(length))
    for (i, a), (j, b) in itertools.combinations(enumerate(lengths), 2):
        every = set(itertools.product(range(a), range(b)))
        assert {(row[i], row[j]) for row in pairs} == every
        assert 2 not in (a, b) or {(row[i], row[j]) for row in values} == every


def formula(pred: Tensor, target: Tensor) -> Tensor:
    return (pred - target).abs().mean()


def pair(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    pred, target = torch.randn(2, 2, 3, 9, 14)
    return [torch.where(torch.rand(pred.shape) < 0.2, target, pred).to(dtype), target.to(dtype)]


class Toy(torch.autograd.Function):
    """Mean absolute error; subclasses plant one fault each."""

    @classmethod
    def value(cls, pred: Tensor, target: Tensor) -> Tensor:
        return (pred.float() - target.float()).abs().mean()

    @classmethod
    def gradient(cls, pred: Tensor, target: Tensor, grad: Tensor) -> Tensor:
        return ((pred.float() - target.float()).sign() * (grad / pred.numel())).to(pred.dtype)

    @classmethod
    def keep(cls, ctx: Any, pred: Tensor, target: Tensor) -> None:
        ctx.save_for_backward(pred, target)

    @classmethod
    def forward(cls, ctx: Any, pred: Tensor, target: Tensor) -> Tensor:
        cls.keep(ctx, pred, target)
        return cls.value(pred, target)

    @classmethod
    def backward(cls, ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gradient = cls.gradient(*ctx.saved_tensors, grad)
        return gradient, -gradient


class OffByOneElement(Toy):
    @classmethod
    def value(cls, pred: Tensor, target: Tensor) -> Tensor:
        return (pred - target).flatten()[1:].abs().sum() / pred.numel()


class SignOfZeroIsOne(Toy):
    @classmethod
    def gradient(cls, pred: Tensor, target: Tensor, grad: Tensor) -> Tensor:
        return torch.where(pred >= target, 1.0, -1.0) * grad / pred.numel()


class UnwrittenTail(Toy):
    @classmethod
    def gradient(cls, pred: Tensor, target: Tensor, grad: Tensor) -> Tensor:
        out = torch.empty_like(pred)
        out[:, :, :, :-1] = Toy.gradient(pred, target, grad)[:, :, :, :-1]
        return out


class Truncating(Toy):
    """Half gradients rounded towards zero: each within one unit, together too small."""

    @classmethod
    def gradient(cls, pred: Tensor, target: Tensor, grad: Tensor) -> Tensor:
        exact = 2 * (pred.float() - target.float()) * (grad / pred.numel())
        bits = exact.view(torch.int32) & ~0xFFFF
        return bits.view(torch.float32).to(pred.dtype)


class InPlace(Toy):
    @classmethod
    def value(cls, pred: Tensor, target: Tensor) -> Tensor:
        return (pred.sub_(target)).add_(target).sub(target).abs().mean()


class SilentlyWrongType(Toy):
    @classmethod
    def value(cls, pred: Tensor, target: Tensor) -> Tensor:
        return super().value(pred, target).double()


class IgnoresUpstream(Toy):
    @classmethod
    def gradient(cls, pred: Tensor, target: Tensor, grad: Tensor) -> Tensor:
        return Toy.gradient(pred, target, torch.ones_like(grad))


def test_a_sound_op_passes() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        check_against_truth(Toy.apply, lambda p, t: formula(p, t), pair(dtype))


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (OffByOneElement, "output 0"),
        (SignOfZeroIsOne, "gradient of input 0"),
        (UnwrittenTail, "NaN or Inf in other places"),
        (InPlace, "changed in place"),
        (SilentlyWrongType, "dtype"),
        (IgnoresUpstream, "gradient of input 0"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_planted_fault_is_caught(fault: type[Toy], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_against_truth(fault.apply, formula, pair())


def test_truncation_is_caught_by_the_bias_alone() -> None:
    def squares(pred: Tensor, target: Tensor) -> Tensor:
        return (pred - target).square().mean()

    class Squares(Truncating):
        @classmethod
        def value(cls, pred: Tensor, target: Tensor) -> Tensor:
            return squares(pred.float(), target.float())

    with pytest.raises(AssertionError, match="signed bias"):
        check_against_truth(Squares.apply, squares, pair(torch.bfloat16))


def test_a_wrong_second_derivative_is_caught() -> None:
    """The backward of Toy treats the saved images as constants, which is right for L1 and wrong for squares."""

    class Squares(Toy):
        @classmethod
        def value(cls, pred: Tensor, target: Tensor) -> Tensor:
            return (pred - target).square().mean()

        @classmethod
        def gradient(cls, pred: Tensor, target: Tensor, grad: Tensor) -> Tensor:
            return 2 * (pred - target).detach() * grad / pred.numel()

    def squares(pred: Tensor, target: Tensor) -> Tensor:
        return (pred - target).square().mean()

    check_against_truth(Squares.apply, squares, pair())
    inputs = [*pair(), torch.tensor(0.7)]
    with pytest.raises(AssertionError, match="gradient of input 0"):
        check_against_truth(
            gradient_of(Squares.apply), gradient_of(squares), inputs, wanted=(0, 1, 2), magnitudes={2: None}
        )


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(64),
        lambda: torch.empty_like(torch.ones(64)),
        lambda: torch.ones(1).new_empty(64),
        lambda: torch.empty_strided((8, 8), (8, 1)),
    ],
    ids=["empty", "empty_like", "new_empty", "empty_strided"],
)
def test_fresh_memory_is_poisoned(allocate: Callable[[], Tensor]) -> None:
    with poisoned_allocations():
        assert allocate().isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_poison_reaches_below_the_dispatcher() -> None:
    """torch.from_file and friends aside, everything on the CPU comes from this allocator."""
    if sys.platform != "linux":
        pytest.skip("the switch is looked up in libc10 of Linux builds")
    assert _junk_fill() is not None, "this torch has no junk fill: C++ outputs are no longer poisoned"
    with poisoned_allocations():
        torch.use_deterministic_algorithms(False)
        assert torch.empty(64).isnan().all()


def test_kept_bytes_counts_what_the_graph_owns() -> None:
    inputs = [t.requires_grad_() for t in pair()]
    size = inputs[0].numel() * 4

    def from_leaves(pred: Tensor, target: Tensor) -> Tensor:
        return Toy.apply(pred * 2, target * 2)

    class OutsideSaveForBackward(Toy):
        @classmethod
        def keep(cls, ctx: Any, pred: Tensor, target: Tensor) -> None:
            ctx.save_for_backward(pred, target)
            ctx.hidden = pred * 3

    assert kept_bytes(Toy.apply, *inputs) == 0
    assert kept_bytes(from_leaves, *inputs) == 2 * size
    with pytest.raises(AssertionError, match="outside save_for_backward"):
        kept_bytes(OutsideSaveForBackward.apply, *inputs)


def test_random_results_are_not_deterministic() -> None:
    check_deterministic(lambda: pair())
    with pytest.raises(AssertionError, match="differ"):
        check_deterministic(lambda: [torch.rand(8)])


def test_host_syncs_are_seen() -> None:
    pred, target = pair()
    check_no_host_sync(lambda: formula(pred, target))
    for sync in (
        lambda: formula(pred, target).item(),
        lambda: bool(pred.any()),
        lambda: pred[pred > 0],
        lambda: torch.equal(pred, target),
    ):
        with pytest.raises(AssertionError, match="wait for the device"):
            check_no_host_sync(sync)


def test_graph_breaks_and_recompilations_are_seen() -> None:
    sizes = [[torch.randn(n, 3) for _ in range(2)] for n in (4, 7)]
    check = lambda call, inputs: check_against_truth(call, formula, inputs)  # noqa: E731
    check_compiles(formula, check, sizes, compiler="eager")

    def breaks(pred: Tensor, target: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return formula(pred, target)

    def specialised(pred: Tensor, target: Tensor) -> Tensor:
        return formula(pred, target) if pred.shape[0] == 4 else formula(target, pred)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        check_compiles(breaks, check, sizes, compiler="eager")
    with pytest.raises(AssertionError, match="compiled again"):
        check_compiles(specialised, check, sizes, compiler="eager")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_hold_the_same_values(layout: str) -> None:
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    view = laid_out(x, layout)
    assert same_bits(view, x)
    dense = {"contiguous", "misaligned"}
    assert view.is_contiguous() == (layout in dense)
    assert layout != "misaligned" or view.data_ptr() % 16 != 0


def test_inputs_left_out_of_wanted_get_no_gradient() -> None:
    _, gradients, _ = evaluate(Toy.apply, pair(), (1,))
    assert len(gradients) == 1
    assert "aten.abs.default" in ops_called(lambda: formula(*pair()))
