"""masked_l1_loss, masked_mse_loss, masked_charbonnier_loss, masked_huber_loss."""

from __future__ import annotations

from typing import Any

import torch
from harness import Backend, evaluate, same_bits
from hypothesis import given
from hypothesis import strategies as st
from op_cases import Op
from op_choices import ops
from pixel_cases import image_cases, on_device


@given(
    case=image_cases(),
    op=st.sampled_from([op for op in ops("masked_l1") if op.id.endswith((" mask", " sample"))]),
)
def test_scaled_masks_and_swapped_images_change_no_bit(
    backend: Backend, case: dict[str, Any], op: Op
) -> None:
    """Every penalty is even, and a power of two is exact in every sum and quotient."""
    mask = torch.ones(case["pred"].shape[-2:]) if case["mask"] is None else case["mask"].float()
    pred, target, mask = on_device(backend, case["pred"].contiguous(), case["target"].contiguous(), mask)
    call = op.by(backend)
    (value,), gradients, upstream = evaluate(call, (pred, target, mask), (0, 1))
    (scaled,), same, _ = evaluate(call, (pred, target, 4 * mask), (0, 1), upstream)
    (swapped,), exchanged, _ = evaluate(call, (target, pred, mask), (0, 1), upstream)
    assert same_bits(swapped, value) and torch.equal(scaled, value)
    for got in (same, exchanged[::-1]):
        assert all(map(torch.equal, got, gradients))
