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


def pixel_terms(
    terms: Mapping[str, Term],
    pred: Tensor,
    target: Tensor,
    composited: Tensor,
    mask: Tensor | None,
    mask_is: str,
    where: dict[str, Any],
) -> dict[str, Tensor]:
    """The terms by name, and their weighted total as "total"; empty without any.

    `composited` stands for the target in composites. Without a mask every pixel is known.
    """
    found: dict[str, Tensor] = {}
    if not terms:
        return found
    split = {term.region: name for name, term in terms.items() if isinstance(term, Pixel)}
    whole = split.pop("image", None)
    variation = next((name for name, term in terms.items() if isinstance(term, TotalVariation)), None)
    tv = terms[variation] if variation is not None else None
    assert tv is None or isinstance(tv, TotalVariation)
    total: Tensor | None = None
    if split:
        first = terms[next(iter(split.values()))]
        assert isinstance(first, Pixel)
        weights = {region: terms[name].weight for region, name in split.items()}
        if mask is None:
            values = {"valid": masked_l1_loss(pred, target, normalize=first.normalize, **where)}
        elif tv is not None and tv.image == "composite" and composited is target:
            values = inpainting_pixel_loss(
                pred,
                target,
                mask,
                hole_weight=weights.get("hole", 0.0),
                valid_weight=weights.get("valid", 0.0),
                tv_weight=tv.weight,
                normalize=first.normalize,
                tv_region=tv.region,
                tv_normalize=tv.normalize,
                mask_is=mask_is,
                **where,
            )._asdict()
            total = values["total"]
            found[str(variation)] = values["tv"]
        else:
            values = hole_valid_loss(
                pred, target, mask, normalize=first.normalize, mask_is=mask_is, **where
            )._asdict()
        found |= {name: values[region] for region, name in split.items() if region in values}
    if whole is not None:
        term = terms[whole]
        assert isinstance(term, Pixel)
        if term.by_hole_share:
            assert mask is not None
            found[whole] = _by_hole_share(
                pred, target, region_weights(pred, target, mask, mask_is)[0], **where
            )
        else:
            found[whole] = masked_l1_loss(pred, target, normalize="image", **where)
    if tv is not None and variation not in found:
        composite = tv.image == "composite"
        found[str(variation)] = total_variation_loss(
            pred,
            mask if composite or tv.region != "image" else None,
            target=composited if composite else None,
            region=tv.region,
            normalize=tv.normalize,
            mask_is=mask_is,
            **where,
        )
    left = [name for name in found if total is None or name == whole]
    if left:
        rest = weighted_sum([found[name] for name in left], [terms[name].weight for name in left])
        total = rest if total is None else total + rest
    return found if total is None else {"total": total, **found}


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
