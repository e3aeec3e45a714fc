"""What the compilers make of the Triton kernels of total_variation and inpainting_pixel on GPUs that are not there.

As `test_resources.py`: launchers run on meta tensors, what they would launch is compiled ahead of time.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from aot import CAPABILITIES, Launch, Resources, compile_launch, meta, record
from harness import DTYPES
from torch import Tensor

from inpaint_kernels.triton_kernels import inpainting_pixel, total_variation

# Two programs of four warps stay resident with it, each with two rows of the images and two of the mask on their way.
# What the kernels need today: 168 in most cases, 190 in the narrowest; no GPU has told whether fewer would be faster.
MAX_REGISTERS = 192


class Case(NamedTuple):
    """A call of one launcher."""

    op: str  # "pixel", "tv" (of a composite) or "image" (total variation of an image)
    dtypes: str = "f32/f32"  # pred / target
    region: str = "dilated_hole"
    mask: torch.dtype = torch.float32
    mask_channels: int = 1
    channels_last: bool = False
    size: tuple[int, int, int, int] = (8, 3, 512, 512)
    penalty: str = "l1"
    normalize: str = "image"
    backward: str = ""  # which gradients: "pred", "target" or "pred,target"

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "x".join(map(str, self.size))
        mask = f"{str(self.mask).removeprefix('torch.')}x{self.mask_channels}"
        parts = [self.op, self.dtypes, self.region, mask, layout, self.penalty, self.normalize, self.backward]
        return "-".join(filter(None, parts))


# The usual calls, then those with the most in registers, then one per code path that is left.
CASES = [
    Case("pixel"),
    Case("pixel", "bf16/bf16"),
    Case("pixel", backward="pred"),
    Case("pixel", "bf16/bf16", mask=torch.bool, backward="pred"),
    Case("image", region="image"),
    Case("image", "bf16/bf16", region="image"),
    Case("image", region="image", backward="pred"),
    Case("pixel", "f16/f32", normalize="mask"),
    Case("pixel", "bf16/bf16", normalize="mask", channels_last=True),
    Case("pixel", "f16/f32", channels_last=True, backward="pred,target"),
    Case("pixel", mask_channels=3, channels_last=True, backward="pred,target"),
    Case("tv", penalty="l2", channels_last=True, backward="pred,target"),
    Case("pixel", "bf16/bf16", backward="pred,target"),
    Case("tv", "f16/f32", penalty="l2", normalize="mask"),
    Case("tv", "f16/f16", penalty="l2", backward="pred,target"),
    Case("tv", region="hole", mask=torch.uint8, mask_channels=3),
    Case("tv", region="first_pixel", backward="target"),
    # Tiles of several strips.
    Case("pixel", size=(64, 16, 32, 32)),
    Case("pixel", size=(64, 16, 32, 32), backward="pred"),
]


def launches(case: Case) -> list[Launch]:
    """What the launcher would launch."""
    n, c, h, w = case.size

    dtypes = [DTYPES[name] for name in case.dtypes.split("/")]
    pred, target = (meta(case.size, dtype, case.channels_last) for dtype in dtypes)
    mask: Tensor | None = meta((n, case.mask_channels, h, w), case.mask, case.channels_last)
    l1 = case.penalty == "l1"
    weights, options = (6.0, 1.0, 0.1), (case.region, case.penalty)
    if case.op == "pixel" and not case.backward:
        assert mask is not None
        forward = (case.normalize, case.region, case.normalize, False, True)
        return record(lambda: inpainting_pixel.forward(pred, target, mask, *weights, *forward))
    composite = target if case.op == "tv" else None
    mask = None if case.region == "image" else mask
    if not case.backward:
        return record(
            lambda: total_variation.forward(pred, composite, mask, *options, case.normalize, False, l1)
        )
    needed = ("pred" in case.backward, "target" in case.backward)
    image = (case.size, case.channels_last, *dtypes)
    planes = 6 if case.op == "pixel" else 4
    signs = meta((n * c * h * planes * w // 8,), torch.uint8)
    if case.op == "pixel":
        saved = (meta((n, 2)), meta((2,)), signs, mask)
        grads = (meta(()), None, None, None)
        return record(
            lambda: inpainting_pixel.backward(*grads, *saved, *image, *weights, case.region, False, *needed)
        )
    kept = (signs, mask, None, None) if l1 else (None, mask, pred, composite)
    backward = (case.op == "tv", *options, False, *needed)
    return record(lambda: total_variation.backward(meta(()), meta((2,)), *kept, *image, *backward))


def check_size(resources: Resources) -> None:
    assert resources.spilled == 0
    assert resources.registers <= MAX_REGISTERS


def check_widths(launch: Launch, resources: Resources) -> None:
    """Rows of the images, and of a mask laid out like them, move 16 bytes at a time, once for each row.

    Only where float32 is stored beside a half-precision image, and in channels_last, do halves move 8 bytes at once.
    """
    arguments = launch.arguments
    row, forward = arguments["WIDTH"], "sums_ptr" in arguments
    dilated = arguments["REGION"] == "dilated_hole"
    l2 = arguments["PENALTY"] == "l2"
    composite = arguments["target_ptr"] is not None if forward else arguments["COMPOSITE"]
    # Written once each in the program: the row itself, and what lies above the first row of a strip.
    images = 1 if forward else 2
    if forward:
        masks = composite + 3 * dilated if arguments["REGION"] != "image" else composite
    elif dilated:
        masks = composite + 4 + 2 * l2
    else:
        masks = composite + 2 * (arguments["REGION"] != "image" or l2)
    if arguments["SHARED"] != 1:
        masks = 0
    moved = {
        "pred_ptr": images,
        "target_ptr": images,
        "mask_ptr": masks,
        "grad_pred_ptr": 1,
        "grad_target_ptr": 1,
    }
    expected = {"loads": Counter[int](), "stores": Counter[int]()}
    for name, times in moved.items():
        tensor = arguments.get(name)
        if tensor is not None and times:
            width = min(16, row * tensor.element_size())
            direction = "stores" if name.startswith("grad") else "loads"
            expected[direction][width] += row * times * tensor.element_size()
    # Below 8 bytes: neighbours, packed signs, single numbers, masks of one byte an element.
    for direction, found in (("loads", resources.loads), ("stores", resources.stores)):
        wide = {width: count for width, count in found.items() if width >= 8}
        wanted = {width: count for width, count in expected[direction].items() if width >= 8}
        # The compiler may write the step of the first row out.
        same = wide.keys() == wanted.keys() and all(wanted[k] <= wide[k] <= 2 * wanted[k] for k in wide)
        assert same, f"narrow {direction}: {dict(found)}, expected {wanted}"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_spills_and_wide_accesses(case: Case, capability: int) -> None:
    pair_kernel, *finalise = launches(case)
    assert len(finalise) == (0 if case.backward else 2 if case.op == "pixel" else 1)
    resources = compile_launch(pair_kernel, capability)
    check_size(resources)
    check_widths(pair_kernel, resources)
    for launch in finalise:
        check_size(compile_launch(launch, capability))


@pytest.mark.parametrize("backward", ["", "pred"])
def test_neighbours_stay_in_their_registers(backward: str) -> None:
    """A tile moved by one element is the same registers, but for one that is read: nothing is exchanged for it."""
    ptx = compile_launch(launches(Case("pixel", backward=backward))[0], 90).ptx
    loop = ptx[: ptx.rindex("bra")]
    assert "shfl" not in loop.replace("shfl.sync.bfly", "") and "ld.shared" not in loop


def test_check_fails_on_spills() -> None:
    launch = launches(CASES[0])[0]
    large = launch._replace(arguments=launch.arguments | {"BLOCK_G": 256}, warps=1)
    with pytest.raises(AssertionError, match="spilled"):
        check_size(compile_launch(large, 90))


def test_check_fails_on_narrow_loads() -> None:
    launch = launches(CASES[0])[0]
    resources = compile_launch(launch, 90, aligned=False)
    check_size(resources)
    with pytest.raises(AssertionError, match="narrow loads"):
        check_widths(launch, resources)
