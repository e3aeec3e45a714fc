"""Private names of torch: each may go, and results stay right; importing the package anew."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import fresh_python as python
from test_package import MODULES, PACKAGE

# The module last: without it, formulas are registered where later counters find them anyway.
NAMES = (
    "torch._C._AutoDispatchBelowAutograd",
    "torch._C._are_functorch_transforms_active",
    "torch._C._functorch.is_legacy_batchedtensor",
    "torch.autograd.forward_ad._current_level",
    "torch._C._get_tracing_state",
    "torch.jit.is_tracing",
    "torch.ops.mkldnn._is_mkldnn_bf16_supported",
    "torch.utils._pytree._register_namedtuple",
    "torch.utils._python_dispatch._get_current_dispatch_mode",
    "torch.utils._python_dispatch._get_current_dispatch_mode_stack",
    "torch.utils._python_dispatch",
)

# One process imports the package again and again, each time without one of the names.
WITHOUT = """
import importlib.util, json, sys, traceback, warnings
warnings.simplefilter("error")
# Of torch.jit, which torch itself uses for forward-mode AD, and of its traces.
warnings.filterwarnings("ignore", category=DeprecationWarning)
import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils.flop_counter import FlopCounterMode
warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)

p, t = torch.zeros(2, 3, 4, 5), torch.ones(2, 3, 4, 5)
w, mask = torch.ones(2, 3, 3, 3), torch.ones(2, 1, 4, 5)
mask[..., :2] = 0


def import_without(path):
    # The name is missing only while the package looks for it: torch itself needs it, too.
    for module in [module for module in sys.modules if module.partition(".")[0] == "inpaint_kernels"]:
        del sys.modules[module]
    *parents, name = path.split(".")
    owner = eval(".".join(parents))
    kept = vars(owner).get(name)

    class Hidden:
        def __getattr__(self, wanted):
            if wanted == name:
                raise AttributeError(wanted)
            return getattr(owner, wanted)

    # Operators are made when they are asked for: their namespace is replaced.
    operator = parents[1:2] == ["ops"]
    if operator:
        torch.ops.mkldnn = Hidden()
    else:
        delattr(owner, name)
    try:
        spec = importlib.util.spec_from_file_location("inpaint_kernels._torch_private", PRIVATE)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[spec.name] = module
    finally:
        if operator:
            torch.ops.mkldnn = owner
        else:
            setattr(owner, name, kept)
    import inpaint_kernels as ik

    from inpaint_kernels import _torch_private
    assert _torch_private is module
    return ik


def gradient(function, at=p):
    leaf = at.clone().requires_grad_()
    return torch.autograd.grad(function(leaf).sum(), leaf)[0]


def check(ik):
    same = torch.testing.assert_close
    loss = lambda p, b=None: ik.masked_mse_loss(p, t, mask, backend=b)
    style = lambda p, b=None: ik.style_loss([p + t], [2 * t], penalty="l2", backend=b)
    conv = lambda p, w: ik.partial_conv2d(p, w, None, mask, padding=1).output
    for function in (loss, style):
        plain = lambda p: function(p, "reference")
        expected = gradient(plain)
        same(function(p), plain(p))
        same(gradient(function), expected)
        same(torch.func.grad(function)(p), expected)
        same(torch.vmap(function)(torch.stack([p, t])), torch.stack([plain(p), plain(t)]))
        with forward_ad.dual_level():
            same(forward_ad.unpack_dual(function(forward_ad.make_dual(p, t))).tangent, expected.sum())
        # Torch returns float64 for the tangent of a scalar times a number.
        same(torch.func.jvp(function, (p,), (t,))[1].float(), expected.sum())
        leaf = p.clone().requires_grad_()
        sent = torch.tensor([1.0, 2.0])
        (gradients,) = torch.autograd.grad(function(leaf), leaf, sent, is_grads_batched=True)
        same(gradients, torch.stack([expected, 2 * expected]))
    for dtype in (torch.float32, torch.bfloat16):
        layer = lambda b: ik.partial_conv2d(t.to(dtype), w.to(dtype), None, mask, padding=1, backend=b).output
        same(layer(None), layer("reference"))
    counts = []
    for function in (conv, lambda p, w: torch.nn.functional.conv2d(p, w, padding=1)):
        leaves = [x.clone().requires_grad_() for x in (t, w)]
        with FlopCounterMode(display=False) as counter:
            function(*leaves).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0, counts
    traced = torch.jit.trace(conv, (t, w))
    same(traced(2 * t, w), 2 * conv(t, w))
    torch._dynamo.reset()
    # torch.compile remembers the modules of the last import.
    torch._dynamo.symbolic_convert._import_module.cache_clear()
    for noted in [noted for noted in globals() if noted.startswith("__import_")]:
        del globals()[noted]
    compiled = torch.compile(lambda p: loss(p) + style(p), fullgraph=True, backend="aot_eager")
    same(gradient(compiled), gradient(lambda p: loss(p) + style(p)))


