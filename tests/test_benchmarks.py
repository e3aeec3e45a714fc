"""The benchmark tools: what they refuse to time, what they write, and what the tables make of it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import pytest
import torch
from benchmark_cases import CPU, FIRST, benchmark, call, mean_l1
from torch import Tensor

from benchmarks import harness, machine, memory, providers, report, run, table
from benchmarks.harness import Case, Formula
from benchmarks.methods import method_of


class WrongGradient(torch.autograd.Function):
    """The right loss; the gradient is what `spoil` makes of the right one."""

    @staticmethod
    def forward(ctx, pred, target, mask, spoil):
        ctx.save_for_backward(pred, target, mask)
        ctx.spoil = spoil
        return mean_l1(FIRST)(pred, target, mask)[0]

    @staticmethod
    def backward(ctx, grad):
        pred, target, mask = ctx.saved_tensors
        return ctx.spoil(grad * torch.sign(pred - target) * mask / (3 * mask.sum())), None, None, None


def spoiled(spoil: Callable[[Tensor], Tensor]) -> Formula:
    return lambda pred, target, mask: (WrongGradient.apply(pred, target, mask, spoil),)


def test_quick_run_writes_rows_and_a_second_run_replaces_them(call):
    chosen = ("--providers", "eager", "ik-cpu")
    status, rows, _ = call(benchmark(), *chosen)
    assert status == 0
    assert [(row["provider"], row["mode"]) for row in rows] == [
        *[(provider, mode) for provider in ("eager", "ik-cpu") for mode in harness.MODES],
        ("copy", "forward"),
    ]
    assert list(rows[0]) == list(table.COLUMNS)
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert row["torch"] == torch.__version__
        assert row["threads"] == "1"
        assert row["cuda"] == ""
        assert row["heap"] == "stock"
    full = rows[2]
    assert float(full["gbps"]) == pytest.approx(12 * FIRST.numel / float(full["p50_ms"]) / 1e6, rel=1e-4)
    # |d| keeps d for its sign, the product keeps |d| and the mask, the quotient keeps both of its sides.
    assert int(full["saved_bytes"]) >= FIRST.numel * 4

    status, again, _ = call(benchmark(), *chosen)
    assert status == 0
    assert len(again) == len(rows)


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (lambda pred, target, mask: (1.001 * mean_l1(FIRST)(pred, target, mask)[0],), "float64 gives"),
        (lambda pred, target, mask: (pred.sum() * float("nan"),), "float64 gives"),
        (lambda pred, target, mask: mean_l1(FIRST)(pred, target, mask) * 2, "2 terms, 1 expected"),
        (spoiled(lambda grad: 1.001 * grad), "gradient of pred is off"),
        (
            spoiled(lambda grad: grad.clone().index_fill_(3, torch.tensor([3]), 0.0)),
            "gradient of pred is off",
        ),
        (spoiled(lambda grad: torch.full_like(grad, float("nan"))), "gradient of pred is off"),
        (lambda pred, target, mask: 1 / 0, "ZeroDivisionError"),
    ],
    ids=["loss", "nan", "terms", "gradient-scale", "gradient-column", "gradient-nan", "crash"],
)
def test_wrong_provider_is_not_timed(call, tmp_path, capsys, wrong, complaint):
    path = tmp_path / f"{machine.slug(CPU, 1)}.csv"
    before = {
        "op": "op",
        "case": FIRST.name,
        "dtype": "float32",
        "device": machine.device_name(CPU),
        "threads": 1,
    }
    table.write_rows(path, [{**before, "provider": "ik-cpu", "mode": mode} for mode in harness.MODES])

    status, rows, _ = call(benchmark(fused=lambda case, backend: wrong), "--providers", "eager", "ik-cpu")
    assert status == 1
    # The times of the run before are gone, too: the same name now stands for something wrong.
    assert {row["provider"] for row in rows} == {"eager", "copy"}
    printed = capsys.readouterr().out
    assert "RED, not timed" in printed
    assert complaint in printed


@pytest.mark.slow
def test_compiled_providers(call):
    status, rows, _ = call(benchmark(rewrite=mean_l1))
    assert status == 0
    assert {"eager", "rewrite", "compile", "compile-rewrite"} < {row["provider"] for row in rows}


def test_provider_that_cannot_run_is_left_out_and_fails_only_when_asked_for(call, capsys):
    def fused(case: Case, backend: str) -> Formula:
        raise RuntimeError("op: backend 'cpu' cannot run: no library")

    only = benchmark(fused=fused, compiled=False)
    assert call(only)[0] == 0
    assert call(only, "--providers", "ik-cpu")[0] == 1
    assert "left out: RuntimeError: op: backend 'cpu' cannot run: no library" in capsys.readouterr().out


def test_command_line_errors_name_what_exists(call, capsys):
    for arguments, words in (
        (["nope"], "no benchmark of nope; there are: op"),
        (["--providers", "fastest"], "no provider fastest"),
        (["--dtypes", "float16"], "no such case"),
    ):
        assert call(benchmark(), *arguments)[0] == 1
        assert words in capsys.readouterr().err


def test_kept_heap_is_recorded_and_saved_only_on_request(call, capsys, monkeypatch):
    possible = False
    monkeypatch.setattr(run, "keep_heap", lambda: possible)
    arguments = ("--providers", "eager", "--keep-heap")
    assert call(benchmark(), *arguments)[:2] == (1, [])
    assert "--keep-heap: this C library cannot" in capsys.readouterr().err
    possible = True
    status, rows, _ = call(benchmark(), *arguments)
    assert status == 0
    assert {row["heap"] for row in rows} == {"kept"}
    monkeypatch.setattr(run, "write_rows", lambda *arguments: pytest.fail("saved"))
    assert run.main(["--threads", "1", "--rounds", "2", *arguments], {"op": benchmark()}) == 0
    assert "not saved: give --out DIR" in capsys.readouterr().out


def test_heavy_op_has_variants_and_no_bandwidth_and_may_be_without_compiled_providers(call, tmp_path):
    status, rows, _ = call(benchmark(heavy=True, compiled=False, variants=("plain", "chunk1")))
    assert status == 0
    assert [row["provider"] for row in rows[::3]] == ["eager", "ik-plain", "ik-chunk1", "copy"]
    assert {(row["gbps"], row["copy_share"]) for row in rows if row["provider"] != "copy"} == {("", "")}
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.START}{report.END}")
    assert "| `chunk1` |" in report.block(tmp_path)


@pytest.mark.parametrize("op", run.discover())
def test_formulas_of_every_benchmark_pass_its_gate(op):
    benchmark = run.discover()[op]
    # Half precision of a whole trunk takes a CPU without such arithmetic a minute.
    cases = [c for c in benchmark.cases if not benchmark.heavy or "cpu" in c.devices]
    # Of whole objectives one for each network: test_objective_parity.py compares every method.
    kinds = [method_of(case).net if op == "objective" else case.variant for case in cases]
    for case in {kind + c.dtype_name: c for kind, c in zip(kinds, cases, strict=True)}.values():
        # Enough pixels that features at a kink, and entries of Gram matrices at a tie, stay rare.
        side = 64 if benchmark.heavy else 256
        of_images = case.options.get("vgg16") or case.options.get("least_side") or benchmark.heavy
        small = dataclasses.replace(case, shape=(2, 3, side, side) if of_images else (2, 3, 20, 36))
        inputs = benchmark.make_inputs(small, CPU, torch.Generator().manual_seed(1))
        truth = providers.truth_of(benchmark, small, inputs)
        # The plain one computes something else on purpose.
        names = [n for n in providers.providers(benchmark, small, CPU) if "compile" not in n and n != "plain"]
        if not benchmark.variants:
            names[-1] = "ik-reference"
        for name in names:
            provider = providers.build(benchmark, small, name)
            assert providers.gate(benchmark, small, provider, inputs, truth) is None, (small.name, name)


def test_gradient_of_stacked_predictions_may_come_in_parts():
    def formula(**maps: Tensor) -> tuple[Tensor, ...]:
        first, second, target = maps["input0_part0"], maps["input0_part1"], maps["target0"]
        return ((first * target).sum() + 2 * (second * target).sum(),)

    def stacked(factor: float) -> Formula:
        def formula(**maps: Tensor) -> tuple[Tensor, ...]:
            first, second = maps["input0"].split(1)
            other = factor * (second * maps["target0"]).sum()
            return ((first * maps["target0"]).sum() + other + (2 - factor) * other.detach() / factor,)

        return formula

    case = Case((1, 4, 8, 8))
    plain = benchmark(eager=lambda case: formula)
    inputs = harness.feature_inputs(case, CPU, torch.Generator().manual_seed(0), copies=2)
    assert set(inputs) == {"input0", "target0", "input0_part0", "input0_part1"}
    assert len(memory.storages(inputs)) == 2

    def one_part(**maps: Tensor) -> tuple[Tensor, ...]:
        part = 2 * (maps["input0_part1"] * maps["target0"]).sum()
        return (part + (maps["input0_part0"].detach() * maps["target0"]).sum(),)

    for wrong, complaint in (
        (stacked(2.0), "None"),
        (stacked(1.0), "gradient of input0 is off"),
        (one_part, "missing"),
    ):
        fused = dataclasses.replace(plain, fused=lambda case, backend, wrong=wrong: wrong)
        refusal = providers.gate(fused, case, providers.build(fused, case, "ik-cpu"), inputs)
        assert complaint in str(refusal)


def test_saved_bytes_count_each_storage_once_and_inputs_apart():
    x = torch.rand(1000, requires_grad=True)

    # Both products keep the same intermediate, and one keeps the input.
    def step(x: Tensor) -> Tensor:
        y = x.exp()
        return (y * y[:500].repeat(2) + y * x).sum()

    counted = memory.measure_memory(step, {"x": x}, CPU)
    assert counted.saved == 2 * 4000
    assert counted.saved_with_inputs == 3 * 4000
    assert x.grad is None
    assert counted.peak["full"] is not None
    assert counted.peak["full"] >= counted.saved


def test_weights_of_a_network_are_not_kept_by_the_step():
    net = torch.nn.Conv2d(1, 1000, 3)
    x = torch.rand(1, 1, 8, 8, requires_grad=True)
    counted = memory.measure_memory(lambda x: net(x).relu().sum(), {"x": x}, CPU)
    assert counted.saved == 1000 * 6 * 6 * 4


def test_graph_that_dies_within_the_forward_keeps_nothing():
    class Streams(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            with torch.enable_grad():
                leaf = x.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(leaf.exp().sin().sum(), leaf)
            ctx.save_for_backward(gradient)
            return x.exp().sin().sum()

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.saved_tensors[0]

    x = torch.rand(10_000, requires_grad=True)
    counted = memory.measure_memory(Streams.apply, {"x": x}, CPU)
    assert counted.saved == 40_000
    assert counted.saved_with_inputs == 40_000
    assert counted.peak["forward"] is not None
    assert counted.peak["forward"] > 80_000


def test_tensors_hidden_from_autograd_are_charged():
    class Hides(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.hidden = x.clone()
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return grad * torch.ones_like(ctx.hidden)

    x = torch.rand(100_000, requires_grad=True)
    counted = memory.measure_memory(Hides.apply, {"x": x}, CPU)
    assert 400_000 <= counted.saved < 401_000


def row(provider: str, mode: str, ms: float, **changes: object) -> dict[str, object]:
    return {
        "op": "tiny", "case": "8x3x512x512 mask", "provider": provider, "mode": mode, "shape": "8x3x512x512",
        "dtype": "float32", "p50_ms": ms, "p20_ms": ms, "p80_ms": ms, "gbps": 20.0, "copy_share": 0.875,
        "saved_bytes": 1572864, "saved_with_inputs_bytes": 9961472, "device": "Some CPU", "threads": 2,
        "heap": "stock", "torch": "2.13.0", "cuda": "", "commit": "abc1234567", "date": "2026-01-02",
    } | changes  # fmt: skip


def test_plots_say_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit) as stopped:
        report.plot([row("eager", "full", 1.0)], tmp_path / "plot.png")
    assert stopped.value.code == 2
    assert "matplotlib is missing" in (err := capsys.readouterr().err) and "pip install '.[bench]'" in err


def test_report_from_a_small_csv(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        row("eager", "full", 35.5, saved_bytes=176160768),
        row("compile", "full", 7.0),
        row("compile-rewrite", "full", 6.0, saved_bytes=0),
        row("ik-cpu", "forward", 2.0),
        row("ik-cpu", "backward", 3.0, copy_share=0.5),
        row("ik-cpu", "full", 5.0),
        row("copy", "forward", 1.0),
    ]
    small = {"case": "1x3x64x64 mask", "shape": "1x3x64x64"}
    rows += [row(n, "full", ms, host_us=ms * 1e3, **small) for n, ms in (("eager", 0.045), ("ik-cpu", 0.05))]
    results = tmp_path / "some-cpu.csv"
    table.write_rows(results, rows)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    arguments = ["--results", str(tmp_path), "--readme", str(readme)]

    assert report.main([*arguments, "--check"]) == 1
    assert report.main(arguments) == 0
    assert report.main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n<!-- bench:start -->\n")
    assert text.endswith("<!-- bench:end -->\nafter\n")
    assert (
        "**Some CPU, 2 threads (torch 2.13.0, stock heap, commit abc1234567, 2026-01-02)**, copy 20 GB/s"
        in text
    )
    assert (
        "| `tiny` | 8x3x512x512 mask | float32 | 35.5 ms |  | 6.00 ms | **5.00 ms** | `cpu` | 7.1x | 1.20x |  "
        "| 88 % / 50 % | 1.57 (9.96) / 176 (9.96) / 0 (9.96) |"
    ) in text
    # Slower is shown as slower, and bandwidth means nothing for what fits in the caches.
    assert "| 45.0 µs |  |  | **50.0 µs** | `cpu` | 0.90x |  |  | - / - |" in text
    assert (tmp_path / "some-cpu.png").read_bytes().startswith(b"\x89PNG")

    table.write_rows(results, [row("ik-cpu", "full", 4.0, heap="kept")])
    assert "kept and stock heap" in report.block(tmp_path)
    assert report.main([*arguments, "--check"]) == 1
    readme.write_text("no markers")
    assert report.main(arguments) == 1
