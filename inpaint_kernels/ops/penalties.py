"""Gradient penalties of a discriminator, in plain PyTorch: autograd differentiates the discriminator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import _torch_private
from ..reference._common import accumulate_dtype, safe_divide
from ..reference.gram import without_autocast
from . import _checks
from .adversarial import Logits, as_entries, mean, mean_of_entries


def _check_gradients(function: str, *tensors: Tensor) -> None:
    if not torch.is_grad_enabled():
        raise RuntimeError(
            f"{function} differentiates the discriminator, and gradients are disabled here: call it and the "
            "discriminator outside of torch.no_grad and torch.inference_mode"
        )
    if _torch_private.transformed(tensors):
        raise RuntimeError(f"{function} does not serve torch.func transforms; use autograd's backward")


def _image_gradient(name: str, logits: Tensor, images: Tensor, remedy: str) -> Tensor:
    """The gradient of the summed logits by the images, itself differentiable, in the accumulation dtype."""
    gradient = None
    if logits.requires_grad:
        # Operators of the backward would be cast by an autocast that their forward did not run under.
        with without_autocast(images):
            (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True, allow_unused=True)
    if gradient is None:
        raise ValueError(f"{name} does not depend on {remedy}")
    return gradient.to(accumulate_dtype(gradient))


def r1_penalty(real_logits: Logits, real_images: Tensor, *, gamma: float = 10.0) -> Tensor:
    """The R1 penalty: ``gamma / 2`` times the mean over samples of the squared gradient norm at real images.

    ``gamma / (2 N) * sum(g^2)`` with ``g`` the gradient of the summed logits by the images.

    Args:
        real_logits: the discriminator's logits of `real_images`, of any shape, or a sequence of them (several
            discriminators, scales or heads), of which the result is the mean of each one's own penalty (a backward
            pass each).
        real_images: (N, ...), the very tensor the discriminator was called with, which required a gradient by then.
        gamma: the factor. LaMa adds 0.001 times the mean squared norm, without a half: ``gamma=0.002``.

    Returns:
        A scalar, float32; float64 if the images are float64. An empty batch gives 0.

    The gradient is that of the logits, which no GradScaler has scaled; autocast does not apply to it, and it is
    squared in float32 whatever the images' dtype. Lazy regularisation (every 16th step, times 16) is the caller's.

    Differentiable in the discriminator's parameters and in what `real_images` was made of, by autograd's backward.
    Keep penalty and discriminator out of ``torch.compile``, of which torch has no second derivative and says so.

    Raises:
        TypeError: an argument is no tensor or number, or has no floating dtype.
        ValueError: `real_images` requires no gradient, or some logits do not depend on it.
        RuntimeError: gradients are disabled, or a torch.func transform is active.

    Mescheder et al., "Which Training Methods for GANs do actually Converge?", 2018.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> images = torch.ones(1, 1, 2, 2).requires_grad_()
        >>> logits = 0.5 * images.square().sum((1, 2, 3))
        >>> ik.r1_penalty(logits, images).item()
        20.0
    """
    entries = as_entries("real_logits", real_logits)
    if not isinstance(real_images, Tensor):
        raise TypeError(f"real_images must be a Tensor, got {type(real_images).__name__}")
    if real_images.ndim == 0:
        raise ValueError("real_images must have shape (N, ...), got ()")
    factor = _checks.check_number("gamma", gamma) / 2 / max(real_images.shape[0], 1)
    _check_gradients("r1_penalty", real_images, *entries.values())
    if not real_images.requires_grad:
        raise ValueError(
            "real_images requires no gradient: call real_images.requires_grad_() before the discriminator"
        )
    remedy = (
        "real_images: call real_images.requires_grad_() before the discriminator, and the discriminator with that "
        "very tensor"
    )
    squares = [_image_gradient(name, x, real_images, remedy).square().sum() for name, x in entries.items()]
    return factor * mean_of_entries(squares)


def _root(squares: Tensor) -> Tensor:
    """The square root with all derivatives 0 at 0, where autograd's are infinite."""
    zero = squares == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, squares).sqrt())


