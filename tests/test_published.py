"""examples/published.py against figures that the released training codes computed (tests/parity/README.md)."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import INTERPRETING, generator
from parity_cases import Parity, load
from torch import Tensor, nn

from inpaint_kernels import features

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import published

pytestmark = pytest.mark.skipif(INTERPRETING, reason="no kernel runs here")

WEIGHTED = {
    "CTN": {"l1": 1, "perceptual": 1, "style": 1, "adversarial": 0.1},
    "T-former": {"l1": 1, "perceptual": 1, "style": 250, "adversarial": 0.1},
}


def assert_value(got: Tensor, want: Tensor) -> None:
    """Figures are stored in float64."""
    torch.testing.assert_close(got.detach(), want, rtol=1e-10, atol=0)


def assert_gradient(got: Tensor, want: Tensor, floor: float = 0.0) -> None:
    """For what is stored in float32: each element is rounded by at most 6e-8 of itself."""
    assert got.shape == want.shape
    assert float((got.detach() - want).norm()) <= 1e-6 * float(want.norm()) + floor


def gradient(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(value, leaf, retain_graph=True)[0]


def assert_critic_gradients(loss: Tensor, critic: nn.Module, want: Mapping[str, Tensor]) -> None:
    names = [name for name, _ in critic.named_parameters()]
    assert set(names) == set(want)
    # A bias before a batch normalisation has the gradient 0, and both sides have their rounding of it.
    floor = 1e-14 * max(float(value.norm()) for value in want.values())
    found = torch.autograd.grad(loss, list(critic.parameters()))
    for name, got in zip(names, found, strict=True):
        assert_gradient(got, want[name], floor)


@pytest.fixture
def float32_constants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some extractors hold mean and deviation in float32, which was widened when they computed in float64."""
    rounded = [torch.tensor(values, dtype=torch.float32).tolist() for values in published.IMAGENET]
    monkeypatch.setattr(published, "IMAGENET", tuple(map(tuple, rounded)))


# -- CTN, T-former -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["binary", "fractional"])
@pytest.mark.parametrize("name", ["CTN", "T-former"])
def test_ctn_and_t_former(name: str, kind: str) -> None:
    case = load(name)
    formula = {"CTN": published.ctn, "T-former": published.t_former}[name]
    pred = case.pred
    fake = case.critic(pred).logits
    terms = formula(case.maps, pred, case.target, case.masks[kind], fake=fake)
    want = case.under(f"{kind}.")
    for term, weight in WEIGHTED[name].items():
        assert_value(weight * terms[term], want[term])
    assert_value(terms["total"], want["total"])
    assert_gradient(gradient(terms["total"], pred), want["grad_total"])
    assert_gradient(gradient(terms["style"], pred), want["grad_style_unweighted"])
    assert_gradient(gradient(terms["perceptual"], pred), case.numbers["grad_perceptual"])


@pytest.mark.parametrize("name", ["CTN", "T-former"])
def test_discriminator_of_ctn_and_t_former(name: str) -> None:
    case = load(name)
    loss = {"CTN": published.ctn_discriminator, "T-former": published.t_former_discriminator}[name]
    terms = loss(*(case.critic(images.detach()).logits for images in (case.target, case.pred)))
    assert_value(terms["total"], case.numbers["loss_D"])
    assert_value((terms["real"] + terms["fake"]) / 2, case.numbers["loss_D"])
    assert_critic_gradients(terms["total"], case.critic, case.under("grad_D."))


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


# -- MAT ---------------------------------------------------------------------------------------


def mat_inputs(case: Parity, *images: Tensor) -> tuple[Tensor, ...]:
    return tuple(published.mat_critic_input(image, case.masks["binary"]) for image in images)


@pytest.mark.usefixtures("float32_constants")
def test_mat() -> None:
    case = load("MAT")
    numbers, mask = case.numbers, case.masks["binary"]
    pred, stage1, target = case.pred, case.images("raw_stage1").requires_grad_(), case.target
    composites = [published.composite(raw, target, mask) for raw in (pred, stage1)]
    fake = case.critic(mat_inputs(case, *composites))
    for logits, key in zip(fake, ("fake_logits", "fake_logits_stage1"), strict=True):
        assert_value(logits, numbers[key])
    terms = published.mat(case.maps, pred, target, mask, fake=fake)
    assert_value(terms["adversarial"], numbers["G_adv"])
    assert_value(terms["adversarial_stage1"], numbers["G_adv_stage1"])
    assert_value(terms["perceptual"], numbers["G_perceptual"])
    assert_value(terms["total"], numbers["G_total"])
    assert_value(F.l1_loss(composites[0], target), numbers["G_l1_logged"])
    assert_gradient(gradient(terms["total"], pred), numbers["grad_raw"])
    assert_gradient(gradient(terms["total"], stage1), numbers["grad_raw_stage1"])
    assert_gradient(gradient(terms["perceptual"], pred), numbers["grad_perceptual_unweighted"])


