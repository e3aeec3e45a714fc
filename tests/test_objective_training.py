"""Objectives in training: streaming, memory, passes of the trunk, mixed precision, models, checkpoints, compile."""

from __future__ import annotations

import copy
import functools
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from harness import poisoned_allocations
from objective_table import (
    METHODS,
    WITH_TRUNK,
    N,
    assert_same,
    every_method,
    inputs,
    objective,
    trunk,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from training_checks import check_compiles, check_no_host_sync, kept_bytes, operator_calls, ops_called
from trunk_cases import relative

import inpaint_kernels as ik
from inpaint_kernels.features import FrozenTrunk

with_trunk = pytest.mark.parametrize("name", WITH_TRUNK)
plain_or_streamed = pytest.mark.parametrize("chunk", [None, 2])

FEATURE_TERMS = ("perceptual", "style", "lpips")


# ---- streaming ---------------------------------------------------------------------------------------------------


@with_trunk
def test_streamed_is_plain(name: str) -> None:
    x = inputs(name)
    want = x.terms(objective(name))
    for chunk in (1, 2, N, N + 4):
        streamed = x.terms(objective(name, chunk=chunk))
        assert_same(x, streamed, want)
        for term, got, expected in zip(want._fields, streamed, want, strict=True):
            assert got.requires_grad == (term not in FEATURE_TERMS and expected.requires_grad)
            if term in ("hole", "valid", "tv", "l1"):
                assert torch.equal(x.gradient(got), x.gradient(expected))


@pytest.mark.parametrize("allow_unused", [False, True])
@pytest.mark.parametrize("chunk", [2, N])
def test_second_derivative_of_the_streamed_total_is_refused(chunk: int, allow_unused: bool) -> None:
    x = inputs("pconv-paper")
    total = x.terms(objective("pconv-paper", chunk=chunk)).total
    (first,) = torch.autograd.grad(total, x.leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="chunk=None"):
        torch.autograd.grad(first.square().sum(), x.leaves, allow_unused=allow_unused)


@functools.cache
def _wide(net: str) -> FrozenTrunk:
    """Of the real width, tapped wherever a method taps it."""
    taps = [tap for name in WITH_TRUNK if METHODS[name].net == net for tap in trunk(name).names]  # type: ignore[union-attr]
    build: Callable[..., FrozenTrunk] = getattr(ik.features, net)
    return build(list(dict.fromkeys(taps)), weights=None, preprocess="none")


@with_trunk
def test_streamed_keeps_five_percent_of_the_plain_path(name: str) -> None:
    """The gradient of the prediction by each pass of the trunk, and 6 bits an element for the pixel terms."""
    net = METHODS[name].net
    options: dict[str, Any] = {"trunk": _wide(net if net and net != "stages" else "vgg19")}
    if net == "stages":  # LaMa's trunk is anybody's
        options["perceptual_layers"] = ("relu2_2", "relu3_4", "relu4_4", "relu5_2")
    if net == "alexnet":
        options["heads"] = "v0.1"
    x = inputs(name, 2, mask="binary", size=64 if net == "alexnet" else 16)
    judged = tree_map(lambda t: t.detach().requires_grad_(), x.outputs(objective(name)))
    leaves = [*x.leaves, x.target, x.mask, *tree_leaves(judged)]

    def kept(chunk: int | None) -> int:
        loss = objective(name, chunk=chunk, **options)
        heads = loss._heads.values if net == "alexnet" else []
        return kept_bytes(lambda *_: x.terms(loss, **judged), *leaves, *heads)

    plain, streamed = kept(None), kept(1)
    # AlexNet's maps are small: of an image's gradient, three numbers a pixel, they are the sixfold.
    assert streamed <= (0.2 if net == "alexnet" else 0.05) * plain
    enlarged = 2.25 * x.mask.nbytes if name.startswith("AOT") else 0  # logits and mask
    assert streamed <= METHODS[name].passes * 1.25 * x.target.nbytes + enlarged + x.mask.nbytes / 8 + 512
    with torch.no_grad():
        assert kept(1) == 0


@plain_or_streamed
@with_trunk
def test_passes_of_the_trunk(name: str, chunk: int | None) -> None:
    """One over all predictions of terms that share some, one without gradient over the truth; so for every chunk."""
    x = inputs(name)
    loss = objective(name, chunk=chunk)
    calls: list[tuple[int, bool]] = []
    loss.trunk.register_forward_hook(
        lambda _m, images, out: calls.append((len(images[0]), out[0].requires_grad))
    )
    x.gradient(x.terms(loss).total)
    pieces = 1 if chunk is None else -(-N // chunk)
    assert len(calls) == 2 * METHODS[name].passes * pieces
    assert sum(count for count, grad in calls if grad) == N * METHODS[name].parts
    assert sum(count for count, grad in calls if not grad) == N * METHODS[name].passes


@plain_or_streamed
@every_method
def test_images_are_written_once(name: str, chunk: int | None) -> None:
    """Predictions of a pass in one call, its truth in another: nothing is normalised twice, or if it is already."""
    x = inputs(name)
    loss = objective(name, chunk=chunk)
    judged = x.outputs(loss)
    calls = operator_calls(lambda: x.terms(loss, **judged))
    writing = [call for call in calls if "stacked_images" in call.name and "backward" not in call.name]
    assert sum(len(call.results[0]) for call in writing) == METHODS[name].written * N


# ---- gradients ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@plain_or_streamed
@pytest.mark.parametrize("name", ["pconv-paper", "CTN"])
def test_without_gradient_no_backward_runs(name: str, chunk: int | None, context: Callable[[], Any]) -> None:
    x = inputs(name)
    loss = objective(name, chunk=chunk)
    want = x.terms(loss)
    results: list[Any] = []
    with context():
        called = ops_called(lambda: results.append(x.terms(loss)))
    assert not [op for op in called if "backward" in op]
    torch.testing.assert_close(*results, loss.result(*(term.detach() for term in want)))


@plain_or_streamed
@every_method
def test_no_host_sync(name: str, chunk: int | None) -> None:
    x = inputs(name)
    loss = objective(name, chunk=chunk)
    truth = loss.prepare(x.target, x.mask)
    check_no_host_sync(lambda: x.gradient(x.terms(loss).total))
    check_no_host_sync(lambda: x.gradient(x.terms(loss, truth=truth).total))
    if x.critic is not None:
        check_no_host_sync(lambda: x.discriminator_loss(loss).total.backward())


@plain_or_streamed
@every_method
def test_target_and_mask_get_no_gradient(name: str, chunk: int | None) -> None:
    x = inputs(name)
    loss = objective(name, chunk=chunk)
    judged = tree_map(lambda t: t.detach().requires_grad_(), x.outputs(loss))
    want = x.gradient(x.terms(loss, **judged).total)
    x.target.requires_grad_()
    x.mask.requires_grad_()
    total = x.terms(loss, **judged).total
    assert torch.equal(x.gradient(total), want)
    total.backward()
    assert x.target.grad is None and x.mask.grad is None
    assert all(t.grad is None for t in tree_leaves(judged.get("real", ())))


@pytest.mark.parametrize(("chunk", "dtype"), [(None, torch.float32), (2, torch.float64)])
@every_method
def test_empty_batch(name: str, chunk: int | None, dtype: torch.dtype) -> None:
    x = inputs(name, 0, dtype=dtype)
    loss = objective(name, dtype, chunk=chunk)
    for truth in (None, loss.prepare(x.target, x.mask)):
        terms = x.terms(loss, truth=truth)
        assert not any(terms) and all(term.dtype == dtype for term in terms)
        assert x.gradient(terms.total).shape == x.leaves[0].shape
    if x.critic is not None:
        assert not any(x.discriminator_loss(loss))


def test_empty_batch_through_a_streamed_float16_trunk() -> None:
    """Whose gradients are scaled by their largest element: there is none."""
    x = inputs("pconv-paper", 0)
    terms = x.terms(objective("pconv-paper", chunk=2, trunk=trunk("pconv-paper", autocast=torch.float16)))
    assert not any(terms) and x.gradient(terms.total).shape == x.leaves[0].shape


# ---- mixed precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk", "dtype"), [(None, torch.bfloat16), (2, torch.float16)])
@every_method
def test_half_predictions_against_float32_targets(name: str, chunk: int | None, dtype: torch.dtype) -> None:
    """As autocast around the network makes them: the terms of the rounded prediction, a gradient rounded once."""
    x = inputs(name)
    y = x.changed(leaves=[leaf.detach().to(dtype).requires_grad_() for leaf in x.leaves])
    x.leaves = [leaf.detach().float().requires_grad_() for leaf in y.leaves]
    judged = tree_map(Tensor.detach, x.outputs(objective(name)))
    want, terms = x.terms(objective(name), **judged), y.terms(objective(name, chunk=chunk), **judged)
    torch.testing.assert_close(terms, want)
    gradient = y.gradient(terms.total)
    assert gradient.dtype == dtype
    assert relative(gradient, x.gradient(want.total)) < 4 * torch.finfo(dtype).eps
    if judged:
        terms = y.terms(objective(name), **tree_map(lambda t: t.to(dtype).requires_grad_(), judged))
        assert all(term.dtype == torch.float32 for term in terms)
        torch.testing.assert_close(terms, want, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(("chunk", "inside"), [(None, "ambient"), (2, "trunk")])
@with_trunk
def test_trunk_in_bfloat16(name: str, chunk: int | None, inside: str) -> None:
    x = inputs(name)
    want = x.terms(objective(name))
    judged = x.outputs(objective(name))
    options = {"trunk": trunk(name, autocast=torch.bfloat16)} if inside == "trunk" else {}
    with torch.autocast("cpu", torch.bfloat16, enabled=inside == "ambient"):
        terms = x.terms(objective(name, chunk=chunk, **options), **judged)
    for term, got, expected in zip(want._fields, terms, want, strict=True):
        assert got.dtype == torch.float32
        exact = term not in (*FEATURE_TERMS, "total")
        torch.testing.assert_close(got, expected, **{} if exact else {"rtol": 2e-2, "atol": 1e-5})
    # Signs of differences that bfloat16 cannot tell apart, after up to fourteen layers.
    limit = 0.4 if METHODS[name].net == "vgg19" else 0.2
    assert relative(x.gradient(terms.total), x.gradient(want.total)) < limit


# ---- in a model --------------------------------------------------------------------------------------------------

some_methods = pytest.mark.parametrize("name", ["pconv-mmagic", "CTN", "CoordFill", "DeepFill-v2"])


class Model(nn.Module):
    """As a LightningModule holds its loss."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.net = nn.Conv2d(3, 3, 3, padding=1)
        self.objective = objective(name, **options)


@some_methods
def test_the_trunk_is_no_part_of_the_model(name: str) -> None:
    """Of its parameters, checkpoints, modes and switches."""
    model = Model(name)
    names = ["net.weight", "net.bias"]
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == names
    assert not list(model.named_buffers())
    Model(name).load_state_dict(model.state_dict())
    model.train().requires_grad_(True)
    if model.objective.trunk is not None:
        assert not any(p.requires_grad for p in model.objective.trunk.parameters())
        assert not any(module.training for module in model.objective.trunk.modules())
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert len(list(averaged.parameters())) == 2


@some_methods
def test_the_objective_follows_the_model(name: str) -> None:
    model = Model(name).double()
    x = inputs(name, dtype=torch.float64)
    assert_same(x, x.terms(model.objective), x.terms(objective(name, torch.float64)))
    if model.objective.trunk is not None:
        model.to(memory_format=torch.channels_last)
        parameters = [p for p in model.objective.trunk.parameters() if p.ndim == 4]
        assert all(p.is_contiguous(memory_format=torch.channels_last) for p in parameters)
        assert all(p.is_meta for p in Model(name).to("meta").objective.trunk.parameters())
    half = Model(name).to(torch.bfloat16)
    y = inputs(name)
    terms = y.terms(half.objective)
    assert all(term.dtype == torch.float32 for term in terms)
    torch.testing.assert_close(terms, y.terms(objective(name)), rtol=2e-2, atol=1e-5)


@some_methods
def test_to_empty_keeps_the_trunk(name: str) -> None:
    """As of a model that was moved from the meta device and then loaded: its checkpoint brings no trunk."""
    x = inputs(name)
    model = Model(name)
    want, state = x.terms(model.objective), copy.deepcopy(model.state_dict())
    with poisoned_allocations():
        model.to_empty(device="cpu")
    assert not torch.equal(model.net.weight, state["net.weight"])
    model.load_state_dict(state, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(x.terms(model.objective), want, strict=True))


def test_a_trunk_without_weights_is_refused() -> None:
    """Not a NaN total after `load_state_dict` said that all keys match."""
    for kind in (
        ik.objectives.PartialConvObjective,
        ik.objectives.CTNObjective,
        ik.objectives.CoordFillObjective,
    ):
        with torch.device("meta"), pytest.raises(ValueError, match=r"trunk.*meta device.*outside"):
            kind(weights=None)
    with torch.device("meta"):
        ik.objectives.PartialConvObjective(weights=None, perceptual_weight=0, style_weight=0)
    for name in ("pconv-paper", "CoordFill"):
        model = Model(name).to("meta")
        with pytest.raises(RuntimeError, match=r"trunk.*meta device.*anew"):
            model.to_empty(device="cpu")


@some_methods
def test_copies_and_pickles(name: str) -> None:
    x = inputs(name)
    loss = objective(name)
    stream = io.BytesIO()
    torch.save(loss, stream)
    stream.seek(0)
    want = tuple(term.detach() for term in x.terms(loss))
    for other in (copy.deepcopy(loss), torch.load(stream, weights_only=False)):
        assert all(torch.equal(a, b) for a, b in zip(x.terms(other), want, strict=True))
        assert other.trunk is not loss.trunk or loss.trunk is None
        assert other.settings == loss.settings
    again = pickle.loads(pickle.dumps(loss.result(*want)))
    assert type(again) is loss.result and all(map(torch.equal, again, want))


# ---- torch.compile -----------------------------------------------------------------------------------------------


# Of each deep trunk the first layers: a compiler takes ten seconds for the others, which are no different.
SHALLOW: dict[str, dict[str, Any]] = {
    "pconv-naoto0804": {"layers": ["pool1"]},
    "CTN": {"perceptual_layers": ["relu1_1"], "style_layers": ["relu2_2"]},
    "CoordFill": {},
    "LaMa-switches": {},
}


@pytest.mark.parametrize("name", SHALLOW)
def test_compiles_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    x = inputs(name)
    loss = objective(name, **SHALLOW[name])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for truth in (None, loss.prepare(x.target)) if "pconv" in name else (None,):
        assert_same(x, x.terms(compiled, truth=truth), x.terms(loss, truth=truth))


def test_compiles_with_its_discriminator() -> None:
    torch._dynamo.reset()
    x = inputs("DeepFill-v2")
    loss = objective("DeepFill-v2")

    def whole(first: Tensor, last: Tensor, target: Tensor, mask: Tensor) -> Any:
        fake = x.critic(loss.discriminator_input([first, last], target, mask))
        return loss([first, last], target, mask, fake=fake)

    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    assert_same(x, compiled(*x.leaves, x.target, x.mask), x.terms(loss))


def test_other_batch_sizes_are_not_compiled_again() -> None:
    loss = objective("pconv-paper", layers=["pool1"])

    def check(compiled: Any, pair: Sequence[Tensor]) -> None:
        torch.testing.assert_close(compiled(*pair).total, loss(*pair).total)

    # From 16 up, so that every pooling of the trunk has more than one pixel a side: ones are compiled for themselves.
    cases = [inputs("pconv-paper", n, size=size) for n, size in ((2, 16), (3, 24), (4, 32))]
    check_compiles(loss, check, [(x.pred, x.target, x.mask) for x in cases])
