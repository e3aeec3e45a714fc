"""partial_conv2d and partial_conv3d: holes, empty windows, gradients asked for, any geometry."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from harness import DTYPES, LAYOUTS, Backend, evaluate, generator, grid, laid_out, same_bits
from hypothesis import given
from hypothesis import strategies as st
from partial_conv_cases import (
    ACTIVATIONS,
    CONVOLUTIONS,
    MASKS,
    VOLUME,
    Case,
    check,
    definition,
    exact_convolutions,  # noqa: F401
    make_mask,
    make_tensors,
    output_of,
    run,
    window_sums,
)
from pixel_cases import MASK_DTYPES, on_device, skip_unsupported, with_specials

from inpaint_kernels.ops import _checks
from inpaint_kernels.ops._partial_conv import window
from inpaint_kernels.reference import partial_conv as reference

# ---- what makes a partial convolution ----------------------------------------------------------------------------


@grid(
    mask=("n1", "plane", "nc"),
    mask_dtype=("f32", "bool"),
    dtype=("f32", "f16", "bf16"),
    layout=("contiguous", "channels_last"),
    form=("usual", "scale-bias"),
)
def test_what_lies_under_holes_changes_nothing(
    backend: Backend, mask: str, mask_dtype: str, dtype: str, layout: str, form: str
) -> None:
    """Not even NaN and Inf: the same bits, forward and backward."""
    case = Case(options={"activation": "relu", "scale_bias": form == "scale-bias"})
    x, w, b, known = make_tensors(
        case, dtype, mask=make_mask(mask, case.size, mask_dtype), layouts=f"{layout}/contiguous"
    )
    dirty = laid_out(with_specials(x, known == 0), layout)
    results = []
    for values in (x, dirty):
        tensors = on_device(backend, values, w, b, known)
        outputs, gradients, _ = evaluate(output_of(backend, case, tensors[3]), tensors[:3], (0, 1, 2))
        results.append((*outputs, *gradients))
    for clean, got in zip(*results, strict=True):
        assert bool(got.isfinite().all())
        assert same_bits(clean, got)


@grid(special=("nan", "inf"), mask=("none", "n1"), activation=("none", "relu", "leaky"))
def test_known_specials_propagate(backend: Backend, special: str, mask: str, activation: str) -> None:
    """To the windows that see them, as far as ReLU lets them, and to no other."""
    case = Case(size=(1, 2, 9, 9), options=ACTIVATIONS[activation])
    x, w, b, known = make_tensors(case, mask=make_mask(mask, case.size, values="ones"))
    x[0, 1, 4, 4] = float(special)
    w = w.abs()
    output = run(backend, case, on_device(backend, x, w, b, known)).output.cpu()
    seen = torch.zeros(output.shape, dtype=torch.bool)
    seen[:, :, 3:6, 3:6] = True
    assert torch.equal(~output.isfinite(), seen)


@grid(
    dtype=("f16", "bf16", "f32"),
    bias=(None, "f32"),
    mask=("n1", "nc"),
    scale_bias=(False, True),
    update=("clamp", "binary", "proportional"),
)
def test_all_hole(
    backend: Backend, dtype: str, bias: str | None, mask: str, scale_bias: bool, update: str
) -> None:
    """Exactly 0, with a bias too, and no gradient to anything; also where the gradient sent back is NaN."""
    options = {"scale_bias": scale_bias, "mask_update": update, "activation": "leaky_relu"}
    case = Case(options=options)
    known = make_mask(mask, case.size, values="zeros")
    tensors = on_device(backend, *make_tensors(case, dtype, mask=known, bias=bias))
    found = run(backend, case, tensors)
    assert not found.output.any() and not found.new_mask.any()
    wanted = [i for i in range(3) if tensors[i] is not None]
    _, gradients, _ = evaluate(output_of(backend, case, tensors[3]), tensors[:3], wanted)
    assert not any(g.any() for g in gradients)


@grid(dtype=("f16", "f32"), activation=ACTIVATIONS, scale_bias=(False, True), special=("nan", "inf"))
def test_what_is_sent_back_into_empty_windows_is_ignored(
    kernel: Backend, dtype: str, activation: str, scale_bias: bool, special: str
) -> None:
    """As what lies under the holes: a loss that is not finite there spoils no gradient."""
    case = Case(options={"scale_bias": scale_bias, **ACTIVATIONS[activation]})
    tensors = on_device(kernel, *make_tensors(case, dtype))
    call = output_of(kernel, case, tensors[3])
    empty = run(kernel, case, tensors).new_mask == 0
    assert empty.any()
    _, clean, (upstream,) = evaluate(call, tensors[:3], (0, 1, 2))
    dirty = upstream.masked_fill(empty, float(special))
    for got, want in zip(evaluate(call, tensors[:3], (0, 1, 2), [dirty])[1], clean, strict=True):
        assert same_bits(got, want)


@grid(dtype=("f16", "bf16", "f32"), mask=("n1", "nc"), mask_input=(False, True))
def test_empty_windows(backend: Backend, dtype: str, mask: str, mask_input: bool) -> None:
    """Exactly 0 next to windows that are not, whatever lies in them."""
    case = Case(options={"mask_input": mask_input})
    x, w, b, known = make_tensors(case, dtype, mask=make_mask(mask, case.size, values="binary"))
    known[..., 5:] = 0
    sums, _ = window_sums(case, known, mask == "nc")
    empty = (sums == 0).expand(-1, case.outputs, -1, -1)
    # No window that is not empty reaches these pixels.
    reached = F.conv_transpose2d((sums != 0).double(), torch.ones(1, 1, 3, 3, dtype=torch.double), padding=1)
    x = with_specials(x, reached == 0)
    assert not x.isfinite().all()
    found = run(backend, case, on_device(backend, x, w, b, known))
    output, new_mask = found.output.cpu(), found.new_mask.cpu()
    assert empty.any() and not empty.all()
    assert not output[empty].any() and not new_mask.expand(empty.shape)[empty].any()
    assert bool(output[~empty].all()) and bool((new_mask.expand(empty.shape)[~empty] == 1).all())


@grid(dtype=("f16", "bf16", "f32"), mask=("none", "n1", "nc"), padding=(0, 1))
def test_all_known_inside_is_a_convolution(backend: Backend, dtype: str, mask: str, padding: int) -> None:
    """To the bit where the library gets the same operands; padding counts as unknown."""
    case = Case(padding=padding)
    known = make_mask(mask, case.size, values="ones")
    tensors = on_device(backend, *make_tensors(case, dtype, mask=known, bias=None))
    found = run(backend, case, tensors)
    plain = F.conv2d(tensors[0], tensors[1], None, padding=padding)
    inside = (slice(None), slice(None), *[slice(padding, n - padding) for n in plain.shape[2:]])
    eps = torch.finfo(DTYPES[dtype]).eps
    size = F.conv2d(tensors[0].abs().float(), tensors[1].abs().float(), None, padding=padding)
    error = (found.output.float() - plain.float()).abs()
    assert bool(
        (error <= eps * plain.float().abs() + 8 * torch.finfo(torch.float32).eps * size)[inside].all()
    )
    assert bool((found.new_mask == 1).all())
    if padding:
        corner = found.output[..., 0, 0].float() / plain[..., 0, 0].float()
        torch.testing.assert_close(corner, torch.full_like(corner, 9 / 4), rtol=4 * eps, atol=0)


@grid(dtype=("f16", "bf16", "f32"), known=(2047, 2049, 2051, 2699, 257, 1, 0))
def test_large_sums_are_exact(backend: Backend, dtype: str, known: int) -> None:
    """float16 counts to 2048, bfloat16 to 256; a window of 300 channels holds 2700."""
    case = Case(size=(1, 300, 3, 3), outputs=1, padding=0)
    mask = torch.zeros(2700)
    mask[torch.randperm(2700, generator=generator(known))[:known]] = 1
    mask = mask.view(case.size)
    x, w = torch.ones(case.size), torch.full((1, 300, 3, 3), 2.0**-12)
    tensors = on_device(backend, x.to(DTYPES[dtype]), w.to(DTYPES[dtype]), None, mask.to(DTYPES[dtype]))
    shares = run(
        backend, Case(**{**case.__dict__, "options": {"mask_update": "proportional"}}), tensors
    ).new_mask
    assert round(float(shares) * 2700) == known
    output = run(backend, case, tensors).output
    # Every known pixel alike: the output is that of a whole window, or nothing.
    want = torch.tensor([[[[2700 * 2.0**-12 if known else 0.0]]]])
    torch.testing.assert_close(output.float().cpu(), want, rtol=2 * torch.finfo(DTYPES[dtype]).eps, atol=0)


@grid(update=("binary", "proportional"), dtype=("f32", "f64"), tiny=(1e-42, 1e-30, 1e-4))
def test_faint_masks_stay_finite(backend: Backend, update: str, dtype: str, tiny: float) -> None:
    """However little of a window is known, its ratio is finite."""
    case = Case(options={"mask_update": update})
    given = make_tensors(case, dtype, mask=torch.full((2, 1, 9, 11), tiny), bias=None)
    skip_unsupported(backend, given[0])
    tensors = on_device(backend, *given)
    outputs, gradients, _ = evaluate(output_of(backend, case, tensors[3]), tensors[:3], (0, 1))
    assert bool(outputs[0].isfinite().all())
    # A gradient times the largest ratio may be too large for float32.
    assert tiny == 1e-42 or all(bool(g.isfinite().all()) for g in gradients)


# ---- gradients ---------------------------------------------------------------------------------------------------


@grid(
    wanted=((0,), (1,), (2,), (0, 1), (0, 2), (1, 2)),
    mask=("none", "n1", "nc"),
    layout=("contiguous", "channels_last"),
    activation=("none", "relu"),
)
def test_only_the_gradients_asked_for(
    backend: Backend, wanted: tuple[int, ...], mask: str, layout: str, activation: str
) -> None:
    case = Case(options=ACTIVATIONS[activation])
    given = make_tensors(case, mask=mask, layouts=f"{layout}/contiguous")
    check(backend, case, given, wanted=wanted)
    leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(on_device(backend, *given[:3]))]
    run(backend, case, [*leaves, *on_device(backend, given[3])]).output.sum().backward()
    assert [i for i, leaf in enumerate(leaves) if leaf.grad is not None] == list(wanted)


@grid(
    layout=("contiguous", "channels_last", "transposed"),
    weight_layout=("contiguous", "channels_last"),
    dtype=("f32", "f16"),
    mask=("none", "n1"),
    dims=(2, 3),
)
def test_results_have_the_layout_of_the_input(
    backend: Backend, layout: str, weight_layout: str, dtype: str, mask: str, dims: int
) -> None:
    """channels_last stays so, all else becomes contiguous; the output is channels_last if either operand is."""
    case = Case(**(VOLUME if dims == 3 else {}))
    x, w, b, known = on_device(
        backend, *make_tensors(case, dtype, mask=mask, layouts=f"{layout}/{weight_layout}")
    )
    (output,), gradients, _ = evaluate(lambda *t: run(backend, case, [*t, known]).output, (x, w, b), (0, 1))
    last = torch.channels_last if dims == 2 else torch.channels_last_3d
    for got, like in zip(
        (output, *gradients), (f"{layout}{weight_layout}", layout, weight_layout), strict=True
    ):
        if backend.name == "reference":
            assert got.is_contiguous(memory_format=last) or got.is_contiguous()
        else:
            assert got.is_contiguous(memory_format=last if "last" in like else torch.contiguous_format)


# ---- properties --------------------------------------------------------------------------------------------------


@st.composite
def windows(draw: Any) -> dict[str, Any]:
    """Any window that fits, in two or three dimensions."""
    dims = draw(st.sampled_from((2, 2, 3)))
    groups = draw(st.integers(1, 3))
    spatial = [draw(st.integers(1, 12 if dims == 2 else 6)) for _ in range(dims)]
    kernel, stride, padding, dilation = [], [], [], []
    for size in spatial:
        kernel.append(draw(st.integers(1, 5)))
        dilation.append(draw(st.integers(1, 3)))
        reach = dilation[-1] * (kernel[-1] - 1) + 1
        least = max(0, (reach - size + 1) // 2)
        padding.append(draw(st.integers(least, least + 3)))
        stride.append(draw(st.integers(1, 4)))
    return {
        "size": (draw(st.integers(0, 2)), groups * draw(st.integers(1, 3)), *spatial),
        "outputs": groups * draw(st.integers(1, 3)),
        "kernel": tuple(kernel),
        "stride": tuple(stride),
        "padding": tuple(padding),
        "dilation": tuple(dilation),
        "groups": groups,
    }


@given(
    parts=windows(),
    mask=st.sampled_from([m for m in MASKS if m != "none"]),
    dtype=st.sampled_from(list(MASK_DTYPES)),
    layout=st.sampled_from(list(LAYOUTS)),
    seed=st.integers(0, 2**16),
)
def test_window_sums_of_any_geometry(
    backend: Backend, parts: dict[str, Any], mask: str, dtype: str, layout: str, seed: int
) -> None:
    """Exactly those of a float64 convolution with ones, for masks of zeros and ones."""
    case = Case(**parts)
    known = make_mask(mask, case.size, dtype, values="binary", seed=seed)
    known = known if mask.endswith("view") else laid_out(known, layout)
    multi = known.dim() > case.dims and known.shape[1] > 1
    sums, size = window_sums(case, known, multi)
    # A plane is one of (1, 1) and integers are bool, as the op passes them on.
    (planes,) = on_device(backend, _checks.binary(known if known.dim() > case.dims else known[None, None]))
    kernel = reference.window_planes if backend.name == "reference" else window[backend.name]
    members = case.size[1] // case.groups if multi else 1
    where = reference.Windows(case.kernel, case.stride, case.padding, case.dilation, case.groups).packed()
    ratio, new_mask = kernel(planes, members, where, 1.0, "proportional", torch.float32)
    assert torch.equal((new_mask.cpu().double() * size).round().expand(sums.shape), sums)
    inverse = torch.where(sums == 0, 0.0, 1 / sums)
    torch.testing.assert_close(ratio.cpu().double().expand(sums.shape), inverse, rtol=5e-7, atol=0)


@given(
    parts=windows(),
    mask=st.sampled_from(list(MASKS)),
    mask_dtype=st.sampled_from(list(MASK_DTYPES)),
    dtype=st.sampled_from(("f16", "bf16", "f32")),
    layouts=st.tuples(*[st.sampled_from(list(LAYOUTS))] * 3),
    bias=st.sampled_from((None, "same", "f32")),
    update=st.sampled_from(("clamp", "binary", "proportional")),
    form=st.fixed_dictionaries({"mask_input": st.booleans(), "scale_bias": st.booleans()}),
)
def test_any_input(
    backend: Backend,
    parts: dict[str, Any],
    mask: str,
    mask_dtype: str,
    dtype: str,
    layouts: tuple[str, str, str],
    bias: str | None,
    update: str,
    form: dict[str, bool],
) -> None:
    case = Case(**parts, options={"mask_update": update, **form})
    known = make_mask(mask, case.size, mask_dtype)
    given = make_tensors(case, dtype, mask=known, bias=bias, layouts="/".join(layouts[:2]))
    check(backend, case, given, upstream_layout=layouts[2])


def test_the_definition_is_a_convolution_without_holes() -> None:
    """The truth of these tests, checked against something else."""
    case = Case(padding=0)
    x, w, b, _ = make_tensors(case, "f64")
    torch.testing.assert_close(definition(case, x, w, b, None).output, CONVOLUTIONS[2](x, w, b))
