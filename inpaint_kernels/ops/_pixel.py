"""What masked_l1 and hole_valid share: metadata of their outputs, what they save, global counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _library
from ..reference.masked_l1 import accumulate_dtype, masked_loss_grad


def is_channels_last(t: Tensor) -> bool:
    """The layout the kernels work in: channels_last, unless the tensor is contiguous as NCHW too."""
    return not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def empty_image(like: Tensor, size: Any, channels_last: bool, dtype: torch.dtype) -> Tensor:
    """An image in NCHW or channels_last strides on `like`'s device."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device=like.device, memory_format=memory_format)


def fake_signs(
    pred: Tensor, save_signs: bool, backend: str = "", mask: Tensor | None = None, regions: int = 1
) -> Tensor:
    """Two bits an element, padded to groups of 8 in every channel plane.

    `cpu` appends a byte that tells whether the mask holds zeros and ones only, for two regions followed by such
    a mask packed into bits: its backward then reads no mask.
    """
    n, c, h, w = pred.shape
    groups = (h * w + 7) // 8
    size = 2 * n * c * groups
    if backend == "cpu" and mask is not None:
        size += 1 + (n * groups if regions == 2 and c > 1 else 0)
    return pred.new_empty(size if save_signs else 0, dtype=torch.uint8)


def fake_gradients(
    like: Tensor,
    size: Any,
    channels_last: bool,
    pred_dtype: torch.dtype,
    target_dtype: torch.dtype,
    need_pred: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    """Metadata of (grad_pred, grad_target); one that is not needed is an empty vector."""
    return (
        empty_image(like, size, channels_last, pred_dtype)
        if need_pred
        else like.new_empty(0, dtype=pred_dtype),
        empty_image(like, size, channels_last, target_dtype)
        if need_target
        else like.new_empty(0, dtype=target_dtype),
    )


def needs_grad(pred: Tensor, target: Tensor) -> bool:
    """Whether this call will be asked for a gradient."""
    return torch.is_grad_enabled() and (pred.requires_grad or target.requires_grad)


class Saved(NamedTuple):
    """What a forward kept, in the order of the backward schemas: signs for l1, else pred and target."""

    scale: Tensor
    signs: Tensor | None
    mask: Tensor | None
    pred: Tensor | None
    target: Tensor | None


def save_for_backward(
    ctx: Any, pred: Tensor, target: Tensor, mask: Tensor | None, penalty: str, scale: Tensor, signs: Tensor
) -> None:
    """l1 keeps 2 bits an element; the other penalties keep references to pred and target."""
    kept = (signs, None) if penalty == "l1" else (pred, target)
    _library.save_for_backward(ctx, scale, mask, *kept)
    ctx.penalty = penalty
    ctx.image = (pred.shape, is_channels_last(pred), pred.dtype, target.dtype)


def saved(ctx: Any) -> Saved:
    """The tensors of `save_for_backward`, pred and target connected to the graph."""
    scale, mask, first, second = ctx.saved_tensors
    if ctx.penalty == "l1":
        return Saved(scale, first, mask, None, None)
    return Saved(scale, None, mask, first, second)


def gradient_formula(ctx: Any, kept: Saved, coefficient: Tensor, weight: Tensor | None) -> Tensor:
    """coefficient * weight * penalty'(d) as a differentiable expression, for `create_graph=True`."""
    if kept.pred is not None and kept.target is not None:
        return masked_loss_grad(kept.pred, kept.target, weight, coefficient, ctx.penalty, ctx.param)
    assert kept.signs is not None
    # l1 is constant almost everywhere: its second derivative by pred and target is zero.
    size, channels_last = ctx.image[:2]
    value = coefficient * unpack_signs(kept.signs, size, channels_last, kept.scale.dtype)
    return value if weight is None else value * weight.to(value.dtype)


def as_gradients(ctx: Any, value: Tensor, needs: tuple[bool, ...]) -> tuple[Tensor | None, Tensor | None]:
    """(grad_pred, grad_target) from the gradient by the difference."""
    _, _, pred_dtype, target_dtype = ctx.image
    return value.to(pred_dtype) if needs[0] else None, -value.to(target_dtype) if needs[1] else None


def unpack_signs(signs: Tensor, size: Any, channels_last: bool, dtype: torch.dtype) -> Tensor:
    """+1, 0, -1 of every element, from the packed bits; only the second derivative needs them unpacked."""
    n, c, h, w = size
    length = h * w * c if channels_last else h * w
    segments = n if channels_last else n * c
    groups = (length + 7) // 8
    packed = signs[: 2 * segments * groups].view(segments, groups, 2, 1)
    bits = (packed >> torch.arange(8, device=signs.device, dtype=torch.uint8)) & 1
    sign = (bits[:, :, 0].to(dtype) - bits[:, :, 1].to(dtype)).view(segments, groups * 8)[:, :length]
    if channels_last:
        return sign.reshape(n, h, w, c).permute(0, 3, 1, 2)
    return sign.reshape(n, c, h, w)


def sum_copies(value: Tensor, batch: int) -> Tensor:
    """(k N, ...) summed over the k predictions to (N, ...)."""
    return value if value.shape[0] == batch else value.reshape(-1, batch, *value.shape[1:]).sum(0)


def global_factor(local: Tensor, process_group: Any) -> Tensor:
    """world_size / (sum of `local` over the group), 0 where that sum is 0; no gradient.

    DDP averages gradients over the ranks, so a local sum times this factor has the gradient of the global mean.
    """
    import torch.distributed as dist

    total = local.detach().to(torch.float64, copy=True)
    dist.all_reduce(total, group=process_group)
    empty = total == 0
    return torch.where(empty, 0.0, dist.get_world_size(process_group) / torch.where(empty, 1.0, total))


def global_means(local: Sequence[Tensor], counts: Sequence[Tensor], process_group: Any) -> list[Tensor]:
    """Means over all ranks from those of this one, each of so many elements: one all-reduce of all the counts."""
    count = torch.stack(list(counts))
    factors = (count * global_factor(count, process_group)).unbind()
    return [value * factor.to(value.dtype) for value, factor in zip(local, factors, strict=True)]


def mean_count(image: Tensor, weight: Tensor | None, normalize: str) -> Tensor:
    """What a mean is of: summed weights for "mask", elements for "image" or without weights, samples for "sample"."""
    if weight is not None and normalize == "mask":
        return weight.detach().expand(image.shape).sum(dtype=torch.float64)
    count = image.shape[0] if normalize == "sample" else image.numel()
    return image.new_full((), count, dtype=torch.float64)


def check_group(process_group: Any, mask: Tensor | None = None) -> None:
    """A group that this process is in, and a mask without gradient: a global mean's would lack a term, as the counts
    are detached."""
    if mask is not None and (
        (mask.requires_grad and torch.is_grad_enabled()) or _library.transform_of((mask,)) is not None
    ):
        raise ValueError(
            "process_group computes no derivative by mask; use mask.detach(), outside of torch.func"
        )
    import torch.distributed as dist

    if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a torch.distributed.ProcessGroup that this process is in, such as "
            f"torch.distributed.group.WORLD, got {process_group!r}"
        )


def accumulate(pred: Tensor, target: Tensor) -> torch.dtype:
    """dtype of losses and sums."""
    return accumulate_dtype(pred, target)
