"""The distance of LPIPS: of feature vectors of length 1, channel by channel with given weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..reference import lpips as reference
from ..reference._common import accumulate_dtype
from . import _checks, _pixel

# Of the layers whose gradients a backward computes: which ones.
WANT_INPUT, WANT_TARGET = 1, 2


def _fake(
    backend: str,
    input: list[Tensor],
    target: list[Tensor],
    weights: list[Tensor],
    mask: list[Tensor],
    eps: float,
    save: bool,
) -> tuple[Tensor, list[Tensor]]:
    dtype = accumulate_dtype(*input, *target)
    sizes = [(4, x.shape[0], *x.shape[2:]) if save else (0,) for x in input]
    saved = [x.new_empty(size, dtype=dtype) for x, size in zip(input, sizes, strict=True)]
    return input[0].new_empty(input[0].shape[0], dtype=dtype), saved


def _backward_fake(
    grad: Tensor,
    input: list[Tensor],
    target: list[Tensor],
    weights: list[Tensor],
    mask: list[Tensor],
    saved: list[Tensor],
    wanted: list[int],
) -> list[Tensor]:
    return [
        _pixel.empty_image(maps, maps.shape, _pixel.is_channels_last(maps), maps.dtype)
        for x, y, flags in zip(input, target, wanted, strict=True)
        for maps, flag in ((x, WANT_INPUT), (y, WANT_TARGET))
        if flags & flag
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    features, targets, weights, masks, eps, _ = inputs
    _library.save_for_backward(ctx, *features, *targets, *weights, *output[1], *masks)
    ctx.settings = (eps, len(features))


def _backward(ctx: Any, kernel: Any, needs: Any, grad: Tensor | None) -> tuple[Any, ...]:
    eps, count = ctx.settings
    grads: tuple[list[Tensor | None], list[Tensor | None]] = ([None] * count, [None] * count)
    flags = [WANT_INPUT * needs[0][i] + WANT_TARGET * needs[1][i] for i in range(count)]
    wanted = [i for i in range(count) if flags[i]]
    if grad is None or not wanted:
        return grads
    # Once: under a checkpoint a second look finds nothing.
    kept = ctx.saved_tensors
    parts = [list(kept[count * part : count * (part + 1)]) for part in range(5)]
    if kernel is not None:
        # Without masks the last part is empty.
        chosen = [[part[i] for i in wanted] if part else [] for part in parts]
        inputs, targets, weights, saved, masks = chosen
        found = iter(kernel(grad, inputs, targets, weights, masks, saved, [flags[i] for i in wanted]))
        for i in wanted:
            for side in (0, 1):
                if needs[side][i]:
                    grads[side][i] = next(found)
        return grads
    inputs, targets, weights, _, masks = parts
    for i in wanted:
        x, y = inputs[i], targets[i]
        by_x, by_y = reference.lpips_gradients(x, y, weights[i], masks[i] if masks else None, grad, eps)
        grads[0][i] = by_x.to(x.dtype) if needs[0][i] else None
        grads[1][i] = _pixel.sum_copies(by_y, y.shape[0]).to(y.dtype) if needs[1][i] else None
    return grads


# Forward: (values, saved). values (k N,) are sums over the layers, float32, or float64 if a map is float64. saved, of
# the same dtype and only for the backward, holds (4, k N, H, W) for each layer, else tensors of shape (0,). With
# r = 1/(|a| + eps), s = 1/(|b| + eps) and d_c = a_c r - b_c s of a pixel of input and target:
#   [0] r, [1] s, [2] 2 (sum_c w_c d_c a_c) r^2 / |a|, [3] -2 (sum_c w_c d_c b_c) s^2 / |b|,
# [0] and [2] are 0 for a zero vector a, [1] and [3] for a zero vector b, and all four where the mask is 0.
# Backward: of each layer (those without a wanted gradient are left out) the gradient by the input if `wanted` has
# bit 1, then by the target if it has bit 2, in the shapes, dtypes and layouts (NCHW or channels_last) of both. With
# f = grad[n] m(p) / sum_p m(p), or grad[n] / (H W) without a mask, and 0 where the mask is 0 or empty:
#   da_c = f (2 w_c r d_c - a_c saved[2]),  db_c = sum over the k predictions of f (-2 w_c s d_c - b_c saved[3]).
# Weights are (C,) each, of any floating dtype. `mask` is empty or holds for each layer (H, W) or
# (1 | N | k N, 1, H, W), floating or bool, of any strides.
_op = _library.Op(
    "lpips",
    schema="(Tensor[] input, Tensor[] target, Tensor[] weights, Tensor[] mask, float eps, bool save) "
    "-> (Tensor, Tensor[])",
    backward_schema="(Tensor grad, Tensor[] input, Tensor[] target, Tensor[] weights, Tensor[] mask, "
    "Tensor[] saved, int[] wanted) -> Tensor[]",
    outputs=1,
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    backward=_backward,
    backends=("cpu", "triton"),
    lists=True,
)


def lpips_distance(
    input: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    weights: Tensor | Sequence[Tensor],
    *,
    mask: Tensor | Sequence[Tensor] | None = None,
    eps: float = 1e-10,
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Distance of LPIPS between two sets of feature maps, from weights for their channels.

    ``sum_l mean_p sum_c w_lc (u_lpc - v_lpc)^2`` for each sample, with the unit vectors ``u = a / (|a| + eps)`` of
    every pixel's channels in `input` and v likewise in `target`. A zero vector stays zero, with gradient 0.

    Args:
        input: features (k N, C, H, W) of one layer or a sequence of layers; float16, bfloat16, float32 or float64.
            A batch k times the target's is k predictions, in the order of torch.cat (raw and composite against
            truth), against one target that is read once.
        target: features (N, C, H, W) of the same layers; the dtype may differ.
        weights: one non-negative tensor (C,) for each layer, floating, on the device of the features. Negative
            numbers are refused on the CPU; to look at those on a GPU would be to wait for it.
        mask: spatial weights at the layers' resolutions, one for each layer: (H, W), or (B, 1, H, W) with B = 1, N
            (shared by the predictions) or k N; floating weights, bool or integers (nonzero counts as 1). The mean
            over a sample's pixels is then the weighted one, 0 if the mask is empty. Where a mask is exactly 0, NaN
            and Inf are ignored.
        eps: added to the norms.
        reduction: "mean" over all k N samples, "sum" of them, or "none".
        backend: None (automatic), "reference", "cpu" or "triton".

    Returns:
        A scalar, or (k N,) with "none"; float32, float64 if an input is float64. Equal features give exactly 0; on
        "reference" if both are NCHW or both channels_last, for it adds up channels in the order of their memory.

    Differentiable in `input` and `target`, twice. Besides references to both it keeps four numbers a pixel of each
    layer. If `weights` or a mask require a gradient the differentiable reference runs instead of a kernel.

    Raises:
        TypeError: an argument is no floating tensor or sequence of them.
        ValueError: shapes, batches or the number of layers disagree, a weight is negative, or an option is unknown.
        RuntimeError: the `backend` asked for cannot run, with the reason.

    Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", 2018.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> a, b = torch.eye(2).reshape(2, 1, 2, 1, 1)  # of one pixel each: (1, 0) and (0, 1)
        >>> ik.lpips_distance([a], [b], [torch.tensor([1.0, 0.5])])
        tensor(1.5000)
    """
    inputs, targets = _checks.as_layers("input", input), _checks.as_layers("target", target)
    heads = _checks.as_layers("weights", weights)
    masks = [] if mask is None else _checks.as_layers("mask", mask)
    for name, given in (("target", targets), ("weights", heads), ("mask", masks)):
        if len(given) != len(inputs) and (given or name != "mask"):
            raise ValueError(f"{name} has {len(given)} layers, input has {len(inputs)}")
    eps = _checks.check_positive("eps", eps)
    _checks.check_choice("reduction", reduction, _checks.REDUCTIONS)
    for layer, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        _checks.check_features(f"input[{layer}]", x)
        _checks.check_features(f"target[{layer}]", y)
        _checks.check_batches(layer, x, y.shape[0])
        if x.shape[1:] != y.shape[1:]:
            raise ValueError(
                f"target[{layer}] has shape {tuple(y.shape)}, input[{layer}] has {tuple(x.shape)}"
            )
        if x.shape[0] != inputs[0].shape[0]:
            raise ValueError(f"input[{layer}] has a batch of {x.shape[0]}, input[0] of {inputs[0].shape[0]}")
        if x.device != inputs[0].device or y.device != inputs[0].device:
            raise ValueError(f"layer {layer} is on {x.device} and {y.device}, input[0] on {inputs[0].device}")
        _check_weights(layer, heads[layer], x)
        if masks:
            own = masks[layer]
            shared = isinstance(own, Tensor) and own.ndim == 4 and own.shape[0] == y.shape[0]
            masks[layer] = _checks.check_plane(_checks.check_mask(own, y if shared else x))
    return checked_distance(inputs, targets, heads, masks, eps, reduction, backend)


