"""Every objective against what its method computes: every term, the total, gradients, and the discriminator's side.

FIGURES are of the released training codes (tests/parity). FORMULAS are those of examples/published and, for the
code bases of partial convolution, of partial_conv_formulas.py: for methods without figures, which test_published.py
checks by hand, and for masks with fractions.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import partial_conv_formulas
import pytest
import torch
from harness import DTYPES, Backend, backends_under_test
from objective_table import MASKS, Inputs, inputs, objective
from parity_cases import FIGURES, VGG, Parity, load
from torch import Tensor, nn

from inpaint_kernels.features import trunk as trunks
from inpaint_kernels.objectives import DiscriminatorOutput

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import published

# The formulas in float64, kernels in every dtype they take.
PRECISIONS = [
    pytest.param(backend, DTYPES[dtype], id=f"{backend}-{dtype}")
    for backend in backends_under_test()
    for dtype in {"reference": ("f64",), "cpu": ("f64", "f32")}.get(backend.name, ("f32",))
]
precisions = pytest.mark.parametrize(("where", "dtype"), PRECISIONS)


def weighted(values: Mapping[str, Tensor], expression: str) -> Any:
    """The value of an expression such as "10 valid + 2.5 hole"."""
    total: Any = 0
    for part in expression.split(" + "):
        *factor, name = part.split(" ")
        total = total + float(factor[0] if factor else 1) * values[name]
    return total


def sides(equations: str) -> list[list[str]]:
    """Of equations such as "l1 = 2 l1; total = total"."""
    return [equation.split(" = ") for equation in equations.split("; ")]


def assert_value(got: Tensor, want: Tensor, what: str, floor: float = 0.0) -> None:
    tolerance = 1e-10 if got.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(
        got.detach().cpu().double(), want.detach(), rtol=tolerance, atol=floor, msg=lambda m: f"{what}: {m}"
    )


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.detach().cpu().double() - want.detach()).norm())


def assert_gradient(
    got: Tensor, want: Tensor, what: str, floor: float = 0.0, tolerance: float | None = None
) -> None:
    """Figures of gradients are stored in float32."""
    tolerance = tolerance or (1e-6 if got.dtype == torch.float64 else 1e-4)
    error = distance(got, want)
    assert error <= tolerance * float(want.norm()) + floor, f"{what}: {error:.3g}"


def assert_terms(terms: Any, figures: Mapping[str, Tensor], equations: str) -> None:
    for figure, term in sides(equations):
        assert_value(weighted(terms._asdict(), term), weighted(figures, figure), figure)


def assert_critic_gradients(
    loss: Tensor, critic: nn.Module, want: Mapping[str, Tensor], size: float = 0.0
) -> None:
    """`size`: of gradients that cancel in the loss, which leave their rounding, as those of a bias do."""
    names = [name for name, _ in critic.named_parameters()]
    assert set(names) == set(want)
    found = torch.autograd.grad(loss, list(critic.parameters()))
    size = max(size, *(float(gradient.norm()) for gradient in want.values()))
    floor = (1e-14 if loss.dtype == torch.float64 else 1e-6) * size
    for name, got in zip(names, found, strict=True):
        assert_gradient(got, want[name], name, floor)


@pytest.fixture(autouse=True)
def _exact_convolutions() -> Any:
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


# ---- figures of the released codes -------------------------------------------------------------------------------


class Critic(nn.Module):
    """That of a file, as the objectives want it."""

    def __init__(self, critic: nn.Module, name: str) -> None:
        super().__init__()
        self.critic, self.name = critic, name

    def forward(self, images: Any) -> DiscriminatorOutput:
        if self.name == "MAT":  # a pair, the final image first
            logits = self.critic(images[::-1] if isinstance(images, list) else [images, images])
            return DiscriminatorOutput(list(logits)[::-1], [])
        output = self.critic(images)
        matched = [*output.features, output.logits] if self.name == "EdgeConnect-edge" else output.features
        return DiscriminatorOutput(output.logits, matched)


def of_file(name: str, where: Backend, dtype: torch.dtype) -> tuple[Any, Inputs, Parity]:
    """(objective, its inputs, the file)."""
    figures = FIGURES[name]
    case = load(figures.file, dtype)
    options: dict[str, Any] = {"backend": where.name, **figures.settings}
    if "perceptual_layers" in options:
        trunk = options["trunk"] = case.trunk(VGG, "vgg19")
        for place, child in trunk.features.named_children():
            if isinstance(child, nn.MaxPool2d):
                setattr(trunk.features, place, nn.AvgPool2d(2, 2))
    loss = objective(figures.method, dtype, **options).to(where.device)
    edge = name == "EdgeConnect-edge"
    leaves = [case.images("edge.fake") if edge else case.pred]
    if name == "MAT":
        leaves.insert(0, case.images("raw_stage1"))
    target = case.images("edge.real") if edge else case.target
    mask = case.masks.get(figures.mask, torch.ones_like(target[:, :1]))
    x = Inputs(leaves, target, mask, condition=case.images("edge.gray") if edge else None)
    if name != "TransCNN-HAE":
        x.critic = Critic(case.edge_critic if edge else case.critic, name)
    return loss, x.to(where.device), case


@pytest.fixture
def _constants(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What released codes hold in float32, and widened for figures in float64."""
    name = request.node.callspec.params["name"]
    # The kernel that blurs labels is rounded after its two lines, which ours is made of, are multiplied.
    monkeypatch.setattr(published.torch, "outer", lambda a, b: a.double()[:, None] * b.double())
    if name not in ("MAT", "LaMa"):
        return
    mean, std = (torch.tensor(values, dtype=torch.float32).double() for values in trunks._IMAGENET)
    of_tanh = ((2 * mean - 1).tolist(), (2 * std).tolist())
    for key, values in (("imagenet", (mean.tolist(), std.tolist())), ("imagenet_tanh", of_tanh)):
        monkeypatch.setitem(trunks._PREPROCESS, key, values)


