"""Metrics of objects (nuclei, glands) rather than pixels: AJI, AJI+, PQ and those of GlaS.

Instance maps are int (H, W), 0 = none, any positive number = one object. Numbers need not be
consecutive and mean nothing.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from skimage.segmentation import watershed as flood

Instances = npt.NDArray[np.int32]

CONTACT_PX = 7
"""Half of the window in which a watershed looks for the middle of an object."""


def components(mask: npt.NDArray[np.bool_]) -> Instances:
    """Return the 4-connected parts of a mask as an instance map."""
    labels, _ = ndimage.label(mask)
    return np.asarray(labels, np.int32)


def watershed(mask: npt.NDArray[np.bool_]) -> Instances:
    """Return the parts of a mask, cut where they are narrow (watershed of the distance)."""
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 1.0)
    peaks = (distance == ndimage.maximum_filter(distance, 2 * CONTACT_PX + 1)) & mask
    markers, _ = ndimage.label(peaks, structure=np.ones((3, 3)))
    return np.asarray(flood(-distance, markers, mask=mask), np.int32)


@dataclass(frozen=True, slots=True)
class Overlaps:
    """Sizes of all objects and of their overlaps. `shared` : int64 (true objects, guessed)."""

    true_px: npt.NDArray[np.int64]
    guessed_px: npt.NDArray[np.int64]
    shared: npt.NDArray[np.int64]

    @classmethod
    def of(cls, truth: Instances, guess: Instances) -> "Overlaps":
        """Count the pixels that each pair of objects shares."""
        _, true_index = np.unique(truth, return_inverse=True)
        _, guess_index = np.unique(guess, return_inverse=True)
        num_true, num_guess = int(true_index.max()) + 1, int(guess_index.max()) + 1
        pairs = true_index.ravel() * num_guess + guess_index.ravel()
        table = np.bincount(pairs, minlength=num_true * num_guess).reshape(num_true, num_guess)
        rows = slice(1 if (truth == 0).any() else 0, None)
        columns = slice(1 if (guess == 0).any() else 0, None)
        return cls(table.sum(axis=1)[rows], table.sum(axis=0)[columns], table[rows, columns])

    @property
    def iou(self) -> npt.NDArray[np.float64]:
        """Intersection over union of each pair: float64 (true objects, guessed)."""
        union = self.true_px[:, None] + self.guessed_px[None] - self.shared
        ratio: npt.NDArray[np.float64] = self.shared / np.maximum(union, 1)
        return ratio


def object_scores(truth: Instances, guess: Instances) -> dict[str, float | None]:
    """Return all object metrics; each is None where neither side has an object.

    `aji` : Aggregated Jaccard Index (Kumar et al. 2017), each true object with the best guess.
    `aji_plus` : the same with one-to-one pairs. `pq`, `dq`, `sq` : panoptic quality (Kirillov et
    al. 2019), pairs with IoU > 0.5. `object_f1` : GlaS detection, a guess counts if it covers half
    of a true object. `object_dice` : GlaS (Sirinukunwattana et al. 2017), by area of the objects.
    """
    overlaps = Overlaps.of(truth, guess)
    if not len(overlaps.true_px) and not len(overlaps.guessed_px):
        names = ("aji", "aji_plus", "pq", "dq", "sq", "object_f1", "object_dice")
        return dict.fromkeys(names)
    return {
        "aji": _aji(overlaps),
        "aji_plus": _aji_plus(overlaps),
        **_panoptic(overlaps),
        "object_f1": _object_f1(overlaps),
        "object_dice": _object_dice(overlaps),
    }


def _aji(overlaps: Overlaps) -> float:
    shared, union = 0, 0
    used: set[int] = set()
    iou = overlaps.iou
    for i in range(len(overlaps.true_px)):
        j = int(iou[i].argmax()) if iou.shape[1] else -1
        if j < 0 or iou[i, j] == 0:
            union += int(overlaps.true_px[i])
            continue
        used.add(j)
        shared += int(overlaps.shared[i, j])
        union += int(overlaps.true_px[i] + overlaps.guessed_px[j] - overlaps.shared[i, j])
    union += sum(int(px) for j, px in enumerate(overlaps.guessed_px) if j not in used)
    return shared / union


def _aji_plus(overlaps: Overlaps) -> float:
    rows, columns = linear_sum_assignment(-overlaps.iou)
    pairs = [(i, j) for i, j in zip(rows, columns, strict=True) if overlaps.shared[i, j]]
    shared = sum(int(overlaps.shared[i, j]) for i, j in pairs)
    total = int(overlaps.true_px.sum() + overlaps.guessed_px.sum())
    return shared / (total - shared)


def _panoptic(overlaps: Overlaps) -> dict[str, float | None]:
    good = overlaps.iou[overlaps.iou > 0.5]  # above one half a pair is unique
    num = len(overlaps.true_px) + len(overlaps.guessed_px)
    detection = 2 * len(good) / num
    segmentation = float(good.mean()) if len(good) else 0.0
    return {"pq": detection * segmentation, "dq": detection, "sq": segmentation}


def _object_f1(overlaps: Overlaps) -> float:
    """Return the GlaS F1: a guess is right if it covers at least half of its true object."""
    covered = overlaps.shared >= 0.5 * overlaps.true_px[:, None]
    found: set[int] = set()
    for j in range(len(overlaps.guessed_px)):
        column = overlaps.shared[:, j]
        i = int(column.argmax()) if len(column) else -1
        if i >= 0 and column[i] > 0 and covered[i, j]:
            found.add(i)
    hits = len(found)
    wrong = len(overlaps.guessed_px) - hits
    missed = len(overlaps.true_px) - hits
    return 2 * hits / (2 * hits + wrong + missed)


def _object_dice(overlaps: Overlaps) -> float:
    def one_way(
        here: npt.NDArray[np.int64], there: npt.NDArray[np.int64], shared: npt.NDArray[np.int64]
    ) -> float:
        if not len(here) or not len(there):
            return 0.0
        best = shared.argmax(axis=1)
        overlap = shared[np.arange(len(here)), best]
        dice = 2 * overlap / (here + there[best])
        return float((dice * here).sum() / here.sum())

    forth = one_way(overlaps.true_px, overlaps.guessed_px, overlaps.shared)
    back = one_way(overlaps.guessed_px, overlaps.true_px, overlaps.shared.T)
    return (forth + back) / 2
