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

_RGB_FROM_HED = functional.normalize(torch.tensor(RGB_FROM_HED), dim=1)
_HED_FROM_RGB = torch.linalg.inv(_RGB_FROM_HED)

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
    # One by one: where a vector of the processor begins and ends decides on the last bit.
    changed = [
        _recolour(image, config, generator)
        for image, generator in zip(images_NHWC, generators, strict=True)
    ]
    return torch.stack(changed), labels_NHW


def _recolour(
    image_HWC: torch.Tensor, config: AugmentConfig, generator: np.random.Generator
) -> torch.Tensor:
    x = image_HWC.permute(2, 0, 1).to(torch.float32) / 255
    if config.stain_sigma:
        x = _jitter_stain(x, config.stain_sigma, generator)
    if config.brightness or config.contrast:
        x = _jitter_light(x, config, generator)
    if config.blur_probability:
        x = _blur(x, config.blur_probability, generator)
    return (x.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()


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


def _uniform(
    low: float, high: float, generator: np.random.Generator, *, num: int = 1
) -> torch.Tensor:
    """Draw float32 (num, 1, 1) in [low, high)."""
    drawn = generator.random((num, 1, 1)) * (high - low) + low
    return torch.from_numpy(drawn).to(torch.float32)


def _jitter_stain(x: torch.Tensor, sigma: float, generator: np.random.Generator) -> torch.Tensor:
    """Scale and shift each stain's density (Tellez et al. 2018, arXiv 1808.05896)."""
    to_rgb, from_rgb = (matrix.to(x.device) for matrix in (_RGB_FROM_HED, _HED_FROM_RGB))
    density = -torch.log10(x.clamp(min=1 / 255))
    stains = torch.einsum("chw,cs->shw", density, from_rgb)
    scale = 1 + _uniform(-sigma, sigma, generator, num=3)
    shift = _uniform(-sigma, sigma, generator, num=3) * 0.2
    stains = stains * scale.to(x) + shift.to(x)
    return torch.pow(10.0, -torch.einsum("shw,sc->chw", stains, to_rgb))


def _jitter_light(
    x: torch.Tensor, config: AugmentConfig, generator: np.random.Generator
) -> torch.Tensor:
    bright = 1 + _uniform(-config.brightness, config.brightness, generator).to(x.device)
    contrast = 1 + _uniform(-config.contrast, config.contrast, generator).to(x.device)
    mean = x.mean()
    return ((x - mean) * contrast + mean) * bright


def _blur(x: torch.Tensor, probability: float, generator: np.random.Generator) -> torch.Tensor:
    is_chosen, sigma = generator.random() < probability, generator.uniform(*BLUR_SIGMA)
    return _gaussian(x, sigma) if is_chosen else x


def _gaussian(image_CHW: torch.Tensor, sigma: float) -> torch.Tensor:
    offsets = range(-BLUR_RADIUS, BLUR_RADIUS + 1)
    weights = torch.tensor([math.exp(-0.5 * (o / sigma) ** 2) for o in offsets]).to(image_CHW)
    weights = weights / weights.sum()
    pad = (BLUR_RADIUS,) * 4
    x = functional.pad(image_CHW[:, None], pad, mode="reflect")
    x = functional.conv2d(x, weights.view(1, 1, -1, 1))
    return functional.conv2d(x, weights.view(1, 1, 1, -1))[:, 0]
