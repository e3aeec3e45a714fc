"""What objectives refuse: every error names the argument, what it got and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from objective_table import (
    METHODS,
    WITH_CRITIC,
    WITH_TRUNK,
    every_method,
    inputs,
    objective,
    settings_of,
    trunk,
)

import inpaint_kernels as ik
from inpaint_kernels.objectives import DiscriminatorOutput, PartialConvObjective

COMPOSED = [name for name in WITH_CRITIC if settings_of(name).discriminator_image == "composite"]
MATCHED = [name for name in WITH_CRITIC if getattr(settings_of(name), "feature_matching_weight", 0)]


@pytest.mark.parametrize("name", WITH_CRITIC)
def test_what_the_discriminator_says_is_missing(name: str) -> None:
    x = inputs(name)
    loss = objective(name)
    given = x.outputs(loss)
    with pytest.raises(ValueError, match=r"fake is missing.*fake="):
        loss(x.pred, x.target, x.mask)
    with pytest.raises(TypeError, match=r"fake.* must be a Tensor, got str"):
        loss(x.pred, x.target, x.mask, fake="logits", real=given["real"])
    for side in ("real", "fake"):
        with pytest.raises(ValueError, match=f"{side} is missing.*{side}="):
            loss.discriminator_loss(**given | {side: None}, mask=x.mask)
    if name not in MATCHED:
        loss(x.pred, x.target, x.mask, fake=given["fake"].logits)
        return
    with pytest.raises(ValueError, match=r"real is missing.*real="):
        loss(x.pred, x.target, x.mask, fake=given["fake"])
    for side in ("fake", "real"):
        with pytest.raises(
            TypeError, match=rf"{side} must be a DiscriminatorOutput\(logits, features\).*got Tensor"
        ):
            loss(x.pred, x.target, x.mask, **given | {side: torch.zeros(3, 1, 4, 4)})


@every_method
def test_what_a_method_does_not_have(name: str) -> None:
    x = inputs(name)
    loss = objective(name)
    if name not in WITH_CRITIC:
        with pytest.raises(ValueError, match=f"{type(loss).__name__} has no adversarial term"):
            loss.discriminator_loss(real=x.target, fake=x.target)
    else:
        without = objective(name, adversarial_weight=0)
        with pytest.raises(ValueError, match="has no adversarial term with these settings"):
            without.discriminator_loss(real=x.target, fake=x.target)
    if name not in ("MAT", "LaMa", "LaMa-paper", "LaMa-switches"):
        words = "use gradient_penalty" if "DeepFill" in name else "no gradient penalty"
        with pytest.raises(ValueError, match=words):
            loss.discriminator_penalty(x.target, x.target)
    if not name.startswith("EdgeConnect"):
        with pytest.raises(
            ValueError, match=f"condition: the discriminator of {type(loss).__name__} reads none"
        ):
            loss.discriminator_input(x.target, x.target, x.mask, condition=x.target)


MISSING = [(name, "discriminator_input") for name in COMPOSED]
MISSING += [(name, "discriminator_loss") for name in METHODS if name.startswith(("AOT", "LaMa"))]


@pytest.mark.parametrize(("name", "call"), MISSING)
def test_the_mask_is_missing(name: str, call: str) -> None:
    x = inputs(name)
    loss = objective(name)
    calls: dict[str, Callable[[], Any]] = {
        "discriminator_input": lambda: loss.discriminator_input(x.pred, x.target),
        "discriminator_loss": lambda: loss.discriminator_loss(**x.outputs(loss)),
    }
    with pytest.raises(ValueError, match="mask is missing"):
        calls[call]()


# The settings that its objective shares with others have rows below.
BAD_SETTINGS_OF_PARTIAL_CONV: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
    ({"style_weight": "120"}, TypeError, "style_weight.*str"),
    ({"style_weight": float("nan")}, ValueError, "style_weight.*nan"),
    ({"hole_weight": True}, TypeError, "hole_weight.*bool"),
    ({"normalize": "pairs"}, ValueError, "normalize.*'pairs'.*'image'"),
    ({"preprocess": "caffe"}, ValueError, "preprocess.*'caffe'.*'imagenet_tanh'"),
    ({"tv_region": "all"}, ValueError, "tv_region.*'all'.*'dilated_hole'"),
    ({"tv_normalize": "sample"}, ValueError, "tv_normalize.*'sample'.*'pairs'"),
    ({"tv_region": "image", "tv_normalize": "mask"}, ValueError, "tv_normalize.*tv_region"),
    ({"tv_image": "target"}, ValueError, "tv_image.*'target'.*'raw'"),
    ({"composite_from": "pred"}, ValueError, "composite_from.*'pred'.*'masked_target'"),
    ({"process_group": "gloo"}, TypeError, "process_group.*ProcessGroup.*'gloo'"),
    ({"pixel_space": "vgg"}, ValueError, "pixel_space.*'vgg'.*'trunk'"),
    ({"predictions": "raw"}, TypeError, "predictions.*'raw'"),
    ({"predictions": ["raw", "target"]}, ValueError, "predictions.*'target'.*'composite'"),
    ({"predictions": []}, ValueError, "predictions.*at least one"),
    ({"predictions": ["raw", "raw"]}, ValueError, "predictions.*twice"),
    ({"layers": "pool1"}, TypeError, "layers.*'pool1'"),
    ({"swap_channels": 1}, TypeError, "swap_channels.*1"),
    ({"chunk": 0}, ValueError, "chunk.*0"),
    ({"layers": ["pool4"]}, ValueError, "trunk.*pool4.*taps pool1, pool2, pool3.*layers="),
    ({"trunk": trunk("pconv-paper", preprocess="imagenet")}, ValueError, "'imagenet'.*preprocess='none'"),
    ({"weights": None}, ValueError, "weights.*trunk="),
    ({"channels_last": True}, ValueError, "channels_last.*trunk="),
    ({"trunk": None, "weights": "/no/file"}, FileNotFoundError, "weights.*/no/file"),
    ({"trunk": None, "weights": None, "layers": ["pool9"]}, ValueError, "pool9.*vgg16"),
)


@pytest.mark.parametrize(
    ("name", "options", "error", "words"),
    [
        *((name, {"no_such": 1}, TypeError, "'no_such'; the settings are preprocess, ") for name in METHODS),
        *((name, {"mask_is": "known"}, ValueError, "mask_is.*'known'.*'hole'") for name in METHODS),
        *((name, {"trunk": torch.nn.Identity()}, TypeError, "trunk.*FrozenTrunk.*Identity") for name in WITH_TRUNK),
        *((name, {"gan_mode": "vanilla"}, ValueError, "gan_mode.*'vanilla'.*'hinge'") for name in WITH_CRITIC),
        ("LaMa", {"trunk": None}, ValueError, r"trunk is missing.*LaMaObjective.*FrozenTrunk\(module, taps\)"),
        ("MAT", {"perceptual_layer_weights": [1.0]}, ValueError, "layer_weights has 1 .* 2 layers conv4_4, conv5_4"),
        ("MAT", {"perceptual_layer_weights": 1.0}, TypeError, "perceptual_layer_weights.*sequence of numbers.*1.0"),
        ("MAT", {"perceptual_layer_weights": ["1", 2]}, TypeError, "perceptual_layer_weights.*number.*str"),
        ("TransCNN-HAE", {"perceptual_layers": ["relu1_1"]}, ValueError, "layer_weights has 5 .* 1 layers"),
        ("MAT", {"penalty_interval": -1}, ValueError, "penalty_interval.*-1"),
        ("MAT", {"penalty_interval": 1.5}, ValueError, "penalty_interval.*1.5"),
        ("MAT", {"r1_gamma": "10"}, TypeError, "r1_gamma.*str"),
        ("MAT", {"discriminator_image": "both"}, ValueError, "discriminator_image.*'both'.*'composite'"),
        ("CMT", {"penalty": "huber"}, ValueError, "penalty.*'huber'.*'l2'"),
        ("AOT-GAN-paper", {"labels": "soft"}, ValueError, "labels.*'soft'.*'released'"),
        ("LaMa", {"layer_reduction": "max"}, ValueError, "layer_reduction.*'max'.*'mean'"),
        ("LaMa", {"mask_resize": "cubic"}, ValueError, "mask_resize.*'cubic'.*'adaptive_max'"),
        ("LaMa", {"perceptual_known_only": 1}, TypeError, "perceptual_known_only.*1"),
        ("CoordFill", {"heads": "v0.2"}, ValueError, "heads.*'v0.2'.*'v0.1'"),
        ("CoordFill", {"heads": [torch.ones(4)]}, ValueError, "heads.*1 layers, lpips_layers names 5"),
        ("CoordFill", {"heads": [torch.tensor([-1.0])] * 5}, ValueError, r"heads\[0\].*non-negative.*-1"),
        ("CoordFill", {"heads": [1.0] * 5}, TypeError, r"heads\[0\] must be a floating Tensor, got float"),
        ("DeepFill-v1", {"every_stage": 2}, TypeError, "every_stage.*2"),
        *(("pconv-paper", *row) for row in BAD_SETTINGS_OF_PARTIAL_CONV),
    ],
)  # fmt: skip
def test_bad_settings(name: str, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        objective(name, **options)


def test_no_such_preset() -> None:
    with pytest.raises(ValueError, match=r"preset.*'liu'.*'paper', 'nvidia', 'naoto0804', 'mmagic'"):
        PartialConvObjective("liu")


def test_bad_inputs() -> None:
    x = inputs("pconv-paper")
    pred, target, mask = x.pred, x.target, x.mask
    loss, other = objective("pconv-paper"), objective("pconv-paper", style_weight=0)
    coordfill, y = objective("CoordFill", heads=[torch.ones(3)] * 5), inputs("CoordFill")
    lama, aot = objective("LaMa-switches"), objective("AOT-GAN-paper")
    edge, z = objective("EdgeConnect-edge"), inputs("EdgeConnect-edge")
    two = [torch.zeros(3, 1, 4, 4)] * 2
    for call, error, words in (
        (lambda: loss(pred, target[:, :, 1:], mask), ValueError, r"target.*\(3, 3, 15, 16\)"),
        (lambda: loss(pred, target, mask[:, 0]), ValueError, r"mask.*\(3, 16, 16\)"),
        (lambda: loss(pred, None, mask), TypeError, "target.*NoneType"),
        (lambda: loss(None, target, mask), TypeError, "pred.*NoneType"),
        (lambda: loss([], target, mask), TypeError, "pred.*non-empty"),
        (lambda: loss(pred.long(), target, mask), TypeError, "pred.*int64"),
        (lambda: loss(pred, target, mask, truth=target), TypeError, r"truth.*prepare\(target\).*Tensor"),
        (lambda: loss(pred, target, mask, truth=loss.prepare(target[:1])), ValueError, r"truth.*\[1\].*batch 3"),
        (lambda: loss(pred, target, mask, truth=other.prepare(target)), ValueError, "truth.*1 terms"),
        (lambda: loss(pred[..., :7], target[..., :7], mask[..., :7]), ValueError, r"pred.*16, 7\).*8x8"),
        (lambda: loss.prepare(target[..., :7]), ValueError, r"target.*16, 7\).*8x8"),
        (lambda: loss.prepare(target[0]), ValueError, r"target.*\(3, 16, 16\)"),
        (lambda: objective("pconv-paper", backend="gpu")(pred, target, mask), ValueError, "backend.*'gpu'"),
        (lambda: loss.discriminator_input(None, target), TypeError, "image.*NoneType"),
        (lambda: loss.discriminator_input(pred[:, :, 1:], target), ValueError, r"image.*\(3, 3, 15, 16\)"),
        (lambda: coordfill(y.pred, y.target, y.mask), ValueError, r"heads have \[3, 3, 3, 3, 3\] weights.*\[4, "),
        (lambda: lama(pred, target, mask, fake=DiscriminatorOutput(two, [])), ValueError, "mask_resize.*one disc"),
        (lambda: aot(pred, target, mask, fake=two), ValueError, r"fake and real.*\(N, 1, h, w\)"),
        (
            lambda: objective("LaMa-paper", feature_matching_known_only=True)(pred, target),
            ValueError,
            "mask is missing",
        ),
        (
            lambda: edge.discriminator_input(z.pred, z.target, condition=z.condition[..., 1:]),
            ValueError,
            r"condition.*\(3, 1, 16, 15\).*image.*\(3, 1, 16, 16\)",
        ),
        (lambda: edge.discriminator_input(z.pred, z.target, condition=1), TypeError, "condition.*int"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("channels", [2, 4])
def test_channels_that_the_trunk_does_not_read(channels: int) -> None:
    loss, x = objective("pconv-paper"), inputs("pconv-paper", channels=channels)
    for call in (lambda: x.terms(loss), lambda: loss.prepare(x.target, x.mask)):
        with pytest.raises(
            ValueError, match=f"pred has {channels} channels; the trunk reads images of 1 or 3"
        ):
            call()


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.stages == 1])
def test_a_list_of_predictions_where_one_is_compared(name: str) -> None:
    x = inputs(name)
    with pytest.raises(ValueError, match=r"pred is a list of 2 images; .*Objective compares one"):
        objective(name)([x.pred, x.pred], x.target, x.mask)


def test_what_discriminators_return_is_no_logits() -> None:
    output = DiscriminatorOutput(torch.zeros(3, 1), torch.zeros(3, 1))  # type: ignore[arg-type]
    for call in (lambda: ik.generator_loss(output), lambda: ik.nn.GANLoss()(output)):
        with pytest.raises(
            TypeError, match=r"logits must be tensors, got a DiscriminatorOutput: pass its \.logits"
        ):
            call()
