"""What may watch a call (forward-mode AD, torch.func, batching, modes) and kinds of tensors, for every op alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from harness import Backend, backend_for, generator
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transform_cases import CASES, Case

import inpaint_kernels as ik

# One of each shape of work.
COMPILED = (
    "masked_mse",
    "total_variation l2 composite",
    "stacked_images",
    "style with weights",
    "partial_conv2d",
)
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def directions(tensors: Sequence[Tensor], seed: int = 9) -> tuple[Tensor, ...]:
    rng = generator(seed)
    return tuple(torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t) for t in tensors)


def weighted_sum(case: Case, tensors: Sequence[Tensor], backend: str | None = None) -> Tensor:
    """One number of all outputs, every element with a factor of its own."""
    total = tensors[0].new_zeros(())
    for i, output in enumerate(case.outputs(tensors, backend)):
        ramp = torch.linspace(0.5, 1.5 + i, output.numel(), dtype=output.dtype, device=output.device)
        total = total + (output * ramp.reshape(output.shape)).sum()
    return total


def backward_of(case: Case, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of `weighted_sum` by all tensors, from autograd's backward."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(weighted_sum(case, leaves), leaves)


@cases
@pytest.mark.parametrize("way", ["torch.func.jvp", "dual_level", "dual_level, no_grad"])
@pytest.mark.parametrize("part", ["inputs", "masks and weights", "both"])
def test_forward_mode(case: Case, way: str, part: str) -> None:
    """The derivative along a direction is that of the backward; by masks also where they are 0."""
    moves = range(case.free) if part == "inputs" else range(case.free, len(case.shapes))
    if part == "both":
        moves = range(len(case.shapes))
    if not moves:
        pytest.skip("nothing to move")
    tensors = case.tensors()
    along = directions(tensors)
    gradients = backward_of(case, tensors)
    expected = sum((gradients[i] * along[i]).sum() for i in moves)

    def function(*moved: Tensor) -> Tensor:
        every = list(tensors)
        for i, t in zip(moves, moved, strict=True):
            every[i] = t
        return weighted_sum(case, every)

    primals, tangents = ([some[i] for i in moves] for some in (tensors, along))
    if way == "torch.func.jvp":
        value, found = torch.func.jvp(function, tuple(primals), tuple(tangents))
    else:
        with forward_ad.dual_level(), torch.set_grad_enabled("no_grad" not in way):
            output = function(*map(forward_ad.make_dual, primals, tangents))
            value, found = forward_ad.unpack_dual(output)
    close(value, weighted_sum(case, tensors))
    close(found, expected)


@cases
def test_gradients_by_torch_func(case: Case) -> None:
    tensors = case.tensors()
    every = tuple(range(len(tensors)))
    expected = backward_of(case, tensors)
    found = torch.func.grad(lambda *t: weighted_sum(case, t), every)(*tensors)
    close(found, expected)
    first = case.outputs(tensors)[0]
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        found = jacobian(lambda *t: weighted_sum(case, t).reshape(1), every)(*tensors)
        close([f[0] for f in found], list(expected))
        whole = jacobian(lambda *t: case.outputs(t)[0])(*tensors)
        assert whole.shape == (*first.shape, *tensors[0].shape)


@cases
@pytest.mark.parametrize("batched", ["all", "inputs", "first"])
def test_batches(case: Case, batched: str) -> None:
    """vmap, and vmap of the gradient, are what a loop gives."""
    count = {"all": len(case.shapes), "inputs": case.free, "first": 1}[batched]
    samples = [case.tensors(seed=seed) for seed in range(3)]
    stacked = [
        torch.stack([s[i] for s in samples]) if i < count else samples[0][i] for i in range(len(case.shapes))
    ]
    dims = tuple(0 if i < count else None for i in range(len(stacked)))
    loop = [[*s[:count], *samples[0][count:]] for s in samples]
    found = torch.vmap(lambda *t: case.outputs(t), in_dims=dims)(*stacked)
    close(list(found), [torch.stack(o) for o in zip(*map(case.outputs, loop), strict=True)])
    gradient = torch.func.grad(lambda *t: weighted_sum(case, t), tuple(range(len(stacked))))
    found = torch.vmap(gradient, in_dims=dims)(*stacked)
    expected = [backward_of(case, tensors) for tensors in loop]
    close(list(found), [torch.stack(g) for g in zip(*expected, strict=True)])


@cases
def test_nested_transforms(case: Case) -> None:
    """Forward over reverse and reverse over forward, by the inputs and what is fixed, are the same."""
    tensors = case.tensors()
    along = directions(tensors)
    every = tuple(range(len(tensors)))
    function = lambda *t: weighted_sum(case, t)  # noqa: E731
    gradient = torch.func.grad(function, every)
    _, forward = torch.func.jvp(gradient, tuple(tensors), along)
    reverse = torch.func.grad(lambda *t: torch.func.jvp(function, t, along)[1], every)(*tensors)
    close(forward, reverse)
    leaves = [t.clone().requires_grad_() for t in tensors]
    first = torch.autograd.grad(weighted_sum(case, leaves), leaves, create_graph=True)
    inner = sum((g * a).sum() for g, a in zip(first, along, strict=True))
    if inner.requires_grad:
        expected = torch.autograd.grad(inner, leaves, allow_unused=True, materialize_grads=True)
    else:  # piecewise linear
        expected = tuple(map(torch.zeros_like, leaves))
    close(forward, expected)


@cases
def test_gradcheck_in_every_mode(case: Case) -> None:
    """With a kernel in the forward: batched upstream gradients, forward mode, forward mode of batches."""
    tensors = case.tensors()
    leaves = [t.requires_grad_() for t in tensors[: case.free]]
    assert torch.autograd.gradcheck(
        lambda *t: case.outputs([*t, *tensors[case.free :]]),
        leaves,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )


@cases
@pytest.mark.parametrize("upstream", ["batched", "dual", "batched, create_graph"])
def test_upstream_gradients_of_a_kernel(kernel: Backend, case: Case, upstream: str) -> None:
    """A kernel ran forward; transforms come only on the way back."""
    tensors = case.tensors(torch.float32, device=kernel.device)
    leaves = [t.requires_grad_() for t in tensors[: case.free]]
    outputs = case.outputs([*leaves, *tensors[case.free :]], case.forced(kernel))
    sent = [directions(outputs, seed) for seed in range(3)]

    def gradients(values: Sequence[Tensor], **options: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, leaves, values, retain_graph=True, **options)

    single = [gradients(values) for values in sent]
    if upstream == "dual":
        with forward_ad.dual_level():
            found = gradients([forward_ad.make_dual(a, b) for a, b in zip(*sent[:2], strict=True)])
            pairs = [forward_ad.unpack_dual(f) for f in found]
            expected = zip(*single[:2], strict=True)
            torch.testing.assert_close([tuple(p) for p in pairs], list(expected))
        return
    stacked = [torch.stack(values) for values in zip(*sent, strict=True)]
    found = gradients(stacked, is_grads_batched=True, create_graph="create_graph" in upstream)
    torch.testing.assert_close(list(found), [torch.stack(g) for g in zip(*single, strict=True)])


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_transforms(name: str) -> None:
    """torch.compile traces the transforms into one graph; by masks, too."""
    case = CASES[name]
    tensors = case.tensors()
    along = directions(tensors)
    gradients = backward_of(case, tensors)
    function = lambda *t: weighted_sum(case, t)  # noqa: E731
    every = tuple(range(len(tensors)))

    def compiled(run: Callable[..., Any]) -> Any:
        torch._dynamo.reset()
        return torch.compile(run, fullgraph=True, backend="aot_eager")

    found = compiled(lambda p, t: torch.func.jvp(function, tuple(p), tuple(t)))(tensors, along)
    close(found, (function(*tensors), sum((g * a).sum() for g, a in zip(gradients, along, strict=True))))
    close(compiled(lambda p: torch.func.grad(function, every)(*p))(tensors), gradients)
    batch = [torch.stack([t, t]) for t in tensors]
    found = compiled(lambda p: torch.vmap(torch.func.grad(function, every))(*p))(batch)
    close(found, tuple(torch.stack([g, g]) for g in gradients))


class Picture(Tensor):
    """Follows torch functions, as torchvision's tv_tensors."""


