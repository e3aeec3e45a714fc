"""What may watch a call (forward-mode AD, torch.func, batching, modes) and kinds of tensors, for every op alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from harness import Backend, generator
from op_cases import OPS, Op
from torch import Tensor
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transform_cases import CASES, COMPILED, forced, tensors_of

import inpaint_kernels as ik

every_op = pytest.mark.parametrize("op", CASES, ids=str)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def directions(tensors: Sequence[Tensor], seed: int = 9) -> tuple[Tensor, ...]:
    rng = generator(seed)
    return tuple(torch.randn(t.shape, generator=rng, dtype=torch.float64).to(t) for t in tensors)


def weighted_sum(op: Op, tensors: Sequence[Tensor], backend: str | None = None) -> Tensor:
    """One number of all outputs, every element with a factor of its own."""
    total = tensors[0].new_zeros(())
    for i, output in enumerate(op.outputs(tensors, backend)):
        ramp = torch.linspace(0.5, 1.5 + i, output.numel(), dtype=output.dtype, device=output.device)
        total = total + (output * ramp.reshape(output.shape)).sum()
    return total


def backward_of(op: Op, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The gradients of `weighted_sum` by all tensors, from autograd's backward."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(weighted_sum(op, leaves), leaves)


@every_op
@pytest.mark.parametrize("way", ["torch.func.jvp", "dual_level", "dual_level, no_grad"])
@pytest.mark.parametrize("part", ["inputs", "masks and weights", "both"])
def test_forward_mode(op: Op, way: str, part: str) -> None:
    """The derivative along a direction is that of the backward; by masks also where they are 0."""
    tensors = tensors_of(op)
    first, last = {"inputs": (0, op.free), "masks and weights": (op.free, None), "both": (0, None)}[part]
    moves = range(len(tensors))[first:last]
    if not moves:
        pytest.skip("nothing to move")
    along = directions(tensors)
    gradients = backward_of(op, tensors)
    expected = sum((gradients[i] * along[i]).sum() for i in moves)

    def function(*moved: Tensor) -> Tensor:
        every = list(tensors)
        for i, t in zip(moves, moved, strict=True):
            every[i] = t
        return weighted_sum(op, every)

    primals, tangents = ([some[i] for i in moves] for some in (tensors, along))
    if way == "torch.func.jvp":
        value, found = torch.func.jvp(function, tuple(primals), tuple(tangents))
    else:
        with forward_ad.dual_level(), torch.set_grad_enabled("no_grad" not in way):
            output = function(*map(forward_ad.make_dual, primals, tangents))
            value, found = forward_ad.unpack_dual(output)
    close(value, weighted_sum(op, tensors))
    close(found, expected)


@every_op
def test_gradients_by_torch_func(op: Op) -> None:
    tensors = tensors_of(op)
    every = tuple(range(len(tensors)))
    expected = backward_of(op, tensors)
    found = torch.func.grad(lambda *t: weighted_sum(op, t), every)(*tensors)
    close(found, expected)
    first = op.outputs(tensors)[0]
    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        found = jacobian(lambda *t: weighted_sum(op, t).reshape(1), every)(*tensors)
        close([f[0] for f in found], list(expected))
        whole = jacobian(lambda *t: op.outputs(t)[0])(*tensors)
        assert whole.shape == (*first.shape, *tensors[0].shape)


@every_op
@pytest.mark.parametrize("batched", ["all", "inputs", "first"])
def test_batches(op: Op, batched: str) -> None:
    """vmap, and vmap of the gradient, are what a loop gives."""
    samples = [tensors_of(op, seed=seed) for seed in range(3)]
    count = {"all": len(samples[0]), "inputs": op.free, "first": 1}[batched]
    stacked = [torch.stack(ts) if i < count else ts[0] for i, ts in enumerate(zip(*samples, strict=True))]
    dims = tuple(0 if i < count else None for i in range(len(stacked)))
    loop = [[*s[:count], *samples[0][count:]] for s in samples]
    found = torch.vmap(lambda *t: op.outputs(t), in_dims=dims)(*stacked)
    close(list(found), [torch.stack(o) for o in zip(*map(op.outputs, loop), strict=True)])
    gradient = torch.func.grad(lambda *t: weighted_sum(op, t), tuple(range(len(stacked))))
    found = torch.vmap(gradient, in_dims=dims)(*stacked)
    expected = [backward_of(op, tensors) for tensors in loop]
    close(list(found), [torch.stack(g) for g in zip(*expected, strict=True)])


@every_op
def test_nested_transforms(op: Op) -> None:
    """Forward over reverse and reverse over forward, by the inputs and what is fixed, are the same."""
    tensors = tensors_of(op)
    along = directions(tensors)
    every = tuple(range(len(tensors)))
    function = lambda *t: weighted_sum(op, t)  # noqa: E731
    gradient = torch.func.grad(function, every)
    _, forward = torch.func.jvp(gradient, tuple(tensors), along)
    reverse = torch.func.grad(lambda *t: torch.func.jvp(function, t, along)[1], every)(*tensors)
    close(forward, reverse)
    leaves = [t.clone().requires_grad_() for t in tensors]
    first = torch.autograd.grad(weighted_sum(op, leaves), leaves, create_graph=True)
    inner = sum((g * a).sum() for g, a in zip(first, along, strict=True))
    if inner.requires_grad:
        expected = torch.autograd.grad(inner, leaves, allow_unused=True, materialize_grads=True)
    else:  # piecewise linear
        expected = tuple(map(torch.zeros_like, leaves))
    close(forward, expected)


@every_op
def test_gradcheck_in_every_mode(op: Op) -> None:
    """With a kernel in the forward: batched upstream gradients, forward mode, forward mode of batches."""
    tensors = tensors_of(op)
    leaves = [t.requires_grad_() for t in tensors[: op.free]]
    assert torch.autograd.gradcheck(
        lambda *t: op.outputs([*t, *tensors[op.free :]]),
        leaves,
        check_batched_grad=True,
        check_forward_ad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )


@every_op
@pytest.mark.parametrize("upstream", ["batched", "dual", "batched, create_graph"])
def test_upstream_gradients_of_a_kernel(kernel: Backend, op: Op, upstream: str) -> None:
    """A kernel ran forward; transforms come only on the way back."""
    tensors = tensors_of(op, torch.float32, device=kernel.device)
    leaves = [t.requires_grad_() for t in tensors[: op.free]]
    outputs = op.outputs([*leaves, *tensors[op.free :]], forced(op, kernel))
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


@pytest.mark.parametrize("op", COMPILED, ids=str)
def test_compiled_transforms(op: Op) -> None:
    """torch.compile traces the transforms into one graph; by masks, too."""
    tensors = tensors_of(op)
    along = directions(tensors)
    gradients = backward_of(op, tensors)
    function = lambda *t: weighted_sum(op, t)  # noqa: E731
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


@every_op
@pytest.mark.parametrize("kind", ["function", "dispatch"])
def test_subclasses(op: Op, kind: str) -> None:
    """They see torch's own operators, and what comes out is of their type, gradients too."""
    tensors, others = tensors_of(op), tensors_of(op, seed=1)
    if kind == "function":
        leaves = [t.clone().as_subclass(Picture).requires_grad_() for t in tensors]
        outputs = op.outputs(leaves)
        assert all(type(o) is Picture for o in outputs)
        close([o.as_subclass(Tensor).detach() for o in outputs], list(op.outputs(tensors)))
        weighted_sum(op, leaves).backward()
        close([leaf.grad.as_subclass(Tensor) for leaf in leaves], list(backward_of(op, tensors)))
        return
    pairs = [TwoTensor(a.clone(), b.clone()).requires_grad_() for a, b in zip(tensors, others, strict=True)]
    weighted_sum(op, pairs).backward()
    for part, plain in (("a", tensors), ("b", others)):
        close([getattr(p.grad, part) for p in pairs], list(backward_of(op, plain)))


