"""Formulas, inputs and checks shared by the tests of partial convolution.

The formulas are written here from the definition and from the layers people copy, without the package's reference,
so that the two cannot be wrong together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
    gradient_of,
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


# ---- definition --------------------------------------------------------------------------------------------------


class Result(NamedTuple):
    """`before`: what the activation is applied to."""

    output: Tensor
    new_mask: Tensor
    before: Tensor


def definition(case: Case, x: Tensor, w: Tensor, b: Tensor | None, mask: Tensor | None) -> Result:
    """The convolution in the dtype of `x`, everything else in float32, or in float64 if `x` is."""
    options = dict(case.options)
    multi = options.pop("multi_channel", None)
    numerator, update = options.pop("numerator", "window"), options.pop("mask_update", "clamp")
    mask_input, scale_bias = options.pop("mask_input", True), options.pop("scale_bias", False)
    activation, slope = options.pop("activation", "none"), options.pop("negative_slope", 0.01)
    assert not options, f"the definition knows no {list(options)}"
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    if multi is None:
        multi = mask is not None and mask.dim() > case.dims and mask.shape[1] > 1
    # Window sums, a convolution with ones in float64: (N, 1 or groups, ...), and for every output (N, Cout, ...).
    groups, members = (case.groups, case.size[1] // case.groups) if multi else (1, 1)
    known = torch.ones(1, 1, *case.size[2:]) if mask is None else mask.detach().cpu()
    known = known.double()[(None,) * (case.dims + 2 - known.dim())]
    if multi:
        known = known.expand(-1, case.size[1], *known.shape[2:])
    ones = torch.ones(groups, members, *case.windows, dtype=torch.float64)
    sums = CONVOLUTIONS[case.dims](known, ones, None, *case.geometry[:3], groups)
    if multi:
        sums = sums.repeat_interleave(case.outputs // groups, 1)
    size = members * math.prod(case.windows)
    empty = sums == 0
    new_mask = {"clamp": sums.clamp(max=1), "binary": (~empty).double(), "proportional": sums / size}[update]
    ratio = (size if numerator == "window" else 1.0) / sums.masked_fill(empty, 1.0)
    if update == "clamp":
        ratio = ratio * new_mask
    ratio, new_mask, empty = (
        t.to(x.device) for t in (ratio.masked_fill(empty, 0.0).to(acc), new_mask.to(acc), empty)
    )
    if mask is not None and mask_input:
        full = mask if mask.dim() == x.dim() else mask[None, None]
        x = (x.to(acc).masked_fill(full == 0, 0.0) * full.to(acc)).to(x.dtype)
    value = CONVOLUTIONS[case.dims](x, w, None, *case.geometry).to(acc)
    bias = 0.0 if b is None else b.to(acc).view(-1, *[1] * case.dims)
    if not scale_bias:
        value = value * ratio
    value = (value + bias).masked_fill(empty, 0.0)
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
    return replace(case, options={**case.options, **options})


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


def layout_of(*tensors: Tensor) -> torch.memory_format:
    """channels_last if a tensor is that and not contiguous as well, contiguous for all else."""
    last = torch.channels_last if tensors[0].dim() == 4 else torch.channels_last_3d
    found = [t for t in tensors if not t.is_contiguous() and t.is_contiguous(memory_format=last)]
    return last if found else torch.contiguous_format


def check(
    backend: Backend | None,
    case: Case,
    given: Sequence[Tensor | None],
    *,
    wanted: Sequence[int] = (0, 1, 2),
    upstream_layout: str = "contiguous",
    create_graph: bool = False,
    special: float | None = None,
) -> None:
    """Output, new mask and gradients within budget of the definition in float64, and their layouts.

    Convolutions are sums of both signs: an error may be some ulps of the summed absolute terms (`terms`). With half
    inputs a convolution of torch besides rounds to half what it is given and what it returns, whoever calls it. The
    plain error is that of eager PyTorch with the same halves; roundings that happened to be small there are allowed
    their half ulp: the masked input of a fractional mask, the convolution's result, the gradient sent into it.

    `create_graph`: of the backward. `special`: what is sent back into empty windows, from where no gradient flows.
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
    linear = with_options(case, activation="none")
    truth = definition(case, *exact, cpu_mask)
    whole = definition(linear, *sizes, cpu_mask)
    convolved = definition(linear, *exact[:2], None, cpu_mask)
    convolved_terms = definition(linear, *sizes[:2], None, cpu_mask).output
    masked = mask is not None and case.options.get("mask_input", True)
    fractional = float(masked and bool(((mask != 0) & (mask != 1)).any()))
    rounded = convolved.output.abs() + fractional * convolved_terms + truth.output.abs()
    output_size = _allowance(x.dtype, acc, rounded, whole.output)

    upstream = torch.randn(truth.output.shape, generator=generator(3)).to(x.dtype)
    empty = truth.new_mask == 0
    if case.options.get("activation", "none") != "none":
        # Where roundings decide the side of the kink, no gradient is right. In an empty window none flows.
        before = truth.before.abs()
        unsure = before <= 2 * value_budget(
            0 * before, _allowance(x.dtype, acc, 4 * whole.before, whole.before), x.dtype, acc
        )
        assert unsure.sum() <= 0.5 * unsure.numel() + empty.expand_as(unsure).sum()
        upstream = upstream.masked_fill(unsure & ~empty, 0.0)
    if special is not None:
        upstream = upstream.masked_fill(empty, special)
    upstream = laid_out(upstream, upstream_layout).to(device)

    masks = []

    def call(*leaves: Tensor | None) -> Tensor:
        result = run(backend, case, [*leaves, mask])
        masks.append(result.new_mask)
        return result.output

    before_call = [None if t is None else (t.clone(), t._version) for t in given]
    with poisoned_allocations():
        (output,), gradients, _ = evaluate(call, given[:3], wanted, [upstream])
        if create_graph and wanted:
            leaves = [t if t is None else t.detach().requires_grad_() for t in given[:3]]
            gradients = gradient_of(call, wanted)(*leaves, upstream)
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
    new_mask = masks[0]
    assert new_mask.dtype == acc and not new_mask.requires_grad
    assert_within_budget(new_mask, truth.new_mask, truth.new_mask, acc=acc, what="new mask")
    # Several channels of one group are a view.
    assert new_mask.shape[1] == 1 or case.groups > 1 or new_mask.stride(1) == 0
    # Roundings to half of what is sent into the convolution (they follow the terms) and of what comes out.
    # A fractional mask adds one; a bias knows only that of the result.
    steps = ((1, 1 + fractional), (1 + fractional, 1), (0, 1))
    for i, got, usual, want, terms in zip(
        wanted, gradients, plain_gradients, true_gradients, absolute, strict=True
    ):
        assert got.dtype == given[i].dtype, f"gradient of input {i} has dtype {got.dtype}"
        size = _allowance(got.dtype, acc, steps[i][0] * terms + steps[i][1] * want.abs(), terms)
        assert_gradient(got, usual, want, acc=acc, what=f"gradient of input {i}", magnitude=size)
    if backend is not None and backend.name != "reference" and not create_graph:
        assert output.is_contiguous(memory_format=layout_of(*given[:2]))
        for i, got in zip(wanted, gradients, strict=True):
            assert i == 2 or got.is_contiguous(memory_format=layout_of(given[i]))
