"""The composite: prediction inside the hole, truth elsewhere."""

from __future__ import annotations

from torch import Tensor

from .stacked_images import stacked_images


def composite(
    pred: Tensor, target: Tensor, mask: Tensor, *, mask_is: str = "valid", backend: str | None = None
) -> Tensor:
    """``(1 - mask) * pred + mask * target``: what an inpainting network delivers, and what some losses compare.

    Exactly `pred` where the mask is 0 and `target` where it is 1, whatever stands in the other, even NaN.

    Args:
        pred: images (N, C, H, W); float16, bfloat16, float32 or float64, any strides.
        target: as `pred` in shape and device; its dtype may differ, a differing layout is copied.
        mask: 1 = known, 0 = hole, fractions mix; shapes and dtypes as `hole_valid_loss`.
        mask_is: "valid", or "hole" for a mask that is 1 inside the hole.
        backend: None (automatic), "reference", "cpu" or "triton".

    Returns:
        As `pred` in shape and layout, in the wider dtype of the two images.

    Differentiable in `pred` and `target`, and through the reference in `mask`. Only `mask` is kept for the gradient.
    Raises as `stacked_images`, whose part "composite" this is; for a feature trunk write all its images at once with
    that function.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> mask = torch.tensor([[1.0, 0.0]])
        >>> ik.composite(torch.full((1, 1, 1, 2), 5.0), torch.zeros(1, 1, 1, 2), mask)
        tensor([[[[0., 5.]]]])
    """
    return stacked_images(pred, target, mask, parts=("composite",), mask_is=mask_is, backend=backend)
