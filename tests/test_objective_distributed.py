"""process_group= of PartialConvObjective: two gloo processes with DDP against one process with the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from objective_cases import TERMS, images, mask_for, objective, relative
from processes import WORLD, tiny_network
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

SIZE = (4, 3, 24, 16)
# Two samples for each rank, with holes of unlike size: a mean of the ranks' region means is not the global one.
CASES = {
    "mmagic": ("mmagic", {}),
    "mmagic-streamed": ("mmagic", {"chunk": 1}),
    "mmagic-without-tv": ("mmagic", {"tv_weight": 0}),
    "paper": ("paper", {}),
    "nvidia": ("nvidia", {}),
}


def case(preset: str) -> tuple[Tensor, Tensor, Tensor]:
    pred, target = images(preset, SIZE)
    mask = mask_for(preset, "binary", SIZE)
    mask[:2, :, :8] = 0.0 if preset == "mmagic" else 1.0
    return pred, target, mask


def worker(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, (preset, options) in CASES.items():
        pred, target, mask = (t[2 * rank : 2 * rank + 2] for t in case(preset))
        model = DistributedDataParallel(tiny_network())
        terms = objective(preset, process_group=dist.group.WORLD, **options)(model(pred), target, mask)
        terms.total.backward()
        found[name] = [term.detach() for term in terms], [p.grad for p in model.parameters()]
    return found


@pytest.mark.parametrize("name", CASES)
def test_mean_over_the_ranks_is_that_of_the_whole_batch(ranks: list[dict[str, Any]], name: str) -> None:
    preset, options = CASES[name]
    pred, target, mask = case(preset)
    model = tiny_network()
    terms = objective(preset, **options)(model(pred), target, mask)
    terms.total.backward()
    for i, term in enumerate(("total", *TERMS)):
        value = sum(found[name][0][i] for found in ranks) / WORLD
        torch.testing.assert_close(value, terms[i].detach(), msg=lambda text, term=term: f"{term}: {text}")
    for found in ranks:
        for got, parameter in zip(found[name][1], model.parameters(), strict=True):
            assert relative(got, parameter.grad) < 1e-5
