"""Bad arguments of the pixel losses: an error that names the argument, before any kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Backend, backend_for
from pixel_cases import MASK_DTYPES
from torch import Tensor
from training_checks import ops_called

import inpaint_kernels as ik

SIZE = (3, 3, 8, 8)  # N = C: a mask (N, H, W) must not pass for (C, H, W)

LOSSES: dict[str, Callable[..., Any]] = {
    "l1": ik.masked_l1_loss,
    "mse": ik.masked_mse_loss,
    "charbonnier": ik.masked_charbonnier_loss,
    "huber": ik.masked_huber_loss,
    "hole_valid": ik.hole_valid_loss,
    "inpainting_pixel": ik.inpainting_pixel_loss,
    "total_variation": lambda pred, **rest: ik.total_variation_loss(pred, **({"region": "hole"} | rest)),
    "stacked_images": ik.stacked_images,
    "composite": ik.composite,
    "gradient": ik.gradient_loss,
}
# Losses whose argument of this name is not that of BAD_INPUTS, or that have none.
WITHOUT: dict[str, tuple[str, ...]] = {
    "normalize": ("total_variation", "stacked_images", "composite", "gradient"),
    "mask_is": ("l1", "mse", "charbonnier", "huber"),
    "process_group": ("stacked_images", "composite"),
}


def images(**replaced: object) -> dict[str, Any]:
    return {"pred": torch.rand(SIZE), "target": torch.rand(SIZE), "mask": torch.ones(3, 1, 8, 8)} | replaced


GROUP = r"process_group.*torch\.distributed\.ProcessGroup"
# What is replaced, error, words of the message: the argument, what it got, what is allowed.
BAD_INPUTS = {
    "pred-list": ({"pred": [1.0]}, TypeError, "pred.*Tensor.*list"),
    "pred-none": ({"pred": None}, TypeError, "pred.*Tensor.*NoneType"),
    "pred-int": ({"pred": torch.ones(SIZE, dtype=torch.int32)}, TypeError, "pred.*float32.*int32"),
    "pred-bool": ({"pred": torch.ones(SIZE, dtype=torch.bool)}, TypeError, "pred.*float32.*bool"),
    "pred-complex": ({"pred": torch.ones(SIZE, dtype=torch.complex64)}, TypeError, "pred.*complex64"),
    "pred-float8": ({"pred": torch.ones(SIZE).to(torch.float8_e5m2)}, TypeError, "pred.*float8"),
    "pred-3d": ({"pred": torch.rand(3, 8, 8)}, ValueError, r"pred.*\(N, C, H, W\).*\(3, 8, 8\)"),
    "pred-5d": ({"pred": torch.rand(1, 3, 3, 8, 8)}, ValueError, r"pred.*\(N, C, H, W\)"),
    "pred-0d": ({"pred": torch.tensor(1.0)}, ValueError, r"pred.*\(N, C, H, W\)"),
    "target-float": ({"target": 0.0}, TypeError, "target.*Tensor.*float"),
    "target-int": ({"target": torch.ones(SIZE, dtype=torch.int64)}, TypeError, "target.*int64"),
    "target-broadcast": ({"target": torch.rand(1, 3, 8, 8)}, ValueError, r"target.*\(1, 3, 8, 8\)"),
    "target-size": (
        {"target": torch.rand(3, 3, 8, 9)},
        ValueError,
        r"target.*\(3, 3, 8, 9\).*\(3, 3, 8, 8\)",
    ),
    "target-3d": ({"target": torch.rand(3, 8, 8)}, ValueError, "target"),
    "target-device": ({"target": torch.rand(SIZE, device="meta")}, ValueError, "target.*meta.*cpu"),
    "mask-list": ({"mask": [[1.0]]}, TypeError, "mask.*Tensor.*list"),
    "mask-nhw": ({"mask": torch.ones(3, 8, 8)}, ValueError, r"mask.*\(3, 8, 8\).*\(N, 1, H, W\)"),
    "mask-1hw": ({"mask": torch.ones(1, 8, 8)}, ValueError, r"mask.*\(1, 8, 8\)"),
    "mask-channels": ({"mask": torch.ones(3, 2, 8, 8)}, ValueError, r"mask.*\(3, 2, 8, 8\)"),
    "mask-batch": ({"mask": torch.ones(2, 1, 8, 8)}, ValueError, r"mask.*\(2, 1, 8, 8\)"),
    "mask-size": ({"mask": torch.ones(3, 1, 4, 8)}, ValueError, r"mask.*\(3, 1, 4, 8\)"),
    "mask-plane": ({"mask": torch.ones(8, 7)}, ValueError, r"mask.*\(8, 7\)"),
    "mask-0d": ({"mask": torch.tensor(1.0)}, ValueError, "mask"),
    "mask-5d": ({"mask": torch.ones(1, 3, 1, 8, 8)}, ValueError, "mask"),
    "mask-complex": ({"mask": torch.ones(3, 1, 8, 8, dtype=torch.cfloat)}, TypeError, "mask.*complex64"),
    "mask-device": ({"mask": torch.ones(8, 8, device="meta")}, ValueError, "mask.*meta.*cpu"),
    "mask-float8": ({"mask": torch.ones(8, 8).to(torch.float8_e4m3fn)}, TypeError, "mask.*float8"),
    "normalize": ({"normalize": "batch"}, ValueError, "normalize.*'batch'.*mask.*image.*sample"),
    "normalize-none": ({"normalize": None}, ValueError, "normalize.*None"),
    "mask_is": ({"mask_is": "known"}, ValueError, "mask_is.*'known'.*valid.*hole"),
    "process_group": ({"process_group": "gloo"}, TypeError, GROUP),
    "process_group-number": ({"process_group": -100}, TypeError, GROUP),
    "process_group-bool": ({"process_group": True}, TypeError, GROUP),
    "backend": ({"backend": "gpu"}, ValueError, "backend.*'gpu'.*reference"),
}

TV_NORMALIZE = "'batch'.*pairs.*image.*mask"
NO_REGION = "normalize='mask'.*region other than 'image'"
ONE = torch.rand(1, 1, 4, 4)
OWN_OPTIONS: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("l1", {"reduction": "avg"}, ValueError, "reduction.*'avg'.*mean.*sum.*none"),
    ("huber", {"reduction": None}, ValueError, "reduction.*None"),
    ("l1", {"process_group": object(), "reduction": "none"}, ValueError, "process_group.*mean.*'none'"),
    ("mse", {"process_group": object(), "reduction": "sum"}, ValueError, "process_group.*mean.*'sum'"),
    ("hole_valid", {"penalty": "L1"}, ValueError, "penalty.*'L1'.*l1.*l2.*charbonnier.*huber"),
    ("inpainting_pixel", {"tv_region": "border"}, ValueError, "tv_region.*'border'.*image.*dilated_hole"),
    ("inpainting_pixel", {"tv_penalty": "huber"}, ValueError, "tv_penalty.*'huber'.*l1.*l2"),
    ("inpainting_pixel", {"tv_normalize": "batch"}, ValueError, f"tv_normalize.*{TV_NORMALIZE}"),
    (
        "inpainting_pixel",
        {"tv_region": "image", "tv_normalize": "mask"},
        ValueError,
        "tv_normalize='mask'.*tv_region other than 'image'",
    ),
    ("inpainting_pixel", {"tv_weight": float("nan")}, ValueError, "tv_weight.*finite.*nan"),
    ("inpainting_pixel", {"hole_weight": float("inf")}, ValueError, "hole_weight.*finite.*inf"),
    ("total_variation", {"region": "border"}, ValueError, "region.*'border'.*image.*dilated_hole"),
    ("total_variation", {"region": None}, ValueError, "region.*None"),
    ("total_variation", {"penalty": "L1"}, ValueError, "penalty.*'L1'.*l1.*l2"),
    ("total_variation", {"normalize": "batch"}, ValueError, f"normalize.*{TV_NORMALIZE}"),
    ("total_variation", {"region": "image", "normalize": "mask"}, ValueError, NO_REGION),
    (
        "total_variation",
        {"target": None, "region": "image"},
        ValueError,
        "region='image' reads no mask.*'dilated_hole'.*target=",
    ),
    ("total_variation", {"mask": None, "target": None}, ValueError, "mask.*missing.*region='hole'"),
    ("total_variation", {"mask": None, "region": "image"}, ValueError, "mask.*missing.*target"),
    ("stacked_images", {"mask": None}, ValueError, "mask.*missing.*composite"),
    (
        "stacked_images",
        {"mask": None, "parts": ("raw", "hole_raw", "hole_target")},
        ValueError,
        "mask.*missing.*'hole_raw', 'hole_target'",
    ),
    ("stacked_images", {"parts": ("raw", "truth")}, ValueError, "parts.*'truth'.*raw.*composite"),
    ("stacked_images", {"parts": ()}, ValueError, "parts.*sequence"),
    ("stacked_images", {"scale": (1.0, 2.0)}, ValueError, "scale has 2 entries.*3 channels"),
    ("stacked_images", {"shift": []}, ValueError, "shift has 0 entries.*3 channels"),
    ("stacked_images", {"scale": (1.0, float("nan"), 1.0)}, ValueError, r"scale\[1\].*finite.*nan"),
    ("stacked_images", {"shift": float("inf")}, ValueError, r"shift.*finite.*inf"),
    ("gradient", {"region": "first_pixel"}, ValueError, "region.*'first_pixel'.*image.*hole.*ring"),
    ("gradient", {"penalty": "huber"}, ValueError, "penalty.*'huber'.*l1.*l2"),
    ("gradient", {"ring": -1}, ValueError, "ring.*at least 0.*-1"),
    ("gradient", {"mask": None}, ValueError, "mask.*missing.*region='ring'.*region='image'"),
    ("gradient", {"ring": 1.0}, TypeError, "ring.*integer.*float"),
    ("inpainting_pixel", {"valid_weight": "1"}, TypeError, "valid_weight.*number.*str"),
    ("inpainting_pixel", {"tv_weight": True}, TypeError, "tv_weight.*number.*bool"),
    ("inpainting_pixel", {"hole_weight": None}, TypeError, "hole_weight.*number.*NoneType"),
    ("stacked_images", {"scale": "abc"}, TypeError, "scale.*number.*str"),
    ("stacked_images", {"scale": object()}, TypeError, "scale.*object"),
    ("stacked_images", {"shift": (1.0, None, 1.0)}, TypeError, r"shift\[1\].*number.*NoneType"),
    ("stacked_images", {"scale": torch.ones(3)}, TypeError, "scale.*number.*Tensor"),
    ("stacked_images", {"parts": None}, TypeError, "parts.*sequence.*None"),
    ("stacked_images", {"parts": "raw"}, TypeError, "parts.*sequence.*'raw'"),
    (
        "stacked_images",
        {"pred": ONE, "target": ONE, "parts": ("raw",), "scale": (1.0, 2.0, 3.0), "shift": (1.0, 2.0)},
        ValueError,
        "scale has 3 entries, shift has 2",
    ),
    *(
        (loss, {"mask": None}, TypeError, "mask.*Tensor.*NoneType")
        for loss in ("hole_valid", "inpainting_pixel")
    ),
]

PARAMETERS = {
    "charbonnier": ("charbonnier", "eps", {}),
    "huber": ("huber", "delta", {}),
    "hole_valid-charbonnier": ("hole_valid", "eps", {"penalty": "charbonnier"}),
    "hole_valid-huber": ("hole_valid", "delta", {"penalty": "huber"}),
}


def rejected(loss: str, arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    def call() -> None:
        with pytest.raises(error, match=f"(?s){words}"):
            LOSSES[loss](**arguments)

    ran = ops_called(call)
    assert not any(op.startswith("inpaint_kernels.") for op in ran), f"ran {ran} before the check"


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_bad_input(loss: str, case: str) -> None:
    if loss in WITHOUT.get(case.partition("-")[0], ()):
        pytest.skip("has another or no such argument")
    replaced, error, words = BAD_INPUTS[case]
    if loss == "total_variation":
        words = words.replace("pred", "image")
    rejected(loss, images(**replaced), error, words)


@pytest.mark.parametrize(("loss", "replaced", "error", "words"), OWN_OPTIONS)
def test_bad_option(loss: str, replaced: dict[str, Any], error: type[Exception], words: str) -> None:
    rejected(loss, images(**replaced), error, words)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-30])
@pytest.mark.parametrize("case", PARAMETERS)
def test_bad_penalty_parameter(case: str, value: float) -> None:
    """A zero eps would make the gradient 0/0 where pred equals target, and so does one that float32 squares to 0."""
    loss, name, options = PARAMETERS[case]
    rejected(loss, images(**options, **{name: value}), ValueError, f"{name}.*{value!r}".replace("+", r"\+"))


@pytest.mark.parametrize("value", ["0.1", None])
@pytest.mark.parametrize("case", PARAMETERS)
def test_penalty_parameter_of_wrong_type(case: str, value: object) -> None:
    loss, name, options = PARAMETERS[case]
    rejected(loss, images(**options, **{name: value}), TypeError, name)


@pytest.mark.parametrize("loss", LOSSES)
def test_good_input_of_every_kind_passes(backend: Backend, loss: str) -> None:
    """The checks must not be stricter than the documentation."""
    own = loss in WITHOUT["normalize"] and loss != "total_variation"
    options = {"backend": backend_for(loss, backend)} | ({} if own else {"normalize": "mask"})

    def run(**replaced: Tensor) -> Tensor:
        inputs = {name: t.to(backend.device) for name, t in images(**replaced).items()}
        result = LOSSES[loss](**inputs, **options)
        return result.sum() if isinstance(result, Tensor) else result.hole + result.valid

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert run(pred=torch.rand(SIZE, dtype=dtype)).dtype == torch.float32
    for dtype in (*MASK_DTYPES.values(), torch.int64):
        assert run(mask=torch.ones(3, 1, 8, 8, dtype=dtype)).isfinite()
    for shape in ((8, 8), (1, 1, 8, 8), (3, 1, 8, 8), (3, 3, 8, 8), (1, 3, 8, 8), (3, 1, 1, 8), (1, 1, 1, 1)):
        assert run(mask=torch.ones(shape)).isfinite()
