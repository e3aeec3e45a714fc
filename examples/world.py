"""A process of the training example among its companions: its device, its group, what they do together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from options import AMP_DTYPES
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class World:
    """This process and its companions; ``group`` is None for a single process."""

    device: torch.device
    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def average(self, values: Tensor) -> Tensor:
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
            values /= self.size
        return values

    def parallel(self, module: nn.Module) -> nn.Module:
        """The module with gradients that are means over all processes, which begin with equal weights."""
        if self.group is None:
            return module
        devices = [self.device] if self.device.type == "cuda" else None
        # The buffers are the vectors of spectral norms: the same everywhere, as they follow from the weights.
        return DistributedDataParallel(
            module, device_ids=devices, process_group=self.group, broadcast_buffers=False
        )

    def autocast(self, amp: str) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=AMP_DTYPES[amp], enabled=amp != "off")

    def scaler(self, amp: str) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=amp == "fp16")
