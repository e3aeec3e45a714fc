"""The training objective, twice: with the fused loss and with the eager formulas it replaces.

The only place that builds losses; a further objective is one more function here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from data import InputError
from torch import Tensor

HOLE_WEIGHT, VALID_WEIGHT = 6.0, 1.0


class Terms(NamedTuple):
    """Scalars on the device: ``total = 6 hole + valid``."""

    total: Tensor
    hole: Tensor
    valid: Tensor


Objective = Callable[[Tensor, Tensor, Tensor], Terms]


def weighted(hole: Tensor, valid: Tensor) -> Terms:
    return Terms(HOLE_WEIGHT * hole + VALID_WEIGHT * valid, hole, valid)


def make_objective(
    kind: str,
    *,
    normalize: str = "image",
    backend: str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Objective:
    """A function of (pred [N, 3, H, W], target, mask [N, 1, H, W] with 1 = known).

    Args:
        kind: "fused" or "eager".
        normalize: "image" divides both terms by the number of elements of ``pred``, "mask" each by the
            size of its region, over all processes of ``group``.
        backend: which implementation of the fused loss, as ``fused_backend`` says; None chooses by device.
        group: the DDP process group, None for a single process.
    """
    if kind == "eager":
        return _eager(normalize, group)
    return _fused(normalize, backend, group)


def _fused(normalize: str, backend: str | None, group: dist.ProcessGroup | None) -> Objective:
    import inpaint_kernels as ik

    if group is None or normalize == "image":

        def objective(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
            return weighted(*ik.hole_valid_loss(pred, target, mask, normalize=normalize, backend=backend))

    else:
        # Region means over all processes need the summed masks of all processes.
        def objective(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
            hole = ik.masked_l1_loss(pred, target, 1 - mask, backend=backend, process_group=group)
            valid = ik.masked_l1_loss(pred, target, mask, backend=backend, process_group=group)
            return weighted(hole, valid)

    return objective


def _eager(normalize: str, group: dist.ProcessGroup | None) -> Objective:
    """What a training script without the package writes."""

    def by_image(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        error = (pred - target).abs()
        return weighted(((1 - mask) * error).mean(), (mask * error).mean())

    def by_mask(pred: Tensor, target: Tensor, mask: Tensor) -> Terms:
        error = (pred - target).abs()
        terms = []
        for region in (1 - mask, mask):
            count, processes = region.sum() * pred.shape[1], 1
            if group is not None:
                # DDP averages gradients, so a share of the global sum is multiplied by the number of shares.
                dist.all_reduce(count, group=group)
                processes = dist.get_world_size(group)
            terms.append((region * error).sum() * processes / count.clamp(min=1))
        return weighted(*terms)

    return by_image if normalize == "image" else by_mask


def fused_backend(device: torch.device, asked: str | None) -> str:
    """The implementation the fused loss runs on: the one asked for, else the first that can."""
    asked = asked or os.environ.get("INPAINT_KERNELS_BACKEND") or None
    image, reason = torch.zeros(1, 3, 8, 8, device=device), ""
    for name in (asked,) if asked else ("cuda", "triton", "cpu", "reference"):
        try:
            _fused("image", name, None)(image, image, image[:, :1])
            return name
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
    raise InputError(f"--backend {asked}: {reason}")


class Kept(NamedTuple):
    """Bytes held between forward and backward: tensors the loss made, and inputs it holds on to."""

    made: int
    inputs: int


def bytes_kept(objective: Objective, pred: Tensor, target: Tensor, mask: Tensor) -> Kept:
    """Counts what one call of the objective saves for its backward; shared storage counts once."""
    pred = pred.detach().requires_grad_()
    given = {tensor.untyped_storage().data_ptr() for tensor in (pred, target, mask)}
    storages: dict[int, int] = {}
    # Held here so that no storage is freed and its address reused while counting.
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        objective(pred, target, mask)
    inputs = sum(size for pointer, size in storages.items() if pointer in given)
    return Kept(sum(storages.values()) - inputs, inputs)
