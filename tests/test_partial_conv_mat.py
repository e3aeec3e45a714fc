"""MAT's layer, made of `partial_conv2d` as its docstring says, against what the released layer computed."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from harness import DTYPES, Backend
from parity_cases import load
from partial_conv_cases import exact_convolutions  # noqa: F401
from pixel_cases import skip_unsupported
from torch import Tensor

import inpaint_kernels as ik


def mat_layer(
    x: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor, lrelu: bool, down: int, backend: str
) -> ik.PartialConvOutput:
    """Conv2dLayerPartial(..., activation="lrelu" or "linear", down=1 or 2) for odd kernels."""
    gain = math.sqrt(2) if lrelu else 1.0
    weight = weight * gain / math.sqrt(weight[0].numel())
    bias = None if bias is None else bias * gain
    padding = weight.shape[-1] // 2
    if down == 2:
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        kernel = torch.outer(line, line).to(x).expand(x.shape[1], 1, 4, 4)
        x = F.conv2d(x, kernel, padding=padding + 1, groups=x.shape[1])
        mask, padding = F.pad(mask, (padding, 0, padding, 0)), 0
    return ik.partial_conv2d(
        x,
        weight,
        bias,
        mask,
        stride=down,
        padding=padding,
        mask_input=False,
        scale_bias=True,
        activation="leaky_relu" if lrelu else "none",
        negative_slope=0.2,
        backend=backend,
    )


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize(
    ("layer", "lrelu", "down"), [("partial0", True, 1), ("partial1", False, 1), ("partial2", True, 2)]
)
def test_layer(layer: str, lrelu: bool, down: int, dtype: str, backend: Backend) -> None:
    case = load("MAT_partial_conv", DTYPES[dtype])
    want = case.under(f"{layer}.")
    x, mask = case.images("x").to(backend.device), case.masks["binary"].to(backend.device)
    skip_unsupported(backend, x)
    leaves = {"x": x, **{name: want[name].to(x) for name in ("weight", "bias") if name in want}}
    for leaf in leaves.values():
        leaf.requires_grad_()
    out, new_mask = mat_layer(x, leaves["weight"], leaves.get("bias"), mask, lrelu, down, backend.name)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    found = torch.autograd.grad(out, list(leaves.values()), upstream)
    assert torch.equal(new_mask.double().cpu(), want["new_mask"])
    figures = {"out": out, **{f"grad_{name}": got for name, got in zip(leaves, found, strict=True)}}
    # float64 against figures stored in float32; float32 adds the roundings of a sum over 2048 windows.
    bound = 6e-8 if dtype == "f64" else 2e-6
    for name, got in figures.items():
        error = got.detach().cpu().double() - want[name]
        assert float(error.norm() / want[name].norm()) < bound, name
