"""Training objectives of inpainting methods as their released code computes them, in plain PyTorch.

Nothing here is fused, shared or made safe: each function repeats, term by term, what a training script of its method
does today. Use it to check an implementation, or to measure against. The tests compare it with the objectives of the
package, and these with figures that the released code computed, but for cmt and deepfill, of which there are none.

Arguments have the same meaning everywhere. ``pred`` is the network's output before anything is pasted over it and
``target`` the truth, both (N, 3, H, W) in the range the method trains in. ``mask`` is (N, 1, H, W); what its 1 means
depends on the method, too:

=============== ============== ========== ===================================== ==============================
method          mask 1 means   images     trunk                                 the discriminator sees
=============== ============== ========== ===================================== ==============================
partial_conv    known          [0, 1]     VGG16                                 no discriminator
ctn, t_former   known          [-1, 1]    VGG19                                 the output
mat             known          [-1, 1]    VGG19                                 [mask - 0.5, composite], twice
transcnn_hae    no mask        [-1, 1]    VGG19                                 no discriminator
coordfill       known          [-1, 1]    AlexNet                               the composite
cmt             hole           [0, 1]     VGG16                                 the composite
lama            hole           [0, 1]     ResNet50 trained for segmentation     the output
edge_connect    hole           [0, 1]     VGG19                                 the output, or [gray, edges]
aot_gan         hole           [-1, 1]    VGG19                                 the composite
deepfill_v1     hole           [-1, 1]    none                                  the composite, and a patch of it
deepfill_v2     hole           [-1, 1]    none                                  [composite, mask]
=============== ============== ========== ===================================== ==============================

``trunk(images, layers)`` returns the frozen network's feature maps of the named layers ("relu1_1", "pool1", "conv4_4"
before its ReLU; "relu1" for AlexNet) and does nothing else to the images: where a method normalises them, its
function does. ``fake`` and ``real`` are what the discriminator returns for generated and for true images, logits
before any sigmoid.

Generator objectives return a dictionary of the raw terms and ``"total"``, their weighted sum; discriminator
objectives return ``"real"``, ``"fake"`` and ``"total"``. Penalties on the discriminator's gradient are functions of
their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Trunk = Callable[[Tensor, Sequence[str]], Sequence[Tensor]]
Terms = dict[str, Tensor]

# Of VGG19. EdgeConnect chose them; CTN, T-former and AOT-GAN took over its loss file.
PERCEPTUAL_LAYERS = ("relu1_1", "relu2_1", "relu3_1", "relu4_1", "relu5_1")
STYLE_LAYERS = ("relu2_2", "relu3_4", "relu4_4", "relu5_2")


# -- what several methods share ----------------------------------------------------------------


def composite(pred: Tensor, target: Tensor, known: Tensor) -> Tensor:
    """The truth where ``known`` is 1, the prediction where it is 0."""
    return known * target + (1 - known) * pred


def gram(features: Tensor) -> Tensor:
    n, c, h, w = features.shape
    flat = features.reshape(n, c, h * w)
    return torch.bmm(flat, flat.transpose(1, 2)) / (c * h * w)


def perceptual_l1(x: Sequence[Tensor], y: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    loss = x[0].new_zeros(())
    for a, b, weight in zip(x, y, weights, strict=True):
        loss = loss + weight * F.l1_loss(a, b)
    return loss


def style_l1(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    loss = x[0].new_zeros(())
    for a, b in zip(x, y, strict=True):
        loss = loss + F.l1_loss(gram(a), gram(b))
    return loss


def log_loss(logits: Tensor, label: float) -> Tensor:
    """On the sigmoid in which the discriminator ends, as nn.BCELoss computes it."""
    probability = torch.sigmoid(logits)
    return F.binary_cross_entropy(probability, torch.full_like(probability, label))


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
LPIPS = ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450))
_BUFFERS: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}


def normalized(images: Tensor, mean_std: tuple[Sequence[float], Sequence[float]]) -> Tensor:
    """(images - mean) / std; the constants are kept, as modules keep them in buffers."""
    key = (mean_std, images.dtype, images.device)
    if key not in _BUFFERS:
        mean, std = (images.new_tensor(values).view(1, 3, 1, 1) for values in mean_std)
        _BUFFERS[key] = mean, std
    mean, std = _BUFFERS[key]
    return (images - mean) / std


def log_loss_discriminator(real: Tensor, fake: Tensor) -> Terms:
    """The mean of both sides (CTN, T-former, EdgeConnect)."""
    on_real, on_fake = log_loss(real, 1.0), log_loss(fake, 0.0)
    return {"total": (on_real + on_fake) / 2, "real": on_real, "fake": on_fake}


def squared_gradient_norm(logits: Tensor, images: Tensor) -> Tensor:
    """(N,): of the summed logits by each image, differentiable once more."""
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.square().sum([1, 2, 3])


# -- Partial convolution -----------------------------------------------------------------------


def partial_conv(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    hole_weight: float = 6.0,
    valid_weight: float = 1.0,
    tv_weight: float = 0.1,
    perceptual_weight: float = 0.05,
    style_weight: float = 120.0,
) -> Terms:
    """Liu et al. (2018), as the paper states it. Perceptual and style term compare the output and the composite."""
    error = (pred - target).abs()
    hole, valid = ((1 - mask) * error).mean(), (mask * error).mean()
    image = composite(pred, target, mask)
    tv = variation_around(image, 1 - mask)
    layers = ("pool1", "pool2", "pool3")
    *found, truth = (trunk(normalized(images, IMAGENET), layers) for images in (pred, image, target))
    perceptual = torch.stack([perceptual_l1(maps, truth, (1.0, 1.0, 1.0)) for maps in found]).sum()
    style = torch.stack([style_l1(maps, truth) for maps in found]).sum()
    total = (
        hole_weight * hole
        + valid_weight * valid
        + tv_weight * tv
        + perceptual_weight * perceptual
        + style_weight * style
    )
    return {
        "total": total,
        "hole": hole,
        "valid": valid,
        "tv": tv,
        "perceptual": perceptual,
        "style": style,
    }


def variation_around(image: Tensor, hole: Tensor) -> Tensor:
    """Summed differences of neighbours in the hole dilated by one pixel, as a share of all elements."""
    region = F.max_pool2d(hole, 3, stride=1, padding=1)
    across = region[:, :, :, 1:] * region[:, :, :, :-1] * (image[:, :, :, 1:] - image[:, :, :, :-1]).abs()
    down = region[:, :, 1:] * region[:, :, :-1] * (image[:, :, 1:] - image[:, :, :-1]).abs()
    return (across.sum() + down.sum()) / image.numel()


# -- CTN and T-former --------------------------------------------------------------------------


def ctn(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    fake: Tensor,
    l1_weight: float = 1.0,
    perceptual_weight: float = 1.0,
    style_weight: float = 1.0,
    adversarial_weight: float = 0.1,
) -> Terms:
    """dengyecode/ContextualTransformer. The style weight is what was released; its sibling repositories have 250.

    Perceptual and style loss are modules of their own, each with a VGG19 that is fed unnormalised images, the style
    loss with images that are 0 on known pixels.
    """
    hole = 1 - mask
    l1 = F.l1_loss(pred, target)
    perceptual = perceptual_l1(
        trunk(pred, PERCEPTUAL_LAYERS), trunk(target, PERCEPTUAL_LAYERS), (1.0, 1.0, 1.0, 1.0, 1.0)
    )
    style = style_l1(trunk(hole * pred, STYLE_LAYERS), trunk(hole * target, STYLE_LAYERS))
    adversarial = log_loss(fake, 1.0)
    total = (
        l1_weight * l1
        + perceptual_weight * perceptual
        + style_weight * style
        + adversarial_weight * adversarial
    )
    return {
        "total": total,
        "l1": l1,
        "perceptual": perceptual,
        "style": style,
        "adversarial": adversarial,
    }


ctn_discriminator = log_loss_discriminator


def t_former(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    fake: Tensor,
    l1_weight: float = 1.0,
    perceptual_weight: float = 1.0,
    style_weight: float = 250.0,
    adversarial_weight: float = 0.1,
) -> Terms:
    """dengyecode/T-former_image_inpainting: the loss file of CTN with another weight."""
    return ctn(
        trunk,
        pred,
        target,
        mask,
        fake=fake,
        l1_weight=l1_weight,
        perceptual_weight=perceptual_weight,
        style_weight=style_weight,
        adversarial_weight=adversarial_weight,
    )


t_former_discriminator = log_loss_discriminator


# -- MAT ---------------------------------------------------------------------------------------


def mat(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    fake: tuple[Tensor, Tensor],
    layers: Sequence[str] = ("conv4_4", "conv5_4"),
    layer_weights: Sequence[float] = (1 / 4, 1 / 2),
    perceptual_weight: float = 0.1,
) -> Terms:
    """fenglinglwb/MAT. ``fake``: logits of the final image and of the first stage's, each by its own critic.

    A critic sees ``mat_critic_input(composite(...), mask)``. Only the perceptual term reads ``pred``, the final
    image.
    """
    image = composite(pred, target, mask)
    x, y = (trunk(normalized((images + 1) / 2, IMAGENET), layers) for images in (image, target))
    perceptual = perceptual_l1(x, y, layer_weights)
    adversarial, adversarial_stage1 = F.softplus(-fake[0]), F.softplus(-fake[1])
    total = (adversarial + adversarial_stage1 + perceptual_weight * perceptual).mean()
    return {
        "total": total,
        "perceptual": perceptual,
        "adversarial": adversarial.mean(),
        "adversarial_stage1": adversarial_stage1.mean(),
    }


def mat_critic_input(image: Tensor, mask: Tensor) -> Tensor:
    """(N, 4, H, W) of a composite or of a true image."""
    return torch.cat([mask - 0.5, image], 1)


def mat_discriminator(real: tuple[Tensor, Tensor], fake: tuple[Tensor, Tensor]) -> Terms:
    on_real = (F.softplus(-real[0]) + F.softplus(-real[1])).mean()
    on_fake = (F.softplus(fake[0]) + F.softplus(fake[1])).mean()
    return {"total": on_real + on_fake, "real": on_real, "fake": on_fake}


def mat_r1(real: tuple[Tensor, Tensor], images: tuple[Tensor, Tensor], gamma: float = 10.0) -> Tensor:
    """R1 of both critics; MAT adds 16 times this in every 16th step.

    ``images``: the true images, once for each critic, that require gradients and that ``real`` was computed from.
    """
    penalty = squared_gradient_norm(real[0], images[0]) + squared_gradient_norm(real[1], images[1])
    return (gamma / 2 * penalty).mean()


# -- TransCNN-HAE ------------------------------------------------------------------------------


def transcnn_hae(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    *,
    layer_weights: Sequence[float] = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1.0),
    l1_weight: float = 2.0,
    perceptual_weight: float = 1.0,
    style_weight: float = 250.0,
) -> Terms:
    """zhenglab/TransCNN-HAE, v1.0. One VGG19 pass for both terms; the style term has its last two layers."""
    l1 = F.l1_loss(pred, target)
    x, y = trunk(pred, PERCEPTUAL_LAYERS), trunk(target, PERCEPTUAL_LAYERS)
    perceptual = perceptual_l1(x, y, layer_weights)
    style = style_l1(x[3:], y[3:])
    total = l1_weight * l1 + perceptual_weight * perceptual + style_weight * style
    return {"total": total, "l1": l1, "perceptual": perceptual, "style": style}


# -- CoordFill ---------------------------------------------------------------------------------


def coordfill(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    heads: Sequence[Tensor],
    fake: Tensor,
    fake_features: Sequence[Tensor],
    real_features: Sequence[Tensor],
    lpips_weight: float = 10.0,
    adversarial_weight: float = 1.0,
    feature_matching_weight: float = 100.0,
) -> Terms:
    """NiFangBaAGe/CoordFill. ``heads``: LPIPS' weights of each layer's channels, (C,) or (1, C, 1, 1).

    The features are the critic's activations before its last convolution, four of them.
    """
    distance = lpips(trunk, composite(pred, target, mask), target, heads).sum(0).mean()
    adversarial = log_loss(fake, 1.0)
    matching = fake.new_zeros(())
    for a, b in zip(fake_features, real_features, strict=True):
        matching = matching + F.l1_loss(a, b.detach())
    total = lpips_weight * distance + adversarial_weight * adversarial + feature_matching_weight * matching
    return {
        "total": total,
        "lpips": distance,
        "adversarial": adversarial,
        "feature_matching": matching,
    }


def lpips(trunk: Trunk, x: Tensor, y: Tensor, heads: Sequence[Tensor]) -> Tensor:
    """The distance by each layer of AlexNet of each sample, (5, N); LPIPS is their sum over the layers."""
    layers = ("relu1", "relu2", "relu3", "relu4", "relu5")
    maps = [trunk(normalized(images, LPIPS), layers) for images in (x, y)]
    found = []
    for a, b, head in zip(*maps, heads, strict=True):
        difference = (unit_vectors(a) - unit_vectors(b)) ** 2
        found.append(F.conv2d(difference, head.view(1, -1, 1, 1)).mean((1, 2, 3)))
    return torch.stack(found)


def unit_vectors(features: Tensor, eps: float = 1e-10) -> Tensor:
    """The gradient of a zero vector is NaN, and only the ReLU below it keeps that from the image."""
    norm = torch.sqrt(torch.sum(features**2, dim=1, keepdim=True))
    return features / (norm + eps)


def coordfill_discriminator(real: Tensor, fake: Tensor) -> Terms:
    """The sum of both sides, not their mean."""
    on_real, on_fake = log_loss(real, 1.0), log_loss(fake, 0.0)
    return {"total": on_real + on_fake, "real": on_real, "fake": on_fake}


# -- CMT, as others train it -------------------------------------------------------------------


def cmt(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    fake: Tensor,
    hole_weight: float = 1.0,
    valid_weight: float = 0.1,
    perceptual_weight: float = 10.0,
    adversarial_weight: float = 0.001,
) -> Terms:
    """A public reimplementation of CMT; its authors released no training code, so this is not the paper's objective.

    The reimplementation's network pastes the known pixels itself, and its L1 term sees the result: pass the composite
    as ``pred`` to repeat that.
    """
    error = (pred - target).abs()
    hole = (mask * error).mean()
    valid = ((1 - mask) * error).mean()
    layers = ("relu1_2", "relu2_2", "relu3_3", "relu4_3")
    perceptual = pred.new_zeros(())
    for a, b in zip(trunk(composite(pred, target, 1 - mask), layers), trunk(target, layers), strict=True):
        perceptual = perceptual + F.mse_loss(a, b)
    adversarial = F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))
    total = (
        hole_weight * hole
        + valid_weight * valid
        + perceptual_weight * perceptual
        + adversarial_weight * adversarial
    )
    return {
        "total": total,
        "hole": hole,
        "valid": valid,
        "perceptual": perceptual,
        "adversarial": adversarial,
    }


def cmt_discriminator(real: Tensor, fake: Tensor) -> Terms:
    on_real = F.binary_cross_entropy_with_logits(real, torch.ones_like(real))
    on_fake = F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake))
    return {"total": (on_real + on_fake) / 2, "real": on_real, "fake": on_fake}


# -- LaMa --------------------------------------------------------------------------------------


def lama(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    fake: Tensor,
    fake_features: Sequence[Tensor],
    real_features: Sequence[Tensor],
    layers: Sequence[str] = ("layer1", "layer2", "layer3", "layer4"),
    hole_weight: float = 0.0,
    valid_weight: float = 10.0,
    adversarial_weight: float = 10.0,
    feature_matching_weight: float = 100.0,
    perceptual_weight: float = 30.0,
    extra_hole_weight: float = 0.0,
    resize: str = "nearest",
    mask_features: bool = False,
) -> Terms:
    """advimman/lama, configuration lama-fourier. ``l1`` is weighed by pixel, 10 where known and 0 in the hole.

    The features are the critic's activations before its last convolution. Switches that are off by default:
    ``extra_hole_weight`` and ``resize`` as `lama_generator`, ``mask_features`` as `lama_feature_matching`.
    ``perceptual_weight=0`` leaves that term out, as for `lama_vgg_perceptual`.
    """
    l1 = (F.l1_loss(pred, target, reduction="none") * (mask * hole_weight + (1 - mask) * valid_weight)).mean()
    adversarial = lama_generator(fake, mask, extra_hole_weight=extra_hole_weight, resize=resize)
    matching = lama_feature_matching(fake_features, real_features, mask if mask_features else None)
    total = l1 + adversarial_weight * adversarial + feature_matching_weight * matching
    terms = {"l1": l1, "adversarial": adversarial, "feature_matching": matching}
    if perceptual_weight:
        x, y = (trunk(normalized(images, IMAGENET), layers) for images in (pred, target))
        perceptual = torch.stack([F.mse_loss(a, b) for a, b in zip(x, y, strict=True)]).sum()
        terms["perceptual"] = perceptual
        total = total + perceptual_weight * perceptual
    return {"total": total, **terms}


def lama_vgg_perceptual(trunk: Trunk, pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The perceptual term of LaMa's ablations, weight 0.03: known pixels, summed over layers and samples.

    ``trunk`` is a VGG19 with average pooling.
    """
    layers = [
        f"relu{block}_{i + 1}"
        for block, count in ((1, 2), (2, 2), (3, 4), (4, 4), (5, 1))
        for i in range(count)
    ]
    x, y = (trunk(normalized(images, IMAGENET), layers) for images in (pred, target))
    found = []
    for a, b in zip(x, y, strict=True):
        hole = F.interpolate(mask, size=a.shape[-2:], mode="bilinear", align_corners=False)
        found.append((F.mse_loss(a, b, reduction="none") * (1 - hole)).mean((1, 2, 3)))
    return torch.stack(found).sum()


