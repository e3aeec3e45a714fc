"""Generator's and discriminator's losses against the code people write, and what holds for any logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from harness import DTYPES, generator, grid
from torch import Tensor

import inpaint_kernels as ik
from inpaint_kernels.ops.adversarial import MODES

# By mode, on logits: the generator's loss of a fake, the discriminator's of a real and of a fake, as usually written.
USUAL: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "nonsaturating": (lambda x: bce(x, 1), lambda x: bce(x, 1), lambda x: bce(x, 0)),
    "minimax": (lambda x: -bce(x, 0), lambda x: bce(x, 1), lambda x: bce(x, 0)),
    "hinge": (lambda x: -x, lambda x: F.relu(1 - x), lambda x: F.relu(1 + x)),
    "lsgan": (lambda x: mse(x, 1), lambda x: mse(x, 1), lambda x: mse(x, 0)),
    "wgan": (lambda x: -x, lambda x: -x, lambda x: x),
    "clamped_bce": (lambda x: log_loss(x, 1), lambda x: log_loss(x, 1), lambda x: log_loss(x, 0)),
}
# logit, then log-loss of its float32 sigmoid and the derivative by the logit, label 1 and label 0: what the released
# code of CTN and T-former computes (PyTorch clamps the logs at -100 and p (1 - p) at 1e-12).
LOG_LOSS = """
-120  1.000000000e+02  0.000000000e+00   0.000000000e+00  0.000000000e+00
 -95  1.000000000e+02  0.000000000e+00   0.000000000e+00  0.000000000e+00
 -30  3.000000000e+01 -9.357623756e-02   9.357623590e-14  8.756512259e-15
 -17  1.700000000e+01 -9.999998808e-01   4.139937815e-08  4.139937815e-08
  -3  3.048587322e+00 -9.525741339e-01   4.858735204e-02  4.742587358e-02
-0.5  9.740769863e-01 -6.224592924e-01   4.740769863e-01  3.775406480e-01
   0  6.931471825e-01 -5.000000000e-01   6.931471825e-01  5.000000000e-01
 0.5  4.740769565e-01 -3.775406480e-01   9.740770459e-01  6.224593520e-01
   3  4.858734459e-02 -4.742586613e-02   3.048587561e+00  9.525740743e-01
  10  4.541977250e-05 -4.541873932e-05   9.999586105e+00  9.999545813e-01
16.5  1.192092896e-07 -1.192092896e-07   1.594238472e+01  9.999998808e-01
17.5  0.000000000e+00  0.000000000e+00   1.000000000e+02  0.000000000e+00
  30  0.000000000e+00  0.000000000e+00   1.000000000e+02  0.000000000e+00
 120  0.000000000e+00  0.000000000e+00   1.000000000e+02  0.000000000e+00
"""


def bce(x: Tensor, label: float) -> Tensor:
    return F.binary_cross_entropy_with_logits(x, torch.full_like(x, label), reduction="none")


def mse(x: Tensor, label: float) -> Tensor:
    return F.mse_loss(x, torch.full_like(x, label), reduction="none")


def log_loss(x: Tensor, label: float) -> Tensor:
    return F.binary_cross_entropy(torch.sigmoid(x), torch.full_like(x, label), reduction="none")


def logits_of(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(shape, generator=generator(seed), dtype=torch.float64)).to(dtype).requires_grad_()


def both(
    mode: str, real: Any, fake: Any, mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Generator's loss and the discriminator's total."""
    extra = {"extra_hole_weight": 2.5} if mask is not None else {}
    total = ik.discriminator_loss(real, fake, mode=mode, mask=mask, **options).total
    return ik.generator_loss(fake, mode=mode, mask=mask, **extra), total


def gradients(outputs: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(outputs), inputs)


