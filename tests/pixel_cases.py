"""Formulas and inputs shared by the tests of the pixel losses (masked_l1, hole_valid).

The formulas are written here from the definition, on purpose without the package's reference, so that the
reference and the kernels cannot be wrong together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import DTYPES, EMULATING, INTERPRETING, LAYOUTS, Backend, backend_for, generator, laid_out
from hypothesis import strategies as st
from torch import Tensor

import inpaint_kernels as ik

# Parameters unlike the defaults, so that an ignored one shows.
PARAMS = {"l1": 0.0, "l2": 0.0, "charbonnier": 0.05, "huber": 0.4}
PENALTIES = tuple(PARAMS)
NORMALIZATIONS = ("mask", "image", "sample")
# (reduction, normalize) by name.
MODES = {n: ("mean", n) for n in NORMALIZATIONS} | {"sum": ("sum", "mask"), "none": ("none", "mask")}

# Mask shape from (N, C, H, W). The documentation names the first ones, the others broadcast as well.
MASK_SHAPES: dict[str, Callable[[int, int, int, int], tuple[int, ...] | None]] = {
    "nomask": lambda n, c, h, w: None,
    "n1hw": lambda n, c, h, w: (n, 1, h, w),
    "11hw": lambda n, c, h, w: (1, 1, h, w),
    "hw": lambda n, c, h, w: (h, w),
    "nchw": lambda n, c, h, w: (n, c, h, w),
    "1chw": lambda n, c, h, w: (1, c, h, w),
    "n1h1": lambda n, c, h, w: (n, 1, h, 1),
    "1c11": lambda n, c, h, w: (1, c, 1, 1),
    "111w": lambda n, c, h, w: (1, 1, 1, w),
}
MASK_DTYPES = {**DTYPES, "bool": torch.bool, "u8": torch.uint8}

# (N, C, H, W) by the code path it takes.
SIZES = {
    "1x1": (1, 1, 1, 1),  # a single element: all tail
    "tail": (2, 3, 5, 7),  # planes of 35: whole sign groups of 8 and a rest, less than a vector chunk
    "vectors": (2, 3, 16, 16),  # planes of 256: whole vectors only, planes joined to one row where possible
    "c17": (1, 17, 9, 11),  # odd planes, and more channels than a vector is wide or a program steps through
    "tiles": (2, 3, 25, 27),  # planes of 675: two Triton tiles of 512, the second one partial
    "flat": (3, 1, 1, 29),  # one row
    "tall": (2, 2, 33, 1),  # one column
}
# Of the CUDA kernels: a thread does 2 vectors of 4 or 8 elements in 2 segments, or in 2 stretches of the only
# segment; a block has 128 threads.
if EMULATING:
    SIZES = {
        "1x1": (1, 1, 1, 1),
        "odd": (2, 3, 9, 13),  # planes of 117: rows of 16 threads, elements one by one
        "halves": (2, 3, 6, 10),  # planes of 60: vectors of 4 but not of 8, a sign group cut in the middle
        "vectors": (2, 3, 16, 32),  # planes of 512: whole vectors, less than a block
        "tiles": (1, 2, 48, 56),  # planes of 2688: several tiles a plane, the last one partial
        "gray": (2, 1, 40, 60),  # one segment a sample also in NCHW
        "c17": (2, 17, 4, 6),  # more channels than rows of threads
        "c70": (1, 70, 12, 12),  # several tiles across the channels
        "samples": (1100, 1, 1, 3),  # more samples than threads in the last stage
    }
# Too large for the interpreter.
elif not INTERPRETING:
    SIZES["chunks"] = (2, 3, 96, 131)  # planes of 12576: two 8192-element CPU chunks, the second one partial
    SIZES["manychunks"] = (1, 2, 203, 207)  # planes of 42021: six CPU chunks and an odd tail
# Larger work per program on a GPU: more than 2^20 and more than 2^26 elements.
GPU_SIZES = {"megapixel": (2, 3, 431, 433), "batch": (22, 3, 1024, 1024)}


def penalty_map(d: Tensor, penalty: str) -> Tensor:
    param = PARAMS[penalty]
    if penalty == "l1":
        return d.abs()
    if penalty == "l2":
        return d.square()
    if penalty == "charbonnier":
        return (d.square() + param**2).sqrt()
    # Infinity has the slope `param`, which a choice between two branches would make NaN.
    near = d.clamp(-param, param)
    return near * (d - near / 2)


def weighted(pred: Tensor, target: Tensor, weight: Tensor, penalty: str, select: bool = True) -> Tensor:
    d = pred - target
    if select:
        d = d.masked_fill(weight == 0, 0.0)
    return weight * penalty_map(d, penalty)


def ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return numerator / denominator if denominator != 0 else 0.0 * numerator


def reduced(values: Tensor, weight: Tensor, normalize: str) -> Tensor:
    if values.numel() == 0:
        return values.sum()
    if normalize == "image":
        return values.sum() / values.numel()
    if normalize == "mask":
        return ratio(values.sum(), weight.sum())
    return torch.stack([ratio(v.sum(), w.sum()) for v, w in zip(values, weight, strict=True)]).mean()


def masked_formula(
    pred: Tensor, target: Tensor, mask: Tensor | None = None, *, penalty: str, mode: str, select: bool = True
) -> Tensor:
    """The masked pixel losses. `select=False`: a plain product, differentiable in the mask."""
    reduction, normalize = MODES[mode]
    weight = torch.ones_like(pred) if mask is None else mask.expand(pred.shape)
    values = weighted(pred, target, weight, penalty, select)
    if reduction == "none":
        return values
    return values.sum() if reduction == "sum" else reduced(values, weight, normalize)


def hole_valid_formula(
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    penalty: str,
    normalize: str,
    mask_is: str = "valid",
    select: bool = True,
) -> tuple[Tensor, Tensor]:
    valid = mask.expand(pred.shape)
    hole = 1 - valid
    if mask_is == "hole":
        hole, valid = valid, hole
    return (
        reduced(weighted(pred, target, hole, penalty, select), hole, normalize),
        reduced(weighted(pred, target, valid, penalty, select), valid, normalize),
    )


def masked_call(backend: Backend | None, *, penalty: str, mode: str) -> Callable[..., Tensor]:
    """The public function of a penalty, as a function of (pred, target, mask)."""
    reduction, normalize = MODES[mode]
    name = backend_for("masked_l1 none" if reduction == "none" else "masked_l1", backend)
    settings = {"reduction": reduction, "normalize": normalize, "backend": name}
    function, parameter = {
        "l1": (ik.masked_l1_loss, {}),
        "l2": (ik.masked_mse_loss, {}),
        "charbonnier": (ik.masked_charbonnier_loss, {"eps": PARAMS["charbonnier"]}),
        "huber": (ik.masked_huber_loss, {"delta": PARAMS["huber"]}),
    }[penalty]
    return partial(function, **settings, **parameter)


def hole_valid_call(
    backend: Backend | None,
    *,
    penalty: str,
    normalize: str,
    mask_is: str = "valid",
    process_group: Any = None,
) -> Callable[..., tuple[Tensor, Tensor]]:
    parameter = {"charbonnier": {"eps": PARAMS["charbonnier"]}, "huber": {"delta": PARAMS["huber"]}}
    settings = {
        "penalty": penalty,
        "normalize": normalize,
        "mask_is": mask_is,
        "process_group": process_group,
    }
    return partial(
        ik.hole_valid_loss, **settings, **parameter.get(penalty, {}), backend=backend and backend.name
    )


def image_pair(
    size: tuple[int, ...], dtypes: str = "f32/f32", layouts: str = "contiguous/contiguous", seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(pred, target): a quarter of the elements equal, the others apart by about 0.5."""
    rng = generator(seed)
    target = torch.randn(size, generator=rng)
    difference = 0.5 * torch.randn(size, generator=rng)
    # Through bfloat16 both hold values that every dtype can, so that ties stay ties in mixed dtypes.
    target = target.bfloat16().float()
    pred = torch.where(
        torch.rand(size, generator=rng) < 0.25, target, (target + difference).bfloat16().float()
    )
    if dtypes in ("f32/f32", "f64/f64"):
        pred = torch.where(pred == target, pred, target + difference)
    return tuple(  # type: ignore[return-value]
        laid_out(x.to(DTYPES[dtype]), layout)
        for x, dtype, layout in zip((pred, target), dtypes.split("/"), layouts.split("/"), strict=True)
    )


