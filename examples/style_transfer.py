"""Moves photographs toward the style of another picture, with the fused losses of inpaint_kernels.

    python examples/style_transfer.py --weights vgg19.pth                  # pictures shipped with scikit-image
    python examples/style_transfer.py --content cat.jpg --style waves.jpg --weights default --size 256
    python examples/style_transfer.py --content a.jpg b.jpg c.jpg --style waves.jpg --chunk 1

Gatys, Ecker, Bethge, "Image Style Transfer Using Convolutional Neural Networks", 2016: the pixels are optimised
so that deep features stay near those of the content and Gram matrices come near those of the style. Written to
--out: ``pictures.png`` (content, style, result), ``curve.png`` and a ``result-<name>.png`` for every content. The
folder gets a number where an earlier run has left its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

try:
    import numpy as np
    import torch
    from checkpoint import write_atomically
    from errors import InputError
    from options import number
    from pictures import read_rgb
    from PIL import Image
    from torch import Tensor
    from tqdm import tqdm
    from trunks import NAMES, RANDOM_WARNING, Found, find_weights, load_trunk
except ModuleNotFoundError as error:
    print(
        f"style_transfer.py: error: {error}; install what the examples need: pip install '.[demo]'",
        file=sys.stderr,
    )
    sys.exit(2)

PICTURES, CURVE = "pictures.png", "curve.png"
VGG_STYLE = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
# Taps of the style, and the one of the content. Of VGG16, whose weights may be the shift-tolerant ones, only those
# that invisible changes of a picture do not move.
TAPS = {
    "vgg16": (VGG_STYLE[:4], "relu3_1"),
    "vgg19": (VGG_STYLE, "relu4_2"),
    "alexnet": (("relu1", "relu2", "relu3", "relu4", "relu5"), "relu3"),
}
RATES = {"adam": 0.02, "lbfgs": 1.0}


class Terms(NamedTuple):
    """Scalars: both terms relative to the distance of the two pictures, total variation absolute."""

    total: Tensor
    content: Tensor
    style: Tensor
    variation: Tensor


# Pictures [N, 3, S, S] -> distance to the content, distance to the style
Distances = Callable[[Tensor], tuple[Tensor, Tensor]]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Style transfer by optimising pixels, with the fused losses."
    )
    add = parser.add_argument
    picture = "a file, or a name in skimage.data"
    add("--content", nargs="+", default=["chelsea"], help=f"one or more: {picture} (default: chelsea)")
    add("--style", default="ihc", help=f"{picture} (default: %(default)s)")
    add("--size", type=number(int, 64), default=160, help="of the square results (default: %(default)s)")
    add("--steps", type=number(int, 1), default=150, help="(default: %(default)s)")
    add("--trunk", choices=NAMES, default="vgg16", help="(default: %(default)s)")
    add(
        "--weights",
        metavar="FILE",
        help="state dict with torchvision's keys, 'default' to download it, or 'random' (default: what was "
        "downloaded before, for vgg16 else the shift-tolerant one of the package stlpips-pytorch, else random)",
    )
    add(
        "--optimizer",
        choices=tuple(RATES),
        default="lbfgs",
        help="lbfgs needs fewer steps, adam moves each content as if it were alone (default: %(default)s)",
    )
    add("--lr", type=number(float, 0), help="(default: 0.02 for adam, 1 for lbfgs)")
    add("--content-weight", type=number(float, 0), default=1.0, metavar="W", help="(default: %(default)s)")
    add("--style-weight", type=number(float, 0), default=100.0, metavar="W", help="(default: %(default)s)")
    add("--tv-weight", type=number(float, 0), default=0.5, metavar="W", help="(default: %(default)s)")
    add("--chunk", type=number(int, 1), help="stream so many contents at a time: less memory, more time")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=Path, default=Path("runs/style"), metavar="DIR", help="(default: %(default)s)")
    return parser.parse_args(argv)


def find_picture(name: str) -> Path:
    """A file, or a picture that comes with scikit-image."""
    path = Path(name)
    if path.is_file():
        return path
    spec = importlib.util.find_spec("skimage")
    shipped = sorted((Path(spec.origin).parent / "data").glob("*.*")) if spec and spec.origin else []
    pictures = [p for p in shipped if p.suffix in (".png", ".jpg")]
    for picture in pictures:
        if picture.stem == name:
            return picture
    names = ", ".join(p.stem for p in pictures) or "none, scikit-image is missing"
    raise InputError(f"there is no file {name}, and no picture of that name in skimage.data ({names})")


def load_picture(name: str, size: int) -> Tensor:
    """[1, 3, S, S] in [0, 1]: scaled to fit the shorter side, then the middle."""
    image = Image.fromarray(read_rgb(find_picture(name)))
    scale = size / min(image.size)
    image = image.resize((max(size, round(image.width * scale)), max(size, round(image.height * scale))))
    left, top = (image.width - size) // 2, (image.height - size) // 2
    pixels = np.array(image.crop((left, top, left + size, top + size)))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float().contiguous() / 255


def layer_weights(trunk: Any, layers: Sequence[str], contents: Tensor, style: Tensor) -> list[float]:
    """Of the style's layers: one over their number and over what the layer's term is between the given pictures.

    Of a trained trunk those terms differ by factors of millions, and the largest alone would be seen.
    """
    import inpaint_kernels as ik

    with torch.no_grad():
        grams = [ik.gram_matrix(maps, normalize="none") for maps in trunk(style, layers)]
        terms = [
            [
                ik.style_loss(m, g, normalize="gatys", target_is_gram=True)
                for m, g in zip(maps, grams, strict=True)
            ]
            for maps in (trunk(content[None], layers) for content in contents)
        ]
    units = torch.tensor(terms, dtype=torch.float64).mean(0)
    if not (units > 0).all():
        raise InputError("to this trunk content and style are the same; give two different pictures")
    return (1 / units / len(layers)).tolist()


def cached_distances(
    trunk: Any, places: tuple[list[int], int], weights: list[float], contents: Tensor, style: Tensor
) -> Distances:
    """Features of the content and Gram matrices of the style are computed once and shared by all steps."""
    import inpaint_kernels as ik

    style_places, content_place = places
    with torch.no_grad():
        target = trunk(contents)[content_place]
        maps = trunk(style)
        grams = [ik.gram_matrix(maps[i], normalize="none") for i in style_places]

    def distances(images: Tensor) -> tuple[Tensor, Tensor]:
        maps = trunk(images)
        return (
            ik.feature_distance(maps[content_place], target, penalty="l2"),
            ik.style_loss(
                [maps[i] for i in style_places],
                grams,
                weights=weights,
                normalize="gatys",
                target_is_gram=True,
            ),
        )

    return distances


def streamed_distances(
    trunks: tuple[Any, Any], weights: list[float], contents: Tensor, style: Tensor, chunk: int
) -> Distances:
    """The same by the modules: no activation outlives its chunk, and the targets are computed in every step."""
    import inpaint_kernels as ik

    content_loss = ik.nn.PerceptualLoss(trunks[0], penalty="l2", chunk=chunk)
    style_loss = ik.nn.StyleLoss(trunks[1], weights=weights, normalize="gatys", chunk=chunk)
    styles = style.expand_as(contents).contiguous()
    return lambda images: (content_loss(images, contents), style_loss(images, styles))


def total_variation(images: Tensor) -> Tensor:
    return images.diff(dim=2).abs().mean() + images.diff(dim=3).abs().mean()


def make_objective(
    args: argparse.Namespace, found: Found, contents: Tensor, style: Tensor
) -> Callable[[Tensor], Terms]:
    """The weighted sum; content and every layer of the style are relative to what they are between the pictures."""
    style_taps, content_tap = TAPS[args.trunk]

    def trunk(taps: Sequence[str]) -> Any:
        return load_trunk(args.trunk, found.weights, contents.device, option="--weights", taps=taps)

    if args.chunk is None:
        taps = list(dict.fromkeys([*style_taps, content_tap]))
        places = [taps.index(tap) for tap in style_taps], taps.index(content_tap)
        both = trunk(taps)
        weights = layer_weights(both, style_taps, contents, style)
        distances = cached_distances(both, places, weights, contents, style)
    else:
        trunks = trunk([content_tap]), trunk(style_taps)
        weights = layer_weights(trunks[1], style_taps, contents, style)
        distances = streamed_distances(trunks, weights, contents, style, args.chunk)
    with torch.no_grad():
        content_unit = distances(style.expand_as(contents).contiguous())[0]

    def objective(images: Tensor) -> Terms:
        content, likeness = distances(images)
        content = content / content_unit
        variation = total_variation(images)
        total = args.content_weight * content + args.style_weight * likeness + args.tv_weight * variation
        return Terms(total, content, likeness, variation)

    return objective


def optimize(
    args: argparse.Namespace, objective: Callable[[Tensor], Terms], contents: Tensor
) -> tuple[Tensor, Tensor]:
    """The pictures after the last step, or the one before Ctrl-C, and the terms of every step [steps, 4]."""
    images = contents.clone().requires_grad_()
    rate = args.lr if args.lr is not None else RATES[args.optimizer]
    optimizer: torch.optim.Optimizer = torch.optim.Adam([images], lr=rate)
    if args.optimizer == "lbfgs":
        optimizer = torch.optim.LBFGS([images], lr=rate, max_iter=1, history_size=20)
    advance: Callable[..., Any] = optimizer.step
    history: list[Tensor] = []

    def closure() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        terms = objective(images)
        terms.total.backward()
        history.append(torch.stack([term.detach() for term in terms]))
        return terms.total.detach()

    with tqdm(total=args.steps, unit="step", mininterval=0.1 if sys.stderr.isatty() else 10.0) as bar:
        try:
            for step in range(args.steps):
                advance(closure)
                with torch.no_grad():
                    images.clamp_(0, 1)
                bar.update()
                if step % 10 == 0 or step + 1 == args.steps:
                    total, content, style, _ = history[-1].tolist()
                    bar.set_postfix_str(f"loss {total:.4f}, content {content:.3f}, style {style:.4f}")
                    if not np.isfinite(total):
                        raise InputError(
                            f"the loss is not finite at step {step + 1}; try a lower --lr (now {rate:g})"
                        )
        except KeyboardInterrupt:
            if not history:
                raise
            print(f"stopped after {len(history)} steps", file=sys.stderr)
    return images.detach(), torch.stack(history).cpu()


def write(
    args: argparse.Namespace, title: str, contents: Tensor, style: Tensor, results: Tensor, history: Tensor
) -> None:
    import plots  # before pyplot: it chooses a backend that needs no display
    from matplotlib import pyplot as plt

    names = [Path(name).stem for name in args.content]
    figure, axes = plt.subplots(
        len(names), 3, figsize=(8.4, 2.9 * len(names) + 0.5), squeeze=False, layout="constrained"
    )
    figure.suptitle(title, fontsize=10)
    for row, name, content, result in zip(axes, names, contents, results, strict=True):
        shown = {f"content: {name}": content, f"style: {Path(args.style).stem}": style[0], "result": result}
        for axis, (label, picture) in zip(row, shown.items(), strict=True):
            axis.imshow(picture.permute(1, 2, 0).cpu().numpy(), vmin=0, vmax=1)
            axis.set_title(label, fontsize=10)
            axis.set_axis_off()
    plots.write_png(figure, args.out / PICTURES)

    figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
    weights = (1.0, args.content_weight, args.style_weight, args.tv_weight)
    for i, (name, weight) in enumerate(zip(Terms._fields, weights, strict=True)):
        label = name if i == 0 else f"{weight:g} {name}"
        axis.plot(
            np.arange(1, len(history) + 1), weight * history[:, i], label=label, linewidth=2.4 - 0.4 * i
        )
    axis.set(title=title, xlabel="step", ylabel="loss", yscale="log")
    axis.title.set_fontsize(10)
    axis.legend()
    axis.grid(alpha=0.25)
    plots.write_png(figure, args.out / CURVE)
    for path, result in zip(result_paths(args), results, strict=True):
        buffer = io.BytesIO()
        pixels = (result * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        Image.fromarray(pixels).save(buffer, format="png")
        write_atomically(path, buffer.getvalue())


def new_folder(wanted: Path) -> Path:
    """The folder, or while it holds the results of an earlier run, one of that name and a number."""
    folder, number = wanted, 1
    while any((folder / name).exists() for name in (PICTURES, CURVE)) or any(folder.glob("result-*.png")):
        number += 1
        folder = wanted.resolve().with_name(f"{wanted.resolve().name}-{number}")
    return folder


def result_paths(args: argparse.Namespace) -> list[Path]:
    """One for each content; a name that is taken, in any case of its letters, gets a number."""
    names: list[str] = []
    taken: set[str] = set()
    for stem in (Path(name).stem for name in args.content):
        name, number = stem, 1
        while name.casefold() in taken:
            number += 1
            name = f"{stem}-{number}"
        names.append(name)
        taken.add(name.casefold())
    return [args.out / f"result-{name}.png" for name in names]


def run(args: argparse.Namespace) -> None:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    contents = torch.cat([load_picture(name, args.size) for name in args.content]).to(device)
    style = load_picture(args.style, args.size).to(device)
    args.out = new_folder(args.out)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out: cannot create the folder {args.out}: {error.strerror}") from error
    found = find_weights(args.trunk, args.weights, option="--weights")
    if found.weights is None:
        print(RANDOM_WARNING.format(name=args.trunk, option="--weights"), flush=True)
    objective = make_objective(args, found, contents, style)
    begin = time.perf_counter()
    results, history = optimize(args, objective, contents)
    seconds = time.perf_counter() - begin
    label = found.label if args.weights is None else f"{args.trunk}, weights {Path(args.weights).name}"
    title = f"{len(history)} steps of {args.optimizer}, {args.size}x{args.size}, {label}"
    write(args, title, contents, style, results, history)
    for name, values in zip(Terms._fields, history.T, strict=True):
        print(f"{name:10} {float(values[0]):10.5f} at first, {float(values[-1]):10.5f} at the end")
    print(f"{seconds:.1f} s for {len(history)} steps on {device.type}")
    print(f"written: {', '.join(map(str, (args.out / PICTURES, args.out / CURVE, *result_paths(args))))}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 with one line on stderr."""
    try:
        run(parse(argv))
        return 0
    except ImportError as error:
        message = f"{error}; install the package with what the examples need: pip install '.[demo]'"
    except InputError as error:
        message = str(error)
    except KeyboardInterrupt:
        message = "stopped before the first step"
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error).lower():
            raise
        message = "out of memory; try a smaller --size, or --chunk 1 with several contents"
    print(f"style_transfer.py: error: {message}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