@grid(mode=MODES, dtype=DTYPES)
def test_values_and_gradients_are_those_of_the_usual_code(mode: str, dtype: str) -> None:
    real, fake = (logits_of(3, 1, 4, 5, seed=seed, dtype=DTYPES[dtype]) for seed in (1, 2))
    generated, as_real, as_fake = USUAL[mode]
    wide = torch.float64 if dtype == "f64" else torch.float32
    expected = (generated(fake.to(wide)).mean(), as_real(real.to(wide)).mean(), as_fake(fake.to(wide)).mean())
    found = ik.discriminator_loss(real, fake, mode=mode)
    loss = ik.generator_loss(fake, mode=mode)
    assert {loss.dtype, found.total.dtype, found.real.dtype, found.fake.dtype} == {wide}
    torch.testing.assert_close((loss, found.real, found.fake), expected)
    torch.testing.assert_close(found.total, expected[1] + expected[2])
    torch.testing.assert_close(ik.discriminator_loss(real, fake, mode=mode, half=True).total, found.total / 2)
    # Of each loss by itself: in sums the two of a fake may cancel.
    for i, logits in ((0, fake), (1, real), (2, fake)):
        value = (loss, found.real, found.fake)[i]
        torch.testing.assert_close(gradients([value], logits), gradients([expected[i]], logits))


def test_log_loss_on_a_sigmoid_is_that_of_released_code() -> None:
    table = torch.tensor([[float(n) for n in row.split()] for row in LOG_LOSS.split("\n") if row])
    for logit, *numbers in table:
        x = logit.clone().requires_grad_()
        real, fake = ik.discriminator_loss(x, x, mode="clamped_bce")[1:]
        found = (real, *gradients([real], x), fake, *gradients([fake], x))
        torch.testing.assert_close(torch.stack(found), torch.stack(numbers), rtol=1e-6, atol=0)
        assert torch.equal(ik.generator_loss(x, mode="clamped_bce"), real)


@pytest.mark.parametrize("mode", ["nonsaturating", "minimax"])
def test_large_logits_keep_their_gradient(mode: str) -> None:
    x = torch.tensor([-1e4, 1e4], requires_grad=True)
    real, fake = ik.discriminator_loss(x, x, mode=mode)[1:]
    assert real.item() == fake.item() == 5e3
    assert gradients([real], x)[0].tolist() == [-0.5, 0] and gradients([fake], x)[0].tolist() == [0, 0.5]
    exact = torch.log1p(torch.tensor(25.0).double().exp())
    torch.testing.assert_close(
        ik.discriminator_loss(*torch.full((2, 1), 25.0).double()).fake, exact, rtol=0, atol=0
    )


@pytest.mark.parametrize("mode", ["nonsaturating", "minimax", "lsgan", "clamped_bce"])
def test_smoothing_changes_the_label_of_real_logits_alone(mode: str) -> None:
    real, fake = logits_of(3, 1, 4, 5), logits_of(3, 1, 4, 5, seed=1)
    function = {"lsgan": mse, "clamped_bce": log_loss}.get(mode, bce)
    mask = (torch.rand(3, 1, 8, 8, generator=generator(3)) > 0.5).double()
    found = ik.discriminator_loss(real, fake, mode=mode, label_smoothing=0.1, mask=mask)
    torch.testing.assert_close(found.real, function(real, 0.9).mean())
    assert torch.equal(found.fake, ik.discriminator_loss(real, fake, mode=mode, mask=mask).fake)


@pytest.mark.parametrize("mode", MODES)
def test_a_list_counts_every_entry_the_same(mode: str) -> None:
    real, fake = ([logits_of(*shape, seed=seed) for shape in ((), (4,), (2, 1, 3, 3))] for seed in (1, 2))
    for found, singles in (
        (ik.generator_loss(fake, mode=mode), [ik.generator_loss(x, mode=mode) for x in fake]),
        *zip(
            ik.discriminator_loss(tuple(real), fake, mode=mode),
            zip(
                *(ik.discriminator_loss(x, y, mode=mode) for x, y in zip(real, fake, strict=True)),
                strict=True,
            ),
            strict=True,
        ),
    ):
        torch.testing.assert_close(found, sum(singles) / 3)


@pytest.mark.parametrize("mode", MODES)
def test_no_logits_give_zero(mode: str) -> None:
    real, fake = logits_of(0, 1, 4, 4), logits_of(0, 1, 4, 4)
    for mask in (None, torch.ones(0, 1, 8, 8), torch.ones(8, 8)):
        values = both(mode, real, fake, mask)
        assert [value.item() for value in values] == [0, 0]
        assert all(g.shape == real.shape for g in gradients(values, real, fake))


