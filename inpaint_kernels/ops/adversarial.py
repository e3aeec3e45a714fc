"""Adversarial losses on logits, in plain PyTorch: a few pointwise operators, which `torch.compile` fuses."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference._common import accumulate_dtype
from ..reference.gram import without_autocast
from . import _checks
from ._named_tuples import serializable
from .mask_operators import resized

MODES = ("nonsaturating", "minimax", "hinge", "lsgan", "wgan", "clamped_bce")
Logits = Tensor | Sequence[Tensor]


@serializable
class DiscriminatorLoss(NamedTuple):
    """The discriminator's loss and its two parts, scalars on the device of the logits."""

    total: Tensor
    real: Tensor
    fake: Tensor


def check_options(
    mode: str, half: bool = False, label_smoothing: float = 0.0, extra_hole_weight: float = 0.0
) -> None:
    """The options of both losses, as `nn.GANLoss` takes them, too."""
    _checks.check_choice("mode", mode, MODES)
    if not isinstance(half, bool):
        raise TypeError(f"half must be True or False, got {half!r}")
    if not 0 <= _checks.check_number("label_smoothing", label_smoothing) < 1:
        raise ValueError(f"label_smoothing must be at least 0 and less than 1, got {label_smoothing!r}")
    if label_smoothing and mode in ("hinge", "wgan"):
        raise ValueError(f"label_smoothing: mode {mode!r} has no labels to smooth, got {label_smoothing!r}")
    if _checks.check_number("extra_hole_weight", extra_hole_weight) < 0:
        raise ValueError(f"extra_hole_weight must be at least 0, got {extra_hole_weight!r}")


def as_entries(name: str, logits: Logits) -> dict[str, Tensor]:
    """The logits of every critic, scale or head, by the name an error gives them."""
    if isinstance(logits, tuple) and hasattr(logits, "logits"):
        raise TypeError(f"{name} must be tensors, got a {type(logits).__name__}: pass its .logits")
    given = _checks.as_layers(name, logits)
    entries = (
        {name: given[0]} if isinstance(logits, Tensor) else {f"{name}[{i}]": x for i, x in enumerate(given)}
    )
    for entry, x in entries.items():
        if not isinstance(x, Tensor) or x.dtype not in _checks.FLOATS:
            raise _checks.not_floating(entry, x)
        if x.device != given[0].device:
            raise ValueError(f"{entry} is on {x.device}, {name}[0] is on {given[0].device}")
    return entries


def mean_of_entries(values: list[Tensor]) -> Tensor:
    """Every critic, scale or head counts the same, however many logits it has."""
    return values[0] if len(values) == 1 else functools.reduce(torch.add, values) / len(values)


def mean(value: Tensor) -> Tensor:
    """The mean, 0 of nothing."""
    return value.mean() if value.numel() else value.sum()


def _accumulated(logits: Tensor) -> Tensor:
    dtype = accumulate_dtype(logits)
    return logits if logits.dtype == dtype else logits.to(dtype)


def _softplus(x: Tensor) -> Tensor:
    # PyTorch's default threshold, 20, drops up to 2e-9, which float64 sees.
    return F.softplus(x, threshold=40.0)


def _clamped_bce(x: Tensor, label: float, reduction: str) -> Tensor:
    probability = torch.sigmoid(x)
    labels = torch.full_like(probability, label)
    # Autocast for CUDA refuses this function; the logits are in float32 already.
    with without_autocast(x):
        return F.binary_cross_entropy(probability, labels, reduction=reduction)


def _loss(x: Tensor, mode: str, *, real: bool, smoothing: float = 0.0, reduction: str = "none") -> Tensor:
    """The loss of logits that should be real, or fake: of every one, or its mean, 0 of nothing."""
    if mode == "clamped_bce" and x.numel():
        return _clamped_bce(x, 1 - smoothing if real else 0.0, reduction)
    if mode == "hinge":
        value = F.relu(1 - x if real else 1 + x)
    elif mode == "lsgan":
        value = (x - (1 - smoothing) if real else x).square()
    elif mode in ("wgan", "clamped_bce"):
        value = -x if real else x
    else:
        value = _softplus(-x if real else x)
        if smoothing:
            value = (1 - smoothing) * value + smoothing * _softplus(x)
    return mean(value) if reduction == "mean" else value


