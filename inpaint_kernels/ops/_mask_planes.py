"""What a partial convolution makes of its mask alone: computed once per mask and geometry, then remembered."""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _library
from ..reference import partial_conv as reference

# Planes a process keeps for masks that are alive. Those of one 16x1x512x512 mask and layer are 32 MiB.
CACHE_BYTES = 256 << 20


class Geometry(NamedTuple):
    """Windows of a layer, and what it makes of their sums. Hashable: part of the cache's key."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    channels: int
    groups: int
    multi_channel: bool
    numerator: str
    update: str


def output_size(spatial: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> list[int]:
    """Spatial size of what these windows give."""
    return [
        (size + 2 * pad - spread * (extent - 1) - 1) // step + 1
        for size, extent, step, pad, spread in zip(spatial, kernel, stride, padding, dilation, strict=True)
    ]


def _window_fake(
    mask: Tensor,
    groups: int,
    multiplicity: int,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    numerator: float,
    update: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    planes = 1 if mask.shape[1] == 1 else groups
    size = [mask.shape[0], planes, *output_size(mask.shape[2:], kernel, stride, padding, dilation)]
    return mask.new_empty(size, dtype=dtype), mask.new_empty(size, dtype=dtype)


_window = _library.define_kernel(
    "partial_conv",
    "window",
    "(Tensor mask, int groups, int multiplicity, SymInt[] kernel, SymInt[] stride, SymInt[] padding, "
    "SymInt[] dilation, float numerator, str update, ScalarType dtype) -> (Tensor, Tensor)",
    fake=_window_fake,
)


def narrowed(mask: Tensor, spatial_dims: int) -> Tensor:
    """(N, C, ...) with 1 in place of a batch or channel dimension the mask was expanded along.

    Not of a mask that is differentiated: every element is due its own derivative.
    """
    if mask.ndim == spatial_dims:
        mask = mask[None, None]
    if mask.requires_grad or _library.transform_of((mask,)) is not None:
        return mask
    for dim in (0, 1):
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def compute(
    backend: str,
    mask: Tensor | None,
    spatial: Any,
    device: torch.device,
    geometry: Geometry,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(ratio, new_mask) planes, (N, 1 or groups, ...); no mask is one of ones."""
    if mask is None:
        mask = torch.ones((1, 1, *spatial), dtype=dtype, device=device)
    mask = narrowed(mask, len(geometry.kernel))
    members = geometry.channels // geometry.groups if geometry.multi_channel else 1
    numerator = float(members * math.prod(geometry.kernel)) if geometry.numerator == "window" else 1.0
    arguments = (
        mask,
        geometry.groups,
        members,
        geometry.kernel,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        numerator,
        geometry.update,
        dtype,
    )
    if backend == "reference":
        return reference.window_planes(*arguments)
    ratio, new_mask = _window[backend](*arguments)
    return ratio, new_mask


@dataclass(slots=True)
class _Planes:
    """`views`: the new mask as callers got it, and its version. The same object every time, so that the next layer
    finds it too."""

    ratio: Tensor
    new_mask: Tensor
    version: int
    bytes: int
    views: dict[tuple[int, ...], tuple[Tensor, int]]

    @property
    def untouched(self) -> bool:
        """Nobody wrote into a new mask that was returned, or made a parameter of it."""
        for view, version in self.views.values():
            if view._version != version or view.requires_grad:
                return False
        return self.new_mask._version == self.version


@dataclass(slots=True)
class _Owner:
    """A mask in the cache: dead or changed, it owns nothing any more."""

    mask: Any
    version: int
    address: int
    planes: dict[tuple[Any, ...], _Planes]

    @property
    def bytes(self) -> int:
        found = 0
        for planes in self.planes.values():
            found += planes.bytes
        return found


