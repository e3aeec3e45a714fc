"""What the tests of the example programs share: pictures, tiny settings, runs in this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="the examples need pillow, matplotlib and tqdm")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
from harness import INTERPRETING
from PIL import Image

import inpaint_kernels as ik

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import plots  # noqa: E402
import train  # noqa: E402

picks_its_own_backend = pytest.mark.skipif(INTERPRETING, reason="the examples pick their own backend")

# The smallest network and crops; every code path of a full-size run.
TINY = ("--device", "cpu", "--size", "32", "--width", "4", "--batch", "2", "--save-every", "2")
# Without a trunk, for what has nothing to do with the objective.
PIXEL = ("--objective", "pixel")
CPU = torch.device("cpu")

# Exit status, standard output and standard error of a program.
Result = tuple[int, str, str]
Run = Callable[..., Result]


def write_noise(path: Path, seed: int = 0, size: int = 72) -> None:
    """A smooth colour picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing, the slow part, is left to the one test that looks at it."""
    monkeypatch.setattr(plots, "write_png", lambda figure, path: plots.plt.close(figure))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        write_noise(folder / f"{i}.png", i)
    return folder


@pytest.fixture
def run(tmp_path: Path, photos: Path, no_plots: None, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls train.py in this process."""

    def call(*options: object, out: Path = tmp_path / "out", images: Path = photos) -> Result:
        status = train.main([*TINY, "--images", str(images), "--out", str(out), *map(str, options)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def report(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return found


def assert_same(a: Any, b: Any, path: str = "state") -> None:
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert_same(dict(enumerate(a)), dict(enumerate(b)), path)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, path


def assert_one_line(result: Result, *words: str, program: str = "train.py") -> None:
    """The program ended with one line that says what is wrong."""
    status, _, err = result
    assert status == 2
    assert err.startswith(f"{program}: error: ")
    assert len(err.strip().splitlines()) == 1
    for word in words:
        assert word in err


def two_processes(program: Path, *options: str) -> subprocess.Popen[str]:
    """The program under torchrun."""
    package = Path(ik.__file__).resolve().parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*launch, str(program), *TINY, *options], env=environment, **pipes)


def check_two_processes(
    run: Run, photos: Path, out: Path, options: list[str], program: Path, exact: int = 1
) -> None:
    """Two processes of batch 2, with region means over both shards, train what one of batch 4 does.

    Up to rounding in the first `exact` steps.
    """
    two, one = out / "two", out / "one"
    job = two_processes(program, "--images", str(photos), "--out", str(two), *options)
    try:
        printed, err = job.communicate(timeout=240)
    finally:
        job.kill()
    assert job.returncode == 0, err
    assert printed.count("largest relative difference") == 1
    assert report(two)["processes"] == 2
    assert run(*options, "--batch", 4, "--no-compare", out=one)[0] == 0
    a, b = (load(folder / "checkpoint.pt") for folder in (two, one))
    # Perceptual terms have kinks, and networks that learn from each other amplify a rounding.
    torch.testing.assert_close(a["history"][:exact], b["history"][:exact], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a["history"], b["history"], rtol=1e-3, atol=1e-6)
    for name, value in b["model"].items():
        torch.testing.assert_close(a["model"][name], value, rtol=1e-3, atol=1e-4)
