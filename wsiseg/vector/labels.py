"""Annotations to training labels: what is annotated, what is background, what nobody looked at."""

import difflib
import fnmatch
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsiseg.classes import BACKGROUND, IGNORE, ClassTable
from wsiseg.errors import AnnotationError
from wsiseg.geometry import Box, Raster
from wsiseg.vector.qupath_read import Annotation
from wsiseg.vector.raster import fill_polygon

logger = logging.getLogger(__name__)

MAX_SHOWN = 80
"""Characters of a class name that a message repeats; a file may hold one of megabytes."""


def label_of(class_name: str | None, classes: ClassTable) -> int | None:
    """Return the label that an annotation of a class paints, None for one not in the table.

    "Tumor: Positive" is a kind of Tumor, as in QuPath.
    """
    if class_name is None:
        return None
    if any(fnmatch.fnmatchcase(class_name, pattern) for pattern in classes.ignore):
        return IGNORE
    if class_name == classes.roi:
        return BACKGROUND
    found = classes.by_name(class_name) or classes.by_name(class_name.split(":")[0])
    return None if found is None else found.label


def check_annotations(
    annotations: Sequence[Annotation],
    classes: ClassTable,
    *,
    slide_id: str,
    width_px_l0: int,
    height_px_l0: int,
) -> None:
    """Check that annotations fit a slide and a class table; those without a class are left out.

    Raises
    ------
    AnnotationError
        An annotation lies outside the slide, or its class is not in the table.
    """
    known = [*classes.names[1:], *([classes.roi] if classes.roi else [])]
    num_unclassified = 0
    for annotation in annotations:
        where = f"slide '{slide_id}': annotation feature {annotation.index}"
        _check_inside(annotation, where, width_px_l0, height_px_l0)
        if annotation.class_name is None:
            num_unclassified += 1
        elif label_of(annotation.class_name, classes) is None:
            name = annotation.class_name[:MAX_SHOWN]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"the table has {', '.join(known)}"
            shown = name if name == annotation.class_name else name + "..."
            msg = f"{where}: class {shown!r} is not in the class table; {hint}"
            raise AnnotationError(msg)
    if num_unclassified:
        logger.warning(
            "slide '%s': %d annotations without a class are left out", slide_id, num_unclassified
        )


def _check_inside(annotation: Annotation, where: str, width: int, height: int) -> None:
    low, high = _extent(annotation)
    if (high <= 0).any() or low[0] >= width or low[1] >= height:
        msg = (
            f"{where}: lies outside the slide: x {low[0]:.0f}..{high[0]:.0f}, y {low[1]:.0f}.."
            f"{high[1]:.0f}, but the slide is {width} x {height} px; is it another slide's?"
        )
        raise AnnotationError(msg)


def _extent(
    annotation: Annotation,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    points = np.concatenate([rings[0] for rings in annotation.polygons])
    return points.min(axis=0), points.max(axis=0)


@dataclass(frozen=True, slots=True)
class _Shape:
    label: int
    rings: list[npt.NDArray[np.float64]]


class AnnotationLabels:
    """The labels of a slide's annotations, painted where they are asked for.

    Regions of interest (`classes.roi`) first, then the classes in the file's order, so that of
    overlapping ones the later counts, then what is to be ignored.
    """

    def __init__(self, annotations: Sequence[Annotation], classes: ClassTable) -> None:
        order = {BACKGROUND: 0, IGNORE: 2}
        shapes = [
            _Shape(label, polygon)
            for annotation in annotations
            if (label := label_of(annotation.class_name, classes)) is not None
            for polygon in annotation.polygons
        ]
        self._shapes = sorted(shapes, key=lambda s: order.get(s.label, 1))
        extents = [[*s.rings[0].min(axis=0), *s.rings[0].max(axis=0)] for s in self._shapes]
        self._extents = np.array(extents, np.float64).reshape(-1, 4)

    def read(self, raster: Raster, box: Box) -> npt.NDArray[np.uint8]:
        """Return the labels of a box of a raster: uint8 (box.height, box.width).

        A pixel has the label of what covers its centre; 255 where nobody annotated and outside
        the slide.
        """
        labels = np.full((box.height, box.width), IGNORE, np.uint8)
        x0, y0 = raster.l0_from_raster(box.x, box.y)
        x1, y1 = raster.l0_from_raster(box.right, box.bottom)
        e = self._extents
        near = (e[:, 0] < x1) & (e[:, 2] > x0) & (e[:, 1] < y1) & (e[:, 3] > y0)
        scale = np.array([raster.downsample_x, raster.downsample_y])
        corner = np.array([box.x, box.y], np.float64)
        for i in np.flatnonzero(near):
            shape = self._shapes[i]
            fill_polygon(labels, [ring / scale - corner for ring in shape.rings], shape.label)
        inside = box.intersection(raster.box)
        outside = np.ones(labels.shape, bool)
        outside[
            inside.y - box.y : inside.bottom - box.y, inside.x - box.x : inside.right - box.x
        ] = False
        labels[outside] = IGNORE
        return labels


def annotation_labels(
    annotations: Sequence[Annotation], classes: ClassTable, raster: Raster, box: Box
) -> npt.NDArray[np.uint8]:
    """Return the labels of one box; `AnnotationLabels` serves many."""
    return AnnotationLabels(annotations, classes).read(raster, box)
