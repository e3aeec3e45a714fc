"""Formulas, inputs and checks shared by the tests of the ops on feature maps (gram, style, feature_distance).

The formulas are written here from the definition, without the package's reference, so that the two cannot be
wrong together. Layers travel flat, (*inputs, *targets, *masks), as the checks of `harness` want them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from harness import (
    DTYPES,
    EMULATING,
    FLOOR_ULPS,
    INTERPRETING,
    Backend,
    Call,
    accumulate_dtype,
    assert_gradient,
    assert_within_budget,
    evaluate,
    generator,
    laid_out,
    poisoned_allocations,
    same_bits,
)
from pixel_cases import PARAMS, make_mask, ratio, weighted
from torch import Tensor

from inpaint_kernels.ops.feature_distance import feature_distance
from inpaint_kernels.ops.gram import gram_matrix
from inpaint_kernels.ops.style import style_loss

# (H, W) by the number of pixels, that is by the code path of the sum over them.
PLANES = {"1": (1, 1), "7": (1, 7), "64": (8, 8), "961": (31, 31)}
# One channel, a few, an odd count, a whole tile, a tile and a rest.
CHANNELS = (1, 3, 17, 64, 130)
if EMULATING:
    # Tiles are 64 channels; a stage is 64 bytes along the pixels, a part at least 512 pixels, a product 128 wide.
    PLANES |= {"35": (5, 7), "144": (9, 16), "parts": (32, 34)}
elif not INTERPRETING:
    PLANES["9191"] = (91, 101)  # more than one part of a sum that is split over the pixels
GRAM_NORMALIZATIONS = ("chw", "hw", "none")
# (normalize, penalty) of the style loss.
STYLES = {f"{n}-{p}": (n, p) for n in GRAM_NORMALIZATIONS for p in ("l1", "l2")} | {"gatys": ("gatys", "l2")}


def check(
    call: Call,
    formula: Call,
    inputs: Sequence[Tensor | None],
    *,
    wanted: Sequence[int],
    sizes: Callable[..., tuple[Sequence[Tensor], dict[int, Tensor]]],
    masks: int = 0,
) -> None:
    """`harness.check_against_truth` for sums whose terms cancel, in the outputs as well as in the gradients.

    `sizes` tells from the inputs in float64 how large the terms of every output are, and those of every gradient by
    position. A value may be off by FLOOR_ULPS of its terms, a stored half besides by one rounding of its own size.
    The last `masks` inputs do not decide the dtype of the sums.
    """
    acc = accumulate_dtype([t for t in inputs[: len(inputs) - masks] if t is not None])
    before = [None if t is None else (t.clone(), t._version) for t in inputs]
    with poisoned_allocations():
        outputs, gradients, upstream = evaluate(call, inputs, wanted)
    for i, (t, old) in enumerate(zip(inputs, before, strict=True)):
        if t is not None and old is not None:
            assert t._version == old[1] and same_bits(t, old[0]), f"input {i} was changed in place"

    def in_dtype(dtype: torch.dtype) -> Call:
        return lambda *leaves: formula(*(None if t is None else t.to(dtype) for t in leaves))

    on_cpu = [None if t is None else t.detach().cpu() for t in inputs]
    exact = [None if t is None else t.double() for t in on_cpu]
    plain, plain_gradients, _ = evaluate(in_dtype(acc), on_cpu, wanted, upstream)
    truth, true_gradients, _ = evaluate(in_dtype(torch.float64), exact, wanted, upstream)
    output_sizes, gradient_sizes = sizes(*exact, *(u.double().cpu() for u in upstream))
    for i, (got, usual, want) in enumerate(zip(outputs, plain, truth, strict=True)):
        assert got.dtype == acc, f"output {i} has dtype {got.dtype}"
        assert_within_budget(got, usual, want, acc=acc, what=f"output {i}", magnitude=output_sizes[i])
    for i, got, usual, want in zip(wanted, gradients, plain_gradients, true_gradients, strict=True):
        assert got.dtype == usual.dtype, f"gradient of input {i} has dtype {got.dtype}"
        size = gradient_sizes[i]
        if got.dtype != acc:
            storage, floor = torch.finfo(got.dtype).eps, FLOOR_ULPS * torch.finfo(acc).eps
            size = (storage * want.abs() + floor * size) / (storage + floor)
        assert_gradient(got, usual, want, acc=acc, what=f"gradient of input {i}", magnitude=size)


MATMUL_PRECISIONS = ("highest", "high", "medium")


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
        assert torch.get_float32_matmul_precision() == precision, "the setting was written"
    finally:
        torch.set_float32_matmul_precision(before)


def check_matmul_precision(call: Call, inputs: Sequence[Tensor], wanted: Sequence[int]) -> None:
    """The setting is read, never written."""
    for precision in MATMUL_PRECISIONS:
        with matmul_precision(precision):
            outputs, gradients, _ = evaluate(call, inputs, wanted)
        assert all(t.isfinite().all() for t in (*outputs, *gradients))


# ---- inputs ------------------------------------------------------------------------------------------------------


def feature_map(
    size: Sequence[int],
    dtype: str = "f32",
    layout: str = "contiguous",
    *,
    seed: int = 0,
    signed: bool = True,
) -> Tensor:
    """Normal values, or their absolute values as an activation has them."""
    x = torch.randn(tuple(size), generator=generator(seed))
    return laid_out((x if signed else x.abs()).to(DTYPES[dtype]), layout)


def style_pair(
    size: tuple[int, int, int, int],
    *,
    predictions: int = 1,
    target_plane: tuple[int, int] | None = None,
    dtypes: str = "f32/f32",
    layouts: str = "contiguous/contiguous",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """(input, target) without negative values, whose Gram matrices differ clearly in every entry.

    An entry of G - G' near zero has a sign that rounding decides. With channels louder than the target's by
    2^0.3 or softer by 2^-0.7, products are so by 2^0.6, 2^-0.4 or 2^-1.4.
    """
    n, c, h, w = size
    rng = generator(seed)
    loudness = torch.rand(1, c, 1, 1, generator=rng)
    louder = torch.rand(predictions * n, c, 1, 1, generator=rng) < 0.5
    x = torch.randn(predictions * n, c, h, w, generator=rng).abs()
    x = x * torch.exp2(loudness + torch.where(louder, 0.3, -0.7))
    y = torch.randn(n, c, *(target_plane or (h, w)), generator=rng).abs() * torch.exp2(loudness)
    pair = (t.to(DTYPES[dtype]) for t, dtype in zip((x, y), dtypes.split("/"), strict=True))
    return tuple(laid_out(t, layout) for t, layout in zip(pair, layouts.split("/"), strict=True))  # type: ignore[return-value]


def distance_pair(
    size: tuple[int, int, int, int],
    *,
    predictions: int = 1,
    dtypes: str = "f32/f32",
    layouts: str = "contiguous/contiguous",
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """(input, target): a quarter of the elements equal, in values that every dtype holds."""
    rng = generator(seed)
    target = torch.randn(size, generator=rng).bfloat16().float()
    repeated = target.repeat(predictions, 1, 1, 1)
    difference = 0.5 * torch.randn(repeated.shape, generator=rng)
    equal = torch.rand(repeated.shape, generator=rng) < 0.25
    x = torch.where(equal, repeated, (repeated + difference).bfloat16().float())
    pair = (t.to(DTYPES[dtype]) for t, dtype in zip((x, target), dtypes.split("/"), strict=True))
    return tuple(laid_out(t, layout) for t, layout in zip(pair, layouts.split("/"), strict=True))  # type: ignore[return-value]


# Batch and channels of a mask, for N samples of C channels and k predictions.
MASKS = {
    "none": None,
    "one": ("11hw", 1),
    "plane": ("hw", 1),
    "shared": ("n1hw", 1),
    "channels": ("nchw", 1),
    "each": ("n1hw", "k"),
    "each-channels": ("nchw", "k"),
    "row": ("n1h1", 1),
}


def layer_mask(
    kind: str, size: tuple[int, int, int, int], predictions: int, dtype: str = "f32", **options: Any
) -> Tensor | None:
    if MASKS[kind] is None:
        return None
    shape, batches = MASKS[kind]
    n = size[0] * (predictions if batches == "k" else 1)
    return make_mask(shape, (n, *size[1:]), dtype, **options)


# ---- gram_matrix -------------------------------------------------------------------------------------------------


def gram_factor(normalize: str, c: int, pixels: int) -> float:
    return {"chw": 1 / max(c * pixels, 1), "hw": 1 / max(pixels, 1), "none": 1.0, "gatys": 1.0}[normalize]


def gram_formula(x: Tensor, normalize: str) -> Tensor:
    c, h, w = x.shape[1:]
    return torch.einsum("nchw,ndhw->ncd", x, x) * gram_factor(normalize, c, h * w)


def gram_sizes(x: Tensor, upstream: Tensor, *, normalize: str) -> tuple[list[Tensor], dict[int, Tensor]]:
    c, h, w = x.shape[1:]
    both = upstream.abs() + upstream.abs().mT
    gradient = torch.einsum("ncd,ndhw->nchw", both, x.abs()) * gram_factor(normalize, c, h * w)
    return [gram_formula(x.abs(), normalize)], {0: gradient}


def gram_call(backend: Backend | None, normalize: str) -> Call:
    return partial(gram_matrix, normalize=normalize, backend=backend and backend.name)


# ---- style_loss --------------------------------------------------------------------------------------------------


def _style_layers(flat: Sequence[Tensor], settings: dict[str, Any]) -> list[tuple[Any, ...]]:
    """(x, y, G(x), G(y) for every sample of x, factor of the summed penalties) of every layer."""
    normalize = settings["normalize"]
    count = len(flat) // 2
    layers = []
    for x, y, weight in zip(flat[:count], flat[count:], settings["weights"] or [1.0] * count, strict=True):
        n, c, h, w = x.shape
        target = y if settings["target_is_gram"] else gram_formula(y, normalize)
        repeated = target.to(x.dtype).repeat(n // max(y.shape[0], 1), 1, 1)
        if normalize == "gatys":
            factor = weight / max(4 * c**2 * (h * w) ** 2 * n, 1)
        else:
            factor = weight / max(n * c * c, 1)
        layers.append((x, y, gram_formula(x, normalize), repeated, factor))
    return layers


def style_formula(*flat: Tensor, **settings: Any) -> Tensor:
    total = flat[0].new_zeros(())
    for _, _, gram, target, factor in _style_layers(flat, settings):
        d = gram - target
        total = total + factor * (d.abs() if settings["penalty"] == "l1" else d.square()).sum()
    return total


def _by_maps(slope: Tensor, maps: Tensor, normalize: str) -> Tensor:
    """The largest gradient by the maps that a gradient of this size by their Gram matrices makes."""
    c, h, w = maps.shape[1:]
    factor = 2 * gram_factor(normalize, c, h * w)
    return factor * torch.einsum("ncd,ndhw->nchw", slope, maps.abs())


def style_sizes(*flat: Tensor, **settings: Any) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Entries of G - G' are wrong by roundings of G and G', independently: over a layer they add as squares."""
    *flat, upstream = flat
    l1, count = settings["penalty"] == "l1", len(flat) // 2
    absolute = settings | {"weights": [abs(w) for w in settings["weights"] or [1.0] * count]}
    value, gradients = style_formula(*flat, **absolute), {}
    loud = _style_layers([t.abs() for t in flat], settings)
    for i, (x, y, gram, target, factor) in enumerate(_style_layers(flat, settings)):
        d, terms = gram - target, loud[i][2] + loud[i][3]
        wrong = terms if l1 else 2 * d.abs() * terms
        value = value + abs(factor) * wrong.norm()
        slope = abs(factor) * upstream.abs() * ((d != 0).double() if l1 else 2 * terms)
        shared = slope.unflatten(0, (-1, y.shape[0])).sum(0) if y.shape[0] else slope
        gradients[i] = _by_maps(slope, x, settings["normalize"])
        gradients[count + i] = (
            shared if settings["target_is_gram"] else _by_maps(shared, y, settings["normalize"])
        )
    return [value], gradients


