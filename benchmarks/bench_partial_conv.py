"""Partial convolution against NVIDIA's formula op by op, and against the plain convolution inside it.

The rewrite is the best that stock operators do: the mask summed over channels before a box filter of one plane,
the bias left out of the convolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .harness import Benchmark, Bytes, Case, Formula, Terms, image_inputs

SINGLE, MULTI = "single-channel mask", "multi-channel mask"


def _is_multi(case: Case) -> bool:
    return case.variant.startswith(MULTI)


def _outputs(case: Case) -> int:
    return int(case.options.get("out", case.shape[1]))


def nvidia(
    input: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, multi_channel: bool, stride: int, padding: int
) -> tuple[Tensor, Tensor]:
    """models/partialconv2d.py of NVIDIA/partialconv: the output and the new mask."""
    with torch.no_grad():
        shape = weight.shape if multi_channel else (1, 1, *weight.shape[2:])
        ones = torch.ones(shape, dtype=mask.dtype, device=mask.device)
        new_mask = F.conv2d(mask, ones, None, stride, padding)
        ratio = ones[0].numel() / (new_mask + 1e-8)
        new_mask = torch.clamp(new_mask, 0, 1)
        ratio = ratio * new_mask
    raw = F.conv2d(torch.mul(input, mask), weight, bias, stride, padding)
    shift = bias.view(1, -1, 1, 1)
    return torch.mul(torch.mul(raw - shift, ratio) + shift, new_mask), new_mask


def eager(case: Case) -> Formula:
    multi_channel = _is_multi(case)

    def formula(input: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Terms:
        return nvidia(input, weight, bias, mask, multi_channel, 1, 1)[:1]

    return formula


def rewrite(case: Case) -> Formula:
    size = 9.0 * (case.shape[1] if _is_multi(case) else 1)

    def formula(input: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Terms:
        with torch.no_grad():
            plane = mask.float().sum(1, keepdim=True)
            covered = F.conv2d(plane, plane.new_ones(1, 1, 3, 3), padding=1)
            new_mask = covered.clamp(0, 1)
            ratio = torch.where(covered > 0, size / covered, 0.0).mul_(new_mask).to(input.dtype)
            new_mask = new_mask.to(input.dtype)
        raw = F.conv2d(input * mask, weight, None, padding=1)
        return (torch.addcmul(bias.view(1, -1, 1, 1) * new_mask, raw, ratio),)

    return formula


def baseline(case: Case) -> Formula:
    def formula(input: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Terms:
        return (F.conv2d(input, weight, bias, padding=1),)

    return formula


def fused(case: Case, backend: str) -> Formula:
    import inpaint_kernels as ik

    def formula(input: Tensor, weight: Tensor, bias: Tensor, mask: Tensor) -> Terms:
        return (ik.partial_conv2d(input, weight, bias, mask, padding=1, backend=backend).output,)

    return formula


def minimum_bytes(case: Case) -> Bytes:
    """Input, mask and weight in, output out; backward reads the gradient and those again and writes two gradients."""
    n, c, h, w = case.shape
    size = case.dtype.itemsize
    image, out = n * c * h * w * size, n * _outputs(case) * h * w * size
    mask = image if _is_multi(case) else n * h * w * size
    weight = 9 * c * _outputs(case) * size
    return Bytes(image + mask + weight + out, out + 2 * image + mask + 2 * weight)


def make_inputs(case: Case, device: torch.device, generator: torch.Generator) -> dict[str, Tensor | None]:
    images = image_inputs(case, device, generator)
    image, mask = images["pred"], images["mask"]
    assert image is not None and mask is not None
    n, c, h, w = case.shape
    memory_format = torch.channels_last if case.layout == "channels_last" else torch.contiguous_format
    outputs = _outputs(case)
    weight = torch.randn(outputs, c, 3, 3, generator=generator, device=device) / (9 * c) ** 0.5
    bias = torch.randn(outputs, generator=generator, device=device)
    upstream = torch.randn(n, outputs, h, w, generator=generator, device=device)
    if _is_multi(case):
        mask = mask.expand(n, c, h, w).contiguous(memory_format=memory_format)
    return {
        "input": image,
        "weight": weight.to(case.dtype).contiguous(memory_format=memory_format).requires_grad_(),
        "bias": bias.to(case.dtype).requires_grad_(),
        "mask": mask,
        "upstream": upstream.to(case.dtype).contiguous(memory_format=memory_format),
    }


_LAYER, _CPU = (4, 64, 128, 128), ("cpu",)
_WIDE, _DEEP = (16, 64, 256, 256), (16, 256, 64, 64)


def _half(shape: tuple[int, int, int, int], variant: str) -> Case:
    return Case(shape, variant, torch.bfloat16, "channels_last", devices=("cuda",))


BENCHMARK = Benchmark(
    op="partial_conv",
    cases=[
        Case(_LAYER, MULTI, devices=_CPU),
        Case(_LAYER, SINGLE, devices=_CPU),
        Case(_LAYER, f"{MULTI} channels_last", layout="channels_last", devices=_CPU),
        Case(_LAYER, MULTI, torch.bfloat16, devices=_CPU),
        Case((4, 19, 128, 128), f"{MULTI}, 3 out", options={"out": 3}, devices=_CPU),
        Case((1, 16, 64, 64), SINGLE, quick=True),
        _half(_WIDE, MULTI),
        _half(_WIDE, SINGLE),
        _half(_DEEP, MULTI),
        _half(_DEEP, SINGLE),
    ],
    make_inputs=make_inputs,
    eager=eager,
    rewrite=rewrite,
    baseline=baseline,
    fused=fused,
    minimum_bytes=minimum_bytes,
    # float32: sums of 576 products; bfloat16: the result of the convolution and its sums are rounded to 8 bits.
    tolerances={torch.float32: 1e-5, torch.bfloat16: 2.0**-5},
    layer=True,
)
