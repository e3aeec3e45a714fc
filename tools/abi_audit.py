"""Proof that one build serves every torch >= 2.10 and every Python; exit status 1 when it does not.

    python tools/abi_audit.py [folder with _C.so and _C_cuda.so]

Running the tests under a second torch is the direct proof, `make test-torch-2.14`; but the Linux wheels of torch on
the default package index are CUDA builds of several gigabytes with what they require. So every symbol that the
libraries take from torch is looked up here: all must belong to the stable ABI, all must be in torch 2.10. Those that
do not belong to it are listed: should torch drop one of them, the whole library fails to load.
"""

from __future__ import annotations

import argparse
import importlib.util
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
# What torch documents as the stable ABI: its C functions, and whatever its C++ wrappers call. The shims that are
# generated for Inductor (aoti_torch/generated) look alike and are not part of it.
STABLE_HEADERS = ("torch/csrc/stable/**/*.h", "torch/csrc/inductor/aoti_torch/c/shim.h")
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
    report = json.loads(run.stdout)["bundled_libs"][0]["torch"]
    print(f"  {report['stable_shim_count']} C functions of torch, oldest torch {report['min_torch_version']}")
    problems = []
    if run.returncode != 0 or not report["stable"] or report["unknown_shim_symbols"]:
        symbols = report["unstable_symbols"] + report["unknown_shim_symbols"]
        problems.append(f"it uses symbols outside the stable ABI: {symbols}")
    if tuple(int(part) for part in report["min_torch_version"].split(".")[:2]) > OLDEST_TORCH:
        problems.append(f"it needs torch {report['min_torch_version']}: {report['version_defining_symbols']}")
    return problems


def undefined_symbols(library: Path) -> set[str]:
    lines = output_of("nm", "-D", "--undefined-only", str(library)).splitlines()
    return {line.split()[-1] for line in lines}


def stable_names(include: Path) -> set[str]:
    """C functions of torch that the headers of its stable ABI name."""
    headers = [header for pattern in STABLE_HEADERS for header in include.glob(pattern)]
    if not headers:
        sys.exit(f"no headers of the stable ABI in {include}; torch 2.10 or later is needed")
    text = "\n".join(header.read_text() for header in headers)
    return set(re.findall(r"\b(?:aoti_)?torch_\w+", text))


def unstable(symbols: set[str], stable: set[str]) -> list[str]:
    """Those of torch's symbols, C and C++, that do not belong to the stable ABI."""
    c = {name for name in symbols if re.match(r"(aoti_)?torch_", name)}
    # Mangled: functions, then type information, in the namespaces at, c10, caffe2 and torch.
    cpp = {name for name in symbols if re.match(r"_Z(T[ISV])?NK?(2at|3c10|6caffe2|5torch)", name)}
    return sorted((c - stable) | cpp)


def stability(library: Path) -> list[str]:
    """Problems with symbols beyond the stable ABI of the torch that is installed here."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("torch is not installed; its headers tell what is stable")
    symbols = unstable(undefined_symbols(library), stable_names(Path(spec.origin).parent / "include"))
    print(f"  not of the stable ABI: {', '.join(symbols) or 'nothing'}")
    return [f"it uses symbols outside the stable ABI: {', '.join(symbols)}"] if symbols else []


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
    undefined = undefined_symbols(library)
    if python := sorted(name for name in undefined if re.match(r"_?Py[A-Z_]", name)):
        problems.append(f"it uses the Python C API: {python}")
    glibc = [tuple(map(int, version)) for version in re.findall(r"GLIBC_(\d+)\.(\d+)", " ".join(undefined))]
    print(f"  glibc {'.'.join(map(str, max(glibc)))} or later")
    paths = re.findall(r"/(?:home|root|Users|tmp)/[\w./-]+", output_of("strings", "-n", "8", str(library)))
    if paths:
        problems.append(f"it contains paths of the build machine: {sorted(set(paths))[:3]}")
    return problems


def initialisers(objects: Path) -> list[str]:
    """Start-up code compiled for AVX would run, on any machine, before the choice of instruction set."""
    names = [
        path.name
        for path in [*objects.glob("*.avx2.o"), *objects.glob("*.avx512.o")]
        if ".init_array" in output_of("readelf", "-SW", str(path))
    ]
    return [f"{name} has a static initialiser compiled for its instruction set" for name in names]


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
        complaints = [text for check in (torch_versions, stability, linkage) for text in check(library)]
        problems += [f"{library.name}: {text}" for text in complaints]
    for folder in (root / "build").glob("temp.*/cpu"):
        problems += initialisers(folder)
    print("\n".join(problems) or "every check passed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