def test_discriminator_of_mat() -> None:
    case = load("MAT")
    numbers, mask, target = case.numbers, case.masks["binary"], case.target
    composites = [published.composite(case.images(key), target, mask) for key in ("raw", "raw_stage1")]
    fake = case.critic(mat_inputs(case, *composites))
    real = case.critic(mat_inputs(case, target, target))
    terms = published.mat_discriminator(real, fake)
    assert_value(terms["total"], numbers["D_loss"] + numbers["D_loss_stage1"])
    assert_value(terms["real"] + terms["fake"], terms["total"].detach())
    assert_critic_gradients(terms["total"], case.critic, case.under("Dmain.grad."))


def test_r1_of_mat() -> None:
    case = load("MAT")
    images = case.target.requires_grad_(), case.target.requires_grad_()
    real = case.critic(mat_inputs(case, *images))
    for i, key in enumerate(("r1_penalty", "r1_penalty_stage1")):
        assert_value(published.squared_gradient_norm(real[i], images[i]), case.numbers[key])
    penalty = published.mat_r1(real, images)
    assert_value(penalty, case.numbers["r1_loss_before_gain"])
    assert_critic_gradients(16 * penalty, case.critic, case.under("Dreg.grad."))


# -- TransCNN-HAE ------------------------------------------------------------------------------


def test_transcnn_hae() -> None:
    case = load("TransCNN-HAE")
    numbers, pred = case.numbers, case.pred
    terms = published.transcnn_hae(case.maps, pred, case.target)
    for term, weight in (("l1", 2), ("perceptual", 1), ("style", 250), ("total", 1)):
        assert_value(weight * terms[term], numbers[term])
    assert_gradient(gradient(terms["total"], pred), numbers["grad_total"])
    assert_gradient(gradient(terms["perceptual"], pred), numbers["grad_perceptual"])
    assert_gradient(gradient(terms["style"], pred), numbers["grad_style_unweighted"])


# -- CoordFill ---------------------------------------------------------------------------------


def test_coordfill() -> None:
    case = load("CoordFill")
    numbers, mask, pred, target = case.numbers, case.masks["binary"], case.pred, case.target
    composite = published.composite(pred, target, mask)
    fake, real = case.critic(composite), case.critic(target)
    terms = published.coordfill(
        case.maps,
        pred,
        target,
        mask,
        heads=case.heads,
        fake=fake.logits,
        fake_features=fake.features,
        real_features=real.features,
    )
    for term, weight in (("lpips", 10), ("adversarial", 1), ("feature_matching", 100), ("total", 1)):
        assert_value(weight * terms[term], numbers[term])
    assert_gradient(gradient(terms["total"], pred), numbers["grad_raw"])
    assert_gradient(gradient(terms["lpips"], pred), numbers["grad_lpips_unweighted"])
    layers = published.lpips(case.maps, composite, target, case.heads)
    assert_value(layers, numbers["lpips_layers"])
    assert_value(layers.sum(0), numbers["lpips_per_sample"])


