"""process_group= of objectives: two gloo processes with DDP against one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from objective_table import Inputs, inputs, objective, settings_of
from processes import WORLD, tiny_network
from torch.nn.parallel import DistributedDataParallel
from trunk_cases import relative

# Two samples for each rank, with holes of unlike size: a mean of the ranks' region means is not the global one.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mmagic": ("pconv-mmagic", {}),
    "mmagic-streamed": ("pconv-mmagic", {"chunk": 1}),
    "mmagic-without-tv": ("pconv-mmagic", {"tv_weight": 0}),
    "paper": ("pconv-paper", {}),
    "nvidia": ("pconv-nvidia", {"tv_weight": 0}),
    # L1 over the hole's share of the batch: the first rank has no hole.
    "edge-connect": ("EdgeConnect-inpaint", {"adversarial_weight": 0}),
}


def case(method: str) -> Inputs:
    x = inputs(method, 4, mask="binary")
    known = 1.0 if settings_of(method).mask_is == "valid" else 0.0
    x.mask[:2, :, : 8 if "pconv" in method else None] = known
    return x


def worker(rank: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, (method, options) in CASES.items():
        x = case(method)
        pred, target, mask = (t.detach()[2 * rank : 2 * rank + 2] for t in (x.pred, x.target, x.mask))
        model = DistributedDataParallel(tiny_network())
        terms = objective(method, process_group=dist.group.WORLD, **options)(model(pred), target, mask)
        terms.total.backward()
        results[name] = [term.detach() for term in terms], [p.grad for p in model.parameters()]
    return results


@pytest.mark.parametrize("name", CASES)
def test_mean_over_the_ranks_is_that_of_the_whole_batch(ranks: list[dict[str, Any]], name: str) -> None:
    method, options = CASES[name]
    x = case(method)
    model = tiny_network()
    terms = objective(method, **options)(model(x.pred.detach()), x.target, x.mask)
    terms.total.backward()
    for i, term in enumerate(terms._fields):
        value = sum(results[name][0][i] for results in ranks) / WORLD
        torch.testing.assert_close(value, terms[i].detach(), msg=lambda text, term=term: f"{term}: {text}")
    for results in ranks:
        for got, parameter in zip(results[name][1], model.parameters(), strict=True):
            assert relative(got, parameter.grad) < 1e-5