@pytest.mark.usefixtures("_constants")
@precisions
@pytest.mark.parametrize("name", FIGURES)
def test_figures(name: str, where: Backend, dtype: torch.dtype) -> None:
    loss, x, case = of_file(name, where, dtype)
    figures = FIGURES[name]
    want = case.numbers | case.under(figures.prefix)
    terms = x.terms(loss)
    assert_terms(terms, want, figures.terms)
    want["zero"] = torch.zeros_like(x.target, dtype=torch.float64, device="cpu")
    for keys, term in sides(figures.gradients):
        truth = torch.cat([want[key] for key in keys.split(" | ")])  # of every stage
        assert_gradient(x.gradient(getattr(terms, term)), truth, keys)


@precisions
@pytest.mark.parametrize("name", [name for name, figures in FIGURES.items() if figures.discriminator])
def test_figures_of_discriminators(name: str, where: Backend, dtype: torch.dtype) -> None:
    loss, x, case = of_file(name, where, dtype)
    terms = x.discriminator_loss(loss)
    assert_terms(terms, case.numbers, FIGURES[name].discriminator)
    if FIGURES[name].critic_gradients:
        assert_critic_gradients(terms.total, x.critic.critic, case.under(FIGURES[name].critic_gradients))


@precisions
@pytest.mark.parametrize("name", ["MAT", "LaMa", "LaMa-ablation"])
def test_figures_of_penalties(name: str, where: Backend, dtype: torch.dtype) -> None:
    """MAT's are of a step of its own, LaMa's are of the discriminator's loss with the penalty."""
    loss, x, case = of_file(name, where, dtype)
    x.target.requires_grad_()
    penalty = loss.discriminator_penalty(x.judged(loss, x.target), x.target)
    if name == "MAT":
        assert_value(penalty, case.numbers["r1_loss_before_gain"], "r1_loss_before_gain")
        interval = loss.settings.penalty_interval
        assert_critic_gradients(interval * penalty, x.critic.critic, case.under("Dreg.grad."))
        return
    assert_value(penalty, case.numbers["D_r1"], "D_r1")
    total = x.discriminator_loss(loss).total + penalty
    assert_value(total, case.under(FIGURES[name].prefix)["D_total"], "D_total")
    if name == "LaMa":
        assert_critic_gradients(total, x.critic.critic, case.under("D_grad."))


def test_zero_vectors_in_lpips() -> None:
    """Of which the released code's gradient is NaN."""
    loss = objective("CoordFill", torch.float64)
    lpips = loss._terms["lpips"]
    maps = [torch.zeros(1, len(head), 1, 1, dtype=torch.float64) for head in lpips.heads.values]
    leaves = [m.clone().requires_grad_() for m in maps]
    found = lpips.distance(leaves, [m + 1 for m in maps], None, None)
    first = torch.autograd.grad(found, leaves, create_graph=True)
    assert found > 0 and not any(map(torch.any, first))
    second = torch.autograd.grad(
        sum(g.sum() for g in first), leaves, allow_unused=True, materialize_grads=True
    )
    assert not any(map(torch.any, second))


