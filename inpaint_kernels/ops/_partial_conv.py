"""The op behind partial convolution: its kernels around torch's convolution, and its gradients."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _library, _torch_private
from ..reference import partial_conv as reference
from ..reference._common import masked_input
from ..reference.partial_conv import Windows


def _window_fake(
    mask: Tensor, multiplicity: int, windows: Sequence[int], numerator: float, update: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    where = Windows.of(windows)
    planes = 1 if mask.shape[1] == 1 else where.groups
    size = [mask.shape[0], planes, *where.output_size(mask.shape[2:])]
    return mask.new_empty(size, dtype=dtype), mask.new_empty(size, dtype=dtype)


# `windows` and `how` are reference.Windows and reference.Finish, packed.
window = _library.define_kernel(
    "partial_conv",
    "window",
    "(Tensor mask, int multiplicity, SymInt[] windows, float numerator, str update, ScalarType dtype) "
    "-> (Tensor, Tensor)",
    fake=_window_fake,
)
# Outputs are given, so that a result can overwrite the convolution's: `raw` and `out`, `input` and `out`, `grad` and
# `out` may be one tensor. Each tensor is dense in NCHW or channels_last of its own.
_mask_input = _library.define_kernel(
    "partial_conv", "mask_input", "(Tensor input, Tensor? mask, Tensor(a!) out) -> ()"
)
_finish = _library.define_kernel(
    "partial_conv",
    "finish",
    "(Tensor raw, Tensor ratio, Tensor new_mask, Tensor? bias, int how, float slope, Tensor(a!) out) -> ()",
)
_finish_backward = _library.define_kernel(
    "partial_conv",
    "finish_backward",
    "(Tensor grad, Tensor? output, Tensor ratio, Tensor new_mask, int how, float slope, bool need_bias, "
    "Tensor(a!) out) -> Tensor",
)
_SCHEMA = (
    "(Tensor input, Tensor weight, Tensor? bias, Tensor? mask, Tensor ratio, Tensor new_mask, SymInt[] windows, "
    "int how, float slope"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad, Tensor? input, Tensor? weight, Tensor? mask, Tensor? output, Tensor ratio, Tensor new_mask, "
    "SymInt[] input_size, SymInt[] weight_size, bool input_last, bool weight_last, ScalarType dtype, "
    "SymInt[] windows, int how, float slope, bool need_bias"
)
# The CPU takes both passes in one call each: its library runs torch's convolution between its kernels. `inner`: dtype
# and layouts as in `_Inner`.
_layer = _library.define_kernel(
    "partial_conv",
    "layer",
    _SCHEMA + ", ScalarType inner, bool inner_last, bool output_last) -> Tensor",
    backends=("cpu",),
)
_layer_backward = _library.define_kernel(
    "partial_conv",
    "layer_backward",
    _BACKWARD_SCHEMA
    + ", ScalarType inner, bool inner_last, bool inner_weight_last) -> (Tensor, Tensor, Tensor)",
    backends=("cpu",),
)


def dense_format(ndim: int, channels_last: bool) -> torch.memory_format:
    if not channels_last:
        return torch.contiguous_format
    return torch.channels_last if ndim == 4 else torch.channels_last_3d


def is_last(t: Tensor) -> bool:
    """Whether a tensor is channels_last; one that is contiguous as well is not."""
    return not t.is_contiguous() and t.is_contiguous(memory_format=dense_format(t.ndim, True))


def _dense(t: Tensor) -> Tensor:
    return t if t.is_contiguous() or is_last(t) else t.contiguous()


def _empty(like: Tensor, size: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    memory_format = dense_format(len(size), channels_last)
    return torch.empty(size, dtype=dtype, device=like.device, memory_format=memory_format)


class _Inner(NamedTuple):
    """Dtype of the CPU's convolution, and the layout of all it reads and writes, by what it computes."""

    dtype: torch.dtype
    last: bool  # channels_last: output, gradient to the input
    weight_last: bool  # gradient to the weight


