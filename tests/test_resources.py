"""What the compilers make of the Triton kernels on GPUs that are not there: no spills, few registers, wide loads.

The launchers run on meta tensors and their launches are compiled ahead of time, so what is checked is what would
run. Needs no GPU, but a process without TRITON_INTERPRET: interpreted kernels cannot be compiled.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from aot import CAPABILITIES, Launch, Resources, compile_launch, launch_key
from launch_cases import PARTIAL_CONV, Case, Size, launches
from torch import Tensor

# Registers a thread. Of the loss kernels 512 threads stay resident on every GPU listed; their loads in flight are
# enough to fill its memory bus. Of the kernels over neighbours two programs of four warps, each with two rows of the
# images and two of the mask on their way; most cases need 168 today, the narrowest needs 190, and no GPU has told
# whether fewer would be faster.
LOSSES, PAIRS = 128, 192
NEIGHBOURS = ("inpainting_pixel", "total_variation")
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


def check_registers(case: Case, launch: Launch, resources: Resources) -> None:
    name = launch.kernel.__name__
    assert resources.spilled == 0, f"{name} spilled"
    if case.op in PARTIAL_CONV:
        # With 80 registers 768 threads stay resident, with 64 of the kernels that keep to one layout 1024.
        limit = 80 if case.turned or case.op == "window" else 64
    elif case.op in ("gram", "style"):
        # A launch of more registers than a multiprocessor has does not start.
        limit = 65536 // (32 * launch.warps)
    elif case.op == "lpips":
        # Two programs; one where planes of half precision are read number by number.
        limit = 128 if launch.warps == 4 or case.dtypes == "f32/f32" else 160
    elif case.op == "ssim":
        # Three programs, with the longest window two: all sums of a column lie in registers.
        limit = 168 if case.kernel[0] < 15 else 255
    else:
        limit = PAIRS if case.op in NEIGHBOURS else LOSSES
    assert resources.registers <= limit, f"{name}: too many registers"


def check_narrow(accesses: Counter[int], width: int, allowed: int) -> None:
    """Features move `width` bytes at once; `allowed` bytes a thread may be signs, or numbers of a tile or row."""
    narrow = sum(count for moved, count in accesses.items() if moved < width)
    assert narrow <= allowed, f"narrow accesses: {dict(accesses)}"


def image_tensors(case: Case, tile: Any, given: dict[str, Any]) -> Iterator[tuple[Tensor | None, int, bool]]:
    """Tensors that an image kernel moves, how often the code moves a tile of each, and whether it stores it."""
    get, steps = given.get, tile.STEPS
    if case.op in ("masked_l1", "hole_valid"):
        # The tensors of the only layer, see `kernel_tensors`.
        pred, target, mask, _, *gradients = given["layers"][0]
        yield from ((pred, steps, False), (target, steps, False))
        yield mask, tile.MASK != "interleaved", False
        yield from ((gradient, steps, True) for gradient in gradients)
        yield given["grads"][0] if get("MAP") else None, steps, False
        yield get("map_ptr"), steps, True
    elif case.op == "stacked_images":
        stack = given["STACK"]
        shares = list(zip(stack.SHARES[::2], stack.SHARES[1::2], strict=True))
        # A gradient that nobody needs is not read.
        read = sum(pair != ("none", "none") for pair in shares) * stack.REPEATS
        yield from ((get(name), steps, False) for name in ("pred_ptr", "target_ptr"))
        yield get("mask_ptr"), {"plane": 1, "channel": steps}.get(tile.MASK, 0), False
        yield get("grad_ptr"), read * steps, False
        yield get("stacked_ptr"), stack.PARTS * stack.REPEATS * steps, True
        yield from ((get(name), steps, True) for name in ("grad_pred_ptr", "grad_target_ptr"))
    else:
        # Written once each in the program: the row itself, and what lies above the first row of a chunk.
        forward, l2 = "sums_ptr" in given, given["PENALTY"] == "l2"
        composite = given["target_ptr"] is not None if forward else given["COMPOSITE"]
        if tile.REGION == "dilated_hole":
            masks = composite + (3 if forward else 4 + 2 * l2)
        else:
            masks = composite + (0 if forward else 2 * (l2 or tile.REGION != "image"))
        yield from ((get(name), 1 if forward else 2, False) for name in ("pred_ptr", "target_ptr"))
        yield get("mask_ptr"), 0 if tile.SHARED != 1 else masks, False
        yield from ((get(name), 1, True) for name in ("grad_pred_ptr", "grad_target_ptr"))


def check_images(case: Case, launch: Launch, resources: Resources) -> None:
    """Images, and a mask laid out like them, move 16 bytes at a time, and only as often as they must.

    Only where float32 is stored beside a half-precision image, and in channels_last over neighbours, do halves move 8
    bytes at once. Below 8 bytes: neighbours, packed signs, single numbers, masks of one byte an element.
    """
    tile = launch.arguments["TILE"] if "TILE" in launch.arguments else launch.arguments["TILES"][0]
    pairs = case.op in NEIGHBOURS
    elements = tile.WIDTH if pairs else tile.BLOCK_C * tile.BLOCK_G * 8 // (32 * launch.warps)
    expected = {"loads": Counter[int](), "stores": Counter[int]()}
    wide_rows = pairs or case.dtypes.startswith("f32") or tile.WIDTH == 8
    for tensor, times, stored in image_tensors(case, tile, launch.arguments):
        if tensor is not None and times:
            size = tensor.element_size()
            wide_rows |= stored and size == 4
            expected["stores" if stored else "loads"][min(16, tile.WIDTH * size)] += elements * times * size
    if case.op == "stacked_images" and case.swap and case.channels_last:
        # Element by element: the side with the channels of a pixel reversed.
        expected["loads"].clear()
    assert wide_rows, "narrow rows"
    for direction, found in (("loads", resources.loads), ("stores", resources.stores)):
        wide = {width: count for width, count in found.items() if width >= 8}
        wanted = {width: count for width, count in expected[direction].items() if width >= 8}
        # Over neighbours the compiler may write the step of the first row out.
        most = 2 if pairs else 1
        same = wide.keys() == wanted.keys() and all(wanted[k] <= wide[k] <= most * wanted[k] for k in wide)
        assert same, f"narrow {direction}: {dict(found)}, expected {wanted}"
    if case.op == "stacked_images":
        assert resources.stores == expected["stores"]
        assert tile.MASK == "interleaved" or resources.loads == expected["loads"], "narrow loads"


def check_features(case: Case, launch: Launch, resources: Resources) -> None:
    name = launch.kernel.__name__
    if name == "gram_kernel":
        # TF32 wants the pixels of one operand as neighbours. Those of a channels_last tile are not: without rounding
        # the tile is turned on its way to shared memory, number by number.
        turned = case.channels_last and case.dtypes == "f32/f32" and case.precision == "ieee"
        check_narrow(resources.loads, 4 if turned else 16, 0)
        check_narrow(resources.stores, 16, 0)
    elif name == "product_kernel":
        check_narrow(resources.loads, 8, 64)
        check_narrow(resources.stores, 16, 0)
    elif name in ("forward_kernel", "backward_kernel"):
        # Two bytes of signs for 8 elements, of each layer's steps and predictions.
        parts = sum(tile.PREDICTIONS * tile.STEPS for tile in launch.arguments["TILES"])
        check_narrow(resources.loads, 8, 32 * parts)
        check_narrow(resources.stores, 8, 32 * parts)


def check_columns(launch: Launch, resources: Resources) -> None:
    """Features of LPIPS move 16 bytes at a time, where their planes allow it."""
    if launch.kernel.__name__ not in ("forward_kernel", "backward_kernel"):
        return
    read = written = 0
    for column, tensors in zip(launch.arguments["COLUMNS"], launch.arguments["layers"], strict=True):
        if column.CHANNELS_LAST or column.UNIT == 8:
            elements = column.BLOCK_P * column.BLOCK_C // (32 * launch.warps)
            read += elements * (column.PREDICTIONS * tensors[0].element_size() + tensors[1].element_size())
            # Of the forward numbers of a pixel, of the backward the gradients of the predictions and of the target.
            stored = zip(tensors[5:], (column.PREDICTIONS, 1), strict=False)
            written += sum(elements * times * t.element_size() for t, times in stored if t is not None)
    assert resources.loads[16] >= read, f"narrow loads: {dict(resources.loads)}, {read} bytes of features"
    assert resources.stores[16] >= written, f"narrow stores: {dict(resources.stores)}"


def check_partial_conv(case: Case, launch: Launch, resources: Resources) -> None:
    """Images move 16 bytes at a time; what is narrower are planes, a bias, sums of it."""
    arguments, name = launch.arguments, launch.kernel.__name__
    if name in ("box_kernel", "add_rows_kernel"):
        return
    tile = arguments.get("TILE")
    block = (tile.BLOCK_P, tile.BLOCK_C) if tile else (arguments["BLOCK_P"], arguments["BLOCK_C"])
    elements = block[0] * block[1] // (32 * launch.warps)
    if name == "channel_sum_kernel":
        read = arguments["mask_ptr"].element_size() * elements
        assert resources.loads == {min(16, read): read}, f"narrow loads: {resources.loads}"
        return
    images = [arguments.get(name) for name in ("input_ptr", "raw_ptr", "grad_ptr", "output_ptr")]
    read = sum(image.element_size() for image in images if image is not None) * elements
    wide = sum(count for width, count in resources.loads.items() if width >= 16)
    assert wide >= read, f"narrow loads: {resources.loads}, {read} bytes of images"
    # Two planes, or one mask, of four bytes for each pixel of the thread, and a bias.
    check_narrow(resources.loads, 16, 10 * elements // (2 if case.channels_last and not case.turned else 1))
    stores = {16: arguments["out_ptr"].element_size() * elements}
    if arguments.get("sums_ptr") is not None:
        stores[4] = 4
    assert resources.stores == stores, f"narrow stores: {resources.stores}"


def check(case: Case, launch: Launch, resources: Resources) -> None:
    check_registers(case, launch, resources)
    if case.op in PARTIAL_CONV:
        check_partial_conv(case, launch, resources)
    elif case.op in ("gram", "style", "feature_distance"):
        check_features(case, launch, resources)
    elif case.op == "lpips":
        check_columns(launch, resources)
    elif case.op != "ssim" and "finalize" not in launch.kernel.__name__:
        check_images(case, launch, resources)


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
        ("finish_backward", {"BLOCK_P": 2048}, 4, "registers"),
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
