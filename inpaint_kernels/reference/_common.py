"""What the formulas of several ops share."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def is_differentiated(weight: Tensor) -> bool:
    """Whether a derivative by the weight may be asked for: it requires a gradient, or forward-mode AD or torch.func
    watch it, which cannot be asked for under a compiler."""
    if weight.requires_grad or torch.compiler.is_compiling():
        return True
    is_dual = torch.autograd.forward_ad.unpack_dual(weight).tangent is not None
    return is_dual or torch.func.debug_unwrap(weight) is not weight


def masked_input(input: Tensor, mask: Tensor) -> Tensor:
    """input * mask in the input's dtype, 0 where the mask is exactly 0 whatever lies there."""
    dtype = accumulate_dtype(input)
    ignored = mask == 0
    if is_differentiated(mask):
        # The derivative by the mask is the input, also at mask 0: drop only what is not finite.
        ignored = ignored & ~torch.isfinite(input)
    zero = torch.zeros((), dtype=dtype, device=input.device)
    return (torch.where(ignored, zero, input.to(dtype)) * mask.to(dtype)).to(input.dtype)


def safe_divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, 0 with zero gradient where the denominator is 0."""
    empty = denominator == 0
    return torch.where(empty, torch.zeros_like(numerator), numerator / torch.where(empty, 1, denominator))
