"""What the training example is made of: pictures, masks and the network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from example_runs import EXAMPLES, picks_its_own_backend, write_noise
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(EXAMPLES))

import data
import model

pytestmark = picks_its_own_backend


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(14):
        write_noise(folder / f"{i:02}.png", i, 48)
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


# -- network ----------------------------------------------------------------------------------


class Published(torch.nn.Conv2d):
    """NVIDIA's layer op by op, which masks its input and sees a mask of all channels, then its activation."""

    def __init__(
        self,
        *args: Any,
        multi_channel: bool = False,
        activation: str = "none",
        negative_slope: float = 0.0,
        mask_input: bool = True,
        return_mask: bool = False,
    ) -> None:
        super().__init__(*args)
        slopes = {"none": 1.0, "relu": 0.0, "leaky_relu": negative_slope}
        self.multi_channel, self.slope = multi_channel, slopes[activation]

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        assert mask.shape == (x if self.multi_channel else x[:, :1]).shape
        ones = torch.ones_like(self.weight if self.multi_channel else self.weight[:1, :1])
        covered = F.conv2d(mask, ones, None, self.stride, self.padding)
        new_mask = covered.clamp(0, 1)
        ratio = ones[0].numel() / (covered + 1e-13) * new_mask
        raw = F.conv2d(x * mask, self.weight, None, self.stride, self.padding)
        output = (raw * ratio + self.bias.view(1, -1, 1, 1)) * new_mask
        return torch.where(output > 0, output, self.slope * output), new_mask


class PublishedUNet(model.PartialConvUNet):
    def __init__(self, width: int) -> None:
        super().__init__(width, Published)

    def join_masks(self, above: Tensor, above_mask: Tensor, skip: Tensor, skip_mask: Tensor) -> Tensor:
        return torch.cat([above_mask.expand_as(above), skip_mask.expand_as(skip)], 1)


@pytest.mark.parametrize("width", [6, 3])
def test_network_computes_what_published_layers_do(width: int) -> None:
    """Neither masking inputs nor masks of all channels would change a value or a gradient."""
    torch.manual_seed(0)
    net, published = model.PartialConvUNet(width).double(), PublishedUNet(width).double()
    for name, parameter in net.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    published.load_state_dict(net.state_dict())
    masks = [data.brush_mask(np.random.default_rng(i), 64) for i in range(2)]
    # Holes that are still there at the lowest level.
    masks += [np.ones((64, 64), np.uint8), np.zeros((64, 64), np.uint8)]
    masks[2][:, 8:] = 0
    mask = torch.from_numpy(np.stack(masks))[:, None].double()
    image = torch.rand(4, 3, 64, 64, dtype=torch.float64)
    upstream = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    found = []
    for network in (net, published):
        output = network(image, mask)
        found.append([output.detach(), *torch.autograd.grad(output, list(network.parameters()), upstream)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))
