"""Formulas, inputs and checks shared by the tests of partial convolution.

The formulas are written here from the definition and from the layers people copy, without the package's reference,
so that the two cannot be wrong together: window sums are a float64 convolution with ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import (
    DTYPES,
    FLOOR_ULPS,
    INTERPRETING,
    Backend,
    assert_gradient,
    assert_within_budget,
    evaluate,
    generator,
    laid_out,
    poisoned_allocations,
    same_bits,
    value_budget,
)
from pixel_cases import MASK_DTYPES, on_device, skip_unsupported
from torch import Tensor

import inpaint_kernels as ik

FUNCTIONS: dict[int, Callable[..., Any]] = {2: ik.partial_conv2d, 3: ik.partial_conv3d}
CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {2: F.conv2d, 3: F.conv3d}
# Unlike the default, so that an ignored one shows.
SLOPE = 0.2
# Added to the window sums by the layers in the wild, 1e-8 there. So small, it leaves float64 nothing to allow for.
EPSILON = 1e-13


ACTIVATIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "relu": {"activation": "relu"},
    "leaky": {"activation": "leaky_relu", "negative_slope": SLOPE},
    "leaky-default": {"activation": "leaky_relu"},
}

# What users combine.
FORMS: dict[str, dict[str, Any]] = {
    "usual": {},
    "relu": {"activation": "relu"},
    "mat": {
        "mask_input": False,
        "scale_bias": True,
        "activation": "leaky_relu",
        "negative_slope": SLOPE,
    },
    "soft": {"mask_update": "proportional"},
}
VOLUME = {"size": (2, 3, 5, 6, 7)}


@dataclass(frozen=True)
class Case:
    """One call: the input's size, the windows, and options other than the defaults."""

    size: tuple[int, ...] = (2, 4, 9, 11)
    outputs: int = 6
    kernel: int | tuple[int, ...] = 3
    stride: int | tuple[int, ...] = 1
    padding: int | str | tuple[int, ...] = 1
    dilation: int | tuple[int, ...] = 1
    groups: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dims(self) -> int:
        return len(self.size) - 2

    @property
    def windows(self) -> tuple[int, ...]:
        return (self.kernel,) * self.dims if isinstance(self.kernel, int) else self.kernel

    @property
    def geometry(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


@pytest.fixture(autouse=True)
def exact_convolutions() -> Iterator[None]:
    """cuDNN rounds float32 to TF32 by default, which would hide every error of a kernel."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


# ---- layers in the wild ------------------------------------------------------------------------------------------


class Layer(NamedTuple):
    output: Tensor
    new_mask: Tensor


def nvidia_layer(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    mask: Tensor | None,
    *,
    multi_channel: bool,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
) -> Layer:
    """NVIDIA/partialconv: models/partialconv2d.py and partialconv3d.py."""
    conv, where = CONVOLUTIONS[x.dim() - 2], (stride, padding, dilation)
    with torch.no_grad():
        ones = torch.ones_like(w) if multi_channel else torch.ones_like(w[:1, :1])
        if mask is not None:
            seen = mask
        else:
            seen = torch.ones_like(x) if multi_channel else torch.ones_like(x[:1, :1])
        update = conv(seen, ones, None, *where)
        ratio = ones[0].numel() / (update + EPSILON)
        update = update.clamp(0, 1)
        ratio = ratio * update
    raw = conv(x if mask is None else x * mask, w, b, *where)
    if b is None:
        return Layer(raw * ratio, update)
    bias = b.view(1, -1, *[1] * (x.dim() - 2))
    return Layer(((raw - bias) * ratio + bias) * update, update)


def naoto_layer(x: Tensor, w: Tensor, b: Tensor | None, mask: Tensor, **where: Any) -> Layer:
    """naoto0804/pytorch-inpainting-with-partial-conv: net.py. The mask has the channels of the input."""
    raw = F.conv2d(x * mask, w, b, **where)
    bias = torch.zeros_like(raw) if b is None else b.view(1, -1, 1, 1).expand_as(raw)
    with torch.no_grad():
        total = F.conv2d(mask, torch.ones_like(w), **where)
    empty = total == 0
    output = (raw - bias) / total.masked_fill(empty, 1.0) + bias
    return Layer(output.masked_fill(empty, 0.0), torch.ones_like(raw).masked_fill(empty, 0.0))


def mat_layer(
    x: Tensor, w: Tensor, b: Tensor | None, mask: Tensor, gains: tuple[float, float], **where: Any
) -> Layer:
    """fenglinglwb/MAT: networks/mat.py, Conv2dLayerPartial, with the gains of the weight and the activation.

    Without the low-pass filter that it puts before a stride of 2; test_partial_conv_mat.py has that.
    """
    with torch.no_grad():
        update = F.conv2d(mask, torch.ones_like(w[:1, :1]), **where)
        ratio = w[0, 0].numel() / (update + EPSILON)
        update = update.clamp(0, 1)
    return Layer(
        F.leaky_relu(F.conv2d(x, w * gains[0], b, **where), 0.2) * gains[1] * (ratio * update), update
    )


# ---- definition --------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """`before`: what the activation is applied to."""

    output: Tensor
    new_mask: Tensor
    before: Tensor


def window_sums(case: Case, mask: Tensor | None, multi_channel: bool) -> tuple[Tensor, int]:
    """((N, 1 or groups, ...) sums in float64, mask values in a window)."""
    channels = case.size[1]
    members = channels // case.groups if multi_channel else 1
    groups = case.groups if multi_channel else 1
    full = torch.ones(1, 1, *case.size[2:]) if mask is None else mask.detach().cpu()
    full = full.double()[(None,) * (case.dims + 2 - full.dim())]
    if multi_channel:
        full = full.expand(-1, channels, *full.shape[2:])
    ones = torch.ones(groups, members, *case.windows, dtype=torch.float64)
    sums = CONVOLUTIONS[case.dims](full, ones, None, *case.geometry[:3], groups)
    return sums, members * math.prod(case.windows)


def planes_formula(
    case: Case, mask: Tensor | None, *, numerator: str = "window", mask_update: str = "clamp"
) -> tuple[Tensor, Tensor]:
    """(ratio, new mask) in float64, with one channel, or one for each output."""
    multi = case.options.get("multi_channel")
    if multi is None:
        multi = mask is not None and mask.dim() > case.dims and mask.shape[1] > 1
    sums, size = window_sums(case, mask, multi)
    if multi:
        sums = sums.repeat_interleave(case.outputs // sums.shape[1], 1)
    empty = sums == 0
    new_mask = {"clamp": sums.clamp(max=1), "binary": (~empty).double(), "proportional": sums / size}[
        mask_update
    ]
    ratio = (size if numerator == "window" else 1.0) / sums.masked_fill(empty, 1.0)
    if mask_update == "clamp":
        ratio = ratio * new_mask
    return ratio.masked_fill(empty, 0.0), new_mask


def definition(case: Case, x: Tensor, w: Tensor, b: Tensor | None, mask: Tensor | None) -> Result:
    """The convolution in the dtype of `x`, everything else in float32, or in float64 if `x` is."""
    options = {name: value for name, value in case.options.items() if name != "multi_channel"}
    numerator, update = options.pop("numerator", "window"), options.pop("mask_update", "clamp")
    mask_input, scale_bias = options.pop("mask_input", True), options.pop("scale_bias", False)
    activation, slope = options.pop("activation", "none"), options.pop("negative_slope", 0.01)
    assert not options, f"the definition knows no {list(options)}"
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    ratio, new_mask = (
        p.to(x.device, acc) for p in planes_formula(case, mask, numerator=numerator, mask_update=update)
    )
    if mask is not None and mask_input:
        full = mask if mask.dim() == x.dim() else mask[None, None]
        x = (x.to(acc).masked_fill(full == 0, 0.0) * full.to(acc)).to(x.dtype)
    value = CONVOLUTIONS[case.dims](x, w, None, *case.geometry).to(acc)
    bias = 0.0 if b is None else b.to(acc).view(-1, *[1] * case.dims)
    if not scale_bias:
        value = value * ratio
    value = (value + bias).masked_fill(new_mask == 0, 0.0)
    if b is not None and update == "clamp" and not scale_bias:
        value = value * new_mask
    output = value
    if activation != "none":
        output = torch.where(value > 0, value, value * (0.0 if activation == "relu" else slope))
    if scale_bias:
        output = output * ratio
    return Result(output.to(x.dtype), new_mask, value)


# ---- inputs ------------------------------------------------------------------------------------------------------

# Shape and whether dimensions of size 1 are expanded views of the full size.
MASKS: dict[str, Callable[..., tuple[tuple[int, ...], tuple[int, ...]] | None]] = {
    "none": lambda n, c, *s: None,
    "n1": lambda n, c, *s: ((n, 1, *s), (n, 1, *s)),
    "11": lambda n, c, *s: ((1, 1, *s), (1, 1, *s)),
    "plane": lambda n, c, *s: (s, s),
    "nc": lambda n, c, *s: ((n, c, *s), (n, c, *s)),
    "1c": lambda n, c, *s: ((1, c, *s), (1, c, *s)),
    "channel-view": lambda n, c, *s: ((n, 1, *s), (n, c, *s)),
    "batch-view": lambda n, c, *s: ((1, 1, *s), (n, 1, *s)),
}


def make_mask(
    kind: str, size: Sequence[int], dtype: str = "f32", values: str = "mixed", seed: int = 1
) -> Tensor | None:
    """`values`: binary, fractional (also with windows that sum to less than 1), zeros, ones; mixed is fractional for
    floating dtypes. All have holes wider than a window where there is room."""
    shapes = MASKS[kind](*size)
    if shapes is None:
        return None
    shape, view = shapes
    rng = generator(seed)
    mask = (torch.rand(shape, generator=rng) < 0.6).float()
    lonely = torch.rand(shape, generator=rng)
    if values == "fractional" or (values == "mixed" and MASK_DTYPES[dtype].is_floating_point):
        part = 0.02 + 0.97 * torch.rand(shape, generator=rng)
        mask = torch.where(torch.rand(shape, generator=rng) < 0.4, part, mask)
        weak = torch.where(lonely < 0.04, part / 3, 0.0)
    else:
        weak = (lonely < 0.04).float()
    half = shape[-1] // 2
    mask[..., half:] = weak[..., half:]
    if values in ("zeros", "ones"):
        mask.fill_(values == "ones")
    return mask.to(MASK_DTYPES[dtype]).expand(view)


def make_tensors(
    case: Case,
    dtype: str = "f32",
    *,
    mask: str | Tensor | None = "n1",
    bias: str | None = "same",
    layouts: str = "contiguous/contiguous",
    seed: int = 0,
) -> list[Tensor | None]:
    """[input, weight, bias, mask]; `bias` is its dtype, "same" as the input's, or None."""
    rng = generator(seed)
    kind = DTYPES[dtype]
    weight_size = (case.outputs, case.size[1] // case.groups, *case.windows)
    x, w = torch.randn(case.size, generator=rng), torch.randn(weight_size, generator=rng)
    b = torch.randn(case.outputs, generator=rng)
    x, w = (laid_out(t.to(kind), layout) for t, layout in zip((x, w / 2), layouts.split("/"), strict=True))
    shift = None if bias is None else b.to(kind if bias == "same" else DTYPES[bias])
    return [x, w, shift, make_mask(mask, case.size, seed=seed + 1) if isinstance(mask, str) else mask]


def run(backend: Backend | None, case: Case, given: Sequence[Tensor | None]) -> Any:
    x, w, b, mask = given
    name = backend and backend.name
    return FUNCTIONS[case.dims](x, w, b, mask, *case.geometry, **case.options, backend=name)


def with_options(case: Case, **options: Any) -> Case:
    return Case(**{**case.__dict__, "options": options})


def output_of(backend: Backend | None, case: Case, mask: Any) -> Any:
    return lambda *leaves: run(backend, case, [*leaves, mask]).output


# ---- checks ------------------------------------------------------------------------------------------------------


def _allowance(dtype: torch.dtype, acc: torch.dtype, rounded: Tensor | float, terms: Tensor) -> Tensor:
    """The magnitude for `value_budget`: FLOOR_ULPS of `terms`, and for a stored half one rounding (half an ulp) of
    each of the quantities whose absolute values are added up in `rounded`."""
    storage = torch.finfo(dtype).eps if dtype != acc else 0.0
    floor = FLOOR_ULPS * torch.finfo(acc).eps
    # The interpreter truncates to bfloat16.
    unit = storage if INTERPRETING and dtype == torch.bfloat16 else storage / 2
    return (unit * rounded + floor * terms) / (storage + floor)


def check(
    backend: Backend | None,
    case: Case,
    given: Sequence[Tensor | None],
    *,
    wanted: Sequence[int] = (0, 1, 2),
    upstream_layout: str = "contiguous",
) -> None:
    """Output, new mask and gradients within budget of the definition in float64.

    Convolutions are sums of both signs: an error may be some ulps of the summed absolute terms (`terms`). With half
    inputs a convolution of torch besides rounds to half what it is given and what it returns, whoever calls it. The
    plain error is that of eager PyTorch with the same halves; roundings that happened to be small there are allowed
    their half ulp: the masked input of a fractional mask, the convolution's result, the gradient sent into it.
    """
    device = None if backend is None else backend.device
    if backend is not None:
        skip_unsupported(backend, given[0])
        given = on_device(backend, *given)
    x, mask = given[0], given[3]
    wanted = [i for i in wanted if given[i] is not None]
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    # Exact values of the same tensors, and absolute ones without the activation: every sum is that of its terms.
    exact = [None if t is None else t.detach().cpu().double() for t in given[:3]]
    sizes = [None if t is None else t.abs() for t in exact]
    cpu_mask = None if mask is None else mask.cpu()
    linear = Case(**{**case.__dict__, "options": {**case.options, "activation": "none"}})
    truth = definition(case, *exact, cpu_mask)
    whole = definition(linear, *sizes, cpu_mask)
    convolved = definition(linear, *exact[:2], None, cpu_mask)
    convolved_terms = definition(linear, *sizes[:2], None, cpu_mask).output
    masked = mask is not None and case.options.get("mask_input", True)
    fractional = float(masked and bool(((mask != 0) & (mask != 1)).any()))
    rounded = convolved.output.abs() + fractional * convolved_terms + truth.output.abs()
    output_size = _allowance(x.dtype, acc, rounded, whole.output)

    upstream = torch.randn(truth.output.shape, generator=generator(3)).to(x.dtype)
    if case.options.get("activation", "none") != "none":
        # Where roundings decide the side of the kink, no gradient is right. In an empty window none flows.
        before = truth.before.abs()
        unsure = before <= 2 * value_budget(
            0 * before, _allowance(x.dtype, acc, 4 * whole.before, whole.before), x.dtype, acc
        )
        assert unsure.double().mean() <= 0.5 + (truth.new_mask == 0).double().mean()
        upstream = upstream.masked_fill(unsure & (truth.new_mask != 0), 0.0)
    upstream = laid_out(upstream, upstream_layout).to(device)

    masks = []

    def call(*leaves: Tensor | None) -> Tensor:
        found = run(backend, case, [*leaves, mask])
        masks.append(found.new_mask)
        return found.output

    before_call = [None if t is None else (t.clone(), t._version) for t in given]
    with poisoned_allocations():
        (output,), gradients, _ = evaluate(call, given[:3], wanted, [upstream])
    for i, (t, old) in enumerate(zip(given, before_call, strict=True)):
        if t is not None and old is not None:
            assert t._version == old[1] and same_bits(t, old[0]), f"input {i} was changed in place"

    def formula(*leaves: Tensor | None) -> Tensor:
        return definition(case, *leaves, mask if leaves[0].device == x.device else cpu_mask).output

    (plain,), plain_gradients, _ = evaluate(formula, given[:3], wanted, [upstream])
    _, true_gradients, _ = evaluate(formula, exact, wanted, [upstream])
    absolute = evaluate(
        lambda *leaves: definition(linear, *leaves, cpu_mask).output, sizes, wanted, [upstream.abs()]
    )[1]
    assert output.dtype == x.dtype, f"output has dtype {output.dtype}"
    assert_within_budget(output, plain, truth.output, acc=acc, what="output", magnitude=output_size)
    (new_mask,) = masks
    assert new_mask.dtype == acc and not new_mask.requires_grad
    assert_within_budget(new_mask, truth.new_mask, truth.new_mask, acc=acc, what="new mask")
    # Roundings to half of what is sent into the convolution (they follow the terms) and of what comes out.
    # A fractional mask adds one; a bias knows only that of the result.
    steps = ((1, 1 + fractional), (1 + fractional, 1), (0, 1))
    for i, got, usual, want, terms in zip(
        wanted, gradients, plain_gradients, true_gradients, absolute, strict=True
    ):
        assert got.dtype == given[i].dtype, f"gradient of input {i} has dtype {got.dtype}"
        size = _allowance(got.dtype, acc, steps[i][0] * terms + steps[i][1] * want.abs(), terms)
        assert_gradient(got, usual, want, acc=acc, what=f"gradient of input {i}", magnitude=size)
