"""Structural losses as modules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..ops import _checks
from ..ops.ms_ssim import check_scales, ms_ssim_loss
from ..ops.ssim import check_share, check_windows, l1_ssim_loss, ssim_loss


class _StructuralLoss(nn.Module):
    """The options that the structural losses share."""

    def __init__(self, data_range: float, window_size: int, sigma: float, padding: str) -> None:
        super().__init__()
        check_windows(data_range, window_size, sigma, padding)
        self.data_range, self.window_size = data_range, window_size
        self.sigma, self.padding = sigma, padding

    def extra_repr(self) -> str:
        return (
            f"data_range={self.data_range}, window_size={self.window_size}, sigma={self.sigma}, "
            f"padding={self.padding!r}"
        )


class SSIMLoss(_StructuralLoss):
    """`ssim_loss` with its options.

    Args:
        data_range: the width of the range of values: 1 for [0, 1], 2 for [-1, 1], 255 for bytes.
        window_size: pixels of a side of the window, odd, 3 to 15.
        sigma: width of the Gaussian in pixels.
        padding: "valid" or "same".
        reduction: "mean" over the samples, or "none" for one value of each.

    ``forward(pred, target, mask=None)`` takes images as the function does. Raises TypeError and ValueError for
    options that are not allowed, at once.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> image = torch.rand(1, 3, 16, 16)
        >>> ik.nn.SSIMLoss()(image, image)
        tensor(0.)
    """

    def __init__(
        self,
        *,
        data_range: float = 1.0,
        window_size: int = 11,
        sigma: float = 1.5,
        padding: str = "valid",
        reduction: str = "mean",
    ) -> None:
        super().__init__(data_range, window_size, sigma, padding)
        _checks.check_choice("reduction", reduction, ("mean", "none"))
        self.reduction = reduction

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, reduction={self.reduction!r}"

    def forward(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """1 - SSIM of the images, see `ssim_loss`."""
        return ssim_loss(
            pred,
            target,
            mask,
            data_range=self.data_range,
            window_size=self.window_size,
            sigma=self.sigma,
            padding=self.padding,
            reduction=self.reduction,
        )


class MSSSIMLoss(SSIMLoss):
    """`ms_ssim_loss` with its options.

    Args:
        data_range, window_size, sigma, padding, reduction: as in `SSIMLoss`.
        scale_weights: the exponent of each scale, from the finest to the coarsest; None for the published five.

    ``forward(pred, target, mask=None)`` takes images as the function does. Raises TypeError and ValueError for
    options that are not allowed, at once.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> image = torch.rand(1, 3, 161, 161)
        >>> ik.nn.MSSSIMLoss()(image, image)
        tensor(0.)
    """

    def __init__(
        self,
        *,
        data_range: float = 1.0,
        window_size: int = 11,
        sigma: float = 1.5,
        padding: str = "valid",
        scale_weights: Sequence[float] | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(
            data_range=data_range,
            window_size=window_size,
            sigma=sigma,
            padding=padding,
            reduction=reduction,
        )
        self.scale_weights = check_scales(scale_weights)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale_weights={self.scale_weights}"

    def forward(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """1 - MS-SSIM of the images, see `ms_ssim_loss`."""
        return ms_ssim_loss(
            pred,
            target,
            mask,
            data_range=self.data_range,
            window_size=self.window_size,
            sigma=self.sigma,
            padding=self.padding,
            scale_weights=self.scale_weights,
            reduction=self.reduction,
        )


class L1SSIMLoss(_StructuralLoss):
    """`l1_ssim_loss` with its options: L1 and 1 - SSIM in one pass, the loss of 3D Gaussian splatting.

    Args:
        ssim_weight: the share of the structural term, from 0 to 1.
        data_range, window_size, sigma, padding: as in `SSIMLoss`.

    ``forward(pred, target, mask=None)`` takes images as the function does and returns a scalar. Raises TypeError and
    ValueError for options that are not allowed, at once.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> pred, target = torch.full((1, 3, 16, 16), 0.2), torch.full((1, 3, 16, 16), 0.4)
        >>> ik.nn.L1SSIMLoss(ssim_weight=0.25)(pred, target)
        tensor(0.2000)
    """

    def __init__(
        self,
        *,
        ssim_weight: float = 0.2,
        data_range: float = 1.0,
        window_size: int = 11,
        sigma: float = 1.5,
        padding: str = "valid",
    ) -> None:
        super().__init__(data_range, window_size, sigma, padding)
        self.ssim_weight = check_share(ssim_weight)

    def extra_repr(self) -> str:
        return f"ssim_weight={self.ssim_weight}, {super().extra_repr()}"

    def forward(self, pred: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """L1 and 1 - SSIM of the images, see `l1_ssim_loss`."""
        return l1_ssim_loss(
            pred,
            target,
            mask,
            ssim_weight=self.ssim_weight,
            data_range=self.data_range,
            window_size=self.window_size,
            sigma=self.sigma,
            padding=self.padding,
        )
