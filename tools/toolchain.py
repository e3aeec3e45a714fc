"""Finds what `setup.py` builds with: compilers, ninja, the headers of torch, and the architectures to compile for."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

from setuptools.errors import SetupError

RELEASE_ARCHS = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]


class LeftOut(Exception):
    """Why a library cannot be built with this toolchain: a sentence for the user."""


def find_torch() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise LeftOut(
            "torch (for its headers) is not installed in the build environment; "
            "drop --no-build-isolation or install torch first"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / "include/torch/csrc/stable/library.h").is_file():
        raise LeftOut("the installed torch has no stable-ABI headers; torch 2.10 or later is needed")
    return folder


def find_ninja() -> str:
    folder = None
    with suppress(ImportError):
        import ninja

        folder = ninja.BIN_DIR
    program = shutil.which("ninja", path=folder) or shutil.which("ninja")
    if program is None:
        raise LeftOut("ninja is missing; pip install ninja")
    return program


def find_cxx() -> list[str]:
    if sys.platform == "win32":
        raise LeftOut("Windows has no native build yet; WSL2 does")
    given = os.environ.get("CXX")
    candidates = [shlex.split(given)] if given else [["g++"], ["clang++"], ["c++"]]
    for command in candidates:
        if shutil.which(command[0]) is None:
            continue
        probe = "#include <optional>\nstatic_assert(__cplusplus >= 201703L);\n"
        check = [*command, "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
        run = subprocess.run(check, input=probe, text=True, capture_output=True)
        if run.returncode == 0:
            return command
        raise LeftOut(f"{command[0]} cannot compile C++17: {last_line(run.stderr)}")
    raise LeftOut(f"CXX={given} was not found" if given else "no C++17 compiler found (g++, clang++)")


def find_nvcc() -> str:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home:
            if (Path(home) / "bin/nvcc").is_file():
                return str(Path(home) / "bin/nvcc")
            raise LeftOut(f"{variable}={home} has no bin/nvcc")
    program = shutil.which("nvcc")
    if program:
        return program
    # nvidia-cuda-nvcc from PyPI unpacks to nvidia/cu13 (nvidia/cuda_nvcc before CUDA 13).
    site = Path(sysconfig.get_path("purelib")) / "nvidia"
    for folder in [*sorted(site.glob("cu[0-9]*"), reverse=True), site / "cuda_nvcc", Path("/usr/local/cuda")]:
        if (folder / "bin/nvcc").is_file():
            return str(folder / "bin/nvcc")
    raise LeftOut("no nvcc found; install the CUDA toolkit or pip install nvidia-cuda-nvcc, or set CUDA_HOME")


def cuda_library_folders(nvcc: str) -> list[Path]:
    # Asked of nvcc itself: the program on PATH may be a wrapper script that lies elsewhere.
    run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", run.stderr, re.MULTILINE)
    home = Path(top[1]) if top else Path(nvcc).resolve().parent.parent
    return [*home.glob("targets/*-linux/lib"), home / "lib64", home / "lib"]


def default_archs(nvcc: str) -> str:
    """Compute capabilities of the GPUs present, else all of a release, as far as this nvcc knows them.

    A GPU newer than nvcc gets the newest it knows, whose PTX the driver compiles for it. Older ones than the kernels
    allow do not count.
    """
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    capabilities = set(printed(query, r"\d+\.\d"))
    present = [capability for capability in capabilities if number(capability) >= number(RELEASE_ARCHS[0])]
    known = [int(arch) for arch in printed([nvcc, "--list-gpu-arch"], r"(?<=compute_)\d+")]
    wanted = {number(capability) for capability in present or RELEASE_ARCHS}
    if known and present:
        wanted = {max((arch for arch in known if arch <= gpu), default=min(known)) for gpu in wanted}
    elif known:
        wanted = wanted.intersection(known)
    return " ".join(f"{arch // 10}.{arch % 10}" for arch in sorted(wanted))


def number(capability: str) -> int:
    return int(capability.replace(".", ""))


def printed(command: list[str], pattern: str) -> list[str]:
    """What a program prints, as far as it matches; nothing where it is missing or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(pattern, run.stdout) if run.returncode == 0 else []


def parse_archs(text: str) -> list[str]:
    """`"8.0;9.0+PTX"` -> nvcc -gencode flags.

    All are compiled from the PTX of the oldest, which is added to the library as well: no source depends on the
    architecture, and the front end, three times as long as ptxas for one (total_variation.cu: 14.5 and 4.8 s), runs
    once. Those with features of their own ("9.0a") are compiled by themselves, without PTX.
    """
    pattern = re.compile(r"(\d+)\.(\d)([af]?)(\+PTX)?", re.IGNORECASE)
    portable, flags = set(), []
    for item in filter(None, re.split(r"[\s,;]+", text)):
        match = pattern.fullmatch(item)
        if match is None:
            raise SetupError(f'TORCH_CUDA_ARCH_LIST: cannot read "{item}"; write for example "8.0;9.0"')
        number = f"{match[1]}{match[2]}{match[3].lower()}"
        if match[3]:
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        else:
            portable.add(int(number))
        if match[4]:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if portable:
        oldest = min(portable)
        codes = ",".join([f"compute_{oldest}", *(f"sm_{number}" for number in sorted(portable))])
        flags.insert(0, f"-gencode=arch=compute_{oldest},code=[{codes}]")
    if not flags:
        raise SetupError("TORCH_CUDA_ARCH_LIST is empty; unset it or name at least one architecture")
    return list(dict.fromkeys(flags))


def compiled_for(flags: list[str], kind: str) -> list[str]:
    """Compute capabilities -gencode flags ask machine code ("sm") or PTX ("compute") for."""
    codes = " ".join(flag.partition(",code=")[2] for flag in flags)
    return [f"{major}.{minor}" for major, minor in re.findall(rf"{kind}_(\d+)(\d[af]?)", codes)]


def last_line(text: str) -> str:
    return "".join(text.strip().splitlines()[-1:])


def version_line(command: list[str]) -> str:
    run = subprocess.run([*command, "--version"], capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line.strip()]
    wanted = [line for line in lines if "release" in line] if "nvcc" in command[0] else lines
    return (wanted or ["unknown"])[0].strip()
