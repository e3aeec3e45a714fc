"""What the compilers make of the Triton kernels of partial_conv on GPUs that are not there.

As `test_resources.py`: launchers run on meta tensors, what they would launch is compiled ahead of time.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from aot import CAPABILITIES, Launch, Resources, compile_launch, record
from harness import DTYPES
from torch import Tensor

from inpaint_kernels.triton_kernels import partial_conv

SIZE = (16, 64, 256, 256)


class Case(NamedTuple):
    """A call of one launcher."""

    part: str  # its name
    dtypes: str = "f32/f32"  # what is read / what is written
    layouts: str = "nchw/nchw"  # likewise; "last" is channels_last
    mask: str = "f32"  # "" for none
    mask_channels: int = 1  # of the mask, or planes
    mask_layout: str = "nchw"
    size: tuple[int, int, int, int] = SIZE
    activation: str = "relu"
    kernel: tuple[int, ...] = (3, 3)

    def __str__(self) -> str:
        size = "x".join(map(str, self.size))
        mask = f"{self.mask}x{self.mask_channels}-{self.mask_layout}" if self.mask else "nomask"
        parts = [self.part, self.dtypes, self.layouts, mask, size, self.activation]
        return "-".join(parts + ["x".join(map(str, self.kernel))] * (self.part == "window"))


CASES = [
    *(
        Case(part, dtypes, layouts)
        for part in ("mask_input", "finish", "finish_backward")
        for dtypes in ("f32/f32", "bf16/bf16")
        for layouts in ("nchw/nchw", "last/last")
    ),
    Case("mask_input", mask=""),
    Case("mask_input", mask="bool", mask_channels=64),
    Case("mask_input", "bf16/bf16", "last/last", mask="bf16", mask_channels=64, mask_layout="last"),
    Case("mask_input", "f16/f32"),
    # One long row: an odd size does no harm.
    Case("mask_input", mask_channels=67, size=(16, 67, 100, 101)),
    Case("mask_input", "bf16/bf16", "nchw/last"),
    Case("finish", "bf16/bf16", "last/last", size=(16, 96, 64, 64), activation="leaky_relu"),
    Case("finish", "bf16/bf16", size=(16, 512, 4, 4)),
    Case("finish", "f16/f32", "last/nchw"),
    # A plane of each group.
    Case("finish", "bf16/bf16", mask_channels=4),
    Case("finish_backward", activation="none"),
    Case("finish_backward", "bf16/bf16", "nchw/last"),
    Case("window", kernel=(7, 7)),
    Case("window", mask="bool", size=(4, 1, 250, 301)),
    Case("window", mask="f32", mask_channels=64),
    Case("window", mask="bool", mask_channels=64),
    Case("window", mask="bf16", mask_channels=64, mask_layout="last"),
    Case("window", mask="f32", mask_channels=64, mask_layout="last"),
]


def meta(shape: tuple[int, ...], dtype: str = "f32", layout: str = "nchw") -> Tensor:
    kinds = {**DTYPES, "bool": torch.bool, "u8": torch.uint8}
    memory_format = torch.channels_last if layout == "last" else torch.contiguous_format
    return torch.empty(shape, dtype=kinds[dtype], device="meta").to(memory_format=memory_format)


def launches(case: Case) -> list[Launch]:
    """What the launcher would launch."""
    n, c, h, w = case.size
    (dtype, out_dtype), (layout, out_layout) = case.dtypes.split("/"), case.layouts.split("/")
    x, out = meta(case.size, dtype, layout), meta(case.size, out_dtype, out_layout)
    mask = meta((n, case.mask_channels, h, w), case.mask, case.mask_layout) if case.mask else None
    ratio = new_mask = meta((n, case.mask_channels, h, w))
    if case.part == "mask_input":
        return record(lambda: partial_conv.mask_input(x, mask, out))
    how = 1 + 4 * ("none", "relu", "leaky_relu").index(case.activation)
    if case.part == "finish":
        bias = meta((c,), dtype)
        return record(lambda: partial_conv.finish(x, ratio, new_mask, bias, how, 0.1, out))
    if case.part == "finish_backward":
        result = None if case.activation == "none" else x
        return record(lambda: partial_conv.finish_backward(x, result, ratio, new_mask, how, 0.1, True, out))
    assert mask is not None
    windows = (*case.kernel, *[1] * 3 * len(case.kernel), 1)
    return record(lambda: partial_conv.window(mask, 1, windows, 9.0, "proportional", torch.float32))


def check_widths(case: Case, launch: Launch, resources: Resources) -> None:
    """Images move 16 bytes at a time; what is narrower are planes, a bias, sums of it."""
    arguments = launch.arguments
    tile = arguments["BLOCK_P"] * arguments["BLOCK_C"]
    elements = tile // (32 * launch.warps)
    name = launch.kernel.__name__
    if name == "channel_sum_kernel":
        size = arguments["mask_ptr"].element_size()
        assert resources.loads == {min(16, size * elements): size * elements}, (
            f"narrow loads: {resources.loads}"
        )
        return
    images = [name for name in ("input_ptr", "raw_ptr", "grad_ptr", "output_ptr") if name in arguments]
    read = sum(arguments[i].element_size() for i in images if arguments[i] is not None) * elements
    written = arguments["out_ptr"].element_size() * elements
    wide, narrow = (
        sum(n for width, n in resources.loads.items() if (width >= 16) == w) for w in (True, False)
    )
    # Two planes, or one mask, of four bytes for each pixel of the thread, and a bias.
    assert narrow <= 10 * elements // (2 if case.layouts == "last/last" else 1), (
        f"narrow loads: {resources.loads}"
    )
    assert wide >= read, f"narrow loads: {resources.loads}, {read} bytes of images"
    sums = 4 if arguments.get("sums_ptr") is not None else 0
    assert resources.stores == {16: written} | ({4: sums} if sums else {}), (
        f"narrow stores: {resources.stores}"
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_spills_and_wide_accesses(case: Case, capability: int) -> None:
    found = launches(case)
    several = case.part == "finish_backward" or (case.part == "window" and case.mask_channels > 1)
    assert len(found) == 1 + several
    for launch in found:
        resources = compile_launch(launch, capability)
        assert resources.spilled == 0, launch.kernel.__name__
        # With them 768 threads stay resident, of the kernels that keep to one layout 1024.
        one_layout = case.layouts in ("nchw/nchw", "last/last") and case.part != "window"
        assert resources.registers <= (64 if one_layout else 80), launch.kernel.__name__
        if launch.kernel.__name__ not in ("box_kernel", "add_rows_kernel"):
            check_widths(case, launch, resources)


def test_large_windows_compile() -> None:
    launch = launches(Case("window", kernel=(31, 31)))[0]
    assert compile_launch(launch, 90).spilled == 0


def test_check_fails_on_narrow_loads() -> None:
    case = Case("finish")
    launch = launches(case)[0]
    resources = compile_launch(launch, 90, aligned=False)
    with pytest.raises(AssertionError, match="narrow"):
        check_widths(case, launch, resources)


def test_check_fails_on_a_tile_too_large() -> None:
    launch = launches(Case("finish_backward"))[0]
    resources = compile_launch(launch._replace(arguments=launch.arguments | {"BLOCK_P": 2048}), 90)
    assert resources.registers > 80
