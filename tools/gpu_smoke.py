"""Every op on every kernel backend of a GPU in a minute, each in a process of its own.

    python tools/gpu_smoke.py                     ops and backends side by side
    python tools/gpu_smoke.py --sanitizer         the CUDA kernels under compute-sanitizer, at tiny sizes
    python tools/gpu_smoke.py --one gram cuda     one of them, in this process

Values and gradients against the formula in float64 on the same device, in fresh memory that holds NaN; everything
twice for equal bits; once in a CUDA graph, replayed on other inputs. The inputs and tolerances are those of the
benchmarks. `--device cpu` rehearses all of this with the CPU's kernels and Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The riskiest first.
OPS = (
    "partial_conv", "gram", "style", "total_variation", "inpainting_pixel", "masked_l1", "hole_valid",
    "feature_distance", "stacked_images", "lpips", "ssim",
)  # fmt: skip
BACKENDS = {"cuda": ("cuda", "triton"), "cpu": ("cpu", "triton")}
WITHOUT_CUDA = ("stacked_images", "lpips", "ssim")
TOOLS = ("memcheck", "racecheck")
_UNSUPPORTED = "Device not supported"


@dataclass
class Job:
    """One process and where its output goes."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0

    def start(self) -> None:
        self.started = time.time()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=subprocess.STDOUT
            )

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def lines(self) -> list[str]:
        return self.log.read_text(errors="replace").splitlines()


def jobs(arguments: argparse.Namespace, folder: Path) -> list[Job]:
    """All of a call, in the order in which they start; their logs go to `folder`."""
    all_jobs = []
    for op in arguments.ops:
        for kind in TOOLS if arguments.sanitizer else BACKENDS[arguments.device]:
            backend, command, environment = kind, [sys.executable, __file__], dict(os.environ)
            if arguments.sanitizer:
                backend = "cuda"
            if backend == "cuda" and op in WITHOUT_CUDA:
                continue
            if arguments.sanitizer:
                # Errors of calls that PyTorch tries out and handles are none. Each allocation by itself, so that an
                # access past its end is seen.
                command = ["compute-sanitizer", "--tool", kind, "--report-api-errors", "no", *command]
                command[1:1] = ["--error-exitcode", "9", "--print-limit", "20"]
                environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
            elif backend == "triton" and arguments.device == "cpu":
                environment["TRITON_INTERPRET"] = "1"
            command += ["--one", op, backend, "--device", arguments.device]
            command += ["--bare", "--tiny"] if arguments.sanitizer else ["--tiny"] * arguments.tiny
            all_jobs.append(Job(f"{op} {kind}", command, environment, folder / f"{op}-{kind}.log"))
    return all_jobs


def publish(job: Job, red: bool, failures: Path | None) -> None:
    """Prints what came of a job; of one that is red the lines that name what is wrong."""
    lines, seconds = job.lines(), time.time() - job.started
    checks = sum(line.startswith("ok ") for line in lines)
    wrong = [line for line in lines if not line.startswith("ok ")]
    print(f"{'RED' if red else 'ok '} {job.name}: {checks} checks passed, {seconds:.1f} s", flush=True)
    if not red:
        return
    # The first error is the cause, the last lines the sum of them or where the process died.
    shown = wrong if len(wrong) <= 40 else [*wrong[:25], "...", *wrong[-15:]]
    print("".join(f"    {line}\n" for line in shown), end="", flush=True)
    if failures is not None:
        with failures.open("a") as file:
            file.write(
                "".join(f"{line}\n" for line in (f"FAILED smoke {job.name}", *(f"    {s}" for s in shown)))
            )


def run_all(arguments: argparse.Namespace) -> int:
    """Runs the jobs, `--jobs` at a time, until `--until`; 1 when one was red or did not end."""
    if arguments.sanitizer and shutil.which("compute-sanitizer") is None:
        print("left out: there is no compute-sanitizer")
        return 0
    # What `timeout` sends must not leave processes behind.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    with tempfile.TemporaryDirectory() as folder:
        return _run(jobs(arguments, Path(folder)), arguments)


def _run(waiting: list[Job], arguments: argparse.Namespace) -> int:
    running: list[Job] = []
    status = 0
    try:
        while waiting or running:
            while waiting and len(running) < arguments.jobs:
                running.append(waiting.pop(0))
                running[-1].start()
            time.sleep(0.05)
            late = arguments.until is not None and time.time() > arguments.until
            for job in list(running):
                assert job.process is not None
                code = job.process.poll()
                if code is None and not late:
                    continue
                running.remove(job)
                job.stop()
                if arguments.sanitizer and any(_UNSUPPORTED in line for line in job.lines()):
                    print(f"left out: compute-sanitizer says {_UNSUPPORTED!r}")
                    return status
                if code is None:
                    print(f"{job.name} did not end in time")
                status |= code != 0
                publish(job, code != 0, arguments.failures)
            if late and waiting:
                print(f"RED never started: {', '.join(job.name for job in waiting)}")
                return 1
    finally:
        for job in running:
            job.stop()
    return int(status)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", choices=tuple(BACKENDS))
    parser.add_argument("--sanitizer", action="store_true", help="the CUDA kernels under compute-sanitizer")
    parser.add_argument("--ops", nargs="+", default=OPS, choices=OPS, help="only these")
    parser.add_argument("--jobs", type=int, default=14, help="processes at a time (default: 14)")
    parser.add_argument("--until", type=float, metavar="TIME", help="end at this time, as of time.time()")
    parser.add_argument(
        "--failures", type=Path, metavar="FILE", help="append what is red there as it happens"
    )
    parser.add_argument("--one", nargs=2, metavar=("OP", "BACKEND"), help="this one, in this process")
    parser.add_argument("--tiny", action="store_true", help="sizes for slow tools and the interpreter")
    parser.add_argument("--bare", action="store_true", help="run without comparing, for compute-sanitizer")
    arguments = parser.parse_args(argv)
    if arguments.one is None:
        return run_all(arguments)
    # Only here, because it takes seconds: the process that starts the others does without.
    sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
    import gpu_smoke_checks
    import torch

    op, backend = arguments.one
    device = torch.device(arguments.device)
    return gpu_smoke_checks.check(op, backend, device, tiny=arguments.tiny, bare=arguments.bare)


if __name__ == "__main__":
    sys.exit(main())
