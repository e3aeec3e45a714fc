"""The methods whose objectives are timed: the formula that was released, ours, and what both of them read."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bench_inpainting_pixel
from .harness import Case, image_inputs
from .machine import ROOT

# The released formulas are an example: users take them from there.
sys.path.append(str(ROOT / "examples"))
import published

if TYPE_CHECKING:
    from inpaint_kernels.objectives import Objective

# VGG19 and VGG16: (channels, pixels a side is divided by) of the layers of a block. AlexNet's layers are its own.
_BLOCKS = {1: (64, 1), 2: (128, 2), 3: (256, 4), 4: (512, 8), 5: (512, 16)}
_ALEXNET = {"relu1": (64, 4), "relu2": (192, 8), "relu3": (384, 16), "relu4": (256, 16), "relu5": (256, 16)}
# A discriminator of four convolutions with stride 2 on images of 256 x 256: maps that are matched, and logits.
_CRITIC = {"features0": (64, 2), "features1": (128, 4), "features2": (256, 8), "features3": (512, 8)}


@dataclass(frozen=True)
class Method:
    """`formula(trunk, images, outputs)` is the released total; `objective` names the class of ours.

    `passes`: the layers that each of our passes of the trunk reads, of the prediction and of the truth.
    """

    objective: str
    formula: Callable[[Any, dict[str, Tensor], dict[str, Any]], Tensor]
    net: str = "vgg19"
    passes: Sequence[tuple[str, ...]] = ()
    logits: tuple[tuple[int, int, int], ...] = ((1, 30, 30),)
    matches_features: bool = False
    options: dict[str, float] = field(default_factory=dict)  # settings of ours that are not the preset's
    preset: str | None = None


_P, _S = published.PERCEPTUAL_LAYERS, published.STYLE_LAYERS
_CMT = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
_MAT = ("conv4_4", "conv5_4")
_STAGES = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")  # in place of those of LaMa's segmentation network


def _images(images: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return images["pred"], images["target"], images["mask"]


METHODS: dict[str, Method] = {
    "ctn": Method(
        "CTNObjective",
        lambda trunk, i, o: published.ctn(trunk, *_images(i), fake=o["fake"][0], style_weight=250.0)["total"],
        passes=(_P, _S),
        preset="recommended",
    ),
    "mat": Method(
        "MATObjective",
        lambda trunk, i, o: published.mat(trunk, *_images(i), fake=o["fake"])["total"],
        passes=(_MAT,),
        logits=((1, 1, 1), (1, 1, 1)),
    ),
    "transcnn-hae": Method(
        "TransCNNHAEObjective",
        lambda trunk, i, o: published.transcnn_hae(trunk, i["pred"], i["target"])["total"],
        passes=(_P,),
        logits=(),
    ),
    "cmt": Method(
        "CMTObjective",
        lambda trunk, i, o: published.cmt(trunk, i["pred"], i["target"], 1 - i["mask"], fake=o["fake"][0])[
            "total"
        ],
        net="vgg16",
        passes=(_CMT,),
        logits=((1, 1, 1),),
    ),
    "coordfill": Method(
        "CoordFillObjective",
        lambda trunk, i, o: published.coordfill(
            trunk,
            *_images(i),
            heads=o["heads"],
            fake=o["fake"][0],
            fake_features=o["fake_features"],
            real_features=o["real_features"],
        )["total"],
        net="alexnet",
        passes=(tuple(_ALEXNET),),
        matches_features=True,
    ),
    "lama": Method(
        "LaMaObjective",
        lambda trunk, i, o: published.lama(
            trunk,
            i["pred"],
            i["target"],
            1 - i["mask"],
            fake=o["fake"][0],
            fake_features=o["fake_features"],
            real_features=o["real_features"],
            layers=_STAGES,
        )["total"],
        net="vgg16",
        passes=(_STAGES,),
        matches_features=True,
    ),
    "edge-connect": Method(
        "EdgeConnectObjective",
        lambda trunk, i, o: published.edge_connect_inpaint(
            trunk, i["pred"], i["target"], 1 - i["mask"], fake=o["fake"][0]
        )["total"],
        passes=(_P, _S),
    ),
    "aot-gan": Method(
        "AOTGANObjective",
        lambda trunk, i, o: published.aot_gan(
            trunk, i["pred"], i["target"], 1 - i["mask"], fake=o["fake"][0]
        )["total"],
        passes=(_P + _S,),
    ),
}

_NO_FEATURES = {"perceptual_weight": 0.0, "style_weight": 0.0}

# Without the terms on features: what is left for images of 64 x 64 is the host's work.
BARE: dict[str, Method] = {
    "pconv without trunk": Method(
        "PartialConvObjective",
        lambda trunk, i, o: published_pixels(*_images(i)),
        logits=(),
        options=_NO_FEATURES,
    ),
    "ctn without trunk": Method(
        "CTNObjective",
        lambda trunk, i, o: F.l1_loss(i["pred"], i["target"]) + 0.1 * published.log_loss(o["fake"][0], 1.0),
        options=_NO_FEATURES,
    ),
    "lama without trunk": Method(
        "LaMaObjective",
        lambda trunk, i, o: published.lama(
            trunk,
            i["pred"],
            i["target"],
            1 - i["mask"],
            fake=o["fake"][0],
            fake_features=o["fake_features"],
            real_features=o["real_features"],
            perceptual_weight=0.0,
        )["total"],
        matches_features=True,
        options={"perceptual_weight": 0.0},
    ),
}


def published_pixels(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The pixel terms of partial convolution."""
    (total,) = bench_inpainting_pixel.eager(Case((1, 3, 64, 64)))(pred, target, mask)
    return total


