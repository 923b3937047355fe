"""Distances between masks and between objects: HD95 and the object Hausdorff distance of GlaS.

In um, between the centres of pixels. (Defect D19: the released code compares the rows of the mask
as if they were points, which gives 0 for a mask that is shifted by 100 px.)
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from wsiseg.training.objects import Overlaps, numbered

Mask = npt.NDArray[np.bool_]
Spacing = tuple[float, float]
"""um per pixel along y and x."""

Window = tuple[slice, slice]


def hausdorff_95(truth: Mask, guess: Mask, spacing: Spacing) -> float | None:
    """Return the 95th percentile of the distances between two borders, the larger of both ways.

    None if either mask is empty: there is no distance to nothing.

    Parameters
    ----------
    truth, guess
        bool (H, W).
    spacing
        um per pixel along y and x.
    """
    if not truth.any() or not guess.any():
        return None
    window = ndimage.find_objects((truth | guess).astype(np.uint8))[0]
    borders = [_border(mask[window]) for mask in (truth, guess)]
    one_way = []
    for here, there in (borders, borders[::-1]):
        distance = ndimage.distance_transform_edt(~there, sampling=spacing)
        one_way.append(np.percentile(distance[here], 95))
    return float(max(one_way))


def _border(mask: Mask) -> Mask:
    """Return the pixels of a mask with a 4-neighbour outside it; the edge of the image is one."""
    border: Mask = mask & ~ndimage.binary_erosion(mask, border_value=0)
    return border


def object_hausdorff(
    truth: npt.NDArray[np.integer], guess: npt.NDArray[np.integer], spacing: Spacing
) -> float | None:
    """Return the object Hausdorff distance of GlaS (Sirinukunwattana et al. 2017).

    The Hausdorff distance of each object to the one of the other side that it shares most with,
    or where it shares with none to the nearest one, weighted by area; the mean of both ways. None
    if either side has no object.

    Parameters
    ----------
    truth, guess
        Instance maps int (H, W).
    spacing
        um per pixel along y and x.
    """
    overlaps = Overlaps.of(truth, guess)
    if not len(overlaps.true_px) or not len(overlaps.guessed_px):
        return None
    sides = [_Objects.of(instances, spacing) for instances in (truth, guess)]
    forth = _one_way(sides[0], sides[1], overlaps)
    back = _one_way(sides[1], sides[0], overlaps.swapped)
    return (forth + back) / 2


@dataclass(frozen=True, slots=True)
class _Objects:
    """An instance map with the window of each object; `extents_um` : float64 (objects, 4)."""

    instances: npt.NDArray[np.int32]
    windows: list[Window]
    extents_um: npt.NDArray[np.float64]
    spacing: Spacing

    @classmethod
    def of(cls, instances: npt.NDArray[np.integer], spacing: Spacing) -> "_Objects":
        own = numbered(instances)
        windows = ndimage.find_objects(own)
        ends = [[y.start, y.stop, x.start, x.stop] for y, x in windows]
        scale = np.repeat(spacing, 2)
        return cls(own, windows, np.array(ends, np.float64) * scale, spacing)


def _one_way(here: _Objects, there: _Objects, overlaps: Overlaps) -> float:
    pairs = overlaps.best(overlaps.shared_px)
    partner = np.full(len(here.windows), -1)
    partner[overlaps.true_index[pairs]] = overlaps.guessed_index[pairs]
    distances = [
        _between(here, i, there, j) if j >= 0 else _to_nearest(here, i, there)
        for i, j in enumerate(partner.tolist())
    ]
    return float(np.average(distances, weights=overlaps.true_px))


def _to_nearest(here: _Objects, i: int, there: _Objects) -> float:
    """Return the smallest Hausdorff distance of one object to any of the other side.

    Two objects are at least as far apart as the same edges of their windows, so most objects of a
    slide are never looked at.
    """
    at_least = np.abs(there.extents_um - here.extents_um[i]).max(axis=1)
    smallest = np.inf
    for j in np.argsort(at_least, kind="stable").tolist():
        if at_least[j] >= smallest:
            break
        smallest = min(smallest, _between(here, i, there, j))
    return float(smallest)


def _between(here: _Objects, i: int, there: _Objects, j: int) -> float:
    """Return the Hausdorff distance of two objects."""
    both = (here.windows[i], there.windows[j])
    window = tuple(
        slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(*both, strict=True)
    )
    masks = here.instances[window] == i + 1, there.instances[window] == j + 1
    ways = []
    for start, end in (masks, masks[::-1]):
        distance = ndimage.distance_transform_edt(~end, sampling=here.spacing)
        ways.append(distance[start].max())
    return float(max(ways))
