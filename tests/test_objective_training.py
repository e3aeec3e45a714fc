"""PartialConvObjective in training: streaming, memory, mixed precision, compile, checkpoints, several processes."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import poisoned_allocations
from objective_cases import FORMULAS, gradient, images, mask_for, objective, relative, trunk
from torch import Tensor, nn
from training_checks import check_no_host_sync, kept_bytes, ops_called

import inpaint_kernels as ik
from inpaint_kernels.objectives import _objective

PRESETS = tuple(FORMULAS)
N = 5
SIZE = (N, 3, 16, 12)


def case(
    preset: str, size: tuple[int, ...] = SIZE, mask: str = "fractional"
) -> tuple[Tensor, Tensor, Tensor]:
    pred, target = images(preset, size)
    return pred.requires_grad_(), target, mask_for(preset, mask, size)


# Streaming


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("chunk", [1, 2, N, N + 4])
@pytest.mark.parametrize("preset", PRESETS)
def test_streamed_is_plain(preset: str, chunk: int, prepared: bool) -> None:
    pred, target, mask = case(preset)
    loss = objective(preset, chunk=chunk)
    want = objective(preset)(pred, target, mask)
    found = loss(pred, target, mask, truth=loss.prepare(target) if prepared else None)
    for name, got, expected in zip(want._fields, found, want, strict=True):
        torch.testing.assert_close(got, expected)
        assert got.requires_grad == (name not in ("perceptual", "style") and expected.requires_grad)
    assert relative(gradient(found, pred), gradient(want, pred)) < 1e-5


@pytest.mark.parametrize("chunk", [2, N])
def test_streamed_raw_pixel_terms_are_differentiable(chunk: int) -> None:
    pred, target, mask = case("paper")
    want, found = (objective(chunk=c)(pred, target, mask) for c in (None, chunk))
    for name in ("hole", "valid", "tv"):
        got, expected = (
            torch.autograd.grad(getattr(t, name), pred, retain_graph=True)[0] for t in (found, want)
        )
        assert torch.equal(got, expected)


@pytest.mark.parametrize("allow_unused", [False, True])
def test_second_derivative_of_the_streamed_total_is_refused(allow_unused: bool) -> None:
    pred, target, mask = case("paper")
    for chunk in (2, N):
        found = objective(chunk=chunk)(pred, target, mask)
        (first,) = torch.autograd.grad(found.total, pred, create_graph=True)
        assert relative(first.detach(), gradient(objective()(pred, target, mask), pred)) < 1e-5
        with pytest.raises(RuntimeError, match="chunk=None"):
            torch.autograd.grad(first.square().sum(), pred, allow_unused=allow_unused)


@pytest.mark.parametrize("preset", PRESETS)
def test_streamed_keeps_five_percent_of_the_plain_path(preset: str) -> None:
    """The gradient of the prediction, 6 bits an element for the pixel terms, and the rows of the mask."""
    vgg = ik.features.vgg16(weights=None, preprocess="none")
    pred, target, mask = case(preset, (2, 3, 32, 24), "binary")
    plain, streamed = (
        kept_bytes(objective(preset, trunk=vgg, chunk=chunk), pred, target, mask) for chunk in (None, 1)
    )
    assert streamed <= 0.05 * plain
    assert streamed <= 1.25 * pred.nbytes + mask.nbytes / 8 + 512
    with torch.no_grad():
        assert kept_bytes(objective(preset, trunk=vgg, chunk=1), pred, target, mask) == 0


@pytest.mark.parametrize("chunk", [None, 2, N])
@pytest.mark.parametrize("preset", PRESETS)
def test_passes_of_the_trunk(preset: str, chunk: int | None) -> None:
    """One over all predictions, one without gradient over the target; for every chunk when streamed."""
    loss = objective(preset, chunk=chunk)
    calls: list[tuple[int, bool]] = []
    loss.trunk.register_forward_hook(
        lambda _m, inputs, out: calls.append((len(inputs[0]), out[0].requires_grad))
    )
    pred, target, mask = case(preset)
    gradient(loss(pred, target, mask), pred)
    pieces = 1 if chunk is None else -(-N // chunk)
    assert len(calls) == 2 * pieces
    assert sum(count for count, grad in calls if grad) == N * len(loss.settings.predictions)
    assert sum(count for count, grad in calls if not grad) == N


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_images_are_written_once(preset: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Predictions in one call, the target in another: nothing is normalised twice, or where it is already."""
    pred, target, mask = case(preset)
    loss = objective(preset, chunk=chunk)
    calls: list[int] = []
    write = _objective.stacked_images

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(len(options["parts"]) * len(args[0]))
        return write(*args, **options)

    monkeypatch.setattr(_objective, "stacked_images", counted)
    loss(pred, target, mask)
    # Images in ImageNet's space are read as they are; naoto0804's composites are of the masked target.
    want = {"paper": 3 * N, "mmagic": 3 * N, "nvidia": 2 * N, "naoto0804": 3 * N}
    assert sum(calls) == want[preset]


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradient_no_backward_runs(chunk: int | None, context: Callable[[], Any]) -> None:
    pred, target, mask = case("paper")
    loss = objective(chunk=chunk)
    want = loss(pred, target, mask)
    with context():
        called = ops_called(lambda: loss(pred, target, mask))
        found = loss(pred, target, mask)
    assert not [op for op in called if "backward" in op]
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected.detach())


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_no_host_sync(preset: str, chunk: int | None) -> None:
    pred, target, mask = case(preset)
    loss = objective(preset, chunk=chunk)
    truth = loss.prepare(target)
    check_no_host_sync(lambda: gradient(loss(pred, target, mask), pred))
    check_no_host_sync(lambda: gradient(loss(pred, target, mask, truth=truth), pred))


