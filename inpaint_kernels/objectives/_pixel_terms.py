"""The pixel terms of an objective, all of them from as few passes over the images as there are ops for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..nn._streaming import weighted_sum
from ..ops import _pixel
from ..ops.hole_valid import hole_valid_loss
from ..ops.inpainting_pixel import inpainting_pixel_loss
from ..ops.masked_l1 import masked_l1_loss
from ..ops.total_variation import total_variation_loss
from ..reference._common import safe_divide
from ..reference.hole_valid import region_weights
from ._terms import Pixel, Term, TotalVariation


def reads_mask(terms: Mapping[str, Term]) -> bool:
    """Whether the pixel terms differ from those of an image that is known everywhere."""
    pixels = [term for term in terms.values() if isinstance(term, Pixel)]
    regions = {term.region: term.weight for term in pixels}
    return (
        regions.get("hole") != regions.get("valid")
        or any(
            term.by_hole_share or (term.region != "image" and term.normalize != "image") for term in pixels
        )
        or any(
            isinstance(term, TotalVariation) and (term.image == "composite" or term.region != "image")
            for term in terms.values()
        )
    )


class PixelTerms:
    """Computes the pixel terms of an objective. Which term is of which region is looked up once, here."""

    def __init__(self, terms: Mapping[str, Term], mask_is: str, where: dict[str, Any]) -> None:
        self.terms, self.mask_is, self.where = terms, mask_is, where
        self.weights = {name: term.weight for name, term in terms.items()}
        pixels = {name: term for name, term in terms.items() if isinstance(term, Pixel)}
        self.split = {term.region: name for name, term in pixels.items() if term.region != "image"}
        self.whole = next(((n, t) for n, t in pixels.items() if t.region == "image"), None)
        self.variation = next(((n, t) for n, t in terms.items() if isinstance(t, TotalVariation)), None)
        self.normalize = next((pixels[name].normalize for name in self.split.values()), "image")
        self.fused: dict[str, Any] = {"normalize": self.normalize, "hole_weight": 0.0, "valid_weight": 0.0}
        self.fused |= {f"{region}_weight": self.weights[name] for region, name in self.split.items()}
        if self.variation is not None:
            tv = self.variation[1]
            self.fused |= {"tv_weight": tv.weight, "tv_region": tv.region, "tv_normalize": tv.normalize}

    def __call__(
        self, pred: Tensor, target: Tensor, composited: Tensor, mask: Tensor | None
    ) -> dict[str, Tensor]:
        """The terms by name, and their weighted total as "total"; empty without any.

        `composited` stands for the target in composites. Without a mask every pixel is known.
        """
        terms: dict[str, Tensor] = {}
        total: Tensor | None = None
        where, mask_is = self.where, self.mask_is
        if self.split:
            if mask is None:
                values = {"valid": masked_l1_loss(pred, target, normalize=self.normalize, **where)}
            elif (
                self.variation is not None and self.variation[1].image == "composite" and composited is target
            ):
                fused = inpainting_pixel_loss(pred, target, mask, mask_is=mask_is, **self.fused, **where)
                values = fused._asdict()
                total = fused.total
                terms[self.variation[0]] = fused.tv
            else:
                values = hole_valid_loss(
                    pred, target, mask, normalize=self.normalize, mask_is=mask_is, **where
                )._asdict()
            terms |= {name: values[region] for region, name in self.split.items() if region in values}
        left = list(terms) if total is None else []
        if self.whole is not None:
            name, term = self.whole
            if term.by_hole_share:
                assert mask is not None
                hole = region_weights(pred, target, mask, mask_is)[0]
                terms[name] = _by_hole_share(pred, target, hole, **where)
            else:
                terms[name] = masked_l1_loss(pred, target, normalize="image", **where)
            left.append(name)
        if self.variation is not None and self.variation[0] not in terms:
            name, tv = self.variation
            composite = tv.image == "composite"
            terms[name] = total_variation_loss(
                pred,
                mask if composite or tv.region != "image" else None,
                target=composited if composite else None,
                region=tv.region,
                normalize=tv.normalize,
                mask_is=mask_is,
                **where,
            )
            left.append(name)
        if left:
            rest = weighted_sum([terms[name] for name in left], [self.weights[name] for name in left])
            total = rest if total is None else total + rest
        if total is not None:
            terms["total"] = total
        return terms


def _by_hole_share(
    pred: Tensor, target: Tensor, hole: Tensor, process_group: Any, backend: str | None
) -> Tensor:
    # sum |pred - target| over the summed hole: the sum of a rank without a hole counts, too.
    error = masked_l1_loss(pred, target, normalize="image", backend=backend)
    count = _pixel.mean_count(pred, hole, "mask")
    if process_group is not None:
        factor = _pixel.global_factor(count, process_group)
    else:
        factor = safe_divide(torch.ones_like(count), count)
    return error * (pred.numel() * factor).to(error.dtype)