def _mix(real: Tensor, fake: Tensor, alpha: float | Tensor | None) -> Tensor:
    """``alpha * real + (1 - alpha) * fake``, requiring a gradient."""
    dtype = accumulate_dtype(real, fake)
    shape = (real.shape[0], 1, 1, 1)
    if alpha is None:
        alpha = torch.rand(shape, dtype=dtype, device=real.device)
    elif isinstance(alpha, Tensor):
        if alpha.dtype not in _checks.FLOATS:
            raise _checks.not_floating("alpha", alpha)
        if alpha.shape != shape:
            raise ValueError(f"alpha must be a number or have shape {shape}, got {tuple(alpha.shape)}")
        if alpha.device != real.device:
            raise ValueError(f"alpha is on {alpha.device}, real is on {real.device}")
        alpha = alpha.to(dtype)
    elif not 0 <= _checks.check_number("alpha", alpha) <= 1:
        raise ValueError(f"alpha must lie between 0 and 1, got {alpha!r}")
    mixed = torch.lerp(fake.detach().to(dtype), real.detach().to(dtype), alpha)
    return mixed.to(torch.promote_types(real.dtype, fake.dtype)).requires_grad_()


def gradient_penalty(
    discriminator: Callable[[Tensor], Logits],
    real: Tensor,
    fake: Tensor,
    *,
    mask: Tensor | None = None,
    norm: str = "sample",
    weight: float = 10.0,
    alpha: float | Tensor | None = None,
) -> Tensor:
    """The gradient penalty of WGAN-GP: ``weight * mean((|g| - 1)^2)`` at random mixes of real and generated images.

    ``g`` is the gradient of the discriminator's summed logits by ``x = alpha * real + (1 - alpha) * fake``. ``|g|``
    is its Euclidean norm over a whole sample (``norm="sample"``) or over the channels of a pixel (``"pixel"``). With
    a mask it is that of ``mask * g``, and the result is divided by ``mean(mask)``.

    Args:
        discriminator: called once, with the mixes; returns logits of any shape, or a sequence of them (several
            discriminators, scales or heads), of which the result is the mean of each one's own penalty.
        real: images (N, C, H, W); float16, bfloat16, float32 or float64.
        fake: as `real` in shape and device; the dtype may differ. Both are detached.
        mask: weights of the gradient's pixels: (N, 1, H, W), (1, 1, H, W), (H, W), (N, C, H, W); floating, bool or an
            integer (nonzero counts as 1). Where it is exactly 0 the gradient is ignored, NaN included. An empty mask
            gives 0 with zero gradient.
        norm: "sample" or "pixel".
        weight: the factor.
        alpha: the share of the real image: a number from 0 to 1, or (N, 1, 1, 1). None draws one for each sample,
            uniformly, on the device.

    Returns:
        A scalar, float32; float64 if an image is float64. An empty batch gives 0.

    Mixes, norm and mean are computed in float32 under autocast, too; the discriminator runs as for any other call.

    Differentiable in the discriminator's parameters, `mask` and `alpha`, by autograd's backward; the derivatives of a
    norm at the zero vector are 0, in every order. Keep penalty and discriminator out of ``torch.compile``, of which
    torch has no second derivative and says so.

    Raises:
        TypeError: an argument is no tensor, number or function as listed above.
        ValueError: shapes or devices disagree, an option is unknown, or some logits do not depend on the images.
        RuntimeError: gradients are disabled, or a torch.func transform is active.

    Gulrajani et al., "Improved Training of Wasserstein GANs", 2017; per pixel and with a mask as mmagic computes it.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> real, fake = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
        >>> ik.gradient_penalty(lambda x: x.square().sum((1, 2, 3)), real, fake, alpha=0.75).item()
        40.0
    """
    if not callable(discriminator):
        raise TypeError(f"discriminator must be callable, got {type(discriminator).__name__}")
    _checks.check_images(real, fake, "real", "fake")
    if mask is not None:
        mask = _checks.check_mask(mask, real, "real")
    _checks.check_choice("norm", norm, ("sample", "pixel"))
    _checks.check_number("weight", weight)
    _check_gradients("gradient_penalty", real, fake)
    mixed = _mix(real, fake, alpha)
    penalties = []
    for name, logits in as_entries("the discriminator's output", discriminator(mixed)).items():
        gradient = _image_gradient(name, logits, mixed, "the images that the discriminator was called with")
        if mask is not None:
            gradient = torch.where(mask == 0, 0.0, gradient) * mask.to(gradient.dtype)
        squares = gradient.square().sum((1, 2, 3) if norm == "sample" else 1)
        penalties.append(mean((_root(squares) - 1).square()))
    penalty = mean_of_entries(penalties)
    if mask is not None:
        penalty = safe_divide(penalty, mean(mask.to(penalty.dtype)))
    return weight * penalty
