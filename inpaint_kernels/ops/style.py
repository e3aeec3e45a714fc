"""Style loss: distance of Gram matrices over one or many layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..reference import style as reference
from ..reference._common import accumulate_dtype
from ..reference.gram import gram_matrix, gram_scale, without_autocast
from . import _checks, _pixel
from .gram import product_flops

NORMALIZATIONS = ("chw", "hw", "none", "gatys")


def _fake(
    backend: str, input: list[Tensor], target: list[Tensor], *options: Any
) -> tuple[Tensor, list[Tensor]]:
    dtype = accumulate_dtype(*input, *target)
    sizes = [(x.shape[0], x.shape[1], x.shape[1]) if options[-1] else (0,) for x in input]
    factors = [x.new_empty(size, dtype=dtype) for x, size in zip(input, sizes, strict=True)]
    return input[0].new_empty((), dtype=dtype), factors


def _backward_fake(grad: Tensor, factors: list[Tensor], features: list[Tensor], sign: float) -> list[Tensor]:
    return [_pixel.empty_image(x, x.shape, _pixel.is_channels_last(x), x.dtype) for x in features]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    features, targets, weights, penalty, normalize, _, _ = inputs
    # Targets are kept only where a gradient is asked for: nothing else needs their features alive.
    wanted = [t if t.requires_grad else None for t in targets]
    _library.save_for_backward(ctx, *output[1], *features, *wanted)
    ctx.settings = (weights, penalty, normalize, [t.shape[0] for t in targets])


def _graph_factor(factor: Tensor, x: Tensor, target: Tensor | None, weight: float, normalize: str) -> Tensor:
    """The factor of an l2 layer as a function of the features: its value is `factor`, its derivative exact."""
    n, c, h, w = x.shape
    constant = 4 * weight * _gram_scale(normalize, x) * reference.style_coefficient(normalize, c, h * w, n)
    gram = gram_matrix(x.to(factor.dtype), normalize=normalize)
    factor = factor + constant * (gram - gram.detach())
    if target is not None:
        gram = gram_matrix(target.to(factor.dtype), normalize=normalize)
        factor = factor - constant * (gram - gram.detach()).repeat(n // gram.shape[0], 1, 1)
    return factor


def _product(factor: Tensor, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    with without_autocast(x):
        return torch.bmm(factor, x.to(factor.dtype).reshape(n, c, h * w)).reshape(n, c, h, w)


def _gram_scale(normalize: str, x: Tensor) -> float:
    return gram_scale(normalize, x.shape[1], x.shape[2] * x.shape[3])


def _backward(ctx: Any, op: Any, needs: Any, grad: Tensor | None) -> tuple[Any, ...]:
    weights, penalty, normalize, batches = ctx.settings
    layers = len(weights)
    saved = ctx.saved_tensors
    factors, features, targets = saved[:layers], saved[layers : 2 * layers], saved[2 * layers :]
    grads: tuple[list[Tensor | None], ...] = ([None] * layers, [None] * layers)
    if grad is None:
        return grads
    for side, (maps, sign) in enumerate(((features, 1.0), (targets, -1.0))):
        wanted = [i for i in range(layers) if needs[side][i]]
        if not wanted:
            continue
        # A factor carries the scale of the input's Gram matrix; the target's differs if its size does.
        ratios = [_gram_scale(normalize, maps[i]) / _gram_scale(normalize, features[i]) for i in wanted]
        if op is not None:
            scaled = [factors[i] if r == 1 else factors[i] * r for i, r in zip(wanted, ratios, strict=True)]
            values = op(grad, scaled, [maps[i] for i in wanted], sign)
        else:
            values = []
            for i, ratio in zip(wanted, ratios, strict=True):
                factor = factors[i]
                if penalty == "l2":
                    factor = _graph_factor(factor, features[i], targets[i], weights[i], normalize)
                if side == 1:
                    factor = _pixel.sum_copies(factor, batches[i])
                values.append((sign * ratio * grad * _product(factor, maps[i])).to(maps[i].dtype))
        for i, value in zip(wanted, values, strict=True):
            grads[side][i] = value
    return grads


def _flops(input: list[Tensor], target: list[Tensor], *options: Any, out_val: Any) -> int:
    _, _, _, target_is_gram, _ = options
    return sum(map(product_flops, input if target_is_gram else [*input, *target]))


_op = _library.Op(
    "style",
    schema="(Tensor[] input, Tensor[] target, float[] weights, str penalty, str normalize, bool target_is_gram, "
    "bool save) -> (Tensor, Tensor[])",
    backward_schema="(Tensor grad, Tensor[] factors, Tensor[] features, float sign) -> Tensor[]",
    outputs=1,
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    backward=_backward,
    lists=True,
    flops=(_flops, lambda grad, factors, features, sign, out_val: sum(map(product_flops, features))),
)


def style_loss(
    input: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    *,
    weights: _checks.LayerWeights = None,
    penalty: str | None = None,
    normalize: str = "chw",
    target_is_gram: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Distance of the Gram matrices of two sets of features, summed over layers.

    ``sum_l w_l * mean(p(G(input_l) - G(target_l)))`` with G as in `gram_matrix`, p the absolute ("l1") or squared
    ("l2") difference, and the mean over all N C C entries. ``normalize="gatys"`` is
    ``sum_l w_l / (4 C^2 M^2) * ||G - G'||_F^2`` with unnormalised G and M = H W, mean over the batch.

    Args:
        input: features (k N, C, H, W) of one layer or a sequence of layers; float16, bfloat16, float32 or float64.
            A batch k times the target's is k predictions, in the order of torch.cat, against one target that is
            read once; the mean is over all k N samples.
        target: features (N, C, H', W') of the same layers, or with `target_is_gram` their Gram matrices (N, C, C).
        weights: one factor for each layer, 1 by default; tensors as in `feature_distance`.
        penalty: "l1" or "l2"; None means "l1", and "l2" for ``normalize="gatys"``, which takes no other.
        normalize: "chw", "hw", "none" or "gatys".
        target_is_gram: `target` holds matrices from `gram_matrix` with the same `normalize` ("none" for "gatys").
        backend: None (automatic), "reference", "cpu", "triton" or "cuda".

    Returns:
        A scalar, float32; float64 if an input is float64.

    Differentiable in `input` and `target`, twice, in given Gram matrices and `weights` through the reference. The
    difference is formed before any rounding, and the backward is one product with a symmetric C x C matrix for each
    layer. It keeps that matrix and a reference to the features. Precision of float32 products, NaN and Inf: see
    `gram_matrix`; make given Gram matrices at the precision they are compared at.

    Raises:
        TypeError: an argument is no floating tensor or sequence of them.
        ValueError: shapes, batches or the number of layers disagree, or an option is unknown.
        RuntimeError: the `backend` asked for cannot run, with the reason.

    Liu et al., 2018 ("chw", "l1"); Gatys et al., 2016 ("gatys").

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> ik.style_loss(torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
        tensor(0.5000)
    """
    inputs, targets = _checks.as_layers("input", input), _checks.as_layers("target", target)
    if len(inputs) != len(targets):
        raise ValueError(f"input has {len(inputs)} layers, target has {len(targets)}")
    _checks.check_choice("normalize", normalize, NORMALIZATIONS)
    if penalty is None:
        penalty = "l2" if normalize == "gatys" else "l1"
    _checks.check_choice("penalty", penalty, ("l1", "l2"))
    if normalize == "gatys" and penalty != "l2":
        raise ValueError("normalize='gatys' is defined with penalty='l2'")
    factors = _checks.layer_weights(weights, len(inputs))
    needs = False
    for layer, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        _check_layer(layer, x, y, inputs[0].device, target_is_gram)
        needs = needs or x.requires_grad or y.requires_grad
    needs = needs and torch.is_grad_enabled()
    features = [*inputs, *targets]
    chosen = _op.choose(
        backend,
        features,
        *[x.dtype for x in features],
        refused=_checks.tensor_weights(factors),
        target=targets if target_is_gram else None,
    )
    if chosen == "reference":
        return reference.style_loss(inputs, targets, factors, penalty, normalize, target_is_gram)
    loss: Tensor = _op(chosen, needs, inputs, targets, factors, penalty, normalize, target_is_gram, needs)
    return loss


def _check_layer(layer: int, x: Tensor, y: Tensor, device: torch.device, target_is_gram: bool) -> None:
    _checks.check_features(f"input[{layer}]", x)
    if target_is_gram:
        if not isinstance(y, Tensor) or y.dtype not in _checks.FLOATS:
            raise TypeError(f"target[{layer}] must be a floating Tensor")
        if y.ndim != 3 or y.shape[1:] != (x.shape[1], x.shape[1]):
            raise ValueError(
                f"target[{layer}] has shape {tuple(y.shape)}, Gram matrices of input[{layer}] have "
                f"(N, {x.shape[1]}, {x.shape[1]})"
            )
    else:
        _checks.check_features(f"target[{layer}]", y)
        if y.shape[1] != x.shape[1]:
            raise ValueError(f"target[{layer}] has {y.shape[1]} channels, input[{layer}] has {x.shape[1]}")
    if x.device != device or y.device != device:
        raise ValueError(f"layer {layer} is on {x.device} and {y.device}, input[0] on {device}")
    _checks.check_batches(layer, x, y.shape[0])
