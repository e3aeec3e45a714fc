"""Feature matching against the code of pix2pixHD and LaMa; its kernels are those of feature_distance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import Backend, generator
from torch import Tensor

import inpaint_kernels as ik

SHAPES = ((2, 3, 8, 10), (2, 5, 4, 5), (2, 4, 3, 3))


def features(
    seed: int, dtype: torch.dtype = torch.float32, device: str = "cpu", batches: int = 1
) -> list[Tensor]:
    rng = generator(seed)
    shapes = [(batches * n, *rest) for n, *rest in SHAPES]
    return [torch.randn(shape, generator=rng).to(device, dtype).requires_grad_() for shape in shapes]


def test_pix2pixhd(backend: Backend) -> None:
    """Factor 4 / (n_layers + 1) for each layer, 1 / num_D for each discriminator, logits left out, real detached."""
    fake, real = ([features(10 * i + k, device=backend.device) for k in range(2)] for i in (1, 2))
    expected: Any = 0
    for i in range(2):
        for x, y in zip(fake[i], real[i], strict=True):
            expected = expected + 4 / 5 / 2 * F.l1_loss(x, y.detach())
    found = ik.feature_matching_loss(fake, real, weights=[4 / 5] * 3, backend=backend.name)
    torch.testing.assert_close(found, expected)
    leaves = [x for layers in fake for x in layers]
    torch.testing.assert_close(torch.autograd.grad(found, leaves), torch.autograd.grad(expected, leaves))
    assert all(y.grad is None for layers in real for y in layers)
    again = ik.feature_matching_loss(fake, real, backend=backend.name)
    again.backward()
    assert all(y.grad is None for layers in real for y in layers)


@pytest.mark.parametrize("kind", [None, "fractions", "hw", "bool", "0/255"])
def test_lama(backend: Backend, kind: str | None) -> None:
    """Squared, mean over layers; with a mask resized to each, divided by the number of elements."""
    fake, real = features(1, device=backend.device, batches=2), features(2, device=backend.device)
    mask = torch.rand(2, 1, 16, 16, generator=generator(3)).to(backend.device)
    mask = mask if kind == "fractions" else mask.round()
    mask = mask[0, 0] if kind == "hw" else mask
    expected: Any = 0
    for x, y in zip(fake, real, strict=True):
        value = F.mse_loss(x, torch.cat([y, y]), reduction="none")
        if kind is not None:
            size = x.shape[-2:]
            small = F.interpolate(mask.reshape(-1, 1, 16, 16), size, mode="bilinear", align_corners=False)
            value = value * (small if kind == "hw" else torch.cat([small, small]))
        expected = expected + value.mean() / 3
    given = {"bool": mask.bool(), "0/255": (255 * mask).byte(), None: None}.get(kind, mask)
    loss = ik.nn.FeatureMatchingLoss(penalty="l2", layer_reduction="mean")
    found = loss(fake, real, given)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, fake), torch.autograd.grad(expected, fake))
    options = {"penalty": "l2", "layer_reduction": "mean", "mask": given, "backend": backend.name}
    torch.testing.assert_close(ik.feature_matching_loss(fake, real, **options), found)


def test_discriminators_of_different_depth_count_the_same() -> None:
    fake, real = features(1), features(2)
    found = ik.feature_matching_loss([fake, fake[:1]], [real, real[:1]], layer_reduction="mean")
    alone = [ik.feature_matching_loss(fake[:n], real[:n], layer_reduction="mean") for n in (3, 1)]
    torch.testing.assert_close(found, sum(alone) / 2)
    assert torch.equal(ik.feature_matching_loss(fake[0], real[0]), ik.feature_distance(fake[0], real[0]))


def test_gradients_of_mask_and_weights() -> None:
    fake, real = features(1, torch.float64), features(2, torch.float64)
    # A numerical derivative by every pixel: few of the first layer.
    fake[0], real[0] = (layers[0][..., :3, :4].detach().requires_grad_() for layers in (fake, real))
    mask = torch.rand(2, 1, 4, 4, generator=generator(3), dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, generator=generator(4), dtype=torch.float64, requires_grad=True)

    def call(x: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
        layers = [x, *fake[1:]]
        return ik.feature_matching_loss(
            [layers, fake], [real, real], weights=weights, mask=mask, penalty="l2"
        )

    assert torch.autograd.gradcheck(call, (fake[0], mask, weights))
    assert torch.autograd.gradgradcheck(call, (fake[0], mask, weights))


def test_compiles_whole() -> None:
    def step(fake: list[Tensor], real: list[Tensor], mask: Tensor) -> Tensor:
        return ik.feature_matching_loss([fake, fake], [real, real], mask=mask)

    fake, real, mask = features(1), features(2), torch.rand(2, 1, 6, 6, generator=generator(3))
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(fake, real, mask), step(fake, real, mask))


A = [torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 2, 2)]
META = [a.to("meta") for a in A]
# (fake, real, options, error, words of the message)
BAD: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "empty": ([], [], {}, TypeError, "fake.*non-empty"),
    "empty-critic": ([A, []], [A, A], {}, TypeError, r"fake\[1\].*non-empty"),
    "no-layers": (A, [1.0], {}, TypeError, r"real\[0\].*Tensor.*float"),
    "rank": ([A[0][0]], A[:1], {}, ValueError, r"fake\[0\].*\(N, C, H, W\)"),
    "critics": ([A], [A, A], {}, ValueError, "fake.*1.*real.*2"),
    "layers": ([A, A], [A, A[:1]], {}, ValueError, r"fake\[1\].*2.*real\[1\].*1"),
    "shape": ([A], [A[::-1]], {}, ValueError, r"real\[0\]\[0\].*fake\[0\]\[0\]"),
    "batch": (A[0], A[0][:0], {}, ValueError, "real.*multiple"),
    "device": (A, [META[0], A[1]], {}, ValueError, r"real\[0\] on meta"),
    "device-critic": (
        [A, META],
        [A, META],
        {},
        ValueError,
        r"fake\[1\]\[0\] is on meta.*fake\[0\]\[0\] on cpu",
    ),
    "mask": (A, A, {"mask": torch.ones(3, 1, 4, 4)}, ValueError, r"mask.*fake\[0\]"),
    "weights": (A, A, {"weights": [1.0]}, ValueError, "weights.*1.*2"),
    "penalty": (A, A, {"penalty": "huber"}, ValueError, "penalty.*'huber'"),
    "reduction": (A, A, {"layer_reduction": "max"}, ValueError, "layer_reduction"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    fake, real, options, error, words = BAD[case]
    with pytest.raises(error, match=words):
        ik.feature_matching_loss(fake, real, **options)