class _Cache:
    """Least recently used masks first, bounded in bytes. Entries go with their mask.

    A change of a mask is seen by its version counter, which every in-place operation of torch raises.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._owners: OrderedDict[Any, _Owner] = OrderedDict()
        self._dead: deque[Any] = deque()

    def clear(self) -> None:
        with self._lock:
            self._owners.clear()

    def __len__(self) -> int:
        with self._lock:
            self._bury()
            return sum(len(owner.planes) for owner in self._owners.values())

    def find(self, name: Any, mask: Tensor | None, key: tuple[Any, ...]) -> _Planes | None:
        with self._lock:
            self._bury()
            owner = self._owners.get(name)
            if owner is None:
                return None
            if mask is not None and (
                owner.mask() is not mask or owner.version != mask._version or owner.address != mask.data_ptr()
            ):
                del self._owners[name]
                return None
            self._owners.move_to_end(name)
            planes = owner.planes.get(key)
            if planes is not None and not planes.untouched:
                del owner.planes[key]
                return None
            return planes

    def keep(
        self, name: Any, mask: Tensor | None, version: int, key: tuple[Any, ...], planes: _Planes
    ) -> None:
        if planes.bytes > self.limit:
            return
        with self._lock:
            owner = self._owners.get(name)
            if owner is None or (mask is not None and owner.mask() is not mask) or owner.version != version:
                address = 0 if mask is None else mask.data_ptr()
                dead = None if mask is None else weakref.ref(mask, lambda _: self._died(name))
                owner = self._owners[name] = _Owner(dead, version, address, {})
            owner.planes[key] = planes
            self._owners.move_to_end(name)
            total = 0
            for each in self._owners.values():
                total += each.bytes
            while total > self.limit and len(self._owners) > 1:
                total -= self._owners.popitem(last=False)[1].bytes
            if total > self.limit:
                owner.planes = {key: planes}

    def _died(self, name: Any) -> None:
        # Runs wherever the last reference goes, also inside the methods above, which hold the lock.
        self._dead.append(name)
        if self._lock.acquire(blocking=False):
            try:
                self._bury()
            finally:
                self._lock.release()

    def _bury(self) -> None:
        while self._dead:
            owner = self._owners.get(name := self._dead.popleft())
            # The name (an address) may belong to another mask by now.
            if owner is not None and owner.mask is not None and owner.mask() is None:
                del self._owners[name]
            # The last reference goes here, and the masks that die with it are found by this loop.
            owner = None


cache = _Cache(CACHE_BYTES)


def _may_remember(mask: Tensor | None, device: torch.device) -> bool:
    """Only where an object stands for the same values until its version counter says otherwise."""
    if torch.is_inference_mode_enabled():
        return False
    if mask is not None and (type(mask) is not Tensor or mask.is_inference()):
        return False
    # A captured graph must compute the planes of whatever its mask holds when it is replayed.
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def find(
    backend: str,
    mask: Tensor | None,
    spatial: Any,
    device: torch.device,
    geometry: Geometry,
    dtype: torch.dtype,
    plain: bool,
    view: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor, Tensor]:
    """(ratio, new_mask, new mask expanded to (batch, channels) `view`), from the cache where that is possible.

    `plain`: no mode or subclass of torch watches.
    """
    if plain and _may_remember(mask, device):
        # Another stream would read planes that are still being written.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (backend, geometry, dtype, stream)
        name = ("ones", tuple(spatial), device) if mask is None else id(mask)
        found = cache.find(name, mask, key)
        if found is None:
            version = 0 if mask is None else mask._version
            # Kernels know no autograd; for them the second takes 3 us less.
            with torch.no_grad() if backend == "reference" else _library.below_autograd():
                ratio, new_mask = compute(backend, mask, spatial, device, geometry, dtype)
            found = _Planes(ratio, new_mask, new_mask._version, ratio.nbytes + new_mask.nbytes, {})
            cache.keep(name, mask, version, key, found)
        if not view:
            return found.ratio, found.new_mask, found.new_mask
        known = found.views.get(view)
        if known is None:
            expanded = expand(found.new_mask, view)
            known = found.views.setdefault(view, (expanded, expanded._version))
        return found.ratio, found.new_mask, known[0]
    ratio, new_mask = compute(backend, mask, spatial, device, geometry, dtype)
    return ratio, new_mask, expand(new_mask, view)


def expand(new_mask: Tensor, view: tuple[int, ...]) -> Tensor:
    """(N, 1 or groups, ...) as (batch, channels, ...): expanded, or repeated where groups differ."""
    if not view or new_mask.shape[:2] == view:
        return new_mask
    planes = reference.channel_planes(new_mask, view[1])
    return planes.expand(*view, *planes.shape[2:])
