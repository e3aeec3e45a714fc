"""Fills without a network: closed forms, what they keep and read, what the training example says of them."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from example_runs import (
    CPU,
    EXAMPLES,
    PIXEL,
    Run,
    assert_one_line,
    light,
    load,
    narrow,
    photos,
    picks_its_own_backend,
    report,
    run,
)
from torch import Tensor

sys.path.insert(0, str(EXAMPLES))

import data
import engine
import fills
import inpaint
import model

pytestmark = picks_its_own_backend

NAMES = list(fills.BASELINES)
KEEPING = [name for name in NAMES if name != "mean colour"]


def fill(name: str, images: Tensor, masks: Tensor) -> Tensor:
    if name in ("nearest known pixel", "biharmonic"):
        pytest.importorskip("skimage")
    return fills.BASELINES[name](images, masks)


def holes(size: int = 32) -> Tensor:
    return torch.stack([torch.from_numpy(data.brush_mask(np.random.default_rng(i), size)) for i in range(2)])[
        :, None
    ].float()


def stripe(size: int = 32) -> Tensor:
    """Unknown in the middle: rows 8 to 24 of columns 12 to 20."""
    mask = torch.ones(1, 1, size, size)
    mask[..., 8:24, 12:20] = 0
    return mask


@pytest.mark.parametrize("name", NAMES)
def test_holes_of_a_constant_picture_get_its_colour(name: str) -> None:
    images = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    torch.testing.assert_close(fill(name, images, holes()), images, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", KEEPING)
def test_known_pixels_are_kept_and_holes_are_not_read(name: str) -> None:
    masks, images = holes(), torch.rand(2, 3, 32, 32)
    filled = fill(name, images, masks)
    known = masks.expand_as(images) > 0
    assert torch.equal(filled[known], images[known])
    assert (filled[~known] != images[~known]).any()
    assert torch.equal(fill(name, torch.where(known, images, 7.0), masks), filled)


def test_ramp() -> None:
    """The nearest pixel is that of the nearer border; the smoothest surface is the ramp itself."""
    mask, columns = stripe(), torch.arange(32.0)
    ramp = (columns / 31).expand(1, 3, 32, 32)
    nearest = fill("nearest known pixel", ramp, mask)[0, 0, 15]
    expected = torch.where((columns >= 12) & (columns < 16), 11.0, columns)
    expected = torch.where((columns >= 16) & (columns < 20), 20.0, expected)
    torch.testing.assert_close(nearest, expected / 31)
    torch.testing.assert_close(fill("biharmonic", ramp, mask), ramp, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("sweeps", "step", "error"), [(0, 5.0, 3.0), (20, 1.2, 0.4), (2000, 1.001, 1e-3)])
def test_pull_push_of_a_ramp(sweeps: int, step: float, error: float) -> None:
    """It rises from border to border, and falls with the mirrored ramp as it rises with this one.

    The more it is smoothed, the nearer it comes to the ramp, which is the smoothest surface.
    """
    mask = stripe()
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)
    filled = fills.pull_push(ramp, mask, sweeps)
    torch.testing.assert_close(filled + filled.flip(3), torch.full_like(filled, 31.0))
    across = filled[0, 0, 16, 11:21]
    assert (across.diff() >= 0).all() and across.diff().max() < step
    assert (filled - ramp).abs().max() < error


def test_pull_push_by_hand() -> None:
    """The only hole of four pixels gets the mean of the others; where nothing is known, 0."""
    image, mask = torch.tensor([[[[0.1, 0.2], [0.6, 5.0]]]]), torch.tensor([[[[1.0, 1.0], [1.0, 0.0]]]])
    torch.testing.assert_close(fills.pull_push(image, mask)[0, 0, 1, 1], torch.tensor(0.3))
    assert torch.equal(fills.pull_push(image, torch.zeros_like(mask)), torch.zeros_like(image))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (33, 20), (7, 64)])
def test_pull_push_of_any_size(size: tuple[int, int]) -> None:
    """Plain, it is a mean of known pixels."""
    mask = (torch.arange(size[0] * size[1]) % 5 < 2).float().view(1, 1, *size)
    filled = fills.pull_push(torch.rand(1, 2, *size), mask)
    assert filled.shape == (1, 2, *size)
    assert filled.min() >= 0 and filled.max() <= 1
    constant = torch.full((1, 1, *size), 0.25)
    torch.testing.assert_close(fills.pull_push(constant, mask), constant)
    torch.testing.assert_close(fills.smooth_pull_push(constant, mask), constant)


# -- the network, and the program that trains it ----------------------------------------------


def test_untrained_network_returns_the_fill_it_corrects() -> None:
    torch.manual_seed(0)
    net, masks, images = model.PartialConvUNet(4), holes(64), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        base = fills.smooth_pull_push(images, masks)
        assert torch.equal(net(images * masks, masks), base)
        net.last.weight.add_(0.1)
        assert (net(images * masks, masks) - base).abs().max() > 1e-3


def test_report_holds_the_baselines(run: Run, tmp_path: Path) -> None:
    """In the holes of the crops the network is measured on; its own error begins as that of the fill it corrects."""
    pytest.importorskip("skimage")
    status, printed, _ = run(*PIXEL, "--steps", 2)
    assert status == 0
    content = report(tmp_path / "out")
    errors = content["held_out_baselines"]
    assert list(errors) == NAMES and min(errors.values()) > 0
    assert content["held_out_hole_error"][0] == [0, pytest.approx(errors["smooth pull-push"], rel=1e-5)]
    for name, error in errors.items():
        assert f"{error:.4f} {name}" in printed
    photographs = data.load_photographs(tmp_path / "photos", 32)
    sampler = data.Sampler(photographs, lambda rng: data.brush_mask(rng, 32), seed=0, batch=2)
    batch = sampler.held_out(engine.HELD_OUT_CROPS)
    known = batch.masks.sum((2, 3), keepdim=True)
    mean = (batch.images * batch.masks).sum((2, 3), keepdim=True) / known
    hole = (1 - batch.masks).expand_as(batch.images) > 0
    expected = (mean - batch.images).abs()[hole].mean()
    assert errors["mean colour"] == pytest.approx(float(expected), rel=1e-5)


def test_baselines_without_scikit_image(monkeypatch: pytest.MonkeyPatch) -> None:
    import summary

    monkeypatch.setitem(sys.modules, "skimage.restoration", None)
    monkeypatch.setitem(sys.modules, "scipy.ndimage", None)
    batch = data.Batch(torch.rand(2, 3, 32, 32), holes(), ["a", "b"])
    assert list(summary.baseline_errors(batch)) == ["mean colour", "pull-push", "smooth pull-push"]


# -- the steps before the whole objective ------------------------------------------------------


def test_first_steps_have_pixel_terms_alone(run: Run, tmp_path: Path) -> None:
    """What is compared are steps of the whole objective; an interrupted run goes on exactly across the change."""
    options = ("--objective", "ctn", "--pixel-steps", 3)
    status, printed, _ = run(*options, "--steps", 6, "--compare-steps", 2)
    assert status == 0
    assert "of the first 3 steps 6 hole + valid" in printed
    content = report(tmp_path / "out")
    assert [content[key] for key in ("compared_from", "compared_steps", "terms_of_step")] == [3, 2, 5]
    assert content["largest_relative_difference"] < 1e-3
    assert content["pixel_step_ms"] > 0
    assert set(content["last_terms"]["fused"]) == {
        *("total", "l1", "perceptual", "style", "adversarial", "discriminator")
    }
    state = load(tmp_path / "out" / "checkpoint.pt")
    history = dict(zip(engine.RECORDED, state["history"].unbind(1), strict=True))
    for names, in_first_steps in ((("hole",), True), (("l1", "style", "discriminator"), False)):
        for name in names:
            assert torch.equal(history[name] > 0, (torch.arange(6) < 3) == in_first_steps), name
    torch.testing.assert_close(history["total"][:3], (6 * history["hole"] + history["valid"])[:3])

    broken = tmp_path / "broken"
    assert run(*options, "--steps", 2, "--no-compare", out=broken)[0] == 0
    assert run(*options, "--steps", 6, "--no-compare", "--resume", out=broken)[0] == 0
    for name, value in load(broken / "checkpoint.pt")["model"].items():
        assert torch.equal(value, state["model"][name])


def test_random_trunk_is_used_only_when_asked_for(run: Run, tmp_path: Path) -> None:
    for options, objective in (((), "6 hole + valid"), (("--pixel-steps", 1), "120 style")):
        status, printed, _ = run("--steps", 2, "--no-compare", *options)
        assert status == 0
        assert "warning: vgg16 has random weights" in printed
        assert ("this run is one of --objective pixel" in printed) == (not options)
        assert report(tmp_path / "out")["objective"].endswith(objective)


def test_pixel_steps_belong_to_published_methods(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(*PIXEL, "--pixel-steps", 3)
    assert "--pixel-steps: with --objective pixel" in capsys.readouterr().err


def test_checkpoint_of_another_network(run: Run, tmp_path: Path) -> None:
    assert run(*PIXEL, "--steps", 2, "--no-compare")[0] == 0
    path = tmp_path / "out" / "checkpoint.pt"
    state = load(path)
    state["architecture"]["network"] = "PartialConvUNet"
    torch.save(state, path)
    result = run(*PIXEL, "--steps", 4, "--no-compare", "--resume")
    assert_one_line(result, "another network", "PartialConvUNet, width 4", model.PartialConvUNet.KIND)
    with pytest.raises(inpaint.InputError, match="of another version; train a"):
        inpaint.load_network(path, CPU)