def make_mask(
    kind: str, size: tuple[int, int, int, int], dtype: str = "f32", values: str = "mixed", seed: int = 1
) -> Tensor | None:
    """A mask by kind. `values`: mixed (0, 1 and, if floating, fractions), binary, zeros, ones."""
    shape = MASK_SHAPES[kind](*size)
    if shape is None:
        return None
    rng = generator(seed)
    mask = (torch.rand(shape, generator=rng) < 0.6).float()
    if values == "mixed" and MASK_DTYPES[dtype].is_floating_point:
        mask = torch.where(torch.rand(shape, generator=rng) < 0.3, torch.rand(shape, generator=rng), mask)
    if values in ("zeros", "ones"):
        mask.fill_(values == "ones")
    return mask.to(MASK_DTYPES[dtype])


def on_device(backend: Backend, *tensors: Tensor | None) -> list[Tensor | None]:
    """Moved with their strides, gaps and misalignment."""
    moved: list[Tensor | None] = []
    for t in tensors:
        if t is not None and backend.device != t.device.type:
            storage = t.new_empty(0).set_(t.untyped_storage()).to(backend.device)
            t = storage.as_strided(t.shape, t.stride(), t.storage_offset())
        moved.append(t)
    return moved


def skip_unsupported(backend: Backend, *tensors: Tensor) -> None:
    if backend.name in ("triton", "cuda") and any(t.dtype == torch.float64 for t in tensors):
        pytest.skip("float64 runs on reference and cpu")


