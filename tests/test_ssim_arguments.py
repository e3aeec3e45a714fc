"""Arguments of SSIM and its losses that are refused, and the modules."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from harness import same_bits
from pixel_cases import make_mask
from ssim_cases import unit_pair
from torch import Tensor

import inpaint_kernels as ik

IMAGE = torch.zeros(1, 3, 16, 16)
REFUSED: list[tuple[type[Exception], str, Sequence[Tensor], dict[str, Any]]] = [
    (TypeError, r"pred must be .*uint8.*data_range=255", (IMAGE.byte(), IMAGE), {}),
    (TypeError, r"target must be .*uint8.*data_range=255", (IMAGE, IMAGE.byte()), {}),
    (TypeError, "pred must be a Tensor, got list", ([1.0], IMAGE), {}),
    (ValueError, r"pred must have shape \(C, H, W\).*got \(16, 16\)", (IMAGE[0, 0], IMAGE[0, 0]), {}),
    (ValueError, r"target has shape \(1, 1, 16, 16\), pred has \(1, 3, 16, 16\)", (IMAGE, IMAGE[:, :1]), {}),
    (ValueError, "pred has 16 x 10 pixels, the window 11 x 11", (IMAGE[..., :10],) * 2, {}),
    (ValueError, "pred has 4 x 16 pixels, the window 5 x 5", (IMAGE[..., :4, :],) * 2, {"window_size": 5}),
    (ValueError, "odd number from 3 to 15, got 8", (IMAGE, IMAGE), {"window_size": 8}),
    (ValueError, "odd number from 3 to 15, got 17", (IMAGE, IMAGE), {"window_size": 17}),
    (ValueError, "window_size must be at least 3, got 1", (IMAGE, IMAGE), {"window_size": 1}),
    (TypeError, "window_size must be an integer", (IMAGE, IMAGE), {"window_size": 11.0}),
    (ValueError, "data_range must lie between", (IMAGE, IMAGE), {"data_range": 0}),
    (TypeError, "sigma must be a number", (IMAGE, IMAGE), {"sigma": "1.5"}),
    (ValueError, "padding: got 'reflect', allowed: 'valid', 'same'", (IMAGE, IMAGE), {"padding": "reflect"}),
    (ValueError, "reduction: got 'sum'", (IMAGE, IMAGE), {"reduction": "sum"}),
    (ValueError, r"mask has shape \(1, 16, 16\)", (IMAGE, IMAGE, IMAGE[0, :1]), {}),
    (ValueError, r"\(1, 1, 16, 16\); for pred \(3, 16, 16\)", (IMAGE[0], IMAGE[0], IMAGE[:, :1]), {}),
    (ValueError, "does not broadcast", (IMAGE[None], IMAGE[None], torch.zeros(2, 1, 1, 16, 16)), {}),
]


@pytest.mark.parametrize(("error", "message", "inputs", "options"), REFUSED)
def test_refusals(
    error: type[Exception], message: str, inputs: Sequence[Tensor], options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        ik.ssim(*inputs, **options)


def test_refusals_of_the_share_of_ssim() -> None:
    for weight in (-0.1, 1.5):
        for made in (partial(ik.l1_ssim_loss, IMAGE, IMAGE), ik.nn.L1SSIMLoss):
            with pytest.raises(ValueError, match="ssim_weight must lie between 0 and 1"):
                made(ssim_weight=weight)


def test_modules() -> None:
    options: dict[str, Any] = {"data_range": 2.0, "window_size": 5, "sigma": 1.0, "padding": "same"}
    pred, target = unit_pair((2, 3, 17, 18))
    mask = make_mask("n1hw", (2, 3, 17, 18))
    for module, function, more in (
        (ik.nn.SSIMLoss, ik.ssim_loss, {"reduction": "none"}),
        (ik.nn.MSSSIMLoss, ik.ms_ssim_loss, {"reduction": "none", "scale_weights": [0.25, 0.75]}),
        (ik.nn.L1SSIMLoss, ik.l1_ssim_loss, {"ssim_weight": 0.5}),
    ):
        made = module(**options, **more)
        assert not [*made.parameters(), *made.buffers()]
        assert same_bits(made(pred, target, mask), function(pred, target, mask, **options, **more))
        large = unit_pair((1, 1, 162, 161))
        assert same_bits(module()(*large), function(*large))
        for name, value in (options | more).items():
            assert f"{name}={value!r}" in repr(made)
        with pytest.raises(ValueError, match="padding"):
            module(padding="reflect")