def _known(mask: Tensor, name: str, logits: Tensor) -> Tensor:
    """The mask at the resolution of the logits and in their accumulation dtype."""
    if logits.ndim != 4:
        raise ValueError(f"mask needs logits of shape (N, C, H, W), {name} has {tuple(logits.shape)}")
    mask = _checks.check_image_mask(mask, name, logits, (1, logits.shape[0]))
    return resized(mask, logits.shape[-2:], "nearest").to(accumulate_dtype(logits))


def generator_loss(
    logits: Logits,
    *,
    mode: str = "nonsaturating",
    mask: Tensor | None = None,
    extra_hole_weight: float = 0.0,
) -> Tensor:
    """The adversarial loss of the generator, from the discriminator's logits of what it generated.

    ``mean(w * l(x))`` with, by `mode`, ``l(x)``:

    * "nonsaturating": ``softplus(-x)``, the log-loss of the label "real";
    * "minimax": ``-softplus(x)``, the saturating form;
    * "hinge" and "wgan": ``-x``;
    * "lsgan": ``(x - 1)^2``;
    * "clamped_bce": log-loss of a sigmoid with PyTorch's clamps (logs at -100, in the gradient ``p (1 - p)`` at
      1e-12), for parity with released code; its gradient dies for logits below about -27.

    ``w = 1 + extra_hole_weight * h`` with ``h = 1 - mask``, resized to the logits (nearest); the mean divides by the
    number of logits, not by the summed weights.

    Args:
        logits: the discriminator's output before any sigmoid: a tensor of any shape, or a sequence of them (several
            discriminators, scales or heads), of which the result is the mean of each one's own loss. float16 and
            bfloat16 (computed in float32), float32 or float64.
        mode: see above.
        mask: 1 = known, 0 = hole, at any resolution: (N, 1, H, W), (1, 1, H, W) or (H, W); floating, bool or an
            integer (nonzero counts as 1). For logits (N, C, H', W') alone. One that `resize_mask` brought to (H', W')
            in another mode is taken as it is.
        extra_hole_weight: how much more a logit in the hole counts; with 0 the mask has no effect.

    Returns:
        A scalar, float32; float64 if a logit is float64. No logit at all gives 0 with zero gradient.

    Differentiable in `logits` and `mask`, twice; also under torch.func, forward-mode AD and ``torch.compile``.

    Raises:
        TypeError: an argument is no tensor or number, or has a dtype not listed above.
        ValueError: `mode` is unknown, or `mask` does not fit the logits.

    Goodfellow et al., "Generative Adversarial Nets", 2014; Mao et al., "Least Squares GANs", 2017; Arjovsky et al.,
    "Wasserstein GAN", 2017; Lim and Ye, "Geometric GAN", 2017. The mask is that of Suvorov et al., "LaMa", 2022.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> ik.generator_loss(torch.zeros(4, 1))
        tensor(0.6931)
        >>> ik.generator_loss([torch.ones(4, 1), torch.full((4, 1, 8, 8), 3.0)], mode="hinge")
        tensor(-2.)
    """
    check_options(mode, extra_hole_weight=extra_hole_weight)
    values = []
    for name, entry in as_entries("logits", logits).items():
        x = _accumulated(entry)
        known = None if mask is None else _known(mask, name, entry)
        weighted = known is not None and extra_hole_weight != 0
        reduction = "none" if weighted else "mean"
        if mode == "minimax":
            value = -_loss(x, mode, real=False, reduction=reduction)
        else:
            value = _loss(x, "wgan" if mode == "hinge" else mode, real=True, reduction=reduction)
        if known is not None and weighted:
            value = mean(value * (1 + extra_hole_weight * (1 - known)))
        values.append(value)
    return mean_of_entries(values)


