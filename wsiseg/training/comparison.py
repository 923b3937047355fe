"""Labels held against labels: the figures of one image, and of many together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsiseg.classes import BACKGROUND, IGNORE, ClassTable
from wsiseg.geometry import Box, Raster
from wsiseg.training.confusion import confusion_matrix
from wsiseg.training.distances import hausdorff_95, object_hausdorff
from wsiseg.training.metrics import (
    Score,
    accuracy,
    class_scores,
    mean_interval,
    mean_score,
    pooled_intervals,
)
from wsiseg.training.objects import NAMES, components, object_scores, watershed

BLOCK_PX = 2048
"""Side of the squares in which the pixels of an image are counted, whatever its size."""

MAX_OBJECT_PIXELS = 64_000_000
"""Objects and distances need a whole image at once (some 4 GB for this many pixels), so larger
ones have none; their pixel metrics are exact all the same."""

OBJECT_METRICS = (*NAMES, "object_hausdorff_um", "hd95_um")

Labels = npt.NDArray[np.uint8]
Read = Callable[[Box], Labels]
"""Reads the labels uint8 (height, width) of a box of the common raster; 255 = not said."""


@dataclass(frozen=True, slots=True)
class ImageScores:
    """The figures of one image.

    `confusion` : int64 (K, K), rows true, columns guessed. `objects` : by class name, then by
    metric. `measured` : how objects were made ("components", "watershed"), "none" if they were not
    asked for, "too large" if the image has more than `MAX_OBJECT_PIXELS`.
    """

    confusion: npt.NDArray[np.int64]
    objects: dict[str, dict[str, Score]]
    measured: str


def compare(
    read_truth: Read,
    read_guess: Read,
    *,
    raster: Raster,
    classes: ClassTable,
    instances: str,
    has_mpp: bool,
) -> ImageScores:
    """Compare the two sides of an image, block by block.

    Where the truth is 255 nothing counts; where the guess is 255 (not predicted: no tissue) it
    counts as background.

    Parameters
    ----------
    instances
        "components", "watershed" or "none".
    has_mpp
        Whether the raster's resolution is known; without it figures in um are None.
    """
    num = classes.num_labels
    confusion = np.zeros((num, num), np.int64)
    for box in _blocks(raster):
        confusion += confusion_matrix(read_truth(box), read_guess(box), num)
    measured = instances
    if instances != "none" and raster.width_px * raster.height_px > MAX_OBJECT_PIXELS:
        measured = "too large"
    objects = {item.name: dict.fromkeys(OBJECT_METRICS) for item in classes.classes}
    if measured not in ("none", "too large"):
        truth, guess = read_truth(raster.box), read_guess(raster.box)
        guess = np.where(truth == IGNORE, BACKGROUND, guess)
        spacing = (raster.mpp_y, raster.mpp_x) if has_mpp else None
        objects = {
            item.name: _of_objects(truth == item.label, guess == item.label, instances, spacing)
            for item in classes.classes
        }
    return ImageScores(confusion, objects, measured)


def _blocks(raster: Raster) -> Iterator[Box]:
    for y in range(0, raster.height_px, BLOCK_PX):
        for x in range(0, raster.width_px, BLOCK_PX):
            yield Box(x, y, BLOCK_PX, BLOCK_PX).intersection(raster.box)


def _of_objects(
    truth: npt.NDArray[np.bool_],
    guess: npt.NDArray[np.bool_],
    method: str,
    spacing: tuple[float, float] | None,
) -> dict[str, Score]:
    if method == "watershed":
        mpp = None if spacing is None else (spacing[0] + spacing[1]) / 2
        sides = watershed(truth, mpp=mpp), watershed(guess, mpp=mpp)
    else:
        sides = components(truth), components(guess)
    far = {
        "object_hausdorff_um": object_hausdorff(*sides, spacing) if spacing else None,
        "hd95_um": hausdorff_95(truth, guess, spacing) if spacing else None,
    }
    return {**object_scores(*sides), **far}


def describe(scores: ImageScores, classes: ClassTable) -> dict[str, Any]:
    """Return the figures of one image as JSON values."""
    return {
        **_of_pixels(scores.confusion, classes, scores.objects),
        "objects": scores.measured,
    }


def describe_all(images: Sequence[ImageScores], classes: ClassTable) -> dict[str, Any]:
    """Return the figures of all images together as JSON values.

    Pixel metrics come from the sum of the confusion matrices; object metrics and distances are
    means over the images that have them, as in the MoNuSeg challenge.
    """
    means = {
        item.name: {
            metric: mean_score([image.objects[item.name][metric] for image in images])
            for metric in OBJECT_METRICS
        }
        for item in classes.classes
    }
    total = np.sum([image.confusion for image in images], axis=0)
    return _of_pixels(total, classes, means)


def _of_pixels(
    confusion: npt.NDArray[np.int64],
    classes: ClassTable,
    objects: Mapping[str, Mapping[str, Score]],
) -> dict[str, Any]:
    return {
        "classes": {
            item.name: {**class_scores(confusion, item.label), **objects[item.name]}
            for item in classes.classes
        },
        "accuracy": accuracy(confusion),
        "confusion": confusion.tolist(),
        "labels": list(classes.names),
    }


def intervals(
    images: Sequence[ImageScores], classes: ClassTable, *, resamples: int, seed: int
) -> dict[str, Any]:
    """Return the 95 % interval over images of each figure of `describe_all`, by class."""
    confusions = [image.confusion for image in images]
    result: dict[str, Any] = {}
    for item in classes.classes:
        found = pooled_intervals(confusions, item.label, resamples=resamples, seed=seed)
        for metric in OBJECT_METRICS:
            values = [image.objects[item.name][metric] for image in images]
            found[metric] = mean_interval(values, resamples=resamples, seed=seed)
        result[item.name] = {name: ends and list(ends) for name, ends in found.items()}
    return result
