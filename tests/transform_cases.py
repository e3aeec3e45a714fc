"""Every differentiable function of the package as a case for the tests of transforms, modes and kinds of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from harness import Backend, backend_for, generator
from torch import Tensor

import inpaint_kernels as ik

IMAGES = ((2, 3, 4, 5), (2, 3, 4, 5), (2, 1, 4, 5))
LAYERS = ((4, 3, 4, 5), (4, 2, 3, 2), (2, 3, 4, 5), (2, 2, 3, 2))


@dataclass(frozen=True)
class Case:
    """`call(tensors, backend)`; of the tensors, the last `fixed` get a gradient from the reference alone."""

    call: Callable[[Sequence[Tensor], str | None], Any]
    shapes: tuple[tuple[int, ...], ...]
    fixed: int = 0
    masks: tuple[int, ...] = ()  # which of the tensors are masks
    weights: bool = False  # the last tensor holds the layers' weights, which kernels take as numbers only
    function: str = ""

    @property
    def free(self) -> int:
        """How many tensors kernels compute a gradient to."""
        return len(self.shapes) - self.fixed

    def forced(self, backend: Backend) -> str | None:
        """The backend's name where it can be forced."""
        return None if self.weights else backend_for(self.function, backend)

    def outputs(self, tensors: Sequence[Tensor], backend: str | None = None) -> tuple[Tensor, ...]:
        found = self.call(tensors, backend)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    def tensors(self, dtype: torch.dtype = torch.float64, seed: int = 0, device: str = "cpu") -> list[Tensor]:
        """Images without ties; masks of zeros, ones and fractions."""
        rng = generator(seed)
        found = []
        for i, shape in enumerate(self.shapes):
            value = torch.rand(shape, generator=rng, dtype=torch.float64) + 0.1 * (i + 1)
            if i in self.masks:
                value = (2 * torch.rand(shape, generator=rng, dtype=torch.float64) - 0.5).clamp(0, 1)
            found.append(value.to(device, dtype))
        return found


def _images(function: Callable[..., Any], **options: Any) -> Case:
    def call(t: Sequence[Tensor], backend: str | None) -> Any:
        return function(t[0], t[1], t[2], backend=backend, **options)

    return Case(call, IMAGES, fixed=1, masks=(2,), function=function.__name__)


def _variation(target: bool, **options: Any) -> Case:
    def call(t: Sequence[Tensor], backend: str | None) -> Any:
        image, *other, mask = t
        truth = other[0] if other else None
        return ik.total_variation_loss(image, mask, target=truth, backend=backend, **options)

    shapes = IMAGES if target else (IMAGES[0], IMAGES[2])
    return Case(call, shapes, fixed=1, masks=(len(shapes) - 1,))


def _layers(function: Callable[..., Any], **options: Any) -> Case:
    def call(t: Sequence[Tensor], backend: str | None) -> Any:
        return function(t[0:2], t[2:4], weights=(0.5, 2.0), backend=backend, **options)

    return Case(call, LAYERS)


def _weighted_layers(function: Callable[..., Any], **options: Any) -> Case:
    def call(t: Sequence[Tensor], backend: str | None) -> Any:
        return function(t[0:2], t[2:4], weights=t[4], backend=backend, **options)

    return Case(call, (*LAYERS, (2,)), fixed=1, weights=True)


def _masked_features(t: Sequence[Tensor], backend: str | None) -> Any:
    return ik.feature_distance(t[0], t[1], mask=t[2], penalty="charbonnier", eps=0.05, backend=backend)


def _given_grams(t: Sequence[Tensor], backend: str | None) -> Any:
    return ik.style_loss(t[0], t[1], penalty="l2", target_is_gram=True, backend=backend)


def _partial_conv(function: Callable[..., Any], dims: int, **options: Any) -> Case:
    def call(t: Sequence[Tensor], backend: str | None) -> Any:
        found = function(t[0], t[1], t[2], mask=t[3], padding=1, backend=backend, **options)
        return found.output

    size, kernel = (4, 5, 3)[:dims], (3, 3, 3)[:dims]
    return Case(call, ((2, 2, *size), (3, 2, *kernel), (3,), (2, 1, *size)), fixed=1, masks=(3,))


CASES = {
    "masked_l1": _images(ik.masked_l1_loss),
    "masked_l1 none": replace(_images(ik.masked_l1_loss, reduction="none"), function="masked_l1 none"),
    "masked_mse": _images(ik.masked_mse_loss),
    "masked_charbonnier": _images(ik.masked_charbonnier_loss, eps=0.05, normalize="sample"),
    "masked_huber": _images(ik.masked_huber_loss, delta=0.4, normalize="image"),
    "hole_valid l1": _images(ik.hole_valid_loss),
    "hole_valid l2": _images(ik.hole_valid_loss, penalty="l2", normalize="mask", mask_is="hole"),
    "total_variation l1": _variation(False, region="hole"),
    "total_variation l2": _variation(False, penalty="l2", region="dilated_hole", normalize="mask"),
    "total_variation l1 composite": _variation(True),
    "total_variation l2 composite": _variation(True, penalty="l2", region="first_pixel"),
    "inpainting_pixel l1": _images(ik.inpainting_pixel_loss),
    "inpainting_pixel l2": _images(ik.inpainting_pixel_loss, tv_penalty="l2"),
    "gradient_loss l1": _images(ik.gradient_loss, ring=1),
    "gradient_loss l2": _images(ik.gradient_loss, penalty="l2", region="dilated_hole", mask_is="hole"),
    "composite": _images(ik.composite),
    "stacked_images": _images(ik.stacked_images, parts=("raw", "composite", "hole_target"), scale=(2, 3, 4)),
    "gram_matrix": Case(lambda t, backend: ik.gram_matrix(t[0], backend=backend), ((2, 3, 4, 5),)),
    "style l1": _layers(ik.style_loss),
    "style gatys": _layers(ik.style_loss, normalize="gatys"),
    "style of given matrices": Case(_given_grams, ((4, 3, 4, 5), (2, 3, 3)), fixed=1),
    "style with weights": _weighted_layers(ik.style_loss, penalty="l2"),
    "feature_distance l1": _layers(ik.feature_distance),
    "feature_distance l2": _layers(ik.feature_distance, penalty="l2", layer_reduction="mean"),
    "feature_distance with a mask": Case(
        _masked_features, ((4, 3, 4, 5), (2, 3, 4, 5), (2, 1, 4, 5)), 1, (2,)
    ),
    "feature_distance with weights": _weighted_layers(ik.feature_distance),
    "partial_conv2d": _partial_conv(ik.partial_conv2d, 2, mask_update="binary"),
    "partial_conv2d mat": _partial_conv(
        ik.partial_conv2d, 2, mask_input=False, scale_bias=True, activation="leaky_relu"
    ),
    "partial_conv3d": _partial_conv(ik.partial_conv3d, 3, mask_update="proportional"),
}