@grid(mode=MODES, kind=("binary", "fractions", "0/255", "bool", "hw", "one for all"))
def test_masks(mode: str, kind: str) -> None:
    """LaMa: extra weight in the hole for the generator, known pixels of a fake are real for the discriminator."""
    real, fake = logits_of(2, 3, 4, 5, seed=1), logits_of(2, 3, 4, 5, seed=2)
    values = torch.rand(2, 1, 9, 11, generator=generator(3))
    if kind != "fractions":
        values = values.round()
    values = {"hw": values[0, 0], "one for all": values[:1]}.get(kind, values)
    mask = (255 * values).to(torch.uint8) if kind == "0/255" else values.bool() if kind == "bool" else values
    hole = 1 - F.interpolate(values.reshape(-1, 1, 9, 11), (4, 5), mode="nearest")
    generated, as_real, as_fake = USUAL[mode]
    loss = ik.generator_loss(fake, mode=mode, mask=mask, extra_hole_weight=2.5)
    torch.testing.assert_close(loss, ((1 + 2.5 * hole) * generated(fake)).mean())
    assert torch.equal(ik.generator_loss(fake, mode=mode, mask=mask), ik.generator_loss(fake, mode=mode))
    found = ik.discriminator_loss(real, fake, mode=mode, mask=mask)
    torch.testing.assert_close(found.fake, (hole * as_fake(fake) + (1 - hole) * as_real(fake)).mean())
    assert torch.equal(found.real, ik.discriminator_loss(real, fake, mode=mode).real)
    # Every entry of a list has its own resolution.
    whole = logits_of(2, 1, 1, 1)
    listed = ik.discriminator_loss([real, whole], [fake, whole], mode=mode, mask=mask).fake
    alone = ik.discriminator_loss(whole, whole, mode=mode, mask=mask).fake
    torch.testing.assert_close(listed, (found.fake + alone) / 2)


