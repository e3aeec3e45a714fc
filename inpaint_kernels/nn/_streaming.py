"""Losses on frozen-trunk features, plain or streamed.

A frozen trunk needs no activation after its own backward. Streaming therefore runs trunk forward and backward for a
few samples at a time while the loss is computed, and keeps only the gradient of the images. It does so in as many
trunk passes as there are chunks, each over as many images as in the plain path; one chunk is not copied at all.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..features.trunk import FrozenTrunk, check_size
from ..ops import _checks

# A frozen trunk, or what calls one.
Trunk = Callable[[Tensor], list[Tensor]]
# (features of the predictions, what they are compared with) -> scalar, a mean over the samples
Term = Callable[[list[Tensor], Any], Tensor]
# (rows of pred, first sample, end) -> (images the trunk reads, what the terms compare their features with)
Inputs = Callable[[Tensor, int, int], tuple[Tensor, Any]]


class _RefuseSecond(torch.autograd.Function):
    """kept * grad; a derivative of it is refused, because the activations it needs are gone.

    `link` leads to `pred`: the error is met on the way there, also with `allow_unused=True`.
    """

    @staticmethod
    def forward(ctx: Any, kept: Tensor, grad: Tensor, link: Tensor, dtype: torch.dtype) -> Tensor:
        return (kept * grad).to(dtype)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        raise RuntimeError(
            "the streamed loss keeps no activations, so it has no second derivative; "
            "use the plain path (chunk=None) under create_graph=True"
        )


class _Kept(torch.autograd.Function):
    """The weighted total of `values`, whose gradient by `pred` is `kept`."""

    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, kept: Tensor, weights: Sequence[float], *values: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Saving `pred` itself as the way to it would keep it alive.
        link = kept.new_empty(0)
        ctx.save_for_backward(kept, link)
        ctx.dtype = pred.dtype
        ctx.set_materialize_grads(False)
        return weighted_sum(values, weights), link

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> Any:
        nothing = (None,) * (len(ctx.needs_input_grad) - 1)
        if grad is None:
            return None, *nothing
        kept, link = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _RefuseSecond.apply(kept, grad, link, ctx.dtype), *nothing
        return (kept * grad).to(ctx.dtype), *nothing


def weighted_sum(values: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    # Without multiplications by 1: of small images a launch is what a term costs.
    parts = [value if weight == 1 else value * weight for value, weight in zip(values, weights, strict=True)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _power_of_two(x: Tensor, low: float, high: float) -> Tensor:
    """The power of two at or below |x|, its exponent bits, within [low, high]: exact and without a host sync."""
    bits = x.detach().to(torch.float32).view(torch.int32)
    return (bits & 0x7F800000).view(torch.float32).clamp(low, high)


def _computes_in_float16(trunk: Trunk, features: Sequence[Tensor]) -> bool:
    trunk = getattr(trunk, "func", trunk)  # of a functools.partial that chooses layers
    kind = features[0].device.type
    ambient = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    dtypes = {ambient, getattr(trunk, "autocast", None), getattr(trunk, "dtype", None)}
    return torch.float16 in dtypes | {feature.dtype for feature in features}


def _image_gradient(
    images: Tensor, features: Sequence[Tensor], leaves: Sequence[Tensor], total: Tensor, half: bool
) -> Tensor:
    """Gradient of `total`, a function of the `leaves` with the values of `features`, by the `images`.

    With `half`, gradients in the trunk are float16, which a GradScaler cannot save: it multiplies only afterwards.
    They are scaled in between by powers of two that the device finds, so that dividing them out is exact: first by
    about numel / loss, which brings the gradient of a mean to the order of the features' inverse, then so that the
    largest gradient at a tap is about 16. That leaves a factor of 2^11 for gradients to grow on their way to the
    images, and of 2^18 below the largest to normal numbers.
    """
    scale = upstream = None
    if half:
        numel = max(feature.numel() for feature in features)
        # At least 2^-4: the gradient of an absolute value does not vanish with the loss.
        scale = 2.0 ** (numel.bit_length() - 1) / _power_of_two(total, 2.0**-4, 2.0**60)
        upstream = scale.to(total.dtype)
    tap_grads = torch.autograd.grad(total, leaves, upstream, allow_unused=True)
    used = [feature for feature, grad in zip(features, tap_grads, strict=True) if grad is not None]
    grads = [grad for grad in tap_grads if grad is not None]
    if scale is not None:
        norms = [torch.linalg.vector_norm(grad, float("inf")).to(torch.float32) for grad in grads]
        # Within what float16 holds, as the factor is read in the dtype of the gradients.
        rescale = 16 / _power_of_two(torch.stack(norms).amax(), 2.0**-11, 2.0**15)
        grads = [grad * rescale for grad in grads]
        scale = scale * rescale
    (gradient,) = torch.autograd.grad(used, images, grads)
    return gradient if scale is None else gradient / scale


def _chunk_of(
    trunk: Trunk,
    terms: Sequence[Term],
    weights: Sequence[float],
    inputs: Inputs,
    wanted: bool,
    rows: Tensor,  # of pred [k * n, C, H, W]
    begin: int,
    end: int,
    share: float,
) -> tuple[list[Tensor], Tensor | None]:
    """(terms times `share`, gradient of their weighted sum by the rows of pred: float32 for half images)."""
    rows = rows.detach()
    if wanted and rows.dtype in (torch.float16, torch.bfloat16):
        rows = rows.to(torch.float32)
    with torch.set_grad_enabled(wanted):
        leaf = rows.requires_grad_() if wanted else rows
        images, truth = inputs(leaf, begin, end)
        features = trunk(images)
        leaves = [feature.detach().requires_grad_(wanted) for feature in features]
        values = [term(leaves, truth) for term in terms]
        if share != 1:
            values = [value * share for value in values]
        total = weighted_sum(values, weights)
    gradient = None
    if wanted:
        half = rows.numel() > 0 and _computes_in_float16(trunk, features)
        # As in the plain path, where the caller's autocast is over before the backward.
        with torch.autocast(rows.device.type, enabled=False):
            gradient = _image_gradient(leaf, features, leaves, total, half)
    return [value.detach() for value in values], gradient


def check_chunk(chunk: int | None) -> int | None:
    """None, or how many samples are streamed at a time."""
    if chunk is not None and (not isinstance(chunk, int) or isinstance(chunk, bool) or chunk < 1):
        raise ValueError(f"chunk must be None or a positive number of samples, got {chunk!r}")
    return chunk


def check_learned(**values: Any) -> None:
    """What a streamed loss computes no gradient to must not require one."""
    for name, value in values.items():
        tensors = value if isinstance(value, Sequence) else [value]
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
            raise ValueError(
                f"{name} requires a gradient, which the streamed loss does not compute; chunk=None does"
            )


def check_images(pred: Tensor, target: Tensor) -> None:
    """pred (k N, C, H, W) against target (N, C, H, W)."""
    for name, value in (("pred", pred), ("target", target)):
        # Bytes from 0 to 255 would pass for values of the range that the network expects.
        _checks.check_features(name, value)
    batch, samples = pred.shape[0], target.shape[0]
    batches_fit = batch > 0 and batch % samples == 0 if samples else batch == 0
    if not batches_fit or pred.shape[1:] != target.shape[1:]:
        raise ValueError(
            f"pred has shape {tuple(pred.shape)}; for target {tuple(target.shape)} it must be the same, "
            "or a whole number of batches of it, 1 or more, in the order of torch.cat"
        )


def weighted_terms(
    trunk: Trunk,
    terms: Sequence[Term],
    weights: Sequence[float],
    inputs: Inputs,
    pred: Tensor,  # [k * N, C, H, W]
    samples: int,
    chunk: int | None,
) -> tuple[Tensor, ...]:
    """(weighted total, *terms) of one trunk pass over what `inputs` makes of `pred`.

    Streamed (`chunk` of the N samples at a time), only the total is differentiable, and in `pred` alone.
    """
    if chunk is None:
        images, truth = inputs(pred, 0, samples)
        features = trunk(images)
        values = [term(features, truth) for term in terms]
        return (weighted_sum(values, weights), *values)
    _checks.check_streamed(pred)
    # Decided here: inside an autograd.Function an input needs a gradient even under no_grad.
    wanted = pred.requires_grad and torch.is_grad_enabled()
    step = functools.partial(_chunk_of, trunk, terms, weights, inputs, wanted)
    kept: Tensor | None = None
    values = []
    if chunk >= samples:
        values, kept = step(pred, 0, samples, 1.0)
    else:
        for begin in range(0, samples, chunk):
            end = min(begin + chunk, samples)
            pieces = [prediction[begin:end] for prediction in pred.split(samples)]
            rows = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            added, gradient = step(rows, begin, end, (end - begin) / samples)
            values = [old + new for old, new in zip(values, added, strict=True)] if values else added
            if gradient is not None:
                kept = torch.empty_like(pred, dtype=gradient.dtype) if kept is None else kept
                kept_rows = kept.unflatten(0, (len(pieces), samples))[:, begin:end]
                kept_rows.copy_(gradient.unflatten(0, (len(pieces), end - begin)))
    if not wanted:
        return (weighted_sum(values, weights), *values)
    total, _ = _Kept.apply(pred, kept, weights, *values)
    return (total, *values)


def trunk_terms(
    trunk: FrozenTrunk,
    terms: Sequence[Term],
    weights: Sequence[float],
    pred: Tensor,
    target: Tensor,
    chunk: int | None,
) -> tuple[Tensor, ...]:
    """`weighted_terms` of predictions, read by the trunk as they are, against the features of a target."""
    check_images(pred, target)
    check_size(trunk, "pred", pred)
    target_grad = target.requires_grad and torch.is_grad_enabled()
    if chunk is not None:
        check_learned(target=target)
        _checks.check_streamed(target)

    def inputs(rows: Tensor, begin: int, end: int) -> tuple[Tensor, list[Tensor]]:
        with torch.set_grad_enabled(target_grad):
            return rows, trunk(target[begin:end])

    return weighted_terms(trunk, terms, weights, inputs, pred, target.shape[0], chunk)
