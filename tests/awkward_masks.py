"""Masks that are hard to trace, by kind and seed; shared by the tests of tracing and export."""

import numpy as np
from scipy import ndimage


def noise(rng, shape):
    return rng.choice(np.array([0, 0, 1, 1, 1, 2, 255], np.uint8), shape)


def chequers(rng, shape):
    return ((np.indices(shape).sum(axis=0) % 2) + rng.integers(0, 2)).astype(np.uint8)


def lines(rng, shape):
    mask = np.zeros(shape, np.uint8)
    for _ in range(rng.integers(1, 6)):
        label = rng.integers(1, 3)
        y, x = rng.integers(0, shape[0]), rng.integers(0, shape[1])
        kind = rng.integers(0, 3)
        if kind == 0:
            mask[y] = label
        elif kind == 1:
            mask[:, x] = label
        else:
            k = np.arange(min(shape[0] - y, shape[1] - x))
            mask[y + k, x + k] = label
    return mask


def spiral(rng, shape):
    mask = np.zeros(shape, np.uint8)
    y, x, dy, dx = 0, 0, 0, 1
    label = int(rng.integers(1, 3))
    for _ in range(mask.size):
        mask[y, x] = label
        for _ in range(2):
            ahead = (y + 2 * dy, x + 2 * dx)
            inside = 0 <= y + dy < shape[0] and 0 <= x + dx < shape[1]
            in_reach = 0 <= ahead[0] < shape[0] and 0 <= ahead[1] < shape[1]
            if inside and not (in_reach and mask[ahead]) and not mask[y + dy, x + dx]:
                break
            dy, dx = dx, -dy
        else:
            break
        y, x = y + dy, x + dx
    return mask


def rings(rng, shape):
    mask = np.zeros(shape, np.uint8)
    for depth in range(min(shape) // 2):
        mask[depth : shape[0] - depth, depth : shape[1] - depth] = rng.integers(0, 3)
    return mask


def pinches(rng, shape):
    """Squares that touch in corners only, as holes and as regions."""
    mask = np.kron(chequers(rng, (-(-shape[0] // 2), -(-shape[1] // 2))), np.ones((2, 2), np.uint8))
    mask = np.ascontiguousarray(mask[: shape[0], : shape[1]])
    mask[0], mask[-1], mask[:, 0], mask[:, -1] = 1, 1, 1, 1
    return mask


def border(rng, shape):
    mask = np.full(shape, rng.integers(1, 3), np.uint8)
    mask[1:-1, 1:-1] = noise(rng, (max(0, shape[0] - 2), max(0, shape[1] - 2)))
    return mask


def blobs(rng, shape):
    smooth = ndimage.gaussian_filter(rng.standard_normal(shape), 2)
    return np.digitize(smooth, np.quantile(smooth, [0.4, 0.7])).astype(np.uint8)


KINDS = (noise, chequers, lines, spiral, rings, pinches, border, blobs)


def awkward_mask(kind, seed, largest=24):
    """Return a mask uint8 (H, W) of 1..`largest` pixels in each direction."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, largest + 1)), int(rng.integers(1, largest + 1)))
    return kind(rng, shape)
