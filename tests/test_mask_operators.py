"""Operators on masks: dilation, resizing, binarisation, inversion, exactly."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import DTYPES, LAYOUTS, generator, grid, laid_out
from pixel_cases import MASK_DTYPES
from torch import Tensor

import inpaint_kernels as ik
from inpaint_kernels.ops._checks import binary
from inpaint_kernels.reference.total_variation import dilate

SHAPES = {"hw": (6, 8), "n1hw": (2, 1, 6, 8), "nchw": (2, 3, 6, 8)}
# Weights of halves and quarters: exact in every dtype.
NEW_SIZE = dict.fromkeys(("nearest", "bilinear", "adaptive_max", "area"), (3, 4)) | {
    "bilinear_aligned": (11, 15)
}
OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "dilate": ik.dilate_mask,
    "binarize": ik.binarize_mask,
    "invert": ik.invert_mask,
    **{
        mode: (lambda mask, mode=mode: ik.resize_mask(mask, NEW_SIZE[mode], mode))
        for mode in ("nearest", "bilinear", "bilinear_aligned", "adaptive_max", "area")
    },
}
MAKES_FRACTIONS = ("bilinear", "bilinear_aligned", "area")


def mask_of(shape: tuple[int, ...], dtype: str = "f32") -> Tensor:
    """Fractions in eighths, exact in every dtype; zeros and ones where there are none."""
    values = torch.randint(0, 9, shape, generator=generator(0)) / 8
    if not MASK_DTYPES[dtype].is_floating_point:
        values = values.round()
    return values.to(MASK_DTYPES[dtype])


@grid(operator=OPERATORS, dtype=MASK_DTYPES, shape=SHAPES)
def test_shape_dtype_and_values_whatever_the_input(operator: str, dtype: str, shape: str) -> None:
    mask = mask_of(SHAPES[shape], dtype)
    exact = OPERATORS[operator](mask.double())
    for layout in LAYOUTS:
        found = OPERATORS[operator](laid_out(mask, layout))
        fractions = operator in MAKES_FRACTIONS and not mask.is_floating_point()
        assert found.dtype == (torch.float32 if fractions else mask.dtype)
        assert found.shape == (*mask.shape[:-2], *NEW_SIZE.get(operator, mask.shape[-2:]))
        assert torch.equal(found.double(), exact.to(found.dtype).double())


@grid(operator=OPERATORS, dtype=DTYPES)
def test_no_gradient_and_no_change_of_the_input(operator: str, dtype: str) -> None:
    mask = mask_of((2, 1, 6, 8), dtype).requires_grad_()
    before = mask.detach().clone()
    found = OPERATORS[operator](mask)
    assert not found.requires_grad
    found.fill_(7)
    assert torch.equal(mask, before)


@pytest.mark.parametrize("mode", ["nearest", *MAKES_FRACTIONS, "adaptive_max"])
def test_resizing_to_the_same_size_copies(mode: str) -> None:
    mask = mask_of((6, 8))
    found = ik.resize_mask(mask, (6, 8), mode)
    assert torch.equal(found, mask)
    found.fill_(7)
    assert not torch.equal(found, mask)


@grid(operator=OPERATORS)
def test_an_empty_batch(operator: str) -> None:
    assert OPERATORS[operator](torch.rand(0, 1, 6, 8)).shape[:2] == (0, 1)


@grid(radius=(0, 1, 2, 3, 9, 50))
def test_dilation_is_the_maximum_of_the_square(radius: int) -> None:
    mask = (mask_of((2, 1, 30, 24)) - 0.9).relu()
    expected = torch.empty_like(mask)
    for i in range(30):
        for j in range(24):
            window = mask[..., max(i - radius, 0) : i + radius + 1, max(j - radius, 0) : j + radius + 1]
            expected[..., i, j] = window.amax((-2, -1))
    assert torch.equal(ik.dilate_mask(mask, radius), expected)
    assert torch.equal(dilate(mask.requires_grad_(), radius), expected)


@grid(radius=(1, 2, 5))
def test_the_gradient_of_a_dilation_goes_where_that_of_the_square_does(radius: int) -> None:
    """To the first pixel in case of ties, of which a mask is full; total variation differentiates it."""
    upstream = torch.rand(2, 1, 9, 7, generator=generator(1))
    for kind in ("fractions", "binary"):
        mask = mask_of((2, 1, 9, 7)) if kind == "fractions" else mask_of((2, 1, 9, 7), "bool").float()
        mask.requires_grad_()
        square = torch.nn.functional.max_pool2d(mask, 2 * radius + 1, stride=1, padding=radius)
        want, found = (
            torch.autograd.grad(value, mask, upstream)[0] for value in (square, dilate(mask, radius))
        )
        torch.testing.assert_close(found, want)


def test_dilation_of_negative_values_sees_no_zeros_outside() -> None:
    assert torch.equal(ik.dilate_mask(torch.full((3, 3), -1.0)), torch.full((3, 3), -1.0))


def test_what_resizing_takes_and_mixes() -> None:
    row = torch.tensor([[0.0, 1.0, 0.0, 0.0, 1.0, 1.0]])

    def resized(width: int, mode: str) -> list[float]:
        return ik.resize_mask(row, (1, width), mode)[0].tolist()

    assert resized(3, "nearest") == [0, 0, 1]  # pixels 0, 2, 4
    assert resized(3, "adaptive_max") == [1, 0, 1]
    assert resized(3, "area") == [0.5, 0, 1]
    assert resized(3, "bilinear") == [0.5, 0, 1]  # between the pixels of each pair
    assert resized(2, "bilinear") == [1, 1]  # at the middle of each half, its pixels 1 and 4
    assert resized(2, "bilinear_aligned") == [0, 1]  # the first and the last pixel
    assert resized(4, "adaptive_max") == [1, 1, 1, 1]
    assert resized(12, "nearest") == row[0].repeat_interleave(2).tolist()
    # Aligned corners: pixels at 5 / 10 of the way, every second one between two given ones.
    assert resized(11, "bilinear_aligned") == [0, 0.5, 1, 0.5, 0, 0, 0, 0.5, 1, 1, 1]


def test_one_number_is_both_sides() -> None:
    assert torch.equal(ik.resize_mask(mask_of((6, 8)), 3), ik.resize_mask(mask_of((6, 8)), [3, 3]))


@grid(threshold=(0, 0.5, 0.625, -1, 1))
def test_binary_is_strictly_above_the_threshold(threshold: float) -> None:
    mask = mask_of((6, 8))
    expected = [[float(value > threshold) for value in row] for row in mask.tolist()]
    assert ik.binarize_mask(mask, threshold).tolist() == expected


def test_inversion() -> None:
    assert ik.invert_mask(torch.tensor([[0.0, 0.25, 1.0]])).tolist() == [[1.0, 0.75, 0.0]]
    assert ik.invert_mask(torch.tensor([[True, False]])).tolist() == [[False, True]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64], ids=str)
def test_nonzero_integers_count_as_one(dtype: torch.dtype) -> None:
    """255 is the "1" of an image file."""
    mask = torch.tensor([[0, 1, 255, 0]]).to(dtype)
    inverted, dilated, above = ik.invert_mask(mask), ik.dilate_mask(mask), ik.binarize_mask(mask)
    assert {inverted.dtype, dilated.dtype, above.dtype, ik.resize_mask(mask, (1, 2)).dtype} == {dtype}
    assert inverted.tolist() == [[1, 0, 0, 1]]
    assert dilated.tolist() == [[1, 1, 1, 1]]
    assert above.tolist() == [[0, 1, 1, 0]]
    assert ik.resize_mask(mask, (1, 2), "adaptive_max").tolist() == [[1, 1]]
    for mode in ("area", "bilinear"):
        assert ik.resize_mask(mask, (1, 2), mode).tolist() == [[0.5, 0.5]]


BAD = {
    "list": (lambda: ik.dilate_mask([[1.0]]), TypeError, "mask.*Tensor.*list"),
    "complex": (lambda: ik.binarize_mask(torch.ones(3, 3, dtype=torch.cfloat)), TypeError, "mask.*complex64"),
    "nhw": (lambda: ik.resize_mask(torch.ones(3, 8, 8), 4), ValueError, r"mask.*\(N, 1, H, W\).*\(3, 8, 8\)"),
    "radius-negative": (lambda: ik.dilate_mask(torch.ones(3, 3), -1), ValueError, "radius.*0.*-1"),
    "radius-float": (lambda: ik.dilate_mask(torch.ones(3, 3), 1.0), TypeError, "radius.*integer.*float"),
    "size-zero": (lambda: ik.resize_mask(torch.ones(3, 3), (0, 2)), ValueError, "size.*1.*0"),
    "size-one": (lambda: ik.resize_mask(torch.ones(3, 3), (2,)), ValueError, r"size.*\(H, W\).*\(2,\)"),
    "size-float": (lambda: ik.resize_mask(torch.ones(3, 3), 1.5), TypeError, "size.*integer.*float"),
    "mode": (lambda: ik.resize_mask(torch.ones(3, 3), 2, "bicubic"), ValueError, "mode.*'bicubic'.*nearest"),
    "no-pixel": (lambda: ik.resize_mask(torch.ones(0, 3), 2), ValueError, r"mask.*\(0, 3\)"),
    "threshold": (lambda: ik.binarize_mask(torch.ones(3, 3), "1"), TypeError, "threshold.*number.*str"),
    "threshold-nan": (lambda: ik.binarize_mask(torch.ones(3, 3), float("nan")), ValueError, "threshold.*nan"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()


def test_compiles_with_dynamic_sizes() -> None:
    def chain(mask: Tensor, size: Any) -> Tensor:
        hole = ik.dilate_mask(ik.invert_mask(ik.binarize_mask(mask)), 2)
        return ik.resize_mask(hole, size, "area")

    torch._dynamo.reset()
    compiled = torch.compile(chain, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape, size in (((2, 1, 6, 8), (3, 4)), ((3, 1, 10, 12), (5, 3))):
        mask = mask_of(shape)
        assert torch.equal(compiled(mask, size), chain(mask, size))


@pytest.mark.parametrize("function", [ik.masked_l1_loss, lambda pred, target, mask: ik.invert_mask(mask)])
def test_exported_programs_hold_for_masks_of_other_strides(function: Callable[..., Tensor]) -> None:
    """The example's mask is expanded along the batch, the next one is not."""

    class Module(torch.nn.Module):
        def forward(self, pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
            return function(pred, target, mask)

    pred, target = torch.rand(2, 2, 3, 6, 8, generator=generator(0))
    mask = mask_of((2, 1, 6, 8), "u8") * 255
    program = torch.export.export(Module(), (pred, target, mask[:1].expand(mask.shape))).module()
    assert torch.equal(program(pred, target, mask), Module()(pred, target, mask))


def test_broadcast_masks_stay_broadcast() -> None:
    """An expanded mask of integers must not be written out."""
    found = binary(torch.full((1, 1, 4, 4), 255, dtype=torch.uint8).expand(8, 3, 4, 4))
    assert found.dtype == torch.bool
    assert found.stride()[:2] == (0, 0)
