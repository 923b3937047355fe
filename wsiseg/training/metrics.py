"""Pixel metrics from confusion matrices, and the uncertainty of any metric over images.

A class that is neither in the truth nor in the prediction has no score (None, null in JSON)
instead of a perfect one (defect D21: tiles without the class would score 1 and hide the rest).
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Confusion = npt.NDArray[np.int64]
Score = float | None
Interval = tuple[float, float] | None

PIXEL_METRICS = ("dice", "iou", "precision", "recall")

MIN_IMAGES = 3
"""Resamples of one or two images say nothing about the next one."""


def _ratio(part: float, whole: float) -> Score:
    return None if whole == 0 else float(part / whole)


def class_scores(confusion: Confusion, label: int) -> dict[str, Score]:
    """Return Dice, IoU, precision and recall of one label of a confusion matrix (K, K).

    Rows are true labels, columns guessed ones. Precision is None where the label was never
    guessed, recall where it is not in the truth; Dice and IoU where it is neither.
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


def mean_score(values: Sequence[Score]) -> Score:
    """Return the mean of the images that have a score; None if none has."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def pooled_intervals(
    confusions: Sequence[Confusion], label: int, *, resamples: int, seed: int
) -> dict[str, Interval]:
    """Return the 95 % interval of each pixel metric of one label, pooled over images.

    Images, not pixels, are drawn: pixels of one image are no independent observations.

    Parameters
    ----------
    confusions
        int64 (K, K) of each image.
    resamples
        Sets of images drawn with replacement; 0 gives no interval.

    Returns
    -------
    dict
        (low, high) by metric; None for fewer than three images.
    """
    if len(confusions) < MIN_IMAGES or resamples == 0:
        return dict.fromkeys(PIXEL_METRICS)
    stack = np.stack(confusions)
    pooled = np.tensordot(_draws(len(stack), resamples, seed), stack, axes=1)
    scores = [class_scores(confusion, label) for confusion in pooled]
    return {name: _interval([score[name] for score in scores]) for name in PIXEL_METRICS}


def mean_interval(values: Sequence[Score], *, resamples: int, seed: int) -> Interval:
    """Return the 95 % interval of the mean over images; images without a score are not drawn."""
    known = np.array([value for value in values if value is not None], np.float64)
    if len(known) < MIN_IMAGES or resamples == 0:
        return None
    means = _draws(len(known), resamples, seed) @ known / len(known)
    return _interval(means.tolist())


def _draws(num_images: int, resamples: int, seed: int) -> npt.NDArray[np.int64]:
    """Return how often each image is in each resample: int64 (resamples, num_images)."""
    rng = np.random.default_rng(seed)
    even = np.full(num_images, 1 / num_images)
    return rng.multinomial(num_images, even, size=resamples)


def _interval(values: Sequence[Score]) -> Interval:
    known = [value for value in values if value is not None]
    if not known:
        return None
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)
