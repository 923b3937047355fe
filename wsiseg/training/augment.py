"""Augmentation on the device, of images and labels jointly. The training split only (D16, D17).

All random numbers are drawn on the CPU, from one generator for each tile: a tile is changed in the
same way on every device and however its batch is cut.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from wsiseg.settings.training import AugmentConfig

RGB_FROM_HED = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11), (0.27, 0.57, 0.78))
"""Absorption of haematoxylin, eosin and DAB in R, G, B (Ruifrok and Johnston 2001)."""

BLUR_SIGMA = (0.3, 1.0)
"""Pixels; a slide slightly out of focus."""

BLUR_RADIUS = 2

Generators = Sequence[np.random.Generator]


def augment(
    images_NHWC: torch.Tensor,
    labels_NHW: torch.Tensor,
    config: AugmentConfig,
    generators: Generators,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return augmented images uint8 (N, H, W, 3) and labels uint8 (N, H, W).

    Each sample is changed on its own, by its own generator. Labels only move, they are never
    interpolated.
    """
    if config.flip:
        images_NHWC, labels_NHW = _turn(images_NHWC, labels_NHW, generators)
    colours_change = config.stain_sigma or config.brightness or config.contrast
    if not colours_change and not config.blur_probability:
        return images_NHWC, labels_NHW
    x = images_NHWC.permute(0, 3, 1, 2).to(torch.float32) / 255
    if config.stain_sigma:
        x = _jitter_stain(x, config.stain_sigma, generators)
    if config.brightness or config.contrast:
        x = _jitter_light(x, config, generators)
    if config.blur_probability:
        x = _blur(x, config.blur_probability, generators)
    changed = (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
    return changed.contiguous(), labels_NHW


def _turn(
    images_NHWC: torch.Tensor, labels_NHW: torch.Tensor, generators: Generators
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply one of the eight symmetries of the square to each sample."""
    which = [int(generator.integers(8)) for generator in generators]
    pairs = []
    for image, label, k in zip(images_NHWC, labels_NHW, which, strict=True):
        image, label = torch.rot90(image, k % 4, (0, 1)), torch.rot90(label, k % 4, (0, 1))  # noqa: PLW2901
        pairs.append((image.flip(1), label.flip(1)) if k >= 4 else (image, label))
    return torch.stack([i for i, _ in pairs]), torch.stack([lab for _, lab in pairs])


def _uniform(low: float, high: float, generators: Generators, *, num: int = 1) -> torch.Tensor:
    """Draw float32 (N, num) in [low, high)."""
    drawn = np.stack([generator.random(num) for generator in generators])
    return torch.from_numpy(drawn * (high - low) + low).to(torch.float32)


def _jitter_stain(x: torch.Tensor, sigma: float, generators: Generators) -> torch.Tensor:
    """Scale and shift each stain's density (Tellez et al. 2018, arXiv 1808.05896)."""
    to_rgb = torch.tensor(RGB_FROM_HED, device=x.device)
    to_rgb = to_rgb / to_rgb.norm(dim=1, keepdim=True)
    density = -torch.log10(x.clamp(min=1 / 255))
    stains = torch.einsum("nchw,cs->nshw", density, torch.linalg.inv(to_rgb))
    scale = 1 + _uniform(-sigma, sigma, generators, num=3)
    shift = _uniform(-sigma, sigma, generators, num=3) * 0.2
    stains = stains * scale.to(x)[:, :, None, None] + shift.to(x)[:, :, None, None]
    return torch.pow(10.0, -torch.einsum("nshw,sc->nchw", stains, to_rgb))


def _jitter_light(x: torch.Tensor, config: AugmentConfig, generators: Generators) -> torch.Tensor:
    bright = 1 + _uniform(-config.brightness, config.brightness, generators).to(x.device)
    contrast = 1 + _uniform(-config.contrast, config.contrast, generators).to(x.device)
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return ((x - mean) * contrast[:, :, None, None] + mean) * bright[:, :, None, None]


def _blur(x: torch.Tensor, probability: float, generators: Generators) -> torch.Tensor:
    samples = []
    for sample, generator in zip(x, generators, strict=True):
        is_chosen, sigma = generator.random() < probability, generator.uniform(*BLUR_SIGMA)
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
