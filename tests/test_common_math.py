"""The scalar formulas of csrc/common (one source for CPU and CUDA) against NumPy, without torch or a GPU."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from processes import locked

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "tests" / "csrc" / "common_math.cpp"
PARAMS = {"l1": 0.0, "l2": 0.0, "charbonnier": 0.05, "huber": 0.4}
DTYPES = {"f32": np.float32, "f64": np.float64}


def find_compiler() -> list[str] | None:
    named = shlex.split(os.environ.get("CXX", ""))
    commands = [named] if named else [["c++"], ["g++"], ["clang++"]]
    return next((command for command in commands if shutil.which(command[0])), None)


def build_module(compiler: list[str], folder: Path) -> Path:
    """Compiled once for these sources, this compiler and this Python, with the warnings of the kernels as errors."""
    import pybind11

    flags = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]
    flags += ["-DIK_ISA=generic", "-DIK_ISA_GENERIC=1", f"-I{ROOT / 'csrc'}"]
    for include in (pybind11.get_include(), sysconfig.get_paths()["include"]):
        flags += ["-isystem", include]
    if sys.platform == "darwin":
        flags += ["-undefined", "dynamic_lookup"]
    key = hashlib.sha256(repr((compiler, flags, sys.version)).encode())
    for path in [SOURCE, *sorted((ROOT / "csrc").glob("c*/*.h"))]:
        key.update(path.read_bytes())
    library = folder / key.hexdigest()[:16] / f"common_math{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_name("unfinished.so")
        command = [*compiler, *flags, str(SOURCE), "-o", str(unfinished)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{SOURCE.name} does not compile:\n{done.stderr[-4000:]}"
        unfinished.replace(library)
    return library


@pytest.fixture(scope="module")
def math(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler (looked for $CXX, c++, g++, clang++)")
    cache = ROOT / "build" / "test_common_math"
    folder = cache if os.access(ROOT, os.W_OK) else tmp_path_factory.mktemp("common_math")
    with locked(folder):
        library = build_module(compiler, folder)
    spec = importlib.util.spec_from_file_location("common_math", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def differences(dtype: type) -> np.ndarray:
    info = np.finfo(dtype)
    near_delta = np.nextafter(dtype(PARAMS["huber"]), np.array([0, 1], dtype))
    special = [0.0, -0.0, info.tiny, -info.tiny, info.smallest_subnormal, 0.4, -0.4, *near_delta, 1.0, -1.0]
    spread = np.random.default_rng(0).normal(0.0, 0.5, 500)
    return np.concatenate([special, [65504.0, 131008.0], spread]).astype(dtype)


def exact_value(penalty: str, d: np.ndarray, param: float) -> np.ndarray:
    d = d.astype(np.longdouble)
    a = np.abs(d)
    if penalty == "charbonnier":
        return np.sqrt(d * d + np.longdouble(param) ** 2)
    if penalty == "huber":
        return np.where(a <= param, d * d / 2, param * (a - param / np.longdouble(2)))
    return a if penalty == "l1" else d * d


def exact_grad(penalty: str, d: np.ndarray, param: float) -> np.ndarray:
    d = d.astype(np.longdouble)
    if penalty == "charbonnier":
        return d / np.sqrt(d * d + np.longdouble(param) ** 2)
    if penalty == "huber":
        return np.clip(d, -param, param)
    return np.sign(d) if penalty == "l1" else 2 * d


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("penalty", PARAMS)
@pytest.mark.parametrize("what", ["value", "grad"])
def test_penalties(math: ModuleType, what: str, penalty: str, name: str) -> None:
    dtype = DTYPES[name]
    d, param = differences(dtype), float(dtype(PARAMS[penalty]))
    got = getattr(math, f"penalty_{what}_{name}")(penalty, d, param)
    want = (exact_value if what == "value" else exact_grad)(penalty, d, param)
    info = np.finfo(dtype)
    assert got.dtype == dtype
    # Four roundings: square, sum, root, quotient. Squares of the smallest numbers underflow.
    assert (np.abs(got - want) <= 4 * info.eps * np.abs(want) + 2 * info.tiny).all()
    assert what == "value" or (got[d == 0] == 0).all()


@pytest.mark.parametrize("name", DTYPES)
def test_nan_and_infinity(math: ModuleType, name: str) -> None:
    value, grad = getattr(math, f"penalty_value_{name}"), getattr(math, f"penalty_grad_{name}")
    special = np.array([np.nan, np.inf, -np.inf], DTYPES[name])
    for penalty, param in PARAMS.items():
        assert np.isnan(value(penalty, special, param)[0]), f"{penalty} loses a NaN"
        assert (value(penalty, special, param)[1:] == np.inf).all()
    assert grad("l1", special, 0.0).tolist() == [0.0, 1.0, -1.0]  # as torch.sign
    assert np.isnan(grad("huber", special, 0.4)[0])
    delta = DTYPES[name](0.4)
    assert grad("huber", special, float(delta))[1:].tolist() == [delta, -delta]
    assert np.isnan(grad("l2", special, 0.0)[0])
    assert np.isnan(grad("charbonnier", special, 0.05)[0])


@pytest.mark.parametrize("name", DTYPES)
def test_a_word_of_signs(math: ModuleType, name: str) -> None:
    """Eight elements share one 16-bit word: byte 0 the positive bits, byte 1 the negative ones."""
    d = np.array([1.5, -2.0, 0.0, np.nan, -1e-30, np.inf, -np.inf, -0.0], DTYPES[name])
    word = int(sum(int(b) << place for place, b in enumerate(getattr(math, f"sign_bits_{name}")(d))))
    assert word & 0xFF == 0b00100001
    assert word >> 8 == 0b01010010
    coefficient = np.full(8, 0.25, DTYPES[name])
    signed = getattr(math, f"apply_sign_{name}")(np.full(8, word, np.uint32), np.arange(8), coefficient)
    assert signed.tolist() == [0.25, -0.25, 0.0, 0.0, -0.25, 0.25, -0.25, 0.0]


@pytest.mark.parametrize("name", DTYPES)
def test_a_zero_weight_selects_nan_away(math: ModuleType, name: str) -> None:
    weight = np.array([0.0, -0.0, 1.0, 0.5, 0.0], DTYPES[name])
    value = np.array([np.nan, np.inf, 3.0, 4.0, 5.0], DTYPES[name])
    assert getattr(math, f"select_zero_{name}")(weight, value).tolist() == [0.0, 0.0, 3.0, 4.0, 0.0]


def test_sample_scale(math: ModuleType) -> None:
    """d loss / d S_n of every normalisation, and 0 where nothing is counted."""
    # weight of the sample, weight of the batch, elements, samples
    counted = (6.0, 24.0, 96.0, 4.0)
    scale, by = math.sample_scale, math.Normalize
    expected = {by.sum: 1.0, by.image: 1 / 96, by.mask: 1 / 24, by.sample: 1 / (6 * 4)}
    assert {normalize: scale(normalize, *counted) for normalize in expected} == expected
    assert scale(by.sample, 0.0, 24.0, 96.0, 4.0) == 0.0
    assert scale(by.mask, 0.0, 0.0, 96.0, 4.0) == 0.0
    assert scale(by.image, 0.0, 0.0, 0.0, 0.0) == 0.0


@pytest.mark.parametrize("channels_last", [False, True])
def test_packed_signs_fit_their_buffer(math: ModuleType, channels_last: bool) -> None:
    """Two bytes a group of eight; the allocation, equal for both layouts, never falls short."""
    for n, c, pixels in [(1, 1, 1), (2, 3, 35), (2, 3, 64), (3, 17, 9), (1, 5, 7), (0, 3, 8), (2, 3, 0)]:
        numel, used, allocated = math.sign_layout(n, c, pixels, channels_last)
        assert numel == n * c * pixels
        assert numel <= 4 * used <= 4 * allocated
        assert channels_last or used == allocated


def test_every_half(math: ModuleType) -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    want = patterns.view(np.float16).astype(np.float32)
    got = math.half_to_float(patterns)
    assert (np.isnan(got) == np.isnan(want)).all()
    assert (got[~np.isnan(want)].view(np.uint32) == want[~np.isnan(want)].view(np.uint32)).all()


def test_rounding_to_half_and_bfloat16(math: ModuleType) -> None:
    """To nearest, ties to even: all halves, the midpoints between them, their neighbours, random patterns."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / 2
    random = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32).view(np.float32)
    limits = np.array([65504, 65519.996, 65520, 1e6, 3.4e38, np.inf, 1e-45, 2**-25, 2**-24, 0.0], np.float32)
    x = np.concatenate([halves, middles, limits, random])
    x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.nextafter(x, np.float32(np.inf))])
    x = np.concatenate([x, -x])
    nan = np.isnan(x)
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    got = math.float_to_half(x).view(np.float16)
    assert np.isnan(got[nan]).all()
    assert (got[~nan].view(np.uint16) == half[~nan].view(np.uint16)).all()
    brain = math.float_to_bfloat16(x)
    patterns = x.view(np.uint32).astype(np.uint64)
    rounded = ((patterns + 0x7FFF + ((patterns >> 16) & 1)) >> 16).astype(np.uint16)
    assert (brain[~nan] == rounded[~nan]).all()
    assert np.isnan((brain[nan].astype(np.uint32) << 16).view(np.float32)).all()
