"""examples/published where no objective of the package stands beside it, and methods without figures by hand.

For the others test_examples_methods.py and test_objective_parity.py compare it, term by term, with the package's
objectives, which test_objective_parity.py checks against the figures of the released training codes.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from harness import INTERPRETING, generator
from parity_cases import load
from torch import Tensor

from inpaint_kernels import features

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import published

pytestmark = pytest.mark.skipif(INTERPRETING, reason="no kernel runs here")


def assert_value(got: Tensor, want: Tensor) -> None:
    """Figures are stored in float64."""
    torch.testing.assert_close(got.detach(), want, rtol=1e-10, atol=0)


def assert_gradient(got: Tensor, want: Tensor, floor: float = 0.0) -> None:
    """For what is stored in float32: each element is rounded by at most 6e-8 of itself."""
    assert got.shape == want.shape
    assert float((got.detach() - want).norm()) <= 1e-6 * float(want.norm()) + floor


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf, retain_graph=True)[0]


def test_log_loss_in_float32() -> None:
    """The clamps of PyTorch are part of it: 100 at most, and a gradient that dies long before the value does.

    Near its ends a sigmoid is known to one rounding only, which the logarithm magnifies.
    """
    numbers = load("CTN").numbers
    logits = numbers["logloss_float32.logits"].float()
    for label, key in ((1.0, "real"), (0.0, "fake")):
        want = numbers[f"logloss_float32.{key}"]
        for logit, (value, slope) in zip(logits, want, strict=True):
            leaf = logit.clone().requires_grad_()
            got = published.log_loss(leaf, label)
            p = torch.sigmoid(logit.double())
            away = p if label else 1 - p
            rounding = 1.2e-7 * max(1.0, float(p / away.clamp(min=6e-8)))
            assert abs(float(got.detach() - value)) <= rounding * max(1.0, float(value))
            assert abs(float(gradient(got, leaf) - slope)) <= rounding * max(abs(float(slope)), 1e-7)


# -- LaMa --------------------------------------------------------------------------------------


def test_switches_of_lama() -> None:
    case = load("LaMa")
    pred, mask = case.pred, case.masks["binary"]
    fake, real = case.critic(pred), case.critic(case.target)
    assert_gradient(fake.logits, case.numbers["fake_logits"])
    assert_gradient(real.logits, case.numbers["real_logits_G_phase"])
    terms = published.lama(
        case.maps,
        pred,
        case.target,
        mask,
        fake=fake.logits,
        fake_features=fake.features,
        real_features=real.features,
        hole_weight=2.5,
        perceptual_weight=0,
        extra_hole_weight=3,
        resize="maxpool",
        mask_features=True,
    )
    assert "perceptual" not in terms
    trunk = functools.partial(case.maps, net="vgg19", average_pooling=True)
    terms["vgg"] = published.lama_vgg_perceptual(trunk, pred, case.target, mask)
    terms["total"] = terms["total"] + 0.03 * terms["vgg"]
    for key, weight in {"l1": 1, "adversarial": 10, "feature_matching": 100, "vgg": 0.03, "total": 1}.items():
        assert_value(weight * terms[key], case.numbers[f"opt_G_{key}"])
    assert_gradient(gradient(terms["total"], pred), case.numbers["opt_grad_total"])


def test_hole_alone_in_lamas_generator() -> None:
    case = load("LaMa")
    logits = case.critic(case.pred.detach()).logits
    loss = published.lama_generator(logits, case.masks["binary"], hole_only=True)
    assert_value(loss, case.numbers["masked_only_G"])
    assert_gradient(gradient(loss, logits), case.numbers["masked_only_G_grad_logits"])


@pytest.mark.parametrize("labels", ["released", "paper"])
def test_labels_of_aot_gan(labels: str) -> None:
    """By hand, for logits of the size of the mask, so that nothing is interpolated."""
    case = load("AOT-GAN")
    mask, target = case.masks["binary"], case.target
    real, fake = torch.randn(2, *mask.shape, dtype=torch.float64, generator=generator(1)).unbind()
    found = published.aot_gan(case.maps, target, target, mask, fake=fake, labels=labels)["adversarial"]
    hole = mask == 1
    assert_value(found, ((fake - 1) ** 2)[hole].mean() if labels == "paper" else ((fake - 1) ** 2).mean())
    critic = published.aot_gan_discriminator(real, fake, mask, labels=labels)
    blurred = published.gaussian_blur(1 - mask if labels == "paper" else mask)
    assert_value(critic["real"], ((real - (1 if labels == "paper" else 0)) ** 2).mean())
    assert_value(critic["fake"], ((fake - blurred) ** 2).mean())
    assert_value(critic["total"], critic["real"] + critic["fake"])


# -- methods without figures: by hand, on constant errors ---------------------------------------


def images_and_hole() -> tuple[Tensor, Tensor]:
    target = torch.rand(2, 3, 4, 6, dtype=torch.float64, generator=generator(2))
    hole = torch.zeros(2, 1, 4, 6, dtype=torch.float64)
    hole[0, :, 1:3, 1:4] = hole[1, :, :3] = 1  # 6 and 18 of 24 pixels
    return target, hole


def test_cmt() -> None:
    target, hole = images_and_hole()
    pred = (target + 0.5 * hole + 0.25 * (1 - hole)).requires_grad_()
    asked = []

    def trunk(images: Tensor, layers: Sequence[str]) -> list[Tensor]:
        asked.append(list(layers))
        return [images, 2 * images[:, :1], 0 * images, 0 * images]

    fake = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    real = torch.tensor([[2.0], [0.7]], dtype=torch.float64)
    terms = published.cmt(trunk, pred, target, hole, fake=fake)
    share = torch.tensor(0.5, dtype=torch.float64)
    want = {
        "hole": 0.5 * share,
        "valid": 0.25 * share,
        "perceptual": (0.25 + 1) * share,  # of the composite, which is right where pixels are known
        "adversarial": torch.log(1 + torch.exp(-fake)).mean(),
    }
    for term, value in want.items():
        assert_value(terms[term], value)
    total = want["hole"] + 0.1 * want["valid"] + 10 * want["perceptual"] + 0.001 * want["adversarial"]
    assert_value(terms["total"], total)
    assert asked == [["relu1_2", "relu2_2", "relu3_3", "relu4_3"]] * 2
    critic = published.cmt_discriminator(real, fake)
    assert_value(critic["real"], torch.log(1 + torch.exp(-real)).mean())
    assert_value(critic["fake"], torch.log(1 + torch.exp(fake)).mean())
    assert_value(critic["total"], (critic["real"] + critic["fake"]) / 2)


def test_deepfill() -> None:
    target, hole = images_and_hole()
    stages = target + 0.5 * hole + 0.25 * (1 - hole), target - 2 * hole
    pixel = {"hole_stage1": 0.5, "valid_stage1": 0.25, "hole_stage2": 2.0, "valid_stage2": 0.0}
    logits = torch.tensor([[0.5], [-3.0]], dtype=torch.float64), torch.tensor([[0.25]], dtype=torch.float64)
    first = published.deepfill_v1(stages, target, hole, fake=logits)
    second = published.deepfill_v2(stages, target, hole, fake=logits[0])
    for terms, adversarial, weight in ((first, 1.25 - 0.25, 1e-4), (second, 1.25, 0.1)):
        for term, value in pixel.items():
            assert float(terms[term]) == pytest.approx(value, rel=1e-10)
        assert float(terms["adversarial"]) == adversarial
        assert float(terms["total"]) == pytest.approx(2.75 + weight * adversarial, rel=1e-10)


def test_discriminators_of_deepfill() -> None:
    real = torch.tensor([[0.5], [-3.0]], dtype=torch.float64), torch.tensor([[0.25]], dtype=torch.float64)
    fake = torch.tensor([[-0.5], [4.5]], dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64)
    terms = published.deepfill_v1_discriminator(real, fake)
    drift = 0.5 * (1.25**2 + 0.25**2 + 2**2 + 1)
    for term, value in (("real", 1.0), ("fake", 3.0), ("drift", drift), ("total", 4 + 0.001 * drift)):
        assert float(terms[term]) == pytest.approx(value, rel=1e-10)
    terms = published.deepfill_v2_discriminator(real[0], fake[0])
    for term, value in (("real", (0.5 + 4) / 2), ("fake", (0.5 + 5.5) / 2), ("total", 5.25)):
        assert float(terms[term]) == value


def test_gradient_penalty_of_deepfill() -> None:
    """Of a linear critic the gradient is known: (0, 3, 4) in each pixel. Of a square it depends on the mix."""
    target, hole = images_and_hole()
    fake = target + hole
    slope = torch.tensor([0.0, 3.0, 4.0], dtype=torch.float64).view(1, 3, 1, 1).requires_grad_()

    def critic(images: Tensor) -> Tensor:
        return (slope * images).sum((1, 2, 3))[:, None]

    local = published.deepfill_v1_penalty(critic, target, fake)
    assert float(local.detach()) == pytest.approx(10 * (5 - 1) ** 2)
    masked = published.deepfill_v1_penalty(critic, target, fake, hole)
    assert float(masked.detach()) == pytest.approx(10 * (0.5 * (5 - 1) ** 2 + 0.5) / 0.5)
    # Through the critic: d|s|/ds = s / |s|.
    assert_value(gradient(local, slope).flatten(), 10 * 2 * 4 * slope.detach().flatten() / 5)

    alpha = torch.tensor([0.25, 0.75], dtype=torch.float64).view(2, 1, 1, 1)
    found = published.deepfill_v1_penalty(lambda images: images.square() / 2, target, fake, alpha=alpha)
    mixed = alpha * target + (1 - alpha) * fake
    assert_value(found, 10 * (mixed.square().sum(1).sqrt() - 1).square().mean())


# -- the helper --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "taps"),
    [
        ("vgg16", ("pool1", "relu1_2", "relu4_3", "relu3_3", "relu5_3")),
        ("vgg19", ("conv4_4", "relu4_4", "conv5_4", "relu1_1", "pool4")),
        ("alexnet", ("relu1", "pool1", "relu2", "pool2", "relu5")),
        ("stages", ("layer1", "layer2", "layer4")),
    ],
)
def test_trunks_are_the_same_network(net: str, taps: tuple[str, ...]) -> None:
    """That of the package and the loop over layers; and the taps stand where torchvision has them."""
    case = load("CoordFill")
    images = case.target
    for got, want in zip(case.trunk(taps, net)(images), case.maps(images, taps, net), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    if net != "stages":
        full = getattr(features, net)(taps, weights=None)
        assert list(case.trunk(taps, net).taps) == list(full.taps)
