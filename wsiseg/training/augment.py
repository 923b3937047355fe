"""Augmentation on the device, of images and labels jointly. The training split only (D16, D17).

All random numbers are drawn on the CPU from the generator that is passed in: the same step gives
the same tiles on every device.
"""

import math

import torch
from torch.nn import functional

from wsiseg.settings.training import AugmentConfig

RGB_FROM_HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
"""Absorption of haematoxylin, eosin and DAB in R, G, B (Ruifrok and Johnston 2001)."""

BLUR_SIGMA = (0.3, 1.0)
"""Pixels; a slide slightly out of focus."""

BLUR_RADIUS = 2


def augment(
    images_NHWC: torch.Tensor,
    labels_NHW: torch.Tensor,
    config: AugmentConfig,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return augmented images uint8 (N, H, W, 3) and labels uint8 (N, H, W).

    Each sample is changed on its own. Labels only move, they are never interpolated.
    """
    if config.flip:
        images_NHWC, labels_NHW = _turn(images_NHWC, labels_NHW, generator)
    colours_change = config.stain_sigma or config.brightness or config.contrast
    if not colours_change and not config.blur_probability:
        return images_NHWC, labels_NHW
    x = images_NHWC.permute(0, 3, 1, 2).to(torch.float32) / 255
    if config.stain_sigma:
        x = _jitter_stain(x, config.stain_sigma, generator)
    if config.brightness or config.contrast:
        x = _jitter_light(x, config, generator)
    if config.blur_probability:
        x = _blur(x, config.blur_probability, generator)
    changed = (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return changed.contiguous(), labels_NHW


def _turn(
    images_NHWC: torch.Tensor, labels_NHW: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply one of the eight symmetries of the square to each sample."""
    which = torch.randint(0, 8, (len(images_NHWC),), generator=generator).tolist()
    pairs = []
    for image, label, k in zip(images_NHWC, labels_NHW, which, strict=True):
        image, label = torch.rot90(image, k % 4, (0, 1)), torch.rot90(label, k % 4, (0, 1))  # noqa: PLW2901
        pairs.append((image.flip(1), label.flip(1)) if k >= 4 else (image, label))
    return torch.stack([i for i, _ in pairs]), torch.stack([lab for _, lab in pairs])


def _uniform(
    n: int, low: float, high: float, generator: torch.Generator, like: torch.Tensor
) -> torch.Tensor:
    return (torch.rand(n, generator=generator) * (high - low) + low).to(like.device)


def _jitter_stain(x: torch.Tensor, sigma: float, generator: torch.Generator) -> torch.Tensor:
    """Scale and shift each stain's density (Tellez et al. 2018, arXiv 1808.05896)."""
    to_rgb = torch.tensor(RGB_FROM_HED, device=x.device)
    to_rgb = to_rgb / to_rgb.norm(dim=1, keepdim=True)
    density = -torch.log10(x.clamp(min=1 / 255))
    stains = torch.einsum("nchw,cs->nshw", density, torch.linalg.inv(to_rgb))
    shape = (len(x), 3)
    scale = 1 + sigma * (2 * torch.rand(shape, generator=generator) - 1)
    shift = sigma * (2 * torch.rand(shape, generator=generator) - 1) * 0.2
    stains = stains * scale.to(x)[:, :, None, None] + shift.to(x)[:, :, None, None]
    return torch.pow(10.0, -torch.einsum("nshw,sc->nchw", stains, to_rgb))


def _jitter_light(
    x: torch.Tensor, config: AugmentConfig, generator: torch.Generator
) -> torch.Tensor:
    n = len(x)
    bright = _uniform(n, 1 - config.brightness, 1 + config.brightness, generator, x)
    contrast = _uniform(n, 1 - config.contrast, 1 + config.contrast, generator, x)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return ((x - mean) * contrast[:, None, None, None] + mean) * bright[:, None, None, None]


def _blur(x: torch.Tensor, probability: float, generator: torch.Generator) -> torch.Tensor:
    chosen = torch.rand(len(x), generator=generator) < probability
    sigmas = _uniform(len(x), *BLUR_SIGMA, generator, torch.empty(0)).tolist()
    samples = []
    for sample, is_chosen, sigma in zip(x, chosen.tolist(), sigmas, strict=True):
        samples.append(_gaussian(sample, sigma) if is_chosen else sample)
    return torch.stack(samples)


def _gaussian(image_CHW: torch.Tensor, sigma: float) -> torch.Tensor:
    offsets = range(-BLUR_RADIUS, BLUR_RADIUS + 1)
    weights = torch.tensor([math.exp(-0.5 * (o / sigma) ** 2) for o in offsets]).to(image_CHW)
    weights = weights / weights.sum()
    pad = (BLUR_RADIUS,) * 4
    x = functional.pad(image_CHW[:, None], pad, mode="reflect")
    x = functional.conv2d(x, weights.view(1, 1, -1, 1))
    return functional.conv2d(x, weights.view(1, 1, 1, -1))[:, 0]
