"""The training example on published methods with their discriminators: both sides, steps, continuation, DDP."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from example_runs import (
    CPU,
    EXAMPLES,
    Run,
    assert_same,
    check_two_processes,
    load,
    no_plots,
    photos,
    picks_its_own_backend,
    report,
    run,
)
from torch import Tensor

from inpaint_kernels.features import torchvision_nets

sys.path.insert(0, str(EXAMPLES))

import adversarial
import data
import engine
import losses
import methods
import options
import trunks
import world

pytestmark = picks_its_own_backend

NAMES = list(losses.METHODS)
ADVERSARIAL = [name for name, method in losses.METHODS.items() if method.discriminator]
FORMULAS = {
    "pconv": "6 hole + valid + 0.1 tv + 0.05 perceptual + 120 style",
    "ctn": "l1 + perceptual + style + 0.1 adversarial",
    "tformer": "l1 + perceptual + 250 style + 0.1 adversarial",
    "mat": "0.1 perceptual + adversarial",
    "transcnn-hae": "2 l1 + perceptual + 250 style",
    "coordfill": "10 lpips + adversarial + 100 feature_matching",
    "cmt": "hole + 0.1 valid + 10 perceptual + 0.001 adversarial",
    "lama": "10 valid + 30 perceptual + 10 adversarial + 100 feature_matching",
    "edge-connect": "l1 + 0.1 perceptual + 250 style + 0.1 adversarial",
    "aot-gan": "l1 + 0.1 perceptual + 250 style + 0.01 adversarial",
}


# An eighth of the channels. LPIPS has weights for every channel of AlexNet, which is small anyway.
NARROW = {
    name: [item // 8 if isinstance(item, int) else item for item in getattr(torchvision_nets, name)]
    for name in ("_VGG16", "_VGG19")
}


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, channels in NARROW.items():
        monkeypatch.setattr(torchvision_nets, name, channels)


def sides(name: str, chunk: int | None = None) -> tuple[methods.Fused, methods.Eager]:
    method = losses.METHODS[name]
    trunk = trunks.load_trunk(
        method.trunk, None, CPU, option="--trunk-weights", taps=method.layers, preprocess="none"
    )
    features = methods.FeatureTerms(trunk, chunk=chunk)
    fused, eager = (losses.make_objective(kind, name, features=features) for kind in ("fused", "eager"))
    assert isinstance(fused, methods.Fused) and isinstance(eager, methods.Eager)
    return fused, eager


def draw() -> tuple[Tensor, data.Batch]:
    rng = torch.Generator().manual_seed(0)
    pred, target = torch.rand(2, 2, 3, 32, 32, generator=rng)
    mask = (torch.rand(2, 1, 32, 32, generator=rng) > 0.4).float()
    return pred, data.Batch(target, mask, ["a", "b"])


def adversary_of(objective: methods.Published, amp: str = "off") -> adversarial.Adversary:
    torch.manual_seed(0)
    return adversarial.Adversary(objective, settings(amp), world.World(CPU))


def settings(amp: str = "off") -> options.Settings:
    return options.Settings(
        steps=1,
        batch=2,
        size=32,
        lr=4e-3,
        seed=0,
        width=4,
        amp=amp,
        normalize="image",
        save_every=1,
        data="",
    )


# -- both sides -------------------------------------------------------------------------------


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("chunk", [None, 1])
@pytest.mark.parametrize("name", NAMES)
def test_fused_side_computes_what_the_eager_one_does(name: str, chunk: int | None) -> None:
    """The terms, their gradient as it arrives at the picture, through the discriminator as well."""
    pred, batch = draw()
    found = []
    for objective in sides(name, chunk):
        leaf = pred.clone().requires_grad_()
        judged = adversary_of(objective).judge(leaf, batch) if objective.adversarial else None
        fake, real = (judged.fake, judged.real) if judged else (None, None)
        terms = objective(leaf, batch.images, batch.masks, fake, real)
        terms.total.backward()
        if judged is not None:
            judged.backward(leaf)
        weights = losses.METHODS[name].weights
        named = {term: value.detach() for term, value in terms._asdict().items() if term in weights}
        assert set(named) == set(weights)
        torch.testing.assert_close(terms.total, sum(weights[term] * named[term] for term in weights))
        found.append((named, leaf.grad))
    (fused, fused_gradient), (eager, eager_gradient) = found
    torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-7)
    assert fused_gradient is not None and eager_gradient is not None
    # Single features may fall to the other side of a kink, which moves a few pixels.
    error = (fused_gradient - eager_gradient).norm() / eager_gradient.norm()
    assert error < 5e-3


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ADVERSARIAL)
def test_discriminator_steps_as_its_formulas_do(name: str) -> None:
    """With its penalty where it is due, times the steps until the next one."""
    pred, batch = draw()
    fused, eager = sides(name)
    interval = {"mat": 16, "lama": 1}.get(name, 0)
    for step in (0, 1):
        adversary = adversary_of(fused)
        adversary.optimizer = torch.optim.SGD(adversary.net.parameters())
        twin = copy.deepcopy(adversary.net)
        loss, penalty = adversary.step(pred, batch, 10.0, step)

        real, fake = (twin(eager.shown(image, batch.images, batch.masks)) for image in (batch.images, pred))
        want = total = eager.discriminator_loss(real, fake, batch.masks)
        torch.testing.assert_close(loss, want.detach())
        due = bool(interval) and step % interval == 0
        assert bool(penalty > 0) == due
        if due:
            want_penalty = eager.penalty(twin, batch.images, batch.masks)
            torch.testing.assert_close(penalty, want_penalty.detach())
            total = want + interval * want_penalty
        gradients = torch.autograd.grad(total, list(twin.parameters()))
        for (key, new), old, gradient in zip(
            adversary.net.named_parameters(), twin.parameters(), gradients, strict=True
        ):
            moved = (old - new).detach() / (10 * adversarial.RATE)
            torch.testing.assert_close(
                moved, gradient, rtol=1e-3, atol=1e-6, msg=lambda m, k=key: f"{k}: {m}"
            )


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ["mat", "coordfill"])
def test_step_of_the_generator_is_that_of_one_graph(name: str) -> None:
    """Through loss, discriminators and network, differentiated at once."""
    _, batch = draw()
    fused, eager = sides(name)
    trainer = engine.Trainer(settings(), world.World(CPU), None, fused)
    net, critic = copy.deepcopy(trainer.net), copy.deepcopy(trainer.adversary.net)
    trainer._one_step(trainer.net, batch)
    pred = net(batch.images * batch.masks, batch.masks)
    real, fake = (critic(eager.shown(image, batch.images, batch.masks)) for image in (batch.images, pred))
    eager(pred, batch.images, batch.masks, fake, real).total.backward()
    moments = [trainer.optimizer.state[parameter]["exp_avg"] for parameter in trainer.net.parameters()]
    got = torch.cat([10 * moment.flatten() for moment in moments])  # the first of momentum 0.9
    want = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    assert (got - want).norm() < 1e-3 * want.norm()


# -- whole runs -------------------------------------------------------------------------------


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", NAMES)
def test_run_of_every_method(run: Run, tmp_path: Path, name: str) -> None:
    status, printed, _ = run("--save-every", 20, "--objective", name, "--steps", 20, "--compare-steps", 5)
    assert status == 0
    assert f"warning: {losses.METHODS[name].trunk} has random weights" in printed
    found = report(tmp_path / "out")
    weights = losses.METHODS[name].weights
    assert found["objective"] == FORMULAS[name]
    assert f"loss = {FORMULAS[name]}\n" in printed
    beside = {"discriminator"} if name in ADVERSARIAL else set()
    beside |= {"penalty"} if name in ("mat", "lama") else set()
    for terms in found["last_terms"].values():
        assert set(terms) == {"total", *weights} | beside
        assert min(terms.values()) > 0
        weighed = sum(weight * terms[term] for term, weight in weights.items())
        assert terms["total"] == pytest.approx(weighed, rel=1e-5)
    # Networks that learn from each other amplify a rounding, and perceptual terms have kinks.
    assert found["largest_relative_difference"] < 1e-3
    kept = {variant: figures["kept_bytes"] for variant, figures in found["variants"].items()}
    assert kept["eager"] > 2 * kept["fused"]
    state = load(tmp_path / "out" / "checkpoint.pt")
    assert state["history"].shape == (20, len(engine.RECORDED)) and state["history"].isfinite().all()
    assert (state["adversary"] is not None) == (name in ADVERSARIAL)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["mat", "lama"])
def test_run_in_half_precision(run: Run, tmp_path: Path, name: str, amp: str) -> None:
    status, _, _ = run("--save-every", 20, "--objective", name, "--amp", amp, "--steps", 6, "--chunk", 0)
    assert status == 0
    # Autocast rounds activations, so a last bit of a gradient can move a loss by a few bfloat16 roundings.
    assert report(tmp_path / "out")["largest_relative_difference_of_first_5"] < 2e-2


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_resumed_run_equals_an_unbroken_one(run: Run, tmp_path: Path, amp: str) -> None:
    """Across a step with a penalty, the 17th."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    common = ("--save-every", 20, "--objective", "mat", "--amp", amp, "--no-compare")
    assert run("--steps", 18, *common, out=whole)[0] == 0
    assert run("--steps", 9, *common, out=broken)[0] == 0
    status, printed, _ = run("--steps", 18, "--resume", *common, out=broken)
    assert status == 0
    assert "note:" not in printed
    a, b = load(whole / "checkpoint.pt"), load(broken / "checkpoint.pt")
    assert torch.equal(a["history"], b["history"])
    penalties = a["history"][:, engine.RECORDED.index("penalty")]
    assert penalties.unique_consecutive().tolist() == penalties[[0, 16]].tolist()
    for part in ("model", "scaler"):
        assert_same(a[part], b[part], part)
    assert_same(a["optimizer"]["state"], b["optimizer"]["state"], "optimizer")
    assert_same(a["adversary"], b["adversary"], "adversary")


