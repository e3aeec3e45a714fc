"""What rows are labelled with: the device, the versions and the commit they were measured on."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def device_name(device: torch.device) -> str:
    """The model as its driver or the system calls it; of a CPU the instruction set that torch uses as well."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        cpuinfo = ""
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    model = " ".join(match[1].split()) if match else platform.processor() or platform.machine()
    # Virtual machines call several generations of a processor by one name.
    return f"{model} {torch.backends.cpu.get_cpu_capability()}"


def slug(device: torch.device, threads: int) -> str:
    """File name of a device's results."""
    name = device_name(device) if device.type == "cuda" else f"cpu {device_name(device)} {threads}threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def commit() -> str:
    """The short commit of the working tree, `+dirty` if something other than results was changed since."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+dirty" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def environment(device: torch.device) -> dict[str, object]:
    """The columns that are the same in every row of a run."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
        "cuda": (torch.version.cuda or torch.version.hip or "") if device.type == "cuda" else "",
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
