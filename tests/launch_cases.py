"""Calls of the Triton launchers on tensors of the meta device, for every op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from aot import Launch, meta, record
from harness import DTYPES
from torch import Tensor

from inpaint_kernels.triton_kernels import (
    feature_distance,
    gram,
    hole_valid,
    inpainting_pixel,
    lpips,
    masked_l1,
    partial_conv,
    ssim,
    stacked_images,
    style,
    total_variation,
)

Size = tuple[int, int, int, int]
IMAGE: Size = (8, 3, 512, 512)
PARTIAL_CONV = ("mask_input", "finish", "finish_backward", "window")


class Case(NamedTuple):
    """A call of one launcher; each op reads the fields that it has a use for."""

    op: str  # or one of PARTIAL_CONV, its launchers
    dtypes: str = "f32/f32"  # pred / target, of partial_conv what is read / what is written
    size: Size = IMAGE
    channels_last: bool = False
    mask: torch.dtype | None = torch.float32
    mask_channels: int = 1  # of partial_conv also those of the planes
    penalty: str = "l1"
    backward: str = ""  # which gradients: "pred", "target" or "pred,target"
    reduction: str = "mean"
    normalize: str = "image"
    region: str = "dilated_hole"
    composite: bool = True  # total variation of a composite, not of an image
    parts: tuple[int, ...] = (0, 1, 2)
    constants: bool = True
    swap: bool = False
    layers: tuple[
        int, ...
    ] = ()  # channels of the layers after the first, which have as many elements in a row
    predictions: int = 1
    precision: str = "ieee"  # torch's name for "highest"; "tf32" otherwise
    activation: str = "relu"
    turned: bool = False  # whether the result has the other layout
    kernel: tuple[int, ...] = (3, 3)  # of ssim the window
    contrast: bool = False
    l1: bool = False  # beside ssim

    def __str__(self) -> str:
        default = Case("")
        parts = (
            f"{name}={'x'.join(map(str, value)) if isinstance(value, tuple) else value}"
            for name, value in self._asdict().items()
            if value != getattr(default, name) and name != "op"
        )
        return " ".join([self.op, *parts])


def launches(case: Case) -> list[Launch]:
    """What the launcher would launch."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = case.precision
    try:
        return record(lambda: CALLS[case.op](case))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _images(case: Case) -> list[Tensor]:
    return [meta(case.size, DTYPES[name], case.channels_last) for name in case.dtypes.split("/")]


def _mask(case: Case) -> Any:
    n, _, h, w = case.size
    return None if case.mask is None else meta((n, case.mask_channels, h, w), case.mask, case.channels_last)


def _needed(case: Case) -> tuple[bool, bool]:
    return "pred" in case.backward, "target" in case.backward