def lama_feature_matching(
    fake: Sequence[Tensor], real: Sequence[Tensor], mask: Tensor | None = None
) -> Tensor:
    """Mean over the layers; with a mask of known pixels alone, divided by all of them."""
    found = []
    for a, b in zip(fake, real, strict=True):
        if mask is None:
            found.append(F.mse_loss(a, b))
        else:
            hole = F.interpolate(mask, size=a.shape[-2:], mode="bilinear", align_corners=False)
            found.append(((a - b).pow(2) * (1 - hole)).mean())
    return torch.stack(found).mean()


def lama_generator(
    fake: Tensor,
    mask: Tensor,
    *,
    extra_hole_weight: float = 0.0,
    hole_only: bool = False,
    resize: str = "nearest",
) -> Tensor:
    """The whole image, unless ``extra_hole_weight`` adds to the hole or ``hole_only`` leaves the rest out."""
    loss = F.softplus(-fake)
    if hole_only:
        loss = loss * _lama_resized(mask, fake, resize)
    elif extra_hole_weight:
        loss = loss * (1 + _lama_resized(mask, fake, resize) * extra_hole_weight)
    return loss.mean()


def _lama_resized(mask: Tensor, logits: Tensor, mode: str) -> Tensor:
    size = logits.shape[-2:]
    if mode == "maxpool":
        return F.adaptive_max_pool2d(mask, size)
    return F.interpolate(mask, size=size, mode=mode)