def test_zero_vectors_in_lpips() -> None:
    zero = torch.zeros(1, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    found = gradient(published.unit_vectors(zero).sum(), zero)
    assert torch.equal(
        found.flatten().isnan(), load("CoordFill").numbers["normalize_zero_vector_grad"].isnan()
    )


def test_discriminator_of_coordfill() -> None:
    case = load("CoordFill")
    composite = published.composite(case.pred.detach(), case.target, case.masks["binary"])
    terms = published.coordfill_discriminator(*(case.critic(i).logits for i in (case.target, composite)))
    for term, key in (("total", "loss_D"), ("real", "loss_D_real"), ("fake", "loss_D_fake")):
        assert_value(terms[term], case.numbers[key])


# -- LaMa --------------------------------------------------------------------------------------


def lama(case: Parity, pred: Tensor, **options: Any) -> published.Terms:
    fake, real = case.critic(pred), case.critic(case.target)
    assert_gradient(fake.logits, case.numbers["fake_logits"])
    assert_gradient(real.logits, case.numbers["real_logits_G_phase"])
    return published.lama(
        case.maps,
        pred,
        case.target,
        case.masks["binary"],
        fake=fake.logits,
        fake_features=fake.features,
        real_features=real.features,
        **options,
    )


@pytest.mark.usefixtures("float32_constants")
def test_lama() -> None:
    case = load("LaMa")
    pred = case.pred
    terms = lama(case, pred)
    for term, key, weight in (
        ("l1", "l1", 1),
        ("adversarial", "adversarial", 10),
        ("feature_matching", "feature_matching", 100),
        ("perceptual", "resnet_pl", 30),
        ("total", "total", 1),
    ):
        assert_value(weight * terms[term], case.numbers[f"G_{key}"])
    assert_gradient(gradient(terms["total"], pred), case.numbers["grad_total"])


def test_switches_of_lama() -> None:
    case = load("LaMa")
    pred, mask = case.pred, case.masks["binary"]
    terms = lama(
        case,
        pred,
        hole_weight=2.5,
        perceptual_weight=0,
        extra_hole_weight=3,
        resize="maxpool",
        mask_features=True,
    )
    assert "perceptual" not in terms
    vgg = published.lama_vgg_perceptual(
        lambda images, layers: case.maps(images, layers, "vgg19", average_pooling=True),
        pred,
        case.target,
        mask,
    )
    for value, key in (
        (terms["l1"], "l1"),
        (10 * terms["adversarial"], "adversarial"),
        (100 * terms["feature_matching"], "feature_matching"),
        (0.03 * vgg, "vgg"),
        (terms["total"] + 0.03 * vgg, "total"),
    ):
        assert_value(value, case.numbers[f"opt_G_{key}"])
    assert_gradient(gradient(terms["total"] + 0.03 * vgg, pred), case.numbers["opt_grad_total"])


def test_hole_alone_in_lamas_generator() -> None:
    case = load("LaMa")
    logits = case.critic(case.pred.detach()).logits
    loss = published.lama_generator(logits, case.masks["binary"], hole_only=True)
    assert_value(loss, case.numbers["masked_only_G"])
    assert_gradient(gradient(loss, logits), case.numbers["masked_only_G_grad_logits"])


def test_discriminator_of_lama() -> None:
    case = load("LaMa")
    mask, images = case.masks["binary"], case.target.requires_grad_()
    real, fake = case.critic(images).logits, case.critic(case.pred.detach()).logits
    penalty = published.lama_r1(real, images)
    assert_value(penalty, case.numbers["D_r1"])
    loss = published.lama_discriminator(real, fake, mask)["total"] + penalty
    assert_value(loss, case.numbers["D_total"])
    pooled = published.lama_discriminator(real, fake, mask, resize="maxpool")["total"] + penalty
    assert_value(pooled, case.numbers["opt_D_total"])
    assert_critic_gradients(loss, case.critic, case.under("D_grad."))


# -- EdgeConnect -------------------------------------------------------------------------------


def test_inpainting_stage_of_edge_connect() -> None:
    case = load("EdgeConnect")
    pred, want = case.pred, case.under("inpaint.")
    fake = case.critic(pred).logits
    terms = published.edge_connect_inpaint(case.maps, pred, case.target, case.masks["binary"], fake=fake)
    for term, key, weight in (
        ("l1", "l_l1", 1),
        ("perceptual", "l_per", 0.1),
        ("style", "l_sty", 250),
        ("adversarial", "l_g2", 0.1),
        ("total", "total", 1),
    ):
        assert_value(weight * terms[term], want[key])
    assert_gradient(gradient(terms["total"], pred), want["grad_total"])
    critics = published.edge_connect_discriminator(case.critic(case.target).logits, fake)
    for key in ("l_d2", "D"):
        assert_value(critics["total"], want[key])


def test_edge_stage_of_edge_connect() -> None:
    case = load("EdgeConnect")
    want, gray = case.under("edge."), case.images("edge.gray")
    edges = case.images("edge.fake").requires_grad_()
    found = [case.edge_critic(torch.cat([gray, image], 1)) for image in (edges, case.images("edge.real"))]
    fake, real = ([*output.features, output.logits] for output in found)
    terms = published.edge_connect_edge(fake, real)
    for term, key, weight in (
        ("adversarial", "l_g1", 1),
        ("feature_matching", "l_fm", 10),
        ("total", "total", 1),
    ):
        assert_value(weight * terms[term], want[key])
    assert_gradient(gradient(terms["total"], edges), want["grad_total"])
    critics = published.edge_connect_discriminator(real[-1], fake[-1])
    for key in ("l_d1", "D"):
        assert_value(critics["total"], want[key])


# -- AOT-GAN -----------------------------------------------------------------------------------


def test_aot_gan() -> None:
    case = load("AOT-GAN")
    pred, mask, numbers = case.pred, case.masks["binary"], case.numbers
    fake = case.critic(published.composite(pred, case.target, 1 - mask)).logits
    terms = published.aot_gan(case.maps, pred, case.target, mask, fake=fake)
    for term, key, weight in (
        ("l1", "L1", 1),
        ("perceptual", "Perceptual", 0.1),
        ("style", "Style", 250),
        ("adversarial", "advg", 0.01),
        ("total", "total", 1),
    ):
        assert_value(weight * terms[term], numbers[key])
    assert_gradient(gradient(terms["total"], pred), numbers["grad_total"])


def test_discriminator_of_aot_gan() -> None:
    case = load("AOT-GAN")
    mask, numbers = case.masks["binary"], case.numbers
    composite = published.composite(case.pred.detach(), case.target, 1 - mask)
    real, fake = case.critic(case.target).logits, case.critic(composite).logits
    loss = published.aot_gan_discriminator(real, fake, mask)["total"]
    assert_value(loss, numbers["D_loss"])
    assert_critic_gradients(loss, case.critic, case.under("grad_D_alone."))
    assert_gradient(published.gaussian_blur(mask), numbers["label_fake"])


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
