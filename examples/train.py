"""Trains a small partial-convolution U-Net to fill holes, with the fused losses of inpaint_kernels.

    python examples/train.py                                    # photographs in scikit-image and matplotlib
    python examples/train.py --trunk-weights vgg16.pth          # features that mean something
    python examples/train.py --images photos --masks holes      # your own
    python examples/train.py --objective ctn                    # another method, with a discriminator
    python examples/train.py --objective pixel                  # without a trunk: many more steps in the same time
    python examples/train.py --resume                           # goes on from runs/demo/checkpoint.pt
    torchrun --nproc-per-node 2 examples/train.py               # DDP: gloo on CPUs, nccl on GPUs

With ``pconv``, the default, most steps have pixel terms alone, and the last ones the whole objective if the trunk is
trained. The first of the last ones are then repeated with the eager formulas. Written to --out: ``pictures.png``,
``curves.png``, ``report.json`` and ``checkpoint.pt`` (with ``checkpoint.previous.pt``, the one before).

Ctrl-C ends the training after the step it is in, or after one of the next ten with several processes, and saves a
checkpoint to go on from; a second Ctrl-C ends it at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 with one line on stderr."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        from options import parse

        args = parse(argv)
        # Behind the options, because `--help` needs neither pillow nor tqdm.
        import job
    except ModuleNotFoundError as error:
        print(
            f"train.py: error: {error}; install what the examples need: pip install '.[demo]'",
            file=sys.stderr,
        )
        return 2
    return job.run(args, argv)


if __name__ == "__main__":
    sys.exit(main())
