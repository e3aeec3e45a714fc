"""Host side shared by the Triton launchers: layouts, masks, work split."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

# (elements of the call, groups of 8 in a tile, warps). Reasoned, not tuned: no GPU has measured them yet.
TILES = ((1 << 20, 64, 2), (1 << 26, 128, 4), (1 << 63, 256, 8))
MAX_STEPS = 4


class Mask(NamedTuple):
    """A mask ready to be read in place."""

    tensor: Tensor | None  # 2-D or 4-D
    stride_n: int
    stride_c: int
    kind: str  # "none", "plane", "channel" or "interleaved", see `load_weight`


NO_MASK = Mask(None, 0, 0, "none")


def is_channels_last(t: Tensor) -> bool:
    """The layout the kernels work in: channels_last, unless the tensor is contiguous as NCHW too."""
    return not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)


def in_layout(t: Tensor, channels_last: bool) -> Tensor:
    """`t` dense in that layout, copied if it is not."""
    return t.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def empty_image(like: Tensor, size: Any, channels_last: bool, dtype: torch.dtype) -> Tensor:
    """An image in NCHW or channels_last strides on `like`'s device."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device=like.device, memory_format=memory_format)


def prepare_mask(mask: Tensor | None, size: Any, channels_last: bool) -> Mask:
    """Strides and kind of a mask (H, W) or (N|1, C|1, H, W); copied only if its plane is not dense."""
    if mask is None:
        return NO_MASK
    _, c, h, w = size
    if mask.ndim == 2:
        if not mask.is_contiguous():
            mask = mask.contiguous()
        return Mask(mask, 0, 0, "interleaved" if channels_last else "plane")
    sizes, strides = mask.shape, mask.stride()
    stride_n = 0 if sizes[0] == 1 else strides[0]
    stride_c = 0 if sizes[1] == 1 else strides[1]
    # Distance of neighbouring pixels: a multi-channel mask under channels_last is interleaved like the image.
    pixel = c if channels_last and stride_c != 0 else 1
    dense = (w == 1 or strides[3] == pixel) and (h == 1 or strides[2] == w * pixel)
    if not dense or (pixel != 1 and stride_c != 1):
        # Broadcast dimensions stay broadcast: only what is in memory is copied.
        mask = mask[: 1 if stride_n == 0 else None, : 1 if stride_c == 0 else None]
        mask = in_layout(mask, pixel != 1)
        return prepare_mask(mask, size, channels_last)
    if stride_c == 0:
        return Mask(mask, stride_n, 0, "interleaved" if channels_last else "plane")
    return Mask(mask, stride_n, stride_c, "plane" if channels_last else "channel")


def packed(values: Iterable[int]) -> tuple[int, ...]:
    """Non-negative integers as a tuple argument of a kernel, which reads each by `pixel_tile.unpacked`.

    Triton makes a constant of every 1 in a tuple and compiles anew for every set of multiples of 16;
    `do_not_specialize` does not reach into tuples. 2 v + 3 is never 1 and never even.
    """
    return tuple(2 * value + 3 for value in values)


class Tile(NamedTuple):
    """What the kernels of `pixel_tile.py` are compiled for."""

    MASK: str  # see `pixel_tile.load_weight`
    CHANNELS: int  # neighbours that share a mask value
    UNIT: int  # of the mask's strides
    PREDICTIONS: int  # k, of each target
    SHARED: bool  # whether the predictions of a target share its mask
    WHOLE: bool  # whether a segment is whole groups of 8
    BLOCK_C: int
    BLOCK_G: int
    STEPS: int
    WIDTH: int


class Layer(NamedTuple):
    """What the kernels of `pixel_tile.py` are told about one layer."""

    mask: Tensor | None
    programs: int
    warps: int
    # `packed`: length, groups, channels, tiles, chunks, samples; strides of the mask by sample and channel, in UNITs.
    sizes: tuple[int, ...]
    tile: Tile


