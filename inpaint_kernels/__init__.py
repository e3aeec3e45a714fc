"""Training losses of image inpainting as fused kernels for PyTorch."""

from . import _library, features, nn, objectives
from .ops.adversarial import DiscriminatorLoss, discriminator_loss, generator_loss
from .ops.composite import composite
from .ops.feature_distance import feature_distance
from .ops.feature_matching import feature_matching_loss
from .ops.gradient_loss import gradient_loss
from .ops.gram import gram_matrix
from .ops.hole_valid import HoleValid, hole_valid_loss
from .ops.inpainting_pixel import InpaintingPixel, inpainting_pixel_loss
from .ops.lpips import lpips_distance
from .ops.mask_operators import binarize_mask, dilate_mask, invert_mask, resize_mask
from .ops.masked_l1 import (
    masked_charbonnier_loss,
    masked_huber_loss,
    masked_l1_loss,
    masked_mse_loss,
)
from .ops.ms_ssim import ms_ssim, ms_ssim_loss
from .ops.partial_conv import PartialConvOutput, partial_conv2d, partial_conv3d
from .ops.penalties import gradient_penalty, r1_penalty
from .ops.ssim import l1_ssim_loss, ssim, ssim_loss
from .ops.stacked_images import stacked_images
from .ops.style import style_loss
from .ops.total_variation import total_variation_loss

__version__ = "0.1.0"

# Here, for here all ops are defined.
_library.check_libraries()

__all__ = [
    "DiscriminatorLoss",
    "HoleValid",
    "InpaintingPixel",
    "PartialConvOutput",
    "binarize_mask",
    "composite",
    "dilate_mask",
    "discriminator_loss",
    "feature_distance",
    "feature_matching_loss",
    "features",
    "generator_loss",
    "gradient_loss",
    "gradient_penalty",
    "gram_matrix",
    "hole_valid_loss",
    "inpainting_pixel_loss",
    "invert_mask",
    "l1_ssim_loss",
    "lpips_distance",
    "masked_charbonnier_loss",
    "masked_huber_loss",
    "masked_l1_loss",
    "masked_mse_loss",
    "ms_ssim",
    "ms_ssim_loss",
    "nn",
    "objectives",
    "partial_conv2d",
    "partial_conv3d",
    "r1_penalty",
    "resize_mask",
    "ssim",
    "ssim_loss",
    "stacked_images",
    "style_loss",
    "total_variation_loss",
]
