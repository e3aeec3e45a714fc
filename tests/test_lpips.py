"""lpips_distance: what it alone does; the rest is asked of every op alike."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import torch
from feature_cases import MASKS as ALL_MASKS
from feature_cases import check, distance_pair, feature_map, layer_mask
from harness import LAYOUTS, Backend, evaluate, generator, gradient_of, grid, laid_out
from hypothesis import given
from hypothesis import strategies as st
from lpips_cases import check_lpips, heads, lpips_call, lpips_formula, lpips_sizes
from pixel_cases import MASK_DTYPES, on_device, skip_unsupported, with_specials
from torch import Tensor
from training_checks import ops_called

from inpaint_kernels.ops.lpips import lpips_distance

SIZE = (2, 5, 9, 14)
LAYERS = ((2, 3, 12, 10), (2, 17, 6, 5), (2, 8, 3, 3))
MASKS = [name for name in ALL_MASKS if "channels" not in name]
FORMATS = ("contiguous", "channels_last")
Pair = tuple[Tensor, Tensor]


def run(
    backend: Backend | None,
    pairs: Sequence[Pair],
    masks: Sequence[Tensor | None] = (),
    reduction: str = "none",
    wanted: Sequence[int] | None = None,
) -> None:
    flat = [x for x, _ in pairs] + [y for _, y in pairs] + [m for m in masks if m is not None]
    if backend is not None:
        skip_unsupported(backend, *flat[: 2 * len(pairs)])
        flat = on_device(backend, *flat)
    check_lpips(backend, flat, len(pairs), reduction, wanted)


@grid(mask=MASKS, predictions=(1, 3), layout=FORMATS, reduction=("mean", "sum", "none"))
def test_settings(backend: Backend, mask: str, predictions: int, layout: str, reduction: str) -> None:
    pairs = [
        distance_pair(size, predictions=predictions, layouts=f"{layout}/{layout}", seed=i)
        for i, size in enumerate(LAYERS)
    ]
    masks = [layer_mask(mask, size, predictions, seed=i) for i, size in enumerate(LAYERS)]
    run(backend, pairs, masks, reduction)


@grid(dtype=("f32", "bf16"), layout=FORMATS)
def test_one_layer_in_float64(backend: Backend, dtype: str, layout: str) -> None:
    """Makes the whole op float64."""
    layouts = f"{layout}/{layout}"
    run(backend, [distance_pair(SIZE, dtypes=d, layouts=layouts) for d in (f"{dtype}/{dtype}", "f64/f64")])


def test_many_layers_of_many_kinds(backend: Backend) -> None:
    """Every layer with a dtype, a layout and a mask of its own."""
    kinds = [
        ((2, 3, 16, 16), "f32/f32", "contiguous/contiguous", "each"),
        ((2, 8, 8, 8), "bf16/f32", "channels_last/contiguous", "shared"),
        ((2, 16, 7, 5), "f16/bf16", "transposed/channels_last", "plane"),
        ((2, 1, 1, 1), "f32/f16", "contiguous/contiguous", "one"),
        ((2, 33, 2, 2), "bf16/bf16", "channels_last/channels_last", "shared"),
        ((2, 4, 31, 3), "f16/f16", "batch_inside/padded", "row"),
    ]
    pairs = [
        distance_pair(size, predictions=2, dtypes=dtypes, layouts=layouts, seed=i)
        for i, (size, dtypes, layouts, _) in enumerate(kinds)
    ]
    run(backend, pairs, [layer_mask(mask, size, 2, seed=i) for i, (size, _, _, mask) in enumerate(kinds)])


@grid(
    size=((1, 512, 5, 7), (2, 2048, 3, 3), (1, 64, 40, 41), (1, 130, 23, 29), (3, 6, 1, 1)),
    layout=FORMATS,
    dtypes=("f32/f32", "bf16/bf16", "f32/f16"),
    predictions=(1, 2),
)
def test_channels_and_blocks(
    backend: Backend, size: tuple[int, int, int, int], layout: str, dtypes: str, predictions: int
) -> None:
    """Many channels, groups of four with a rest, planes of several blocks with an odd last one."""
    run(backend, [distance_pair(size, predictions=predictions, dtypes=dtypes, layouts=f"{layout}/{layout}")])


@grid(layout=FORMATS, wanted=((0,), (1,), (0, 1)), mask=("none", "shared"))
def test_gradients_beyond_the_cache(kernel: Backend, layout: str, wanted: tuple[int, ...], mask: str) -> None:
    """Those written around it, of planes that start at any address, are the ones of a part of the batch."""
    size = (3, 9, 401, 401) if kernel.name == "cpu" else SIZE
    x, y = (feature_map(size, layout=layout, seed=i) for i in range(2))
    masks = [m for m in [layer_mask(mask, size, 1)] if m is not None]
    call = lpips_call(kernel, 1)
    values, gradients, upstream = evaluate(call, on_device(kernel, x, y, *masks), wanted)
    for n in range(size[0]):
        part = on_device(kernel, *(t[n : n + 1] for t in (x, y, *masks)))
        again = evaluate(call, part, wanted, [upstream[0][n : n + 1]])
        assert torch.equal(again[0][0], values[0][n : n + 1])
        for got, want in zip(gradients, again[1], strict=True):
            assert torch.equal(got[n : n + 1], want)


@grid(
    side=("input", "target", "both"), layout=FORMATS, dtypes=("f32/f32", "f16/bf16"), mask=("none", "shared")
)
def test_zero_vectors(backend: Backend, side: str, layout: str, dtypes: str, mask: str) -> None:
    """They stay zero and have gradient 0, where the formula of the lpips package divides 0 by 1e-10."""
    x, y = distance_pair(SIZE, predictions=2, dtypes=dtypes)
    places = torch.rand((2, 1, *SIZE[2:]), generator=generator(5)) < 0.3
    zero = [places.repeat(2, 1, 1, 1) & (side != "target"), places & (side != "input")]
    x, y = (laid_out(t.masked_fill(z, 0.0), layout) for t, z in zip((x, y), zero, strict=True))
    masks = [m for m in [layer_mask(mask, SIZE, 2)] if m is not None]
    run(backend, [(x, y)], masks)
    found = evaluate(lpips_call(backend, 1), on_device(backend, x, y, *masks), (0, 1))
    for gradient, z in zip(found[1], zero, strict=True):
        assert not gradient.cpu()[z.expand(gradient.shape)].any()


@grid(dtype=("f32", "f16", "bf16", "f64"), layout=LAYOUTS, size=(SIZE, (1, 64, 40, 41), (2, 48, 3, 1)))
def test_equal_features_give_exactly_0(
    backend: Backend, dtype: str, layout: str, size: tuple[int, int, int, int]
) -> None:
    y = feature_map(size, dtype, layout)
    skip_unsupported(backend, y)
    if backend.name == "reference" and layout not in FORMATS:
        pytest.skip("adds up the channels of each map in the order of its memory")
    x = laid_out(torch.cat([y, y]), layout)
    values, gradients, _ = evaluate(lpips_call(backend, 1), on_device(backend, x, y), (0, 1))
    assert not any(t.any() for t in (*values, *gradients))


@grid(scale=(1.0, 3.0, 2.0**-7), noise=(0.0, 1e-3, 0.1), channels=(1, 5, 300), layout=FORMATS)
def test_near_directions(backend: Backend, scale: float, noise: float, channels: int, layout: str) -> None:
    """Sums of products would cancel there: unit vectors are subtracted, or what their difference is made of."""
    y, other = (feature_map((2, channels, 9, 11), layout=layout, seed=i) for i in range(2))
    x = scale * (y + noise * other)
    x[:, :, 4:] = other[:, :, 4:]  # beside others in one vector of pixels
    (values,), _, _ = evaluate(lpips_call(backend, 1), on_device(backend, x[:, :, :4], y[:, :, :4]), (0, 1))
    (mixed,), _, _ = evaluate(lpips_call(backend, 1), on_device(backend, x, y), (0, 1))
    for got, size in ((values, 4), (mixed, 9)):
        want = lpips_formula(x[:, :, :size].double(), y[:, :, :size].double(), layers=1, reduction="none")
        assert bool((got >= 0).all())
        torch.testing.assert_close(got.cpu().double(), want, rtol=2e-5, atol=1e-13)


def test_size_of_the_vectors_does_not_count(backend: Backend) -> None:
    """A power of two is exact everywhere but beside eps."""
    x, y = on_device(backend, *distance_pair(SIZE))
    call = lpips_call(backend, 1)
    torch.testing.assert_close(call(2**10 * x, y / 2**10), call(x, y), rtol=1e-6, atol=0)


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("scale", [2.0**-43, 2.0**50])
def test_short_and_long_vectors(backend: Backend, scale: float, layout: str) -> None:
    """With eps as much larger the value is the same and the gradient so much smaller: nothing on the way to it may
    leave float32, such as the cube of a norm."""
    pair = on_device(backend, *distance_pair(SIZE, predictions=2, layouts=f"{layout}/{layout}"))
    weights = heads(SIZE[1], backend.device)
    plain, scaled = (
        evaluate(
            lambda x, y, by=by: lpips_distance(
                x, y, weights, eps=1e-5 * by, reduction="none", backend=backend.name
            ),
            [by * t for t in pair],
            (0, 1),
        )
        for by in (1.0, scale)
    )
    torch.testing.assert_close(scaled[0], plain[0], rtol=1e-6, atol=0)
    for got, want in zip(scaled[1], plain[1], strict=True):
        torch.testing.assert_close(scale * got, want, rtol=1e-5, atol=1e-6 * float(want.abs().max()))


@grid(
    mask=("shared", "plane", "each"),
    mask_layout=LAYOUTS,
    mask_dtype=MASK_DTYPES,
    layout=FORMATS,
    dtype=("f32", "f16", "f64"),
)
def test_memory_of_masks(
    backend: Backend, mask: str, mask_layout: str, mask_dtype: str, layout: str, dtype: str
) -> None:
    options = {"dtypes": f"{dtype}/{dtype}", "layouts": f"{layout}/{layout}"}
    weights = laid_out(layer_mask(mask, SIZE, 2, mask_dtype), mask_layout)
    run(backend, [distance_pair(SIZE, predictions=2, **options)], [weights])


@grid(values=("zeros", "ones", "binary"), mask=("shared", "each"), layout=FORMATS)
def test_whole_and_empty_masks(backend: Backend, values: str, mask: str, layout: str) -> None:
    """Of one layer beside another, and of one sample alone."""
    pairs = [
        distance_pair(size, predictions=2, layouts=f"{layout}/{layout}", seed=i)
        for i, size in enumerate(LAYERS[:2])
    ]
    masks = [layer_mask(mask, LAYERS[0], 2, values=values), layer_mask(mask, LAYERS[1], 2)]
    run(backend, pairs, masks)
    if values == "zeros":
        found = evaluate(lpips_call(backend, 1), on_device(backend, *pairs[0], masks[0]), (0, 1))
        assert not any(t.any() for t in (*found[0], *found[1]))
    masks[0][0] = values != "ones"
    run(backend, pairs, masks)


@grid(mask=("shared", "plane", "each"), mask_dtype=("f32", "bool", "u8"), layout=FORMATS)
def test_specials_outside_the_mask(backend: Backend, mask: str, mask_dtype: str, layout: str) -> None:
    """What lies where the mask is 0 changes no bit of the values or of a gradient, and no second derivative."""
    x, y = (laid_out(t, layout) for t in distance_pair(SIZE, predictions=2))
    weights = layer_mask(mask, SIZE, 2, mask_dtype)
    full = weights.repeat(2, 1, 1, 1) if mask == "shared" else weights
    per_target = (full.expand(4, 1, *SIZE[2:]) == 0).unflatten(0, (2, 2)).all(0)
    call = lpips_call(backend, 1)
    clean = evaluate(call, on_device(backend, x, y, weights), (0, 1))
    for dirty in (
        (with_specials(x, full == 0), y),
        (x, with_specials(y, per_target)),
        (with_specials(x, full == 0), with_specials(y, per_target)),
    ):
        dirty = on_device(backend, *(laid_out(t, layout) for t in dirty), weights)
        result = evaluate(call, dirty, (0, 1), clean[2])
        for got, want in zip((*result[0], *result[1]), (*clean[0], *clean[1]), strict=True):
            assert torch.equal(got, want)
            assert got.isfinite().all()
        leaves = [t.clone().requires_grad_() for t in dirty[:2]]
        again = torch.autograd.grad(call(*leaves, dirty[2]), leaves, clean[2], create_graph=True)
        second = torch.autograd.grad([g.sum() for g in again], leaves)
        assert all(t.isfinite().all() for t in (*again, *second))


@grid(special=("nan", "inf"), mask=("none", "shared"), layout=FORMATS)
def test_counted_specials_propagate(backend: Backend, special: str, mask: str, layout: str) -> None:
    """Into their sample's value and their pixel's gradients, no further."""
    x, y = (laid_out(t, layout) for t in distance_pair(SIZE, predictions=2))
    masks = [m for m in [layer_mask(mask, SIZE, 2, values="ones")] if m is not None]
    call = lpips_call(backend, 1)
    clean = evaluate(call, on_device(backend, x, y, *masks), (0, 1))
    x[3, 2, 4, 5] = float(special)
    (values,), gradients, _ = evaluate(call, on_device(backend, x, y, *masks), (0, 1), clean[2])
    assert values[3].isnan()
    assert torch.equal(values[:3], clean[0][0][:3])
    for got, want, sample in zip(gradients, clean[1], (3, 1), strict=True):
        assert not got[sample, 2, 4, 5].isfinite()
        got[sample, :, 4, 5] = want[sample, :, 4, 5]
        assert torch.equal(got, want)


@grid(predictions=(2, 3), layout=FORMATS)
def test_predictions_are_those_of_a_repeated_target(backend: Backend, predictions: int, layout: str) -> None:
    x, y = on_device(backend, *distance_pair(SIZE, predictions=predictions, layouts=f"{layout}/{layout}"))
    call = lpips_call(backend, 1)
    repeated = laid_out(y.repeat(predictions, 1, 1, 1), layout)
    (shared,), (gradient,), upstream = evaluate(call, (x, y), (0,))
    (again,), (other,), _ = evaluate(call, (x, repeated), (0,), upstream)
    assert torch.equal(shared, again)
    assert torch.equal(gradient, other)
    torch.testing.assert_close(
        shared, torch.cat([call(part, y) for part in x.split(SIZE[0])]), rtol=1e-6, atol=0
    )


@grid(size=((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (0, 0, 0, 0)), mask=("none", "shared"), layout=FORMATS)
def test_nothing_to_count(backend: Backend, size: tuple[int, int, int, int], mask: str, layout: str) -> None:
    """Alone, and beside a layer that has something."""
    empty = tuple(laid_out(torch.randn(size), layout) for _ in range(2))
    other = (size[0], *SIZE[1:])
    masks = [layer_mask(mask, size, 1), layer_mask(mask, other, 1)]
    for reduction in ("mean", "none"):
        run(backend, [empty], masks[:1], reduction)
        run(backend, [empty, distance_pair(other)], masks, reduction)


@grid(dtypes=("f16/f16", "f16/f32", "bf16/f16"), layout=FORMATS)
def test_extremes_do_not_overflow(backend: Backend, dtypes: str, layout: str) -> None:
    x, y = distance_pair(SIZE, predictions=2, dtypes=dtypes, layouts=f"{layout}/{layout}")
    x[0, 0, 0], y[0, 0, 0] = 65504, -65504
    x[3, :, 3], y[1, :, 2] = 6e-8, -6e-8
    run(backend, [(x, y)])


# ---- derivatives -------------------------------------------------------------------------------------------------


@grid(mask=MASKS, layout=FORMATS, dtypes=("f32/f32", "f64/f64"))
def test_second_derivatives(backend: Backend, mask: str, layout: str, dtypes: str) -> None:
    """By both maps and the upstream gradient, zero vectors among them."""
    pair = distance_pair(SIZE, predictions=2, dtypes=dtypes)
    skip_unsupported(backend, *pair)
    pair[0][:, :, 2, 3] = pair[1][:, :, 4, 5] = 0
    pair = tuple(laid_out(t, layout) for t in pair)
    masks = [m for m in [layer_mask(mask, SIZE, 2)] if m is not None]
    up = torch.rand(4, generator=generator(3), dtype=torch.promote_types(*(t.dtype for t in pair))) + 0.5

    def inner(call: Any) -> Any:
        # (input, target, upstream, *masks): the upstream gradient last is what `gradient_of` expects.
        return lambda x, y, up, *masks: gradient_of(lambda a, b: call(a, b, *masks))(x, y, up)

    def sizes(x: Tensor, y: Tensor, up: Tensor, *rest: Tensor) -> tuple[list[Tensor], dict[int, Tensor]]:
        masks, seconds = rest[: len(rest) - 2], rest[len(rest) - 2 :]
        first = lpips_sizes(x, y, *masks, up, layers=1)[1]
        exact = evaluate(inner(formula), [x, y, up, *masks], (0, 1, 2), seconds)[1]
        largest = [g.abs().max().expand(g.shape) for g in exact]
        return [first[0], first[1]], dict(enumerate(largest))

    formula = partial(lpips_formula, layers=1)
    check(
        inner(lpips_call(backend, 1)),
        inner(formula),
        on_device(backend, *pair, up, *masks),
        wanted=(0, 1, 2),
        sizes=sizes,
    )


@pytest.mark.parametrize("mask", ["one", "plane", "shared", "each"])
def test_gradient_to_the_mask(mask: str) -> None:
    """The automatic choice takes the differentiable formula, with the full derivative also at weight 0."""
    pair = distance_pair(SIZE, predictions=2)

    def sizes(*flat: Tensor) -> tuple[list[Tensor], dict[int, Tensor]]:
        values, gradients = lpips_sizes(*flat, layers=1)
        by_mask = evaluate(formula, flat[:3], (2,), flat[3:])[1][0]
        return values, gradients | {2: by_mask.abs().max().expand(by_mask.shape)}

    formula = partial(lpips_formula, layers=1, select=False)
    call = lpips_call(None, 1)
    check(call, formula, [*pair, layer_mask(mask, SIZE, 2)], wanted=(0, 1, 2), sizes=sizes)


def test_gradient_to_the_weights() -> None:
    x, y = distance_pair(SIZE, predictions=2)
    weights = heads(SIZE[1]).requires_grad_()
    (found,) = torch.autograd.grad(lpips_distance(x, y, weights, reduction="sum"), weights)
    one = torch.eye(SIZE[1])
    want = torch.stack([lpips_distance(x, y, one[c], reduction="sum") for c in range(SIZE[1])])
    torch.testing.assert_close(found, want, rtol=1e-5, atol=0)
    with pytest.raises(RuntimeError, match=r"weights\.detach"):
        lpips_distance(x, y, weights, backend="cpu")


# ---- arguments ---------------------------------------------------------------------------------------------------


def ones(*size: int, **options: Any) -> Tensor:
    return torch.ones(size or (4, 3, 8, 8), **options)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input-none": ({"input": None}, TypeError, "input.*NoneType"),
    "input-empty": ({"input": [], "target": []}, TypeError, "input.*non-empty"),
    "input-dtype": ({"input": ones().long()}, TypeError, r"input\[0\].*int64"),
    "input-3d": ({"input": ones(3, 8, 8)}, ValueError, r"input\[0\].*\(3, 8, 8\)"),
    "input-batches": (
        {"input": [ones(), ones(2, 3, 8, 8)], "target": [ones(2, 3, 8, 8)] * 2, "weights": [ones(3)] * 2},
        ValueError,
        r"input\[1\] has a batch of 2, input\[0\] of 4",
    ),
    "target-layers": ({"target": [ones()] * 2}, ValueError, "target has 2 layers, input has 1"),
    "target-size": ({"target": ones(4, 3, 8, 9)}, ValueError, r"target\[0\].*\(4, 3, 8, 9\).*\(4, 3, 8, 8\)"),
    "target-batch": ({"target": ones(3, 3, 8, 8)}, ValueError, r"input\[0\].*4.*target\[0\].*3.*multiple"),
    "input-batch-0": ({"input": ones(0, 3, 8, 8)}, ValueError, r"input\[0\].*0.*target\[0\].*4.*1 or more"),
    "target-device": ({"target": ones(4, 3, 8, 8, device="meta")}, ValueError, "cpu.*meta"),
    "weights-none": ({"weights": None}, TypeError, "weights.*NoneType"),
    "weights-numbers": ({"weights": [1.0]}, TypeError, r"weights\[0\] must be a Tensor, got float"),
    "weights-layers": ({"weights": [ones(3)] * 2}, ValueError, "weights has 2 layers, input has 1"),
    "weights-length": ({"weights": ones(4)}, ValueError, r"weights\[0\] has shape \(4,\).*3 channels"),
    "weights-4d": ({"weights": ones(1, 3, 1, 1)}, ValueError, r"weights\[0\] has shape \(1, 3, 1, 1\)"),
    "weights-dtype": ({"weights": ones(3).int()}, TypeError, r"weights\[0\].*int32"),
    "weights-negative": ({"weights": -ones(3)}, ValueError, r"weights\[0\] must not be negative, got -1"),
    "weights-nan": ({"weights": ones(3) * float("nan")}, ValueError, r"weights\[0\].*nan"),
    "weights-device": ({"weights": ones(3, device="meta")}, ValueError, r"weights\[0\] is on meta.*cpu"),
    "mask-layers": ({"mask": [ones(8, 8)] * 2}, ValueError, "mask has 2 layers, input has 1"),
    "mask-nhw": ({"mask": ones(4, 8, 8)}, ValueError, r"mask.*\(4, 8, 8\).*\(N, 1, H, W\)"),
    "mask-batch": ({"mask": ones(3, 1, 8, 8)}, ValueError, r"mask.*\(3, 1, 8, 8\)"),
    "mask-channels": ({"mask": ones()}, ValueError, r"mask.*\(4, 3, 8, 8\).*\(N, 1, H, W\)"),
    "mask-complex": ({"mask": ones(8, 8).cfloat()}, TypeError, "mask.*complex64"),
    "mask-device": ({"mask": ones(8, 8, device="meta")}, ValueError, "mask.*meta.*cpu"),
    "reduction": ({"reduction": "batch"}, ValueError, "reduction.*'batch'.*'mean', 'sum', 'none'"),
    "eps": ({"eps": 0.0}, ValueError, "eps.*0.0"),
    "backend": ({"backend": "cuda"}, RuntimeError, "cuda"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    replaced, error, words = BAD[case]

    def call() -> None:
        with pytest.raises(error, match=words):
            lpips_distance(**({"input": ones(), "target": ones(), "weights": ones(3)} | replaced))

    call()
    # Numbers are not looked at while something watches.
    if case not in ("weights-negative", "weights-nan"):
        assert not [op for op in ops_called(call) if op.startswith("inpaint_kernels")]


def test_good_arguments(backend: Backend) -> None:
    """What the refusals above must not refuse."""
    x = torch.rand(4, 3, 8, 8, device=backend.device)
    one, w = {"backend": backend.name}, ones(3, device=backend.device)
    for found in (
        lpips_distance((x, x), (x, x[:1]), [w.half(), w.double()], mask=[x[:, :1], x[0, 0]], **one),
        lpips_distance(x, x[:2], 0 * w, mask=x[:2, :1, :1, :1], eps=1e-3, **one),
        lpips_distance(x, x[:2], (w,), mask=(x[:, :1] > 0.5).int(), reduction="sum", **one),
    ):
        assert found.dtype == torch.float32
        assert found.isfinite().all()


@given(
    size=st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 12), st.integers(1, 12)),
    predictions=st.integers(1, 3),
    dtypes=st.tuples(*[st.sampled_from(("f16", "bf16", "f32"))] * 2),
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 2),
    mask=st.sampled_from(MASKS),
    mask_dtype=st.sampled_from(list(MASK_DTYPES)),
    reduction=st.sampled_from(("mean", "sum", "none")),
)
def test_any_input(
    backend: Backend,
    size: tuple[int, int, int, int],
    predictions: int,
    dtypes: tuple[str, str],
    layouts: tuple[str, str],
    mask: str,
    mask_dtype: str,
    reduction: str,
) -> None:
    pair = distance_pair(
        size, predictions=predictions, dtypes="/".join(dtypes), layouts="/".join(layouts), seed=sum(size)
    )
    run(backend, [pair], [layer_mask(mask, size, predictions, mask_dtype)], reduction)
