"""process_group= of objectives: two gloo processes with DDP against one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from objective_cases import images, mask_for, relative
from objective_table import objective
from processes import WORLD, tiny_network
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

SIZE = (4, 3, 24, 16)
# Two samples for each rank, with holes of unlike size: a mean of the ranks' region means is not the global one.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mmagic": ("pconv-mmagic", {}),
    "mmagic-streamed": ("pconv-mmagic", {"chunk": 1}),
    "mmagic-without-tv": ("pconv-mmagic", {"tv_weight": 0}),
    "paper": ("pconv-paper", {}),
    "nvidia": ("pconv-nvidia", {}),
    # L1 over the hole's share of the batch: the first rank has no hole.
    "edge-connect": ("EdgeConnect-inpaint", {"adversarial_weight": 0}),
}


def case(method: str) -> tuple[Tensor, Tensor, Tensor]:
    pred, target = images(method.removeprefix("pconv-"), SIZE)
    known = mask_for("paper", "binary", SIZE)
    known[:2, :, : 8 if "pconv" in method else None] = 1.0
    return pred, target, known if method in ("pconv-paper", "pconv-nvidia") else 1 - known


def worker(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (method, options) in CASES.items():
        pred, target, mask = (t[2 * rank : 2 * rank + 2] for t in case(method))
        model = DistributedDataParallel(tiny_network())
        terms = objective(method, process_group=dist.group.WORLD, **options)(model(pred), target, mask)
        terms.total.backward()
        found[name] = [term.detach() for term in terms], [p.grad for p in model.parameters()]
    return found


@pytest.mark.parametrize("name", CASES)
def test_mean_over_the_ranks_is_that_of_the_whole_batch(ranks: list[dict[str, Any]], name: str) -> None:
    method, options = CASES[name]
    pred, target, mask = case(method)
    model = tiny_network()
    terms = objective(method, **options)(model(pred), target, mask)
    terms.total.backward()
    for i, term in enumerate(terms._fields):
        value = sum(found[name][0][i] for found in ranks) / WORLD
        torch.testing.assert_close(value, terms[i].detach(), msg=lambda text, term=term: f"{term}: {text}")
    for found in ranks:
        for got, parameter in zip(found[name][1], model.parameters(), strict=True):
            assert relative(got, parameter.grad) < 1e-5