def lama_discriminator(real: Tensor, fake: Tensor, mask: Tensor, *, resize: str = "nearest") -> Terms:
    """Known pixels of a generated image count as real ("mask_as_fake_target"). `lama_r1` comes on top."""
    hole = _lama_resized(mask, fake, resize)
    on_real = F.softplus(-real).mean()
    on_fake = (hole * F.softplus(fake) + (1 - hole) * F.softplus(-fake)).mean()
    return {"total": on_real + on_fake, "real": on_real, "fake": on_fake}


def lama_r1(real: Tensor, images: Tensor, weight: float = 0.001) -> Tensor:
    """In every step of the critic, without MAT's factor 1/2. ``images`` require gradients."""
    return weight * squared_gradient_norm(real, images).mean()


# -- EdgeConnect -------------------------------------------------------------------------------


def edge_connect_edge(
    fake: Sequence[Tensor],
    real: Sequence[Tensor],
    *,
    adversarial_weight: float = 1.0,
    feature_matching_weight: float = 10.0,
) -> Terms:
    """knazeri/edge-connect, the edge stage. ``fake``, ``real``: the critic's five activations, the logits last."""
    adversarial = log_loss(fake[-1], 1.0)
    matching = fake[-1].new_zeros(())
    for a, b in zip(fake, real, strict=True):
        matching = matching + F.l1_loss(a, b.detach())
    total = adversarial_weight * adversarial + feature_matching_weight * matching
    return {"total": total, "adversarial": adversarial, "feature_matching": matching}


