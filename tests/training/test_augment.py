"""What augmentation does to a tile, held against formulas in float64."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from wsiseg.settings.training import AugmentConfig
from wsiseg.training.augment import BLUR_SIGMA, RGB_FROM_HED, augment

OFF = {"flip": False, "stain_sigma": 0.0, "blur_probability": 0.0, "brightness": 0.0,
       "contrast": 0.0}  # fmt: skip


def tiles(num=3, size=16, low=60, high=220, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(low, high, (num, size, size, 3), dtype=np.uint8)
    labels = rng.choice(np.array([0, 1, 255], np.uint8), (num, size, size))
    return torch.from_numpy(images), torch.from_numpy(labels)


def generators(num, seed=7):
    return [np.random.default_rng([seed, i]) for i in range(num)]


def augmented(images, labels, seed=7, **options):
    return augment(images, labels, AugmentConfig(**options), generators(len(images), seed))


def test_nothing_asked_for_changes_nothing():
    images, labels = tiles()
    changed, same = augmented(images, labels, **OFF)
    assert torch.equal(changed, images)
    assert torch.equal(same, labels)


@given(sigma=st.floats(0.01, 0.3), seed=st.integers(0, 1000))
def test_stain_jitter_scales_and_shifts_the_densities_of_ruifrok_and_johnston(sigma, seed):
    images, labels = tiles(num=1, size=4)
    found, _ = augmented(images, labels, seed=seed, **{**OFF, "stain_sigma": sigma})
    rng = generators(1, seed)[0]
    scale = 1 + (rng.random(3) * 2 - 1) * sigma
    shift = (rng.random(3) * 2 - 1) * sigma * 0.2
    vectors = np.array(RGB_FROM_HED)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    density = -np.log10(images[0].numpy() / 255.0)
    stains = np.linalg.solve(vectors.T, density.reshape(-1, 3).T).T
    exact = 10.0 ** -((stains * scale + shift) @ vectors)
    exact = np.clip(exact.reshape(density.shape), 0, 1) * 255
    assert np.abs(found[0].numpy() - exact).max() <= 0.5 + 1e-2  # float32, then rounded


def test_the_stain_vectors_are_those_of_scikit_image():
    from skimage.color import rgb_from_hed

    assert np.allclose(RGB_FROM_HED, rgb_from_hed)


@given(brightness=st.floats(0.0, 0.3), contrast=st.floats(0.01, 0.3), seed=st.integers(0, 1000))
def test_contrast_is_about_the_mean_of_the_tile_and_brightness_scales_it(
    brightness, contrast, seed
):
    images, labels = tiles(num=1, low=90, high=160)
    options = {**OFF, "brightness": brightness, "contrast": contrast}
    found, _ = augmented(images, labels, seed=seed, **options)
    rng = generators(1, seed)[0]
    by = [1 + (rng.random() * 2 - 1) * limit for limit in (brightness, contrast)]
    pixels = images[0].numpy() / 255.0
    exact = ((pixels - pixels.mean()) * by[1] + pixels.mean()) * by[0] * 255
    assert np.abs(found[0].numpy() - exact).max() <= 0.5 + 1e-2


def test_blur_is_a_gaussian_of_a_drawn_width():
    images = torch.zeros(1, 9, 9, 3, dtype=torch.uint8)
    images[0, 4, 4] = 255
    labels = torch.zeros(1, 9, 9, dtype=torch.uint8)
    found, _ = augmented(images, labels, **{**OFF, "blur_probability": 1.0})
    rng = generators(1)[0]
    rng.random()  # whether to blur
    sigma = rng.uniform(*BLUR_SIGMA)
    line = np.array([math.exp(-0.5 * (o / sigma) ** 2) for o in range(-2, 3)])
    line /= line.sum()
    exact = np.zeros((9, 9))
    exact[2:7, 2:7] = np.outer(line, line) * 255
    assert np.abs(found[0].numpy() - exact[..., None]).max() <= 0.5 + 1e-2


def test_blur_takes_as_many_tiles_as_it_is_told_to():
    images, labels = tiles(num=200, size=8)
    found, _ = augmented(images, labels, **{**OFF, "blur_probability": 0.3})
    changed = (found != images).flatten(1).any(dim=1).float().mean()
    assert 0.2 < float(changed) < 0.4


def test_what_would_be_brighter_than_white_is_white():
    images, labels = tiles(num=40, low=250, high=256)
    found, _ = augmented(images, labels, **{**OFF, "brightness": 0.5})
    factors = [1 + (rng.random() * 2 - 1) * 0.5 for rng in generators(40)]
    for tile, before, factor in zip(found, images, factors, strict=True):
        exact = np.minimum(before.numpy() * factor, 255)
        assert np.abs(tile.numpy() - exact).max() <= 0.5 + 1e-2
    assert max(factors) > 1.2


@given(cut=st.integers(1, 5), seed=st.integers(0, 100))
def test_a_tile_is_changed_alike_however_its_batch_is_cut(cut, seed):
    images, labels = tiles(num=6, size=8, seed=seed)
    config, all_of = AugmentConfig(blur_probability=0.5), generators(6, seed)
    whole = augment(images, labels, config, all_of)
    again = generators(6, seed)
    parts = [
        augment(images[part], labels[part], config, again[part])
        for part in (slice(cut), slice(cut, None))
    ]
    for both, alone in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(both, torch.cat(alone))
