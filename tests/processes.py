"""What the tests of process_group= share: gloo processes, and a network for DDP to wrap."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

WORLD = 2

Worker = Callable[[int], dict[Any, Any]]


def run(worker: Worker, folder: Path) -> list[dict[Any, Any]]:
    """What `worker(rank)` returned in each of WORLD processes."""
    if not dist.is_gloo_available():
        pytest.skip("torch.distributed has no gloo here")
    # Without a route to the host's own name gloo would not find an address.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(_process, (worker, str(folder / "store"), str(folder / "found")), nprocs=WORLD)
    return [torch.load(f"{folder / 'found'}.{rank}") for rank in range(WORLD)]


def _process(rank: int, worker: Worker, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.save(worker(rank), f"{results}.{rank}")
    dist.destroy_process_group()


def tiny_network() -> nn.Module:
    """The same in every process."""
    torch.manual_seed(0)
    return nn.Conv2d(3, 3, 3, padding=1)
