"""Every objective against what its method computes: every term, the total, gradients, and the discriminator's side.

FIGURES are of the released training codes (tests/parity). FORMULAS are those of examples/published.py: for methods
without figures, which test_published.py checks by hand, and for masks with fractions.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import DTYPES, Backend, backends_under_test
from objective_table import Inputs, inputs, objective
from parity_cases import Parity, load
from torch import Tensor, nn

from inpaint_kernels.features import trunk as trunks
from inpaint_kernels.objectives import DiscriminatorOutput

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import published
from published import composite

# The formulas in float64, kernels in every dtype they take.
PRECISIONS = [
    pytest.param(backend, DTYPES[dtype], id=f"{backend}-{dtype}")
    for backend in backends_under_test()
    for dtype in {"reference": ("f64",), "cpu": ("f64", "f32")}.get(backend.name, ("f32",))
]
precisions = pytest.mark.parametrize(("where", "dtype"), PRECISIONS)


def assert_value(got: Tensor, want: Tensor, what: str) -> None:
    tolerance = 1e-10 if got.dtype == torch.float64 else 1e-6
    torch.testing.assert_close(
        got.detach().cpu().double(), want.detach(), rtol=tolerance, atol=0, msg=lambda m: f"{what}: {m}"
    )


def assert_gradient(got: Tensor, want: Tensor, what: str, floor: float = 0.0) -> None:
    """Figures of gradients are stored in float32."""
    tolerance = 1e-6 if got.dtype == torch.float64 else 1e-4
    error = float((got.detach().cpu().double() - want).norm())
    assert error <= tolerance * float(want.norm()) + floor, f"{what}: {error:.3g}"


def assert_terms(found: Any, parts: Mapping[str, Mapping[str, float]], want: Mapping[str, Tensor]) -> None:
    """Each figure (several, joined by "+", are added) is so many times these terms."""
    for keys, factors in parts.items():
        got = sum(factor * getattr(found, term) for term, factor in factors.items())
        assert_value(got, sum(want[key] for key in keys.split("+")), keys)  # type: ignore[arg-type]


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

VGG = tuple(f"relu{b}_{i + 1}" for b, n in ((1, 2), (2, 2), (3, 4), (4, 4), (5, 1)) for i in range(n))
ABLATION = {
    "perceptual_layers": VGG,
    "perceptual_known_only": True,
    "perceptual_weight": 0.03,
    "hole_weight": 2.5,
    "feature_matching_known_only": True,
    "extra_hole_weight": 3,
    "mask_resize": "adaptive_max",
}


@dataclass(frozen=True)
class Figures:
    """`file` of tests/parity, keys of its figures after a `prefix`, and what of `method` they are."""

    method: str
    file: str
    terms: Mapping[str, Mapping[str, float]]
    gradients: Mapping[str, str]  # of a term by the prediction
    prefix: str = ""
    mask: str = "binary"
    settings: Mapping[str, Any] = field(default_factory=dict)
    discriminator: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # without the prefix
    critic_gradients: str = ""


def _ctn(name: str, mask: str, style: float) -> Figures:
    terms = {"l1": {"l1": 1}, "perceptual": {"perceptual": 1}, "style": {"style": style}}
    terms |= {"adversarial": {"adversarial": 0.1}, "total": {"total": 1}}
    gradients = {"grad_total": "total", "grad_style_unweighted": "style"}
    discriminator = {"loss_D": {"total": 1}, "loss_D+loss_D": {"real": 1, "fake": 1}}
    return Figures(
        name,
        name,
        terms,
        gradients,
        f"{mask}.",
        mask,
        discriminator=discriminator,
        critic_gradients="grad_D.",
    )


_LAMA = {
    "G_l1": {"valid": 10.0},
    "G_adversarial": {"adversarial": 10.0},
    "G_feature_matching": {"feature_matching": 100.0},
    "G_total": {"total": 1.0},
}
TOTAL = {"grad_total": "total"}
FIGURES = {
    "CTN-binary": _ctn("CTN", "binary", 1),
    "CTN-fractional": _ctn("CTN", "fractional", 1),
    "T-former-binary": _ctn("T-former", "binary", 250),
    "T-former-fractional": _ctn("T-former", "fractional", 250),
    "MAT": Figures(
        "MAT",
        "MAT",
        {
            "G_adv+G_adv_stage1": {"adversarial": 1},
            "G_perceptual": {"perceptual": 1},
            "G_total": {"total": 1},
        },
        {"grad_raw_stage1+grad_raw": "total", "zero+grad_perceptual_unweighted": "perceptual"},
        discriminator={"D_loss+D_loss_stage1": {"total": 1}},
        critic_gradients="Dmain.grad.",
    ),
    "TransCNN-HAE": Figures(
        "TransCNN-HAE",
        "TransCNN-HAE",
        {"l1": {"l1": 2}, "perceptual": {"perceptual": 1}, "style": {"style": 250}, "total": {"total": 1}},
        {**TOTAL, "grad_perceptual": "perceptual", "grad_style_unweighted": "style"},
    ),
    "CoordFill": Figures(
        "CoordFill",
        "CoordFill",
        {
            "lpips": {"lpips": 10},
            "adversarial": {"adversarial": 1},
            "feature_matching": {"feature_matching": 100},
            "total": {"total": 1},
        },
        {"grad_raw": "total", "grad_lpips_unweighted": "lpips"},
        discriminator={"loss_D": {"total": 1}, "loss_D_real": {"real": 1}, "loss_D_fake": {"fake": 1}},
    ),
    "LaMa": Figures("LaMa", "LaMa", {**_LAMA, "G_resnet_pl": {"perceptual": 30}}, TOTAL),
    "LaMa-ablation": Figures(
        "LaMa",
        "LaMa",
        {**_LAMA, "G_l1": {"valid": 10, "hole": 2.5}, "G_vgg": {"perceptual": 0.03}},
        TOTAL,
        "opt_",
        settings=ABLATION,
    ),
    "EdgeConnect-inpaint": Figures(
        "EdgeConnect-inpaint",
        "EdgeConnect",
        {
            "l_l1": {"l1": 1},
            "l_per": {"perceptual": 0.1},
            "l_sty": {"style": 250},
            "l_g2": {"adversarial": 0.1},
            "total": {"total": 1},
        },
        TOTAL,
        "inpaint.",
        discriminator={"inpaint.l_d2": {"total": 1}, "inpaint.D": {"total": 1}},
    ),
    "EdgeConnect-edge": Figures(
        "EdgeConnect-edge",
        "EdgeConnect",
        {"l_g1": {"adversarial": 1}, "l_fm": {"feature_matching": 10}, "total": {"total": 1}},
        TOTAL,
        "edge.",
        discriminator={"edge.l_d1": {"total": 1}, "edge.D": {"total": 1}},
    ),
    "AOT-GAN": Figures(
        "AOT-GAN-released",
        "AOT-GAN",
        {
            "L1": {"l1": 1},
            "Style": {"style": 250},
            "Perceptual": {"perceptual": 0.1},
            "advg": {"adversarial": 0.01},
            "total": {"total": 1},
        },
        TOTAL,
        discriminator={"D_loss": {"total": 1}},
        critic_gradients="grad_D_alone.",
    ),
}


class Critic(nn.Module):
    """That of a file, as the objectives want it."""

    def __init__(self, critic: nn.Module, name: str) -> None:
        super().__init__()
        self.critic, self.name = critic, name

    def forward(self, images: Any) -> DiscriminatorOutput:
        if self.name == "MAT":  # a pair, the final image first
            logits = self.critic(images[::-1] if isinstance(images, list) else [images, images])
            return DiscriminatorOutput(list(logits)[::-1], [])
        found = self.critic(images)
        matched = [*found.features, found.logits] if self.name == "EdgeConnect-edge" else found.features
        return DiscriminatorOutput(found.logits, matched)


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
    figures, want = FIGURES[name], case.under(FIGURES[name].prefix)
    terms = x.terms(loss)
    assert_terms(terms, figures.terms, want)
    want |= {"zero": torch.zeros_like(x.target, dtype=torch.float64, device="cpu")}
    for keys, term in figures.gradients.items():
        assert_gradient(
            x.gradient(getattr(terms, term)), torch.cat([want[key] for key in keys.split("+")]), keys
        )
    if "grad_perceptual" in case.numbers:
        assert_gradient(x.gradient(terms.perceptual), case.numbers["grad_perceptual"], "grad_perceptual")


@precisions
@pytest.mark.parametrize("name", [name for name, figures in FIGURES.items() if figures.discriminator])
def test_figures_of_discriminators(name: str, where: Backend, dtype: torch.dtype) -> None:
    loss, x, case = of_file(name, where, dtype)
    found = x.discriminator_loss(loss)
    assert_terms(found, FIGURES[name].discriminator, case.numbers)
    if FIGURES[name].critic_gradients:
        assert_critic_gradients(found.total, x.critic.critic, case.under(FIGURES[name].critic_gradients))


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


# ---- formulas of examples/published.py ---------------------------------------------------------------------------


def maps(images: Tensor, layers: Any) -> list[Tensor]:
    """Of the trunks of `objective_table`."""
    net = "stages" if layers[0] == "layer1" else "vgg16" if "relu3_3" in layers else "vgg19"
    return load("CTN").maps(images, layers, net)


def shown_by_deepfill(x: Inputs) -> Tensor:
    return composite(x.leaves[-1], (1 - x.mask) * x.target, 1 - x.mask)


def edges(x: Inputs) -> list[DiscriminatorOutput]:
    return [x.critic(torch.cat([x.condition, image], 1)) for image in (x.target, x.pred)]  # type: ignore[list-item]


def judged(x: Inputs, real: Tensor, fake: Tensor) -> list[Any]:
    """Logits, the generated image's without its graph."""
    return [x.critic(image).logits for image in (real, fake.detach())]