@pytest.mark.parametrize("chunk", [None, 2])
def test_target_and_mask_get_no_gradient(chunk: int | None) -> None:
    pred, target, mask = case("paper")
    want = gradient(objective(chunk=chunk)(pred, target, mask), pred)
    target.requires_grad_()
    mask.requires_grad_()
    objective(chunk=chunk)(pred, target, mask).total.backward()
    assert target.grad is None and mask.grad is None
    assert torch.equal(pred.grad, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_empty_batch(preset: str, chunk: int | None, dtype: torch.dtype) -> None:
    pred, target, mask = (torch.zeros(0, c, 16, 16, dtype=dtype) for c in (3, 3, 1))
    loss = objective(preset, chunk=chunk).to(dtype)
    for truth in (None, loss.prepare(target)):
        found = loss(pred.requires_grad_(), target, mask, truth=truth)
        assert not any(found)
        assert all(term.dtype == dtype for term in found)
        assert gradient(found, pred).shape == pred.shape


def test_empty_batch_through_a_streamed_float16_trunk() -> None:
    """Whose gradients are scaled by their largest element: there is none."""
    pred, target, mask = (torch.zeros(0, c, 16, 16) for c in (3, 3, 1))
    loss = objective(chunk=2, trunk=trunk(autocast=torch.float16))
    found = loss(pred.requires_grad_(), target, mask)
    assert not any(found) and gradient(found, pred).shape == pred.shape


# Mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_half_predictions_against_float32_targets(preset: str, chunk: int | None, dtype: torch.dtype) -> None:
    """As autocast around the network makes them: the terms of the rounded prediction, a gradient rounded once."""
    pred, target, mask = case(preset)
    half = pred.detach().to(dtype).requires_grad_()
    exact = half.detach().float().requires_grad_()
    want = objective(preset)(exact, target, mask)
    found = objective(preset, chunk=chunk)(half, target, mask)
    for got, expected in zip(found, want, strict=True):
        torch.testing.assert_close(got, expected)
    got = gradient(found, half)
    assert got.dtype == dtype
    assert relative(got, gradient(want, exact)) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("inside", ["ambient", "trunk"])
@pytest.mark.parametrize("chunk", [None, 2])
def test_trunk_in_bfloat16(inside: str, chunk: int | None) -> None:
    pred, target, mask = case("paper")
    want = objective()(pred, target, mask)
    options = {"trunk": trunk(autocast=torch.bfloat16)} if inside == "trunk" else {}
    with torch.autocast("cpu", torch.bfloat16, enabled=inside == "ambient"):
        found = objective(chunk=chunk, **options)(pred, target, mask)
    assert all(term.dtype == torch.float32 for term in found)
    assert found[1:4] == want[1:4]
    for name in ("perceptual", "style", "total"):
        torch.testing.assert_close(getattr(found, name), getattr(want, name), rtol=2e-2, atol=0)
    # Signs of differences that bfloat16 cannot tell apart.
    assert relative(gradient(found, pred), gradient(want, pred)) < 0.2


def test_grad_scaler_with_a_streamed_float16_trunk() -> None:
    pred, target, mask = case("paper")
    want = gradient(objective()(pred, target, mask), pred)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    leaf = nn.Parameter(pred.detach().clone())
    optimizer = torch.optim.SGD([leaf], lr=1.0)
    loss = objective(chunk=2, trunk=trunk(autocast=torch.float16))
    scaler.scale(loss(leaf, target, mask).total).backward()
    scaler.unscale_(optimizer)
    assert relative(leaf.grad, want) < 0.05


# In a model


class Model(nn.Module):
    """As a LightningModule holds its loss."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 3, 3, padding=1)
        self.objective = objective(**options)


def test_the_trunk_is_no_part_of_the_model() -> None:
    """Of its parameters, checkpoints, modes and switches."""
    model = Model()
    names = ["net.weight", "net.bias"]
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == names
    assert not list(model.named_buffers())
    Model().load_state_dict(model.state_dict())
    model.train().requires_grad_(True)
    assert not any(p.requires_grad for p in model.objective.trunk.parameters())
    assert not any(module.training for module in model.objective.trunk.modules())
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert len(list(averaged.parameters())) == 2


def test_the_trunk_follows_the_model() -> None:
    model = Model().double()
    assert model.objective.trunk.dtype == torch.float64
    pred, target, mask = (t.detach().double() for t in case("paper"))
    assert model.objective(pred, target, mask).style.dtype == torch.float64
    model.to(memory_format=torch.channels_last)
    weight = model.objective.trunk.features.get_submodule("2").weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert Model().to("meta").objective.trunk.features.get_submodule("2").weight.is_meta


def test_to_empty_keeps_the_trunk() -> None:
    """As of a model that was moved from the meta device and then loaded: its checkpoint brings no trunk."""
    pred, target, mask = case("paper")
    model = Model()
    want, state = model.objective(pred, target, mask), copy.deepcopy(model.state_dict())
    with poisoned_allocations():
        model.to_empty(device="cpu")
    assert not torch.equal(model.net.weight, state["net.weight"])
    model.load_state_dict(state, strict=True)
    found = model.objective(pred, target, mask)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_a_trunk_without_weights_is_refused() -> None:
    """Not a NaN total after `load_state_dict` said that all keys match."""
    with torch.device("meta"), pytest.raises(ValueError, match=r"trunk.*meta device.*outside"):
        ik.objectives.PartialConvObjective(weights=None)
    with torch.device("meta"):
        ik.objectives.PartialConvObjective(weights=None, perceptual_weight=0, style_weight=0)
    model = Model().to("meta")
    with pytest.raises(RuntimeError, match=r"trunk.*meta device.*anew"):
        model.to_empty(device="cpu")


def test_copies_and_pickles() -> None:
    pred, target, mask = case("mmagic")
    loss = objective("mmagic", style_weight=50)
    stream = io.BytesIO()
    torch.save(loss, stream)
    stream.seek(0)
    want = loss(pred, target, mask).total
    for other in (copy.deepcopy(loss), torch.load(stream, weights_only=False)):
        assert torch.equal(other(pred, target, mask).total, want)
        assert other.trunk is not loss.trunk
        assert other.settings == loss.settings


@pytest.mark.parametrize("chunk", [None, 2])
def test_training_with_another_loss_and_twice(chunk: int | None) -> None:
    model = Model(chunk=chunk)
    _, target, mask = case("paper")
    raw = model.net(target * mask)
    value = model.objective(raw, target, mask).total + 0.5 * model.objective(raw, target, mask).total
    (value + ik.masked_l1_loss(raw, target)).backward()
    leaf = raw.detach().requires_grad_()
    plain = gradient(objective()(leaf, target, mask), leaf) * 1.5
    plain = plain + torch.autograd.grad(ik.masked_l1_loss(leaf, target), leaf)[0]
    torch.manual_seed(0)
    weight = torch.autograd.grad(model.net(target * mask), model.net.weight, plain)[0]
    assert relative(model.net.weight.grad, weight) < 1e-5


# torch.compile


@pytest.mark.parametrize("preset", PRESETS)
def test_compiles_to_one_graph(preset: str) -> None:
    torch._dynamo.reset()
    pred, target, mask = case(preset, (2, 3, 16, 12))
    loss = objective(preset)
    want = loss(pred, target, mask)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    truth = loss.prepare(target)
    for options in ({}, {"truth": truth}):
        found = compiled(pred, target, mask, **options)
        for got, expected in zip(found, want, strict=True):
            torch.testing.assert_close(got, expected)
        assert relative(gradient(found, pred), gradient(loss(pred, target, mask), pred)) < 1e-5


def test_other_batch_sizes_are_not_compiled_again() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    loss = objective()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter)
    # From 16 up, so that pool3 has more than one pixel a side: ones are compiled for themselves.
    for number, size in enumerate(((2, 3, 16, 24), (3, 3, 24, 16), (4, 3, 32, 40))):
        pred, target, mask = case("paper", size)
        torch.testing.assert_close(compiled(pred, target, mask).total, loss(pred, target, mask).total)
        # The first call may count twice: a float of the settings restarts the analysis.
        if number == 0:
            frames = counter.frame_count
    assert counter.frame_count == frames
