"""The planes a partial convolution remembers for its masks (ops/_mask_planes.py)."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import INTERPRETING, Backend, backends_under_test, evaluate, same_bits
from partial_conv_cases import (
    Case,
    exact_convolutions,  # noqa: F401
    fresh_planes,  # noqa: F401
    make_mask,
    make_tensors,
    run,
)
from pixel_cases import on_device
from torch import Tensor

from inpaint_kernels.ops import _mask_planes

CASE = Case(size=(2, 3, 9, 10), outputs=3)
cache = _mask_planes.cache


# Backends of the planes computed so far.
Computed = list[str]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    seen: Computed = []
    real = _mask_planes.compute

    def counting(backend: str, *rest: Any) -> Any:
        seen.append(backend)
        return real(backend, *rest)

    monkeypatch.setattr(_mask_planes, "compute", counting)
    return seen


def tensors(
    backend: Backend, mask: str | Tensor | None = "n1", case: Case = CASE, **options: Any
) -> list[Any]:
    return on_device(backend, *make_tensors(case, mask=mask, **options))


def fresh(backend: Backend, case: Case, given: list[Any]) -> Any:
    """What a call gives that remembers nothing."""
    x, w, b, mask = given
    return run(backend, case, [x, w, b, None if mask is None else mask.clone()])


def same(a: Any, b: Any) -> bool:
    return same_bits(a.output, b.output) and same_bits(a.new_mask, b.new_mask)


# ---- hits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["n1", "plane", "nc", "channel-view", "none"])
def test_one_mask_is_computed_once(backend: Backend, computed: Computed, mask: str) -> None:
    """For other layers, the backward, and the next step; and the new mask is the same object."""
    given = tensors(backend, mask)
    first = run(backend, CASE, given)
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in given[:3]]
        found = run(backend, CASE, [*leaves, given[3]])
        found.output.sum().backward()
        assert found.new_mask is first.new_mask
        assert same(found, first)
    assert len(computed) == 1
    assert len(cache) == 1


def test_chains_of_layers(backend: Backend, computed: Computed) -> None:
    """The mask of the second layer is the first one's new mask, in every step."""
    given = tensors(backend, "nc")
    x, w, b, mask = given

    def network() -> Tensor:
        value, seen = x.clone().requires_grad_(), mask
        for _ in range(4):
            value, seen = run(backend, CASE, [value, w, b, seen])
        return value

    outputs = [network() for _ in range(3)]
    outputs[0].sum().backward()
    assert len(computed) == 4
    assert same_bits(outputs[0], outputs[2])


def test_a_mask_saved_for_backward_is_still_known(backend: Backend, computed: Computed) -> None:
    """Though the caller has dropped it."""
    x, w, b, mask = tensors(backend)
    output = run(backend, CASE, [x.requires_grad_(), w, b, mask]).output
    del mask
    gc.collect()
    output.sum().backward()
    assert len(computed) == 1


# ---- misses ------------------------------------------------------------------------------------------------------


def flip_all(mask: Tensor) -> None:
    mask.copy_(1 - mask)


