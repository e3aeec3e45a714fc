"""Exported programs: right for every layout of what they are given, and their results survive a file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from harness import INTERPRETING, generator
from processes import fresh_python
from torch import Tensor, nn
from torch.utils import _pytree

import inpaint_kernels as ik
from inpaint_kernels.nn.perceptual import PerceptualStyle
from inpaint_kernels.objectives._trunk_passes import Truth
from inpaint_kernels.ops._named_tuples import serializable

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="runs no kernel of Triton"),
    # torch's own, while it loads a program.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"),
]

SIZE, OTHER_SIZE = (2, 4, 12, 14), (3, 4, 16, 22)


def masks(size: tuple[int, ...], channels: bool = True) -> dict[str, Tensor]:
    """Masks of one shape in memory of every kind; a program cannot tell them apart."""
    n, c, h, w = size
    full = (torch.rand(n, c if channels else 1, h, w, generator=generator(3)) < 0.6).float()
    wide = torch.zeros(n, full.shape[1], h, 2 * w)
    wide[..., ::2] = full.flip(-1)
    return {
        "expanded": full[:1, :1].expand(full.shape),
        "channel-expanded": full[:, :1].expand(full.shape),
        "batch-expanded": full[:1].expand(full.shape),
        "plain": full,
        "channels_last": full.flip(0).contiguous(memory_format=torch.channels_last),
        "sliced": wide[..., ::2],
    }


def saved_and_loaded(program: Any) -> Any:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file)


class Network(nn.Module):
    """Layers that share a mask, that hand it on, and that change its resolution."""

    def __init__(self, channels: bool, groups: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        options: dict[str, Any] = {"return_mask": True, "multi_channel": channels}
        self.first = ik.nn.PartialConv2d(4, 6, 3, padding=1, groups=groups, activation="relu", **options)
        self.side = ik.nn.PartialConv2d(4, 6, 3, padding=1, bias=False, **options)
        self.down = ik.nn.PartialConv2d(6, 8, 4, stride=2, padding="valid", groups=2, **options)

    def forward(self, x: Tensor, mask: Tensor) -> ik.PartialConvOutput:
        value, seen = self.first(x, mask)
        return self.down(value + self.side(x, mask_in=mask).output, seen)


def check_program(program: Any, network: nn.Module, *sizes: tuple[int, ...], channels: bool) -> None:
    module = program.module()
    for size in sizes:
        x = torch.randn(size, generator=generator(4))
        for layout in (torch.contiguous_format, torch.channels_last):
            x = x.contiguous(memory_format=layout)
            for name, mask in masks(size, channels).items():
                output = module(x, mask)
                assert type(output) is ik.PartialConvOutput
                for got, want in zip(output, network(x, mask), strict=True):
                    torch.testing.assert_close(
                        got, want, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                    )


# torch 2.13 loads no program of dynamic shapes whose example was "sliced". A strict export takes ten seconds or more.
@pytest.mark.parametrize(
    ("example", "channels", "groups", "dynamic", "strict"),
    [
        ("expanded", True, 1, False, False),
        ("expanded", False, 2, True, False),
        ("channel-expanded", True, 2, True, False),
        ("batch-expanded", False, 1, False, False),
        ("plain", True, 1, True, True),
        ("channels_last", False, 2, False, True),
        ("channels_last", True, 1, True, False),
    ],
)
def test_the_layout_of_the_example_is_not_kept(
    example: str, channels: bool, groups: int, dynamic: bool, strict: bool
) -> None:
    """Of torch's own operators only; right for masks of any strides, and for other sizes where they may change."""
    network = Network(channels, groups)
    x, mask = torch.randn(SIZE), masks(SIZE, channels)[example]
    shapes = [dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)] * 2 if dynamic else None
    with torch.no_grad():
        program = torch.export.export(network, (x, mask), dynamic_shapes=shapes, strict=strict)
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert not {name for name in called if "inpaint_kernels" in name}
        assert any(name.startswith("aten.conv2d") for name in called)
        sizes = (SIZE, OTHER_SIZE) if dynamic else (SIZE,)
        check_program(saved_and_loaded(program), network, *sizes, channels=channels)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
