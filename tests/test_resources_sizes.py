"""Every Triton kernel compiles for every size, and a size alone compiles nothing anew.

Triton's launcher makes a constant of a size that is 1 and notes which sizes 16 divides, so that a kernel may compile
for one image and not for the next. Launches are recorded and compiled as in `test_resources.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import test_resources as pixel
import test_resources_gram as features
import test_resources_pairs as pairs
import test_resources_partial_conv as partial_conv
import test_resources_stacked as stacked
from aot import Launch, compile_launch, launch_key

Size = tuple[int, int, int, int]
LaunchesOf = Callable[[Size, bool], list[Launch]]

# One element; a row of exactly one group of 8; a column; multiples of 16, which the launcher notes; odd numbers.
SIZES: tuple[Size, ...] = ((1, 1, 1, 1), (2, 3, 5, 8), (2, 8, 9, 1), (16, 16, 16, 16), (3, 5, 7, 9))
SIZES_CHANNELS_LAST: tuple[Size, ...] = ((1, 4, 3, 2), (3, 5, 7, 9), (16, 16, 16, 16))


def _pixel(op: str, penalty: str = "l1", **options: str) -> LaunchesOf:
    return lambda size, last: pixel.launches(
        pixel.Case(op, penalty, size=size, channels_last=last, **options)  # type: ignore[arg-type]
    )


def _pairs(op: str, **options: str) -> LaunchesOf:
    return lambda size, last: pairs.launches(
        pairs.Case(op, size=size, channels_last=last, **options)  # type: ignore[arg-type]
    )


def _stacked(backward: str = "") -> LaunchesOf:
    # Three constants need 1 or 3 channels.
    return lambda size, last: [
        stacked.launch_of(
            stacked.Case(size=size, channels_last=last, constants=size[1] in (1, 3), backward=backward)
        )
    ]


def _features(op: str, layers: int = 1, **options: bool | str) -> LaunchesOf:
    def launches(size: Size, last: bool) -> list[Launch]:
        n, c, h, w = size
        # A layer of one channel beside another one.
        channels = (c, 1)[:layers]
        case = features.Case(op, channels=channels, channels_last=last, size=(n, h, w))
        return features.launches(case._replace(**options))

    return launches


def _partial_conv(part: str, **options: str) -> LaunchesOf:
    def launches(size: Size, last: bool) -> list[Launch]:
        layout = "last" if last else "nchw"
        case = partial_conv.Case(part, layouts=f"{layout}/{layout}", size=size, **options)  # type: ignore[arg-type]
        return partial_conv.launches(case)

    return launches


CALLS: dict[str, LaunchesOf] = {
    "masked_l1": _pixel("masked_l1"),
    "masked_l1-backward": _pixel("masked_l1", "huber", backward="pred"),
    "masked_l1-map": _pixel("masked_l1", "charbonnier", reduction="none"),
    "hole_valid": _pixel("hole_valid"),
    "hole_valid-backward": _pixel("hole_valid", backward="pred"),
    "inpainting_pixel": _pairs("pixel"),
    "inpainting_pixel-backward": _pairs("pixel", backward="pred"),
    "total_variation": _pairs("image", region="image"),
    "total_variation-backward": _pairs("tv", penalty="l2", backward="pred,target"),
    "stacked_images": _stacked(),
    "stacked_images-backward": _stacked("pred"),
    "gram": _features("gram"),
    "gram-backward": _features("gram", backward=True),
    "style": _features("style", 2),
    "feature_distance": _features("feature_distance", 2, mask=True),
    "feature_distance-backward": _features("feature_distance", 2, mask=True, backward=True, penalty="huber"),
    "partial_conv-mask_input": _partial_conv("mask_input"),
    "partial_conv-finish": _partial_conv("finish"),
    "partial_conv-finish_backward": _partial_conv("finish_backward"),
    "partial_conv-window": _partial_conv("window"),
}


def cases() -> Iterator[tuple[str, Size, bool, int]]:
    """The architectures take turns: what a size does to a kernel shows before the code is theirs."""
    for name in CALLS:
        for last, sizes in ((False, SIZES), (True, SIZES_CHANNELS_LAST)):
            for number, size in enumerate(sizes):
                yield name, size, last, (80, 90, 100)[number % 3]


def _id(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize(("name", "size", "channels_last", "capability"), list(cases()), ids=_id)
def test_every_size_compiles(name: str, size: Size, channels_last: bool, capability: int) -> None:
    for launch in CALLS[name](size, channels_last):
        compile_launch(launch, capability)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("name", CALLS)
def test_new_sizes_compile_nothing(name: str, channels_last: bool) -> None:
    """Widths as those of training, batches and heights that nothing divides; few enough to share their tiles."""
    sizes: list[Size] = [(8, 3, 128, 512), (7, 3, 131, 512), (9, 3, 117, 384)]
    first, *others = ([launch_key(launch) for launch in CALLS[name](size, channels_last)] for size in sizes)
    assert all(other == first for other in others)


@pytest.mark.parametrize("op", ["masked_l1", "hole_valid"])
def test_new_parameter_compiles_nothing(op: str) -> None:
    """An eps that is annealed changes at every step."""
    launch = pixel.launches(pixel.Case(op, "charbonnier"))[0]
    annealed = launch._replace(arguments=launch.arguments | {"param": 0.7})
    assert launch_key(annealed) == launch_key(launch)
