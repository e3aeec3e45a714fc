"""One table of every op in its settings: how it is called, its inputs, its formula, what it keeps for the backward.

What is asked of all ops alike is tested over this table; the name of a test contains the setting's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from feature_cases import (
    STYLES,
    check,
    distance_call,
    distance_formula,
    distance_settings,
    distance_sizes,
    gram_call,
    gram_formula,
    gram_sizes,
    style_call,
    style_formula,
    style_pair,
    style_settings,
    style_sizes,
)
from harness import (
    EMULATING,
    INTERPRETING,
    Backend,
    Call,
    as_tuple,
    backend_for,
    check_against_truth,
    evaluate,
)
from lpips_cases import lpips_call, lpips_formula, lpips_sizes
from op_inputs import (
    Size,
    convolution,
    exact_images,
    features,
    given_grams,
    images,
    masked_features,
    of_one_batch,
    one_image,
    one_map,
    unit_images,
)
from pairs_cases import (
    GRADIENT_REGIONS,
    MASK_IS,
    PARTS,
    SCALE,
    SHIFT,
    composite_formula,
    gradient_loss_call,
    gradient_loss_formula,
    inpainting_pixel_call,
    inpainting_pixel_formula,
    stacked_images_call,
    stacked_images_formula,
    total_variation_call,
    total_variation_formula,
)
from pairs_cases import MODES as PAIR_MODES
from pairs_cases import PENALTIES as PAIR_PENALTIES
from partial_conv_cases import FORMS, FUNCTIONS
from pixel_cases import (
    MODES,
    NORMALIZATIONS,
    PENALTIES,
    hole_valid_call,
    hole_valid_formula,
    masked_call,
    masked_formula,
    on_device,
    skip_unsupported,
)
from ssim_cases import WINDOWS, ssim_call, ssim_formula
from ssim_cases import check as check_ssim
from torch import Tensor

import inpaint_kernels as ik

SMALL = (2, 3, 4, 5)
# What large inputs are: several tiles, parts of a sum and threads.
LARGE = (2, 3, 5, 7) if INTERPRETING else (2, 3, 48, 56) if EMULATING else (3, 3, 150, 170)
MANY_CHANNELS = ((1, 17, 9, 14),) if INTERPRETING or EMULATING else ((2, 3, 91, 101), (2, 64, 91, 101))
# Of the inputs that kernels compute a gradient to, by how many those are.
SUBSETS: dict[int, tuple[tuple[int, ...], ...]] = {
    1: ((0,),),
    2: ((0, 1), (0,), (1,)),
    3: ((0, 1, 2), (0,), (1,), (2,), (0, 2), (1, 2)),
    4: ((0, 1, 2, 3), (0, 1), (1,), (0, 3), (2, 3)),
}


@dataclass(frozen=True, repr=False)
class Op:
    """An op in one setting, as a function of a flat list of tensors."""

    id: str
    name: str  # of its operators, inpaint_kernels::<name>_<backend>
    by: Callable[[Backend | None], Call]  # the call on one backend
    formula: Call
    make: Callable[..., list[Tensor]]  # inputs from (size, dtypes, layout, mask), on the CPU
    free: int  # how many of the first tensors kernels compute a gradient to
    judge: Callable[..., None]  # raises unless (call, formula, inputs, wanted=) is right
    # The most bytes of memory that nobody else holds; `made`: which inputs nobody else holds either.
    keeps: Callable[[Sequence[Tensor]], float] | None = None
    made: tuple[int, ...] = ()
    large: tuple[Size, ...] = (LARGE,)
    mask_is: str = "valid"

    def __repr__(self) -> str:
        return self.id

    @property
    def wanted(self) -> tuple[int, ...]:
        return tuple(range(self.free))

    def outputs(self, tensors: Sequence[Tensor], backend: str | None = None) -> tuple[Tensor, ...]:
        return as_tuple(self.by(backend and Backend(backend, "cpu"))(*tensors))

    def check(self, call: Call, inputs: Sequence[Tensor]) -> None:
        """Values and gradients of `call`, which is this op, are right."""
        self.judge(call, self.formula, inputs, wanted=self.wanted)

    def check_on(self, backend: Backend, inputs: Sequence[Tensor]) -> None:
        # Kernels read Gram matrices in their dtype; masks become what kernels take.
        skip_unsupported(backend, *(inputs if self.name == "style" else inputs[: self.free]))
        self.check(self.by(backend), on_device(backend, *inputs))


# ---- the table ---------------------------------------------------------------------------------------------------

# A gradient that is a sum of both signs is judged by its largest element.
PAIRS = partial(check_against_truth, magnitudes={0: None, 1: None})
KEPT_MASK = 1 / 8  # cpu also keeps the mask as bits, to spare its backward the mask itself


def bits(an_element: float, of_mask: float, numbers: int) -> Callable[[Sequence[Tensor]], float]:
    """Of the first image, of the mask; and single numbers of up to 8 bytes."""
    return lambda t: t[0].numel() * an_element / 8 + t[-1].numel() * of_mask + numbers * 8


def masked() -> Iterator[Op]:
    for penalty, mode in product(PENALTIES, MODES):
        options = {"penalty": penalty, "mode": mode}
        # Packed signs, and the scales [N, 1]; smooth penalties keep their inputs.
        l1 = penalty == "l1"
        yield Op(
            f"masked_l1 {penalty} {mode}", "masked_l1", partial(masked_call, **options),
            partial(masked_formula, **options), images, 2, check_against_truth,
            keeps=bits(2 if l1 else 0, 0, 8), made=(0, 1) if l1 else (),
        )  # fmt: skip


def hole_valid() -> Iterator[Op]:
    for penalty, normalize, region in product(PENALTIES, NORMALIZATIONS, MASK_IS):
        options = {"penalty": penalty, "normalize": normalize, "mask_is": region}
        l1 = penalty == "l1"
        yield Op(
            f"hole_valid {penalty} {normalize} {region}", "hole_valid", partial(hole_valid_call, **options),
            partial(hole_valid_formula, **options), images, 2, check_against_truth,
            keeps=bits(2 if l1 else 0, KEPT_MASK * l1, 16), made=(0, 1) if l1 else (), mask_is=region,
        )  # fmt: skip


DEFAULT = "dilated_hole-default"


def mask_is(number: int) -> str:
    """Both meanings for every value of every option, whose lists have two elements or more."""
    return MASK_IS[(number + number // 2 + number // 4) % 2]


def inpainting_pixel() -> Iterator[Op]:
    some = (DEFAULT, "image-default", "hole-mask")
    settings = [*product(NORMALIZATIONS, some, PAIR_PENALTIES)]
    settings += [("image", mode, "l1") for mode in PAIR_MODES if mode not in some]
    for i, (normalize, mode, penalty) in enumerate(settings):
        options = {"normalize": normalize, "mode": mode, "penalty": penalty, "mask_is": mask_is(i)}
        yield Op(
            f"inpainting_pixel {normalize} {mode} {penalty}", "inpainting_pixel",
            partial(inpainting_pixel_call, **options), partial(inpainting_pixel_formula, **options),
            exact_images, 2, PAIRS, keeps=bits(6, KEPT_MASK, 24) if penalty == "l1" else None, made=(0, 1),
            mask_is=mask_is(i),
        )  # fmt: skip


def total_variation() -> Iterator[Op]:
    for i, (mode, penalty, of) in enumerate(product(PAIR_MODES, PAIR_PENALTIES, ("composite", "image"))):
        options = {"mode": mode, "penalty": penalty, "mask_is": mask_is(i)}
        composite, l1 = of == "composite", penalty == "l1"
        by, formula = partial(total_variation_call, **options), partial(total_variation_formula, **options)
        yield Op(
            f"total_variation {penalty} {mode} {of}", "total_variation",
            by if composite else lambda backend, by=by: lambda x, mask=None: by(backend)(x, None, mask),
            formula if composite else lambda x, mask=None, formula=formula, **o: formula(x, None, mask, **o),
            exact_images if composite else one_image, 1 + composite, PAIRS,
            keeps=bits(4 * l1, KEPT_MASK * l1, 4 if l1 else 2), made=(0, 1)[: 1 + composite] if l1 else (),
            mask_is=mask_is(i),
        )  # fmt: skip


def gradient_loss() -> Iterator[Op]:
    for i, (region, penalty) in enumerate(product(GRADIENT_REGIONS, PAIR_PENALTIES)):
        options = {"region": region, "penalty": penalty, "mask_is": mask_is(i)}
        # 4 bits an element, the scales, R of the ring, on the CPU the mask in bits.
        kept = bits(4, KEPT_MASK + 4 * (region == "ring"), 16) if penalty == "l1" else None
        yield Op(
            f"gradient_loss {region} {penalty}", "gradient_loss", partial(gradient_loss_call, **options),
            partial(gradient_loss_formula, **options), exact_images, 2, PAIRS, keeps=kept, made=(0, 1),
            mask_is=mask_is(i),
        )  # fmt: skip


def ssim() -> Iterator[Op]:
    for l1 in (True, False):
        given: dict[str, Any] = {"l1": l1, **WINDOWS}
        yield Op(
            f"ssim same{' l1' if l1 else ''}", "ssim", partial(ssim_call, **given),
            partial(ssim_formula, **given), unit_images, 2, check_ssim,
            # The scales of 24 planes and of l1; references to the images, which the caller holds.
            keeps=bits(0, 0, 13),
        )  # fmt: skip


NORMALIZED: dict[str, Any] = {"scale": SCALE, "shift": SHIFT}
STACKS: dict[str, dict[str, Any]] = {
    "all": {"parts": PARTS, **NORMALIZED},
    "swap": {"parts": PARTS, **NORMALIZED, "swap_channels": True, "mask_is": "hole"},
    "composite": {"parts": ("composite",)},
    "raw+target": {"parts": ("raw", "target"), **NORMALIZED},
    "holes": {"parts": ("hole_raw", "hole_target"), **NORMALIZED, "swap_channels": True},
    "target+raw": {"parts": ("target", "raw"), "scale": 2.0},
}


def in_common_dtype(call: Call, formula: Call, inputs: Sequence[Tensor], **options: Any) -> None:
    check_against_truth(
        call, formula, inputs, out_dtype=torch.promote_types(*(t.dtype for t in inputs[:2])), **options
    )


def stacked_images() -> Iterator[Op]:
    for stack, options in STACKS.items():
        mask = 0 if "target" in stack else 4
        common = (
            "stacked_images", partial(stacked_images_call, **options), partial(stacked_images_formula, **options),
            exact_images, 2, in_common_dtype,
        )  # fmt: skip
        # The mask, and nothing else; a mask that the caller holds costs nothing.
        given = options.get("mask_is", "valid")
        yield Op(f"stacked_images {stack}", *common, keeps=bits(0, 0, 0), made=(0, 1), mask_is=given)
        yield Op(f"stacked_images {stack} own mask", *common, keeps=bits(0, mask, 0), made=(0, 1, 2))
    for given in MASK_IS:
        yield Op(
            f"composite {given}", "composite",
            lambda backend, given=given: partial(
                ik.composite, mask_is=given, backend=backend_for("composite", backend)
            ),
            partial(composite_formula, mask_is=given), exact_images, 2, in_common_dtype,
            keeps=bits(0, 0, 0), made=(0, 1), mask_is=given,
        )  # fmt: skip


def gram() -> Iterator[Op]:
    for normalize in ("chw", "hw", "none"):
        yield Op(
            f"gram {normalize}", "gram", partial(gram_call, normalize=normalize),
            partial(gram_formula, normalize=normalize), one_map, 1,
            partial(check, sizes=partial(gram_sizes, normalize=normalize)),
            keeps=lambda t: 0.0, large=MANY_CHANNELS,
        )  # fmt: skip


def _matrices(t: Sequence[Tensor]) -> float:
    """One for each sample and layer, and targets that want a gradient."""
    asked = sum(y.numel() * y.element_size() for y in t[2:] if y.requires_grad)
    return asked + sum(4 * x.shape[0] * x.shape[1] ** 2 for x in t[:2])


def style() -> Iterator[Op]:
    settings = [*product(STYLES, ("", " gram")), ("chw-l1", " once")]
    for name, kind in settings:
        given = kind == " gram"
        options = style_settings(name, (0.5, 2.0), target_is_gram=given)
        make = partial(features, pair=style_pair, predictions=1 if kind == " once" else 2)
        yield Op(
            f"style {name}{kind}", "style", partial(style_call, settings=options),
            partial(style_formula, **options), partial(given_grams, style=name) if given else make,
            2 if given else 4, partial(check, sizes=partial(style_sizes, **options)),
            keeps=_matrices, made=(2, 3), large=MANY_CHANNELS,
        )  # fmt: skip


def feature_distance() -> Iterator[Op]:
    settings = [*product(("l1", "l2", "charbonnier"), (" mask", "")), ("l1", " once")]
    for penalty, kind in settings:
        masked, l1 = kind == " mask", penalty == "l1"
        options = distance_settings(penalty, weights=(0.5, 2.0))
        make = partial(features, predictions=1 if kind == " once" else 2)

        def keeps(t: Sequence[Tensor], l1: bool = l1) -> float:
            return (sum(x.numel() for x in t[:2]) / 4 if l1 else 0) + 64

        yield Op(
            f"feature_distance {penalty}{kind}", "feature_distance",
            partial(distance_call, layers=2, settings=options),
            partial(distance_formula, layers=2, **options), masked_features if masked else make, 4,
            partial(check, sizes=partial(distance_sizes, layers=2, **options)),
            keeps=keeps, made=(0, 1, 2, 3) if l1 else (),
        )  # fmt: skip


def lpips() -> Iterator[Op]:
    for kind in ("mask", "plain", "once"):
        make = masked_features if kind == "mask" else features
        yield Op(
            f"lpips {kind}", "lpips", lpips_call, lpips_formula,
            partial(make, predictions=1 if kind == "once" else 2, sizes=of_one_batch), 4,
            partial(check, sizes=lpips_sizes),
            # Four numbers a pixel, the weights and the masks, which the caller holds.
            keeps=lambda t: sum(16 * x[:, 0].numel() + 4 * x.shape[1] for x in t[:2]),
        )  # fmt: skip


def partial_conv() -> Iterator[Op]:
    settings = [(form, mask, 2) for form, mask in product(FORMS, ("n1", "none", "nc"))]
    for form, mask, dims in [*settings, ("soft", "n1", 3)]:

        def by(backend: Backend | None, form: str = form, dims: int = dims) -> Call:
            def call(*t: Tensor) -> Tensor:
                name = backend and backend.name
                found = FUNCTIONS[dims](*t, padding=1, **FORMS[form], backend=name)
                return found.output

            return call

        def keeps(t: Sequence[Tensor], known: bool = mask != "none") -> float:
            """Two planes; an operand only for the gradient to the other one."""
            x, w = (s.numel() * s.element_size() for s in t[:2])
            planes = 8 * t[0][:, 0].numel() // (1 if known else t[0].shape[0])
            return planes + x * t[1].requires_grad + w * t[0].requires_grad

        def as_eager(call: Call, eager: Call, inputs: Sequence[Tensor], wanted: Sequence[int]) -> None:
            want = evaluate(eager, inputs, wanted)
            got = evaluate(call, inputs, wanted, want[2])
            torch.testing.assert_close((*got[0], *got[1]), (*want[0], *want[1]), rtol=1e-6, atol=1e-6)

        yield Op(
            f"partial_conv {form} {mask} {dims}d", "partial_conv", by, by(Backend("reference", "cpu")),
            partial(convolution, holes=mask, dims=dims), 3, as_eager,
            keeps=keeps, made=(0, 1),
        )  # fmt: skip


def table(*groups: Callable[[], Iterator[Op]]) -> dict[str, Op]:
    return {op.id: op for group in groups for op in group()}


OPS = table(
    masked, hole_valid, total_variation, inpainting_pixel, gradient_loss, ssim, stacked_images,
    gram, style, feature_distance, lpips, partial_conv,
)  # fmt: skip
