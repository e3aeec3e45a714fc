"""What the training example is made of: pictures, masks and the partial convolution."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="the examples need pillow")
from harness import INTERPRETING
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import data
import model

pytestmark = pytest.mark.skipif(INTERPRETING, reason="no kernel runs here")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(14):
        noise = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i:02}.png")
    return folder


# -- data -------------------------------------------------------------------------------------


def test_held_out_pictures_are_never_trained_on(photos: Path, tmp_path: Path) -> None:
    many = data.load_photographs(photos, 32)
    training, held_out = ({p.path for p in side} for side in (many.training, many.held_out))
    assert len(training) == 13
    assert len(held_out) == 1
    assert not training & held_out
    assert many.held_out_by == "picture"

    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    Image.fromarray(ramp).save(tmp_path / "only.png")
    single = data.load_photographs(tmp_path, 32)
    assert single.held_out_by == "region"
    sampler = data.Sampler(single, lambda rng: data.brush_mask(rng, 32), seed=0, batch=16)
    assert sampler.training(0).images.max() * 255 < 192
    assert sampler.held_out(16).images.min() * 255 >= 192


def test_batches_depend_on_seed_step_and_index_alone(photos: Path) -> None:
    photographs = data.load_photographs(photos, 32)

    def draw(step: int, batch: int, rank: int = 0, seed: int = 0) -> data.Batch:
        masks = lambda rng: data.brush_mask(rng, 32)  # noqa: E731
        return data.Sampler(photographs, masks, seed=seed, batch=batch, rank=rank).training(step)

    whole = draw(3, 4)
    for images, shards in (
        (whole.images, [draw(3, 2, rank).images for rank in (0, 1)]),
        (whole.masks, [draw(3, 2, rank).masks for rank in (0, 1)]),
    ):
        assert torch.equal(images, torch.cat(shards))
    assert not torch.equal(whole.images, draw(4, 4).images)
    assert not torch.equal(whole.images, draw(3, 4, seed=1).images)
    assert whole.images.is_contiguous()
    assert 0 <= whole.images.min() <= whole.images.max() <= 1


def test_brush_masks_cover_a_part() -> None:
    for seed in range(50):
        known = data.brush_mask(np.random.default_rng(seed), 64)
        assert set(np.unique(known)) == {0, 1}
        assert 0.15 <= 1 - known.mean() <= 0.45


@pytest.mark.parametrize("mark", ["hole", "valid"])
@pytest.mark.parametrize("scale", [1, 3])
def test_mask_files(tmp_path: Path, mark: str, scale: int) -> None:
    white = np.zeros((32, 32), dtype=np.uint8)
    white[4:8, 4:20] = 255
    Image.fromarray(np.kron(white, np.ones((scale, scale), dtype=np.uint8))).save(tmp_path / "mask.png")
    masks = data.MaskFiles(tmp_path, 32, mark)
    drawn = [masks(np.random.default_rng(seed)) for seed in range(20)]
    marked = 64 / 1024
    assert all(known.mean() == (1 - marked if mark == "hole" else marked) for known in drawn)
    assert len({known.tobytes() for known in drawn}) > 4


# -- network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("multi_channel", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_partial_convolution_formula(multi_channel: bool, groups: int) -> None:
    torch.manual_seed(0)
    layer = model.PartialConv2d(
        4, 6, 3, 2, 1, groups=groups, multi_channel=multi_channel, return_mask=True
    ).double()
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    mask = (torch.rand(2, 4 if multi_channel else 1, 9, 8) > 0.6).double()
    mask[:, :, :4, :4] = 0
    output, new_mask = layer(x, mask)
    full = mask.expand(-1, 4, -1, -1)
    per_group = 4 // groups
    window = torch.ones(6, per_group, 3, 3, dtype=torch.float64)
    covered = torch.nn.functional.conv2d(full, window, None, 2, 1, 1, groups)
    ratio = torch.where(covered > 0, 9 * per_group / covered, 0)
    raw = torch.nn.functional.conv2d(x * full, layer.weight, None, 2, 1, 1, groups)
    expected = (raw * ratio + layer.bias.view(1, -1, 1, 1)) * (covered > 0)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    assert new_mask.shape[1] == (6 if multi_channel else 1)
    torch.testing.assert_close(new_mask.expand_as(covered).double(), (covered > 0).double())


def test_partial_convolution_without_mask_and_in_half_precision() -> None:
    layer = model.PartialConv2d(2, 3, 3, 1, 1, bias=False)
    nn_layer = torch.nn.Conv2d(2, 3, 3, 1, 1, bias=False)
    nn_layer.load_state_dict(layer.state_dict())
    x = torch.randn(1, 2, 8, 8)
    torch.testing.assert_close(layer(x)[..., 1:-1, 1:-1], nn_layer(x)[..., 1:-1, 1:-1])
    with torch.autocast("cpu", torch.float16):
        output = layer(x.half(), torch.zeros(1, 1, 8, 8))
    assert output.dtype == torch.float16
    assert (output == 0).all()
