"""What the compilers make of the Triton kernels of stacked_images on GPUs that are not there.

As `test_resources.py`: launchers run on meta tensors, what they would launch is compiled ahead of time.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from aot import CAPABILITIES, Launch, Resources, compile_launch, meta, record
from harness import DTYPES

from inpaint_kernels.triton_kernels import stacked_images

# 512 threads stay resident with it on every GPU listed; their loads in flight are enough to fill its memory bus.
MAX_REGISTERS = 128
PARTS = [0, 1, 2]
SCALE, SHIFT = [4.4, 4.5, 4.4], [-2.1, -2.0, -1.8]


class Case(NamedTuple):
    """A call of one launcher."""

    dtypes: str = "f32/f32"  # pred / target
    parts: tuple[int, ...] = (0, 1, 2)
    size: tuple[int, int, int, int] = (8, 3, 512, 512)
    constants: bool = True
    swap: bool = False
    channels_last: bool = False
    mask: str = "n1hw"
    backward: str = ""  # which gradients: "pred", "target" or "pred,target"
    # Bytes a thread may read element by element: the side with the channels of a pixel reversed.
    narrow: bool = False

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "x".join(map(str, self.size))
        parts = "parts" + "".join(map(str, self.parts))
        options = (*["plain"] * (not self.constants), *["swap"] * self.swap)
        return "-".join(filter(None, [self.dtypes, parts, layout, self.mask, *options, self.backward]))


# One case per code path of the kernels; sizes are divisible by 8 as those of real training are.
CASES = [
    Case(),
    Case("bf16/bf16"),
    Case("f16/f32", swap=True),
    Case(parts=(0, 1, 2, 3, 4)),
    # The composite alone, also of feature maps: planes smaller than a tile, a mask of several channels.
    Case("bf16/bf16", parts=(1,), constants=False),
    Case(parts=(1,), size=(64, 256, 8, 8), constants=False, mask="nchw"),
    Case(size=(64, 3, 8, 8), swap=True),
    Case(size=(8, 1, 512, 512)),
    Case(parts=(0, 2), mask="none"),
    Case(channels_last=True),
    Case("bf16/bf16", channels_last=True),
    Case(channels_last=True, swap=True, narrow=True),
    Case(backward="pred"),
    Case("bf16/bf16", backward="pred"),
    Case("f16/f32", backward="pred"),
    Case("f16/f32", swap=True, backward="pred,target"),
    Case(parts=(0, 1, 2, 3, 4), backward="target"),
    Case(size=(8, 1, 512, 512), backward="pred"),
    Case(size=(64, 3, 8, 8), swap=True, backward="pred"),
    Case(channels_last=True, backward="pred"),
    Case("bf16/bf16", channels_last=True, swap=True, backward="pred", narrow=True),
    # The largest tile.
    Case(size=(32, 3, 1024, 1024)),
    Case(size=(32, 3, 1024, 1024), backward="pred,target"),
]


def launch_of(case: Case) -> Launch:
    """What the launcher would launch."""
    n, c, h, w = case.size

    pred_dtype, target_dtype = (DTYPES[name] for name in case.dtypes.split("/"))
    mask = {"n1hw": meta((n, 1, h, w)), "nchw": meta(case.size), "none": None}[case.mask]
    scale, shift = (SCALE, SHIFT) if case.constants else ([], [])
    parts = list(case.parts)
    if not case.backward:
        pred, target = (meta(case.size, dtype, case.channels_last) for dtype in (pred_dtype, target_dtype))
        (launch,) = record(
            lambda: stacked_images.forward(pred, target, mask, parts, scale, shift, case.swap, False)
        )
        return launch
    channels = max(c, len(scale))
    dtype = torch.promote_types(pred_dtype, target_dtype)
    grad = meta((len(parts) * n, channels, h, w), dtype, case.channels_last)
    (launch,) = record(
        lambda: stacked_images.backward(
            grad,
            mask,
            case.size,
            case.channels_last,
            pred_dtype,
            target_dtype,
            parts,
            scale,
            case.swap,
            False,
            "pred" in case.backward,
            "target" in case.backward,
        )
    )
    return launch


def moved(launch: Launch, name: str, copies: int = 1) -> Counter[int]:
    """Bytes a thread moves of one tensor, by the width of an access: 16, or a row of WIDTH elements."""
    arguments = launch.arguments
    tensor = arguments.get(name)
    if tensor is None:
        return Counter()
    tile = arguments["BLOCK_C"] * arguments["BLOCK_G"] * 8 // (32 * launch.warps)
    size = tensor.element_size()
    return Counter({min(16, arguments["WIDTH"] * size): tile * arguments["STEPS"] * size * copies})


def check_widths(case: Case, launch: Launch, resources: Resources) -> None:
    """Images and parts move 16 bytes at a time, a half-precision image next to a float32 one 8.

    A gradient that nobody needs is not read. The mask of one channel in channels_last comes element by element.
    """
    arguments = launch.arguments
    shares = arguments["SHARES"]
    copies = arguments["COPIES"]
    if case.backward:
        needed = sum(pair != ("none", "none") for pair in zip(shares[::2], shares[1::2], strict=True))
        loads = moved(launch, "grad_ptr", needed * copies)
        stores = moved(launch, "grad_pred_ptr") + moved(launch, "grad_target_ptr")
    else:
        loads = moved(launch, "pred_ptr") + moved(launch, "target_ptr")
        stores = moved(launch, "stacked_ptr", len(case.parts) * copies)
    assert resources.stores == stores
    if arguments["MASK"] in ("plane", "channel"):
        times = 1 if arguments["MASK"] == "plane" else arguments["STEPS"]
        tile = arguments["BLOCK_C"] * arguments["BLOCK_G"] * 8 // (32 * launch.warps)
        loads += Counter({16: tile * 4 * times})
    wide = Counter({width: count for width, count in resources.loads.items() if width >= 8})
    if case.narrow:
        assert not wide
        return
    assert wide == loads, f"narrow loads: {dict(resources.loads)}, expected {dict(loads)}"
    assert arguments["MASK"] == "interleaved" or wide == resources.loads


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_spills_and_wide_accesses(case: Case, capability: int) -> None:
    launch = launch_of(case)
    resources = compile_launch(launch, capability)
    assert resources.spilled == 0
    assert resources.registers <= MAX_REGISTERS
    check_widths(case, launch, resources)


def test_check_fails_on_narrow_loads() -> None:
    case = Case()
    launch = launch_of(case)
    resources = compile_launch(launch, 90, aligned=False)
    with pytest.raises(AssertionError):
        check_widths(case, launch, resources)


def test_check_fails_on_a_gradient_read_in_vain() -> None:
    launch = launch_of(Case(backward="pred"))
    shares = launch.arguments["SHARES"]
    wasteful = launch._replace(arguments=launch.arguments | {"SHARES": (*shares[:4], "all", "none")})
    with pytest.raises(AssertionError):
        check_widths(Case(backward="pred"), launch, compile_launch(wasteful, 90))