@every_op
def test_a_forced_kernel_says_what_it_does_not_serve(kernel: Backend, op: Op) -> None:
    tensors = tensors_of(op, torch.float32, device=kernel.device)
    name = kernel.name
    if len(tensors) > op.free:
        with pytest.raises(RuntimeError, match=f"backend '{name}' .*use backend='reference'"):
            op.outputs([*tensors[:-1], tensors[-1].clone().requires_grad_()], name)
        with torch.no_grad():
            op.outputs([*tensors[:-1], tensors[-1].clone().requires_grad_()], name)
    if "weights" in op.id:
        return
    call = lambda *t: op.outputs(t, name)  # noqa: E731
    with pytest.raises(RuntimeError, match=r"does not serve torch.func transforms; use backend='reference'"):
        torch.vmap(call)(*[t[None] for t in tensors])
    with (
        forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="does not serve forward-mode derivatives; use backend='reference'"),
    ):
        call(forward_ad.make_dual(tensors[0], tensors[0]), *tensors[1:])
    with pytest.raises(RuntimeError, match="does not serve tensors of type Picture"):
        call(tensors[0].as_subclass(Picture), *tensors[1:])
    torch.vmap(lambda *t: op.outputs(t, "reference"))(*[t[None] for t in tensors])


@every_op
def test_a_kernel_runs_where_nothing_is_dual(kernel: Backend, op: Op) -> None:
    """An open level of forward-mode AD alone refuses nobody."""
    with forward_ad.dual_level():
        op.outputs(tensors_of(op, torch.float32, device=kernel.device), forced(op, kernel))


