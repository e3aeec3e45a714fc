"""What the compilers make of the Triton kernels on GPUs that are not there: no spills, few registers, wide loads.

The launchers run on meta tensors and their launches are compiled ahead of time, so what is checked is what would
run. Needs no GPU, but a process without TRITON_INTERPRET: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import re

import pytest
import torch
from aot import CAPABILITIES, Launch, compile_launch, launch_key
from launch_cases import PARTIAL_CONV, Case, Size, launches
from resource_checks import check, check_registers

SMALL: Size = (64, 256, 8, 8)
FEATURES: Size = (8, 64, 128, 128)
DEEP: Size = (8, 256, 32, 32)
LAYER: Size = (16, 64, 256, 256)
BF16, F16, MIXED = "bf16/bf16", "f16/f16", "f16/f32"

# One case per code path of the kernels; sizes are divisible by 8 as those of real training are.
CASES = [
    Case("masked_l1"),
    Case("masked_l1", BF16, mask=torch.bool),
    Case("masked_l1", mask=None),
    Case("masked_l1", channels_last=True),
    # The largest tile, and the most channels in one program.
    Case("masked_l1", size=(32, 4, 1024, 1024)),
    # Planes smaller than a tile, and per-channel offsets into the mask.
    Case("masked_l1", MIXED, SMALL, penalty="charbonnier"),
    Case("masked_l1", MIXED, penalty="charbonnier"),
    Case("masked_l1", F16, penalty="l2", reduction="none"),
    Case("masked_l1", backward="pred"),
    Case("masked_l1", BF16, mask=torch.bool, backward="pred"),
    Case("masked_l1", MIXED, penalty="charbonnier", backward="pred,target"),
    Case("masked_l1", BF16, mask=torch.bool, penalty="huber", backward="pred,target", reduction="none"),
    Case("hole_valid"),
    Case("hole_valid", BF16, mask=torch.bool, penalty="charbonnier"),
    Case("hole_valid", MIXED, backward="pred"),
    Case("hole_valid", penalty="charbonnier", backward="pred"),
    # The usual calls over neighbours, then those with the most in registers, then one per code path that is left.
    Case("inpainting_pixel"),
    Case("inpainting_pixel", BF16),
    Case("inpainting_pixel", backward="pred"),
    Case("inpainting_pixel", BF16, mask=torch.bool, backward="pred"),
    Case("total_variation", composite=False, region="image"),
    Case("total_variation", BF16, composite=False, region="image"),
    Case("total_variation", composite=False, region="image", backward="pred"),
    Case("inpainting_pixel", MIXED, normalize="mask"),
    Case("inpainting_pixel", BF16, normalize="mask", channels_last=True),
    Case("inpainting_pixel", MIXED, channels_last=True, backward="pred,target"),
    Case("inpainting_pixel", mask_channels=3, channels_last=True, backward="pred,target"),
    Case("total_variation", penalty="l2", channels_last=True, backward="pred,target"),
    Case("inpainting_pixel", BF16, backward="pred,target"),
    Case("total_variation", MIXED, penalty="l2", normalize="mask"),
    Case("total_variation", F16, penalty="l2", backward="pred,target"),
    Case("total_variation", region="hole", mask=torch.uint8, mask_channels=3),
    Case("total_variation", region="first_pixel", backward="target"),
    # Tiles of several chunks.
    Case("inpainting_pixel", size=(64, 16, 32, 32)),
    Case("inpainting_pixel", size=(64, 16, 32, 32), backward="pred"),
    Case("stacked_images"),
    Case("stacked_images", BF16),
    Case("stacked_images", MIXED, swap=True),
    Case("stacked_images", parts=(0, 1, 2, 3, 4)),
    # The composite alone, also of feature maps: planes smaller than a tile, a mask of several channels.
    Case("stacked_images", BF16, parts=(1,), constants=False),
    Case("stacked_images", size=SMALL, parts=(1,), mask_channels=256),
    Case("stacked_images", size=(64, 3, 8, 8), swap=True),
    Case("stacked_images", size=(8, 1, 512, 512)),
    Case("stacked_images", parts=(0, 2), mask=None),
    Case("stacked_images", channels_last=True),
    Case("stacked_images", BF16, channels_last=True),
    Case("stacked_images", channels_last=True, swap=True),
    Case("stacked_images", backward="pred"),
    Case("stacked_images", BF16, backward="pred"),
    Case("stacked_images", MIXED, backward="pred"),
    Case("stacked_images", MIXED, swap=True, backward="pred,target"),
    Case("stacked_images", parts=(0, 1, 2, 3, 4), backward="target"),
    Case("stacked_images", size=(8, 1, 512, 512), backward="pred"),
    Case("stacked_images", size=(64, 3, 8, 8), swap=True, backward="pred"),
    Case("stacked_images", channels_last=True, backward="pred"),
    Case("stacked_images", BF16, channels_last=True, swap=True, backward="pred"),
    # The largest tile.
    Case("stacked_images", size=(32, 3, 1024, 1024)),
    Case("stacked_images", size=(32, 3, 1024, 1024), backward="pred,target"),
    Case("gram", size=FEATURES),
    Case("gram", F16, FEATURES),
    Case("gram", BF16, DEEP),
    Case("gram", BF16, DEEP, channels_last=True),
    Case("gram", size=DEEP),
    Case("gram", size=DEEP, precision="tf32"),
    Case("gram", size=DEEP, channels_last=True),
    Case("gram", size=FEATURES, backward="pred"),
    Case("gram", F16, (8, 512, 16, 16), backward="pred"),
    Case("gram", BF16, FEATURES, channels_last=True, backward="pred"),
    Case("style", size=FEATURES, predictions=2),
    Case("style", "bf16/f32", FEATURES, layers=(128,), predictions=2, penalty="l2"),
    Case("style", size=FEATURES, predictions=2, backward="pred"),
    Case("style", size=DEEP, channels_last=True, backward="pred"),
    Case("feature_distance", size=FEATURES, layers=(128, 256), predictions=2),
    Case("feature_distance", BF16, FEATURES, layers=(128,), predictions=2, mask=None),
    Case("feature_distance", MIXED, FEATURES, layers=(128,), channels_last=True, penalty="charbonnier"),
    Case("feature_distance", size=FEATURES, layers=(128, 256), predictions=2, backward="pred"),
    Case("feature_distance", BF16, FEATURES, layers=(128,), penalty="charbonnier", backward="pred"),
    Case("lpips", size=FEATURES, layers=(128, 256, 512), mask=None, predictions=2),
    Case("lpips", BF16, FEATURES, layers=(192,), predictions=2),
    Case("lpips", BF16, FEATURES, layers=(192,), channels_last=True),
    # Planes that 8 does not divide, and a column that is read twice.
    Case("lpips", size=(8, 64, 63, 63), layers=(1280,), mask=torch.bool),
    Case("lpips", size=FEATURES, layers=(128, 256), mask=None, predictions=2, backward="pred"),
    Case("lpips", F16, FEATURES, layers=(192,), backward="pred,target"),
    Case("lpips", size=DEEP, layers=(128,), channels_last=True, backward="pred,target"),
    Case("ssim", mask=None, kernel=(11,)),
    Case("ssim", BF16, kernel=(11,), l1=True),
    Case(
        "ssim",
        mask=torch.bool,
        mask_channels=3,
        channels_last=True,
        kernel=(15,),
        region="same",
        contrast=True,
    ),
    Case("ssim", mask=None, kernel=(11,), backward="pred"),
    Case("ssim", BF16, kernel=(11,), l1=True, contrast=True, backward="pred,target"),
    Case("ssim", mask=torch.bool, channels_last=True, kernel=(15,), region="same", backward="pred"),
    *(
        Case(op, dtypes, LAYER, channels_last)
        for op in ("mask_input", "finish", "finish_backward")
        for dtypes in ("f32/f32", BF16)
        for channels_last in (False, True)
    ),
    Case("mask_input", size=LAYER, mask=None),
    Case("mask_input", size=LAYER, mask=torch.bool, mask_channels=64),
    Case("mask_input", BF16, LAYER, True, mask=torch.bfloat16, mask_channels=64),
    Case("mask_input", MIXED, LAYER),
    # One long row: an odd size does no harm.
    Case("mask_input", size=(16, 67, 100, 101), mask_channels=67),
    Case("mask_input", BF16, LAYER, turned=True),
    Case("finish", BF16, (16, 96, 64, 64), True, activation="leaky_relu"),
    Case("finish", BF16, (16, 512, 4, 4)),
    Case("finish", MIXED, LAYER, True, turned=True),
    # A plane of each group.
    Case("finish", BF16, LAYER, mask_channels=4),
    Case("finish_backward", size=LAYER, activation="none"),
    Case("finish_backward", BF16, LAYER, turned=True),
    Case("window", size=LAYER, kernel=(7, 7)),
    Case("window", size=(4, 1, 250, 301), mask=torch.bool),
    Case("window", size=LAYER, mask_channels=64),
    Case("window", size=LAYER, mask=torch.bool, mask_channels=64),
    Case("window", size=LAYER, channels_last=True, mask=torch.bfloat16, mask_channels=64),
    Case("window", size=LAYER, channels_last=True, mask_channels=64),
]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_spills_and_wide_accesses(case: Case, capability: int) -> None:
    for launch in launches(case):
        check(case, launch, compile_launch(launch, capability))


def first_of(op: str) -> tuple[Case, Launch]:
    """The first case of an op, and its first launch."""
    case = next(case for case in CASES if case.op == op)
    return case, launches(case)[0]


@pytest.mark.parametrize(
    ("op", "changes", "warps", "message"),
    [
        ("masked_l1", {"BLOCK_C": 128, "BLOCK_G": 2}, 1, "spilled"),
        ("inpainting_pixel", {"BLOCK_G": 256}, 1, "spilled"),
        ("finish_backward", {"BLOCK_P": 2048}, 4, "registers|spilled"),
    ],
)
def test_check_fails_on_a_tile_too_large(op: str, changes: dict[str, int], warps: int, message: str) -> None:
    case, launch = first_of(op)
    name = "TILE" if "TILE" in launch.arguments else "TILES"
    tile = launch.arguments[name]
    tile = tile._replace(**changes) if name == "TILE" else (tile[0]._replace(**changes),)
    launch = launch._replace(arguments=launch.arguments | {name: tile}, warps=warps)
    with pytest.raises(AssertionError, match=message):
        check_registers(case, launch, compile_launch(launch, 90))


@pytest.mark.parametrize("op", ["masked_l1", "inpainting_pixel", "stacked_images", "gram", "lpips", "finish"])
def test_check_fails_on_narrow_loads(op: str) -> None:
    case, launch = first_of(op)
    # Addresses that are not aligned may take too many registers as well.
    resources = compile_launch(launch, 90, aligned=False)._replace(registers=0)
    with pytest.raises(AssertionError, match="narrow"):
        check(case, launch, resources)


def test_gram_adds_blocks_outside_the_tensor_core() -> None:
    """Merged into the product, as compilers like to, the sum of the blocks would be truncated at every step."""
    ptx = compile_launch(launches(Case("gram", BF16, FEATURES))[0], 90).ptx
    assert "wgmma.mma_async" in ptx
    # One addition for every element of the 64 x 64 tile, by 128 threads.
    assert len(re.findall(r"\badd(?:\.rn)?\.f32\b", ptx)) >= 32


def test_equal_features_differ_by_nothing() -> None:
    """A product that is not rounded before another is subtracted differs from it."""
    for backward in ("", "pred"):
        launch = launches(Case("lpips", size=FEATURES, mask=None, backward=backward))[0]
        ptx = compile_launch(launch, 90).ptx
        assert "sub.f32" in ptx or "sub.rn.f32" in ptx
        assert not re.search(r"\bfma\.rn\.f32\b", ptx)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
def test_sums_of_windows_stay_in_their_threads(channels_last: bool) -> None:
    """Rows pass nothing between threads; before the first one, the shift is a sum over a tile."""
    case = Case("ssim", channels_last=channels_last, kernel=(11,), backward="pred")
    for launch in launches(case):
        ptx = compile_launch(launch, 90).ptx
        assert ptx.count("ld.shared") <= 4, f"{launch.kernel.__name__} exchanges its rows"


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("backward", ["", "pred"])
def test_low_parts_of_infinity_are_left_out(capability: int, backward: str) -> None:
    """Triton splits float32 into TF32 parts and drops their small products where those are NaN, as Inf makes them."""
    asks_for_nan = re.compile(r"\bsetp\.(?:num|nan)\.f32\b")
    case = Case("gram", size=FEATURES, backward=backward)
    ptx, rounded = (
        compile_launch(launches(case._replace(precision=precision))[0], capability).ptx
        for precision in ("ieee", "tf32")
    )
    assert asks_for_nan.search(ptx)
    assert not asks_for_nan.search(rounded), "it is not the small products that are looked at"


@pytest.mark.parametrize("backward", ["", "pred"])
def test_neighbours_stay_in_their_registers(backward: str) -> None:
    """A tile moved by one element is the same registers, but for one that is read: nothing is exchanged for it."""
    ptx = compile_launch(launches(Case("inpainting_pixel", backward=backward))[0], 90).ptx
    loop = ptx[: ptx.rindex("bra")]
    assert "shfl" not in loop.replace("shfl.sync.bfly", "") and "ld.shared" not in loop


def test_large_windows_compile() -> None:
    (launch,) = launches(Case("window", size=LAYER, kernel=(31, 31)))
    assert compile_launch(launch, 90).spilled == 0


# For any size: Triton's launcher makes a constant of a size that is 1 and notes which sizes 16 divides, so that a
# kernel may compile for one image and not for the next.
ANY_SIZE = [
    Case("masked_l1"),
    Case("masked_l1", penalty="huber", backward="pred"),
    Case("masked_l1", penalty="charbonnier", reduction="none"),
    Case("hole_valid"),
    Case("hole_valid", backward="pred"),
    Case("inpainting_pixel"),
    Case("inpainting_pixel", backward="pred"),
    Case("total_variation", composite=False, region="image"),
    Case("total_variation", penalty="l2", backward="pred,target"),
    Case("stacked_images"),
    Case("stacked_images", backward="pred"),
    Case("gram"),
    Case("gram", backward="pred"),
    Case("style", layers=(1,)),
    Case("feature_distance", layers=(1,)),
    Case("feature_distance", layers=(1,), penalty="huber", backward="pred"),
    Case("lpips", layers=(1,), predictions=2),
    Case("lpips", layers=(1,), mask=None, backward="pred,target"),
    Case("ssim", kernel=(5,), region="same", l1=True),
    Case("ssim", kernel=(5,), region="same", mask=None, backward="pred"),
    *(Case(op) for op in PARTIAL_CONV),
]
# One element; a row of exactly one group of 8; a column; multiples of 16, which the launcher notes; odd numbers.
SIZES: tuple[Size, ...] = ((1, 1, 1, 1), (2, 3, 5, 8), (2, 8, 9, 1), (16, 16, 16, 16), (3, 5, 7, 9))
SIZES_CHANNELS_LAST: tuple[Size, ...] = ((1, 4, 3, 2), (3, 5, 7, 9), (16, 16, 16, 16))


@pytest.mark.parametrize("number", range(len(SIZES) + len(SIZES_CHANNELS_LAST)))
@pytest.mark.parametrize("case", ANY_SIZE, ids=str)
def test_every_size_compiles(case: Case, number: int) -> None:
    """The architectures take turns: what a size does to a kernel shows before the code is theirs."""
    size, last = (SIZES + SIZES_CHANNELS_LAST)[number], number >= len(SIZES)
    for launch in launches(case._replace(size=size, channels_last=last)):
        compile_launch(launch, CAPABILITIES[number % 3])


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("case", ANY_SIZE, ids=str)
def test_new_sizes_compile_nothing(case: Case, channels_last: bool) -> None:
    """Widths as those of training, batches and heights that nothing divides; few enough to share their tiles."""
    sizes: list[Size] = [(8, 3, 128, 512), (7, 3, 131, 512), (9, 3, 117, 384)]
    cases = [case._replace(size=size, channels_last=channels_last) for size in sizes]
    first, *others = ([launch_key(launch) for launch in launches(case)] for case in cases)
    assert all(other == first for other in others)


@pytest.mark.parametrize("op", ["masked_l1", "hole_valid"])
def test_new_parameter_compiles_nothing(op: str) -> None:
    """An eps that is annealed changes at every step."""
    launch = launches(Case(op, penalty="charbonnier"))[0]
    annealed = launch._replace(arguments=launch.arguments | {"param": 0.7})
    assert launch_key(annealed) == launch_key(launch)
