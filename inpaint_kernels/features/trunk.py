"""Frozen feature trunks: any module, tapped by name, run no further than the last tap."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# The same for images in [-1, 1], (2 mean - 1, 2 std): exactly the constants of the lpips package.
_LPIPS = ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
# (mean, std) of (images - mean) / std.
_PREPROCESS = {"imagenet": _IMAGENET, "imagenet_tanh": _LPIPS, "lpips": _LPIPS}
PREPROCESSINGS = ("none", *_PREPROCESS)

# Where SqueezeNet's blocks are, which keep their input's size and leave it alone.
_NETS = f"{__package__}.torchvision_nets"
# Modules of these files return new memory and leave their input alone, unless they have `inplace` set.
_PURE = {_NETS} | {
    f"torch.nn.modules.{file}"
    for file in ("activation", "batchnorm", "conv", "instancenorm", "normalization", "padding", "pooling")
}
# And return what is as large as their input.
_SAME_SIZE = {_NETS} | {
    f"torch.nn.modules.{file}" for file in ("activation", "batchnorm", "instancenorm", "normalization")
}


def scale_and_shift(preprocess: str) -> tuple[list[float], list[float]]:
    """(images - mean) / std as ``scale * images + shift``, channel by channel; of one channel for "none"."""
    mean, std = _PREPROCESS.get(preprocess, ((0.0,), (1.0,)))
    return [1 / s for s in std], [-m / s for m, s in zip(mean, std, strict=True)]


class _LastTap(Exception):
    """Ends a hooked forward pass once every tap is there."""


class _Step(NamedTuple):
    """One call of a trunk that runs child by child."""

    path: str
    taps: tuple[str, ...]  # that are this call's output
    copied: bool  # for the taps, because what follows may change the output in place


class FrozenTrunk(nn.Module):
    """Runs a frozen network on images and returns the outputs of the tapped submodules.

    Args:
        module: the network; it is put into evaluation mode and its parameters stop requiring gradients. An
            ``nn.Sequential``, with taps in itself or in an ``nn.Sequential`` inside it, runs child by child; any
            other module (a subclass of ``nn.Sequential`` with its own ``forward`` too) runs with hooks and is left
            by an exception after the last tap.
        taps: names of submodules as in ``module.named_modules()``, in the order wanted. What a tap returns is the
            submodule's output, whatever works in place behind it; the images are never changed. Nothing is copied for
            that in a Sequential of torch's own convolutions, norms, poolings and activations; otherwise a tap that
            may be changed is. With hooks, a submodule that runs several times is tapped in its first run, and one
            object under several names in as many runs, in the order of the names.
        preprocess: "none"; "imagenet" for images in [0, 1]; "imagenet_tanh" for images in [-1, 1], moved to [0, 1]
            first; "lpips" for images in [-1, 1], the shift and scale of the lpips package. Computed in float32
            (float64 for float64 images). One-channel images are replicated to three channels by all but "none".
        channels_last: run the network in channels_last, in which convolutions of half types are fastest; its weights
            are converted once, the images in each call. None does so on the CPU alone, where convolutions else copy
            their images into blocks and back.
        autocast: None, or the dtype (torch.bfloat16, torch.float16) the trunk runs in under autocast.

    ``forward(images, layers=None)`` takes (N, C, H, W) and returns a list of tensors, one for each tap; with
    `layers`, some of `names`, only those, in that order, running no further than the last of them. After the
    preprocessing, images of less than float64 are converted to the dtype of the network's weights.

    Differentiable in the images. Raises ValueError for an unknown tap or preprocessing, for images that are not
    (N, 1 or 3, H, W) under a preprocessing and for those that strides and poolings leave nothing of, TypeError for a
    tap whose output is no tensor.

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
        channels_last: bool | None = False,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(taps, str):
            raise TypeError(f"taps: got the string {taps!r}, expected a sequence of names: ({taps!r},)")
        known = dict(module.named_modules(remove_duplicate=False))
        missing = [tap for tap in taps if tap not in known or tap == ""]
        if missing or not taps:
            names = ", ".join(name for name in known if name)
            raise ValueError(f"taps: {missing or 'empty'}; this module has {names}")
        if preprocess not in PREPROCESSINGS:
            raise ValueError(f"preprocess: got {preprocess!r}, allowed: {', '.join(PREPROCESSINGS)}")
        self.taps = tuple(taps)
        self.names = list(taps)  # as the caller knows the taps; a loader may give them layer names
        self.preprocess = preprocess
        self.channels_last = channels_last
        self.autocast = autocast
        self.register_buffer("scale", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)
        self._set_constants(torch.get_default_device())
        self.sequential = all(_is_plain(known[name]) for tap in taps for name in _containers(tap))
        self._steps: list[_Step] = []
        self._copies_images = True
        self.least_size = (1, 1)  # height and width of images that reach the last tap, as far as it is known
        self.features = module
        if self.sequential:
            self.features, self._steps, self._copies_images = _child_by_child(module, self.taps)
            self.least_size = (_least_side(self.features, 0), _least_side(self.features, 1))
        self.requires_grad_(False)
        self.train(False)
        self._lay_out(moved=False)

    def train(self, mode: bool = True) -> FrozenTrunk:
        """Stays in evaluation mode: a frozen trunk has no training mode."""
        del mode
        return super().train(False)

    @property
    def dtype(self) -> torch.dtype | None:
        """Of the network's weights; None without any."""
        for parameter in self.features.parameters():
            if parameter.is_floating_point():
                return parameter.dtype
        return None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FrozenTrunk:
        super()._apply(fn, recurse)
        # `half()` would round the constants, `double()` widen rounded ones, `to_empty()` leave them undefined.
        self._set_constants(self.scale.device)
        self._lay_out(moved=True)
        return self

    def _lay_out(self, moved: bool) -> None:
        """Weights in the layout of the images: a convolution would convert them in every call."""
        for parameter in self.features.parameters():
            if parameter.ndim == 4:
                if self._is_channels_last(parameter):
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
                elif self.channels_last is None and moved:
                    parameter.data = parameter.data.contiguous()

    def _is_channels_last(self, of: Tensor) -> bool:
        return of.device.type == "cpu" if self.channels_last is None else self.channels_last

    def _set_constants(self, device: torch.device) -> None:
        scale, shift = scale_and_shift(self.preprocess)
        for name, values in (("scale", scale), ("shift", shift)):
            constant = torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)
            setattr(self, name, constant)

    def forward(self, images: Tensor, layers: Sequence[str] | None = None) -> list[Tensor]:
        check_size(self, "images", images)
        taps = self.taps if layers is None else tuple(self.taps[self.names.index(name)] for name in layers)
        if self.preprocess != "none":
            images = self._preprocessed(images)
        elif self._copies_images:
            images = images.clone()
        dtype = self.dtype
        if dtype is not None and images.dtype != dtype:
            if images.dtype == torch.float64:
                raise TypeError(
                    f"images are float64, the trunk's weights {dtype}: convert the images, .float(), or the trunk, "
                    ".double()"
                )
            images = images.to(dtype)
        if self._is_channels_last(images):
            images = images.contiguous(memory_format=torch.channels_last)
        if self.autocast is None:
            return self._run(images, taps)
        with torch.autocast(images.device.type, self.autocast):
            return self._run(images, taps)

    def _preprocessed(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"images has shape {tuple(images.shape)}; preprocess={self.preprocess!r} takes (N, 3, H, W) "
                "or (N, 1, H, W)"
            )
        images = images.expand(-1, 3, -1, -1)
        if images.dtype != torch.float64:
            return torch.addcmul(self.shift, images.to(torch.float32), self.scale)
        # Numbers instead of buffers: some devices hold no float64, and copying them there would wait for it.
        channels = images.split(1, dim=1)
        mean, std = _PREPROCESS[self.preprocess]
        return torch.cat([(x - m) / s for x, m, s in zip(channels, mean, std, strict=True)], dim=1)

    def _run(self, images: Tensor, taps: Sequence[str]) -> list[Tensor]:
        outputs: dict[str, Tensor] = {}
        wanted = set(taps)
        if self.sequential:
            value = images
            for step in self._steps:
                value = self.features.get_submodule(step.path)(value)
                for tap in wanted.intersection(step.taps):
                    outputs[tap] = _checked(tap, value).clone() if step.copied else _checked(tap, value)
                if len(outputs) == len(wanted):
                    break
        else:
            self._run_hooked(images, outputs, wanted)
        return [outputs[tap] for tap in taps]

    def _run_hooked(self, images: Tensor, outputs: dict[str, Tensor], wanted: set[str]) -> None:
        pending: dict[nn.Module, list[str]] = {}
        for name, module in self.features.named_modules(remove_duplicate=False):
            pending.setdefault(module, []).append(name)

        def store(module: nn.Module, _inputs: Any, output: Tensor) -> None:
            name = pending[module].pop(0) if pending[module] else None
            if name not in wanted or name in outputs:
                return
            last = len(outputs) + 1 == len(wanted)
            # The network goes on with its own tensor, in place if it likes.
            outputs[name] = _checked(name, output) if last else _checked(name, output).clone()
            if last:
                raise _LastTap

        tapped = [module for module, names in pending.items() if wanted.intersection(names)]
        handles = [module.register_forward_hook(store) for module in tapped]
        try:
            self.features(images)
        except _LastTap:
            pass
        finally:
            for handle in handles:
                handle.remove()