def test_a_traced_layer_keeps_no_layout() -> None:
    """torch.jit.trace, as the former ONNX exporter has it."""
    network = Network(True)
    with torch.no_grad(), pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(network, (torch.randn(SIZE), masks(SIZE)["expanded"]), check_trace=False)
    x = torch.randn(OTHER_SIZE)
    for mask in masks(OTHER_SIZE).values():
        for got, want in zip(traced(x, mask), network(x, mask), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# ---- named tuples ------------------------------------------------------------------------------------------------

RESULTS = (
    ik.HoleValid,
    ik.InpaintingPixel,
    ik.PartialConvOutput,
    ik.DiscriminatorLoss,
    PerceptualStyle,
    ik.objectives.DiscriminatorOutput,
    *(getattr(ik.objectives, name) for name in ik.objectives.__all__ if name.endswith("Terms")),
    Truth,
)


@pytest.mark.parametrize("kind", RESULTS, ids=lambda kind: kind.__name__)
def test_results_are_serialised_by_their_public_name(kind: Any) -> None:
    value = kind(*range(len(kind._fields)))
    _, spec = _pytree.tree_flatten(value)
    written = _pytree.treespec_dumps(spec)
    assert f"inpaint_kernels.{kind.__name__}" in written
    again = _pytree.tree_unflatten(list(value), _pytree.treespec_loads(written))
    assert type(again) is kind and again == value


class Losses(nn.Module):
    def forward(self, pred: Tensor, target: Tensor, mask: Tensor) -> Any:
        terms = ik.inpainting_pixel_loss(pred, target, mask)
        objective = ik.objectives.DeepFillObjective("v2", adversarial_weight=0)
        return {
            "pixel": terms,
            "hole_valid": ik.hole_valid_loss(pred, target, mask),
            "objective": objective(pred, target, mask),
        }


def test_named_tuples_come_back_from_a_file() -> None:
    pred, target = (torch.rand(2, 3, 8, 9, generator=generator(seed)) for seed in (0, 1))
    given = (pred, target, masks((2, 3, 8, 9), channels=False)["plain"])
    results = saved_and_loaded(torch.export.export(Losses(), given)).module()(*given)
    want = Losses()(*given)
    assert type(results["pixel"]) is ik.InpaintingPixel and type(results["hole_valid"]) is ik.HoleValid
    torch.testing.assert_close(results["pixel"].total, want["pixel"].total)
    torch.testing.assert_close(tuple(results["hole_valid"]), tuple(want["hole_valid"]))
    assert type(results["objective"]) is ik.objectives.DeepFillTerms
    torch.testing.assert_close(tuple(results["objective"]), tuple(want["objective"]))


def test_another_process_loads_the_program(tmp_path: Path) -> None:
    """Once it has imported the package."""
    path = tmp_path / "layer.pt2"
    x, mask = torch.randn(SIZE), masks(SIZE)["expanded"]
    torch.export.save(torch.export.export(Network(True).eval(), (x, mask)), path)
    code = f"""
import torch, inpaint_kernels as ik
program = torch.export.load({str(path)!r})
output = program.module()(torch.ones({SIZE}), torch.ones({SIZE}))
assert type(output) is ik.PartialConvOutput, type(output)
print(bool((output.new_mask == 1).all()))
"""
    done = fresh_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "True"


def test_a_result_is_registered_anew() -> None:
    """As by a package whose modules were purged and that is imported again."""
    kinds = [serializable(NamedTuple("Twice", [("value", int)])) for _ in range(2)]
    written = _pytree.treespec_dumps(_pytree.tree_flatten(kinds[1](1))[1])
    assert type(_pytree.tree_unflatten([2], _pytree.treespec_loads(written))) is kinds[1]