@cases
@pytest.mark.parametrize("kind", ["function", "dispatch"])
def test_subclasses(case: Case, kind: str) -> None:
    """They see torch's own operators, and what comes out is of their type, gradients too."""
    tensors, others = case.tensors(), case.tensors(seed=1)
    if kind == "function":
        leaves = [t.clone().as_subclass(Picture).requires_grad_() for t in tensors]
        outputs = case.outputs(leaves)
        assert all(type(o) is Picture for o in outputs)
        close([o.as_subclass(Tensor).detach() for o in outputs], list(case.outputs(tensors)))
        weighted_sum(case, leaves).backward()
        close([leaf.grad.as_subclass(Tensor) for leaf in leaves], list(backward_of(case, tensors)))
        return
    pairs = [TwoTensor(a.clone(), b.clone()).requires_grad_() for a, b in zip(tensors, others, strict=True)]
    weighted_sum(case, pairs).backward()
    for part, plain in (("a", tensors), ("b", others)):
        close([getattr(p.grad, part) for p in pairs], list(backward_of(case, plain)))


@cases
def test_a_forced_kernel_says_what_it_does_not_serve(kernel: Backend, case: Case) -> None:
    tensors = case.tensors(torch.float32, device=kernel.device)
    name = backend_for(case.function, kernel)
    if case.fixed:
        with pytest.raises(RuntimeError, match=f"backend '{name}' .*use backend='reference'"):
            case.outputs([*tensors[:-1], tensors[-1].clone().requires_grad_()], name)
        with torch.no_grad():
            case.outputs([*tensors[:-1], tensors[-1].clone().requires_grad_()], name)
    if case.weights:
        return
    call = lambda *t: case.outputs(t, name)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"does not serve torch.func transforms; use backend='reference'"):
        torch.vmap(call)(*[t[None] for t in tensors])
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="does not serve forward-mode derivatives; use backend='reference'"),
    ):
        call(forward_ad.make_dual(tensors[0], tensors[0]), *tensors[1:])
    with pytest.raises(RuntimeError, match="does not serve tensors of type Picture"):
        call(tensors[0].as_subclass(Picture), *tensors[1:])
    torch.vmap(lambda *t: case.outputs(t, "reference"))(*[t[None] for t in tensors])


