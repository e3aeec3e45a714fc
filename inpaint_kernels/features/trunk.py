"""Frozen feature trunks: any module, tapped by name, run no further than the last tap."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# The same for images in [-1, 1], (2 mean - 1, 2 std): exactly the constants of the lpips package.
_LPIPS = ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
# (mean, std) of (images - mean) / std.
_PREPROCESS = {"imagenet": _IMAGENET, "imagenet_tanh": _LPIPS, "lpips": _LPIPS}


class _LastTap(Exception):
    """Ends a hooked forward pass once every tap is there."""


class FrozenTrunk(nn.Module):
    """Runs a frozen network on images and returns the outputs of the tapped submodules.

    Args:
        module: the network; it is put into evaluation mode and its parameters stop requiring gradients. An
            ``nn.Sequential`` runs child by child; any other module runs with hooks and is left by an exception
            after the last tap.
        taps: names of submodules as in ``module.named_modules()``, in the order wanted. What a tap returns is the
            submodule's output even when an in-place activation follows.
        preprocess: "none"; "imagenet" for images in [0, 1]; "imagenet_tanh" for images in [-1, 1], moved to [0, 1]
            first; "lpips" for images in [-1, 1], the shift and scale of the lpips package. One-channel images are
            replicated to three channels by all but "none".
        channels_last: convert the images to channels_last, in which convolutions of half types are fastest.
        autocast: None, or the dtype (torch.bfloat16, torch.float16) the trunk runs in under autocast.

    Returns of ``forward(images)``: a list of tensors, one for each tap.

    Differentiable in the images. Raises ValueError for an unknown tap or preprocessing.

    Example:
        >>> import torch, inpaint_kernels as ik
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(inplace=True), torch.nn.MaxPool2d(2))
        >>> trunk = ik.features.FrozenTrunk(net, ["0", "2"])
        >>> [tuple(f.shape) for f in trunk(torch.rand(1, 3, 8, 8))]
        [(1, 4, 6, 6), (1, 4, 3, 3)]
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        module: nn.Module,
        taps: Sequence[str],
        preprocess: str = "none",
        *,
        channels_last: bool = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        known = dict(module.named_modules())
        missing = [tap for tap in taps if tap not in known or tap == ""]
        if missing or not taps:
            names = ", ".join(name for name in known if name)
            raise ValueError(f"taps: {missing or 'empty'}; this module has {names}")
        if preprocess != "none" and preprocess not in _PREPROCESS:
            allowed = ", ".join(["none", *_PREPROCESS])
            raise ValueError(f"preprocess: got {preprocess!r}, allowed: {allowed}")
        self.taps = tuple(taps)
        self.names = list(taps)  # as the caller knows the taps; a loader may give them layer names
        self.preprocess = preprocess
        self.channels_last = channels_last
        self.autocast = autocast
        mean, std = _PREPROCESS.get(preprocess, ((0.0,), (1.0,)))
        shape = (1, len(mean), 1, 1)
        self.register_buffer("scale", 1 / torch.tensor(std).view(shape), persistent=False)
        self.register_buffer(
            "shift", -torch.tensor(mean).view(shape) / torch.tensor(std).view(shape), persistent=False
        )
        sequential = isinstance(module, nn.Sequential) and all("." not in tap for tap in taps)
        self.features = _truncated(module, taps) if sequential else module
        self.sequential = sequential
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTrunk:
        """Stays in evaluation mode: a frozen trunk has no training mode."""
        del mode
        return super().train(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        if self.preprocess != "none":
            if images.shape[1] == 1:
                images = images.expand(-1, 3, -1, -1)
            dtype = torch.float64 if images.dtype == torch.float64 else torch.float32
            images = images.to(dtype) * self.scale.to(dtype) + self.shift.to(dtype)
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        if self.autocast is None:
            return self._run(images)
        with torch.autocast(images.device.type, self.autocast):
            return self._run(images)

    def _run(self, images: Tensor) -> list[Tensor]:
        found: dict[str, Tensor] = {}
        if self.sequential:
            value = images
            for name, child in self.features.named_children():
                value = child(value)
                if name in self.taps:
                    found[name] = value
        else:
            self._run_hooked(images, found)
        return [found[tap] for tap in self.taps]

    def _run_hooked(self, images: Tensor, found: dict[str, Tensor]) -> None:
        modules = dict(self.features.named_modules())

        def hook(tap: str) -> Any:
            def store(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
                found[tap] = output
                if len(found) == len(set(self.taps)):
                    raise _LastTap
                # What follows may work in place; it must not reach the tap.
                return output.clone()

            return store

        handles = [modules[tap].register_forward_hook(hook(tap)) for tap in set(self.taps)]
        try:
            self.features(images)
        except _LastTap:
            pass
        finally:
            for handle in handles:
                handle.remove()


def _truncated(module: nn.Module, taps: Sequence[str]) -> nn.Sequential:
    """The children up to the last tap; an in-place one after a tap, or in front, is replaced by its twin."""
    children = list(module.named_children())
    last = max(index for index, (name, _) in enumerate(children) if name in taps)
    out = nn.Sequential()
    protect = True
    for name, child in children[: last + 1]:
        if protect and getattr(child, "inplace", False):
            child = copy.copy(child)
            child.inplace = False  # type: ignore[assignment]
        out.add_module(name, child)
        protect = name in taps
    return out
