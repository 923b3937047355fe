"""The losses: against slow plain versions, and finite whatever comes in."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.classes import IGNORE
from wsiseg.settings.training import LossConfig
from wsiseg.training.losses import SS_BETA, SS_C, SS_MAX_ERROR, SegmentationLoss

NONE: dict[str, Any] = {
    "cross_entropy": 0.0,
    "focal": 0.0,
    "structural": 0.0,
    "dice": 0.0,
    "tversky": 0.0,
}
TERMS: dict[str, dict[str, Any]] = {
    "cross_entropy": {"cross_entropy": 1.0},
    "focal": {"focal": 1.0, "focal_gamma": 2.0},
    "focal_odd": {"focal": 1.0, "focal_gamma": 1.0},
    "focal_fraction": {"focal": 1.0, "focal_gamma": 0.5},
    "structural": {"structural": 1.0, "structural_mode": "per_pixel"},
    "structural_official": {"structural": 1.0, "structural_mode": "official"},
    "dice": {"dice": 1.0},
    "tversky": {"tversky": 1.0, "tversky_beta": 0.75},
}


def loss_of(name, num_labels=3):
    return SegmentationLoss(LossConfig(**{**NONE, **TERMS[name]}), num_labels)


def batch(seed, num_labels, height, width, *, scale=3.0, ignored=0.2):
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(0, scale, (2, num_labels, height, width)).astype(np.float32))
    labels = rng.integers(0, num_labels, (2, height, width)).astype(np.uint8)
    labels[rng.random(labels.shape) < ignored] = IGNORE
    return logits, torch.from_numpy(labels)


# Slow versions of one sample: float64, pixel by pixel.


def slow(name, logits, labels):
    options = TERMS[name]
    z = logits.double().numpy()
    p = np.exp(z - z.max(axis=0))
    p /= p.sum(axis=0)
    pixels = [(y, x) for y, x in np.ndindex(*labels.shape) if labels[y, x] != IGNORE]
    if not pixels:
        return 0.0
    true = {(y, x): int(labels[y, x]) for y, x in pixels}
    entropy = {yx: -math.log(p[k][yx]) for yx, k in true.items()}
    mean_entropy = sum(entropy.values()) / len(pixels)
    if name == "cross_entropy":
        return mean_entropy
    if name.startswith("focal"):
        gamma = options["focal_gamma"]
        return sum((1 - p[k][yx]) ** gamma * entropy[yx] for yx, k in true.items()) / len(pixels)
    if name in ("dice", "tversky"):
        return slow_tversky(p, pixels, true, options.get("tversky_beta", 0.5))
    return slow_structural(p, pixels, true, entropy, options["structural_mode"])


def slow_tversky(p, pixels, true, beta):
    foreground = range(1, len(p))
    present = [k for k in foreground if k in true.values()] or list(foreground)
    total = 0.0
    for k in present:
        hit = sum(p[k][yx] for yx in pixels if true[yx] == k)
        missed = sum(1 - p[k][yx] for yx in pixels if true[yx] == k)
        claimed = sum(p[k][yx] for yx in pixels if true[yx] != k)
        total += 1 - (hit + 1) / (hit + beta * missed + (1 - beta) * claimed + 1)
    return total / len(present)


def slow_structural(p, pixels, true, entropy, mode):
    def standardised(values):
        deviation = math.sqrt(np.var(values) + 1e-8)
        return (np.array(values) - np.mean(values) + SS_C) / (deviation + SS_C)

    weighted, num, mean_entropy = 0.0, 0, np.mean(list(entropy.values()))
    for k in range(len(p)):
        truth = [float(true[yx] == k) for yx in pixels]
        if np.var(truth) <= 1e-6:
            continue
        guess = [p[k][yx] for yx in pixels]
        error = np.minimum(np.abs(standardised(truth) - standardised(guess)), SS_MAX_ERROR)
        for e, yx in zip(error, pixels, strict=True):
            if e > SS_BETA * error.max():
                weighted += e * (entropy[yx] if mode == "per_pixel" else mean_entropy)
                num += 1
    return weighted / max(1, num)


@pytest.mark.parametrize("name", TERMS)
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000), num_labels=st.integers(2, 4), height=st.integers(1, 6),
    width=st.integers(2, 6), ignored=st.sampled_from([0.0, 0.3, 1.0]),
)  # fmt: skip
def test_a_loss_is_what_its_slow_version_says(name, seed, num_labels, height, width, ignored):
    logits, labels = batch(seed, num_labels, height, width, ignored=ignored)
    found, _ = loss_of(name, num_labels)(logits, labels)
    for sample in range(2):
        exact = slow(name, logits[sample], labels[sample].numpy())
        # The threshold of SSLoss may fall between roundings of float32: a pixel more or less.
        tolerance = 1e-3 if name.startswith("structural") else 1e-5
        assert float(found[sample]) == pytest.approx(exact, rel=tolerance, abs=1e-6)


LABELS: dict[str, Callable[[tuple[int, ...]], torch.Tensor]] = {
    "mixed": lambda shape: torch.arange(math.prod(shape)).reshape(shape).remainder(3),
    "one class": lambda shape: torch.full(shape, 1),
    "only background": torch.zeros,
    "nothing labelled": lambda shape: torch.full(shape, IGNORE),
    "one pixel": lambda shape: torch.full(shape, IGNORE).index_fill(1, torch.tensor([0]), 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("name", TERMS)
@settings(max_examples=10, deadline=None)
@given(scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]), seed=st.integers(0, 1000))
def test_value_and_gradient_are_finite(name, labels, dtype, scale, seed):
    """Saturated (1e4), flat, one class, no label at all; logits as autocast leaves them."""
    rng = np.random.default_rng(seed)
    signs = torch.from_numpy(rng.choice([-1.0, 0.0, 1.0], (2, 3, 4, 4)))
    logits = (signs * scale).to(dtype).requires_grad_()
    truth = LABELS[labels]((2, 4, 4)).to(torch.uint8)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss, _ = loss_of(name)(logits, truth)
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert (loss >= 0).all()
    if labels == "nothing labelled":
        assert not loss.any()
        assert not gradient.any()


@pytest.mark.parametrize("name", TERMS)
def test_ignored_pixels_give_neither_loss_nor_gradient(name):
    logits, labels = batch(3, 3, 8, 8)
    labels[:, :3] = IGNORE
    changed = logits.clone()
    changed[:, :, :3] = 50.0 * torch.randn(2, 3, 3, 8, generator=torch.Generator().manual_seed(1))
    results = []
    for values in (logits, changed):
        values.requires_grad_()
        loss, _ = loss_of(name)(values, labels)
        (gradient,) = torch.autograd.grad(loss.sum(), values)
        assert not gradient[:, :, :3].any()
        results.append(loss.detach())
    assert torch.allclose(results[0], results[1], rtol=1e-5)


@pytest.mark.parametrize("name", TERMS)
def test_a_perfect_guess_costs_less_than_any_other(name):
    labels = torch.arange(64).reshape(1, 8, 8).remainder(3).to(torch.uint8)
    perfect = 20.0 * torch.nn.functional.one_hot(labels.long(), 3).permute(0, 3, 1, 2).float()
    best, _ = loss_of(name)(perfect, labels)
    for other in (torch.zeros_like(perfect), perfect.roll(1, dims=1), 0.1 * perfect):
        worse, _ = loss_of(name)(other, labels)
        assert float(best) < float(worse)


def test_terms_are_added_by_weight_and_a_weight_of_0_leaves_one_out():
    logits, labels = batch(5, 3, 6, 6)
    config = LossConfig(**{**NONE, "cross_entropy": 0.5, "dice": 2.0})
    total, parts = SegmentationLoss(config, 3)(logits, labels)
    assert parts.keys() == {"cross_entropy", "dice"}
    assert torch.allclose(total, 0.5 * parts["cross_entropy"] + 2.0 * parts["dice"])


def test_the_dice_loss_is_tversky_with_equal_weights():
    logits, labels = batch(6, 3, 6, 6)
    half = SegmentationLoss(LossConfig(**{**NONE, "tversky": 1.0, "tversky_beta": 0.5}), 3)
    assert torch.equal(half(logits, labels)[0], loss_of("dice")(logits, labels)[0])