@cases
def test_a_kernel_runs_where_nothing_is_dual(kernel: Backend, case: Case) -> None:
    """An open level of forward-mode AD alone refuses nobody."""
    with forward_ad.dual_level():
        case.outputs(case.tensors(torch.float32, device=kernel.device), case.forced(kernel))


@cases
def test_second_derivatives_under_a_checkpoint(kernel: Backend, case: Case) -> None:
    """Which hands out every saved tensor once."""
    tensors = case.tensors(torch.float32, device=kernel.device)
    leaves = [t.requires_grad_() for t in tensors[: case.free]]

    def call(*free: Tensor) -> Tensor:
        return weighted_sum(case, [*free, *tensors[case.free :]], case.forced(kernel)) ** 2

    plain, again = (
        torch.autograd.grad(value, leaves, create_graph=True)
        for value in (call(*leaves), checkpoint(call, *leaves, use_reentrant=False))
    )
    torch.testing.assert_close(again, plain)
    seconds = [torch.autograd.grad([g.sum() for g in found], leaves) for found in (again, plain)]
    torch.testing.assert_close(*seconds)


@cases
def test_inference_tensors(kernel: Backend, case: Case) -> None:
    """What was made under inference_mode is read, and kept for the backward, like everything else."""
    tensors = case.tensors(torch.float32, device=kernel.device)
    backend = case.forced(kernel)
    for wanted in range(case.free):
        with torch.inference_mode():
            frozen = [t.clone() for t in tensors]
        for create_graph in (False, True):
            leaf, plain = (tensors[wanted].detach().clone().requires_grad_() for _ in range(2))
            found = weighted_sum(case, [leaf if i == wanted else t for i, t in enumerate(frozen)], backend)
            expected = weighted_sum(
                case, [plain if i == wanted else t for i, t in enumerate(tensors)], backend
            )
            (gradient,) = torch.autograd.grad(found, leaf, create_graph=create_graph)
            torch.testing.assert_close(gradient, torch.autograd.grad(expected, plain)[0])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")
