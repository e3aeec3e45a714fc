"""Distance of feature maps over one or many layers, several predictions against one target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..reference import feature_distance as reference
from ..reference._common import accumulate_dtype
from ..reference.masked_l1 import masked_loss_grad
from . import _checks, _pixel


def _fake(
    backend: str,
    input: list[Tensor],
    target: list[Tensor],
    mask: list[Tensor],
    weights: list[float],
    penalty: str,
    param: float,
    normalize: str,
    save_signs: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    dtype = accumulate_dtype(*input, *target)
    return (
        input[0].new_empty((), dtype=dtype),
        input[0].new_empty(len(input), dtype=dtype),
        [_pixel.fake_signs(x, save_signs) for x in input],
    )


def _backward_fake(
    grad: Tensor,
    scale: Tensor,
    signs: list[Tensor],
    mask: list[Tensor],
    input: list[Tensor],
    target: list[Tensor],
    sizes: list[Any],
    channels_last: list[int],
    dtypes: list[int],
    penalty: str,
    param: float,
) -> list[Tensor]:
    return [
        _pixel.empty_image(grad, sizes[5 * i : 5 * i + 4], bool(channels_last[i]), _checks.FLOATS[dtypes[i]])
        for i in range(len(dtypes))
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    features, targets, masks, _, penalty, param, _, _ = inputs
    kept = output[2] if penalty == "l1" else [*features, *targets]
    _library.save_for_backward(ctx, output[1], *masks, *kept)
    ctx.settings = (penalty, param, len(masks))
    ctx.layers = [
        ((*x.shape, y.shape[0]), *map(_pixel.is_channels_last, (x, y)), x.dtype, y.dtype)
        for x, y in zip(features, targets, strict=True)
    ]


def _formula(ctx: Any, i: int, grad: Tensor, scale: Tensor, *saved: Tensor) -> Tensor:
    """Gradient by the difference of layer i as a differentiable expression."""
    penalty, param, mask_count = ctx.settings
    features, targets = saved[mask_count:][i], saved[mask_count + len(ctx.layers) :][i]
    copies = features.shape[0] // targets.shape[0] if targets.shape[0] else 0
    mask = saved[i] if mask_count else None
    if mask is not None and mask.ndim == 4 and mask.shape[0] not in (1, features.shape[0]):
        mask = mask.repeat(copies, 1, 1, 1)
    coefficient = grad * scale[i]
    # Converted before it is repeated, as in the reference.
    target = targets.to(coefficient.dtype).repeat(copies, 1, 1, 1)
    return masked_loss_grad(features, target, mask, coefficient, penalty, param)


def _backward(ctx: Any, kernel: Any, needs: Any, grad: Tensor | None) -> tuple[Any, ...]:
    count = len(ctx.layers)
    grad_input: list[Tensor | None] = [None] * count
    grad_target: list[Tensor | None] = [None] * count
    if grad is None:
        return grad_input, grad_target
    wanted = [i for i in range(count) if needs[0][i] or needs[1][i]]
    penalty, param, mask_count = ctx.settings
    l1, again = penalty == "l1", kernel is None
    # Once: under a checkpoint a second look finds nothing.
    scale, *saved = ctx.saved_tensors
    if again and not l1:
        found = [_formula(ctx, i, grad, scale, *saved) for i in wanted]
    else:
        masks, kept = saved[:mask_count], saved[mask_count:]
        # A target's gradient is a sum over the predictions: not of rounded terms.
        in_full = [again or needed for needed in needs[1]]
        found = (_op.routes[ctx.backend].backward if again else kernel)(
            scale.new_ones(()) if again else grad,
            # Slices: an index list would be copied to the device, which no CUDA graph can capture.
            scale if len(wanted) == count else torch.cat([scale[i : i + 1] for i in wanted]),
            [kept[i] for i in wanted] if l1 else [],
            [masks[i] for i in wanted] if mask_count else [],
            [] if l1 else [kept[i] for i in wanted],
            [] if l1 else [kept[count + i] for i in wanted],
            [n for i in wanted for n in ctx.layers[i][0]],
            [int(ctx.layers[i][1]) for i in wanted],
            [_checks.FLOATS.index(scale.dtype if in_full[i] else ctx.layers[i][3]) for i in wanted],
            penalty,
            param,
        )
        if again:
            # Constant in the features almost everywhere, and linear in `grad`, as in `_pixel.backward`.
            found = [grad * own for own in found]
    for i, value in zip(wanted, found, strict=True):
        size, _, target_last, dtype, target_dtype = ctx.layers[i]
        if needs[0][i]:
            grad_input[i] = value if value.dtype == dtype else value.to(dtype)
        if needs[1][i]:
            memory_format = torch.channels_last if target_last else torch.contiguous_format
            summed = -_pixel.sum_copies(value, size[4]).to(target_dtype)
            grad_target[i] = summed.contiguous(memory_format=memory_format)
    return grad_input, grad_target


_op = _library.Op(
    "feature_distance",
    schema="(Tensor[] input, Tensor[] target, Tensor[] mask, float[] weights, str penalty, float param, "
    "str normalize, bool save_signs) -> (Tensor, Tensor, Tensor[])",
    backward_schema="(Tensor grad, Tensor scale, Tensor[] signs, Tensor[] mask, Tensor[] input, Tensor[] target, "
    "SymInt[] sizes, int[] channels_last, int[] dtypes, str penalty, float param) -> Tensor[]",
    outputs=1,
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    backward=_backward,
    lists=True,
)


def feature_distance(
    input: Tensor | Sequence[Tensor],
    target: Tensor | Sequence[Tensor],
    *,
    weights: _checks.LayerWeights = None,
    penalty: str = "l1",
    mask: Tensor | Sequence[Tensor] | None = None,
    normalize: str = "mask",
    layer_reduction: str = "sum",
    eps: float = 1e-3,
    backend: str | None = None,
) -> Tensor:
    """Mean distance of two sets of feature maps, summed or averaged over layers.

    ``sum_l w_l * sum(mask_l * p(input_l - target_l)) / D_l`` with D_l the summed mask, broadcast over channels
    (``normalize="mask"``; the element count without a mask), or the element count (``"image"``).
    ``layer_reduction="mean"`` divides by the number of layers.

    Args:
        input: features (k N, C, H, W) of one layer or a sequence of layers; float16, bfloat16, float32 or float64.
            A batch k times the target's is k predictions, in the order of torch.cat (raw and composite against
            truth), against one target that is read once; the mean is over all k N samples.
        target: features (N, C, H, W) of the same layers; the dtype may differ.
        weights: one factor for each layer, 1 by default. A tensor, or a sequence with some, may require a gradient;
            then, and for one on a GPU, which no kernel reads as a number, the reference runs.
        penalty: "l1", "l2" (squared error) or "charbonnier".
        mask: spatial weights at the layers' resolutions, one for each layer: batch 1, N (shared by the predictions)
            or k N; shapes and dtypes as in `masked_l1_loss`. Where one is exactly 0, NaN and Inf are ignored.
        normalize: "mask" or "image".
        layer_reduction: "sum" or "mean".
        eps: of "charbonnier".
        backend: None (automatic), "reference", "cpu", "triton" or "cuda".

    Returns:
        A scalar, float32; float64 if an input is float64.

    Differentiable in `input` and `target` (l1: subgradient 0 where they are equal), twice. l1 keeps 2 bits an element
    of the input. If a mask or `weights` requires a gradient the differentiable reference runs instead of a kernel.

    Raises:
        TypeError: an argument is no floating tensor or sequence of them.
        ValueError: shapes, batches or the number of layers disagree, or an option is unknown.
        RuntimeError: the `backend` asked for cannot run, with the reason.

    Johnson et al., "Perceptual Losses", 2016; the L1 form of Liu et al., 2018, and of pix2pixHD's feature matching.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> layers = [torch.ones(2, 4, 8, 8), torch.ones(2, 8, 4, 4)]
        >>> ik.feature_distance(layers, [torch.zeros_like(f) for f in layers], weights=[1.0, 0.5])
        tensor(1.5000)
    """
    inputs, targets = _checks.as_layers("input", input), _checks.as_layers("target", target)
    if len(inputs) != len(targets):
        raise ValueError(f"input has {len(inputs)} layers, target has {len(targets)}")
    masks = [] if mask is None else _checks.as_layers("mask", mask)
    if masks and len(masks) != len(inputs):
        raise ValueError(f"mask has {len(masks)} layers, input has {len(inputs)}")
    _checks.check_choice("penalty", penalty, ("l1", "l2", "charbonnier"))
    _checks.check_choice("normalize", normalize, ("mask", "image"))
    _checks.check_choice("layer_reduction", layer_reduction, ("sum", "mean"))
    param = _checks.check_positive("eps", eps) if penalty == "charbonnier" else 0.0
    factors = _checks.layer_weights(weights, len(inputs))
    if layer_reduction == "mean":
        factors = [factor / len(inputs) for factor in factors]
    for layer, (x, y) in enumerate(zip(inputs, targets, strict=True)):
        _checks.check_features(f"input[{layer}]", x)
        _checks.check_features(f"target[{layer}]", y)
        _checks.check_batches(layer, x, y.shape[0])
        if x.shape[1:] != y.shape[1:]:
            raise ValueError(
                f"target[{layer}] has shape {tuple(y.shape)}, input[{layer}] has {tuple(x.shape)}"
            )
        if x.device != inputs[0].device or y.device != inputs[0].device:
            raise ValueError(f"layer {layer} is on {x.device} and {y.device}, input[0] on {inputs[0].device}")
        if masks:
            shared = (
                isinstance(masks[layer], Tensor)
                and masks[layer].ndim == 4
                and masks[layer].shape[0] == y.shape[0]
            )
            masks[layer] = _checks.check_mask(masks[layer], y if shared else x)
    return checked_distance(inputs, targets, masks, factors, penalty, param, normalize, backend)


def checked_distance(
    inputs: list[Tensor],
    targets: list[Tensor],
    masks: list[Tensor],
    factors: list[Any],
    penalty: str,
    param: float,
    normalize: str,
    backend: str | None,
) -> Tensor:
    """`feature_distance` of arguments that fit each other; no masks are an empty list."""
    features = [*inputs, *targets]
    needs = torch.is_grad_enabled() and any(x.requires_grad for x in features)
    chosen = _op.choose(
        backend,
        [*features, *masks],
        *[x.dtype for x in features],
        refused=_checks.tensor_weights(factors),
        mask=masks,
    )
    if chosen == "reference":
        return reference.feature_distance(
            inputs, targets, factors, masks or None, penalty=penalty, param=param, normalize=normalize
        )
    out: Tensor = _op(
        chosen,
        needs,
        inputs,
        targets,
        masks,
        factors,
        penalty,
        param,
        normalize,
        needs and penalty == "l1",
    )
    return out