def style_settings(style: str, weights: Sequence[float] | None = None, target_is_gram: bool = False) -> Any:
    normalize, penalty = STYLES[style]
    return {"normalize": normalize, "penalty": penalty, "weights": weights, "target_is_gram": target_is_gram}


def grams(pairs: Sequence[tuple[Tensor, Tensor]], style: str) -> list[Tensor]:
    """(*inputs, *Gram matrices of the targets)."""
    normalize = STYLES[style][0]
    return [x for x, _ in pairs] + [gram_formula(y.double(), normalize).to(y.dtype) for _, y in pairs]


def style_call(backend: Backend | None, settings: dict[str, Any]) -> Call:
    def call(*flat: Tensor) -> Tensor:
        count = len(flat) // 2
        name = backend and backend.name
        return style_loss(list(flat[:count]), list(flat[count:]), **settings, backend=name)

    return call


def check_style(
    backend: Backend | None,
    flat: Sequence[Tensor],
    settings: dict[str, Any],
    wanted: Sequence[int] | None = None,
) -> None:
    check(
        style_call(backend, settings),
        partial(style_formula, **settings),
        flat,
        wanted=range(len(flat)) if wanted is None else wanted,
        sizes=partial(style_sizes, **settings),
    )


# ---- feature_distance --------------------------------------------------------------------------------------------


