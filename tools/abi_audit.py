"""Proof that one build serves every torch >= 2.10 and every Python; exit status 1 when it does not.

    python tools/abi_audit.py [folder with _C.so and _C_cuda.so]

Running the tests under a second torch would be the direct proof, but the Linux wheels of torch >= 2.10 on the
default package index are CUDA builds of several gigabytes with what they require. So every symbol that the
libraries take from torch is looked up instead: all must belong to the stable ABI, all must be in torch 2.10.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

OLDEST_TORCH = (2, 10)
EXPORTS = re.compile(r"^inpaint_kernels_\w+$")
NEEDED = {
    "_C.so": {"libtorch_cpu.so"},
    "_C_cuda.so": {"libtorch_cpu.so", "libtorch_cuda.so"},
}
SYSTEM = re.compile(r"^(libc|libm|libstdc\+\+|libgcc_s|libdl|librt|libpthread|ld-linux[\w-]*)\.so")


def output_of(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def torch_versions(library: Path) -> list[str]:
    """Problems torch-abi-audit finds in one library."""
    tool = Path(sys.executable).with_name("torch-abi-audit")
    run = subprocess.run(
        [str(tool), "--json", "--check", "torch", str(library)], capture_output=True, text=True
    )
    if run.returncode not in (0, 1):
        return [f"torch-abi-audit failed: {run.stderr.strip()}"]
    found = json.loads(run.stdout)["bundled_libs"][0]["torch"]
    print(f"  {found['stable_shim_count']} stable torch symbols, oldest torch {found['min_torch_version']}")
    problems = []
    if run.returncode != 0 or not found["stable"] or found["unknown_shim_symbols"]:
        symbols = found["unstable_symbols"] + found["unknown_shim_symbols"]
        problems.append(f"it uses symbols outside the stable ABI: {symbols}")
    if tuple(int(part) for part in found["min_torch_version"].split(".")[:2]) > OLDEST_TORCH:
        problems.append(f"it needs torch {found['min_torch_version']}: {found['version_defining_symbols']}")
    return problems


def linkage(library: Path) -> list[str]:
    """Problems in what the library needs and what it offers."""
    problems = []
    needed = set(re.findall(r"NEEDED.*\[(.+)\]", output_of("readelf", "-d", str(library))))
    print(f"  needs {', '.join(sorted(needed))}")
    torch_libraries = {name for name in needed if not SYSTEM.match(name)}
    if torch_libraries != NEEDED[library.name]:
        problems.append(f"it should need {sorted(NEEDED[library.name])}, not {sorted(torch_libraries)}")
    exported = {
        line.split()[-1] for line in output_of("nm", "-D", "--defined-only", str(library)).splitlines()
    }
    if extra := sorted(name for name in exported if not EXPORTS.match(name)):
        problems.append(f"it exports {extra}: only inpaint_kernels_* may be seen from outside")
    undefined = {
        line.split()[-1] for line in output_of("nm", "-D", "--undefined-only", str(library)).splitlines()
    }
    if python := sorted(name for name in undefined if re.match(r"_?Py[A-Z_]", name)):
        problems.append(f"it uses the Python C API: {python}")
    glibc = [tuple(map(int, found)) for found in re.findall(r"GLIBC_(\d+)\.(\d+)", " ".join(undefined))]
    print(f"  glibc {'.'.join(map(str, max(glibc)))} or later")
    paths = re.findall(r"/(?:home|root|Users|tmp)/[\w./-]+", output_of("strings", "-n", "8", str(library)))
    if paths:
        problems.append(f"it contains paths of the build machine: {sorted(set(paths))[:3]}")
    return problems


def initialisers(objects: Path) -> list[str]:
    """Start-up code compiled for AVX would run, on any machine, before the choice of instruction set."""
    found = [
        path.name
        for path in [*objects.glob("*.avx2.o"), *objects.glob("*.avx512.o")]
        if ".init_array" in output_of("readelf", "-SW", str(path))
    ]
    return [f"{name} has a static initialiser compiled for its instruction set" for name in found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("folder", nargs="?", type=Path, default=root / "inpaint_kernels")
    arguments = parser.parse_args()
    libraries = [arguments.folder / name for name in NEEDED if (arguments.folder / name).is_file()]
    if not libraries:
        sys.exit(f"no library in {arguments.folder}; build first")
    problems = []
    for library in libraries:
        print(library.name)
        problems += [f"{library.name}: {text}" for text in torch_versions(library) + linkage(library)]
    for folder in (root / "build").glob("temp.*/cpu"):
        problems += initialisers(folder)
    print("\n".join(problems) or "every check passed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
