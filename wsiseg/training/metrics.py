"""Pixel metrics from confusion matrices, distances between borders, and their uncertainty.

A class that is neither in the truth nor in the prediction has no score (None), instead of a
perfect one (defect D21: tiles without the class would score 1 and hide everything else).
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
from scipy import ndimage

Confusion = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Score = float | None


def _ratio(part: float, whole: float) -> Score:
    return None if whole == 0 else float(part / whole)


def class_scores(confusion: Confusion, label: int) -> dict[str, Score]:
    """Return Dice, IoU, precision and recall of one label of a confusion matrix (K, K).

    Precision is None where the label was never predicted, recall where it is not in the truth.
    """
    hits = int(confusion[label, label])
    true, guessed = int(confusion[label].sum()), int(confusion[:, label].sum())
    return {
        "dice": _ratio(2 * hits, true + guessed),
        "iou": _ratio(hits, true + guessed - hits),
        "precision": _ratio(hits, guessed),
        "recall": _ratio(hits, true),
    }


def accuracy(confusion: Confusion) -> Score:
    """Return the share of pixels whose label is right (not one-vs-rest, defect D22)."""
    return _ratio(int(np.trace(confusion)), int(confusion.sum()))


def hausdorff_95(truth: Mask, guess: Mask, spacing: tuple[float, float]) -> Score:
    """Return the 95th percentile of the distances between two borders, the larger of both ways.

    Distances are between border pixels' centres (defect D19: the released code compares rows of
    the mask as if they were points). None if either is empty.

    Parameters
    ----------
    truth, guess
        bool (H, W).
    spacing
        um per pixel along y and x.
    """
    if not truth.any() or not guess.any():
        return None
    borders = [mask & ~ndimage.binary_erosion(mask, border_value=0) for mask in (truth, guess)]
    one_way = []
    for here, there in (borders, borders[::-1]):
        distance = ndimage.distance_transform_edt(~there, sampling=spacing)
        one_way.append(np.percentile(distance[here], 95))
    return float(max(one_way))


def bootstrap_interval(
    confusions: Sequence[Confusion],
    score: Callable[[Confusion], Score],
    *,
    resamples: int,
    seed: int,
) -> tuple[float, float] | None:
    """Return the 95 % interval of a pooled score over resampled images.

    Images, not pixels, are drawn: pixels of one image are no independent observations. None for
    fewer than three images.
    """
    if len(confusions) < 3 or resamples == 0:
        return None
    stack = np.stack(confusions)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(resamples):
        value = score(stack[rng.integers(0, len(stack), len(stack))].sum(axis=0))
        if value is not None:
            values.append(value)
    if not values:
        return None
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