def layer_shape(net: str, layer: str) -> tuple[int, int]:
    """(channels, step) of a layer; sides are those of the image over the step."""
    return (
        _ALEXNET[layer]
        if net == "alexnet"
        else _BLOCKS[int(layer.removeprefix("relu").removeprefix("conv")[0])]
    )


def method_of(case: Case) -> Method:
    return {**METHODS, **BARE}[case.options["method"]]


def method_inputs(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Tensor | None]:
    """Images, and what a discriminator returned for the prediction and for the truth."""
    method = method_of(case)
    n, _, h, w = case.shape
    inputs = image_inputs(case, device, generator)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(case.dtype)

    for head, shape in enumerate(method.logits):
        inputs[f"fake{head}"] = random(n, *shape).requires_grad_()
    if method.matches_features:
        for name, (channels, step) in _CRITIC.items():
            inputs[f"fake_{name}"] = random(n, channels, h // step, w // step).requires_grad_()
            inputs[f"real_{name}"] = random(n, channels, h // step, w // step)
    if method.net == "alexnet":
        for place, (channels, _) in enumerate(_ALEXNET.values()):
            inputs[f"head{place}"] = random(channels).abs()
    return inputs


def outputs_of(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of `method_inputs` as the formulas take them; they are taken out of `inputs`."""
    outputs: dict[str, Any] = {"fake": [], "fake_features": [], "real_features": [], "heads": []}
    for name in list(inputs):
        stem = name.rstrip("0123456789")
        key = {"head": "heads"}.get(stem, stem)
        if key in outputs:
            outputs[key].append(inputs.pop(name))
    return outputs


def built(
    case: Case, backend: str | None, chunk: int | None, trunk: Any, heads: Sequence[Tensor]
) -> Objective:
    """Our objective, with masks that are 1 where a pixel is known."""
    import inpaint_kernels as ik

    method = method_of(case)
    options: dict[str, Any] = {
        "trunk": trunk,
        "backend": backend,
        "chunk": chunk,
        "mask_is": "valid",
        **method.options,
    }
    if method.net == "alexnet":
        options["heads"] = [head.float() for head in heads]
    if method.objective == "LaMaObjective" and trunk is not None:
        options["perceptual_layers"] = _STAGES
    objective: Objective = getattr(ik.objectives, method.objective)(method.preset, **options)
    return objective


def total(objective: Objective, images: dict[str, Tensor], outputs: dict[str, Any]) -> Tensor:
    """Of our objective."""
    import inpaint_kernels as ik

    fake, real = outputs["fake"], None
    if len(fake) < 2:
        fake = fake[0] if fake else None
    if outputs["fake_features"]:
        fake = ik.objectives.DiscriminatorOutput(fake, outputs["fake_features"])
        real = ik.objectives.DiscriminatorOutput(None, outputs["real_features"])
    value: Tensor = objective(*_images(images), fake=fake, real=real).total
    return value
