"""Gradient penalties against explicit gradients, in every precision, and what refuses to be differentiated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import DTYPES, generator, grid
from torch import Tensor, nn

import inpaint_kernels as ik


def images(seed: int, dtype: torch.dtype = torch.float64, n: int = 3) -> Tensor:
    return torch.rand(n, 2, 6, 6, generator=generator(seed), dtype=torch.float64).to(dtype)


def critic(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    layers = (nn.Conv2d(2, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2))
    net = nn.Sequential(*layers).to(torch.float64)
    for i, parameter in enumerate(net.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=generator(i), dtype=torch.float64)
    return net.to(dtype)


def usual_r1(net: nn.Module, real: Tensor, gamma: float) -> Tensor:
    """As MAT computes it."""
    real = real.detach().requires_grad_()
    (gradient,) = torch.autograd.grad([net(real).sum()], [real], create_graph=True)
    return (gradient.square().sum([1, 2, 3]) * (gamma / 2)).mean()


def usual_gradient_penalty(
    net: nn.Module, real: Tensor, fake: Tensor, alpha: Any, norm: str, mask: Tensor | None
) -> Tensor:
    """Per pixel as mmagic computes it, per sample as Gulrajani et al. do."""
    mixed = (alpha * real + (1 - alpha) * fake).detach().requires_grad_()
    logits = net(mixed)
    (gradient,) = torch.autograd.grad(logits, mixed, torch.ones_like(logits), create_graph=True)
    if mask is not None:
        gradient = gradient * mask
    gradient = gradient if norm == "pixel" else gradient.flatten(1)
    penalty = ((gradient.norm(2, dim=1) - 1) ** 2).mean()
    return penalty if mask is None else penalty / mask.mean()


def by_parameters(penalty: Tensor, net: nn.Module) -> list[Tensor]:
    return list(
        torch.autograd.grad(penalty, list(net.parameters()), allow_unused=True, materialize_grads=True)
    )


def test_r1() -> None:
    net, real = critic(), images(1).requires_grad_()
    found, expected = ik.r1_penalty(net(real), real, gamma=3), usual_r1(net, real, 3)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(by_parameters(found, net), by_parameters(expected, net))
    again = ik.r1_penalty([net(real), 2 * net(real)], real, gamma=3)
    torch.testing.assert_close(again, (1 + 4) / 2 * expected)

    # Images may have been made of something, which then gets a gradient.
    def made(base: Tensor) -> Tensor:
        real = base.sin()
        return ik.r1_penalty(net(real), real)

    assert torch.autograd.gradcheck(made, images(2).requires_grad_())


@grid(
    norm=("sample", "pixel"), kind=(None, "n1hw", "hw", "nchw", "bool", "0/255"), alpha=("number", "tensor")
)
def test_gradient_penalty(norm: str, kind: str | None, alpha: str) -> None:
    net, real, fake = critic(), images(1), images(2).requires_grad_()
    share: Any = 0.3 if alpha == "number" else torch.rand(3, 1, 1, 1, generator=generator(3)).double()
    values = None
    if kind is not None:
        shape = {"hw": (6, 6), "nchw": (3, 2, 6, 6)}.get(kind, (3, 1, 6, 6))
        values = torch.rand(shape, generator=generator(4)).double()
        values = values.round() if kind in ("bool", "0/255") else values
    mask = values
    if values is not None and kind in ("bool", "0/255"):
        mask = values.bool() if kind == "bool" else (255 * values).byte()
    found = ik.gradient_penalty(net, real, fake, mask=mask, norm=norm, weight=2.5, alpha=share)
    expected = 2.5 * usual_gradient_penalty(net, real, fake, share, norm, values)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(by_parameters(found, net), by_parameters(expected, net))
    heads = ik.gradient_penalty(
        lambda x: [net(x), 0.5 * net(x)], real, fake, mask=mask, norm=norm, alpha=share
    )
    half = usual_gradient_penalty(lambda x: 0.5 * net(x), real, fake, share, norm, values)
    torch.testing.assert_close(heads, 5 * (expected / 2.5 + half))


def test_alpha_is_the_share_of_the_real_image_and_random_for_each_sample() -> None:
    seen: list[Tensor] = []

    def spy(x: Tensor) -> Tensor:
        seen.append(x.detach())
        return x.square().sum((1, 2, 3))

    real, fake = torch.ones(64, 1, 2, 2), torch.zeros(64, 1, 2, 2)
    for alpha in (1.0, 0.0, None, None):
        ik.gradient_penalty(spy, real, fake, alpha=alpha)
    assert torch.equal(seen[0], real) and torch.equal(seen[1], fake)
    assert len(seen) == 4 and not torch.equal(seen[2], seen[3])
    assert torch.equal(seen[2], seen[2][:, :, :1, :1].expand_as(real)) and len(seen[2].unique()) > 60
    assert 0 <= seen[2].min() < 0.2 and 0.8 < seen[2].max() < 1


@pytest.mark.parametrize("norm", ["sample", "pixel"])
def test_second_derivatives(norm: str) -> None:
    """By parameters, mask and alpha: of the second order for the penalty, so of the third for the critic."""
    real, fake = images(1, n=2), images(2, n=2)
    weight = torch.randn(2, 2, 3, 3, generator=generator(1), dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 1, 6, 6, generator=generator(3), dtype=torch.float64, requires_grad=True)
    alpha = torch.rand(2, 1, 1, 1, generator=generator(4), dtype=torch.float64, requires_grad=True)

    def call(weight: Tensor, mask: Tensor, alpha: Tensor) -> Tensor:
        net = lambda x: F.conv2d(x, weight).tanh().sum((1, 2, 3))  # noqa: E731
        return ik.gradient_penalty(net, real, fake, mask=mask, norm=norm, alpha=alpha)

    assert torch.autograd.gradcheck(call, (weight, mask, alpha), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, (weight, mask, alpha))


@pytest.mark.parametrize("norm", ["sample", "pixel"])
def test_a_zero_gradient_has_derivative_zero_in_every_order(norm: str) -> None:
    weight = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    net = lambda x: (x.square() * weight[:, None, None]).sum((1, 2, 3))  # noqa: E731
    penalty = ik.gradient_penalty(net, images(1), images(2), norm=norm, weight=1)
    (first,) = torch.autograd.grad(penalty, weight, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), weight)
    assert penalty.item() == 1 and first.tolist() == second.tolist() == [0, 0]


@pytest.mark.parametrize("norm", ["sample", "pixel"])
def test_masks_without_a_pixel_and_nan_under_zero(norm: str) -> None:
    net, real, fake = critic(), images(1), images(2)
    empty = ik.gradient_penalty(net, real, fake, mask=torch.zeros(3, 1, 6, 6), norm=norm)
    assert empty.item() == 0 and not any(g.any() for g in by_parameters(empty, net))
    mask = torch.ones(6, 6)
    mask[0] = 0
    poison = torch.zeros(6, 6, dtype=torch.float64)
    poison[0] = float("nan")
    sums = lambda x: (x * x).sum((1, 2, 3))  # noqa: E731
    poisoned = lambda x: (x * x + poison * x).sum((1, 2, 3))  # noqa: E731
    found, expected = (
        ik.gradient_penalty(f, real, fake, mask=mask, norm=norm, alpha=0.5) for f in (poisoned, sums)
    )
    torch.testing.assert_close(found, expected)


def test_an_empty_batch_gives_zero() -> None:
    net, real = critic(), images(1, n=0).requires_grad_()
    for penalty in (
        ik.r1_penalty(net(real), real),
        ik.gradient_penalty(net, real, real),
        ik.gradient_penalty(net, real, real, mask=torch.ones(0, 1, 6, 6), norm="pixel"),
    ):
        assert penalty.item() == 0 and not any(g.any() for g in by_parameters(penalty, net))


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_penalties_are_float32_whatever_the_images(dtype: str) -> None:
    """Squared gradients of 300 do not fit into float16, and bfloat16 would round them."""
    real = torch.full((2, 1, 2, 2), 300.0, dtype=DTYPES[dtype]).requires_grad_()
    logits = lambda x: 0.5 * x.float().square().sum((1, 2, 3))  # noqa: E731
    r1 = ik.r1_penalty(logits(real), real, gamma=2)
    penalty = ik.gradient_penalty(logits, real, real.float(), weight=1)
    assert r1.dtype == penalty.dtype == torch.float32
    assert r1.item() == 4 * 300**2 and penalty.item() == 599**2


def test_autocast_touches_only_the_critic() -> None:
    """A float32 critic's penalty is the same under it, to the bit; operators of its backward are not cast."""
    net, real = critic(torch.float32), images(1, torch.float32).requires_grad_()

    def exact(x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return net(x)

    call = lambda: (ik.r1_penalty(exact(real), real), ik.gradient_penalty(exact, real, real, alpha=0.5))  # noqa: E731
    expected = call()
    with torch.autocast("cpu", torch.bfloat16):
        found = call()
        cast = ik.r1_penalty(net(real), real), ik.gradient_penalty(net, real, real, alpha=0.5)
    assert torch.equal(torch.stack(found), torch.stack(expected))
    torch.testing.assert_close(cast, expected, rtol=0.03, atol=0)
    assert all(torch.isfinite(g).all() for g in by_parameters(cast[0] + cast[1], net))


NET, REAL, LEAF = critic(), images(1), images(1).requires_grad_()


def no_grad(call: Callable[[], Any]) -> Any:
    with torch.no_grad():
        return call()


BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "r1-no-requires": (
        lambda: ik.r1_penalty(NET(REAL), REAL), ValueError, r"call real_images.requires_grad_\(\) before"
    ),
    "r1-late": (
        lambda: ik.r1_penalty(NET(REAL), REAL.clone().requires_grad_()), ValueError, "real_logits does not depend on"
    ),
    "r1-detached": (
        lambda: ik.r1_penalty([NET(LEAF), NET(LEAF).detach()], LEAF), ValueError, r"real_logits\[1\] does not depend"
    ),
    "r1-no-grad": (lambda: no_grad(lambda: ik.r1_penalty(NET(LEAF), LEAF)), RuntimeError, "outside of torch.no_grad"),
    "r1-gamma": (lambda: ik.r1_penalty(NET(LEAF), LEAF, gamma="1"), TypeError, "gamma.*number.*str"),
    "r1-images": (lambda: ik.r1_penalty(NET(LEAF), 1.0), TypeError, "real_images.*Tensor.*float"),
    "r1-scalar": (lambda: ik.r1_penalty(X0, X0), ValueError, r"real_images.*\(N, ...\)"),
    "r1-transform": (
        lambda: torch.func.grad(lambda x: ik.r1_penalty(NET(x), x))(REAL), RuntimeError, "r1_penalty.*torch.func"
    ),
    "no-grad": (
        lambda: no_grad(lambda: ik.gradient_penalty(NET, REAL, REAL)), RuntimeError, "gradient_penalty.*torch.no_grad"
    ),
    "transform": (
        lambda: torch.vmap(lambda x: ik.gradient_penalty(NET, x, x))(REAL[None]), RuntimeError, "torch.func"
    ),
    "callable": (lambda: ik.gradient_penalty(REAL, REAL, REAL), TypeError, "discriminator.*callable.*Tensor"),
    "output": (lambda: ik.gradient_penalty(lambda x: None, REAL, REAL), TypeError, "output.*Tensor.*NoneType"),
    "unused": (lambda: ik.gradient_penalty(lambda x: LEAF, REAL, REAL), ValueError, "output does not depend on"),
    "shapes": (lambda: ik.gradient_penalty(NET, REAL, REAL[:1]), ValueError, r"fake.*\(1, 2, 6, 6\).*real"),
    "rank": (lambda: ik.gradient_penalty(NET, REAL[0], REAL), ValueError, r"real.*\(N, C, H, W\)"),
    "device": (lambda: ik.gradient_penalty(NET, REAL, REAL.to("meta")), ValueError, "fake.*meta.*real.*cpu"),
    "mask": (lambda: ik.gradient_penalty(NET, REAL, REAL, mask=REAL[:, 0]), ValueError, "mask.*real"),
    "norm": (lambda: ik.gradient_penalty(NET, REAL, REAL, norm="l2"), ValueError, "norm.*'l2'.*'pixel'"),
    "weight": (lambda: ik.gradient_penalty(NET, REAL, REAL, weight=float("inf")), ValueError, "weight.*finite"),
    "alpha": (lambda: ik.gradient_penalty(NET, REAL, REAL, alpha=1.5), ValueError, "alpha.*0 and 1.*1.5"),
    "alpha-shape": (
        lambda: ik.gradient_penalty(NET, REAL, REAL, alpha=torch.ones(3)), ValueError, r"alpha.*\(3, 1, 1, 1\)"
    ),
    "alpha-dtype": (
        lambda: ik.gradient_penalty(NET, REAL, REAL, alpha=torch.ones(3, 1, 1, 1).int()), TypeError, "alpha.*int32"
    ),
}  # fmt: skip
X0 = torch.tensor(1.0, requires_grad=True)


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
