"""Options and parametrization shared by all tests."""

from __future__ import annotations

import gc
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent))
# torch.compile keeps graphs by the op's name and schema alone: those of another checkout would call its backward.
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(__file__).parents[1] / "build" / "inductor"))

from harness import COVERING, EMULATING, backend_for, backends_under_test

# A time limit per example would measure the machine; the same examples in every run reproduce a failure.
hypothesis.settings.register_profile(
    "default", deadline=None, derandomize=True, max_examples=10 if COVERING else 60, database=None
)
hypothesis.settings.load_profile("default")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--run-slow", action="store_true", help="also run tests marked slow (time or much memory)"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes long or much memory; runs with --run-slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    thin_reference(config, items)
    if config.getoption("--run-slow"):
        return
    skip = pytest.mark.skip(reason="slow: give --run-slow")
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """What imports and collection made stays to the end: no garbage collection walks over it again."""
    gc.collect()
    gc.freeze()


def thin_reference(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The formulas have no tiles, tails or vector widths: beside kernels they see a quarter of many cases."""
    if len(backends_under_test()) == 1:
        return

    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        options = item.callspec.params if hasattr(item, "callspec") else {}
        if str(options.get("backend")) == "reference":
            # Of a test over many ops each op's cases by themselves.
            op = getattr(options.get("op"), "name", "")
            cases.setdefault(f"{item.nodeid.partition('[')[0]} {op}", []).append(item)
    many = [item for items_of in cases.values() if len(items_of) > 16 for item in items_of]
    dropped = {item for item in many if zlib.crc32(item.nodeid.encode()) % 4}
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`backend`: every backend under test. `kernel`: those with a kernel, that is all but the reference."""
    for name in ("backend", "kernel"):
        if name in metafunc.fixturenames:
            chosen = [b for b in backends_under_test() if name == "backend" or b.name != "reference"]
            metafunc.parametrize(name, chosen, ids=str)


@pytest.fixture(autouse=True, scope="session")
def emulation() -> Iterator[None]:
    """`backend="cuda"` takes tensors of the CPU in a run of the emulated kernels."""
    if not EMULATING:
        yield
        return
    import cuda_emulation

    with cuda_emulation.install():
        yield


@pytest.fixture
def kernels_of_ssim(request: pytest.FixtureRequest) -> None:
    """Skips the test on a backend that has no kernels of SSIM."""
    options = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    backend_for("ssim", options.get("backend", options.get("kernel")))


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What every rank found, by case: the test file's `worker`; one start of the processes serves all its tests."""
    from processes import run

    return run(request.module.worker, tmp_path_factory.mktemp("ranks"))
