"""Other processes for tests: a fresh interpreter for code, gloo ranks, and a network for DDP to wrap.

They are forked from a server that has imported torch once, which costs each of them seconds of its own otherwise.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import multiprocessing
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
WORLD = 2

Worker = Callable[[int], dict[Any, Any]]

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch"])


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """What the first test worker makes in the folder the others wait for."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_code(code: str, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Like `python -c code` in this environment: whatever is read at import is read anew, but for torch itself."""
    here, there = _context.Pipe(duplex=False)
    process = _context.Process(target=_execute, args=(code, dict(environment), there))
    process.start()
    there.close()
    try:
        if not here.poll(300):
            raise TimeoutError("no answer in 300 s")
        status, out, err = here.recv()
    except EOFError:
        process.join()
        status, out, err = process.exitcode, "", "the process died"
    finally:
        process.kill()
        process.join()
    return subprocess.CompletedProcess(code, status, out, err)


def fresh_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`run_code` on this checkout; settings of this test run must not colour what a fresh process says."""
    return run_code(code, {**clean_environment(), **environment})


def clean_environment() -> dict[str, str]:
    # A library that stands in another folder, as with sanitizers, is still the one under test.
    own = {name for name in os.environ if name.startswith(("INPAINT_KERNELS_", "TRITON_"))}
    kept = {name: v for name, v in os.environ.items() if name not in own - {"INPAINT_KERNELS_LIBRARY_DIR"}}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))}


def _execute(code: str, environment: dict[str, str], connection: Connection) -> None:
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 1
    connection.send((status, out.getvalue(), err.getvalue()))


def run(worker: Worker, folder: Path) -> list[dict[Any, Any]]:
    """What `worker(rank)` returned in each of WORLD processes."""
    if not dist.is_gloo_available():
        pytest.skip("torch.distributed has no gloo here")
    arguments = (worker, str(folder / "store"), str(folder / "results"))
    torch.multiprocessing.start_processes(_process, arguments, nprocs=WORLD, start_method="forkserver")
    return [torch.load(f"{folder / 'results'}.{rank}") for rank in range(WORLD)]


def _process(rank: int, worker: Worker, store: str, results: str) -> None:
    # Without a route to the host's own name gloo would not find an address.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    torch.save(worker(rank), f"{results}.{rank}")
    dist.destroy_process_group()


def tiny_network() -> nn.Module:
    """The same in every process."""
    torch.manual_seed(0)
    return nn.Conv2d(3, 3, 3, padding=1)