@pytest.mark.usefixtures("narrow")
def test_another_method_goes_on_with_a_new_discriminator(run: Run, tmp_path: Path) -> None:
    for steps, name in ((2, "pconv"), (4, "ctn"), (6, "mat"), (8, "transcnn-hae")):
        resume = [] if steps == 2 else ["--resume"]
        status, printed, _ = run(
            "--save-every", 20, "--objective", name, "--steps", steps, "--no-compare", *resume
        )
        assert status == 0
        assert ("note: objective was" in printed) == (steps > 2)
    assert load(tmp_path / "out" / "checkpoint.pt")["adversary"] is None


@pytest.mark.usefixtures("narrow")
def test_two_processes(run: Run, tmp_path: Path, photos: Path) -> None:
    """Two discriminators with a penalty in the first step."""
    program = tmp_path / "narrow_train.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import plots, train\nfrom inpaint_kernels.features import torchvision_nets\n"
        f"vars(torchvision_nets).update({NARROW})\n"
        "plots.write_png = lambda figure, path: None\nsys.exit(train.main())\n"
    )
    check_two_processes(run, photos, tmp_path, ["--objective", "mat", "--steps", "3"], program)
    # The weights have hardly moved. Without a momentum this is the last gradient, a mean over all processes.
    states = [load(tmp_path / name / "checkpoint.pt") for name in ("two", "one")]
    moments = [state["adversary"]["optimizer"]["state"] for state in states]
    for key, moment in moments[1].items():
        want = moment["exp_avg"]
        assert (moments[0][key]["exp_avg"] - want).norm() <= 1e-2 * want.norm()
