"""SSIM, masked SSIM, L1 + SSIM and MS-SSIM against the usual formula with depthwise convolutions.

The plain formula is that of pytorch-msssim: a Gaussian filter of rows and one of columns, applied to both images,
their squares and their product. Masked, it sums the same products times the mask and divides by the filtered mask.
The rewrite filters all five at once. What is timed as "plain" is the package frame-analytics, where it is installed,
and beside the one-pass loss its two terms apart.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import Benchmark, Bytes, Case, Formula, Terms, image_inputs

C1, C2 = 0.01**2, 0.03**2
SSIM_WEIGHT = 0.2
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Tensor | None]:
    """Images from 0 to 1, as different as a half-trained prediction is: of unlike images no scale has contrast."""
    inputs = image_inputs(case, device, generator)
    pred, target = inputs["pred"], inputs["target"]
    assert pred is not None
    assert target is not None
    noise = pred.detach()
    unit = target * 0.5 + 0.5
    inputs["target"] = unit
    inputs["pred"] = (0.7 * unit + 0.15 * (noise + 1)).to(case.dtype).requires_grad_()
    return inputs if "masked" in case.variant else {name: inputs[name] for name in ("pred", "target")}


def _filtered(x: Tensor) -> Tensor:
    channels = x.shape[1]
    row = torch.exp(-((torch.arange(11, dtype=torch.float64, device=x.device) - 5) ** 2) / (2 * 1.5**2))
    window = (row / row.sum()).to(x.dtype).view(1, 1, 1, 11).expand(channels, 1, 1, 11)
    return F.conv2d(F.conv2d(x, window, groups=channels), window.transpose(2, 3), groups=channels)


def _compared(mx: Tensor, my: Tensor, xx: Tensor, yy: Tensor, xy: Tensor) -> tuple[Tensor, Tensor]:
    """(similarity, contrast) of every window."""
    vx, vy, cov = xx - mx * mx, yy - my * my, xy - mx * my
    contrast = (2 * cov + C2) / (vx + vy + C2)
    return (2 * mx * my + C1) / (mx * mx + my * my + C1) * contrast, contrast


def _maps(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    products = (pred, target, pred * pred, target * target, pred * target)
    if mask is None:
        return _compared(*map(_filtered, products))
    total = _filtered(mask).clamp(min=1e-8)
    return _compared(*(_filtered(mask * x) / total for x in products))


def _maps_at_once(pred: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    products = torch.cat([pred, target, pred * pred, target * target, pred * target], 1)
    return _compared(*_filtered(products).chunk(5, 1))


def _ssim(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    similarity = _maps(pred, target, mask)[0]
    if mask is None:
        return similarity.mean()
    centre = mask[..., 5:-5, 5:-5]
    return ((similarity * centre).sum((2, 3)) / centre.sum((2, 3))).mean()


def _ms_ssim(pred: Tensor, target: Tensor) -> Tensor:
    value: Tensor | None = None
    for scale, weight in enumerate(SCALE_WEIGHTS):
        similarity, contrast = (x.mean((2, 3)) for x in _maps(pred, target))
        factor = F.relu(similarity if scale == len(SCALE_WEIGHTS) - 1 else contrast) ** weight
        value = factor if value is None else value * factor
        padding = [side % 2 for side in pred.shape[2:]]
        pred, target = (F.avg_pool2d(x, 2, padding=padding) for x in (pred, target))
    assert value is not None
    return value.mean()


def _l1_ssim(pred: Tensor, target: Tensor) -> Tensor:
    return (1 - SSIM_WEIGHT) * (pred - target).abs().mean() + SSIM_WEIGHT * (1 - _ssim(pred, target))


def eager(case: Case) -> Formula:
    kinds: dict[str, Callable[..., Tensor]] = {"l1_ssim": _l1_ssim, "ms_ssim": _ms_ssim}
    formula = kinds.get(case.variant.split()[0], _ssim)

    def terms(**images: Tensor) -> Terms:
        return (formula(**_in_full(images)),)

    return terms


def _in_full(images: dict[str, Tensor]) -> dict[str, Tensor]:
    """Half types as float32: E[x^2] - (E[x])^2 in bfloat16 is wrong by a tenth."""
    return {name: x.float() if x.dtype.itemsize == 2 else x for name, x in images.items()}


def fused(case: Case, backend: str) -> Formula:
    import inpaint_kernels as ik

    def terms(pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Terms:
        if case.variant == "l1_ssim":
            return (ik.l1_ssim_loss(pred, target, mask, ssim_weight=SSIM_WEIGHT, backend=backend),)
        function = ik.ms_ssim if case.variant == "ms_ssim" else ik.ssim
        return (function(pred, target, mask, backend=backend),)

    return terms


def rewrite(case: Case) -> Formula | None:
    def terms(pred: Tensor, target: Tensor) -> Terms:
        images = _in_full({"pred": pred, "target": target})
        return (_maps_at_once(**images)[0].mean(),)

    return terms if case.variant == "ssim" else None


def baseline(case: Case) -> Formula | None:
    """frame-analytics, and of the one-pass loss its two terms apart, by this library."""
    if case.variant == "ssim" and importlib.util.find_spec("frame_analytics") is not None:
        peer = importlib.import_module("frame_analytics")
        return lambda pred, target: (peer.ssim(pred, target, data_range=1.0),)
    if case.variant != "l1_ssim":
        return None
    import inpaint_kernels as ik

    def terms(pred: Tensor, target: Tensor) -> Terms:
        l1, similarity = ik.masked_l1_loss(pred, target), ik.ssim(pred, target)
        return ((1 - SSIM_WEIGHT) * l1 + SSIM_WEIGHT * (1 - similarity),)

    return terms


def minimum_bytes(case: Case) -> Bytes:
    """Both passes read the images, the backward writes a gradient; MS-SSIM does so at five scales."""
    image = case.numel * case.dtype.itemsize
    mask = image // case.shape[1] if "masked" in case.variant else 0
    if "ms_ssim" in case.variant:
        image = image * 4 // 3
    return Bytes(2 * image + mask, 3 * image + mask)


LARGE = (2, 3, 512, 512)
SMALL = (1, 3, 64, 64)
HUGE = (16, 3, 512, 512)
FIVE_SCALES = {"least_side": 161}

BENCHMARK = Benchmark(
    op="ssim",
    cases=[
        Case(LARGE, "ssim"),
        Case(LARGE, "ssim", torch.bfloat16),
        Case(LARGE, "ssim channels-last", layout="channels_last"),
        Case(LARGE, "ssim masked"),
        Case(LARGE, "l1_ssim"),
        Case(LARGE, "ms_ssim", options=FIVE_SCALES),
        Case(SMALL, "ssim", quick=True),
        Case(SMALL, "l1_ssim", quick=True),
        Case(SMALL, "ssim masked", quick=True),
        Case((1, 3, 176, 176), "ms_ssim", options=FIVE_SCALES),
        Case(HUGE, "ssim", devices=("cuda",)),
        Case(HUGE, "ssim masked", devices=("cuda",)),
    ],
    make_inputs=make_inputs,
    eager=eager,
    rewrite=rewrite,
    fused=fused,
    baseline=baseline,
    minimum_bytes=minimum_bytes,
    # float32: what the plain formula is off by.
    tolerances={torch.float32: 1e-4, torch.bfloat16: 2.0**-7},
)
