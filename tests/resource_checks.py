"""What the code of a Triton kernel may need on a GPU: registers without spills, loads and stores of a width.

What each kernel has to move follows from its launch; `aot` counts what the compiled code moves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from aot import Launch, Resources
from launch_cases import PARTIAL_CONV, Case
from torch import Tensor

# Registers a thread. Of the loss kernels 512 threads stay resident on every GPU listed; their loads in flight are
# enough to fill its memory bus. Of the kernels over neighbours two programs of four warps, each with two rows of the
# images and two of the mask on their way; most cases need 168 today, the narrowest needs 190, and no GPU has told
# whether fewer would be faster.
LOSSES, PAIRS = 128, 192
NEIGHBOURS = ("inpainting_pixel", "total_variation")


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
