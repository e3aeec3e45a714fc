"""Every op in training: memory, determinism, registration, compile, host syncs, CUDA graphs, autocast, the choice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from feature_cases import check_matmul_precision
from harness import (
    ALL_ROWS,
    EMULATING,
    INTERPRETING,
    Backend,
    evaluate,
    grid,
    poisoned_allocations,
    same_bits,
    spread,
)
from op_cases import LARGE, OPS, SMALL, SUBSETS, Op
from op_choices import ALL_WAYS, SETTINGS, USUAL, ops
from partial_conv_cases import exact_convolutions  # noqa: F401
from pixel_cases import on_device
from torch import Tensor
from training_checks import (
    check_capturable,
    check_compiles,
    check_deterministic,
    check_no_host_sync,
    check_opcheck,
    kept_bytes,
    operator_calls,
    ops_called,
)

LAYOUTS = ("contiguous", "channels_last")
KEEPING = [*SETTINGS, *ops("partial_conv"), *(op for op in OPS.values() if "own mask" in op.id)]
# Planes and rows that are multiples of 8: no padding in the packed signs.
KEPT_SIZE = (8, 3, 8, 8) if INTERPRETING or EMULATING else (8, 3, 64, 64)
every_op = grid(op=[*SETTINGS, *ops("partial_conv")])
usual_ops = pytest.mark.parametrize("op", USUAL, ids=str)


def inputs_of(op: Op, backend: Backend, *args: Any, **options: Any) -> list[Tensor]:
    return on_device(backend, *op.make(*args, **options))


def assert_same(got: Any, want: Any) -> None:
    """Outputs and gradients of two `evaluate`."""
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        assert same_bits(a, b)


# ---- memory ------------------------------------------------------------------------------------------------------


@grid(op=[op for op in KEEPING if op.keeps], dtypes=("f32/f32", "bf16/bf16"), layout=LAYOUTS)
def test_keeps_no_more_than_it_needs(kernel: Backend, op: Op, dtypes: str, layout: str) -> None:
    """Packed signs and the like; not an image that the caller's graph holds, nor one that it does not."""
    call = op.by(kernel)

    def step(*leaves: Tensor) -> Any:
        return call(*(2 * t if i in op.made else t for i, t in enumerate(leaves)))

    for wanted in SUBSETS[op.free]:
        leaves = inputs_of(op, kernel, KEPT_SIZE, dtypes, layout)
        leaves = [t.requires_grad_(i in wanted) for i, t in enumerate(leaves)]
        assert op.keeps is not None
        assert kept_bytes(step, *leaves) <= op.keeps(leaves), f"gradients to {wanted}"
    with torch.no_grad():
        assert kept_bytes(step, *leaves) == 0


@usual_ops
def test_offloading_and_activation_checkpointing(kernel: Backend, op: Op) -> None:
    """Saved tensors may come back as other objects, or be computed again."""
    inputs = inputs_of(op, kernel)
    usual = evaluate(op.by(kernel), inputs, op.wanted)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        assert_same(evaluate(op.by(kernel), inputs, op.wanted, usual[2]), usual)
    again = partial(torch.utils.checkpoint.checkpoint, op.by(kernel), use_reentrant=False)
    assert_same(evaluate(again, inputs, op.wanted, usual[2]), usual)


# ---- determinism -------------------------------------------------------------------------------------------------


# A convolution of the library may add in any order.
@grid(op=SETTINGS, layout=LAYOUTS)
def test_two_runs_give_the_same_bits(kernel: Backend, op: Op, layout: str) -> None:
    halves = [(LARGE, "bf16/bf16")] if op.name == "stacked_images" else []
    for size, dtypes in [*((size, "f32/f32") for size in op.large), *halves]:
        inputs = inputs_of(op, kernel, size, dtypes, layout)

        def run(inputs: list[Tensor] = inputs) -> tuple[Tensor, ...]:
            outputs, gradients, _ = evaluate(op.by(kernel), inputs, op.wanted)
            return (*outputs, *gradients)

        check_deterministic(run)