def lama(x: Inputs, **options: Any) -> Mapping[str, Tensor]:
    fake, real = x.critic(x.pred), x.critic(x.target)
    matched = {"fake_features": fake.features, "real_features": real.features}
    return published.lama(maps, x.pred, x.target, x.mask, fake=fake.logits, **matched, **options)


STAGES = {
    "hole_stage1+hole_stage2": {"hole": 1},
    "valid_stage1+valid_stage2": {"valid": 1},
    "adversarial": {"adversarial": 1},
    "total": {"total": 1},
}


def same(*names: str) -> dict[str, dict[str, float]]:
    return {name: {name: 1} for name in ("total", "adversarial", *names)}


# By method: (terms, generator, discriminator); the mask has 1 = hole but for CMT.
FORMULAS: dict[str, Any] = {
    "CMT": (
        same("hole", "valid", "perceptual"),
        lambda x: published.cmt(
            maps,
            x.pred,
            x.target,
            1 - x.mask,
            fake=x.critic(composite(x.pred, x.target, x.mask)).logits,
        ),
        lambda x: published.cmt_discriminator(*judged(x, x.target, composite(x.pred, x.target, x.mask))),
    ),
    "LaMa-paper": (
        {**same("feature_matching"), "perceptual": {"perceptual": 4}, "l1": {"hole": 1, "valid": 1}},
        lambda x: lama(x, valid_weight=0.0, perceptual_weight=30 / 4),
        lambda x: published.lama_discriminator(*judged(x, x.target, x.pred), x.mask),
    ),
    "EdgeConnect-edge": (
        same("feature_matching"),
        lambda x: published.edge_connect_edge(*(found.features for found in edges(x)[::-1])),
        lambda x: published.edge_connect_discriminator(*(found.logits for found in edges(x))),
    ),
    "EdgeConnect-inpaint": (
        same("l1", "perceptual", "style"),
        lambda x: published.edge_connect_inpaint(
            maps, x.pred, x.target, x.mask, fake=x.critic(x.pred).logits
        ),
        lambda x: published.edge_connect_discriminator(*judged(x, x.target, x.pred)),
    ),
    "AOT-GAN-paper": (
        same("l1", "perceptual", "style"),
        lambda x: published.aot_gan(
            maps,
            x.pred,
            x.target,
            x.mask,
            fake=x.critic(composite(x.pred, x.target, 1 - x.mask)).logits,
            labels="paper",
        ),
        lambda x: published.aot_gan_discriminator(
            *judged(x, x.target, composite(x.pred, x.target, 1 - x.mask)), x.mask, labels="paper"
        ),
    ),
    "DeepFill-v1": (
        STAGES,
        lambda x: published.deepfill_v1(x.pred, x.target, x.mask, fake=x.critic(shown_by_deepfill(x)).logits),
        lambda x: published.deepfill_v1_discriminator(*judged(x, x.target, shown_by_deepfill(x))),
    ),
    "DeepFill-v2": (
        STAGES,
        lambda x: published.deepfill_v2(
            x.pred,
            x.target,
            x.mask,
            fake=x.critic(torch.cat([shown_by_deepfill(x), x.mask], 1)).logits,
        ),
        lambda x: published.deepfill_v2_discriminator(
            *judged(x, *(torch.cat([image, x.mask], 1) for image in (x.target, shown_by_deepfill(x))))
        ),
    ),
}


