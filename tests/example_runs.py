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
from inpaint_kernels.features import torchvision_nets

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import engine  # noqa: E402
import plots  # noqa: E402
import summary  # noqa: E402
import train  # noqa: E402
import trunks  # noqa: E402

picks_its_own_backend = pytest.mark.skipif(INTERPRETING, reason="the examples pick their own backend")

# The smallest network and crops; every code path of a full-size run.
TINY = ("--device", "cpu", "--size", "32", "--width", "4", "--batch", "2", "--save-every", "2")
# Without a trunk, for what has nothing to do with the objective.
PIXEL = ("--objective", "pixel")
CPU = torch.device("cpu")

# Exit status, standard output and standard error of a program.
Result = tuple[int, str, str]
Run = Callable[..., Result]


# An eighth of the channels of each trunk. LPIPS has weights for every channel of AlexNet, which is small anyway.
NARROW = {
    net: [item // 8 if isinstance(item, int) else item for item in torchvision_nets._CONFIGS[net]]
    for net in ("vgg16", "vgg19")
}


def write_noise(path: Path, seed: int = 0, size: int = 72) -> None:
    """A smooth colour picture."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trunks of an eighth of the channels, and few rounds of timing."""
    for net, channels in NARROW.items():
        monkeypatch.setitem(torchvision_nets._CONFIGS, net, channels)
    monkeypatch.setattr(trunks, "at_hand", lambda name: None)  # trained weights are not narrow
    for rounds in ("ROUNDS", "TRUNK_ROUNDS"):
        monkeypatch.setattr(summary, rounds, 2)


@pytest.fixture
def light(narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrow, judged by few held-out crops, and without drawing, the slow part, which one test does."""
    monkeypatch.setattr(plots, "write_png", lambda figure, path: figure and plots.plt.close(figure))
    monkeypatch.setattr(plots, "picture_grid", lambda path, title, rows: plots.write_png(None, path))
    for module in (engine, summary):
        monkeypatch.setattr(module, "HELD_OUT_CROPS", 4)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        write_noise(folder / f"{i}.png", i)
    return folder


@pytest.fixture
def run(tmp_path: Path, photos: Path, light: None, capsys: pytest.CaptureFixture[str]) -> Run:
    """Calls train.py in this process."""

    def call(*options: object, out: Path = tmp_path / "out", images: Path = photos) -> Result:
        words = [*TINY, "--images", images, "--out", out, *options]
        status = train.main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def report(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return content


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


def two_processes(folder: Path, *options: object) -> subprocess.Popen[str]:
    """train.py under torchrun, with narrow trunks."""
    program = folder / "narrow_train.py"
    program.write_text(
        f"import sys\nsys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import plots, train, trunks\nfrom inpaint_kernels.features import torchvision_nets\n"
        "trunks.at_hand = lambda name: None\n"
        f"torchvision_nets._CONFIGS.update({NARROW})\n"
        "plots.write_png = lambda figure, path: None\nsys.exit(train.main())\n"
    )
    package = Path(ik.__file__).resolve().parents[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*launch, program, *TINY, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, words)), env=environment, **pipes)
