"""What the streamed path keeps, does not run, and rounds: memory, passes, float16."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import covering, generator, grid
from perceptual_cases import LOSSES, TAPS, N, gradient, images, make, total
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from training_checks import check_no_host_sync, kept_bytes, ops_called
from trunk_cases import relative, small_net

import inpaint_kernels as ik
from inpaint_kernels import _backend
from inpaint_kernels.features import FrozenTrunk
from inpaint_kernels.nn import PerceptualLoss, PerceptualStyleLoss, StyleLoss

every_loss = pytest.mark.parametrize("name", LOSSES)


def counted_ops(name: str, chunk: int | None = None) -> Counter[str]:
    """How often each operator reaches a kernel in forward and backward of a loss on two predictions."""
    counts: Counter[str] = Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[str(func)] += 1
            return func(*args, **(kwargs or {}))

    loss, pair = make(name, chunk), images(2)
    with Count():
        gradient(loss, *pair)
    return counts


@pytest.mark.parametrize("chunk", [N, N + 4])
@every_loss
def test_one_chunk_is_the_plain_path(name: str, chunk: int) -> None:
    """The same trunk passes on the same images: the convolutions of the plain path, and no copy of anything."""
    plain, streamed = counted_ops(name), counted_ops(name, chunk)
    for op in ("aten.convolution.default", "aten.convolution_backward.default", "aten.addcmul.default"):
        assert streamed[op] == plain[op] > 0
    for op in ("aten.cat.default", "aten.copy_.default", "aten.clone.default", "aten._to_copy.default"):
        assert streamed[op] <= plain[op]


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_write_their_gradients_once(chunk: int) -> None:
    """One write for each chunk into memory that nobody has filled before."""
    plain, streamed = counted_ops("both"), counted_ops("both", chunk)
    pieces = -(-N // chunk)
    assert streamed["aten.copy_.default"] - plain["aten.copy_.default"] <= pieces
    assert streamed["aten.cat.default"] <= pieces
    backward = "aten.convolution_backward.default"
    assert streamed[backward] == pieces * plain[backward]


@pytest.mark.parametrize("chunk", [2, N])
def test_the_predictions_are_not_kept(chunk: int) -> None:
    """Only their gradient is: a concatenation of raw and composite images is free to go."""
    raw, target = images()
    raw.requires_grad_()
    loss = make("both", chunk)
    assert kept_bytes(lambda x, y: loss(torch.cat([x, 0.5 * x]), y), raw, target) <= 2 * raw.nbytes + 64


@functools.cache
def wide_trunk() -> FrozenTrunk:
    """Three maps of VGG16, under the names of TAPS."""
    trunk = ik.features.vgg16(weights=None)
    trunk.names = TAPS
    return trunk


@every_loss
def test_streamed_keeps_two_percent_of_the_plain_path(name: str) -> None:
    pred, target = images(2, (2, 3, 16, 16))
    pred.requires_grad_()
    plain, streamed = (kept_bytes(make(name, chunk, wide_trunk()), pred, target) for chunk in (None, 1))
    assert streamed <= 0.02 * plain
    assert streamed <= pred.nbytes + 64
    with torch.no_grad():
        assert kept_bytes(make(name, 1, wide_trunk()), pred, target) == 0


@pytest.mark.parametrize("context", ["no_grad", "inference_mode", "enable_grad"])
@every_loss
def test_without_gradient_no_backward_runs(name: str, context: str) -> None:
    """Where none is recorded, or the prediction asks for none."""
    pred, target = images(2)
    want = total(make(name)(pred, target))
    loss = make(name, chunk=2)
    for requires_grad in (False,) if context == "enable_grad" else (False, True):
        results: list[Any] = []
        with getattr(torch, context)():
            leaf = pred.detach().requires_grad_(requires_grad)
            called = ops_called(lambda leaf=leaf, results=results: results.append(loss(leaf, target)))
        value = total(results[0])
        assert not [op for op in called if "backward" in op]
        assert not value.requires_grad
        torch.testing.assert_close(value, want, rtol=1e-5, atol=0)


@every_loss
@pytest.mark.parametrize("allow_unused", [False, True])
def test_second_derivative_of_the_streamed_path_is_refused(name: str, allow_unused: bool) -> None:
    """With the way out named; the first derivative under create_graph=True is right."""
    pred, target = images(2)
    _, want = gradient(make(name), pred, target)
    pred.requires_grad_()
    value = total(make(name, chunk=2)(pred, target))
    (first,) = torch.autograd.grad(value, pred, create_graph=True)
    assert relative(first.detach(), want) < 1e-5
    with pytest.raises(RuntimeError, match="chunk=None"):
        torch.autograd.grad(first.square().sum(), pred, allow_unused=allow_unused)


def scaled_gradient(chunk: int | None, half_images: bool, name: str) -> tuple[Tensor, Tensor]:
    """(gradient under a GradScaler in float16, the same in float64)."""
    layers = FrozenTrunk(small_net(32), TAPS, "imagenet", autocast=torch.float16)
    exact = FrozenTrunk(small_net(32), TAPS, "imagenet").double()
    options = {"weights": [0.05] * 3} if name == "perceptual" else {}
    pred, target = images(2, (2, 3, 64, 64))
    if half_images:
        pred, target = pred.half(), target.half()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    leaf = nn.Parameter(pred.float())
    optimizer = torch.optim.SGD([leaf], lr=1.0)
    kind = LOSSES[name][0]
    loss = kind(layers, **options, chunk=chunk)
    scaler.scale(loss(leaf.half() if half_images else leaf, target)).backward()
    scaler.unscale_(optimizer)
    return leaf.grad, gradient(kind(exact, **options), pred.double(), target.double())[1]


@covering(name=("perceptual", "style"), half_images=(False, True), chunk=(1, 2))
def test_grad_scaler_in_float16(name: str, half_images: bool, chunk: int) -> None:
    """Gradients too small for float16 survive: the scale must reach the trunk before they are rounded."""
    plain, want = scaled_gradient(None, half_images, name)
    streamed, _ = scaled_gradient(chunk, half_images, name)
    assert streamed.isfinite().all()
    assert relative(streamed, want) <= 1.5 * relative(plain, want) + 1e-4


HALF_TRUNKS: dict[str, Callable[[FrozenTrunk], FrozenTrunk]] = {
    "autocast": lambda t: FrozenTrunk(t.features, TAPS, "imagenet", autocast=torch.float16),
    "weights": lambda t: t.half(),
    "ambient": lambda t: t,
}


def half_gradient(kind: str, name: str, factor: float) -> Tensor:
    """Of a streamed loss on a float16 trunk, without any GradScaler."""
    layers = HALF_TRUNKS[kind](FrozenTrunk(small_net(16), TAPS, "imagenet"))
    pred, target = images(2, (2, 3, 32, 32))
    leaf = pred.requires_grad_()
    with torch.autocast("cpu", torch.float16, enabled=kind == "ambient"):
        value = total(FACTORS[name](layers, factor)(leaf, target))
    value.backward()
    return leaf.grad


FACTORS = {
    "perceptual": lambda t, w: PerceptualLoss(t, weights=[w] * 3, chunk=1),
    "perceptual-l2": lambda t, w: PerceptualLoss(t, weights=[w] * 3, penalty="l2", chunk=2),
    "style": lambda t, w: StyleLoss(t, weights=[w] * 3, chunk=2),
    "gatys": lambda t, w: StyleLoss(t, weights=[w] * 3, normalize="gatys", chunk=2),
    "both": lambda t, w: PerceptualStyleLoss(t, perceptual_weight=w, style_weight=w, chunk=1),
}


@grid(name=FACTORS, kind=HALF_TRUNKS, factor=(1e-5, 1.0, 1e5))
def test_float16_trunks_neither_underflow_nor_overflow(name: str, kind: str, factor: float) -> None:
    """Whatever the loss is weighted with: against float64, within roundings of half precision."""
    slope = half_gradient(kind, name, factor)
    exact = FrozenTrunk(small_net(16), TAPS, "imagenet").double()
    pred, target = images(2, (2, 3, 32, 32))
    _, want = gradient(FACTORS[name](exact, factor), pred.double(), target.double())
    assert slope.isfinite().all()
    # Features of half precision that lie next to each other have differences of the wrong sign.
    assert relative(slope, want) < 0.03


@pytest.mark.parametrize("difference", [1e-1, 1e-2, 1e-3, 0.0])
@pytest.mark.parametrize("name", FACTORS)
def test_float16_trunk_on_images_that_are_nearly_equal(name: str, difference: float) -> None:
    """The gradient of an absolute value does not shrink with the loss: it must not be scaled as if it did."""
    layers = FrozenTrunk(small_net(16), TAPS, "imagenet", autocast=torch.float16)
    _, target = images(1, (2, 3, 32, 32))
    noise = torch.rand(target.shape, generator=generator(5)) - 0.5
    _, slope = gradient(FACTORS[name](layers, 100.0), target + difference * noise, target)
    assert slope.isfinite().all()
    assert bool(slope.any()) == (difference > 0)


def test_scaling_inside_is_by_powers_of_two() -> None:
    """A factor of two in the weights is a factor of two in every bit of the gradient."""
    one, two = (half_gradient("autocast", "both", factor) for factor in (0.5, 1.0))
    assert torch.equal(2 * one, two)


def test_float16_trunk_without_a_host_sync() -> None:
    layers = FrozenTrunk(small_net(), TAPS, "imagenet", autocast=torch.float16)
    pred, target = images(2)
    check_no_host_sync(lambda: gradient(FACTORS["both"](layers, 1.0), pred, target))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk", [2, N])
def test_the_kept_gradient_of_half_images_is_float32(dtype: torch.dtype, chunk: int) -> None:
    """It is rounded once, after the upstream gradient has multiplied it."""
    pred, target = (x.to(dtype) for x in images(2))
    make("both", chunk)(pred.requires_grad_(), target).total.backward()
    _, want = gradient(make("both", chunk), pred.detach().float(), target.float())
    assert torch.equal(pred.grad, want.to(dtype))


def test_autocast_does_not_reach_the_inner_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """As little as the backward of the plain path: it would round the products of the reference's Gram matrices."""
    monkeypatch.setattr(_backend, "default_backend", "reference")
    pred, target = images(2)
    smooth = FrozenTrunk(nn.Sequential(nn.Softplus()), ["0"], "imagenet")
    gradients = []
    for chunk in (None, 2):
        leaf = pred.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = StyleLoss(smooth, penalty="l2", chunk=chunk)(leaf, target)
        gradients += torch.autograd.grad(value, leaf)
    assert relative(*gradients) < 1e-5


@pytest.mark.parametrize("chunk", [2, N])
def test_results_may_be_changed_in_place(chunk: int) -> None:
    pred, target = images(2)
    _, want = gradient(make("both"), pred, target)
    value = make("both", chunk)(pred.requires_grad_(), target).total
    value += 1
    value *= 2
    value.backward()
    assert relative(pred.grad, 2 * want) < 1e-5


def test_streamed_path_under_compile() -> None:
    """Right, around a graph break; every layer is traced alike."""
    torch._dynamo.reset()
    pred, target = images(2)
    loss = make("both", chunk=2, layers=FrozenTrunk(small_net(), TAPS[:1], "imagenet"))
    want = gradient(loss, pred, target)
    compiled = torch.compile(loss, backend="aot_eager")
    for got, expected in zip(gradient(compiled, pred, target), want, strict=True):
        assert relative(got, expected) < 1e-5