def of_formula(name: str, dtype: torch.dtype) -> Inputs:
    x = inputs(name, dtype=dtype)
    if name == "EdgeConnect-edge":
        x.critic = Critic(x.critic, name)
    return x


@pytest.mark.usefixtures("_constants")
@precisions
@pytest.mark.parametrize("name", FORMULAS)
def test_formulas(name: str, where: Backend, dtype: torch.dtype) -> None:
    parts, generator, discriminator = FORMULAS[name]
    x, exact = of_formula(name, dtype).to(where.device), of_formula(name, torch.float64)
    loss = objective(name, dtype, backend=where.name).to(where.device)
    found, want = x.terms(loss), generator(exact)
    assert_terms(found, parts, want)
    for keys, factors in parts.items():
        got = sum(factor * getattr(found, term) for term, factor in factors.items())
        expected = sum(want[key] for key in keys.split("+"))
        assert_gradient(x.gradient(got), exact.gradient(expected), keys)
    found, want = x.discriminator_loss(loss), discriminator(exact)
    assert_terms(found, {part: {part: 1} for part in found._fields}, want)
    names, parameters = zip(*exact.critic.named_parameters(), strict=True)
    truth, of_fake = (
        torch.autograd.grad(want[part], parameters, retain_graph=True) for part in ("total", "fake")
    )
    size = max(float(gradient.norm()) for gradient in of_fake)
    assert_critic_gradients(found.total, x.critic, dict(zip(names, truth, strict=True)), size)


@precisions
@pytest.mark.parametrize("local", [False, True])
def test_gradient_penalty_of_deepfill(local: bool, where: Backend, dtype: torch.dtype) -> None:
    """Of the global critic, weighed with the hole, and of the local one."""
    found = []
    for x in (
        inputs("DeepFill-v1", dtype=dtype).to(where.device),
        inputs("DeepFill-v1", dtype=torch.float64),
    ):
        critic, mask = x.critic.heads[int(local)], None if local else x.mask
        options = {"alpha": torch.linspace(0.2, 0.8, len(x.target)).to(x.target).view(-1, 1, 1, 1)}
        call = objective("DeepFill-v1").gradient_penalty if not found else published.deepfill_v1_penalty
        penalty = call(
            lambda image, critic=critic: critic(image).logits, x.target, x.leaves[-1], mask, **options
        )
        # The bias of the last layer has no part in it.
        gradients = torch.autograd.grad(penalty, list(critic.parameters())[:-1])
        found.append((penalty, gradients))
    (got, gradients), (want, truths) = found
    assert_value(got, want, "penalty")
    for gradient, truth in zip(gradients, truths, strict=True):
        assert_gradient(gradient, truth, "gradient of the penalty")