def make_layer(
    size: Any,  # k N, C, H, W
    batch: int,
    channels_last: bool,
    mask: Tensor | None,  # [H, W] or [1|N|kN, 1|C, H, W]
    signs: bool,
    width: int,
    elements: int,
    per_sample: bool = False,
    channels_apart: bool = False,
    max_steps: int = MAX_STEPS,
) -> Layer:
    """Work split of one layer; `elements` of the largest one choose the tile of all.

    With `signs` the groups of 8 stay where the packed signs have them; `per_sample` keeps samples apart even without
    a mask, `channels_apart` the planes of a sample whatever the mask. A program does at most `max_steps` steps.
    """
    ready = prepare_mask(mask, size, channels_last)
    predictions = size[0] // batch
    shared = mask is None or mask.ndim == 2 or mask.shape[0] != size[0] or predictions == 1
    _, c, h, w = size
    flat = ready.kind == "channel" and ready.stride_c == h * w and (not signs or h * w % 8 == 0)
    joins_channels = (flat or ready.kind == "none") and not channels_apart
    joins_samples = ready.kind == "none" and not per_sample
    # Steps are written out once for every prediction: as many loads in flight as with one.
    steps = max(1, max_steps // predictions)
    programs, warps, sizes, tile = _split(
        batch, c, h * w, channels_last, joins_samples, joins_channels, signs, elements, steps
    )
    kind = "plane" if flat and joins_channels else ready.kind
    unit = 1 if ready.stride_n % 8 or ready.stride_c % 8 else 8
    return Layer(
        ready.tensor,
        programs,
        warps,
        packed((*sizes, ready.stride_n // unit, ready.stride_c // unit)),
        Tile(kind, c if kind == "interleaved" else 1, unit, predictions, shared, *tile, width),
    )


@functools.lru_cache(maxsize=1024)
def _split(
    n: int,
    c: int,
    pixels: int,
    channels_last: bool,
    joins_samples: bool,
    joins_channels: bool,
    signs: bool,
    elements: int,
    max_steps: int,
) -> tuple[int, int, tuple[int, ...], tuple[bool, int, int, int]]:
    """(programs, warps, the first sizes of `Layer`, WHOLE to STEPS of `Tile`)."""
    samples, channels, length = (n, 1, pixels * c) if channels_last else (n, c, pixels)
    if joins_samples:
        samples, channels = 1, samples * channels
    if joins_channels and (not signs or length % 8 == 0):
        channels, length = 1, channels * length
    groups = triton.cdiv(length, 8)
    _, rows, warps = next(row for row in TILES if elements <= row[0])
    block_g = min(rows, triton.next_power_of_2(groups))
    block_c = min(rows // block_g, triton.next_power_of_2(channels))
    steps = 1
    if block_c == 1:
        # Evenly filled programs: 6 channels are two steps of 3, not 4 and 2.
        steps = triton.cdiv(channels, triton.cdiv(channels, max_steps))
    tiles = triton.cdiv(groups, block_g)
    chunks = triton.cdiv(channels, block_c * steps)
    sizes = length, groups, channels, tiles, chunks, samples
    return samples * tiles * chunks, warps, sizes, (length % 8 == 0, block_c, block_g, steps)


def empty_signs(like: Tensor, size: Any, channels_last: bool, save: bool = True) -> Tensor:
    """Packed signs (uint8, 1-D), see `pack_signs`; the same size in both layouts, empty if none are kept."""
    n, c, h, w = size
    allocated = 2 * n * c * ((h * w + 7) // 8) if save else 0
    if channels_last and h * w % 8:
        # Whole samples need less padding than planes: the rest of the buffer is not written.
        return torch.zeros(allocated, dtype=torch.uint8, device=like.device)
    return torch.empty(allocated, dtype=torch.uint8, device=like.device)


def loads_width(pred: Tensor, target: Tensor) -> int:
    """Elements of a row, see `pixel_tile.py`, where images are only read: halves are read 16 bytes at once."""
    return 4 if pred.dtype == torch.float32 and target.dtype == torch.float32 else 8


def stores_width(*stored: Tensor) -> int:
    """Elements of a row where images are written.

    Triton writes at most 16 bytes of a row at once and would move longer rows through shared memory first.
    """
    return 4 if any(t.dtype == torch.float32 and t.numel() for t in stored) else 8


def empty_gradients(
    like: Tensor,
    size: Any,
    channels_last: bool,
    pred_dtype: torch.dtype,
    target_dtype: torch.dtype,
    need_pred: bool,
    need_target: bool,
) -> tuple[Tensor, Tensor]:
    """Buffers of (grad_pred, grad_target) [N, C, H, W]; one that is not needed is empty."""
    pred, target = (
        empty_image(like, size, channels_last, dtype)
        if needed
        else torch.empty(0, dtype=dtype, device=like.device)
        for dtype, needed in ((pred_dtype, need_pred), (target_dtype, need_target))
    )
    return pred, target


def on_device(t: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the GPU of `t` current; free where it already is."""
    if not t.is_cuda or t.get_device() == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device_of(t)
