"""gradient_loss: differences of neighbours in the composite against those in the truth, in rings of any width."""

from __future__ import annotations

from functools import partial

import torch
from harness import Backend, grid
from op_cases import PAIRS
from pairs_cases import MASK_IS, gradient_loss_call, gradient_loss_formula
from pixel_cases import image_pair, on_device


@grid(ring=(0, 1, 3, 5, 50), mask_is=MASK_IS)
def test_rings_of_any_width(backend: Backend, ring: int, mask_is: str) -> None:
    size = (2, 2, 17, 23)
    mask = torch.ones(2, 1, *size[2:])
    mask[0, :, 6:9, 8:11] = 0
    mask[1, :, :2, 15:] = 0.25
    options = {"ring": ring, "mask_is": mask_is}
    PAIRS(
        gradient_loss_call(backend, **options),
        partial(gradient_loss_formula, **options),
        on_device(backend, *image_pair(size), mask if mask_is == "valid" else 1 - mask),
    )