def edge_connect_inpaint(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    fake: Tensor,
    l1_weight: float = 1.0,
    perceptual_weight: float = 0.1,
    style_weight: float = 250.0,
    adversarial_weight: float = 0.1,
) -> Terms:
    """knazeri/edge-connect, the inpainting stage, weights of config.yml.example.

    L1 of the whole image is divided by the hole's share of the batch.
    """
    l1 = F.l1_loss(pred, target) / mask.mean()
    perceptual = perceptual_l1(
        trunk(pred, PERCEPTUAL_LAYERS), trunk(target, PERCEPTUAL_LAYERS), (1.0, 1.0, 1.0, 1.0, 1.0)
    )
    style = style_l1(trunk(pred * mask, STYLE_LAYERS), trunk(target * mask, STYLE_LAYERS))
    adversarial = log_loss(fake, 1.0)
    total = (
        l1_weight * l1
        + perceptual_weight * perceptual
        + style_weight * style
        + adversarial_weight * adversarial
    )
    return {
        "total": total,
        "l1": l1,
        "perceptual": perceptual,
        "style": style,
        "adversarial": adversarial,
    }


edge_connect_discriminator = log_loss_discriminator


# -- AOT-GAN -----------------------------------------------------------------------------------


def aot_gan(
    trunk: Trunk,
    pred: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    fake: Tensor,
    labels: str = "released",
    l1_weight: float = 1.0,
    perceptual_weight: float = 0.1,
    style_weight: float = 250.0,
    adversarial_weight: float = 0.01,
) -> Terms:
    """researchmm/AOT-GAN-for-Inpainting.

    ``labels="released"`` averages the squared error before it multiplies by the mask and divides by the mask's mean,
    which is the average over the whole image again. ``"paper"`` weighs it by pixel: the hole alone.
    """

    def vgg(images: Tensor, layers: Sequence[str]) -> Sequence[Tensor]:
        return trunk(normalized((images + 1) / 2, IMAGENET), layers)

    l1 = F.l1_loss(pred, target)
    perceptual = perceptual_l1(
        vgg(pred, PERCEPTUAL_LAYERS), vgg(target, PERCEPTUAL_LAYERS), (1.0, 1.0, 1.0, 1.0, 1.0)
    )
    style = style_l1(vgg(pred, STYLE_LAYERS), vgg(target, STYLE_LAYERS))
    logits = F.interpolate(fake, size=mask.shape[-2:], mode="bilinear", align_corners=True)
    reduction = "none" if labels == "paper" else "mean"
    error = F.mse_loss(logits, torch.ones_like(logits), reduction=reduction)
    adversarial = (error * mask / mask.mean()).mean()
    total = (
        l1_weight * l1
        + perceptual_weight * perceptual
        + style_weight * style
        + adversarial_weight * adversarial
    )
    return {
        "total": total,
        "l1": l1,
        "perceptual": perceptual,
        "style": style,
        "adversarial": adversarial,
    }