@grid(mode=MODES, masked=(False, True))
def test_derivatives(mode: str, masked: bool) -> None:
    """Of first and second order, forward and batched, by logits and mask."""
    real, fake = logits_of(2, 1, 2, 3, seed=1), logits_of(2, 1, 2, 3, seed=2)
    mask = torch.rand(2, 1, 3, 3, generator=generator(3), dtype=torch.float64, requires_grad=True)
    inputs = (real, fake, mask) if masked else (real, fake)

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return both(mode, *tensors)

    assert torch.autograd.gradcheck(
        call, inputs, check_batched_grad=True, check_forward_ad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(call, inputs)
    detached = [t.detach() for t in inputs]
    along = [torch.ones_like(t) for t in detached]
    sums = sum((g * a).sum() for g, a in zip(gradients(call(*inputs), *inputs), along, strict=True))
    torch.testing.assert_close(sum(torch.func.jvp(call, tuple(detached), tuple(along))[1]), sums)
    stacks = [torch.stack([t, 2 * t]) for t in detached]
    batched = torch.vmap(call)(*stacks)
    loops = zip(call(*detached), call(*(2 * t for t in detached)), strict=True)
    torch.testing.assert_close(batched, tuple(torch.stack(pair) for pair in loops))


@pytest.mark.parametrize("mode", ["nonsaturating", "hinge", "clamped_bce"])
def test_compiles_whole(mode: str) -> None:
    """Tracing takes seconds, with sizes as unknowns ten; the other modes are made of the same operators."""
    dynamic = mode == "nonsaturating"

    def step(real: Tensor, fake: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        smoothing = 0.0 if mode in ("hinge", "wgan") else 0.1
        heads = ([real, real.mean((2, 3), keepdim=True)], [fake, fake.mean((2, 3), keepdim=True)])
        return both(mode, *heads, mask, label_smoothing=smoothing, half=True)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for shape in ((2, 1, 4, 6), (3, 1, 5, 7))[: 1 + dynamic]:
        real, fake = logits_of(*shape, seed=1), logits_of(*shape, seed=2)
        mask = torch.rand(shape[0], 1, 9, 9, generator=generator(3)).double()
        found, expected = compiled(real, fake, mask), step(real, fake, mask)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients(found, real, fake), gradients(expected, real, fake))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", MODES)
def test_autocast_changes_nothing(mode: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    real, fake = (logits_of(2, 1, 4, 4, seed=s, dtype=torch.bfloat16).to(device) for s in (1, 2))
    mask = torch.ones(2, 1, 8, 8, dtype=torch.bool, device=device)
    expected = both(mode, real, fake, mask)
    with torch.autocast(device, torch.bfloat16):
        found = both(mode, real, fake, mask)
    assert torch.equal(torch.stack(found), torch.stack(expected))
    assert found[0].dtype == torch.float32


def test_module() -> None:
    real, fake, mask = logits_of(2, 1, 4, 4, seed=1), logits_of(2, 1, 4, 4, seed=2), torch.zeros(8, 8)
    loss = ik.nn.GANLoss("lsgan", half=True, label_smoothing=0.1, extra_hole_weight=2)
    weighted = ik.generator_loss(fake, mode="lsgan", mask=mask, extra_hole_weight=2)
    assert torch.equal(loss(fake, mask), weighted) and not torch.equal(loss(fake), weighted)
    expected = ik.discriminator_loss(real, fake, mode="lsgan", half=True, mask=mask, label_smoothing=0.1)
    assert loss.discriminator(real, fake, mask) == expected
    assert loss.half() is loss


X = torch.zeros(2, 1, 4, 4)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "mode": (lambda: ik.generator_loss(X, mode="bce"), ValueError, "mode.*'bce'.*'hinge'"),
    "no-logits": (lambda: ik.generator_loss([]), TypeError, "logits.*non-empty.*list"),
    "array": (lambda: ik.generator_loss(1.0), TypeError, "logits.*Tensor.*float"),
    "nested": (lambda: ik.generator_loss([X, [X]]), TypeError, r"logits\[1\].*Tensor.*list"),
    "integer": (lambda: ik.discriminator_loss(X, X.int()), TypeError, "fake_logits.*float16.*int32"),
    "devices": (lambda: ik.generator_loss([X, X.to("meta")]), ValueError, r"logits\[1\].*meta.*cpu"),
    "both-devices": (lambda: ik.discriminator_loss(X, X.to("meta")), ValueError, "fake_logits.*meta.*cpu"),
    "counts": (lambda: ik.discriminator_loss([X, X], X), ValueError, "fake_logits.*1.*real_logits.*2"),
    "half": (lambda: ik.discriminator_loss(X, X, half=0.5), TypeError, "half.*True or False.*0.5"),
    "smoothing": (
        lambda: ik.discriminator_loss(X, X, label_smoothing=1),
        ValueError,
        "label_smoothing.*less than 1",
    ),
    "smoothing-hinge": (
        lambda: ik.nn.GANLoss("hinge", label_smoothing=0.1),
        ValueError,
        "label_smoothing.*'hinge'",
    ),
    "smoothing-wgan": (
        lambda: ik.nn.GANLoss("wgan", label_smoothing=0.1),
        ValueError,
        "label_smoothing.*'wgan'",
    ),
    "extra": (
        lambda: ik.generator_loss(X, extra_hole_weight=-1),
        ValueError,
        "extra_hole_weight.*at least 0.*-1",
    ),
    "mask-rank": (
        lambda: ik.generator_loss(X[..., 0, 0], mask=X),
        ValueError,
        r"mask.*\(N, C, H, W\).*\(2, 1\)",
    ),
    "mask-list": (
        lambda: ik.discriminator_loss([X], [X], mask=X[0]),
        ValueError,
        r"mask.*fake_logits\[0\].*\(H, W\)",
    ),
    "mask-batch": (
        lambda: ik.generator_loss(X, mask=torch.ones(3, 1, 8, 8)),
        ValueError,
        r"mask.*\(3, 1, 8, 8\)",
    ),
    "mask-channels": (
        lambda: ik.generator_loss(X, mask=torch.ones(2, 3, 8, 8)),
        ValueError,
        r"mask.*\(2, 3, 8, 8\)",
    ),
    "mask-empty": (lambda: ik.generator_loss(X, mask=torch.ones(0, 8)), ValueError, r"mask.*\(0, 8\)"),
    "mask-device": (lambda: ik.generator_loss(X, mask=X.to("meta")), ValueError, "mask.*meta.*logits.*cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str) -> None:
    call, error, words = BAD[case]
    with pytest.raises(error, match=words):
        call()
