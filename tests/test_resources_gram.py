"""What the compilers make of the Triton kernels of gram, style and feature_distance on GPUs that are not there.

As `test_resources.py`: launchers run on meta tensors, what they would launch is compiled ahead of time.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import NamedTuple

import pytest
import torch
from aot import CAPABILITIES, Launch, compile_launch, meta, record
from harness import DTYPES
from torch import Tensor

from inpaint_kernels.triton_kernels import feature_distance, gram, style


class Case(NamedTuple):
    """A call of one launcher."""

    op: str  # "gram", "style" or "feature_distance"
    dtypes: str = "f32/f32"  # input / target
    channels: tuple[int, ...] = (64,)  # of each layer
    channels_last: bool = False
    copies: int = 1
    backward: bool = False
    penalty: str = "l1"
    mask: bool = False
    precision: str = "ieee"  # torch's name for "highest"; "tf32" otherwise
    # The narrowest access to features allowed; TF32 wants the pixels of one operand as neighbours, which a
    # channels_last tile is not: without rounding it is turned on its way to shared memory, number by number.
    width: int = 16
    size: tuple[int, int, int] | None = None  # N, H, W; by default 8 samples of 8192 / C pixels each way

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "nchw"
        channels = "+".join(map(str, self.channels))
        parts = [self.op, self.penalty, self.dtypes, channels, layout, f"x{self.copies}", self.precision]
        return "-".join([*parts, *["mask"] * self.mask, *["backward"] * self.backward])


CASES = [
    Case("gram"),
    Case("gram", "f16/f16"),
    Case("gram", "bf16/bf16", (256,)),
    Case("gram", "bf16/bf16", (256,), channels_last=True),
    Case("gram", channels=(256,)),
    Case("gram", channels=(256,), precision="tf32"),
    Case("gram", channels=(256,), channels_last=True, width=4),
    Case("gram", backward=True),
    Case("gram", "f16/f16", (512,), backward=True),
    Case("gram", "bf16/bf16", channels_last=True, backward=True),
    Case("style", copies=2),
    Case("style", "bf16/f32", (64, 128), copies=2, penalty="l2"),
    Case("style", copies=2, backward=True),
    Case("style", channels=(256,), channels_last=True, backward=True),
    Case("feature_distance", channels=(64, 128, 256), copies=2, mask=True),
    Case("feature_distance", "bf16/bf16", (64, 128), copies=2),
    Case("feature_distance", "f16/f32", (64, 128), channels_last=True, mask=True, penalty="charbonnier"),
    Case("feature_distance", channels=(64, 128, 256), copies=2, mask=True, backward=True),
    Case("feature_distance", "bf16/bf16", (64, 128), mask=True, backward=True, penalty="charbonnier"),
]


def launches(case: Case) -> list[Launch]:
    """What the launcher would launch."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = case.precision
    try:
        return _launches(case)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _launches(case: Case) -> list[Launch]:
    input_dtype, target_dtype = (DTYPES[name] for name in case.dtypes.split("/"))

    def features(batch: int, dtype: torch.dtype) -> list[Tensor]:
        sides = [case.size[1:] if case.size else (8192 // c, 8192 // c) for c in case.channels]
        return [
            meta((batch, c, *side), dtype, case.channels_last)
            for c, side in zip(case.channels, sides, strict=True)
        ]

    batch = case.size[0] if case.size else 8
    inputs, targets = features(batch * case.copies, input_dtype), features(batch, target_dtype)
    matrices = [meta((x.shape[0], x.shape[1], x.shape[1])) for x in inputs]
    weights = [1.0] * len(inputs)
    if case.op == "gram":
        if case.backward:
            return record(lambda: gram.backward(matrices[0], inputs[0], "chw"))
        return record(lambda: gram.forward(inputs[0], "chw"))
    if case.op == "style":
        if case.backward:
            return record(lambda: style.backward(meta(()), matrices, targets, -1.0))
        return record(lambda: style.forward(inputs, targets, weights, case.penalty, "chw", False, True))
    masks = [meta((batch, 1, *x.shape[2:])) for x in inputs] if case.mask else []
    l1 = case.penalty == "l1"
    if not case.backward:
        return record(
            lambda: feature_distance.forward(inputs, targets, masks, weights, case.penalty, 1e-3, "mask", l1)
        )
    return record(
        lambda: feature_distance.backward(
            meta(()),
            meta((len(inputs),)),
            [meta((x.numel() // 4,), torch.uint8) for x in inputs] if l1 else [],
            masks,
            [] if l1 else inputs,
            [] if l1 else targets,
            [size for x in inputs for size in (*x.shape, batch)],
            [int(case.channels_last)] * len(inputs),
            [feature_distance.DTYPES.index(input_dtype)] * len(inputs),
            case.penalty,
            1e-3,
        )
    )


def check_widths(accesses: Counter[int], width: int, single: int) -> None:
    """Features move `width` bytes at once; `single` bytes a thread may be signs, or numbers of a tile or row."""
    narrow = sum(count for moved, count in accesses.items() if moved < width)
    assert narrow <= single, f"narrow accesses: {dict(accesses)}"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_spills_and_wide_accesses(case: Case, capability: int) -> None:
    found = launches(case)
    assert len(found) >= 1
    for launch in found:
        resources = compile_launch(launch, capability)
        assert resources.spilled == 0, launch.kernel.__name__
        # A launch of more registers than a multiprocessor has does not start.
        assert resources.registers * 32 * launch.warps <= 65536
        name = launch.kernel.__name__
        if name == "gram_kernel":
            check_widths(resources.loads, case.width, 0)
            check_widths(resources.stores, 16, 0)
        elif name == "product_kernel":
            check_widths(resources.loads, 8, 64)
            check_widths(resources.stores, 16, 0)
        elif name in ("forward_kernel", "backward_kernel"):
            # Two bytes of signs for 8 elements, of each layer's steps and predictions.
            tiles = launch.arguments["TILES"]
            parts = sum(tiles[10 * i + 3] * tiles[10 * i + 8] for i in range(len(case.channels)))
            check_widths(resources.loads, 8, 32 * parts)
            check_widths(resources.stores, 8, 32 * parts)
            assert resources.registers <= 128


def test_gram_adds_blocks_outside_the_tensor_core() -> None:
    """Merged into the product, as compilers like to, the sum of the blocks would be truncated at every step."""
    ptx = compile_launch(launches(Case("gram", "bf16/bf16"))[0], 90).ptx
    assert "wgmma.mma_async" in ptx
    # One addition for every element of the 64 x 64 tile, by 128 threads.
    assert len(re.findall(r"\badd(?:\.rn)?\.f32\b", ptx)) >= 32


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("backward", [False, True])
def test_low_parts_of_infinity_are_left_out(capability: int, backward: bool) -> None:
    """Triton splits float32 into TF32 parts and drops their small products where those are NaN, as Inf makes them."""
    found = {
        precision: compile_launch(
            launches(Case("gram", backward=backward, precision=precision))[0], capability
        )
        for precision in ("ieee", "tf32")
    }
    asks_for_nan = re.compile(r"\bsetp\.(?:num|nan)\.f32\b")
    assert asks_for_nan.search(found["ieee"].ptx)
    assert not asks_for_nan.search(found["tf32"].ptx), "it is not the small products that are looked at"


def test_check_fails_on_narrow_loads() -> None:
    launch = launches(Case("gram"))[0]
    resources = compile_launch(launch, 90, aligned=False)
    with pytest.raises(AssertionError, match="narrow"):
        check_widths(resources.loads, 16, 0)