@functools.lru_cache(maxsize=4096)
def _inner(dtype: torch.dtype, last: bool, dims: int, channels_out: int, channels_in: int) -> _Inner:
    """The fastest of what the library offers; the kernels before and after it touch every element anyway.

    `last`: input or weight are channels_last. `channels_in` of a group.

    oneDNN is several times faster on channels_last when there are few channels (19 to 3 at 4x19x128x128, two threads
    of an AMD EPYC: 2.3 ms forward instead of 6.8). With AVX2 alone its gradient to the weight is slow there (64 to 64
    at 4x64x128x128: 184 ms, 76 in NCHW), with AVX-512 it is not.

    Half types the CPU has no arithmetic for are computed in float32: of that size a float16 convolution took 6.9 s
    forward, a bfloat16 one 8.3 s without AVX-512, float32 40 ms.
    """
    if not torch.backends.mkldnn.is_available():
        return _Inner(dtype, last, last)
    if dtype == torch.float16 or (dtype == torch.bfloat16 and not _torch_private.has_fast_bfloat16()):
        dtype = torch.float32
    if dims != 2 or dtype == torch.float64:
        return _Inner(dtype, last, last)
    if min(channels_out, channels_in) < 16:
        return _Inner(dtype, True, True)
    return _Inner(dtype, last, last and torch.backends.cpu.get_cpu_capability() != "AVX2")


def _masked(
    backend: str, x: Tensor, mask: Tensor | None, memory_format: torch.memory_format, in_place: bool = False
) -> Tensor:
    """x times the mask, in this layout: x itself if nothing is to be done, or if it may be overwritten."""
    x = _dense(x)
    fits = x.is_contiguous(memory_format=memory_format)
    if mask is None and fits:
        return x
    out = x if in_place and fits else torch.empty_like(x, memory_format=memory_format)
    _mask_input[backend](x, mask, out)
    return out


