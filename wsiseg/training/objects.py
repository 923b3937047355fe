"""Metrics of objects (nuclei, glands) rather than pixels: AJI, AJI+, PQ and those of GlaS.

Instance maps are int (H, W), 0 = none, any positive number = one object. Numbers need not be
consecutive and mean nothing: every metric is the same after renumbering.

Memory follows the number of pairs of objects that touch, not of all pairs: a slide's 50 000
nuclei would need 20 GB otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage, sparse
from scipy.optimize import linear_sum_assignment
from skimage.segmentation import watershed as flood

Instances = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]
Score = float | None

CONTACT_UM = 3.5
"""Half of the window in which a watershed looks for the middle of an object: about the radius of
a nucleus. A smaller one cuts large nuclei in two."""

CONTACT_PX = 7
"""The same in pixels, where the resolution is not known: that of 0.5 um/px."""

NAMES = ("aji", "aji_plus", "pq", "dq", "sq", "object_f1", "object_dice")


def components(mask: npt.NDArray[np.bool_]) -> Instances:
    """Return the 4-connected parts of a mask as an instance map."""
    labels, _ = ndimage.label(mask)
    return np.asarray(labels, np.int32)


def watershed(mask: npt.NDArray[np.bool_], *, mpp: float | None = None) -> Instances:
    """Return the parts of a mask, cut where they are narrow (watershed of the distance).

    `mpp` : um per pixel, so that an object is cut alike at every resolution; None if not known.
    """
    contact_px = CONTACT_PX if mpp is None else max(1, round(CONTACT_UM / mpp))
    blur_px = contact_px / CONTACT_PX
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), blur_px)
    peaks = (distance == ndimage.maximum_filter(distance, 2 * contact_px + 1)) & mask
    markers, num = ndimage.label(peaks, structure=np.ones((3, 3)))
    # A small object beside a large one has no peak of its own within the window.
    parts = components(mask)
    without = np.ones(int(parts.max()) + 1, bool)
    without[0] = False
    without[parts[peaks]] = False
    lonely = without[parts]
    markers[lonely] = num + parts[lonely]
    # Middles that touch in a corner are one, but what touches in corners only is not one object.
    cut = flood(-distance, markers, mask=mask).astype(np.int64)
    return numbered(cut * (int(parts.max()) + 1) + parts)


def numbered(instances: npt.NDArray[np.integer]) -> Instances:
    """Return the same objects numbered 1, 2, ... in the order of their first pixels."""
    flat = instances.ravel()
    where = np.flatnonzero(flat)
    _, first, inverse = np.unique(flat[where], return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int32)
    rank[np.argsort(first)] = np.arange(1, len(first) + 1, dtype=np.int32)
    result = np.zeros(flat.shape, np.int32)
    result[where] = rank[inverse]
    return result.reshape(instances.shape)


@dataclass(frozen=True, slots=True)
class Overlaps:
    """Sizes of all objects, and the pairs of a true and a guessed object that share pixels.

    `true_px`, `guessed_px` : int64 per object. `true_index`, `guessed_index`, `shared_px` : int64
    per pair, ordered by true object, then by guessed object. Objects count from 0 in the order of
    their first pixels.
    """

    true_px: Counts
    guessed_px: Counts
    true_index: Counts
    guessed_index: Counts
    shared_px: Counts

    @classmethod
    def of(cls, truth: npt.NDArray[np.integer], guess: npt.NDArray[np.integer]) -> "Overlaps":
        """Count the pixels of two instance maps of the same shape."""
        truth, guess = numbered(truth), numbered(guess)
        true_px, guessed_px = (np.bincount(side.ravel())[1:] for side in (truth, guess))
        both = (truth > 0) & (guess > 0)
        codes = (truth[both].astype(np.int64) - 1) * len(guessed_px) + guess[both] - 1
        pairs, shared_px = np.unique(codes, return_counts=True)
        true_index, guessed_index = np.divmod(pairs, max(len(guessed_px), 1))
        return cls(true_px, guessed_px, true_index, guessed_index, shared_px)

    @property
    def swapped(self) -> "Overlaps":
        """The same with truth and guess exchanged."""
        order = np.lexsort((self.true_index, self.guessed_index))
        return Overlaps(
            self.guessed_px,
            self.true_px,
            self.guessed_index[order],
            self.true_index[order],
            self.shared_px[order],
        )

    @property
    def iou(self) -> npt.NDArray[np.float64]:
        """Intersection over union of each pair."""
        union = self.true_px[self.true_index] + self.guessed_px[self.guessed_index] - self.shared_px
        ratio: npt.NDArray[np.float64] = self.shared_px / union
        return ratio

    def best(self, quality: npt.NDArray[np.number]) -> Counts:
        """Return, of each true object that is in any pair, the pair of the highest quality."""
        order = np.lexsort((-quality, self.true_index))
        _, first = np.unique(self.true_index[order], return_index=True)
        return order[first]


def object_scores(
    truth: npt.NDArray[np.integer], guess: npt.NDArray[np.integer]
) -> dict[str, Score]:
    """Return all object metrics of two instance maps.

    Where neither side has an object, each is None; where one has none, each is 0 but `sq`, which
    is the mean IoU of matched pairs and None without any.

    Returns
    -------
    dict
        `aji` : Aggregated Jaccard Index (Kumar et al. 2017), each true object with the guess of
        the highest IoU. `aji_plus` : the same with one-to-one pairs of the highest total IoU.
        `pq`, `dq`, `sq` : panoptic quality (Kirillov et al. 2019), pairs with IoU > 0.5.
        `object_f1` : GlaS detection, a guess counts if it covers half of the true object that it
        shares most with. `object_dice` : GlaS, weighted by area (Sirinukunwattana et al. 2017).
    """
    overlaps = Overlaps.of(truth, guess)
    if not len(overlaps.true_px) and not len(overlaps.guessed_px):
        return dict.fromkeys(NAMES)
    return {
        "aji": _aji(overlaps),
        "aji_plus": _aji_plus(overlaps),
        **_panoptic(overlaps),
        "object_f1": _object_f1(overlaps),
        "object_dice": (_one_way_dice(overlaps) + _one_way_dice(overlaps.swapped)) / 2,
    }


def _aji(overlaps: Overlaps) -> float:
    pairs = overlaps.best(overlaps.iou)
    shared = int(overlaps.shared_px[pairs].sum())
    used = overlaps.guessed_index[pairs]
    unused = np.delete(overlaps.guessed_px, np.unique(used))
    # A guess that is the best of two true objects is in the union twice, as published.
    union = int(overlaps.true_px.sum() + overlaps.guessed_px[used].sum() + unused.sum()) - shared
    return shared / union


def _aji_plus(overlaps: Overlaps) -> float:
    shared = sum(int(overlaps.shared_px[pairs].sum()) for pairs in _one_to_one(overlaps))
    return shared / (int(overlaps.true_px.sum() + overlaps.guessed_px.sum()) - shared)


def _one_to_one(overlaps: Overlaps) -> Iterator[Counts]:
    """Yield pairs such that no object is in two and the sum of their IoU is the largest.

    Solved for each group of objects that are linked by overlaps: groups are small, slides are not.
    """
    num_true, num_guessed = len(overlaps.true_px), len(overlaps.guessed_px)
    size = num_true + num_guessed
    links = (overlaps.true_index, num_true + overlaps.guessed_index)
    graph = sparse.coo_matrix((np.ones(len(links[0]), bool), links), shape=(size, size))
    _, group = sparse.csgraph.connected_components(graph, directed=False)
    group_of_pair = group[overlaps.true_index]
    order = np.argsort(group_of_pair, kind="stable")
    ends = np.flatnonzero(np.diff(group_of_pair[order])) + 1
    iou = overlaps.iou
    for pairs in np.split(order, ends):
        if len(pairs) <= 1:
            yield pairs
            continue
        rows, row = np.unique(overlaps.true_index[pairs], return_inverse=True)
        columns, column = np.unique(overlaps.guessed_index[pairs], return_inverse=True)
        quality = np.zeros((len(rows), len(columns)))
        pair_at = np.full(quality.shape, -1)
        quality[row, column], pair_at[row, column] = iou[pairs], pairs
        chosen = pair_at[linear_sum_assignment(quality, maximize=True)]
        yield chosen[chosen >= 0]


def _panoptic(overlaps: Overlaps) -> dict[str, Score]:
    iou = overlaps.iou
    good = iou[iou > 0.5]  # above one half a pair is unique
    detection = 2 * len(good) / (len(overlaps.true_px) + len(overlaps.guessed_px))
    segmentation = float(good.mean()) if len(good) else None
    return {"pq": detection * (segmentation or 0.0), "dq": detection, "sq": segmentation}


def _object_f1(overlaps: Overlaps) -> float:
    flipped = overlaps.swapped
    pairs = flipped.best(flipped.shared_px)  # of each guess the true object it shares most with
    covered = flipped.guessed_index[pairs]
    is_half = 2 * flipped.shared_px[pairs] >= overlaps.true_px[covered]
    hits = len(np.unique(covered[is_half]))
    return 2 * hits / (len(overlaps.true_px) + len(overlaps.guessed_px))


def _one_way_dice(overlaps: Overlaps) -> float:
    """Return the Dice of each true object with the guess it shares most with, by area."""
    if not len(overlaps.true_px):
        return 0.0
    pairs = overlaps.best(overlaps.shared_px)
    here = overlaps.true_px[overlaps.true_index[pairs]]
    there = overlaps.guessed_px[overlaps.guessed_index[pairs]]
    dice = 2 * overlaps.shared_px[pairs] / (here + there)
    return float((dice * here).sum() / overlaps.true_px.sum())
