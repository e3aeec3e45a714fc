"""Bad arguments of partial_conv2d and partial_conv3d: an error that names the argument, before any kernel runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from harness import Backend
from partial_conv_cases import (
    Case,
    exact_convolutions,  # noqa: F401
    make_tensors,
    run,
)
from pixel_cases import on_device
from torch import Tensor
from training_checks import ops_called

import inpaint_kernels as ik

SIZE = (4, 4, 8, 8)  # N = C: a mask (N, H, W) must not pass for (C, H, W)


def arguments(**replaced: object) -> dict[str, Any]:
    return {
        "input": torch.rand(SIZE),
        "weight": torch.rand(6, 4, 3, 3),
        "bias": torch.rand(6),
        "mask": torch.ones(4, 1, 8, 8),
    } | replaced


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


# (what is replaced, error, words of the message: the argument, what it got, what is allowed)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "input-list": ({"input": [1.0]}, TypeError, "input.*Tensor.*list"),
    "input-int": ({"input": ones(*SIZE, dtype=torch.int32)}, TypeError, "input.*float32.*int32"),
    "input-complex": ({"input": ones(*SIZE, dtype=torch.cfloat)}, TypeError, "input.*complex64"),
    "input-3d": ({"input": ones(4, 8, 8)}, ValueError, r"input.*\(N, C, H, W\).*\(4, 8, 8\)"),
    "input-5d": ({"input": ones(1, 4, 3, 8, 8)}, ValueError, r"input.*\(N, C, H, W\)"),
    "input-channels": ({"input": ones(4, 3, 8, 8)}, ValueError, r"weight.*\(6, 4, 3, 3\).*4 input.*3 channels"),
    "input-half": ({"input": ones(*SIZE).half()}, TypeError, "weight.*float32.*input.*float16"),
    "weight-none": ({"weight": None}, TypeError, "weight.*Tensor.*NoneType"),
    "weight-int": ({"weight": ones(6, 4, 3, 3, dtype=torch.int64)}, TypeError, "weight.*int64"),
    "weight-3d": ({"weight": ones(6, 4, 3)}, ValueError, r"weight.*\(Cout, Cin / groups, kh, kw\).*\(6, 4, 3\)"),
    "weight-device": ({"weight": ones(6, 4, 3, 3, device="meta")}, ValueError, "weight.*meta.*cpu"),
    "weight-large": ({"weight": ones(6, 4, 9, 3)}, ValueError, r"weight.*\(9, 3\).*\(4, 4, 8, 8\)"),
    "bias-float": ({"bias": 0.0}, TypeError, "bias.*Tensor.*float"),
    "bias-int": ({"bias": ones(6, dtype=torch.int32)}, TypeError, "bias.*int32"),
    "bias-size": ({"bias": ones(4)}, ValueError, r"bias.*\(6,\).*\(4,\)"),
    "bias-2d": ({"bias": ones(6, 1)}, ValueError, r"bias.*\(6,\).*\(6, 1\)"),
    "bias-device": ({"bias": ones(6, device="meta")}, ValueError, "bias.*meta.*cpu"),
    "mask-list": ({"mask": [[1.0]]}, TypeError, "mask.*Tensor.*list"),
    "mask-nhw": ({"mask": ones(4, 8, 8)}, ValueError, r"mask.*\(4, 8, 8\).*\(N, 1, H, W\)"),
    "mask-channels": ({"mask": ones(4, 2, 8, 8)}, ValueError, r"mask.*\(4, 2, 8, 8\)"),
    "mask-batch": ({"mask": ones(2, 1, 8, 8)}, ValueError, r"mask.*\(2, 1, 8, 8\)"),
    "mask-size": ({"mask": ones(4, 1, 1, 8)}, ValueError, r"mask.*\(4, 1, 1, 8\)"),
    "mask-plane": ({"mask": ones(8, 7)}, ValueError, r"mask.*\(8, 7\)"),
    "mask-0d": ({"mask": torch.tensor(1.0)}, ValueError, "mask"),
    "mask-complex": ({"mask": ones(4, 1, 8, 8, dtype=torch.cfloat)}, TypeError, "mask.*integer.*complex64"),
    "mask-device": ({"mask": ones(8, 8, device="meta")}, ValueError, "mask.*meta.*cpu"),
    "mask-of-many-for-one": (
        {"mask": ones(4, 4, 8, 8), "multi_channel": False},
        ValueError,
        "mask.*4 channels.*multi_channel.*False",
    ),
    "groups-0": ({"groups": 0}, ValueError, "groups.*positive.*0"),
    "groups-float": ({"groups": 2.0}, ValueError, "groups.*2.0"),
    "groups-3": ({"groups": 3}, ValueError, "groups=3"),
    "groups-outputs": ({"weight": ones(6, 1, 3, 3), "groups": 4}, ValueError, "groups=4.*multiple of 4"),
    "stride-0": ({"stride": 0}, ValueError, "stride.*at least 1.*0"),
    "stride-3": ({"stride": (1, 1, 1)}, ValueError, "stride.*2 ints"),
    "stride-float": ({"stride": (1.0, 2)}, ValueError, "stride"),
    "stride-number": ({"stride": 1.5}, ValueError, "stride.*2 ints.*1.5"),
    "padding-none": ({"padding": None}, ValueError, "padding.*2 ints.*None"),
    "dilation-0": ({"dilation": (1, 0)}, ValueError, r"dilation.*\(1, 0\)"),
    "dilation-large": ({"dilation": 5}, ValueError, r"dilation \(5, 5\)"),
    "padding-negative": ({"padding": -1}, ValueError, "padding.*at least 0.*-1"),
    "padding-word": ({"padding": "full"}, ValueError, "padding.*'same'.*'valid'.*'full'"),
    "padding-same-stride": ({"padding": "same", "stride": 2}, ValueError, "padding='same'.*stride"),
    "numerator": ({"numerator": "K"}, ValueError, "numerator.*'K'.*window.*one"),
    "mask_update": ({"mask_update": "soft"}, ValueError, "mask_update.*'soft'.*clamp.*binary.*proportional"),
    "activation": ({"activation": "gelu"}, ValueError, "activation.*'gelu'.*none.*relu.*leaky_relu"),
    "activation-none": ({"activation": None}, ValueError, "activation.*None"),
    "negative_slope": ({"negative_slope": -0.2}, ValueError, "negative_slope.*-0.2"),
    "negative_slope-nan": ({"negative_slope": float("nan")}, ValueError, "negative_slope.*nan"),
    "backend": ({"backend": "gpu"}, ValueError, "backend.*'gpu'.*reference"),
}  # fmt: skip


BAD_VOLUMES: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "volume-input-4d": ({"input": ones(*SIZE)}, ValueError, r"input.*\(N, C, D, H, W\)"),
    "volume-weight-4d": (
        {"weight": ones(6, 4, 3, 3)},
        ValueError,
        r"weight.*\(Cout, Cin / groups, kd, kh, kw\)",
    ),
    "volume-mask-ndhw": ({"mask": ones(2, 5, 8, 8)}, ValueError, r"mask.*\(2, 5, 8, 8\).*\(N, 1, D, H, W\)"),
    "volume-mask-image": ({"mask": ones(8, 8)}, ValueError, r"mask.*\(8, 8\).*\(D, H, W\)"),
    "volume-stride-2": ({"stride": (1, 1)}, ValueError, "stride.*3 ints"),
}
VOLUME = {"input": ones(2, 4, 5, 8, 8), "weight": ones(6, 4, 3, 3, 3), "mask": ones(2, 1, 5, 8, 8)}


@pytest.mark.parametrize("case", [*BAD, *BAD_VOLUMES])
def test_bad_input(case: str) -> None:
    function, good = (ik.partial_conv3d, VOLUME) if case in BAD_VOLUMES else (ik.partial_conv2d, arguments())
    replaced, error, words = {**BAD, **BAD_VOLUMES}[case]

    def call() -> None:
        with pytest.raises(error, match=f"(?s){words}"):
            function(**{**good, **replaced})

    ran = ops_called(call)
    assert not any(op.startswith("inpaint_kernels.") for op in ran), f"ran {ran} before the check"


class Pair(NamedTuple):
    y: float
    x: float


# (what passes, what equals it and is refused)
EQUAL: dict[str, tuple[str, object, object]] = {
    "stride": ("stride", (1, 1), (1.0, 1.0)),
    "stride-number": ("stride", 1, 1.0),
    "stride-list": ("stride", [1, 1], [1.0, 1.0]),
    "stride-pair": ("stride", Pair(1, 1), Pair(1.0, 1.0)),
    "padding": ("padding", (0, 0), (0.0, 0.0)),
    "dilation": ("dilation", (1, 1), (1.0, 1)),
    "groups": ("groups", 1, 1.0),
}


@pytest.mark.parametrize("case", EQUAL)
def test_numbers_equal_to_ints_that_went_before(case: str) -> None:
    """Python takes (1.0, 1.0) and (1, 1) for the same key."""
    name, good, bad = EQUAL[case]
    ik.partial_conv2d(**arguments(**{name: good}))
    with pytest.raises(ValueError, match=name):
        ik.partial_conv2d(**arguments(**{name: bad}))


def test_wrong_device_for_a_backend(kernel: Backend) -> None:
    tensors = {name: t.to("meta") for name, t in arguments().items()}
    with pytest.raises(RuntimeError, match=f"partial_conv.*{kernel.name}.*meta"):
        ik.partial_conv2d(**tensors, backend=kernel.name)


def test_a_mask_that_requires_a_gradient(backend: Backend) -> None:
    """Takes the differentiable reference, or says that it cannot; without grad mode it is a mask like others."""
    case = Case()
    x, w, b, mask = on_device(backend, *make_tensors(case))
    weighted = mask.clone().requires_grad_()
    if backend.name == "reference":
        assert run(backend, case, [x, w, b, weighted]).new_mask.requires_grad
    else:
        with pytest.raises(RuntimeError, match=f"{backend.name}.*mask.*reference.*detach"):
            run(backend, case, [x, w, b, weighted])
    output, new_mask = run(None, case, [x, w, b, weighted])
    assert output.requires_grad and new_mask.requires_grad
    with torch.no_grad():
        assert not run(backend, case, [x, w, b, weighted]).new_mask.requires_grad
