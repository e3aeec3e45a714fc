"""Builds the two shared libraries of inpaint_kernels; everything static is in pyproject.toml.

`_C.so` (CPU) and `_C_cuda.so` are plain shared objects on the LibTorch stable ABI: no Python C API, loaded
with `torch.ops.load_library`, so one build serves every Python and every torch >= 2.10. torch is needed here
only for its headers and for `libtorch_cpu.so` to link against. A GPU on the build machine is not needed.

INPAINT_KERNELS_BUILD   auto (default): what the toolchain allows, and for CUDA the installed torch; what was left
                        out, and why, is printed and kept in `_build_info.json` for `python -m inpaint_kernels doctor`
                        none: pure Python    cpu: `_C` or an error    cuda: `_C` and `_C_cuda` or an error
                        In the source tree, libraries that are not built stay as they are
TORCH_CUDA_ARCH_LIST    compute capabilities for `_C_cuda`; default those of the GPUs present, else all of a release;
                        PTX of the oldest is added
CUDA_HOME, CXX, MAX_JOBS  as usual
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError, SetupError

ROOT = Path(__file__).resolve().parent
# Whoever builds calls this file without its folder on the path.
sys.path.insert(0, str(ROOT / "tools"))
from toolchain import (  # noqa: E402
    LeftOut,
    compiled_for,
    cuda_library_folders,
    default_archs,
    find_cxx,
    find_ninja,
    find_nvcc,
    find_torch,
    last_line,
    parse_archs,
    version_line,
)

PACKAGE = "inpaint_kernels"
MODES = ("auto", "none", "cpu", "cuda")
LIBRARIES = {"cpu": "_C.so", "cuda": "_C_cuda.so"}
SOURCES = {"cpu": "csrc/cpu/*.cpp", "isa": "csrc/cpu/isa/*.cpp", "cuda": "csrc/cuda/*.cu"}
ON_MAC = sys.platform == "darwin"

# Anything newer than torch 2.10 then fails to compile instead of failing to load at a user's.
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# math-errno and trapping-math keep sqrt and selects scalar; neither changes a result.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden",
             "-fno-math-errno", "-fno-trapping-math", STABLE_ABI, "-Wall", "-Wextra"]  # fmt: skip
# Checks as calls, and not those of UBSan that look at every access as AddressSanitizer does: the generic kernels,
# whose vectors are arrays, otherwise take minutes a file to compile.
SANITIZERS = "-fsanitize=address,undefined,float-cast-overflow"
SANITIZE_FLAGS = ["-O1", "-g1", "-fno-omit-frame-pointer", SANITIZERS, "-fno-sanitize-recover=all",
                  "-fno-sanitize=null,object-size,pointer-overflow",
                  "-fno-sanitize-address-use-after-scope",
                  "--param=asan-instrumentation-with-call-threshold=0"]  # fmt: skip
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2"]
AVX512_FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", *AVX2_FLAGS]
NVCC_FLAGS = ["-std=c++17", "-O3", "-DUSE_CUDA", STABLE_ABI, "--expt-relaxed-constexpr", "-Xptxas=-v"]
NVCC_HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden", "-Wall", "-Wextra"]


@dataclass
class Tools:
    """The programs and folders one build uses."""

    cxx: list[str]
    ninja: str
    torch: Path
    nvcc: str | None = None
    archs: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """What will be built, and for every other library the reason it is left out."""

    mode: str
    tools: Tools | None
    left_out: dict[str, str]

    @property
    def libraries(self) -> list[str]:
        return [name for name in LIBRARIES if name not in self.left_out]


def make_plan() -> Plan:
    mode = os.environ.get(f"{PACKAGE.upper()}_BUILD", "auto")
    if mode not in MODES:
        raise SetupError(f"INPAINT_KERNELS_BUILD={mode}: allowed are {', '.join(MODES)}")
    if mode == "none":
        return Plan(mode, None, dict.fromkeys(LIBRARIES, "INPAINT_KERNELS_BUILD=none"))
    try:
        tools = Tools(find_cxx(), find_ninja(), find_torch())
    except LeftOut as reason:
        if mode != "auto":
            raise SetupError(f"INPAINT_KERNELS_BUILD={mode}: {reason}") from None
        return Plan(mode, None, dict.fromkeys(LIBRARIES, str(reason)))
    left_out = {}
    if mode == "cpu":
        left_out["cuda"] = "INPAINT_KERNELS_BUILD=cpu"
    elif ON_MAC:
        left_out["cuda"] = "macOS has no CUDA"
    else:
        try:
            if mode == "auto" and not (tools.torch / "lib/libtorch_cuda.so").exists():
                raise LeftOut(
                    "the installed torch has no CUDA; INPAINT_KERNELS_BUILD=cuda builds it all the same"
                )
            tools.nvcc = find_nvcc()
            given = os.environ.get("TORCH_CUDA_ARCH_LIST")
            tools.archs = parse_archs(default_archs(tools.nvcc) if given is None else given)
        except LeftOut as reason:
            left_out["cuda"] = str(reason)
    if mode == "cuda" and left_out:
        raise SetupError(f"INPAINT_KERNELS_BUILD=cuda: {left_out['cuda']}")
    return Plan(mode, tools, left_out)


def cpu_variants() -> dict[str, list[str]]:
    """ISA name -> compile flags. Every source in csrc/cpu/isa is compiled once per variant; run time chooses."""
    variants = {"generic": ["-DIK_ISA=generic", "-DIK_ISA_GENERIC=1"]}
    if platform.machine().lower() in ("x86_64", "amd64"):
        # For machines without AVX2 alone: not worth the second half of the time -O3 takes to compile it.
        variants["generic"].append("-O2")
        variants["avx2"] = ["-DIK_ISA=avx2", "-DIK_ISA_AVX2=1", *AVX2_FLAGS]
        variants["avx512"] = ["-DIK_ISA=avx512", "-DIK_ISA_AVX512=1", *AVX512_FLAGS]
    return variants


class NinjaFile:
    """build.ninja for one library. Source paths stay relative, so that no machine path gets compiled in."""

    def __init__(self, folder: Path, tools: Tools, werror: bool, sanitize: bool):
        self.folder, self.tools, self.sanitize = folder, tools, sanitize
        self.lines = ["ninja_required_version = 1.5", f"builddir = {folder}", ""]
        include = tools.torch / "include"
        maps = [f"-ffile-prefix-map={tools.torch}=torch"] if not ON_MAC else []
        includes = ["-Icsrc", "-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
        extra = SANITIZE_FLAGS if sanitize else []
        self.cxx_flags = [*CXX_FLAGS, *(["-Werror"] if werror else [])]
        host = [*NVCC_HOST_FLAGS, *(["-Werror"] if werror else []), *maps]
        self.nvcc_flags = [*NVCC_FLAGS, *tools.archs, *(["-Werror=all-warnings"] if werror else []),
                           "-Xcompiler=" + ",".join(host)]  # fmt: skip
        if "".join(tools.archs).count("sm_") > 1:
            self.nvcc_flags.append("--threads=0")
        self.rule("cxx", [*tools.cxx, "-MMD", "-MF", "$out.d", *self.cxx_flags, *maps, "$isa", *extra,
                          *includes, "-c", "$in", "-o", "$out"], depfile=True)  # fmt: skip
        self.rule("link", [*tools.cxx, "-shared", "$in", "-o", "$out", "$flags"])
        if tools.nvcc:
            nvcc = [tools.nvcc, "-ccbin", tools.cxx[-1]]
            command = [*nvcc, "-MMD", "-MF", "$out.d", *self.nvcc_flags, *includes, "-c", "$in", "-o", "$out"]
            # The ptxas report of a good compile goes to a file; a bad one shows everything.
            self.rule("nvcc", f"{quoted(command)} > $out.log 2>&1 || (cat $out.log; false)", depfile=True)

    def rule(self, name: str, command: list[str] | str, depfile: bool = False) -> None:
        text = command if isinstance(command, str) else quoted(command)
        self.lines += [f"rule {name}", f"  command = {text}", f"  description = {name} $out"]
        self.lines += ["  depfile = $out.d", "  deps = gcc"] if depfile else []
        self.lines.append("")

    def edge(
        self, rule: str, out: Path, inputs: list[Path], implicit: Path | None = None, **variables: list[str]
    ) -> Path:
        after = f" | {escaped(implicit)}" if implicit else ""
        self.lines.append(f"build {escaped(out)}: {rule} {' '.join(map(escaped, inputs))}{after}")
        self.lines += [f"  {key} = {quoted(value)}" for key, value in variables.items()]
        return out

    def cpu_library(self, out: Path) -> None:
        # Order matters: of an inline function compiled into several objects the linker keeps the first copy,
        # and that one must run on any machine.
        variants = cpu_variants()
        objects = [
            self.edge("cxx", self.folder / f"{source.stem}.{name}.o", [source], isa=variants[isa])
            for name, isa, folder in [("once", "generic", "cpu"), *((isa, isa, "isa") for isa in variants)]
            for source in sources(folder)
        ]
        if ON_MAC:
            flags = ["-undefined", "dynamic_lookup"]
        else:
            flags = [f"-L{self.tools.torch}/lib", "-ltorch_cpu", *self.exports()]
            # The sanitizers' own symbols come from the program that loads the library.
            flags.append(SANITIZERS if self.sanitize else "-Wl,--no-undefined")
        self.edge("link", out, objects, flags=flags)

    def cuda_library(self, out: Path) -> None:
        # The library must name libtorch_cuda.so as needed, or its symbols are not found when it is loaded. A
        # CPU-only torch has no such file to link against, so an empty one of that name stands in for it.
        empty = self.write_once("stub/empty.cpp", "")
        soname = ["-Wl,-soname,libtorch_cuda.so"]
        stub = self.edge("link", empty.parent / "libtorch_cuda.so", [empty], flags=soname)
        objects = [self.edge("nvcc", self.folder / f"{file.stem}.o", [file]) for file in sources("cuda")]
        torch = ["-Wl,--no-as-needed", f"-L{stub.parent}", "-ltorch_cuda", f"-L{self.tools.torch}/lib",
                 "-ltorch_cpu", "-Wl,--as-needed"]  # fmt: skip
        # g++ links, not nvcc: the device link nvcc adds is not needed and leaves build paths in the file. The
        # static runtime keeps the library free of one CUDA minor version; its symbols stay private.
        runtime = [f"-L{folder}" for folder in cuda_library_folders(self.tools.nvcc)]
        system = ["-lcudart_static", "-lrt", "-lpthread", "-ldl", *self.exports()]
        self.edge("link", out, objects, implicit=stub, flags=[*torch, *runtime, *system])

    def exports(self) -> list[str]:
        # The headers of libstdc++ ask for visible symbols. Exported, a copy compiled for AVX-512 or against
        # another CUDA runtime could serve other libraries of the process.
        script = self.write_once("exports.map", "{ global: inpaint_kernels_*; local: *; };\n")
        return [f"-Wl,--version-script={script}"]

    def write_once(self, name: str, text: str) -> Path:
        # A fresh time stamp would make ninja build again.
        path = self.folder / name
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        if not (ROOT / path).exists():
            (ROOT / path).write_text(text)
        return path


def sources(library: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for path in ROOT.glob(SOURCES[library]))


def quoted(command: list[str]) -> str:
    # $in, $out and the variables of an edge are ninja's; everything else is for the shell.
    return " ".join(
        word if word.startswith("$") else shlex.quote(word).replace("$", "$$") for word in command
    )


def escaped(path: Path) -> str:
    return re.sub(r"([ :$])", r"$\1", str(path))


class Build(build):
    # Always: also a pure build has old libraries to remove and a reason to record.
    sub_commands = [(name, None if name == "build_ext" else test) for name, test in build.sub_commands]


class BuildLibraries(build_ext):
    """`build_ext`, with ninja in the place of distutils' compilers.

    A library that is left out is removed from a package that is being made, and stays in the source tree: another
    call built it, or it was copied there. `make clean` removes it.
    """

    user_options = [*build_ext.user_options, ("sanitize", None, "build _C with AddressSanitizer and UBSan")]
    boolean_options = [*build_ext.boolean_options, "sanitize"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize = False

    def finalize_options(self) -> None:
        super().finalize_options()
        self.plan: Plan = self.distribution.plan
        if self.sanitize:
            self.plan.left_out["cuda"] = "--sanitize builds the CPU library alone"
        self.in_tree = bool(self.inplace or self.editable_mode)
        self.target = ROOT / PACKAGE if self.in_tree else (ROOT / self.build_lib / PACKAGE)
        # A user's newer compiler may warn about something new; that must cost neither the install nor the
        # kernels. In a checkout, or where a library was asked for by name, a warning is an error.
        self.strict = self.plan.mode != "auto" or self.in_tree

    def run(self) -> None:
        self.target.mkdir(parents=True, exist_ok=True)
        record = self.target / "_build_info.json"
        present = [name for name, file in LIBRARIES.items() if (self.target / file).exists()]
        kept = [name for name in self.plan.left_out if self.in_tree and name in present]
        if kept and not self.plan.libraries:
            # An editable install for lint or tables, a machine the libraries were copied to: nothing is to change.
            return
        for name, file in LIBRARIES.items():
            if name in self.plan.left_out:
                if name not in kept:
                    (self.target / file).unlink(missing_ok=True)
                continue
            try:
                self.build_library(name)
            except ExecError as error:
                (self.target / file).unlink(missing_ok=True)
                if self.strict:
                    raise
                self.plan.left_out[name] = str(error)
        for name, reason in self.plan.left_out.items():
            fate = "kept" if name in kept else "left out"
            print(f"{PACKAGE}: {LIBRARIES[name]} {fate}: {reason}", flush=True)
        info = self.build_info()
        before = json.loads(record.read_text()) if kept and record.exists() else {}
        for name in kept:
            del info["left_out"][name]
            info.update({name: before[name]} if name in before else {})
        record.write_text(json.dumps(info, indent=1) + "\n")

    def build_library(self, name: str) -> None:
        tools, file = self.plan.tools, LIBRARIES[name]
        if not sources(name):
            raise ExecError(f"no sources at {SOURCES[name]}; the source tree is incomplete")
        # One ninja file per library: auto can then leave out the one that fails and keep the other.
        # And one for each purpose: an isolated build sees another torch, which would rebuild everything here.
        purpose = "_sanitize" if self.sanitize else "" if self.in_tree else "_wheel"
        folder = Path(self.build_temp) / (name + purpose)
        (ROOT / folder).mkdir(parents=True, exist_ok=True)
        ninja_file = NinjaFile(folder, tools, werror=self.strict, sanitize=bool(self.sanitize))
        write = ninja_file.cpu_library if name == "cpu" else ninja_file.cuda_library
        write(self.target / file)
        (ROOT / folder / "build.ninja").write_text("\n".join(ninja_file.lines) + "\n")
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        print(f"{PACKAGE}: building {file}", flush=True)
        command = [tools.ninja, "-f", str(folder / "build.ninja"), *jobs]
        run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(run.stdout, end="", flush=True)
        if run.returncode != 0:
            errors = [line for line in run.stdout.splitlines() if re.search(r"\berror\b", line)]
            raise ExecError(f"compiling {file} failed: {errors[0] if errors else last_line(run.stdout)}")
        if name == "cuda":
            logs = sorted((ROOT / folder).glob("*.o.log"))
            (ROOT / "build").mkdir(exist_ok=True)  # a build of setuptools' own has its folders elsewhere
            (ROOT / "build/ptxas.log").write_text("".join(log.read_text() for log in logs))

    def build_info(self) -> dict:
        """What doctor tells about the build. No paths, no date: the same sources give the same file."""
        tools, info = self.plan.tools, {"left_out": dict(self.plan.left_out)}
        if "cpu" in self.plan.libraries:
            flags = [*CXX_FLAGS, *(SANITIZE_FLAGS if self.sanitize else [])]
            variants = list(cpu_variants())
            info["cpu"] = {"compiler": version_line(tools.cxx), "flags": flags, "variants": variants}
        if "cuda" in self.plan.libraries:
            compiler = version_line([tools.nvcc])
            toolkit = re.search(r"release (\d+\.\d+)", compiler)
            info["cuda"] = {"compiler": compiler, "flags": [*NVCC_FLAGS, *tools.archs]}
            # What `_cuda_support.py` compares with the driver and the GPU.
            info["cuda"]["toolkit"] = toolkit[1] if toolkit else None
            info["cuda"]["architectures"] = compiled_for(tools.archs, "sm")
            info["cuda"]["ptx"] = compiled_for(tools.archs, "compute")
        return info

    # setuptools asks for these when it installs, and when it makes an editable install.
    def get_outputs(self) -> list[str]:
        if self.in_tree:
            return []
        names = [LIBRARIES[name] for name in self.plan.libraries] + ["_build_info.json"]
        return [str(Path(self.build_lib) / PACKAGE / name) for name in names]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        return []


class Wheel(bdist_wheel):
    """Tag py3-none-<platform>: the libraries use no Python API, so any Python 3 will do."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform_tag = super().get_tag()
        return "py3", "none", "any" if self.root_is_pure else platform_tag


class Package(Distribution):
    """Platform-dependent exactly when the plan holds a library."""

    def __init__(self, *args, **kwargs):
        self.plan = make_plan()
        super().__init__(*args, **kwargs)

    def has_ext_modules(self) -> bool:
        return bool(self.plan.libraries)


setup(distclass=Package, cmdclass={"build": Build, "build_ext": BuildLibraries, "bdist_wheel": Wheel})