def _convolution_backward(
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    input_size: Sequence[int],
    weight_size: Sequence[int],
    windows: Sequence[int],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients to the input if the weight is given, to the weight if the input is."""
    wanted = (weight is not None, input is not None, False)
    if not any(wanted):
        return None, None
    # Of an operand that is not read the shape counts, and a dense layout: another one would be copied.
    x = _empty(grad, input_size, grad.dtype, is_last(grad)) if input is None else input
    w = grad.new_empty(weight_size) if weight is None else weight
    _, stride, padding, dilation, groups = Windows.of(windows)
    zeros = [0] * len(stride)
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward.default(
        grad, x, w, None, stride, padding, dilation, False, zeros, groups, wanted
    )
    return grad_input, grad_weight


def _forward(
    backend: str, input: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, *planes: Any
) -> Tensor:
    """`planes`: what the schema has after the mask."""
    last = is_last(input) or is_last(weight)
    mask = None if mask is None else _dense(mask)
    if backend == "cpu":
        inner = _inner(input.dtype, last, input.ndim - 2, weight.shape[0], weight.shape[1])
        return _layer["cpu"](input, weight, bias, mask, *planes, inner.dtype, inner.last, last)
    ratio, new_mask, windows, how, slope = planes
    memory_format = dense_format(input.ndim, last)
    x = _masked(backend, input, mask, memory_format)
    raw = _dense(reference.convolve(x, weight, Windows.of(windows)))
    del x
    fits = raw.is_contiguous(memory_format=memory_format)
    out = raw if fits else torch.empty_like(raw, memory_format=memory_format)
    _finish[backend](raw, ratio, new_mask, bias, how, slope, out)
    return out


def _backward(
    backend: str,
    grad: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    mask: Tensor | None,
    output: Tensor | None,
    *planes: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`planes`: what the schema has after the output."""
    (
        ratio,
        new_mask,
        input_size,
        weight_size,
        input_last,
        weight_last,
        dtype,
        windows,
        how,
        slope,
        need_bias,
    ) = planes
    last = input_last or weight_last
    mask = None if mask is None else _dense(mask)
    if backend == "cpu":
        inner = _inner(dtype, last, grad.ndim - 2, weight_size[0], weight_size[1])
        return _layer_backward["cpu"](grad, input, weight, mask, output, *planes, *inner)
    raw_grad = _empty(grad, grad.shape, dtype, last)
    grad_bias = _finish_backward[backend](
        _dense(grad), output, ratio, new_mask, how, slope, need_bias, raw_grad
    )
    x = None if input is None else _masked(backend, input, mask, dense_format(grad.ndim, last))
    raw, grad_weight = _convolution_backward(raw_grad, x, weight, input_size, weight_size, windows)
    del raw_grad, x
    if raw is not None:
        raw = _masked(backend, raw, mask, dense_format(grad.ndim, input_last), in_place=True)
    if grad_weight is not None:
        grad_weight = grad_weight.contiguous(memory_format=dense_format(grad.ndim, weight_last))
    return _given(raw, grad), _given(grad_weight, grad), grad_bias


def _given(gradient: Tensor | None, grad: Tensor) -> Tensor:
    """Operators return a tensor also where no gradient is wanted."""
    return grad.new_empty(0) if gradient is None else gradient


def _fake(
    backend: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    ratio: Tensor,
    *rest: Any,
) -> Tensor:
    size = (input.shape[0], weight.shape[0], *ratio.shape[2:])
    return _empty(input, size, input.dtype, is_last(input) or is_last(weight))


def _backward_fake(
    grad: Tensor, input: Tensor | None, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    ratio, _, input_size, weight_size, input_last, weight_last, dtype = rest[2:9]
    return (
        _given(None if weight is None else _empty(grad, input_size, dtype, input_last), grad),
        _given(None if input is None else _empty(grad, weight_size, dtype, weight_last), grad),
        ratio.new_empty(grad.shape[1] if rest[-1] else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    """The operands that the wanted gradients read, and the two planes, which take as much as two channels."""
    input, weight, bias, mask, ratio, new_mask, windows, how, slope = inputs
    needs = ctx.needs_input_grad
    _library.save_for_backward(
        ctx,
        input if needs[1] else None,
        weight if needs[0] else None,
        mask if needs[0] or needs[1] else None,
        output[0] if reference.Finish.of(how).activation != "none" else None,
        ratio,
        new_mask,
    )
    ctx.sizes = (tuple(input.shape), tuple(weight.shape))
    ctx.settings = (is_last(input), is_last(weight), input.dtype, windows, how, slope)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, op: Any, needs: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None
    if op is None:
        grad_input, grad_weight, grad_bias = _formula(ctx, grad)
    else:
        grad_input, grad_weight, grad_bias = op(grad, *ctx.saved_tensors, *ctx.sizes, *ctx.settings, needs[2])
    return (
        grad_input if needs[0] else None,
        grad_weight if needs[1] else None,
        grad_bias.to(ctx.bias_dtype) if needs[2] else None,
    )


def _formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """The three gradients as differentiable expressions."""
    input, weight, mask, output, ratio, new_mask = ctx.saved_tensors
    input_size, weight_size = ctx.sizes
    _, _, dtype, windows, how, slope = ctx.settings
    finish = reference.Finish.of(how)
    ratio, new_mask = (reference.channel_planes(planes, grad.shape[1]) for planes in (ratio, new_mask))
    zero = torch.zeros((), dtype=ratio.dtype, device=grad.device)
    value = torch.where(new_mask == 0, zero, grad.to(ratio.dtype))
    if finish.scale_bias:
        value = value * ratio
    if output is not None:
        value = torch.where(output > 0, value, value * slope)
    if finish.weigh_bias:
        value = value * new_mask
    grad_bias = value.sum([0, *range(2, grad.ndim)])
    if not finish.scale_bias:
        value = value * ratio
    x = input if input is None or mask is None else masked_input(input, mask)
    grad_input, grad_weight = _convolution_backward(
        value.to(dtype), x, weight, input_size, weight_size, windows
    )
    if grad_input is not None and mask is not None:
        grad_input = masked_input(grad_input, mask)
    return grad_input, grad_weight, grad_bias


op = _library.Op(
    "partial_conv",
    schema=_SCHEMA + ") -> Tensor",
    backward_schema=_BACKWARD_SCHEMA + ") -> (Tensor, Tensor, Tensor)",
    outputs=1,
    inputs=3,
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    backward=_gradients,
    implement=(_forward, _backward),
    flops=(
        lambda input, weight, *_, out_val: 2 * out_val.numel() * math.prod(weight.shape[1:]),
        lambda grad, input, weight, *rest, out_val: (
            2 * grad.numel() * math.prod(rest[5][1:]) * ((input is not None) + (weight is not None))
        ),
    ),
)