@cases
def test_a_traced_function_reads_what_it_is_given(kernel: Backend, case: Case) -> None:
    """torch.jit.trace of tensors that require a gradient records no value of the traced call."""

    def call(*free: Tensor) -> Tensor:
        return weighted_sum(case, [*free, *fixed], case.forced(kernel))

    tensors = case.tensors(torch.float32, device=kernel.device)
    fixed = tensors[case.free :]
    leaves = [t.requires_grad_() for t in tensors[: case.free]]
    traced = torch.jit.trace(call, leaves, check_trace=False)
    others = [t.flip(-1).detach().requires_grad_() for t in leaves]
    found, expected = traced(*others), call(*others)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(value, others) for value in (found, expected))
    torch.testing.assert_close(*gradients)


@cases
def test_meta_tensors(case: Case) -> None:
    tensors = case.tensors(torch.bfloat16)
    found = case.outputs([t.to("meta") for t in tensors])
    for meta, real in zip(found, case.outputs(tensors), strict=True):
        assert (meta.device.type, meta.shape, meta.dtype) == ("meta", real.shape, real.dtype)


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def convolution(case: Case, tensors: Sequence[Tensor]) -> Tensor:
    convolve = torch.nn.functional.conv2d if tensors[0].ndim == 4 else torch.nn.functional.conv3d
    return convolve(*tensors[:3], padding=1)


# Of a product with the features of both layers of a sample: N C^2 H W multiplications and as many additions.
PRODUCT = 2 * (9 * 20 + 4 * 6)
GRAMS = {"gram_matrix": 2 * 2 * 9 * 20, "style of given matrices": 4 * 2 * 9 * 20}


@pytest.mark.parametrize("name", CASES)
def test_flops(backend: Backend, name: str) -> None:
    """Those of the library's convolution and of matrix products, in each direction."""
    case = CASES[name]
    tensors = case.tensors(torch.float32, device=backend.device)
    leaves = [t.requires_grad_(i < case.free) for i, t in enumerate(tensors)]
    forced = case.forced(backend)
    found: list[Tensor] = []
    counts = (
        counted(lambda: found.append(weighted_sum(case, leaves, forced))),
        counted(lambda: found[0].backward()),
    )
    if name.startswith("partial_conv"):
        eager: list[Tensor] = []
        expected = (
            counted(lambda: eager.append(convolution(case, leaves))),
            counted(lambda: eager[0].sum().backward()),
        )
    else:
        forward = GRAMS.get(name, 6 * PRODUCT if name.startswith("style") else 0)
        # Autograd does not know that the matrices are symmetric: it takes two products.
        expected = (forward, forward * (1 if backend.name != "reference" and forced else 2))
    assert counts == expected


def test_flops_of_groups_and_of_single_gradients(kernel: Backend) -> None:
    x, weight = torch.rand(2, 4, 6, 6), torch.rand(6, 2, 3, 3)
    x, weight = x.to(kernel.device), weight.to(kernel.device)
    once = 2 * (2 * 6 * 36) * (2 * 9)
    for wanted in ((True, False), (False, True)):
        leaves = [t.detach().requires_grad_(w) for t, w in zip((x, weight), wanted, strict=True)]
        with FlopCounterMode(display=False) as counter:
            found = ik.partial_conv2d(*leaves, padding=1, groups=2, backend=kernel.name)
            assert counter.get_total_flops() == once
            found.output.sum().backward()
        assert counter.get_total_flops() == 2 * once


def test_a_user_formula_for_flops_stays(kernel: Backend) -> None:
    operator = getattr(torch.ops.inpaint_kernels, f"gram_{kernel.name}")
    with FlopCounterMode(display=False, custom_mapping={operator: lambda *_, **__: 7}) as counter:
        ik.gram_matrix(torch.rand(1, 2, 3, 3, device=kernel.device), backend=kernel.name)
    assert counter.get_total_flops() == 7


