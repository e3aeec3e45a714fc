"""Results of more than 16 MiB, which CPU kernels write around the cache, against those of the samples alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Backend, backends_under_test, evaluate, poisoned_allocations, same_bits
from pairs_cases import (
    SCALE,
    SHIFT,
    inpainting_pixel_call,
    region_mask,
    stacked_images_call,
    total_variation_call,
)
from pixel_cases import hole_valid_call, image_pair, masked_call

import inpaint_kernels as ik

CPU = Backend("cpu", "cpu")
pytestmark = pytest.mark.skipif(CPU not in backends_under_test(), reason="is about the CPU kernels")

# A sample alone is below the limit. Rows and planes of odd length: most of them begin at no aligned address.
SIZE = (2, 3, 863, 877)
TV = {"mode": "dilated_hole-default"}

# Functions whose gradient by a sample depends on the other one by a power of two alone, that of the mean.
CALLS: dict[str, Callable[..., Any]] = {
    "masked_l1": masked_call(CPU, penalty="l1", mode="image"),
    "masked_mse": masked_call(CPU, penalty="l2", mode="image"),
    "hole_valid": hole_valid_call(CPU, penalty="l1", normalize="image"),
    "total_variation-l1": total_variation_call(CPU, penalty="l1", **TV),
    "total_variation-l2": total_variation_call(CPU, penalty="l2", **TV),
    "inpainting_pixel": inpainting_pixel_call(CPU, normalize="image", **TV),
    "stacked_images": stacked_images_call(CPU, parts=("composite",), scale=SCALE, shift=SHIFT),
}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", CALLS)
def test_samples_alone_give_the_same_bits(name: str, layout: str) -> None:
    call = CALLS[name]
    inputs = [*image_pair(SIZE, layouts=f"{layout}/{layout}"), region_mask("n1hw", SIZE)]
    with poisoned_allocations():
        outputs, gradients, upstream = evaluate(call, inputs, (0, 1))
    images = [t for t in outputs if t.ndim == 4]
    for n in range(2):
        rows = slice(n, n + 1)
        sent = [u[rows] if u.ndim == 4 else u / 2 for u in upstream]
        alone, gradients_alone, _ = evaluate(call, [t[rows] for t in inputs], (0, 1), sent)
        expected = [t for t in alone if t.ndim == 4] + list(gradients_alone)
        for got, want in zip((*images, *gradients), expected, strict=True):
            assert same_bits(got[rows], want)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("channels", "width"), [(16, 528), (40, 224)])
def test_gram_products_of_samples_alone_give_the_same_bits(
    channels: int, width: int, layout: torch.memory_format
) -> None:
    """Whole aligned tiles are streamed, the others are not: rows and columns of either are left over."""
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(2, channels, 272, width, generator=generator)
    upstream = torch.rand(2, channels, channels, generator=generator)

    def gradient(x: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=layout).requires_grad_()
        with poisoned_allocations():
            return torch.autograd.grad(ik.gram_matrix(x, backend="cpu"), x, sent)[0]

    together = gradient(features, upstream)
    assert together.nbytes > 16 << 20 > together[0].nbytes
    for n in range(2):
        assert same_bits(together[n : n + 1], gradient(features[n : n + 1], upstream[n : n + 1]))