def _pixel(case: Case) -> None:
    n, c, h, w = case.size
    pred, target = _images(case)
    mask, l1 = _mask(case), case.penalty == "l1"
    two_regions = case.op == "hole_valid"
    if not case.backward:
        if two_regions:
            hole_valid.forward(pred, target, mask, case.penalty, 1e-3, "mask", False, l1)
        else:
            masked_l1.forward(pred, target, mask, case.penalty, 1e-3, case.reduction, "mask", l1)
        return
    is_map = case.reduction == "none"
    grad = meta(case.size if is_map else ())
    scale = meta((0,) if is_map else (n, 2 if two_regions else 1))
    saved: tuple[Any, ...] = (None, mask, pred, target)
    if l1:
        saved = (meta((2 * n * c * h * w // 8,), torch.uint8), mask, None, None)
    image = (case.size, case.channels_last, pred.dtype, target.dtype, case.penalty, 1e-3)
    if two_regions:
        hole_valid.backward(grad, grad, scale, *saved, *image, False, *_needed(case))
    else:
        masked_l1.backward(grad, scale, *saved, *image, *_needed(case))


def _inpainting_pixel(case: Case) -> None:
    n, c, h, w = case.size
    pred, target = _images(case)
    weights = (6.0, 1.0, 0.1)
    if not case.backward:
        settings = (case.normalize, case.region, case.normalize, False, True)
        inpainting_pixel.forward(pred, target, _mask(case), *weights, *settings)
        return
    signs = meta((n * c * h * 6 * w // 8,), torch.uint8)
    saved = (meta((n, 2)), meta((2,)), signs, _mask(case))
    image = (case.size, case.channels_last, pred.dtype, target.dtype)
    grads = (meta(()), None, None, None)
    inpainting_pixel.backward(*grads, *saved, *image, *weights, case.region, False, *_needed(case))


def _total_variation(case: Case) -> None:
    n, c, h, w = case.size
    image, target = _images(case)
    composite = target if case.composite else None
    mask = None if case.region == "image" else _mask(case)
    l1, settings = case.penalty == "l1", (case.region, case.penalty)
    if not case.backward:
        total_variation.forward(image, composite, mask, *settings, case.normalize, False, l1)
        return
    saved: tuple[Any, ...] = (None, mask, image, composite)
    if l1:
        saved = (meta((n * c * h * 4 * w // 8,), torch.uint8), mask, None, None)
    size = (case.size, case.channels_last, image.dtype, target.dtype)
    rest = (case.composite, *settings, False, *_needed(case))
    total_variation.backward(meta(()), meta((2,)), *saved, *size, *rest)


def _stacked_images(case: Case) -> None:
    n, c, h, w = case.size
    pred, target = _images(case)
    parts = list(case.parts)
    # Three constants need 1 or 3 channels.
    constants = case.constants and c in (1, 3)
    scale, shift = ([4.4, 4.5, 4.4], [-2.1, -2.0, -1.8]) if constants else ([], [])
    if not case.backward:
        stacked_images.forward(pred, target, _mask(case), parts, scale, shift, case.swap, False)
        return
    dtype = torch.promote_types(pred.dtype, target.dtype)
    grad = meta((len(parts) * n, max(c, len(scale)), h, w), dtype, case.channels_last)
    image = (case.size, case.channels_last, pred.dtype, target.dtype)
    stacked_images.backward(grad, _mask(case), *image, parts, scale, case.swap, False, *_needed(case))


def _features(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Of each layer the input and the target."""
    n, first, h, w = case.size

    def layers(batch: int, dtype: str) -> list[Tensor]:
        return [
            meta((batch, c, h * first // c, w * first // c), DTYPES[dtype], case.channels_last)
            for c in (first, *case.layers)
        ]

    input_dtype, target_dtype = case.dtypes.split("/")
    return layers(n * case.predictions, input_dtype), layers(n, target_dtype)


def _gram(case: Case) -> None:
    (features,), _ = _features(case)
    if case.backward:
        n, c = features.shape[:2]
        gram.backward(meta((n, c, c)), features, "chw")
    else:
        gram.forward(features, "chw")


def _style(case: Case) -> None:
    inputs, targets = _features(case)
    if case.backward:
        factors = [meta((x.shape[0], x.shape[1], x.shape[1])) for x in inputs]
        style.backward(meta(()), factors, targets, -1.0)
    else:
        style.forward(inputs, targets, [1.0] * len(inputs), case.penalty, "chw", False, True)


def _feature_distance(case: Case) -> None:
    inputs, targets = _features(case)
    n, l1 = case.size[0], case.penalty == "l1"
    masks = [] if case.mask is None else [meta((n, 1, *x.shape[2:]), case.mask) for x in inputs]
    if not case.backward:
        weights = [1.0] * len(inputs)
        feature_distance.forward(inputs, targets, masks, weights, case.penalty, 1e-3, "mask", l1)
        return
    feature_distance.backward(
        meta(()),
        meta((len(inputs),)),
        [meta((x.numel() // 4,), torch.uint8) for x in inputs] if l1 else [],
        masks,
        [] if l1 else inputs,
        [] if l1 else targets,
        [extent for x in inputs for extent in (*x.shape, n)],
        [int(case.channels_last)] * len(inputs),
        [feature_distance.DTYPES.index(x.dtype) for x in inputs],
        case.penalty,
        1e-3,
    )


def _lpips(case: Case) -> None:
    inputs, targets = _features(case)
    n = case.size[0]
    weights = [meta((x.shape[1],)) for x in inputs]
    masks = [] if case.mask is None else [meta((n, 1, *x.shape[2:]), case.mask) for x in inputs]
    if not case.backward:
        lpips.forward(inputs, targets, weights, masks, 1e-10, True)
        return
    saved = [meta((4, x.shape[0], *x.shape[2:])) for x in inputs]
    wanted = [sum(bit * needed for bit, needed in zip((1, 2), _needed(case), strict=True))] * len(inputs)
    lpips.backward(meta((inputs[0].shape[0],)), inputs, targets, weights, masks, saved, wanted)


def _ssim(case: Case) -> None:
    n, c = case.size[:2]
    pred, target = _images(case)
    size = case.kernel[0]
    windows = ([1 / size] * size, case.region == "same", 1e-4, 9e-4)
    if not case.backward:
        ssim.forward(pred, target, _mask(case), *windows, case.contrast, case.l1)
        return
    by_contrast, by_l1 = meta((n, c)) if case.contrast else None, meta(()) if case.l1 else None
    saved = (meta((n * c + 1,)), pred, target, _mask(case))
    ssim.backward(meta((n, c)), by_contrast, by_l1, *saved, *windows, *_needed(case))


def _partial_conv(case: Case) -> None:
    n, c, h, w = case.size
    x, _ = _images(case)
    out = meta(case.size, DTYPES[case.dtypes.split("/")[1]], case.channels_last != case.turned)
    ratio = new_mask = meta((n, case.mask_channels, h, w))
    how = 1 + 4 * ("none", "relu", "leaky_relu").index(case.activation)
    if case.op == "mask_input":
        partial_conv.mask_input(x, _mask(case), out)
    elif case.op == "finish":
        partial_conv.finish(x, ratio, new_mask, meta((c,), x.dtype), how, 0.1, out)
    elif case.op == "finish_backward":
        output = None if case.activation == "none" else x
        partial_conv.finish_backward(x, output, ratio, new_mask, how, 0.1, True, out)
    else:
        windows = (*case.kernel, *[1] * 3 * len(case.kernel), 1)
        partial_conv.window(_mask(case), 1, windows, 9.0, "proportional", torch.float32)


CALLS: dict[str, Callable[[Case], None]] = {
    "masked_l1": _pixel,
    "hole_valid": _pixel,
    "inpainting_pixel": _inpainting_pixel,
    "total_variation": _total_variation,
    "stacked_images": _stacked_images,
    "gram": _gram,
    "style": _style,
    "feature_distance": _feature_distance,
    "lpips": _lpips,
    "ssim": _ssim,
    **dict.fromkeys(PARTIAL_CONV, _partial_conv),
}
