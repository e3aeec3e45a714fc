"""`weights=` of the losses over several layers: numbers, and tensors that may be learned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Backend, generator
from torch import Tensor
from training_checks import check_no_host_sync

import inpaint_kernels as ik

FUNCTIONS = {"feature_distance": ik.feature_distance, "style_loss": ik.style_loss}
functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def layers(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    rng = generator(3)
    sizes = ((2, 3, 4, 5), (2, 4, 3, 2))
    return tuple([torch.rand(size, generator=rng).to(device, dtype) for size in sizes] for _ in range(2))


def of_each_layer(function: Callable[..., Tensor], x: list[Tensor], y: list[Tensor]) -> Tensor:
    return torch.stack([function(a, b) for a, b in zip(x, y, strict=True)])


# What `weights=` may be, of two learned numbers.
FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda w: w,
    "scalars": lambda w: [w[0], w[1]],
    "single elements": lambda w: (w[:1], w[1:]),
    "one of them": lambda w: [w[0], 0.75],
    "float64": lambda w: w.double(),
}
forms = pytest.mark.parametrize("form", FORMS)


@functions
@forms
def test_gradient_to_learned_weights(function: Callable[..., Tensor], form: str) -> None:
    """The loss of each layer; and the gradients of the features are as with numbers."""
    x, y = layers()
    x[0].requires_grad_()
    weights = torch.tensor([0.25, 0.75], requires_grad=True)
    loss = function(x, y, weights=FORMS[form](weights))
    gradients = torch.autograd.grad(loss, (weights, x[0]), create_graph=True)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, function(x, y, weights=[0.25, 0.75]))
    single = of_each_layer(function, x, y)
    torch.testing.assert_close(gradients[0], single * torch.tensor([1.0, 0.0 if "one" in form else 1.0]))
    torch.testing.assert_close(gradients[1], torch.autograd.grad(0.25 * single[0], x[0])[0])
    (mixed,) = torch.autograd.grad(gradients[0][0], x[0])
    torch.testing.assert_close(mixed, 4 * gradients[1])


@functions
def test_a_learned_scalar_of_one_layer(function: Callable[..., Tensor]) -> None:
    (x, *_), (y, *_) = layers()
    weight = torch.tensor(2.0, requires_grad=True)
    function(x, y, weights=weight).backward()
    torch.testing.assert_close(weight.grad, function(x, y))


def test_mean_over_layers_of_learned_weights() -> None:
    x, y = layers()
    weights = torch.ones(2, requires_grad=True)
    ik.feature_distance(x, y, weights=weights, layer_reduction="mean").backward()
    torch.testing.assert_close(weights.grad, of_each_layer(ik.feature_distance, x, y) / 2)


@functions
@forms
def test_constant_tensors_are_numbers_to_a_kernel(
    kernel: Backend, function: Callable[..., Tensor], form: str
) -> None:
    """On the CPU, where reading one waits for nobody; with grad mode off also those that are learned."""
    x, y = layers(kernel.device)
    expected = function(x, y, weights=[0.25, 0.75], backend=kernel.name)
    for learned in (False, True):
        weights = FORMS[form](torch.tensor([0.25, 0.75], requires_grad=learned))
        with torch.set_grad_enabled(not learned):
            loss = function(x, y, weights=weights, backend=kernel.name)
        torch.testing.assert_close(loss, expected, rtol=0, atol=0)


@functions
def test_tensors_elsewhere_are_not_read(function: Callable[..., Tensor]) -> None:
    """Nothing waits for the device of the weights; with features there it is the formula that runs."""
    x, y = ([t.to("meta") for t in side] for side in layers())
    weights = torch.rand(2, device="meta")
    losses: list[Tensor] = []
    check_no_host_sync(lambda: losses.append(function(x, y, weights=weights)))
    assert losses[0].shape == () and losses[0].device.type == "meta"


@functions
def test_kernels_take_numbers(kernel: Backend, function: Callable[..., Tensor]) -> None:
    x, y = layers(kernel.device)
    weights = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match=rf"backend '{kernel.name}' takes weights as numbers.*'reference'"):
        function(x, y, weights=weights, backend=kernel.name)
    assert function(x, y, weights=weights, backend="reference").requires_grad


@functions
def test_compiles_with_learned_weights(function: Callable[..., Tensor]) -> None:
    """And with constant ones, which a compiler cannot turn into numbers."""
    x, y = layers()
    compiled = torch.compile(
        lambda weights: function(x, y, weights=weights), fullgraph=True, backend="aot_eager"
    )
    for learned in (True, False):
        torch._dynamo.reset()
        weights = torch.tensor([0.25, 0.75], requires_grad=learned)
        loss = compiled(weights)
        torch.testing.assert_close(loss.detach(), function(x, y, weights=[0.25, 0.75]))
        if learned:
            (gradient,) = torch.autograd.grad(loss, weights)
            torch.testing.assert_close(gradient, of_each_layer(function, x, y))


@functions
@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (torch.ones(3), ValueError, "weights has 3 entries for 2 layers"),
        (torch.tensor(1.0), ValueError, "weights has 1 entries for 2 layers"),
        (torch.ones(2, 2), TypeError, "weights must be a number, a sequence of numbers or of tensors of one"),
        (torch.ones(2, dtype=torch.complex64), TypeError, "weights must be a number"),
        (["a", "b"], TypeError, "weights must be a number"),
    ],
    ids=str,
)
def test_weights_that_do_not_fit(
    function: Callable[..., Tensor], weights: Any, error: type[Exception], message: str
) -> None:
    x, y = layers()
    with pytest.raises(error, match=message):
        function(x, y, weights=weights)
