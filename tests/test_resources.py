"""What the compilers make of the Triton kernels on GPUs that are not there: no spills, few registers, wide loads.

The launchers run on meta tensors and their launches are compiled ahead of time, so what is checked is what would
run. Needs no GPU, but a process without TRITON_INTERPRET: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from aot import CAPABILITIES, Launch, Resources, compile_launch, meta, record
from harness import DTYPES

from inpaint_kernels.triton_kernels import hole_valid, masked_l1

IMAGE = (8, 3, 512, 512)
# 512 threads stay resident with it on every GPU listed; their loads in flight are enough to fill its memory bus.
MAX_REGISTERS = 128


class Case(NamedTuple):
    """A call of one launcher."""

    op: str  # "masked_l1" or "hole_valid"
    penalty: str
    dtypes: str = "f32/f32"  # pred / target
    mask: torch.dtype | None = torch.float32
    size: tuple[int, int, int, int] = IMAGE
    channels_last: bool = False
    backward: str = ""  # which gradients: "pred", "target" or "pred,target"
    reduction: str = "mean"

    def __str__(self) -> str:
        mask = "nomask" if self.mask is None else str(self.mask).removeprefix("torch.")
        layout = "channels_last" if self.channels_last else "x".join(map(str, self.size))
        parts = [self.op, self.penalty, self.dtypes, mask, layout, self.reduction, self.backward]
        return "-".join(filter(None, parts))


# One case per code path of the kernels; sizes are divisible by 8 as those of real training are.
CASES = [
    Case("masked_l1", "l1"),
    Case("masked_l1", "l1", "bf16/bf16", torch.bool),
    Case("masked_l1", "l1", mask=None),
    Case("masked_l1", "l1", channels_last=True),
    # The largest tile, and the most channels in one program.
    Case("masked_l1", "l1", size=(32, 4, 1024, 1024)),
    # Planes smaller than a tile, and per-channel offsets into the mask.
    Case("masked_l1", "charbonnier", "f16/f32", size=(64, 256, 8, 8)),
    Case("masked_l1", "charbonnier", "f16/f32"),
    Case("masked_l1", "l2", "f16/f16", reduction="none"),
    Case("masked_l1", "l1", backward="pred"),
    Case("masked_l1", "l1", "bf16/bf16", torch.bool, backward="pred"),
    Case("masked_l1", "charbonnier", "f16/f32", backward="pred,target"),
    Case("masked_l1", "huber", "bf16/bf16", torch.bool, backward="pred,target", reduction="none"),
    Case("hole_valid", "l1"),
    Case("hole_valid", "charbonnier", "bf16/bf16", torch.bool),
    Case("hole_valid", "l1", "f16/f32", backward="pred"),
    Case("hole_valid", "charbonnier", backward="pred"),
]


def launches(case: Case) -> list[Launch]:
    """What the launcher would launch."""
    n, c, h, w = case.size

    pred_dtype, target_dtype = (DTYPES[name] for name in case.dtypes.split("/"))
    pred, target = (meta(case.size, d, case.channels_last) for d in (pred_dtype, target_dtype))
    mask = None if case.mask is None else meta((n, 1, h, w), case.mask)
    is_map = case.reduction == "none"
    l1 = case.penalty == "l1"
    two_regions = case.op == "hole_valid"
    if not case.backward:
        if two_regions:
            return record(
                lambda: hole_valid.forward(pred, target, mask, case.penalty, 1e-3, "mask", False, l1)
            )
        return record(
            lambda: masked_l1.forward(pred, target, mask, case.penalty, 1e-3, case.reduction, "mask", l1)
        )
    grad = meta(case.size if is_map else (), torch.float32)
    scale = meta((0,) if is_map else (n, 2 if two_regions else 1), torch.float32)
    saved: tuple[Any, ...] = (meta((2 * n * c * h * w // 8,), torch.uint8), mask, None, None)
    if not l1:
        saved = (None, mask, pred, target)
    image = (case.size, case.channels_last, pred_dtype, target_dtype, case.penalty, 1e-3)
    needed = ("pred" in case.backward, "target" in case.backward)
    if two_regions:
        return record(lambda: hole_valid.backward(grad, grad, scale, *saved, *image, False, *needed))
    return record(lambda: masked_l1.backward(grad, scale, *saved, *image, *needed))


def check_size(resources: Resources) -> None:
    assert resources.spilled == 0
    assert resources.registers <= MAX_REGISTERS


def check_widths(launch: Launch, resources: Resources) -> None:
    """Images, and a mask laid out like them, move 16 bytes at a time.

    Only where float32 is stored beside a half-precision image (rows of 4) does the latter move 8 bytes at once.
    """
    arguments = launch.arguments
    mask, _, _, _, _, _, block_c, block_g, steps, row = arguments["TILES"]
    tile = block_c * block_g * 8 // (32 * launch.warps)
    # The tensors of the only layer, see `kernel_tensors`.
    names = "input", "target", "mask", "signs", "grad_input", "grad_target"
    tensors = dict(zip(names, arguments["layers"][0], strict=False))
    tensors |= {
        "grad": arguments["grads"][0] if "grads" in arguments else None,
        "map": arguments.get("map_ptr"),
    }
    moved = {
        "input": steps,
        "target": steps,
        "mask": 0 if mask == "interleaved" else 1,
        "grad": steps if arguments.get("MAP", False) else 0,
        "grad_input": steps,
        "grad_target": steps,
        "map": steps,
    }
    expected = {"loads": Counter[int](), "stores": Counter[int]()}
    stores_single = False
    for name, times in moved.items():
        tensor = tensors.get(name)
        if tensor is None or times == 0:
            continue
        stored = name in ("grad_input", "grad_target", "map")
        stores_single |= stored and tensor.dtype == torch.float32
        width = min(16, row * tensor.element_size())
        expected["stores" if stored else "loads"][width] += tile * times * tensor.element_size()
    assert row == 8 or stores_single or tensors["input"].element_size() == 4
    # Below 8 bytes: packed signs, single numbers, masks of one byte an element.
    for direction, found in (("loads", resources.loads), ("stores", resources.stores)):
        wide = {width: count for width, count in found.items() if width >= 8}
        wanted = {width: count for width, count in expected[direction].items() if width >= 8}
        assert wide == wanted, f"narrow {direction}: {dict(found)}, expected {wanted}"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_spills_and_wide_accesses(case: Case, capability: int) -> None:
    pixel_kernel, *finalise = launches(case)
    assert len(finalise) == (0 if case.backward or case.reduction == "none" else 1)
    resources = compile_launch(pixel_kernel, capability)
    check_size(resources)
    check_widths(pixel_kernel, resources)
    for launch in finalise:
        check_size(compile_launch(launch, capability))


def test_check_fails_on_spills() -> None:
    launch = launches(CASES[0])[0]
    *tile, _, _, row = launch.arguments["TILES"]
    large = launch._replace(arguments=launch.arguments | {"TILES": (*tile, 128, 2, row)}, warps=1)
    with pytest.raises(AssertionError, match="spilled"):
        check_size(compile_launch(large, 90))


def test_check_fails_on_narrow_loads() -> None:
    launch = launches(CASES[0])[0]
    resources = compile_launch(launch, 90, aligned=False)
    check_size(resources)
    with pytest.raises(AssertionError, match="narrow loads"):
        check_widths(launch, resources)