@grid(op=USUAL, layout=LAYOUTS, size=((2, 3, 5, 7), (1, 17, 9, 11)))
def test_every_byte_is_written(kernel: Backend, op: Op, layout: str, size: tuple[int, ...]) -> None:
    """Of all that an operator returns: where a byte belongs to no pixel it may not be what the memory held."""
    # Three constants of `stacked_images` need three channels.
    size = (*size[:1], 3, *size[2:]) if op.name == "stacked_images" else size
    inputs = inputs_of(op, kernel, size, layout=layout)

    def returned() -> list[Tensor]:
        return [
            t
            for call in operator_calls(lambda: evaluate(op.by(kernel), inputs, op.wanted))
            for t in call.results
        ]

    clean = returned()
    with poisoned_allocations():
        assert all(map(same_bits, returned(), clean))


# ---- registration and compile ------------------------------------------------------------------------------------

SIZES = {"image": SMALL, "1x1": (2, 3, 1, 1), "c1": (2, 1, 4, 5), "nothing": (0, 3, 4, 5)}
PLACES = (
    ("image", "contiguous"),
    ("image", "channels_last"),
    ("image", "transposed"),
    ("1x1", "contiguous"),
    ("c1", "channels_last"),
    ("nothing", "contiguous"),
    ("nothing", "channels_last"),
)
# Which inputs, None for all; dtypes; the mask.
GRADIENTS: dict[str, tuple[Any, str, str]] = {
    "none": ((), "f32/f32", "nchw"),
    "all": (None, "f16/f32", "n1hw"),
    "one": ((0,), "f32/f32", "n1hw"),
}


def opchecks() -> list[Any]:
    """Of every op rows that see each of its settings, sizes, layouts and gradients; of `ALL_ROWS` about twice."""
    rows = []
    for name in (op.name for op in USUAL if op.name != "gradient_loss"):
        found = [op for op in (*SETTINGS, *ops("partial_conv")) if op.name == name]
        count = (2 if ALL_ROWS else 1) * max(len(found), len(PLACES))
        rows += spread([*product(found, PLACES, GRADIENTS)], count)
    return [pytest.param(*row, id="-".join(map(str, (row[0], *row[1], row[2])))) for row in rows]


@pytest.mark.parametrize(("op", "place", "gradient"), opchecks())
def test_opcheck(kernel: Backend, op: Op, place: tuple[str, str], gradient: str) -> None:
    """Of the operators that a call and its backward reach, as they are called; also with one output alone."""
    wanted, dtypes, mask = GRADIENTS[gradient]
    inputs = inputs_of(op, kernel, SIZES[place[0]], dtypes, place[1], mask=mask)
    wanted = op.wanted if wanted is None else wanted
    call = op.by(kernel)
    outputs = len(op.outputs(inputs, kernel.name)) if wanted and place[0] == "image" else 1
    several: list[Callable[..., Any]] = [lambda *t, i=i: call(*t)[i] for i in range(outputs)]
    checked = set()
    for run in [call, *(several if outputs > 1 else [])]:
        for found in operator_calls(lambda run=run: evaluate(run, inputs, wanted)):
            # The forward is the same whatever output is looked at.
            if (found.name, run) not in checked and (run is call or "backward" in found.name):
                check_opcheck(found)
                checked.add((found.name, run))
    assert checked


COMPILED_SIZES = ((2, 3, 9, 14), (3, 4, 16, 10))
# Of each op three ways through its kernels. Of each shape of work the first goes through the whole compiler, to which
# all operators are alike. The reference is captured once: what AOTAutograd and Inductor make of torch's own operators
# is their affair, and takes 20 s an op.
WHOLE = ("masked_l1", "inpainting_pixel", "stacked_images", "style", "lpips", "ssim")
COMPILED = [
    (OPS[f"{name} {way}"], mask, layout, mask == "n1hw")
    for name, found in ALL_WAYS.items()
    for way, mask, layout in zip(found, ("n1hw", "nchw", "hw"), (*LAYOUTS, "contiguous"), strict=False)
]
COMPILED += [
    (OPS["masked_l1 charbonnier image"], "nomask", "channels_last", False),
    (OPS["masked_l1 l1 mask"], "hw-u8", "contiguous", False),
]


@pytest.mark.parametrize(("op", "mask", "layout", "first"), COMPILED, ids=str)
def test_compile(backend: Backend, op: Op, mask: str, layout: str, first: bool) -> None:
    if backend.name == "reference" and not first:
        pytest.skip("slow to trace; once is enough")
    sizes = [(n, 3 if op.name == "stacked_images" else c, h, w) for n, c, h, w in COMPILED_SIZES]
    kind, _, dtype = mask.partition("-")
    options = {"layout": layout, "mask": kind, "mask_dtype": dtype or "f32"}
    cases = [inputs_of(op, backend, size, **options) for size in sizes]
    # Inductor does not see Triton's interpreter.
    whole = first and not INTERPRETING and (ALL_ROWS or op.name in WHOLE)
    compiler = "eager" if backend.name == "reference" else "inductor" if whole else "aot_eager"
    check_compiles(op.by(backend), op.check, cases, compiler)


