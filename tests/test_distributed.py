"""process_group=: two gloo processes with unequal shards against one process with the whole batch."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Backend, as_tuple, assert_within_budget, spread
from pairs_cases import (
    gradient_loss_call,
    gradient_loss_formula,
    inpainting_pixel_call,
    inpainting_pixel_formula,
    total_variation_call,
    total_variation_formula,
)
from pixel_cases import (
    NORMALIZATIONS,
    PARAMS,
    PENALTIES,
    hole_valid_call,
    hole_valid_formula,
    image_pair,
    make_mask,
    masked_formula,
)
from processes import WORLD, tiny_network
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import inpaint_kernels as ik

SIZE = (5, 3, 9, 14)
LOSSES = {
    "l1": (ik.masked_l1_loss, {}),
    "l2": (ik.masked_mse_loss, {}),
    "charbonnier": (ik.masked_charbonnier_loss, {"eps": PARAMS["charbonnier"]}),
    "huber": (ik.masked_huber_loss, {"delta": PARAMS["huber"]}),
}
# First sample of the second rank. Shards of 2 and 3, and a rank that got no sample in the last, short batch.
SHARDS = {"uneven": 2, "idle": 0}


def case_inputs(mask: str) -> tuple[Tensor, Tensor, Tensor | None]:
    pred, target = image_pair(SIZE)
    if mask in ("one_rank_empty", "empty"):
        weights = make_mask("n1hw", SIZE)
        weights[: SHARDS["uneven"] if mask == "one_rank_empty" else None] = 0
        return pred, target, weights
    return pred, target, make_mask(mask, SIZE)


def shard(t: Tensor | None, rank: int, first: int) -> Tensor | None:
    if t is None or t.ndim == 2:
        return t
    return t[:first] if rank == 0 else t[first:]


def masked_call(backend: Backend, *, penalty: str, normalize: str, mask_is: str, **options: Any) -> Any:
    loss, parameter = LOSSES[penalty]
    return functools.partial(loss, normalize=normalize, backend=backend.name, **parameter, **options)


def masked_means(*images: Tensor | None, normalize: str, mask_is: str, penalty: str) -> Tensor:
    return masked_formula(*images, mode=normalize, penalty=penalty)


def table(call: Any, formula: Any, names: str, *rows: tuple[str, str]) -> dict[str, Any]:
    """By name, a function with its formula and two options."""
    first, second = names.split()
    label = call.__name__.removesuffix("_call")
    return {f"{label}-{x}-{y}": (call, formula, {first: x, second: y}) for x, y in rows}


FUNCTIONS: dict[str, tuple[Any, Any, dict[str, str]]] = {
    **table(*(masked_call, masked_means, "penalty normalize"), *itertools.product(PENALTIES, NORMALIZATIONS)),
    **table(
        *(hole_valid_call, hole_valid_formula, "penalty normalize"),
        *itertools.product(("l1",), NORMALIZATIONS),
        ("huber", "mask"),
    ),
    **table(
        *(total_variation_call, total_variation_formula, "mode penalty"),
        ("image-default", "l1"),
        ("image-image", "l2"),
        ("hole-pairs", "l1"),
        ("hole-mask", "l2"),
        ("dilated_hole-mask", "l1"),
        ("first_pixel-mask", "l1"),
    ),
    **table(
        *(gradient_loss_call, gradient_loss_formula, "region penalty"),
        ("ring", "l1"),
        ("hole", "l2"),
        ("image", "l1"),
    ),
    **table(
        *(inpainting_pixel_call, inpainting_pixel_formula, "normalize mode"),
        ("image", "dilated_hole-default"),
        ("mask", "dilated_hole-mask"),
        ("sample", "image-default"),
        ("mask", "hole-mask"),
    ),
}
MASKS = (
    *(("n1hw", "valid"), ("hw", "hole"), ("nchw", "valid"), ("empty", "hole")),
    *(("one_rank_empty", "hole"), ("one_rank_empty", "valid")),
)
# (function, (mask, mask_is), backend, shards); of functions and masks every pair.
CASES: list[Any] = [
    *((*row, "uneven") for row in spread(list(itertools.product(FUNCTIONS, MASKS, ("cpu", "reference"))))),
    *((name, ("n1hw", "valid"), "cpu", "idle") for name in FUNCTIONS),
    *(
        (name, ("nomask", "valid"), "cpu", shards)
        for name in FUNCTIONS
        if name.startswith("masked")
        for shards in SHARDS
    ),
]


def worker(rank: int) -> dict[Any, Any]:
    group = dist.group.WORLD
    results: dict[Any, Any] = {}
    reductions: list[int] = []
    all_reduce = dist.all_reduce

    def counting(*arguments: Any, **named: Any) -> Any:
        reductions.append(1)
        return all_reduce(*arguments, **named)

    dist.all_reduce = counting
    for case in CASES:
        name, (mask, mask_is), backend, shards = case
        call, _, options = FUNCTIONS[name]
        pred, target, weights = (shard(t, rank, SHARDS[shards]) for t in case_inputs(mask))
        leaf = pred.clone().requires_grad_()
        reductions.clear()
        run = call(Backend(backend, "cpu"), **options, mask_is=mask_is, process_group=group)
        values = as_tuple(run(leaf, target, weights))
        gradients = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in values]
        results[case] = [value.detach() for value in values], gradients, len(reductions)
    dist.all_reduce = all_reduce
    for normalize in NORMALIZATIONS:
        network = DistributedDataParallel(tiny_network())
        pred, target, weights = (shard(t, rank, SHARDS["uneven"]) for t in case_inputs("n1hw"))
        ik.masked_l1_loss(network(pred), target, weights, normalize=normalize, process_group=group).backward()
        results["ddp", normalize] = [p.grad for p in network.parameters()]
    return results


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join((case[0], *case[1], *case[2:])))
def test_global_means(ranks: list[dict[Any, Any]], case: Any) -> None:
    """The mean over the ranks, of values and (as DDP does) of gradients, is that of the whole batch.

    Of every term by itself, from a single all-reduce.
    """
    name, (mask, mask_is), *_ = case
    _, formula, options = FUNCTIONS[name]
    pred, target, weights = case_inputs(mask)

    def whole(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        leaf = pred.to(dtype).requires_grad_()
        cast = weights if weights is None else weights.to(dtype)
        values = as_tuple(formula(leaf, target.to(dtype), cast, **options, mask_is=mask_is))
        gradients = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in values]
        return tuple(value.detach() for value in values), gradients

    assert [results[case][2] for results in ranks] == [1] * WORLD
    (plain, plain_gradients), (truth, gradients) = whole(torch.float32), whole(torch.float64)
    for i in range(len(truth)):
        value = sum(results[case][0][i] for results in ranks) / WORLD
        assert_within_budget(value, plain[i], truth[i], acc=torch.float32, what=f"mean of value {i}")
        gradient = torch.cat([results[case][1][i] for results in ranks]) / WORLD
        assert_within_budget(
            gradient,
            plain_gradients[i],
            gradients[i],
            acc=torch.float32,
            what=f"gradient of value {i}",
            # Of neighbouring pixels a gradient is a sum of both signs.
            magnitude=None if name.startswith("masked") else gradients[i].abs().max(),
        )


@pytest.mark.parametrize(
    "name", ["masked_l1", "hole_valid", "total_variation", "gradient", "inpainting_pixel"]
)
def test_a_gradient_to_the_mask_is_refused(name: str) -> None:
    """Before anything is shared: the group here is none."""
    pred, target, mask = case_inputs("n1hw")
    loss = getattr(ik, f"{name}_loss")
    arguments = (pred, mask) if name == "total_variation" else (pred, target, mask)
    options = {"region": "hole"} if name == "total_variation" else {}
    mask.requires_grad_()
    with pytest.raises(ValueError, match=r"process_group.*mask\.detach"):
        loss(*arguments, **options, process_group=object())


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_ddp_gradient_is_that_of_the_whole_batch(ranks: list[dict[Any, Any]], normalize: str) -> None:
    network = tiny_network().double()
    pred, target, weights = (t.double() for t in case_inputs("n1hw"))
    masked_formula(network(pred), target, weights, penalty="l1", mode=normalize).backward()
    for results in ranks:
        for got, parameter in zip(results["ddp", normalize], network.parameters(), strict=True):
            # The convolution's own float32 rounding: sums over 5 * 126 pixels with both signs.
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(got.double(), parameter.grad, rtol=0, atol=1e-5 * scale)


def test_without_a_group_nothing_is_shared() -> None:
    """The default must not look at an initialised default group."""
    assert not dist.is_initialized()
    assert ik.masked_l1_loss(*image_pair(SIZE)).isfinite()
    assert ik.inpainting_pixel_loss(*case_inputs("n1hw")).total.isfinite()