@every_op
def test_second_derivatives_under_a_checkpoint(kernel: Backend, op: Op) -> None:
    """Which hands out every saved tensor once."""
    tensors = tensors_of(op, torch.float32, device=kernel.device)
    leaves = [t.requires_grad_() for t in tensors[: op.free]]

    def call(*free: Tensor) -> Tensor:
        return weighted_sum(op, [*free, *tensors[op.free :]], forced(op, kernel)) ** 2

    plain, again = (
        torch.autograd.grad(value, leaves, create_graph=True)
        for value in (call(*leaves), checkpoint(call, *leaves, use_reentrant=False))
    )
    torch.testing.assert_close(again, plain)
    seconds = [torch.autograd.grad([g.sum() for g in found], leaves) for found in (again, plain)]
    torch.testing.assert_close(*seconds)


@every_op
def test_inference_tensors(kernel: Backend, op: Op) -> None:
    """What was made under inference_mode is read, and kept for the backward, like everything else."""
    tensors = tensors_of(op, torch.float32, device=kernel.device)
    backend = forced(op, kernel)
    for wanted in range(op.free):
        with torch.inference_mode():
            frozen = [t.clone() for t in tensors]
        for create_graph in (False, True):
            leaf, plain = (tensors[wanted].detach().clone().requires_grad_() for _ in range(2))
            found = weighted_sum(op, [leaf if i == wanted else t for i, t in enumerate(frozen)], backend)
            expected = weighted_sum(op, [plain if i == wanted else t for i, t in enumerate(tensors)], backend)
            (gradient,) = torch.autograd.grad(found, leaf, create_graph=create_graph)
            torch.testing.assert_close(gradient, torch.autograd.grad(expected, plain)[0])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:DeprecationWarning")
@every_op
def test_a_traced_function_reads_what_it_is_given(kernel: Backend, op: Op) -> None:
    """torch.jit.trace of tensors that require a gradient records no value of the traced call."""

    def call(*free: Tensor) -> Tensor:
        return weighted_sum(op, [*free, *fixed], forced(op, kernel))

    tensors = tensors_of(op, torch.float32, device=kernel.device)
    fixed = tensors[op.free :]
    leaves = [t.requires_grad_() for t in tensors[: op.free]]
    traced = torch.jit.trace(call, leaves, check_trace=False)
    others = [t.flip(-1).detach().requires_grad_() for t in leaves]
    found, expected = traced(*others), call(*others)
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(value, others) for value in (found, expected))
    torch.testing.assert_close(*gradients)


@every_op
def test_meta_tensors(op: Op) -> None:
    tensors = tensors_of(op, torch.bfloat16)
    found = op.outputs([t.to("meta") for t in tensors])
    for meta, real in zip(found, op.outputs(tensors), strict=True):
        assert (meta.device.type, meta.shape, meta.dtype) == ("meta", real.shape, real.dtype)


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def convolution(tensors: Sequence[Tensor]) -> Tensor:
    convolve = torch.nn.functional.conv2d if tensors[0].ndim == 4 else torch.nn.functional.conv3d
    return convolve(*tensors[:3], padding=1)


# Of a product with the features of both layers of a sample: N C^2 H W multiplications and as many additions.
PRODUCT = 2 * (9 * 20 + 36 * 6)


@every_op
def test_flops(backend: Backend, op: Op) -> None:
    """Those of the library's convolution and of matrix products, in each direction."""
    tensors = tensors_of(op, torch.float32, device=backend.device)
    leaves = [t.requires_grad_(i < op.free) for i, t in enumerate(tensors)]
    name = forced(op, backend)
    found: list[Tensor] = []
    counts = (
        counted(lambda: found.append(weighted_sum(op, leaves, name))),
        counted(lambda: found[0].backward()),
    )
    if op.name == "partial_conv":
        eager: list[Tensor] = []
        expected = (
            counted(lambda: eager.append(convolution(leaves))),
            counted(lambda: eager[0].sum().backward()),
        )
    else:
        # Two predictions and, unless their matrices are given, one target of two samples.
        products = {"gram": 2 * 2 * 9 * 20, "style": (4 if op.free == 2 else 6) * PRODUCT}
        forward = products.get(op.name, 0)
        # Autograd does not know that the matrices are symmetric: it takes two products.
        expected = (forward, forward * (1 if backend.name != "reference" and name else 2))
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
    layers = [ik.nn.PartialConv2d(3, 4, 3, padding=1, dtype=torch.float64) for _ in range(3)]
    x, _, _, mask = tensors_of(OPS["partial_conv usual n1 2d"])
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
    pred, target, mask = tensors_of(OPS["masked_l1 l1 mask"])
    call = lambda m: function(pred, target, m, process_group=object())  # noqa: E731
    with pytest.raises(ValueError, match="process_group computes no derivative by mask"):
        torch.func.jvp(call, (mask,), (mask,))
    with (
        forward_ad.dual_level(),
        pytest.raises(ValueError, match="process_group computes no derivative by mask"),
    ):
        call(forward_ad.make_dual(mask, mask))
