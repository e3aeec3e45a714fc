"""Bad arguments of the pixel losses: an error that names the argument, before any kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import Backend, backend_for
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
# The other losses have the normalisations of BAD_INPUTS.
OWN_NORMALIZE = ("total_variation", "stacked_images", "composite", "gradient")


def images(**replaced: object) -> dict[str, Any]:
    return {"pred": torch.rand(SIZE), "target": torch.rand(SIZE), "mask": torch.ones(3, 1, 8, 8)} | replaced


# (what is replaced, error, words of the message: the argument, what it got, what is allowed)
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
    "normalize": ({"normalize": "batch"}, ValueError, "normalize.*'batch'.*mask.*image.*sample"),
    "normalize-none": ({"normalize": None}, ValueError, "normalize.*None"),
    "backend": ({"backend": "gpu"}, ValueError, "backend.*'gpu'.*reference"),
}

TV_NORMALIZE = "'batch'.*pairs.*image.*mask"
NO_REGION = "normalize='mask'.*region other than 'image'"
OWN_OPTIONS = {
    "l1-reduction": ("l1", {"reduction": "avg"}, "reduction.*'avg'.*mean.*sum.*none"),
    "huber-reduction": ("huber", {"reduction": None}, "reduction.*None"),
    "l1-group-none": ("l1", {"process_group": object(), "reduction": "none"}, "process_group.*mean.*'none'"),
    "mse-group-sum": ("mse", {"process_group": object(), "reduction": "sum"}, "process_group.*mean.*'sum'"),
    "hole_valid-penalty": ("hole_valid", {"penalty": "L1"}, "penalty.*'L1'.*l1.*l2.*charbonnier.*huber"),
    "hole_valid-mask_is": ("hole_valid", {"mask_is": "known"}, "mask_is.*'known'.*valid.*hole"),
    "pixel-region": ("inpainting_pixel", {"tv_region": "border"}, "tv_region.*'border'.*image.*dilated_hole"),
    "pixel-penalty": ("inpainting_pixel", {"tv_penalty": "huber"}, "tv_penalty.*'huber'.*l1.*l2"),
    "pixel-tv_normalize": ("inpainting_pixel", {"tv_normalize": "batch"}, f"tv_normalize.*{TV_NORMALIZE}"),
    "pixel-no-region": (
        "inpainting_pixel",
        {"tv_region": "image", "tv_normalize": "mask"},
        "tv_normalize='mask'.*tv_region other than 'image'",
    ),
    "pixel-mask_is": ("inpainting_pixel", {"mask_is": "known"}, "mask_is.*'known'.*valid.*hole"),
    "pixel-nan": ("inpainting_pixel", {"tv_weight": float("nan")}, "tv_weight.*finite.*nan"),
    "pixel-inf": ("inpainting_pixel", {"hole_weight": float("inf")}, "hole_weight.*finite.*inf"),
    "tv-region": ("total_variation", {"region": "border"}, "region.*'border'.*image.*dilated_hole"),
    "tv-region-none": ("total_variation", {"region": None}, "region.*None"),
    "tv-penalty": ("total_variation", {"penalty": "L1"}, "penalty.*'L1'.*l1.*l2"),
    "tv-normalize": ("total_variation", {"normalize": "batch"}, f"normalize.*{TV_NORMALIZE}"),
    "tv-no-region": ("total_variation", {"region": "image", "normalize": "mask"}, NO_REGION),
    "tv-mask-unread": (
        "total_variation",
        {"target": None, "region": "image"},
        "region='image' reads no mask.*'dilated_hole'.*target=",
    ),
    "tv-mask_is": ("total_variation", {"mask_is": "known"}, "mask_is.*'known'.*valid.*hole"),
    "tv-mask-region": ("total_variation", {"mask": None, "target": None}, "mask.*missing.*region='hole'"),
    "tv-mask-target": ("total_variation", {"mask": None, "region": "image"}, "mask.*missing.*target"),
    "stacked-mask": ("stacked_images", {"mask": None}, "mask.*missing.*composite"),
    "stacked-hole": (
        "stacked_images",
        {"mask": None, "parts": ("raw", "hole_raw", "hole_target")},
        "mask.*missing.*'hole_raw', 'hole_target'",
    ),
    "stacked-part": ("stacked_images", {"parts": ("raw", "truth")}, "parts.*'truth'.*raw.*composite"),
    "stacked-empty": ("stacked_images", {"parts": ()}, "parts.*sequence"),
    "stacked-scale": ("stacked_images", {"scale": (1.0, 2.0)}, "scale has 2 entries.*3 channels"),
    "stacked-shift": ("stacked_images", {"shift": []}, "shift has 0 entries.*3 channels"),
    "stacked-nan": ("stacked_images", {"scale": (1.0, float("nan"), 1.0)}, r"scale\[1\].*finite.*nan"),
    "stacked-inf": ("stacked_images", {"shift": float("inf")}, r"shift.*finite.*inf"),
    "stacked-mask_is": ("stacked_images", {"mask_is": "known"}, "mask_is.*'known'.*valid.*hole"),
    "gradient-region": ("gradient", {"region": "first_pixel"}, "region.*'first_pixel'.*image.*hole.*ring"),
    "gradient-penalty": ("gradient", {"penalty": "huber"}, "penalty.*'huber'.*l1.*l2"),
    "gradient-ring": ("gradient", {"ring": -1}, "ring.*at least 0.*-1"),
    "gradient-mask": ("gradient", {"mask": None}, "mask.*missing.*region='ring'.*region='image'"),
    "gradient-mask_is": ("gradient", {"mask_is": "known"}, "mask_is.*'known'.*valid.*hole"),
    "composite-mask_is": ("composite", {"mask_is": "known"}, "mask_is.*'known'.*valid.*hole"),
}

GROUP = r"process_group.*torch\.distributed\.ProcessGroup"
WRONG_TYPES = {
    "l1-group": ("l1", {"process_group": "gloo"}, f"{GROUP}.*'gloo'"),
    "huber-group": ("huber", {"process_group": -100}, f"{GROUP}.*-100"),
    "hole_valid-group": ("hole_valid", {"process_group": "gloo"}, f"{GROUP}.*'gloo'"),
    "pixel-group": ("inpainting_pixel", {"process_group": True}, f"{GROUP}.*True"),
    "tv-group": ("total_variation", {"process_group": "gloo"}, f"{GROUP}.*'gloo'"),
    "gradient-group": ("gradient", {"process_group": "gloo"}, f"{GROUP}.*'gloo'"),
    "gradient-ring": ("gradient", {"ring": 1.0}, "ring.*integer.*float"),
    "pixel-string": ("inpainting_pixel", {"valid_weight": "1"}, "valid_weight.*number.*str"),
    "pixel-bool": ("inpainting_pixel", {"tv_weight": True}, "tv_weight.*number.*bool"),
    "pixel-none": ("inpainting_pixel", {"hole_weight": None}, "hole_weight.*number.*NoneType"),
    "pixel-mask": ("inpainting_pixel", {"mask": None}, "mask.*Tensor.*NoneType"),
    "stacked-string": ("stacked_images", {"scale": "abc"}, "scale.*number.*str"),
    "stacked-object": ("stacked_images", {"scale": object()}, "scale.*object"),
    "stacked-item": ("stacked_images", {"shift": (1.0, None, 1.0)}, r"shift\[1\].*number.*NoneType"),
    "stacked-tensor": ("stacked_images", {"scale": torch.ones(3)}, "scale.*number.*Tensor"),
    "stacked-parts": ("stacked_images", {"parts": None}, "parts.*sequence.*None"),
    "stacked-one-part": ("stacked_images", {"parts": "raw"}, "parts.*sequence.*'raw'"),
}

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


@pytest.mark.parametrize(
    ("loss", "case"),
    [
        (loss, case)
        for loss in LOSSES
        for case in BAD_INPUTS
        if not (case.startswith("normalize") and loss in OWN_NORMALIZE)
    ],
)
def test_bad_input(loss: str, case: str) -> None:
    replaced, error, words = BAD_INPUTS[case]
    if loss == "total_variation":
        words = words.replace("pred", "image")
    rejected(loss, images(**replaced), error, words)


@pytest.mark.parametrize("case", OWN_OPTIONS)
def test_bad_option(case: str) -> None:
    loss, replaced, words = OWN_OPTIONS[case]
    rejected(loss, images(**replaced), ValueError, words)


@pytest.mark.parametrize("case", WRONG_TYPES)
def test_option_of_wrong_type(case: str) -> None:
    loss, replaced, words = WRONG_TYPES[case]
    rejected(loss, images(**replaced), TypeError, words)


def test_scale_and_shift_of_a_single_channel_must_agree() -> None:
    one = {"pred": torch.rand(1, 1, 4, 4), "target": torch.rand(1, 1, 4, 4), "parts": ("raw",)}
    rejected(
        "stacked_images",
        one | {"scale": (1.0, 2.0, 3.0), "shift": (1.0, 2.0)},
        ValueError,
        "scale has 3 entries, shift has 2",
    )


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


def test_hole_valid_needs_a_mask() -> None:
    rejected("hole_valid", images(mask=None), TypeError, "mask.*Tensor.*NoneType")


@pytest.mark.parametrize("loss", LOSSES)
def test_good_input_of_every_kind_passes(backend: Backend, loss: str) -> None:
    """The checks must not be stricter than the documentation."""
    options = {"backend": backend_for(loss, backend)} | (
        {} if loss in OWN_NORMALIZE[1:] else {"normalize": "mask"}
    )

    def run(**replaced: Tensor) -> Tensor:
        inputs = {name: t.to(backend.device) for name, t in images(**replaced).items()}
        result = LOSSES[loss](**inputs, **options)
        return result.sum() if isinstance(result, Tensor) else result.hole + result.valid

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert run(pred=torch.rand(SIZE, dtype=dtype)).dtype == torch.float32
    for dtype in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.bool,
        torch.uint8,
        torch.int64,
    ):
        assert run(mask=torch.ones(3, 1, 8, 8, dtype=dtype)).isfinite()
    for shape in ((8, 8), (1, 1, 8, 8), (3, 1, 8, 8), (3, 3, 8, 8), (1, 3, 8, 8), (3, 1, 1, 8), (1, 1, 1, 1)):
        assert run(mask=torch.ones(shape)).isfinite()
