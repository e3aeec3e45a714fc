"""total_variation_loss: penalties of neighbouring pixels, of an image or of a composite that is never written."""

from __future__ import annotations

from typing import Any

import torch
from harness import Backend, grid
from op_cases import OPS
from pairs_cases import PENALTIES
from pixel_cases import on_device
from torch import Tensor

import inpaint_kernels as ik


@grid(penalty=PENALTIES, mode=("image-default", "dilated_hole-mask"), factor=(1.0, 0.5))
def test_second_derivatives_of_a_target_made_of_the_image(
    backend: Backend, penalty: str, mode: str, factor: float
) -> None:
    """No path is counted twice. Factor 1: both arguments are the same tensor."""
    op = OPS[f"total_variation {penalty} {mode} composite"]
    image, _, mask = on_device(backend, *op.make())

    def second_derivative(call: Any) -> Tensor:
        leaf = image.clone().requires_grad_()
        loss = call(leaf, leaf if factor == 1 else factor * leaf, mask)
        (first,) = torch.autograd.grad(loss, leaf, create_graph=True)
        if not first.requires_grad:  # l1: constant
            return torch.zeros_like(first)
        (second,) = torch.autograd.grad(first.square().sum(), leaf, allow_unused=True, materialize_grads=True)
        return second

    want, got = second_derivative(op.formula), second_derivative(op.by(backend))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_released_denominators(backend: Backend) -> None:
    image, mask = OPS["total_variation l1 hole-mask image"].make()
    hole = 1 - mask
    down, across = (image.diff(dim=d).abs() for d in (2, 3))
    image, mask = on_device(backend, image, mask)
    # naoto0804 loss.py: the mean over the pairs of each axis.
    found = ik.total_variation_loss(image, backend=backend.name)
    torch.testing.assert_close(found.cpu(), down.mean() + across.mean())
    # mmagic: the weight at the first pixel, over its sum broadcast to the channels.
    count = hole.sum() * image.shape[1] + 1e-12
    expected = (hole[..., :-1, :] * down).sum() / count + (hole[..., :-1] * across).sum() / count
    options = {"region": "first_pixel", "normalize": "mask", "backend": backend.name}
    torch.testing.assert_close(ik.total_variation_loss(image, mask, **options).cpu(), expected)