problems = {}
for name in NAMES:
    try:
        check(import_without(name))
        problems[name] = ""
    except BaseException:
        problems[name] = traceback.format_exc()
print(json.dumps(problems))
"""


def looked_up() -> set[str]:
    """What `_torch_private` asks torch for."""
    source = (PACKAGE / "_torch_private.py").read_text()
    levels = re.findall(r'hasattr\(forward_ad, "(\w+)"\)', source)
    names = re.findall(r'_find\("([\w.]+)"\)', source) + [f"autograd.forward_ad.{name}" for name in levels]
    return {f"torch.{name}" for name in names}


def test_results_without_a_private_name() -> None:
    """Values, gradients, and what each name watches: modes, transforms, traces, levels of forward-mode AD."""
    run = python(f"NAMES, PRIVATE = {NAMES!r}, {str(PACKAGE / '_torch_private.py')!r}\n{WITHOUT}")
    assert run.returncode == 0, run.stderr
    problems: dict[str, str] = json.loads(run.stdout.splitlines()[-1])
    assert problems == dict.fromkeys(NAMES, "")


def test_every_private_name_is_tried() -> None:
    assert looked_up() == set(NAMES) - {"torch.utils._python_dispatch"}


def private_names(module: Path) -> Iterator[str]:
    """Of torch and Triton; those of a module (`_modules`, `_apply`) are for its subclasses to use."""
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            private = re.match(r"(torch|triton|tl)(\.\w+)*\._(?!_)", text)
            if private or node.attr in ("_schema", "_version", "knobs"):
                yield f"{module}: {text}"
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            package, *names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            if package in ("torch", "triton") and any(name.startswith("_") for name in names):
                yield f"{module}: {package}, {names}"


def test_private_names_are_in_one_file() -> None:
    others = [module for module in MODULES if module.name != "_torch_private.py"]
    assert not [name for module in others for name in private_names(module)]


REIMPORT = """
import gc, sys, warnings
warnings.simplefilter("error")
import torch
import inpaint_kernels as first
old = first.masked_l1_loss, first.nn.PartialConv2d(3, 4, 3)
del first
def purge():
    for name in [name for name in sys.modules if name.partition(".")[0] == "inpaint_kernels"]:
        del sys.modules[name]
{step}
purge()
import inpaint_kernels as ik
from inpaint_kernels import _library
p, t = torch.zeros(1, 3, 4, 4).requires_grad_(), torch.ones(1, 3, 4, 4)
for loss in (ik.masked_l1_loss, old[0]):
    value = loss(p, t, backend={backend!r})
    value.backward()
    assert value == 1 and torch.equal(p.grad, torch.full_like(t, -1 / 48)), p.grad
    p.grad = None
assert old[1](t).shape == (1, 4, 2, 2)
print("right")
"""


@pytest.mark.parametrize("step", ["", "gc.collect()", "import inpaint_kernels; purge()"])
def test_import_anew(step: str) -> None:
    """As test runners and notebooks do that purge sys.modules; what was imported before works on."""
    run = python(REIMPORT.format(step=step, backend=None))
    assert run.stdout.endswith("right\n"), run.stdout + run.stderr


def test_import_anew_uses_the_new_functions() -> None:
    """Of a module that was edited meanwhile, also in a graph; another schema asks for a new process."""
    code = (
        REIMPORT.format(step="", backend=None)
        + """
def both(p, t):
    return ik.masked_l1_loss(p, t) + ik.style_loss(p, t)
compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(p, t), both(p, t))
purge()
import inpaint_kernels._library as library
library._define("masked_l1_cpu", library._functions["masked_l1_cpu"]["schema"], lambda *_: 1 / 0)
try:
    with torch.device("meta"):
        torch.ops.inpaint_kernels.masked_l1_cpu(
            torch.empty(1, 3, 4, 4), torch.empty(1, 3, 4, 4), None, "l1", 0.0, "mean", "mask", False
        )
except ZeroDivisionError:
    print("new fake")
try:
    library._define("masked_l1_cpu", "(Tensor x) -> Tensor", None)
except ImportError as error:
    print(error)
"""
    )
    run = python(code)
    assert "new fake" in run.stdout, run.stdout + run.stderr
    assert "masked_l1_cpu was registered with another schema" in run.stdout, run.stdout + run.stderr