def discriminator_loss(
    real_logits: Logits,
    fake_logits: Logits,
    *,
    mode: str = "nonsaturating",
    half: bool = False,
    mask: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> DiscriminatorLoss:
    """The loss of the discriminator: ``real = mean(r(x_real))``, ``fake = mean(f(x_fake))`` and their sum.

    By `mode`:

    * "nonsaturating" and "minimax": ``r(x) = softplus(-x)``, ``f(x) = softplus(x)``;
    * "hinge": ``relu(1 - x)``, ``relu(1 + x)``;
    * "lsgan": ``(x - 1)^2``, ``x^2``;
    * "wgan": ``-x``, ``x``;
    * "clamped_bce": log-loss of a sigmoid with PyTorch's clamps, as in `generator_loss`; its gradient for a fake is 0
      for logits above about 16.7.

    With a mask the known pixels of a fake count as real: ``fake = mean(h * f(x) + (1 - h) * r(x))`` with
    ``h = 1 - mask``, resized to the logits (nearest). `label_smoothing` s changes the label of the real logits alone,
    to 1 - s: ``(1 - s) * softplus(-x) + s * softplus(x)``, or ``(x - (1 - s))^2``.

    Args:
        real_logits: the discriminator's output for real images, before any sigmoid: a tensor of any shape, or a
            sequence of them (several discriminators, scales or heads), of which each part is the mean. float16 and
            bfloat16 (computed in float32), float32 or float64.
        fake_logits: its output for generated images, which the caller has detached from the generator; as many
            entries as `real_logits`. Batches and shapes may differ.
        mode: see above.
        half: the total is the average of the two parts instead of their sum.
        mask: 1 = known, 0 = hole, at any resolution: (N, 1, H, W), (1, 1, H, W) or (H, W) for fake logits
            (N, C, H', W'); floating (fractions belong to both in proportion), bool or an integer (nonzero counts
            as 1).
        label_smoothing: at least 0 and less than 1; refused for "hinge" and "wgan", which have no labels.

    Returns:
        ``DiscriminatorLoss(total, real, fake)``: scalars, float32; float64 if a logit is float64. No logit at all
        gives 0 with zero gradient.

    Differentiable in the logits and `mask`, twice; also under torch.func, forward-mode AD and ``torch.compile``.

    Raises:
        TypeError: an argument is no tensor, number or bool as listed above.
        ValueError: `mode` is unknown, `label_smoothing` is out of range or refused, the numbers of entries differ, or
            `mask` does not fit the fake logits.

    The papers of `generator_loss`; label smoothing: Salimans et al., "Improved Techniques for Training GANs", 2016.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> real, fake = torch.full((2, 1, 4, 4), 3.0), torch.zeros(2, 1, 4, 4)
        >>> ik.discriminator_loss(real, fake, mode="hinge")
        DiscriminatorLoss(total=tensor(1.), real=tensor(0.), fake=tensor(1.))
    """
    check_options(mode, half, label_smoothing)
    reals, fakes = as_entries("real_logits", real_logits), as_entries("fake_logits", fake_logits)
    if len(reals) != len(fakes):
        raise ValueError(f"fake_logits has {len(fakes)} entries, real_logits has {len(reals)}")
    devices = [next(iter(entries.values())).device for entries in (reals, fakes)]
    if devices[0] != devices[1]:
        raise ValueError(f"fake_logits is on {devices[1]}, real_logits is on {devices[0]}")
    values = [
        _loss(_accumulated(x), mode, real=True, smoothing=label_smoothing, reduction="mean")
        for x in reals.values()
    ]
    real = mean_of_entries(values)
    values = []
    for name, entry in fakes.items():
        x = _accumulated(entry)
        if mask is None:
            values.append(_loss(x, mode, real=False, reduction="mean"))
        else:
            known = _known(mask, name, entry)
            values.append(mean((1 - known) * _loss(x, mode, real=False) + known * _loss(x, mode, real=True)))
    fake = mean_of_entries(values)
    total = real + fake
    return DiscriminatorLoss(0.5 * total if half else total, real, fake)