CHANGES: dict[str, Callable[[Tensor], None]] = {
    "in-place": lambda m: m.mul_(0.5),
    "assignment": lambda m: m.__setitem__((..., slice(2, 5)), 0.0),
    "copy": flip_all,
    "through-a-view": lambda m: m[0].zero_(),
    "through-detach": lambda m: m.detach().zero_(),
    "other-data": lambda m: setattr(m, "data", torch.zeros_like(m)),
    "foreach": lambda m: torch._foreach_mul_([m], 0.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_mask_is_computed_again(backend: Backend, computed: Computed, change: str) -> None:
    given = tensors(backend)
    before = run(backend, CASE, given)
    CHANGES[change](given[3])
    after = run(backend, CASE, given)
    assert len(computed) == 2
    assert not same_bits(before.new_mask, after.new_mask)
    assert same(after, fresh(backend, CASE, given))
    assert same(run(backend, CASE, given), after)


def test_a_view_is_known_by_its_base(backend: Backend, computed: Computed) -> None:
    """A mask kept as a view: writing into what it shows is noticed."""
    x, w, b, _ = tensors(backend)
    batch = torch.ones(4, 1, 9, 10, device=backend.device)
    mask = batch[1:3]
    before = run(backend, CASE, [x, w, b, mask])
    batch[1, 0, 2:8, 2:8] = 0
    after = run(backend, CASE, [x, w, b, mask])
    assert len(computed) == 2 and not same_bits(before.output, after.output)
    # Another view of the same memory is another object.
    assert same(run(backend, CASE, [x, w, b, batch[1:3]]), after)


@pytest.mark.parametrize("mask", ["n1", "nc", "channel-view", "none"])
def test_a_changed_new_mask_is_computed_again(backend: Backend, computed: Computed, mask: str) -> None:
    """Whoever writes into what a layer returned gets his change, everybody else the right planes."""
    given = tensors(backend, mask)
    first = run(backend, CASE, given)
    expected = first.new_mask.clone()
    output = first.output.clone()
    # One channel: those of an expanded view share their memory.
    first.new_mask[:, :1, ..., 1:3] *= 0.25
    again = run(backend, CASE, given)
    assert again.new_mask is not first.new_mask
    assert same_bits(again.new_mask, expected) and same_bits(again.output, output)
    assert len(computed) == 2


def test_a_new_mask_that_became_a_parameter(backend: Backend) -> None:
    given = tensors(backend)
    first = run(backend, CASE, given).new_mask.requires_grad_()
    second = run(backend, CASE, given).new_mask
    assert first is not second and not second.requires_grad


def test_backward_after_a_change_of_the_mask_is_refused(kernel: Backend) -> None:
    """As for every tensor autograd saved."""
    x, w, b, mask = tensors(kernel)
    output = run(kernel, CASE, [x.requires_grad_(), w, b, mask]).output
    mask.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_nothing_collides(backend: Backend, computed: Computed) -> None:
    """One mask with every geometry, option and dtype that its planes depend on, in turn, twice."""
    x, w, b, mask = tensors(backend)
    w5 = torch.ones(3, 3, 5, 5, device=backend.device)
    cases = [
        (CASE, [x, w, b, mask]),
        (Case(**{**CASE.__dict__, "stride": 2}), [x, w, b, mask]),
        (Case(**{**CASE.__dict__, "padding": 2}), [x, w, b, mask]),
        (Case(**{**CASE.__dict__, "padding": 2, "dilation": 2}), [x, w, b, mask]),
        (Case(**{**CASE.__dict__, "padding": 2, "kernel": 5}), [x, w5, b, mask]),
        *(
            (Case(**{**CASE.__dict__, "options": options}), [x, w, b, mask])
            for options in (
                {"numerator": "one"},
                {"mask_update": "binary"},
                {"mask_update": "proportional"},
                {"multi_channel": True},
            )
        ),
    ]
    if backend.name in ("reference", "cpu"):
        cases.append((CASE, [x.double(), w.double(), b, mask]))
    for _ in range(2):
        for case, given in cases:
            assert same(run(backend, case, given), fresh(backend, case, given))
    assert len(cache) == len(cases)
    # Each once for this mask, and every time for a copy.
    assert len(computed) == 3 * len(cases)


def test_backends_do_not_share(computed: Computed) -> None:
    names = [b for b in backends_under_test() if b.device == "cpu"]
    given = make_tensors(CASE)
    for _ in range(2):
        for backend in names:
            run(backend, CASE, given)
    assert computed == [b.name for b in names]


def test_input_channels_of_a_spread_mask(backend: Backend) -> None:
    """`multi_channel=True` counts all channels of the input, which one mask may meet with 3 and with 6 channels."""
    mask = tensors(backend)[3]
    for channels in (3, 6, 3):
        case = Case(size=(2, channels, 9, 10), options={"multi_channel": True, "numerator": "one"})
        given = tensors(backend, mask, case)
        assert same(run(backend, case, given), fresh(backend, case, given))


def test_sizes_without_a_mask(backend: Backend, computed: Computed) -> None:
    small = Case(size=(1, 3, 6, 7))
    for case in (CASE, small, CASE):
        given = tensors(backend, "none", case)
        assert run(backend, case, given).new_mask.shape[2:] == case.size[2:]
    assert len(computed) == 2


# ---- lifetime ----------------------------------------------------------------------------------------------------


def test_planes_die_with_their_mask(backend: Backend) -> None:
    given = tensors(backend)
    found = run(backend, CASE, given)
    alive = weakref.ref(found.new_mask)
    del found
    gc.collect()
    assert len(cache) == 1 and alive() is not None
    given[3] = None
    gc.collect()
    assert len(cache) == 0 and alive() is None


def test_a_chain_dies_with_its_first_mask(backend: Backend) -> None:
    x, w, b, mask = tensors(backend)
    seen = mask
    for _ in range(5):
        seen = run(backend, CASE, [x, w, b, seen]).new_mask
    assert len(cache) == 5
    del mask, seen
    gc.collect()
    assert len(cache) == 0


def test_the_next_mask_at_an_address_is_another(backend: Backend) -> None:
    """A training loop makes a mask in every step; memory and object often are those of the step before."""
    x, w, b, _ = tensors(backend)
    for seed in range(5 if INTERPRETING else 30):
        mask = make_mask("n1", CASE.size, seed=seed).to(backend.device)
        found = run(backend, CASE, [x, w, b, mask])
        assert same(found, fresh(backend, CASE, [x, w, b, mask])), f"step {seed}"
        del mask, found
    gc.collect()
    assert len(cache) == 0


# Of one geometry: ratio and new mask.
PLANE_BYTES = 2 * 4 * 2 * 9 * 10


def test_bytes_are_bounded(backend: Backend, computed: Computed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask that was not used for longest goes first."""
    monkeypatch.setattr(cache, "limit", 3 * PLANE_BYTES)
    x, w, b, _ = tensors(backend)
    masks = [make_mask("n1", CASE.size, seed=seed).to(backend.device) for seed in range(4)]
    for index in (0, 1, 2, 0, 3):
        run(backend, CASE, [x, w, b, masks[index]])
    assert len(cache) == 3 and len(computed) == 4
    for index in (0, 2, 3):
        run(backend, CASE, [x, w, b, masks[index]])
    assert len(computed) == 4
    run(backend, CASE, [x, w, b, masks[1]])
    assert len(computed) == 5 and len(cache) == 3


def test_one_mask_with_many_layers_is_bounded_too(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "limit", 3 * PLANE_BYTES)
    given = tensors(backend)
    for slot in range(8):
        case = Case(**{**CASE.__dict__, "padding": slot // 3 + 1, "dilation": slot % 3 + 1})
        if all(n + 2 * (slot // 3 + 1) > 2 * (slot % 3 + 1) for n in CASE.size[2:]):
            assert same(run(backend, case, given), fresh(backend, case, given))
            held = sum(owner.bytes for owner in cache._owners.values())
            assert held <= cache.limit


def test_too_large_to_keep(backend: Backend, computed: Computed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "limit", PLANE_BYTES - 1)
    given = tensors(backend)
    leaves = [t.requires_grad_() for t in given[:3]]
    run(backend, CASE, [*leaves, given[3]]).output.sum().backward()
    assert len(cache) == 0
    # The reference's graph holds its planes; a kernel's backward makes them again.
    assert len(computed) == (1 if backend.name == "reference" else 2)


# ---- modes -------------------------------------------------------------------------------------------------------


def test_inference_then_training(backend: Backend) -> None:
    """What inference mode made cannot be saved for a backward, and must not come back there."""
    given = tensors(backend)
    with torch.inference_mode():
        before = run(backend, CASE, given)
        inner = run(backend, CASE, [*given[:3], given[3].clone()])
    assert len(cache) == 0 and same(before, inner)
    leaves = [t.clone().requires_grad_() for t in given[:3]]
    after = run(backend, CASE, [*leaves, given[3]])
    after.output.sum().backward()
    chained = run(backend, CASE, [*leaves, after.new_mask])
    chained.output.sum().backward()
    assert same(before, after)
    with torch.inference_mode():
        assert same(run(backend, CASE, given), before)


def test_no_grad_then_training(backend: Backend, computed: Computed) -> None:
    given = tensors(backend)
    with torch.no_grad():
        run(backend, CASE, given)
    _, gradients, _ = evaluate(lambda *t: run(backend, CASE, [*t, given[3]]).output, given[:3], (0, 1, 2))
    assert len(computed) == 1
    assert all(g.any() for g in gradients)


def test_compiled_code_computes_its_own(backend: Backend) -> None:
    """The planes are part of the graph: nothing is remembered, and a changed mask is a changed result."""
    torch._dynamo.reset()
    given = tensors(backend)
    compiled = torch.compile(lambda *t: run(backend, CASE, list(t)), fullgraph=True, backend="aot_eager")
    eager = run(backend, CASE, given)
    kept = len(cache)
    assert same(compiled(*given), eager)
    given[3].mul_(0)
    assert not compiled(*given).output.any()
    assert len(cache) == kept


def test_a_trace_computes_its_own() -> None:
    """As for the old ONNX exporter: right for other sizes; what carries traced sizes is not remembered."""
    x, w, b, _ = make_tensors(CASE)
    call = lambda x: run(Backend("reference", "cpu"), CASE, [x, w, b, None]).output  # noqa: E731
    call(x)
    assert len(cache) == 1
    with pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(call, (x,), check_trace=False)
    assert len(cache) == 1
    other = torch.randn(2, 3, 12, 13)
    torch.testing.assert_close(traced(other), call(other), rtol=1e-6, atol=1e-6)


def test_dispatch_modes_see_every_kernel(kernel: Backend, computed: Computed) -> None:
    """As FakeTensorMode, whose planes are no planes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = tensors(kernel)
    mode = FakeTensorMode()
    fake = [mode.from_tensor(t) for t in given]
    with mode:
        assert run(kernel, CASE, fake).output.shape == (2, 3, 9, 10)
        assert run(kernel, CASE, [*fake[:3], None]).output.shape == (2, 3, 9, 10)
    assert len(cache) == 0
    assert not isinstance(run(kernel, CASE, given).new_mask, type(fake[0]))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_masks_under_vmap(backend: Backend) -> None:
    """What stands for several masks at once has no memory to be known by."""
    x, w, b, mask = tensors(backend)
    masks = torch.stack([mask, 1 - mask])
    call = lambda m: run(backend, CASE, [x, w, b, m]).output  # noqa: E731
    with torch.no_grad():
        found = torch.vmap(call)(masks)
        assert len(cache) == 0
        torch.testing.assert_close(found, torch.stack([call(m) for m in masks]), rtol=1e-6, atol=1e-6)


def test_copies_are_other_masks(backend: Backend, computed: Computed) -> None:
    given = tensors(backend)
    for mask in (given[3], copy.deepcopy(given[3]), given[3].clone(), given[3].view(given[3].shape)):
        run(backend, CASE, [*given[:3], mask])
    assert len(computed) == 4


def test_several_threads(backend: Backend) -> None:
    """Threads that share masks, change their own and let them die get what one thread gets alone."""
    if INTERPRETING:
        pytest.skip("Triton's interpreter is not made for threads")
    x, w, b, shared = tensors(backend)
    expected = fresh(backend, CASE, [x, w, b, shared])
    own = [make_mask("n1", CASE.size, seed=seed).to(backend.device) for seed in range(4)]
    wanted = [[fresh(backend, CASE, [x, w, b, m * f]) for f in (1.0, 0.5)] for m in own]
    failures: list[object] = []
    barrier = threading.Barrier(4)

    def work(index: int) -> None:
        try:
            barrier.wait()
            for _ in range(40):
                assert same(run(backend, CASE, [x, w, b, shared]), expected)
                mask = own[index].clone()
                assert same(run(backend, CASE, [x, w, b, mask]), wanted[index][0])
                mask.mul_(0.5)
                found = run(backend, CASE, [x, w, b, mask])
                assert same(found, wanted[index][1])
                run(backend, CASE, [x, w, b, found.new_mask])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(t.is_alive() for t in threads)
    gc.collect()
    assert len(cache) == 1


def test_masks_that_die_inside_the_cache(backend: Backend) -> None:
    """Dropping an entry may drop the last reference to another mask, while the lock is held."""
    x, w, b, mask = tensors(backend)
    masks = [mask]
    for _ in range(3):
        masks.append(run(backend, CASE, [x, w, b, masks[-1]]).new_mask)
    del masks[1:]
    mask.zero_()
    done = threading.Thread(target=lambda: run(backend, CASE, [x, w, b, mask]), daemon=True)
    done.start()
    done.join(30)
    assert not done.is_alive(), "the cache waits for itself"
    assert len(cache) == 1
