"""Batched Gram matrices of feature maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library
from ..reference import gram as reference
from ..reference._common import accumulate_dtype
from . import _checks, _pixel

NORMALIZATIONS = ("chw", "hw", "none")


def _fake(backend: str, features: Tensor, normalize: str) -> Tensor:
    n, c = features.shape[:2]
    return features.new_empty((n, c, c), dtype=accumulate_dtype(features))


def _backward_fake(grad: Tensor, features: Tensor, normalize: str) -> Tensor:
    return _pixel.empty_image(features, features.shape, _pixel.is_channels_last(features), features.dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, ctx.normalize = inputs
    _library.save_for_backward(ctx, features)


def _backward(ctx: Any, op: Any, needs: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,)
    (features,) = ctx.saved_tensors
    if op is not None:
        return (op(grad, features, ctx.normalize),)
    n, c, h, w = features.shape
    x = features.to(grad.dtype).reshape(n, c, h * w)
    scale = reference.gram_scale(ctx.normalize, c, h * w)
    with reference.without_autocast(x):
        product = torch.bmm(grad + grad.mT, x) * scale
    return (product.reshape(n, c, h, w).to(features.dtype),)


# Of the CUDA kernels of gram and style. Triton's launcher reads the same, see `triton_kernels/product.py`.
_library.define_setting("allows_tf32", lambda: torch.backends.cuda.matmul.fp32_precision == "tf32")


def product_flops(features: Tensor) -> int:
    """Of F F^T, and of the product of a C x C matrix with F."""
    return 2 * features.numel() * features.shape[1]


_op = _library.Op(
    "gram",
    schema="(Tensor features, str normalize) -> Tensor",
    backward_schema="(Tensor grad, Tensor features, str normalize) -> Tensor",
    outputs=1,
    inputs=1,
    fake=_fake,
    backward_fake=_backward_fake,
    save=_save,
    backward=_backward,
    flops=(
        lambda features, *_, out_val: product_flops(features),
        lambda grad, features, *_, out_val: product_flops(features),
    ),
)


def gram_matrix(features: Tensor, *, normalize: str = "chw", backend: str | None = None) -> Tensor:
    """Gram matrices of a batch of feature maps, ``G[n] = s * F[n] F[n]^T`` with F (C, H*W).

    The factor s is 1/(C H W) for ``normalize="chw"`` (every released inpainting code base), 1/(H W) for "hw", 1 for
    "none". Products are accumulated in float32 and scaled before they could overflow: features of any half type
    give finite, unrounded float32 matrices.

    float32 products on a GPU follow `torch.set_float32_matmul_precision`, forward and backward, in compiled code too:
    at "highest" three TF32 products make one of float32's accuracy, at "high" and "medium" one does. NaN and Inf
    appear where the definition has them. Triton alone may give NaN in two more cases: float32 features above
    3.4011e38, the largest TF32, at "highest", and gradients at pixels where half-precision features are infinite.

    Args:
        features: (N, C, H, W); float16, bfloat16, float32 or float64. NCHW and channels_last are read in place,
            other strides through a copy.
        normalize: "chw", "hw" or "none".
        backend: None (automatic), "reference", "cpu", "triton" or "cuda".

    Returns:
        (N, C, C), symmetric, float32; float64 for float64 features.

    Differentiable in `features`, twice; keeps a reference to them. The backward is one product,
    ``s * (dG + dG^T) F``.

    Raises:
        TypeError: `features` is no floating tensor.
        ValueError: `features` does not have 4 dimensions, or `normalize` is unknown.
        RuntimeError: the `backend` asked for cannot run, with the reason.

    Gatys et al., "Image Style Transfer Using Convolutional Neural Networks", 2016; scaled as in Liu et al., 2018.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> ik.gram_matrix(torch.ones(1, 2, 4, 4), normalize="hw")
        tensor([[[1., 1.],
                 [1., 1.]]])
    """
    _checks.check_features("features", features)
    _checks.check_choice("normalize", normalize, NORMALIZATIONS)
    chosen = _op.choose(backend, (features,), features.dtype)
    if chosen == "reference":
        return reference.gram_matrix(features, normalize=normalize)
    needs = features.requires_grad and torch.is_grad_enabled()
    gram: Tensor = _op(chosen, needs, features, normalize)
    return gram
