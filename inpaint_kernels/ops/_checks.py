"""Argument checks shared by the pixel losses: every error names the argument, what it got and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _library

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MASK_DTYPES = (*FLOATS, torch.bool)
PENALTIES = ("l1", "l2", "charbonnier", "huber")
NORMALIZATIONS = ("mask", "image", "sample")
REDUCTIONS = ("mean", "sum", "none")
LayerWeights = float | Tensor | Sequence[float] | Sequence[Tensor] | None


def not_floating(name: str, value: Any) -> TypeError:
    """The error for an argument that is no floating tensor."""
    if not isinstance(value, Tensor):
        return TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    return TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")


def check_images(pred: Tensor, target: Tensor, name: str = "pred", other: str = "target") -> None:
    """pred, called `name`, and target, called `other`: floating (N, C, H, W) tensors of one shape on one device."""
    for argument, value in ((name, pred), (other, target)):
        if not isinstance(value, Tensor) or value.dtype not in FLOATS:
            raise not_floating(argument, value)
    if pred.ndim != 4:
        raise ValueError(f"{name} must have shape (N, C, H, W), got {tuple(pred.shape)}")
    if target.shape != pred.shape:
        raise ValueError(f"{other} has shape {tuple(target.shape)}, {name} has {tuple(pred.shape)}")
    if target.device != pred.device:
        raise ValueError(f"{other} is on {target.device}, {name} is on {pred.device}")


def binary(mask: Tensor) -> Tensor:
    """The mask as a kernel takes it: floating and bool as they are, integers as bool.

    Nonzero counts as 1, so that masks saved as 0/1 and as 0/255 mean the same.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a Tensor, got {type(mask).__name__}")
    if mask.dtype in MASK_DTYPES:
        return mask
    if mask.dtype.is_floating_point or mask.dtype.is_complex:
        raise TypeError(f"mask must be floating, bool or an integer, got {mask.dtype}")
    if not _library.is_plain((mask,)):
        # A graph that is recorded here must hold for masks of other strides.
        return mask != 0
    # Broadcast dimensions stay broadcast: only what is in memory is compared.
    stored = mask
    for dim, stride in enumerate(mask.stride()):
        if stride == 0 and mask.shape[dim] > 1:
            stored = stored.narrow(dim, 0, 1)
    return (stored != 0).expand(mask.shape)


def is_same(image: Tensor, target: Tensor) -> bool:
    """Whether an image is the target: that tensor, or its memory, as ``target.detach()``, which no compiler sees."""
    return image is target or (
        _library.is_plain((image, target)) and not image.is_meta and image.is_set_to(target)
    )


def check_plane(mask: Tensor) -> Tensor:
    """A mask that is the same for all channels."""
    if mask.ndim == 4 and mask.shape[1] != 1:
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}; allowed here: (N, 1, H, W), (1, 1, H, W) or (H, W), one for all "
            "channels"
        )
    return mask


def check_mask(mask: Tensor, pred: Tensor, name: str = "pred") -> Tensor:
    """The mask as a kernel takes it, its last two dimensions expanded to those of pred, an image called `name`."""
    mask = binary(mask)
    if mask.device != pred.device:
        raise ValueError(f"mask is on {mask.device}, {name} is on {pred.device}")
    shape, image = mask.shape, pred.shape
    if len(shape) == 4:
        fits = (
            (shape[0] == image[0] or shape[0] == 1)
            and (shape[1] == image[1] or shape[1] == 1)
            and (shape[2] == image[2] or shape[2] == 1)
            and (shape[3] == image[3] or shape[3] == 1)
        )
    else:
        fits = len(shape) == 2 and shape == image[2:]
    if not fits:
        raise ValueError(
            f"mask has shape {tuple(shape)}; for {name} {tuple(image)} allowed: (N, 1, H, W), (1, 1, H, W), "
            f"(H, W), (N, C, H, W), or any 4-D shape that broadcasts to {name}'s. A batch of masks (N, H, W) needs "
            "mask.unsqueeze(1)"
        )
    if shape[-2:] != image[2:]:
        mask = mask.expand(-1, -1, image[2], image[3])
    return mask