def check_trunk(trunk: Any) -> FrozenTrunk:
    """A `FrozenTrunk`, or a module that stands for one, as what torch.compile makes of it."""
    if not isinstance(trunk, nn.Module) or not hasattr(trunk, "taps"):
        got = repr(trunk) if isinstance(trunk, str) else type(trunk).__name__
        raise TypeError(
            "trunk must be a FrozenTrunk, such as ik.features.vgg16() or FrozenTrunk(module, taps) of any module, "
            f"got {got}"
        )
    return trunk  # type: ignore[return-value]


def check_size(trunk: FrozenTrunk, name: str, images: Tensor) -> None:
    """Images, called `name`, that are large enough for a trunk."""
    height, width = trunk.least_size
    if images.ndim >= 2 and (images.shape[-2] < height or images.shape[-1] < width):
        raise ValueError(
            f"{name} has shape {tuple(images.shape)}; this trunk needs images of at least {height}x{width} pixels, "
            "of smaller ones its poolings and strides leave nothing"
        )


def _checked(tap: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(
            f"taps: {tap!r} returns a {type(value).__name__}; tap a submodule that returns a tensor"
        )
    return value


def _containers(tap: str) -> list[str]:
    """Names of the modules around a tap, from the network ("") inwards."""
    parts = tap.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def _is_plain(module: nn.Module) -> bool:
    """Whether calling the children one after the other is what calling the module does."""
    return (
        type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def _calls(
    module: nn.Module, taps: Sequence[str], prefix: str = ""
) -> list[tuple[str, list[str], nn.Module]]:
    """(path, taps that are its output, module) of each call; containers with a tap inside are opened."""
    calls: list[tuple[str, list[str], nn.Module]] = []
    # Not named_children(), which leaves out the second place of an object.
    for name, child in module._modules.items():
        assert child is not None
        path = prefix + name
        if any(tap.startswith(path + ".") for tap in taps):
            calls += _calls(child, taps, path + ".")
        else:
            calls.append((path, [], child))
        if path in taps:
            calls[-1][1].append(path)
    return calls


def _leaves_input_alone(module: nn.Module) -> bool:
    if _is_plain(module) and module._modules:
        return _leaves_input_alone(next(iter(module.children())))
    return type(module).__module__ in _PURE and not getattr(module, "inplace", False)


def _least_side(module: nn.Module, axis: int, output: int = 1) -> int:
    """Pixels along an axis that a module needs to return `output` of them: never more than it does need."""
    if _is_plain(module):
        for child in reversed(module._modules.values()):
            assert child is not None
            output = _least_side(child, axis, output)
        return output
    if type(module) in (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d):

        def option(name: str, default: int) -> int:
            value = getattr(module, name, default)
            return int(value[axis] if isinstance(value, tuple) else value)

        if module.padding == "same":
            return output
        padding = 0 if module.padding == "valid" else option("padding", 0)
        window = option("dilation", 1) * (option("kernel_size", 1) - 1) + 1
        stride = option("stride", 1)
        # Rounded up, a window may begin in the last stride.
        begin = (output - 2) * stride + 1 if getattr(module, "ceil_mode", False) else (output - 1) * stride
        return max(1, begin + window - 2 * padding)
    return output if type(module).__module__ in _SAME_SIZE else 1


def _child_by_child(module: nn.Module, taps: Sequence[str]) -> tuple[nn.Sequential, list[_Step], bool]:
    """The network up to the last tap, its calls, and whether the images must be copied.

    An in-place activation right behind a tap, or in front, is replaced by its twin.
    """
    calls = _calls(module, taps)
    last = max(index for index, (_, tapped, _) in enumerate(calls) if tapped)
    features = nn.Sequential()
    steps: list[_Step] = []
    copies_images = False
    for index, (path, tapped, child) in enumerate(calls[: last + 1]):
        if index == 0 or steps[-1].taps:
            if type(child).__module__ == "torch.nn.modules.activation" and getattr(child, "inplace", False):
                child = copy.copy(child)
                child.inplace = False  # type: ignore[assignment]
            copied = not _leaves_input_alone(child)
            if index == 0:
                copies_images = copied
            else:
                steps[-1] = steps[-1]._replace(copied=copied)
        steps.append(_Step(path, tuple(tapped), False))
        parent: nn.Module = features
        *around, name = path.split(".")
        for container in around:
            if container not in parent._modules:
                parent.add_module(container, nn.Sequential())
            parent = parent.get_submodule(container)
        parent.add_module(name, child)
    return features, steps, copies_images