def test_layers_under_torch_func() -> None:
    """As torch.nn.Conv2d: gradients by parameters, and an ensemble of layers in one vmap."""
    layers = [ik.nn.PartialConv2d(2, 3, 3, padding=1, dtype=torch.float64) for _ in range(3)]
    x, _, _, mask = CASES["partial_conv2d"].tensors()
    loss = lambda p: torch.func.functional_call(layers[0], p, (x, mask)).square().sum()  # noqa: E731
    parameters = dict(layers[0].named_parameters())
    found = torch.func.grad(loss)({name: p.detach() for name, p in parameters.items()})
    layers[0](x, mask).square().sum().backward()
    close(found, {name: p.grad for name, p in parameters.items()})
    along = {name: torch.ones_like(p) for name, p in parameters.items()}
    with forward_ad.dual_level():
        for name, p in parameters.items():
            delattr(layers[0], name)
            setattr(layers[0], name, forward_ad.make_dual(p.detach(), along[name]))
        tangent = forward_ad.unpack_dual(layers[0](x, mask).square().sum()).tangent
    close(tangent, sum(p.grad.sum() for p in parameters.values()))
    stacked, buffers = torch.func.stack_module_state(layers[1:])
    found = torch.vmap(lambda p, b: torch.func.functional_call(layers[1], (p, b), (x, mask)))(
        stacked, buffers
    )
    close(found, torch.stack([layer(x, mask) for layer in layers[1:]]))


def streamed(**options: Any) -> ik.nn.PerceptualStyleLoss:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 4, 3))
    trunk = ik.features.FrozenTrunk(network, ["0", "2"])
    return ik.nn.PerceptualStyleLoss(trunk, chunk=1, **options)


def test_streamed_losses_refuse_other_derivatives() -> None:
    """They keep one gradient; what they do not have they do not leave out in silence."""
    pred, target = torch.rand(2, 2, 3, 8, 8)
    loss = streamed()
    expected = "the streamed loss does not serve .*chunk=None"
    with pytest.raises(RuntimeError, match=expected):
        torch.func.grad(lambda p: loss(p, target).total)(pred)
    for moved in range(2):
        with forward_ad.dual_level():
            images = [pred, target]
            images[moved] = forward_ad.make_dual(images[moved], torch.ones_like(pred))
            with pytest.raises(RuntimeError, match=expected):
                loss(*images)
    learned = torch.ones(2, requires_grad=True)
    for name, value in {
        "perceptual_weights": learned,
        "style_weights": [1.0, learned[1]],
        "style_weight": learned[0],
        "perceptual_weight": learned[0],
    }.items():
        with pytest.raises(ValueError, match=f"{name} requires a gradient.*chunk=None does"):
            streamed(**{name: value})(pred, target)
        with torch.no_grad():
            streamed(**{name: value})(pred, target)
    for module in (ik.nn.PerceptualLoss, ik.nn.StyleLoss):
        with pytest.raises(ValueError, match="weights requires a gradient"):
            module(loss.trunk, weights=learned, chunk=1)(pred, target)
        module(loss.trunk, weights=learned)(pred, target).backward()
        assert learned.grad is not None
        learned.grad = None


@pytest.mark.parametrize("function", [ik.masked_l1_loss, ik.hole_valid_loss, ik.inpainting_pixel_loss])
def test_global_means_refuse_derivatives_by_the_mask(function: Callable[..., Any]) -> None:
    """Their counts have none."""
    pred, target, mask = CASES["masked_l1"].tensors()
    call = lambda m: function(pred, target, m, process_group=object())  # noqa: E731
    with pytest.raises(ValueError, match="process_group computes no derivative by mask"):
        torch.func.jvp(call, (mask,), (mask,))
    with (
        forward_ad.dual_level(),
        pytest.raises(ValueError, match="process_group computes no derivative by mask"),
    ):
        call(forward_ad.make_dual(mask, mask))