# ---- the device --------------------------------------------------------------------------------------------------


@every_op
def test_no_host_sync(backend: Backend, op: Op) -> None:
    """Also where only some ask for a gradient."""
    inputs = inputs_of(op, backend)
    for wanted in (*SUBSETS[op.free], ()):
        run = partial(evaluate, op.by(backend), inputs, wanted, evaluate(op.by(backend), inputs, wanted)[2])
        check_no_host_sync(run)
        if op.name == "feature_distance":
            # A list of indices would be copied to the device, and the host would wait for that.
            assert not [called for called in ops_called(run) if called.startswith("aten.index.")]


@every_op
def test_cuda_graph(kernel: Backend, op: Op) -> None:
    if kernel.device != "cuda":
        pytest.skip("CUDA graphs need tensors on the GPU")
    check_capturable(op.by(kernel), inputs_of(op, kernel), op.wanted)


@every_op
def test_autocast_changes_nothing(backend: Backend, op: Op) -> None:
    if op.name == "partial_conv":
        pytest.skip("follows autocast as a convolution does: test_partial_conv_training.py")
    inputs = inputs_of(op, backend, dtypes="bf16/f32")
    outside = evaluate(op.by(backend), inputs, op.wanted)
    # The backward of a plain matmul follows autocast: the reference's gradients are asked for outside.
    products = backend.name == "reference" and op.name in ("gram", "style")
    with torch.autocast(backend.device, torch.bfloat16):
        inside = evaluate(op.by(backend), inputs, () if products else op.wanted, outside[2])
    assert_same(inside, (outside[0], () if products else outside[1]))


@pytest.mark.parametrize("op", ops("gram", "style"), ids=str)
def test_matmul_precision(backend: Backend, op: Op) -> None:
    """The setting is read, never written; what ran under "medium" leaves no trace in a strict run."""
    inputs = inputs_of(op, backend)
    before = evaluate(op.by(backend), inputs, op.wanted)
    check_matmul_precision(op.by(backend), inputs, op.wanted)
    if backend.name != "reference":
        assert_same(evaluate(op.by(backend), inputs, op.wanted, before[2]), before)


@usual_ops
def test_inference_mode_and_no_grad_run_no_autograd(backend: Backend, op: Op) -> None:
    """And leave nothing behind that a step of training would find."""
    inputs = inputs_of(op, backend)
    inputs[0].requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found = op.outputs(inputs, backend.name)
        assert not any(t.requires_grad for t in found)
        usual = op.outputs(inputs, backend.name)
        assert all(torch.equal(a, b) for a, b in zip(found, usual, strict=True))
        usual[0].sum().backward()


# Work over whole images, which a kernel does itself.
PASSES = ("mul", "div", "where", "sum", "sub", "conv", "bmm", "repeat")


@pytest.mark.parametrize("op", [op for op in USUAL if op.name != "gradient_loss"], ids=str)
def test_automatic_choice_is_the_kernel_of_the_device(kernel: Backend, op: Op) -> None:
    """One forward and one backward call, for all layers; nothing of the reference's way."""
    first = {"cpu": "cpu", "cuda": "cuda"}[kernel.device]
    if kernel.name != first:
        pytest.skip(f"{first} comes before {kernel.name} on this device")
    inputs = inputs_of(op, kernel)
    # Without the targets of feature maps, which predictions share: their gradients are added up.
    wanted = op.wanted[:2] if op.free == 4 else op.wanted
    upstream = evaluate(op.by(None), inputs, wanted)[2]
    run = partial(evaluate, op.by(None), inputs, wanted, upstream)
    parts = ("", "_backward", "_window") if op.name == "partial_conv" else ("", "_backward")
    assert sorted(c.name for c in operator_calls(run)) == sorted(f"{op.name}{part}_{first}" for part in parts)
    # The means of the planes are averaged outside the kernels.
    passes = tuple(f"aten.{p}" for p in PASSES if (op.name, p) != ("ssim", "div"))
    assert not [called for called in ops_called(run) if called.startswith(passes)]