# ---- formulas ----------------------------------------------------------------------------------------------------


def maps(images: Tensor, layers: Any) -> list[Tensor]:
    """Of the trunks of `objective_table`."""
    net = "stages" if layers[0] == "layer1" else "vgg16" if {"relu3_3", "pool1"} & {*layers} else "vgg19"
    return load("CTN", images.dtype).maps(images, layers, net)


@dataclass(frozen=True)
class Formulas:
    """`terms`: equations of the formula's terms with those of the objective.

    `fake` and `real` are what the discriminator says of the prediction and of the truth, its formula takes logits.
    """

    terms: str
    generator: Callable[[Inputs, Any, Any], Mapping[str, Tensor]]  # of (inputs, fake, real)
    discriminator: Callable[..., Mapping[str, Tensor]] | None = None  # of (real, fake, mask)


def same(names: str) -> str:
    return "; ".join(f"{name} = {name}" for name in names.split())


def without_mask(formula: Callable[..., Mapping[str, Tensor]]) -> Callable[..., Mapping[str, Tensor]]:
    return lambda real, fake, mask: formula(real, fake)


def of_partial_conv(formula: Callable[..., Mapping[str, Tensor]]) -> Formulas:
    terms = same("total hole valid tv perceptual style")
    return Formulas(terms, lambda x, fake, real: formula(maps, x.pred, x.target, x.mask))


def of_images(formula: Callable[..., Mapping[str, Tensor]], **options: Any) -> Any:
    """A generator's formula whose discriminator returns logits alone."""
    return lambda x, fake, real: formula(maps, x.pred, x.target, x.mask, fake=fake.logits, **options)


def of_stages(formula: Callable[..., Mapping[str, Tensor]]) -> Any:
    return lambda x, fake, real: formula(x.pred, x.target, x.mask, fake=fake.logits)


def lama(x: Inputs, fake: Any, real: Any) -> Mapping[str, Tensor]:
    features = {"fake_features": fake.features, "real_features": real.features}
    return of_images(published.lama, **features, valid_weight=0.0, perceptual_weight=30 / 4)(x, fake, real)


STAGES = "total = total; adversarial = adversarial; "
STAGES += "hole_stage1 + hole_stage2 = hole; valid_stage1 + valid_stage2 = valid"
FORMULAS = {
    "pconv-paper": of_partial_conv(published.partial_conv),
    "pconv-nvidia": of_partial_conv(partial_conv_formulas.nvidia),
    "pconv-naoto0804": of_partial_conv(partial_conv_formulas.naoto0804),
    "pconv-mmagic": of_partial_conv(partial_conv_formulas.mmagic),
    "CMT": Formulas(
        same("total adversarial hole valid perceptual"),
        lambda x, fake, real: published.cmt(maps, x.pred, x.target, 1 - x.mask, fake=fake.logits),
        without_mask(published.cmt_discriminator),
    ),
    "LaMa-paper": Formulas(
        same("total adversarial feature_matching") + "; perceptual = 4 perceptual; l1 = hole + valid",
        lama,
        published.lama_discriminator,
    ),
    "EdgeConnect-edge": Formulas(
        same("total adversarial feature_matching"),
        lambda x, fake, real: published.edge_connect_edge(fake.features, real.features),
        without_mask(published.edge_connect_discriminator),
    ),
    "EdgeConnect-inpaint": Formulas(
        same("total adversarial l1 perceptual style"),
        of_images(published.edge_connect_inpaint),
        without_mask(published.edge_connect_discriminator),
    ),
    "AOT-GAN-paper": Formulas(
        same("total adversarial l1 perceptual style"),
        of_images(published.aot_gan, labels="paper"),
        functools.partial(published.aot_gan_discriminator, labels="paper"),
    ),
    "DeepFill-v1": Formulas(
        STAGES, of_stages(published.deepfill_v1), without_mask(published.deepfill_v1_discriminator)
    ),
    "DeepFill-v2": Formulas(
        STAGES, of_stages(published.deepfill_v2), without_mask(published.deepfill_v2_discriminator)
    ),
}


