"""Bad arguments of gram_matrix, style_loss and feature_distance: an error that names them, before any kernel runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Backend
from training_checks import ops_called

from inpaint_kernels.ops.feature_distance import feature_distance
from inpaint_kernels.ops.gram import gram_matrix
from inpaint_kernels.ops.style import style_loss

SIZE = (4, 3, 8, 8)


def features(*size: int, **options: Any) -> torch.Tensor:
    return torch.rand(size or SIZE, **options)


# (what is replaced, error, words of the message: the argument, what it got, what is allowed)
Row = tuple[dict[str, Any], type[Exception] | tuple[type[Exception], ...], str]
BAD_GRAM: dict[str, Row] = {
    "none": ({"features": None}, TypeError, "features.*Tensor.*NoneType"),
    "list": ({"features": [features()]}, TypeError, "features.*Tensor.*list"),
    "int": ({"features": features().int()}, TypeError, "features.*float32.*int32"),
    "complex": ({"features": features().to(torch.complex64)}, TypeError, "features.*complex64"),
    "3d": ({"features": features(3, 8, 8)}, ValueError, r"features.*\(N, C, H, W\).*\(3, 8, 8\)"),
    "normalize": ({"normalize": "gatys"}, ValueError, "normalize.*'gatys'.*'chw', 'hw', 'none'"),
    "backend": ({"backend": "gpu"}, ValueError, "backend.*'gpu'.*cpu"),
}
BAD_LAYERS: dict[str, Row] = {
    "input-none": ({"input": None}, TypeError, "input.*NoneType"),
    "input-empty": ({"input": [], "target": []}, TypeError, "input.*non-empty"),
    "input-item": ({"input": [features(), 3], "target": [features()] * 2}, TypeError, r"input\[1\].*int"),
    "input-dtype": ({"input": features().long()}, TypeError, r"input\[0\].*int64"),
    "input-3d": ({"input": features(3, 8, 8)}, ValueError, r"input\[0\].*\(3, 8, 8\)"),
    "target-dtype": ({"target": features().bool()}, TypeError, r"target\[0\].*bool"),
    "target-layers": ({"target": [features()] * 2}, ValueError, "input has 1 layers, target has 2"),
    "target-batch": (
        {"target": features(3, 3, 8, 8)},
        ValueError,
        r"input\[0\].*4.*target\[0\].*3.*multiple",
    ),
    "input-batch-0": (
        {"input": features(0, 3, 8, 8)},
        ValueError,
        r"input\[0\].*0.*target\[0\].*4.*1 or more",
    ),
    "target-batch-0": ({"target": features(0, 3, 8, 8)}, ValueError, r"input\[0\].*4.*target\[0\].*0"),
    "target-device": ({"target": features(device="meta")}, ValueError, "cpu.*meta"),
    "layer-device": (
        {side: [features(), features(device="meta")] for side in ("input", "target")},
        ValueError,
        "layer 1.*meta.*cpu",
    ),
    "weights-count": ({"weights": [1.0, 2.0]}, ValueError, "weights.*2 entries for 1"),
    "weights-text": ({"weights": "ab"}, (TypeError, ValueError), "weights"),
    "penalty": ({"penalty": "huber"}, ValueError, "penalty.*'huber'.*'l1', 'l2'"),
    "backend": ({"backend": "gpu"}, ValueError, "backend.*'gpu'.*cpu"),
}
BAD_STYLE: dict[str, Row] = {
    "target-channels": ({"target": features(4, 5, 8, 8)}, ValueError, r"target\[0\].*5.*3"),
    "normalize": ({"normalize": "chwn"}, ValueError, "normalize.*'chwn'.*'gatys'"),
    "gatys-l1": ({"normalize": "gatys", "penalty": "l1"}, ValueError, "gatys.*l2"),
    "gram-4d": ({"target_is_gram": True}, ValueError, r"target\[0\].*\(4, 3, 8, 8\).*\(N, 3, 3\)"),
    "gram-channels": (
        {"target_is_gram": True, "target": features(4, 5, 5)},
        ValueError,
        r"target\[0\].*\(4, 5, 5\).*\(N, 3, 3\)",
    ),
    "gram-batch": ({"target_is_gram": True, "target": features(3, 3, 3)}, ValueError, r"target\[0\].*3"),
    "gram-dtype": ({"target_is_gram": True, "target": features(4, 3, 3).int()}, TypeError, r"target\[0\]"),
}
SHAPES = r"target\[0\].*\(4, 3, 8, 9\).*\(4, 3, 8, 8\)"
BAD_DISTANCE: dict[str, Row] = {
    "target-size": ({"target": features(4, 3, 8, 9)}, ValueError, SHAPES),
    "target-channels": ({"target": features(4, 1, 8, 8)}, ValueError, r"target\[0\].*\(4, 1, 8, 8\)"),
    "mask-list": ({"mask": [[1.0]]}, TypeError, "mask.*Tensor.*list"),
    "mask-layers": ({"mask": [torch.ones(8, 8)] * 2}, ValueError, "mask has 2 layers, input has 1"),
    "mask-dtype": ({"mask": torch.ones(8, 8, dtype=torch.cfloat)}, TypeError, "mask.*complex64"),
    "mask-nhw": ({"mask": torch.ones(4, 8, 8)}, ValueError, r"mask.*\(4, 8, 8\).*\(N, 1, H, W\)"),
    "mask-batch": ({"mask": torch.ones(3, 1, 8, 8)}, ValueError, r"mask.*\(3, 1, 8, 8\)"),
    "mask-channels": ({"mask": torch.ones(4, 2, 8, 8)}, ValueError, r"mask.*\(4, 2, 8, 8\)"),
    "mask-size": ({"mask": torch.ones(4, 1, 16, 16)}, ValueError, r"mask.*\(4, 1, 16, 16\)"),
    "mask-device": ({"mask": torch.ones(8, 8, device="meta")}, ValueError, "mask.*meta.*cpu"),
    "penalty": ({"penalty": "huber"}, ValueError, "penalty.*'huber'.*'charbonnier'"),
    "normalize": ({"normalize": "sample"}, ValueError, "normalize.*'sample'.*'mask', 'image'"),
    "layer-reduction": ({"layer_reduction": "none"}, ValueError, "layer_reduction.*'none'.*'sum', 'mean'"),
    "eps-0": ({"penalty": "charbonnier", "eps": 0.0}, ValueError, "eps.*0.0"),
    "eps-nan": ({"penalty": "charbonnier", "eps": float("nan")}, ValueError, "eps.*nan"),
}
CASES = {
    f"{name}-{case}": (function, *row)
    for name, function, rows in (
        ("gram", gram_matrix, BAD_GRAM),
        ("style", style_loss, BAD_LAYERS | BAD_STYLE),
        ("distance", feature_distance, BAD_LAYERS | BAD_DISTANCE),
    )
    for case, row in rows.items()
}


@pytest.mark.parametrize("case", CASES)
def test_bad_arguments(case: str) -> None:
    function, replaced, error, words = CASES[case]
    arguments = (
        {"features": features()} if case.startswith("gram") else {"input": features(), "target": features()}
    )

    def call() -> None:
        with pytest.raises(error, match=words):
            function(**(arguments | replaced))

    assert not [op for op in ops_called(call) if op.startswith("inpaint_kernels")]


def test_good_arguments(backend: Backend) -> None:
    """What the refusals above must not refuse."""
    x = features(device=backend.device)
    one = {"backend": backend.name}
    for found in (
        gram_matrix(x, **one),
        style_loss(x, x[:2], weights=2, **one),
        style_loss((x,), [x[:1]], weights=(0.5,), **one),
        style_loss(x, x[:2, :, :3, :5], **one),
        feature_distance((x, x), (x, x[:1]), mask=[x[:, :1], x[0, 0]], **one),
        feature_distance(x, x[:2], mask=x[:2, :, :1, :1], layer_reduction="mean", **one),
        feature_distance(x, x, weights=-1, eps=-5.0, **one),
    ):
        assert found.dtype == torch.float32
        assert found.isfinite().all()


@pytest.mark.parametrize("function", [style_loss, feature_distance])
def test_meta_tensors_and_wrong_devices(function: Any) -> None:
    """A kernel of another device says so."""
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run"):
        function(features(), features(), backend="cuda")
