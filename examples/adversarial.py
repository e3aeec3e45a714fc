"""The discriminator of the training example, and its side of the alternating steps.

One small network serves every method: what a method publishes as its loss is in `methods`, and its own discriminator
would take the place of `PatchDiscriminator`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from data import Batch
from methods import Published
from options import Settings
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from world import World

if TYPE_CHECKING:
    from methods import Judged

    from inpaint_kernels.objectives import DiscriminatorOutput

# Of the generator's learning rate, as in EdgeConnect.
RATE = 0.1


class PatchDiscriminator(nn.Module):
    """Logits of overlapping patches: three convolutions of stride 2 and one of stride 1, spectrally normalised.

    Args:
        channels: of the images.
        width: channels of the first layer; the next two have 2 and 4 times as many.
        with_features: return the activations before the last convolution, too.
    """

    def __init__(self, channels: int, width: int, with_features: bool) -> None:
        super().__init__()
        self.with_features = with_features
        self.layers = nn.ModuleList(
            spectral_norm(nn.Conv2d(before, after, 4, 2, 1))
            for before, after in ((channels, width), (width, 2 * width), (2 * width, 4 * width))
        )
        self.logits = spectral_norm(nn.Conv2d(4 * width, 1, 4, 1, 1))

    def forward(self, images: Tensor) -> Tensor | DiscriminatorOutput:
        features = []
        for layer in self.layers:
            images = F.leaky_relu(layer(images), 0.2)
            features.append(images)
        logits: Tensor = self.logits(images)
        if not self.with_features:
            return logits
        from inpaint_kernels.objectives import DiscriminatorOutput

        return DiscriminatorOutput(logits, features)


class Discriminators(nn.ModuleList):
    """One for each head of a method, called with the images of each; of one head, with the images themselves."""

    def forward(self, shown: Tensor | list[Tensor]) -> Judged:
        if isinstance(shown, Tensor):
            judged: Judged = self[0](shown)
            return judged
        return [head(images) for head, images in zip(self, shown, strict=True)]


@dataclass
class Judgement:
    """What the discriminators say of a prediction. The loss is differentiated as far as to the copies ``fake``, so
    that its time and memory can be told from theirs; ``backward`` goes on to the prediction.
    """

    graph: Judged
    fake: Judged
    real: Judged | None

    def backward(self, pred: Tensor) -> None:
        # With `inputs` the discriminators' own gradients are not computed.
        gradients = [copied.grad for copied in tensors(self.fake)]
        torch.autograd.backward(list(tensors(self.graph)), gradients, inputs=[pred])


class Adversary:
    """The discriminators, their optimiser and their steps."""

    def __init__(self, objective: Published, settings: Settings, world: World) -> None:
        self.objective, self.settings, self.world = objective, settings, world
        picture = torch.zeros(1, 3, 8, 8, device=world.device)
        shown = objective.shown(picture, picture, picture[:, :1])
        heads = [shown] if isinstance(shown, Tensor) else shown
        self.net = Discriminators(
            PatchDiscriminator(images.shape[1], settings.width, objective.matches_features)
            for images in heads
        ).to(world.device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), betas=(0.0, 0.9))
        self.scaler = world.scaler(settings.amp)
        self.network: nn.Module = self.net
        self.penalty = torch.zeros((), device=world.device)

    def begin(self) -> None:
        self.network = self.world.parallel(self.net)

    def judge(self, pred: Tensor, batch: Batch) -> Judgement:
        """Of the prediction for a batch, to train the generator."""
        real = None
        with self.world.autocast(self.settings.amp):
            if self.objective.matches_features:
                with torch.no_grad():
                    real = self.net(self.objective.shown(batch.images, batch.images, batch.masks))
            graph = self.net(self.objective.shown(pred, batch.images, batch.masks))
        return Judgement(graph, mapped(lambda tensor: tensor.detach().requires_grad_(), graph), real)

    def step(self, pred: Tensor, batch: Batch, rate: float, step: int) -> list[Tensor]:
        """Trains the discriminators; returns their loss, and the penalty when it was last taken."""
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = RATE * rate
        objective, truth = self.objective, batch.images
        with self.world.autocast(self.settings.amp):
            real, fake = (self.network(objective.shown(image, truth, batch.masks)) for image in (truth, pred))
        loss = total = objective.discriminator_loss(real, fake, batch.masks)
        interval = objective.penalty_interval
        if interval and step % interval == 0:
            # Without autocast: the gradient of a gradient is too small for half types.
            penalty = objective.penalty(self.network, truth, batch.masks)
            # Taken less often, it counts for the steps in between.
            total = loss + interval * penalty
            self.penalty = penalty.detach()
        self.scaler.scale(total).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return [loss.detach(), self.penalty]

    def state(self) -> dict[str, Any]:
        return {
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "penalty": self.world.average(self.penalty.clone()),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        self.penalty = state["penalty"].to(self.penalty)


def mapped(function: Callable[[Tensor], Tensor], judged: Judged) -> Judged:
    """The same output of a discriminator, made of what the function returns for each tensor."""
    if isinstance(judged, Tensor):
        return function(judged)
    parts: list[Any] = [mapped(function, part) for part in judged]
    return type(judged)(*parts) if isinstance(judged, tuple) else parts


def tensors(judged: Judged | None) -> Iterator[Tensor]:
    if isinstance(judged, Tensor):
        yield judged
    elif judged is not None:
        for part in judged:
            yield from tensors(part)
