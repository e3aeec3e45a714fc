"""process_group=: two gloo processes with unequal shards against one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from harness import Backend, as_tuple, assert_within_budget
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
MASKS = ("nomask", "n1hw", "hw", "nchw", "one_rank_empty", "empty")


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


def cases() -> list[tuple[str, str, str, str, str]]:
    everywhere = [
        (backend, penalty, normalize, mask, "uneven")
        for backend in ("cpu", "reference")
        for penalty in PENALTIES
        for normalize in NORMALIZATIONS
        for mask in MASKS
    ]
    idle = [
        ("cpu", "l1", normalize, mask, "idle") for normalize in NORMALIZATIONS for mask in ("nomask", "n1hw")
    ]
    return everywhere + idle


# Functions of several terms, or of neighbouring pixels: (call, formula, options).
TERMS: dict[str, tuple[Any, Any, dict[str, str]]] = {
    **{
        f"hole_valid-{normalize}": (
            hole_valid_call,
            hole_valid_formula,
            {"penalty": "l1", "normalize": normalize},
        )
        for normalize in NORMALIZATIONS
    },
    "hole_valid-huber": (hole_valid_call, hole_valid_formula, {"penalty": "huber", "normalize": "mask"}),
    **{
        f"total_variation-{mode}-{penalty}": (
            total_variation_call,
            total_variation_formula,
            {"mode": mode, "penalty": penalty},
        )
        for mode, penalty in (
            ("image-default", "l1"),
            ("image-image", "l2"),
            ("hole-pairs", "l1"),
            ("hole-mask", "l2"),
            ("dilated_hole-mask", "l1"),
            ("first_pixel-mask", "l1"),
        )
    },
    **{
        f"gradient-{region}-{penalty}": (
            gradient_loss_call,
            gradient_loss_formula,
            {"region": region, "penalty": penalty},
        )
        for region, penalty in (("ring", "l1"), ("hole", "l2"), ("image", "l1"))
    },
    **{
        f"inpainting_pixel-{normalize}-{mode}-{penalty}": (
            inpainting_pixel_call,
            inpainting_pixel_formula,
            {"normalize": normalize, "mode": mode, "penalty": penalty},
        )
        for normalize, mode, penalty in (
            ("image", "dilated_hole-default", "l1"),
            ("mask", "dilated_hole-mask", "l1"),
            ("sample", "image-default", "l1"),
            ("mask", "hole-mask", "l2"),
        )
    },
}


def term_cases() -> list[tuple[str, str, str, str, str]]:
    """(backend, function, mask, mask_is, shards)"""
    everywhere = [
        (backend, function, mask, mask_is, "uneven")
        for backend in ("cpu", "reference")
        for function in TERMS
        for mask, mask_is in (
            ("n1hw", "valid"),
            ("hw", "hole"),
            ("nchw", "valid"),
            ("one_rank_empty", "hole"),
            ("one_rank_empty", "valid"),
            ("empty", "hole"),
        )
    ]
    return everywhere + [("cpu", function, "n1hw", "valid", "idle") for function in TERMS]


def worker(rank: int) -> dict[Any, Any]:
    group = dist.group.WORLD
    found: dict[Any, Any] = {}
    for backend, penalty, normalize, mask, shards in cases():
        loss, parameter = LOSSES[penalty]
        pred, target, weights = (shard(t, rank, SHARDS[shards]) for t in case_inputs(mask))
        leaf = pred.clone().requires_grad_()
        value = loss(
            leaf, target, weights, normalize=normalize, process_group=group, backend=backend, **parameter
        )
        (gradient,) = torch.autograd.grad(value, leaf)
        found[backend, penalty, normalize, mask, shards] = (value.detach(), gradient)
    reduced: list[int] = []
    all_reduce = dist.all_reduce

    def counting(*arguments: Any, **named: Any) -> Any:
        reduced.append(1)
        return all_reduce(*arguments, **named)

    dist.all_reduce = counting
    for case in term_cases():
        backend, function, mask, mask_is, shards = case
        call, _, options = TERMS[function]
        pred, target, weights = (shard(t, rank, SHARDS[shards]) for t in case_inputs(mask))
        leaf = pred.clone().requires_grad_()
        reduced.clear()
        values = as_tuple(
            call(Backend(backend, "cpu"), **options, mask_is=mask_is, process_group=group)(
                leaf, target, weights
            )
        )
        gradients = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in values]
        found[case] = [value.detach() for value in values], gradients, len(reduced)
    dist.all_reduce = all_reduce
    for normalize in NORMALIZATIONS:
        network = DistributedDataParallel(tiny_network())
        pred, target, weights = (shard(t, rank, SHARDS["uneven"]) for t in case_inputs("n1hw"))
        ik.masked_l1_loss(network(pred), target, weights, normalize=normalize, process_group=group).backward()
        found["ddp", normalize] = [p.grad for p in network.parameters()]
    return found


@pytest.mark.parametrize("case", cases(), ids="-".join)
def test_global_mean(ranks: list[dict[Any, Any]], case: tuple[str, str, str, str, str]) -> None:
    """The mean over the ranks, of values and (as DDP does) of gradients, is that of the whole batch."""
    _, penalty, normalize, mask, _ = case
    pred, target, weights = case_inputs(mask)

    def whole(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        leaf = pred.to(dtype).requires_grad_()
        cast = weights if weights is None else weights.to(dtype)
        value = masked_formula(leaf, target.to(dtype), cast, penalty=penalty, mode=normalize)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    plain, truth = whole(torch.float32), whole(torch.float64)
    value = sum(found[case][0] for found in ranks) / WORLD
    gradient = torch.cat([found[case][1] for found in ranks]) / WORLD
    assert_within_budget(value, plain[0], truth[0], acc=torch.float32, what="mean of the values")
    assert_within_budget(gradient, plain[1], truth[1], acc=torch.float32, what="gradient")


@pytest.mark.parametrize("case", term_cases(), ids="-".join)
def test_global_means_of_terms(ranks: list[dict[Any, Any]], case: tuple[str, str, str, str, str]) -> None:
    """Every term by itself, from a single all-reduce."""
    _, function, mask, mask_is, _ = case
    _, formula, options = TERMS[function]
    pred, target, weights = case_inputs(mask)

    def whole(dtype: torch.dtype) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        leaf = pred.to(dtype).requires_grad_()
        values = as_tuple(formula(leaf, target.to(dtype), weights.to(dtype), **options, mask_is=mask_is))
        gradients = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in values]
        return tuple(value.detach() for value in values), gradients

    assert [found[case][2] for found in ranks] == [1] * WORLD
    (plain, plain_gradients), (truth, gradients) = whole(torch.float32), whole(torch.float64)
    for i in range(len(truth)):
        value = sum(found[case][0][i] for found in ranks) / WORLD
        assert_within_budget(value, plain[i], truth[i], acc=torch.float32, what=f"mean of value {i}")
        gradient = torch.cat([found[case][1][i] for found in ranks]) / WORLD
        assert_within_budget(
            gradient,
            plain_gradients[i],
            gradients[i],
            acc=torch.float32,
            what=f"gradient of value {i}",
            magnitude=gradients[i].abs().max(),  # total variation: sums of both signs
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
    for found in ranks:
        for got, parameter in zip(found["ddp", normalize], network.parameters(), strict=True):
            # The convolution's own float32 rounding: sums over 5 * 126 pixels with both signs.
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(got.double(), parameter.grad, rtol=0, atol=1e-5 * scale)


def test_without_a_group_nothing_is_shared() -> None:
    """The default must not look at an initialised default group."""
    assert not dist.is_initialized()
    assert ik.masked_l1_loss(*image_pair(SIZE)).isfinite()
    assert ik.inpainting_pixel_loss(*case_inputs("n1hw")).total.isfinite()
