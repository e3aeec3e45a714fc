"""What a benchmark states: cases, inputs, formulas, minimum bytes, tolerances.

A `bench_<op>.py` defines one `BENCHMARK`; `providers.py` builds and checks what is timed, `session.py` times it.
All providers of a case get the same inputs, give the same scalar and the same gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

Terms = tuple[Tensor, ...]
Formula = Callable[..., Terms]

MODES = ("forward", "backward", "full")
# Small enough that the host's work, not the arithmetic, is what a call costs.
SMALL_NUMEL = 1 << 17
# Channels and reduction of VGG16's first three poolings, the maps most inpainting objectives read.
VGG16_POOLS = ((64, 2), (128, 4), (256, 8))
# Those that LPIPS reads: of VGG16 channels and reduction, of AlexNet channels and the poolings before.
VGG16_RELUS = ((64, 1), (128, 2), (256, 4), (512, 8), (512, 16))
ALEXNET_RELUS = ((64, 0), (192, 1), (384, 2), (256, 2), (256, 2))


@dataclass(frozen=True)
class Case:
    """One row group of the tables: a shape, what is special about it, and a dtype."""

    shape: tuple[int, int, int, int]
    variant: str = "mask"
    dtype: torch.dtype = torch.float32
    layout: str = "nchw"
    options: Mapping[str, Any] = field(default_factory=dict)
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = False

    @property
    def name(self) -> str:
        return f"{self.shape_name} {self.variant}"

    @property
    def shape_name(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def numel(self) -> int:
        n, c, h, w = self.shape
        return n * c * h * w


@dataclass(frozen=True)
class Bytes:
    """The fewest bytes any implementation moves: the model that bandwidths are counted by."""

    forward: int
    backward: int

    def of(self, mode: str) -> int:
        return {"forward": self.forward, "backward": self.backward, "full": self.forward + self.backward}[
            mode
        ]


@dataclass(frozen=True)
class Benchmark:
    """One op. `eager`, `rewrite` and `fused` build, for a case, a function `(**inputs) -> terms`.

    The loss that is timed and differentiated is the sum of the terms times `weights`. `tolerances` maps a
    dtype to the largest relative error of the loss and of the gradients against float64; a case may have its own as
    the option "tolerance". `variants` names own
    providers that stand in for one of each backend. `baseline` builds a computation that does less, timed as "plain"
    and not checked. With `layer`, the formulas return one tensor, and no loss is timed with it: its gradient is the
    input `upstream`, which the formulas do not take. Of a `heavy` one a step takes seconds and is spent in library
    convolutions: a few rounds of single steps, bandwidth left out. Without `compiled`, no compiled providers.
    """

    op: str
    cases: Sequence[Case]
    make_inputs: Callable[[Case, torch.device, torch.Generator], dict[str, Tensor | None]]
    eager: Callable[[Case], Formula]
    fused: Callable[[Case, str], Formula]
    minimum_bytes: Callable[[Case], Bytes]
    tolerances: Mapping[torch.dtype, float]
    rewrite: Callable[[Case], Formula | None] = lambda case: None
    baseline: Callable[[Case], Formula | None] = lambda case: None
    weights: tuple[float, ...] = (1.0,)
    variants: tuple[str, ...] = ()
    heavy: bool = False
    compiled: bool = True
    layer: bool = False

    def rounds(self, quick: bool) -> int:
        return (2 if self.heavy else 3) if quick else (5 if self.heavy else 30)


def tiny(case: Case) -> Case:
    """The case at a size that takes no time anywhere, with the same channels and options."""
    n, c, h, w = case.shape
    # Of smaller images, VGG's third layer has so few pixels that entries of Gram matrices come near ties.
    side = 256 if case.options.get("vgg16") else max(64, int(case.options.get("least_side", 0)))
    return replace(case, shape=(min(n, 2), c, min(h, side), min(w, side)), devices=("cpu", "cuda"))


def weighted_sum(terms: Terms, weights: tuple[float, ...]) -> Tensor:
    """The loss, added up as in a training script: no multiplication by 1."""
    total = terms[0] if weights[0] == 1.0 else weights[0] * terms[0]
    for term, weight in zip(terms[1:], weights[1:]):
        total = total + (term if weight == 1.0 else weight * term)
    return total


def image_inputs(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Tensor | None]:
    """A prediction that needs its gradient, a target and a 0/1 mask with rectangular holes, all of one dtype.

    The generator lives on the device, which fills gigabytes while a host would take seconds.

    About a third of the pixels are holes. The mask has the dtype of the images, so that the plain formula is
    not slowed down by type promotion.
    """
    n, c, h, w = case.shape
    memory_format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format

    def image() -> Tensor:
        values = torch.rand((n, c, h, w), generator=generator, device=device) * 2 - 1
        return values.to(case.dtype).contiguous(memory_format=memory_format)

    mask = torch.ones(n, 1, h, w, device=device)
    for sample in mask:
        for _ in range(4):
            top, left = (
                int(torch.randint(0, size, (), generator=generator, device=device)) for size in (h, w)
            )
            sample[:, top : top + h // 2, left : left + w // 2] = 0
    with_mask = bool(case.options.get("mask", True))
    return {
        "pred": image().requires_grad_(),
        "target": image(),
        "mask": mask.to(case.dtype) if with_mask else None,
    }


def randomize(network: torch.nn.Module) -> None:
    """Random weights of convolutions that let features neither vanish nor grow, the same in every layout."""
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d):
            weight = torch.empty(layer.weight.shape)
            layer.weight.data.copy_(torch.nn.init.kaiming_normal_(weight, nonlinearity="relu"))


def feature_inputs(
    case: Case, device: torch.device, generator: torch.Generator, copies: int = 1
) -> dict[str, Tensor | None]:
    """`input<l>` that need their gradients and `target<l>`, like what follows a ReLU, for every layer of `layers`.

    With `copies` = k an input is k predictions of N samples each, stacked. Parts of it, `input<l>_part<j>`, are
    given as well: formulas that take each prediction apart would else pay for the gradient of taking apart.
    Channels of the target are by turns half and four times as large as those of the input, so that no entry of
    the Gram matrices is near a tie, whose sign rounding decides.
    """
    inputs: dict[str, Tensor | None] = {}
    memory_format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    n = case.shape[0]

    def positive(samples: int, shape: Sequence[int]) -> Tensor:
        return torch.randn((samples, *shape), generator=generator, device=device).clamp_(min=0)

    for layer, (c, h, w) in enumerate(layers(case)):
        scale = torch.where(torch.arange(c, device=device) % 2 == 0, 0.5, 4.0).view(1, c, 1, 1)
        stacked, target = (
            t.to(case.dtype).contiguous(memory_format=memory_format)
            for t in (positive(copies * n, (c, h, w)), positive(n, (c, h, w)) * scale)
        )
        inputs[f"input{layer}"], inputs[f"target{layer}"] = stacked.requires_grad_(), target
        if copies > 1:
            for j, part in enumerate(stacked.detach().split(n)):
                inputs[f"input{layer}_part{j}"] = part.requires_grad_()
    return inputs


def layers(case: Case) -> list[tuple[int, int, int]]:
    """(C, H, W) of every layer for images of the case's shape, or the shape itself.

    The option "net" names a net whose maps LPIPS reads; "vgg16" alone means the poolings.
    """
    _, c, h, w = case.shape
    net = case.options.get("net")
    if net == "vgg16":
        return [(channels, h // step, w // step) for channels, step in VGG16_RELUS]
    if net == "alexnet":
        sides = [((side - 7) // 4 + 1, (side - 15) // 8 + 1, (side - 31) // 16 + 1) for side in (h, w)]
        return [(channels, sides[0][i], sides[1][i]) for channels, i in ALEXNET_RELUS]
    if not case.options.get("vgg16"):
        return [(c, h, w)]
    return [(channels, h // step, w // step) for channels, step in VGG16_POOLS]
