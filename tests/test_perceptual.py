"""PerceptualLoss, StyleLoss, PerceptualStyleLoss: values, gradients, options, of the plain and the streamed path."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from harness import generator, grid
from perceptual_cases import CHUNKS, LOSSES, N, by_hand, gradient, images, make, total, trunk
from torch import Tensor, nn
from trunk_cases import relative, small_net

import inpaint_kernels as ik
from inpaint_kernels.features import FrozenTrunk
from inpaint_kernels.nn import PerceptualLoss, PerceptualStyleLoss, StyleLoss

every_loss = pytest.mark.parametrize("name", LOSSES)
every_class = pytest.mark.parametrize("kind", [PerceptualLoss, StyleLoss, PerceptualStyleLoss])
plain_or_streamed = pytest.mark.parametrize("chunk", [None, 2])


@grid(name=LOSSES, predictions=(1, 2, 3), chunk=CHUNKS)
def test_value_and_gradient(name: str, predictions: int, chunk: int | None) -> None:
    """Plain or streamed, the formula in float64 to within roundings of float32 convolutions."""
    pred, target = images(predictions)
    value, slope = gradient(make(name, chunk), pred, target)
    exact = pred.double().requires_grad_()
    want = by_hand(name, exact, target.double())
    want.backward()
    assert value.shape == ()
    assert relative(value, want.detach()) < 2e-6
    assert relative(slope, exact.grad) < 1e-5


@grid(name=LOSSES, chunk=(None, 2), scale=(0.0, 1e-6, 3.0, 2.0**24))
def test_any_upstream_scale(name: str, chunk: int | None, scale: float) -> None:
    pred, target = images(2)
    one, scaled = (gradient(make(name, chunk), pred, target, factor)[1] for factor in (1.0, scale))
    assert relative(scaled, one * scale) < 1e-5 if scale else not scaled.any()


@plain_or_streamed
def test_terms_are_raw_and_the_total_weighted(chunk: int | None) -> None:
    pred, target = images(2)
    result = make("both", chunk)(pred, target)
    assert type(result).__name__ == "PerceptualStyle"
    torch.testing.assert_close(result.total, 0.05 * result.perceptual + 120 * result.style)
    torch.testing.assert_close(result.perceptual, PerceptualLoss(trunk())(pred, target))
    torch.testing.assert_close(result.style, StyleLoss(trunk())(pred, target))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_one_pass_of_the_trunk_serves_both_terms(chunk: int | None) -> None:
    """One over all predictions together, one over the target without gradient; for every chunk when streamed."""
    shared = trunk()
    calls: list[tuple[int, bool]] = []
    shared.register_forward_hook(lambda _m, inputs, out: calls.append((len(inputs[0]), out[0].requires_grad)))
    gradient(make("both", chunk, shared), *images(2))
    pieces = 1 if chunk is None else -(-N // chunk)
    assert len(calls) == 2 * pieces
    assert sum(count for count, grad in calls if grad) == 2 * N
    assert sum(count for count, grad in calls if not grad) == N


@every_loss
def test_target_gradient(name: str) -> None:
    """Right on the plain path; refused, not dropped, by the streamed one."""
    pred, target = images(2)
    leaf = target.clone().requires_grad_()
    total(make(name)(pred, leaf)).backward()
    exact = target.double().requires_grad_()
    by_hand(name, pred.double(), exact).backward()
    assert relative(leaf.grad, exact.grad) < 1e-5
    streamed = make(name, chunk=2)
    with pytest.raises(ValueError, match=r"target.*chunk=None"):
        streamed(pred, leaf)
    with torch.no_grad():
        streamed(pred, leaf)


def test_second_derivative_of_the_plain_path() -> None:
    """With activations and penalties that have one."""
    smooth = FrozenTrunk(small_net(2, nn.Softplus), ["1", "5"], "imagenet").double()
    pred, target = torch.rand(2, 2, 3, 2, 2, dtype=torch.float64, generator=generator(4))
    pred.requires_grad_()
    for loss in (
        PerceptualLoss(smooth, penalty="l2"),
        PerceptualLoss(smooth, penalty="charbonnier"),
        StyleLoss(smooth, penalty="l2", weights=[1e2, 1e2]),
        StyleLoss(smooth, normalize="gatys"),
    ):
        assert torch.autograd.gradcheck(lambda x, loss=loss: loss(x, target), pred)
        assert torch.autograd.gradgradcheck(lambda x, loss=loss: loss(x, target), pred)


# ---- images ------------------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_images(name: str, dtype: torch.dtype) -> None:
    """The trunk itself in float32: gradients in the images' dtype, rounded as by the plain path."""
    pred, target = (x.to(dtype) for x in images(2))
    exact = pred.double().requires_grad_()
    by_hand(name, exact, target.double()).backward()
    scale = 1 / float(exact.grad.abs().max())
    for chunk in (None, 2):
        _, slope = gradient(make(name, chunk), pred, target, scale)
        assert slope.dtype == dtype
        assert relative(slope, exact.grad * scale) < torch.finfo(dtype).eps, chunk


