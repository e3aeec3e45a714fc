"""What the ops on images share: metadata of their outputs, what they save, their backward, global counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..reference._common import accumulate_dtype

accumulate = accumulate_dtype
# Of the images, as their gradients have to be written.
IMAGE = "SymInt[] size, bool channels_last, ScalarType pred_dtype, ScalarType target_dtype"


def is_channels_last(t: Tensor) -> bool:
    """The layout the kernels work in: channels_last, unless the tensor is contiguous as NCHW too."""
    return not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def empty_image(like: Tensor, size: Any, channels_last: bool, dtype: torch.dtype) -> Tensor:
    """An image in NCHW or channels_last strides on `like`'s device."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device=like.device, memory_format=memory_format)


def empties(like: Tensor, dtype: torch.dtype, *sizes: tuple[Any, ...]) -> list[Tensor]:
    """Metadata of small outputs of an op: terms, and the factors that its backward needs."""
    return [like.new_empty(size, dtype=dtype) for size in sizes]


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


def gradients_fake(like: int, size: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Fake of a backward whose arguments are `IMAGE` from number `size` on, and at the end which gradients it needs.

    Argument number `like` is a tensor on the images' device. A gradient that is not needed is an empty vector.
    """

    def fake(*args: Any) -> tuple[Tensor, Tensor]:
        shape, channels_last, *dtypes = args[size : size + 4]
        pred, target = (
            empty_image(args[like], shape, channels_last, dtype)
            if needed
            else args[like].new_empty(0, dtype=dtype)
            for dtype, needed in zip(dtypes, args[-2:], strict=True)
        )
        return pred, target

    return fake


def needs_grad(pred: Tensor, target: Tensor) -> bool:
    """Whether this call will be asked for a gradient."""
    return torch.is_grad_enabled() and (pred.requires_grad or target.requires_grad)


def call(
    op: _library.Op,
    formula: Callable[[], Any],
    backend: str | None,
    tensors: tuple[Tensor, Tensor | None, Tensor | None],
    options: tuple[Any, ...],
    *,
    l1: bool,
    **form: Any,
) -> Any:
    """Runs an op on `tensors`, pred, target and mask: a kernel, which keeps signs for the gradient of `l1`, or the
    reference's `formula`. For `form` see `_library.Op.choose`."""
    pred, target, mask = tensors
    other = pred if target is None else target
    chosen = op.choose(backend, tensors, pred.dtype, other.dtype, mask=mask, **form)
    if chosen == "reference":
        return formula()
    grad = needs_grad(pred, other)
    return op(chosen, grad, *tensors, *options, grad and l1)


def save(
    ctx: Any, pred: Tensor, target: Tensor | None, options: tuple[Any, ...], *kept: Tensor | None
) -> None:
    """Notes what `backward` hands on: the tensors `kept`, `IMAGE`, the options."""
    other = pred if target is None else target
    ctx.image = (pred.shape, is_channels_last(pred), pred.dtype, other.dtype)
    ctx.options = options
    _library.save_for_backward(ctx, *kept)


def save_differences(
    ctx: Any, tensors: tuple[Any, ...], penalty: str, options: tuple[Any, ...], scale: Tensor, signs: Tensor
) -> None:
    """As `save` of pred, target and mask; l1 keeps 2 bits a difference, the other penalties references to both."""
    pred, target, mask = tensors
    kept = (signs, mask, None, None) if penalty == "l1" else (None, mask, pred, target)
    save(ctx, pred, target, options, scale, *kept)


def backward(
    ctx: Any,
    op: _library.Op,
    kernel: Callable[..., Any] | None,
    needs: Any,
    grads: tuple[Tensor | None, ...],
    formula: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """(grad_pred, grad_target) of an op with the backward (*grads, *kept, *IMAGE, *options, need_pred, need_target).

    `kernel` is missing where these gradients are differentiated again. Then they come, in torch, from
    `formula(ctx, *grads, *kept)`. An op without a formula has a gradient that is constant in the images almost
    everywhere (l1) and linear in `grads`: each of them multiplies what the kernel computes for a 1 in its place.
    """
    if all(grad is None for grad in grads):
        return None, None
    needs = needs[:2]
    # Once: under a checkpoint a second look finds nothing.
    saved = ctx.saved_tensors
    if kernel is not None:
        pred, target = kernel(*grads, *saved, *ctx.image, *ctx.options, *needs)
        return pred if needs[0] else None, target if needs[1] else None
    size, channels_last, *dtypes = ctx.image
    if formula is not None:
        terms: list[Sequence[Tensor]] = [formula(ctx, *grads, *saved)]
    else:
        scale = saved[0]
        # Not rounded before they are multiplied.
        image = size, channels_last, scale.dtype, scale.dtype
        terms = []
        for i, grad in enumerate(grads):
            if grad is not None:
                one = [scale.new_ones(grad.shape) if j == i else None for j in range(len(grads))]
                own = op.routes[ctx.backend].backward(*one, *saved, *image, *ctx.options, *needs)
                terms.append([grad * g if needed else g for g, needed in zip(own, needs, strict=True)])
    pred, target = (
        reduce(torch.add, [term[side] for term in terms]).to(dtype) if needs[side] else None
        for side, dtype in enumerate(dtypes)
    )
    return pred, target


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
