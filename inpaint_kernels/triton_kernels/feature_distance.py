"""Launchers of the feature distance: the kernels of `pixel_*.py` on all layers in one launch, one region each."""

from __future__ import annotations

import torch
from torch import Tensor

from . import pixel_backward, pixel_forward, plan
from .pixel_tile import Pair

# The dtypes of `ops/_checks.py`, by their index.
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def forward(
    input: list[Tensor],  # [k N, C, H, W] of each layer
    target: list[Tensor],  # [N, C, H, W]
    mask: list[Tensor],  # [H, W] or [1|N|kN, 1|C, H, W] of each layer, or nothing
    weights: list[float],
    penalty: str,
    param: float,
    normalize: str,
    save_signs: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(loss, scale, signs) of `ops/feature_distance.py`."""
    used = [i for i, x in enumerate(input) if x.numel()]
    signs = [plan.empty_signs(x, x.shape, plan.is_channels_last(x), save_signs) for x in input]
    loss = (torch.empty if used else torch.zeros)((), dtype=torch.float32, device=input[0].device)
    make = torch.empty if len(used) == len(input) else torch.zeros
    scale = make(len(input), dtype=torch.float32, device=input[0].device)
    if used:
        pairs = []
        for i in used:
            kept = mask[i] if mask else None, signs[i] if save_signs else None
            pairs.append(Pair(target[i].shape[0], input[i], target[i], *kept))
        factors = [weights[i] for i in used]
        pixel_forward.launch_forward(
            pairs, [loss], scale, penalty, param, normalize, weights=factors, numbers=used
        )
    return loss, scale, signs


def backward(
    grad: Tensor,  # []
    scale: Tensor,  # [L]
    signs: list[Tensor],  # uint8 of each layer, l1 only
    mask: list[Tensor],  # [H, W] or [1|N|kN, 1|C, H, W] of each layer, or nothing
    input: list[Tensor],  # [k N, C, H, W] of each layer, not l1
    target: list[Tensor],  # [N, C, H, W] of each layer, not l1
    sizes: list[int],  # k N, C, H, W, N of each layer
    channels_last: list[int],
    dtypes: list[int],  # index into DTYPES
    penalty: str,
    param: float,
) -> list[Tensor]:
    """Gradient of each layer's input, of `ops/feature_distance.py`."""
    grads = [
        plan.empty_image(grad, sizes[5 * i : 5 * i + 4], bool(last), DTYPES[dtype])
        for i, (last, dtype) in enumerate(zip(channels_last, dtypes, strict=True))
    ]
    used = [i for i, x in enumerate(grads) if x.numel()]
    if used:
        pairs = []
        for i in used:
            x, y, m, s = (given[i] if given else None for given in (input, target, mask, signs))
            pairs.append(Pair(sizes[5 * i + 4], x, y, m, s, grads[i]))
        pixel_backward.launch_backward(pairs, [grad], scale, penalty, param, per_sample=False, numbers=used)
    return grads