@every_loss
def test_inside_an_autocast_region(name: str) -> None:
    pred, target = images(2)
    results = []
    for chunk in (None, 2):
        leaf = pred.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = total(make(name, chunk)(leaf, target))
        assert value.dtype == torch.float32
        value.backward()
        results.append((value.detach(), leaf.grad))
    plain, streamed = results
    assert relative(streamed[0], plain[0]) < 1e-2
    assert relative(streamed[1], plain[1]) < 3e-2


@every_loss
@pytest.mark.parametrize("chunk", [None, 2, N])
def test_a_target_made_under_inference_mode(name: str, chunk: int | None) -> None:
    pred, target = images(2)
    _, want = gradient(make(name), pred, target)
    with torch.inference_mode():
        target = target.clone()
    _, slope = gradient(make(name, chunk), pred, target)
    assert relative(slope, want) < 1e-5


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "expanded"])
@plain_or_streamed
def test_layouts_of_the_images(layout: str, chunk: int | None) -> None:
    def view(x: Tensor) -> Tensor:
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        return x.mT.contiguous().mT if layout == "transposed" else x[:, :1].expand(-1, 3, -1, -1)

    pred, target = (view(x) for x in images(2))
    leaf = pred.detach().requires_grad_()
    (slope,) = torch.autograd.grad(make("both", chunk)(leaf, target).total, leaf)
    _, want = gradient(make("both"), pred.contiguous(), target.contiguous())
    assert relative(slope, want) < 1e-5


@every_loss
@plain_or_streamed
def test_identical_images(name: str, chunk: int | None) -> None:
    _, target = images()
    value, slope = gradient(make(name, chunk), target.clone(), target)
    assert value == 0
    assert not slope.any()


@grid(name=LOSSES, dtype=(torch.float32, torch.float64), chunk=(None, 2))
def test_empty_batch(name: str, dtype: torch.dtype, chunk: int | None) -> None:
    pred, target = (x.to(dtype) for x in images(1, (0, 3, 8, 8)))
    value, slope = gradient(make(name, chunk, trunk().to(dtype)), pred, target)
    assert value == 0
    assert value.dtype == dtype
    assert slope.shape == pred.shape


def test_gray_images() -> None:
    pred, target = images(2, (N, 1, 12, 10))
    (_, plain), (_, streamed) = (gradient(make("both", chunk), pred, target) for chunk in (None, 2))
    assert relative(streamed, plain) < 1e-5
    assert streamed.shape == pred.shape


# ---- in a model --------------------------------------------------------------------------------------------------


@plain_or_streamed
def test_only_the_images_get_gradients_and_nothing_changes(chunk: int | None) -> None:
    loss = make("both", chunk)
    before = copy.deepcopy(loss.state_dict())
    pred, target = images(2)
    kept = pred.clone(), target.clone()
    gradient(loss, pred, target)
    assert all(p.grad is None for p in loss.parameters())
    assert all(torch.equal(v, before[k]) for k, v in loss.state_dict().items())
    assert torch.equal(pred, kept[0])
    assert torch.equal(target, kept[1])
    assert list(loss.state_dict()) == [f"trunk.{k}" for k in trunk().state_dict()]
    assert list(loss.parameters()) == list(loss.trunk.parameters())


def test_in_a_training_step_with_other_losses() -> None:
    """The kept gradient joins the graph like any other, also when the loss is used twice."""
    network = nn.Conv2d(3, 3, 3, padding=1)
    _, target = images()
    gradients = []
    for chunk in (None, 2):
        loss = make("both", chunk)
        raw = network(target)
        composite = 0.5 * raw + 0.5 * target
        value = loss(torch.cat([raw, composite]), target).total + ik.masked_l1_loss(raw, target)
        value = value + 0.1 * loss(raw, target).total
        gradients.append(torch.autograd.grad(value, list(network.parameters())))
    for plain, streamed in zip(*gradients, strict=True):
        assert relative(streamed, plain) < 1e-5


def test_compiled_trunks_are_taken() -> None:
    torch._dynamo.reset()
    pred, target = images()
    compiled, plain = (
        PerceptualStyleLoss(layers, style_taps=["4"])(pred, target)
        for layers in (torch.compile(trunk(), backend="eager"), trunk())
    )
    torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("name", ["perceptual", "style", "both"])
def test_plain_path_compiles_to_one_graph(name: str) -> None:
    torch._dynamo.reset()
    pred, target = images(2)
    want = gradient(make(name), pred, target)
    compiled = torch.compile(make(name), fullgraph=True, backend="aot_eager")
    for got, expected in zip(gradient(compiled, pred, target), want, strict=True):
        assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("chunk", [None, 1])
