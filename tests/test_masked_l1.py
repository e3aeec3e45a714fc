"""masked_l1_loss, masked_mse_loss, masked_charbonnier_loss, masked_huber_loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Backend, evaluate, same_bits
from hypothesis import given
from hypothesis import strategies as st
from op_cases import Op
from op_choices import ops
from pixel_cases import image_cases, image_pair, on_device
from training_checks import ops_called

import inpaint_kernels as ik


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


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("penalty", ["l1", "mse"])
def test_small_images_without_a_mask_take_the_loss_of_torch(
    penalty: str, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, where nothing else was asked for; a mask, a half type, more pixels or no pixel take ours."""
    monkeypatch.setattr("inpaint_kernels._backend.default_backend", None)
    loss = getattr(ik, f"masked_{penalty}_loss")
    pair = image_pair((2, 3, 8, 9))

    def kernels(*inputs: Any) -> set[str]:
        return {op for op in ops_called(lambda: loss(*inputs, reduction=reduction)) if "inpaint" in op}

    assert loss(*pair, reduction=reduction) == getattr(F, f"{penalty}_loss")(*pair, reduction=reduction)
    assert not kernels(*pair)
    assert loss(*(t[:0] for t in pair), reduction=reduction) == 0
    if ik._backend.choose("masked_l1", ("cpu",), None, pair[0].device) == "reference":
        pytest.skip("no kernels here")
    large = image_pair((1, 1, 128, 256))
    for inputs in ((*pair, torch.ones(8, 9)), [t.half() for t in pair], large, [t[:0] for t in pair]):
        assert kernels(*inputs)