def layers_by_prediction(flat: Sequence[Tensor], layers: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(input, target, mask) of every layer, all of the input's shape."""
    triples = []
    for i in range(layers):
        x, y = flat[i], flat[layers + i]
        predictions = x.shape[0] // max(y.shape[0], 1)
        weight = flat[2 * layers + i] if len(flat) > 2 * layers else torch.ones_like(x)
        if weight.dim() == 4 and weight.shape[0] == y.shape[0]:
            weight = weight.expand(-1, -1, *x.shape[2:]).repeat(predictions, 1, 1, 1)
        triples.append((x, y.repeat(predictions, 1, 1, 1), weight.expand(x.shape)))
    return triples


def distance_formula(*flat: Tensor, layers: int, select: bool = True, **settings: Any) -> Tensor:
    total = flat[0].new_zeros(())
    weights = settings["weights"] or [1.0] * layers
    for (x, y, weight), factor in zip(layers_by_prediction(flat, layers), weights, strict=True):
        values = weighted(x, y, weight, settings["penalty"], select)
        count = weight.sum() if settings["normalize"] == "mask" else x.new_tensor(x.numel())
        total = total + factor * ratio(values.sum(), count)
    return total / layers if settings["layer_reduction"] == "mean" else total


def distance_sizes(*flat: Tensor, layers: int, **settings: Any) -> tuple[list[Tensor], dict[int, Tensor]]:
    """The gradient to a target is a sum over the predictions, of both signs."""
    *flat, upstream = flat
    absolute = settings | {"weights": [abs(w) for w in settings["weights"] or [1.0] * layers]}
    value = distance_formula(*flat, layers=layers, **absolute)
    leaves = [t.detach().requires_grad_(i < layers) for i, t in enumerate(flat)]
    with torch.enable_grad():
        loss = distance_formula(*leaves, layers=layers, **settings)
    gradients = {}
    for i, g in enumerate(torch.autograd.grad(loss, leaves[:layers], upstream)):
        n = flat[layers + i].shape[0]
        gradients[i] = g.abs()
        gradients[layers + i] = g.abs().unflatten(0, (-1, n)).sum(0) if n else g
    return [value], gradients


def distance_settings(penalty: str = "l1", **settings: Any) -> dict[str, Any]:
    defaults = {"weights": None, "normalize": "mask", "layer_reduction": "sum"}
    return {"penalty": penalty, **defaults, **settings}


def distance_call(backend: Backend | None, layers: int, settings: dict[str, Any]) -> Call:
    def call(*flat: Tensor) -> Tensor:
        return feature_distance(
            list(flat[:layers]),
            list(flat[layers : 2 * layers]),
            mask=list(flat[2 * layers :]) or None,
            eps=PARAMS["charbonnier"],
            **settings,
            backend=backend and backend.name,
        )

    return call


def check_distance(
    backend: Backend | None,
    flat: Sequence[Tensor],
    layers: int,
    settings: dict[str, Any],
    wanted: Sequence[int] | None = None,
) -> None:
    check(
        distance_call(backend, layers, settings),
        partial(distance_formula, layers=layers, **settings),
        flat,
        wanted=range(2 * layers) if wanted is None else wanted,
        sizes=partial(distance_sizes, layers=layers, **settings),
        masks=len(flat) - 2 * layers,
    )