def _check_weights(layer: int, weight: Tensor, features: Tensor) -> None:
    if not isinstance(weight, Tensor) or weight.dtype not in _checks.FLOATS:
        raise _checks.not_floating(f"weights[{layer}]", weight)
    if weight.shape != features.shape[1:2]:
        raise ValueError(
            f"weights[{layer}] has shape {tuple(weight.shape)}, input[{layer}] has {features.shape[1]} channels"
        )
    if weight.device != features.device:
        raise ValueError(f"weights[{layer}] is on {weight.device}, input[{layer}] on {features.device}")
    # Not where that would wait for a device, or where something else than numbers is computed.
    if weight.device.type == "cpu" and weight.numel() and _library.is_plain((weight,)):
        least = float(weight.detach().min())
        if not least >= 0:
            raise ValueError(f"weights[{layer}] must not be negative, got {least:g}")


def checked_distance(
    inputs: list[Tensor],
    targets: list[Tensor],
    weights: list[Tensor],
    masks: list[Tensor],
    eps: float,
    reduction: str,
    backend: str | None,
) -> Tensor:
    """`lpips_distance` of arguments that fit each other; no masks are an empty list."""
    features = [*inputs, *targets]
    chosen = _op.choose(
        backend, [*features, *weights, *masks], *[x.dtype for x in features], weights=weights, mask=masks
    )
    if chosen == "reference":
        return reference.lpips_distance(inputs, targets, weights, masks or None, eps=eps, reduction=reduction)
    needs = torch.is_grad_enabled() and any(x.requires_grad for x in features)
    values = _op(chosen, needs, inputs, targets, weights, masks, eps, needs)
    return reference.reduce_samples(values, reduction)
