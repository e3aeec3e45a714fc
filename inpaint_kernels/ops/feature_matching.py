"""Feature matching on the activations of discriminators: `feature_distance` with their conventions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import _checks
from .feature_distance import checked_distance
from .mask_operators import resized

Features = Tensor | Sequence[Tensor] | Sequence[Sequence[Tensor]]


def _as_discriminators(name: str, features: Features) -> dict[str, list[Tensor]]:
    """The layers of every discriminator, by the name an error gives them."""
    if isinstance(features, tuple) and hasattr(features, "features"):
        raise TypeError(f"{name} must be activations, got a {type(features).__name__}: pass its .features")
    layers = _checks.as_layers(name, features)  # type: ignore[arg-type]
    if isinstance(layers[0], Tensor):
        return {name: layers}
    return {f"{name}[{i}]": _checks.as_layers(f"{name}[{i}]", own) for i, own in enumerate(layers)}


def feature_matching_loss(
    fake: Features,
    real: Features,
    *,
    weights: _checks.LayerWeights = None,
    penalty: str = "l1",
    layer_reduction: str = "sum",
    mask: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """How far a discriminator's activations of generated images are from those of real ones.

    ``sum_l w_l * mean(m_l * p(fake_l - real_l))``, averaged over the discriminators; the mean is over all elements,
    with a mask, too. ``layer_reduction="mean"`` divides by the number of layers. One call of `feature_distance`
    computes all layers of all discriminators.

    Args:
        fake: activations (N, C, H, W) of one layer, a sequence of layers, or a sequence of such sequences for several
            discriminators; float16, bfloat16, float32 or float64. Logits are the caller's to leave out. A batch k
            times that of `real` is k predictions against one truth, as in `feature_distance`.
        real: the same layers for the real images; detached here.
        weights: one factor for each layer, 1 by default, the same for every discriminator; tensors as in
            `feature_distance`.
        penalty: "l1", "l2" (squared error) or "charbonnier".
        layer_reduction: "sum" or "mean".
        mask: a weight at any resolution, resized to every layer (bilinear): (N, 1, H, W), (1, 1, H, W) or (H, W);
            floating, bool or an integer (nonzero counts as 1). LaMa gives 1 on known pixels. What lies under exactly
            0 is ignored, NaN included.
        backend: None (automatic), "reference", "cpu", "triton" or "cuda".

    Returns:
        A scalar, float32; float64 if an activation is float64.

    Differentiable in `fake` (l1: subgradient 0 where it equals `real`), twice; in `mask` and `weights` through the
    reference.

    Raises:
        TypeError: an argument is no floating tensor or sequence of them.
        ValueError: shapes or the numbers of discriminators or layers disagree, `mask` does not fit, or an option is
            unknown.
        RuntimeError: the `backend` asked for cannot run, with the reason.

    Wang et al., "pix2pixHD", 2018 (l1); Suvorov et al., "LaMa", 2022 ("l2" with ``layer_reduction="mean"``).

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> real = [torch.ones(2, 4, 8, 8), torch.ones(2, 8, 4, 4)]
        >>> ik.feature_matching_loss([torch.zeros_like(f) for f in real], real)
        tensor(2.)
        >>> ik.feature_matching_loss([real, real], [real, [2 * f for f in real]])
        tensor(1.)
    """
    fakes, reals = _as_discriminators("fake", fake), _as_discriminators("real", real)
    if len(fakes) != len(reals):
        raise ValueError(f"fake is of {len(fakes)} discriminators, real of {len(reals)}")
    _checks.check_choice("penalty", penalty, ("l1", "l2", "charbonnier"))
    _checks.check_choice("layer_reduction", layer_reduction, ("sum", "mean"))
    inputs, targets, factors, masks = [], [], [], []
    first, (start, *_) = next(iter(fakes.items()))
    for (name, layers), (real_name, truths) in zip(fakes.items(), reals.items(), strict=True):
        if len(layers) != len(truths):
            raise ValueError(f"{name} has {len(layers)} layers, {real_name} has {len(truths)}")
        share = len(fakes) * (len(layers) if layer_reduction == "mean" else 1)
        factors += [factor / share for factor in _checks.layer_weights(weights, len(layers))]
        for i, (x, y) in enumerate(zip(layers, truths, strict=True)):
            _checks.check_features(f"{name}[{i}]", x)
            _checks.check_features(f"{real_name}[{i}]", y)
            batch = y.shape[0]
            if x.shape[1:] != y.shape[1:] or (x.shape[0] % batch if batch else x.shape[0]):
                raise ValueError(
                    f"{real_name}[{i}] has shape {tuple(y.shape)}, {name}[{i}] has {tuple(x.shape)}: allowed are "
                    "equal shapes, or a batch of fakes that is a multiple of the real one"
                )
            if x.device != start.device or y.device != x.device:
                raise ValueError(
                    f"{name}[{i}] is on {x.device}, {real_name}[{i}] on {y.device}, {first}[0] on {start.device}"
                )
            inputs.append(x)
            targets.append(y.detach() if y.requires_grad else y)
            if mask is not None:
                plane = _checks.check_image_mask(mask, f"{name}[{i}]", x, (1, batch, x.shape[0]))
                masks.append(resized(plane, x.shape[-2:], "bilinear"))
    return checked_distance(inputs, targets, masks, factors, penalty, 1e-3, "image", backend)