def aot_gan_discriminator(real: Tensor, fake: Tensor, mask: Tensor, *, labels: str = "released") -> Terms:
    """Labels of true images and of composites: ``"released"`` 0 and the blurred hole, ``"paper"`` 1 and the blurred
    known mask.
    """
    real, fake = (
        F.interpolate(logits, size=mask.shape[-2:], mode="bilinear", align_corners=True)
        for logits in (real, fake)
    )
    if labels == "paper":
        fake_label, real_label = gaussian_blur(1 - mask), torch.ones_like(real)
    else:
        fake_label, real_label = gaussian_blur(mask), torch.zeros_like(real)
    on_real, on_fake = F.mse_loss(real, real_label), F.mse_loss(fake, fake_label)
    return {"total": on_real + on_fake, "real": on_real, "fake": on_fake}


def gaussian_blur(mask: Tensor, size: int = 71, sigma: float = 10.0) -> Tensor:
    """Convolution with the whole two-dimensional kernel, zeros outside the image. The kernel is a float32 one."""
    offset = torch.arange(size, dtype=torch.float32, device=mask.device) - size // 2
    line = torch.exp(-(offset**2) / (2 * sigma**2))
    line = line / line.sum()
    kernel = torch.outer(line, line).to(mask.dtype)[None, None]
    return F.conv2d(mask, kernel, padding=size // 2).detach()


# -- DeepFill v1 and v2, as mmagic trains them -------------------------------------------------


def region_mean(error: Tensor, weight: Tensor) -> Tensor:
    return (error * weight).sum() / (weight.expand_as(error).sum() + 1e-12)


def _deepfill_pixel(stages: tuple[Tensor, Tensor], target: Tensor, mask: Tensor) -> Terms:
    terms = {}
    for number, pred in enumerate(stages, 1):
        terms[f"hole_stage{number}"] = region_mean((pred - target).abs(), mask)
        terms[f"valid_stage{number}"] = region_mean((pred - target).abs(), 1 - mask)
    return terms


def deepfill_v1(
    pred: tuple[Tensor, Tensor],
    target: Tensor,
    mask: Tensor,
    *,
    fake: tuple[Tensor, Tensor],
    hole_weight: float = 1.0,
    valid_weight: float = 1.0,
    adversarial_weight: float = 1e-4,
) -> Terms:
    """open-mmlab/mmagic, deepfillv1. ``pred``: of both stages; ``fake``: of the global and the local critic.

    The critics see ``composite(pred[1], (1 - mask) * target, 1 - mask)``, the local one a patch around the hole.
    """
    pixel = _deepfill_pixel(pred, target, mask)
    adversarial = -fake[0].mean() - fake[1].mean()
    total = (
        hole_weight * (pixel["hole_stage1"] + pixel["hole_stage2"])
        + valid_weight * (pixel["valid_stage1"] + pixel["valid_stage2"])
        + adversarial_weight * adversarial
    )
    return {"total": total, **pixel, "adversarial": adversarial}


def deepfill_v1_discriminator(
    real: tuple[Tensor, Tensor], fake: tuple[Tensor, Tensor], *, drift_weight: float = 0.001
) -> Terms:
    """Wasserstein, and a drift term: half the square of each of the four means. The gradient penalty comes on top."""
    means = torch.stack([-real[0].mean(), -real[1].mean(), fake[0].mean(), fake[1].mean()])
    on_real, on_fake, drift = means[:2].sum(), means[2:].sum(), 0.5 * means.square().sum()
    total = on_real + on_fake + drift_weight * drift
    return {"total": total, "real": on_real, "fake": on_fake, "drift": drift}


def deepfill_v1_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Tensor,
    fake: Tensor,
    mask: Tensor | None = None,
    *,
    alpha: Tensor | None = None,
    weight: float = 10.0,
) -> Tensor:
    """Of one critic: the global one with the mask, the local one (patches) without.

    The norm is taken over the channels of each pixel, so known pixels add a constant 1. ``alpha`` (N, 1, 1, 1) is the
    true image's share of the mix, by default random.
    """
    if alpha is None:
        alpha = torch.rand(real.shape[0], 1, 1, 1).to(real)
    mix = (alpha * real + (1.0 - alpha) * fake).detach().requires_grad_()
    logits = critic(mix)
    (gradient,) = torch.autograd.grad(logits, mix, torch.ones_like(logits), create_graph=True)
    if mask is not None:
        gradient = gradient * mask
    penalty = ((gradient.norm(2, dim=1) - 1) ** 2).mean()
    if mask is not None:
        penalty = penalty / mask.mean()
    return weight * penalty


def deepfill_v2(
    pred: tuple[Tensor, Tensor],
    target: Tensor,
    mask: Tensor,
    *,
    fake: Tensor,
    hole_weight: float = 1.0,
    valid_weight: float = 1.0,
    adversarial_weight: float = 0.1,
) -> Terms:
    """open-mmlab/mmagic, deepfillv2. ``pred``: outputs of both stages.

    The critic sees ``torch.cat([composite(pred[1], (1 - mask) * target, 1 - mask), mask], 1)``.
    """
    pixel = _deepfill_pixel(pred, target, mask)
    adversarial = -fake.mean()
    total = (
        hole_weight * (pixel["hole_stage1"] + pixel["hole_stage2"])
        + valid_weight * (pixel["valid_stage1"] + pixel["valid_stage2"])
        + adversarial_weight * adversarial
    )
    return {"total": total, **pixel, "adversarial": adversarial}


def deepfill_v2_discriminator(real: Tensor, fake: Tensor) -> Terms:
    on_real, on_fake = F.relu(1 - real).mean(), F.relu(1 + fake).mean()
    return {"total": on_real + on_fake, "real": on_real, "fake": on_fake}