def check_image_mask(mask: Tensor, name: str, features: Tensor, batches: Sequence[int]) -> Tensor:
    """A mask of images, of one of the `batches`, for `features` made of them that errors call `name`."""
    mask = binary(mask)
    if mask.device != features.device:
        raise ValueError(f"mask is on {mask.device}, {name} is on {features.device}")
    shape = mask.shape
    fits = len(shape) == 2 or (len(shape) == 4 and shape[1] == 1 and shape[0] in batches)
    if not fits or shape[-1] == 0 or shape[-2] == 0:
        raise ValueError(
            f"mask has shape {tuple(shape)}; for {name} {tuple(features.shape)} allowed: (N, 1, H, W), (1, 1, H, W) "
            "or (H, W), at any resolution"
        )
    return mask


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """`value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, allowed: {', '.join(map(repr, allowed))}")


def check_positive(name: str, value: float) -> float:
    """A float whose square float32 can hold: a smaller one is 0 where the formula needs it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 1e-18 <= value <= 1e18:
        raise ValueError(f"{name} must lie between 1e-18 and 1e18, got {value!r}")
    return float(value)


def check_number(name: str, value: float) -> float:
    """A finite float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    # A comparison, which torch.compile traces; math.isfinite breaks its graph.
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def check_count(name: str, value: int, least: int) -> None:
    """An integer, `least` or more."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_features(name: str, value: Tensor) -> None:
    """A floating (N, C, H, W) tensor."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        raise not_floating(name, value)
    if value.ndim != 4:
        raise ValueError(f"{name} must have shape (N, C, H, W), got {tuple(value.shape)}")


def as_layers(name: str, value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One tensor or a sequence of them as a list, never empty."""
    if isinstance(value, Tensor):
        return [value]
    if not isinstance(value, Sequence) or not value:
        kind = f"empty {type(value).__name__}" if isinstance(value, Sequence) else type(value).__name__
        raise TypeError(f"{name} must be a Tensor or a non-empty sequence of them, got {kind}")
    return list(value)


def layer_weights(weights: LayerWeights, layers: int) -> list[Any]:
    """One weight for each layer; None means 1. Numbers, and tensors of one element that no kernel may read."""
    if weights is None:
        return [1.0] * layers
    single = isinstance(weights, (int, float)) or (isinstance(weights, Tensor) and weights.ndim == 0)
    given: Any = [weights] if single else weights
    try:
        factors = [_number_or_scalar(weight) for weight in given]
    except (TypeError, ValueError):
        raise TypeError(
            f"weights must be a number, a sequence of numbers or of tensors of one element, got {weights!r}"
        ) from None
    if len(factors) != layers:
        raise ValueError(f"weights has {len(factors)} entries for {layers} layers")
    return factors


def _number_or_scalar(weight: Any) -> Any:
    if not isinstance(weight, Tensor):
        return float(weight)
    if weight.numel() != 1 or weight.is_complex():
        raise ValueError
    learned = weight.requires_grad and torch.is_grad_enabled()
    if learned or weight.device.type != "cpu" or not _library.is_plain((weight,)):
        return weight.reshape(())
    return float(weight.detach())


def tensor_weights(weights: Sequence[Any]) -> str | None:
    """What kernels do not do with those of `layer_weights`."""
    if any(isinstance(weight, Tensor) for weight in weights):
        return "takes weights as numbers, without their gradient; use backend='reference'"
    return None


def check_streamed(*tensors: Tensor) -> None:
    """A streamed loss runs autograd's backward itself, so it has no other derivatives."""
    watcher = _library.transform_of(tensors)
    if watcher is not None:
        raise RuntimeError(f"the streamed loss does not serve {watcher}; use the plain path (chunk=None)")


def check_batches(layer: int, input: Tensor, batch: int) -> None:
    """The input's batch is a whole number of batches of the target, one or more."""
    fits = input.shape[0] > 0 and input.shape[0] % batch == 0 if batch else input.shape[0] == 0
    if not fits:
        raise ValueError(
            f"input[{layer}] has a batch of {input.shape[0]}, target[{layer}] of {batch}: the input's must be a "
            "multiple of it, 1 or more (several predictions in the order of torch.cat)"
        )