def test_stacked_predictions_with_the_weights_of_the_docstring(chunk: int | None) -> None:
    """Those that are published are for sums over predictions, as the objective counts."""
    vgg = ik.features.vgg16(weights=None, preprocess="none")
    objective = ik.objectives.PartialConvObjective(
        hole_weight=0, valid_weight=0, tv_weight=0, trunk=vgg, preprocess="none"
    )
    loss = PerceptualStyleLoss(vgg, perceptual_weight=2 * 0.05, style_weight=2 * 120, chunk=chunk)
    raw, target = images(1, (2, 3, 16, 16))
    mask = (target[:, :1] > 0.4).float()
    stacked = torch.cat([raw, ik.composite(raw, target, mask)])
    torch.testing.assert_close(loss(stacked, target).total, objective(raw, target, mask).total)
    example = " ".join((PerceptualStyleLoss.__doc__ or "").split())
    assert "perceptual_weight=2 * 0.05, style_weight=2 * 120" in example


def test_taps_by_layer_name() -> None:
    vgg = ik.features.vgg16(("pool1", "relu2_2"), weights=None)
    pred, target = images(1, (1, 3, 16, 16))
    named = PerceptualStyleLoss(vgg, perceptual_taps=["relu2_2"], style_taps=["pool1"])(pred, target)
    assert named == PerceptualStyleLoss(vgg, perceptual_taps=[1], style_taps=[0])(pred, target)


# ---- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, -1, 1.5, "2", True])
@every_class
def test_bad_chunk(kind: Any, chunk: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="chunk"):
        kind(trunk(), chunk=chunk)


@plain_or_streamed
@pytest.mark.parametrize(
    ("pred", "target", "error", "words"),
    [
        ((5, 3, 8, 8), (2, 3, 8, 8), ValueError, r"pred.*\(5, 3, 8, 8\).*\(2, 3, 8, 8\)"),
        ((2, 3, 8, 8), (4, 3, 8, 8), ValueError, "pred.*target"),
        ((2, 3, 8, 8), (2, 3, 8, 6), ValueError, "pred.*target"),
        ((2, 1, 8, 8), (2, 3, 8, 8), ValueError, "pred.*target"),
        ((3, 8, 8), (3, 8, 8), ValueError, r"pred.*\(N, C, H, W\)"),
        (None, (2, 3, 8, 8), TypeError, "pred.*Tensor"),
        ((2, 3, 8, 8), None, TypeError, "target.*Tensor"),
    ],
)
def test_bad_images(chunk: int | None, pred: Any, target: Any, error: type[Exception], words: str) -> None:
    pair = [None if size is None else torch.rand(size) for size in (pred, target)]
    with pytest.raises(error, match=words):
        PerceptualLoss(trunk(), chunk=chunk)(*pair)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (PerceptualLoss, {"weights": [1.0]}, "weights.*1 entries for 3"),
        (PerceptualLoss, {"penalty": "huber"}, "penalty.*'huber'"),
        (PerceptualLoss, {"layer_reduction": "max"}, "layer_reduction.*'max'"),
        (StyleLoss, {"normalize": "c"}, "normalize.*'c'"),
        (StyleLoss, {"normalize": "gatys", "penalty": "l1"}, "gatys"),
        (PerceptualStyleLoss, {"style_taps": ["pool9"]}, "style_taps.*pool9.*1, 4, 6"),
        (PerceptualStyleLoss, {"perceptual_taps": [3]}, "perceptual_taps.*3"),
        (PerceptualStyleLoss, {"perceptual_taps": []}, "perceptual_taps.*empty"),
    ],
)
def test_bad_options(kind: Any, options: dict[str, Any], words: str) -> None:
    """Named no later than the first call."""
    with pytest.raises(ValueError, match=words):
        kind(trunk(), **options)(*images())


@every_class
@pytest.mark.parametrize("given", ["vgg16", nn.Conv2d(3, 4, 3), None], ids=str)
def test_what_is_no_trunk_is_refused_at_once(kind: Any, given: Any) -> None:
    got = "'vgg16'" if given == "vgg16" else type(given).__name__
    with pytest.raises(TypeError, match=rf"trunk must be a FrozenTrunk.*vgg16\(\).*got {got}"):
        kind(given)


@pytest.mark.parametrize("chunk", [None, 1])
def test_images_that_are_too_small_for_the_trunk(chunk: int | None) -> None:
    loss = PerceptualLoss(ik.features.vgg16(weights=None), chunk=chunk)
    with pytest.raises(ValueError, match=r"pred.*\(2, 3, 1, 1\).*8x8"):
        loss(torch.rand(2, 3, 1, 1), torch.rand(2, 3, 1, 1))