def skip_without_memory(backend: Backend, need: int) -> None:
    if backend.device == "cuda":
        free = torch.cuda.mem_get_info()[0]
    else:
        # Not SC_AVPHYS_PAGES, which takes the page cache for used.
        meminfo = Path("/proc/meminfo")
        if not meminfo.exists():
            pytest.skip("free memory is unknown on this system")
        lines = meminfo.read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if free < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB, {free / 2**30:.0f} GiB are free")


def away_from_kinks(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Differences clear of 0 and of huber's delta, which a numerical derivative would straddle."""
    difference = pred - target
    size = torch.where(difference.abs() > 0.3, 0.6, 0.15)
    return target + torch.where(difference >= 0, size, -size), target.clone()


def with_specials(x: Tensor, where: Tensor) -> Tensor:
    """NaN, Inf and -Inf in turn at the places of `where`."""
    specials = torch.tensor([float("nan"), float("inf"), float("-inf")]).repeat(x.numel())[: x.numel()]
    return torch.where(where.expand(x.shape), specials.view(x.shape).to(x.dtype), x)


@st.composite
def image_cases(draw: Any, masks: Sequence[str] = tuple(MASK_SHAPES)) -> dict[str, Any]:
    """Inputs of any size, layout, dtype and mask, drawn by name: {"pred", "target", "mask"}."""
    size = tuple(draw(st.integers(low, high)) for low, high in ((0, 3), (1, 5), (1, 19), (1, 19)))
    floats = st.sampled_from(("f16", "bf16", "f32"))
    layout = st.sampled_from(list(LAYOUTS))
    # From 100 on Hypothesis also draws numbers that it finds in the modules a process has imported: another process
    # would get other cases.
    seed = draw(st.integers(0, 99))
    pair = image_pair(size, f"{draw(floats)}/{draw(floats)}", f"{draw(layout)}/{draw(layout)}", seed)
    values = draw(st.sampled_from(("mixed", "mixed", "binary", "zeros", "ones")))
    mask = make_mask(
        draw(st.sampled_from(masks)), size, draw(st.sampled_from(list(MASK_DTYPES))), values, seed
    )
    if mask is not None:
        mask = laid_out(mask, draw(layout))
    return {"pred": pair[0], "target": pair[1], "mask": mask}
