"""The training example on published methods with their discriminators: both sides, steps, continuation, DDP."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from example_runs import (
    CPU,
    EXAMPLES,
    PIXEL,
    Run,
    light,
    load,
    narrow,
    photos,
    picks_its_own_backend,
    report,
    run,
    two_processes,
)
from torch import Tensor

import inpaint_kernels as ik

sys.path.insert(0, str(EXAMPLES))

import adversarial
import data
import engine
import losses
import methods
import model
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


def sides(name: str) -> tuple[methods.Fused, methods.Eager]:
    method = losses.METHODS[name]
    trunk = trunks.load_trunk(
        method.trunk, None, CPU, option="--trunk-weights", taps=method.layers, preprocess="none"
    )
    features = methods.FeatureTerms(trunk, chunk=1)
    fused, eager = (losses.make_objective(kind, name, features=features) for kind in ("fused", "eager"))
    assert isinstance(fused, methods.Fused) and isinstance(eager, methods.Eager)
    return fused, eager


def draw() -> tuple[Tensor, data.Batch]:
    rng = torch.Generator().manual_seed(0)
    pred, target = torch.rand(2, 2, 3, 32, 32, generator=rng)
    mask = (torch.rand(2, 1, 32, 32, generator=rng) > 0.4).float()
    return pred, data.Batch(target, mask, ["a", "b"])


def adversary_of(objective: methods.Published) -> adversarial.Adversary:
    torch.manual_seed(0)
    return adversarial.Adversary(objective, SETTINGS, world.World(CPU))


SETTINGS = options.Settings(
    steps=1, batch=2, size=32, lr=4e-3, seed=0, width=4, amp="off", normalize="image", save_every=1, data=""
)


# -- both sides -------------------------------------------------------------------------------


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("name", NAMES)
def test_fused_side_computes_what_the_eager_one_does(name: str) -> None:
    """The terms, their gradient as it arrives at the picture, through the discriminator as well."""
    pred, batch = draw()
    results = []
    for objective in sides(name):
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
        results.append((named, leaf.grad))
    (fused, fused_gradient), (eager, eager_gradient) = results
    torch.testing.assert_close(fused, eager, rtol=1e-5, atol=1e-7)
    assert fused_gradient is not None and eager_gradient is not None
    # Single features may fall to the other side of a kink, which moves a few pixels.
    error = (fused_gradient - eager_gradient).norm() / eager_gradient.norm()
    assert error < 5e-3


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("name", ["mat", "lama", "coordfill"])
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


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("name", ["mat", "coordfill"])
def test_step_of_the_generator_is_that_of_one_graph(name: str) -> None:
    """Through loss, discriminators and network, differentiated at once."""
    _, batch = draw()
    fused, _ = sides(name)
    trainer = engine.Trainer(SETTINGS, world.World(CPU), None, fused)
    # It begins as 0, and no other layer would have a gradient.
    torch.nn.init.normal_(trainer.net.last.weight, std=0.02)
    net, critic = copy.deepcopy(trainer.net), copy.deepcopy(trainer.adversary.net)
    trainer._one_step(trainer.net, batch)
    pred = net(batch.images * batch.masks, batch.masks)
    # Each call moves the vectors of the spectral norms: the truth is judged only where its features are matched.
    shown = [batch.images, pred] if fused.matches_features else [pred]
    *real, fake = (critic(fused.shown(image, batch.images, batch.masks)) for image in shown)
    fused(pred, batch.images, batch.masks, fake, *real).total.backward()
    moments = [trainer.optimizer.state[parameter]["exp_avg"] for parameter in trainer.net.parameters()]
    got = torch.cat([10 * moment.flatten() for moment in moments])  # the first of momentum 0.9
    want = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    assert (got - want).norm() < 1e-5 * want.norm()


# -- the network ------------------------------------------------------------------------------


class PublishedUNet(model.PartialConvUNet):
    """As NVIDIA's layers have it: each masks its input and sees a mask of all channels."""

    def __init__(self, width: int) -> None:
        def layer(*args: Any, **options: Any) -> ik.nn.PartialConv2d:
            return ik.nn.PartialConv2d(*args, **options | {"mask_input": True})

        super().__init__(width, layer)

    def join_masks(self, parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        return torch.cat([known.expand_as(features) for features, known in parts], 1)


@pytest.mark.parametrize("width", [6, 3])
def test_network_computes_what_published_layers_do(width: int) -> None:
    """Neither masking inputs nor masks of all channels would change a value or a gradient."""
    torch.manual_seed(0)
    net, published = model.PartialConvUNet(width).double(), PublishedUNet(width).double()
    for name, parameter in net.named_parameters():
        if name.endswith("bias") or name.startswith("last"):
            torch.nn.init.normal_(parameter)
    published.load_state_dict(net.state_dict())
    masks = [torch.from_numpy(data.brush_mask(np.random.default_rng(i), 64)) for i in range(2)]
    # Holes that are still there at the lowest level.
    masks += [(torch.arange(64) < 8).expand(64, 64), torch.zeros(64, 64)]
    mask = torch.stack([mask.double() for mask in masks])[:, None]
    image, upstream = torch.rand(2, 4, 3, 64, 64, dtype=torch.float64)
    results = []
    for network in (net, published):
        output = network(image, mask)
        results.append([output.detach(), *torch.autograd.grad(output, list(network.parameters()), upstream)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))


# -- whole runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_run_of_every_method(run: Run, tmp_path: Path, name: str) -> None:
    whole = ("--objective", name, "--pixel-steps", 0)
    status, printed, _ = run("--save-every", 3, *whole, "--steps", 3, "--compare-steps", 2)
    assert status == 0
    assert f"warning: {losses.METHODS[name].trunk} has random weights" in printed
    content = report(tmp_path / "out")
    weights = losses.METHODS[name].weights
    assert content["objective"] == FORMULAS[name]
    assert f"loss = {FORMULAS[name]}\n" in printed
    assert (content["terms_of_step"], content["compared_steps"]) == (2, 2)
    beside = {"discriminator"} if name in ADVERSARIAL else set()
    beside |= {"penalty"} if name in ("mat", "lama") else set()
    for terms in content["last_terms"].values():
        assert set(terms) == {"total", *weights} | beside
        assert min(terms.values()) > 0
        weighed = sum(weight * terms[term] for term, weight in weights.items())
        assert terms["total"] == pytest.approx(weighed, rel=1e-5)
    # Networks that learn from each other amplify a rounding, and perceptual terms have kinks.
    assert content["largest_relative_difference"] < 1e-3
    kept = {variant: figures["kept_bytes"] for variant, figures in content["variants"].items()}
    assert kept["eager"] > 2 * kept["fused"]
    state = load(tmp_path / "out" / "checkpoint.pt")
    assert state["history"].shape == (3, len(engine.RECORDED)) and state["history"].isfinite().all()
    assert (state["adversary"] is not None) == (name in ADVERSARIAL)


@pytest.mark.parametrize(("name", "amp", "chunk"), [("mat", "bf16", 0), ("lama", "fp16", 1)])
def test_run_in_half_precision(run: Run, tmp_path: Path, name: str, amp: str, chunk: int) -> None:
    status, _, _ = run("--objective", name, "--amp", amp, "--steps", 5, "--chunk", chunk)
    assert status == 0
    # Autocast rounds activations, so a last bit of a gradient can move a loss by a few bfloat16 roundings.
    assert report(tmp_path / "out")["largest_relative_difference_of_first_5"] < 2e-2


@pytest.mark.parametrize(
    ("options", "exact"),
    [
        # Two discriminators with a penalty in the first step.
        (("--objective", "mat"), 1),
        pytest.param((*PIXEL, "--normalize", "mask"), 3, marks=pytest.mark.slow),
    ],
    ids=["mat", "pixel"],
)
def test_two_processes(run: Run, photos: Path, tmp_path: Path, options: tuple[str, ...], exact: int) -> None:
    """Two processes of batch 2, with region means over both shards, train what one of batch 4 does.

    Up to rounding in the first `exact` steps.
    """
    two, one = tmp_path / "two", tmp_path / "one"
    options = (*options, "--steps", "3")
    job = two_processes(tmp_path, "--images", photos, "--out", two, *options)
    try:
        printed, err = job.communicate(timeout=600)
    finally:
        job.kill()
    assert job.returncode == 0, err
    assert printed.count("largest relative difference") == 1
    assert report(two)["processes"] == 2
    assert run(*options, "--batch", 4, "--no-compare", out=one)[0] == 0
    a, b = (load(folder / "checkpoint.pt") for folder in (two, one))
    # Perceptual terms have kinks, and networks that learn from each other amplify a rounding.
    torch.testing.assert_close(a["history"][:exact], b["history"][:exact], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a["history"], b["history"], rtol=1e-3, atol=1e-6)
    for name, value in b["model"].items():
        torch.testing.assert_close(a["model"][name], value, rtol=1e-3, atol=1e-4)
    if a["adversary"] is None:
        return
    # The weights have hardly moved. Without a momentum this is the last gradient, a mean over all processes.
    moments = [state["adversary"]["optimizer"]["state"] for state in (a, b)]
    for key, moment in moments[1].items():
        want = moment["exp_avg"]
        assert (moments[0][key]["exp_avg"] - want).norm() <= 1e-2 * want.norm()