def of_formula(name: str, dtype: torch.dtype, where: Backend, mask: str) -> tuple[Any, Inputs]:
    loss = objective(name, dtype, backend=where.name).to(where.device)
    x = inputs(name, dtype=dtype, mask=mask)
    if name == "EdgeConnect-edge":
        x.critic = Critic(x.critic, name)
    return loss, x.to(where.device)


@functools.cache
def computed(name: str, mask: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Values and gradients of the generator's terms, by the formula."""
    loss, x = of_formula(name, dtype, Backend("reference", "cpu"), mask)
    judged = x.outputs(loss)
    terms = FORMULAS[name].generator(x, judged.get("fake"), judged.get("real"))
    values = {key: weighted(terms, key) for key, _ in sides(FORMULAS[name].terms)}
    gradients = {key: x.gradient(value) for key, value in values.items()}
    return {key: value.detach() for key, value in values.items()}, gradients


CASES = [(name, mask) for name in FORMULAS for mask in (MASKS if "pconv" in name else ("fractional",))]


@pytest.mark.usefixtures("_constants")
@precisions
@pytest.mark.parametrize(("name", "mask"), CASES)
def test_formulas(name: str, mask: str, where: Backend, dtype: torch.dtype) -> None:
    """Off by at most twice the error of the formula in the same type, and a floor.

    What a discriminator is shown is in test_objectives.py.
    """
    loss, x = of_formula(name, dtype, where, mask)
    terms = x.terms(loss)._asdict()
    truth, gradients = computed(name, mask, torch.float64)
    plain, plain_gradients = computed(name, mask, dtype)
    for key, expression in sides(FORMULAS[name].terms):
        value = weighted(terms, expression)
        assert_value(value, truth[key], key, floor=2 * distance(plain[key], truth[key]))
        floor = 2 * distance(plain_gradients[key], gradients[key])
        # Over many layers roundings add up, and a sign that they turn is one in 10^5.
        tolerance = 100 * torch.finfo(dtype).eps
        assert_gradient(x.gradient(value), gradients[key], key, floor, tolerance)


@pytest.mark.usefixtures("_constants")
@precisions
@pytest.mark.parametrize("name", [name for name, formulas in FORMULAS.items() if formulas.discriminator])
def test_formulas_of_discriminators(name: str, where: Backend, dtype: torch.dtype) -> None:
    (loss, x), (exact_loss, exact) = (
        of_formula(name, *each, "fractional")
        for each in ((dtype, where), (torch.float64, Backend("reference", "cpu")))
    )
    terms = x.discriminator_loss(loss)
    judged = exact.changed(leaves=[leaf.detach() for leaf in exact.leaves]).outputs(exact_loss)
    want = FORMULAS[name].discriminator(judged["real"].logits, judged["fake"].logits, exact.mask)
    assert_terms(terms, want, same(" ".join(terms._fields)))
    names, parameters = zip(*exact.critic.named_parameters(), strict=True)
    truth, of_fake = (
        torch.autograd.grad(want[part], parameters, retain_graph=True) for part in ("total", "fake")
    )
    size = max(float(gradient.norm()) for gradient in of_fake)
    assert_critic_gradients(terms.total, x.critic, dict(zip(names, truth, strict=True)), size)


@precisions
@pytest.mark.parametrize("local", [False, True])
def test_gradient_penalty_of_deepfill(local: bool, where: Backend, dtype: torch.dtype) -> None:
    """Of the global critic, weighed with the hole, and of the local one."""

    def of(call: Any, x: Inputs) -> tuple[Tensor, tuple[Tensor, ...]]:
        critic, mask = x.critic.heads[int(local)], None if local else x.mask
        alpha = torch.linspace(0.2, 0.8, len(x.target)).to(x.target).view(-1, 1, 1, 1)
        penalty = call(lambda image: critic(image).logits, x.target, x.leaves[-1], mask, alpha=alpha)
        # The bias of the last layer has no part in it.
        return penalty, torch.autograd.grad(penalty, list(critic.parameters())[:-1])

    x = inputs("DeepFill-v1", dtype=dtype).to(where.device)
    got, gradients = of(objective("DeepFill-v1").gradient_penalty, x)
    want, truths = of(published.deepfill_v1_penalty, inputs("DeepFill-v1", dtype=torch.float64))
    assert_value(got, want, "penalty")
    for gradient, truth in zip(gradients, truths, strict=True):
        assert_gradient(gradient, truth, "gradient of the penalty")
