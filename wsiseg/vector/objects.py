"""The objects of a GeoJSON as tables (CSV), written while it is."""

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import numpy.typing as npt
import shapely

from wsiseg.classes import ClassTable
from wsiseg.geometry import Raster
from wsiseg.outputs import atomic_file
from wsiseg.vector.batch import closed_rings
from wsiseg.vector.rounding import GridPolygons

Float = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

OBJECT_COLUMNS = (
    "id", "class", "object_type", "area_um2", "perimeter_um", "centroid_x_px", "centroid_y_px",
    "left_px", "top_px", "right_px", "bottom_px", "holes", "mean_probability",
)  # fmt: skip
CLASS_COLUMNS = ("class", "label", "objects", "area_um2", "area_percent", "mean_probability")


@dataclass(frozen=True, slots=True)
class WrittenObjects:
    """Features as they were written.

    `polygons` : P of them, in hundredths of a pixel of the file. `ids`, `kinds` : id and object
    type of each. `labels`, `areas_px` int64 (P,) and `probabilities` float64 (P,) as in
    `PolygonBatch`.
    """

    polygons: GridPolygons
    ids: Sequence[str]
    kinds: Sequence[str]
    labels: Int64
    areas_px: Int64
    probabilities: Float

    def to_shapely(self) -> npt.NDArray[np.object_]:
        """Return the polygons in pixels of the file."""
        grid = self.polygons
        closed, starts = closed_rings(grid.hundredths / 100, grid.ring_starts)
        shapes: npt.NDArray[np.object_] = shapely.from_ragged_array(
            shapely.GeometryType.POLYGON, closed, (starts, grid.polygon_starts)
        )
        return shapes


class ObjectSink(Protocol):
    """Takes the objects of a GeoJSON as they are written."""

    def add(self, objects: WrittenObjects) -> None:
        """Take some more."""


class ObjectTable:
    """Writes a row per object and, at the end, a row per class. Use `object_table`."""

    def __init__(self, file: IO[str], raster: Raster, classes: ClassTable) -> None:
        self._rows = csv.writer(file, lineterminator="\n")
        self._rows.writerow(OBJECT_COLUMNS)
        self._names = classes.names
        self._um = np.array(
            [raster.mpp_x / raster.downsample_x, raster.mpp_y / raster.downsample_y]
        )
        self._pixel_um2 = raster.pixel_area_um2
        self._totals = np.zeros((classes.num_labels, 3))  # objects, pixels, sum of probability

    def add(self, objects: WrittenObjects) -> None:
        """Append the rows of some objects."""
        shapes = objects.to_shapely()
        centroids = shapely.get_coordinates(shapely.centroid(shapes)).round(2).tolist()
        bounds = shapely.bounds(shapes).tolist()
        scaled = shapely.transform(shapes, lambda points: points * self._um)
        perimeters = shapely.length(shapely.get_exterior_ring(scaled)).round(2).tolist()
        holes = shapely.get_num_interior_rings(shapes).tolist()
        areas_um2 = (objects.areas_px * self._pixel_um2).round(2).tolist()
        means = ["" if p != p else round(p, 4) for p in objects.probabilities.tolist()]  # noqa: PLR0124 - NaN
        for i, label in enumerate(objects.labels.tolist()):
            self._rows.writerow(
                (
                    objects.ids[i], self._names[label], objects.kinds[i], areas_um2[i],
                    perimeters[i], *centroids[i], *bounds[i], holes[i], means[i],
                )
            )  # fmt: skip
        np.add.at(
            self._totals,
            objects.labels,
            np.stack(
                [
                    np.ones(len(objects.labels)),
                    objects.areas_px,
                    objects.areas_px * objects.probabilities,
                ],
                axis=1,
            ),
        )

    def write_classes(self, file: IO[str]) -> None:
        """Write one row per class of the table, also of those that do not occur."""
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(CLASS_COLUMNS)
        whole_px = max(1.0, float(self._totals[:, 1].sum()))
        for label, name in enumerate(self._names):
            if label == 0:
                continue
            count, pixels, total = self._totals[label].tolist()
            mean = round(total / pixels, 4) if pixels and np.isfinite(total) else ""
            area_um2 = round(pixels * self._pixel_um2, 2)
            rows.writerow(
                (name, label, int(count), area_um2, round(100 * pixels / whole_px, 4), mean)
            )


@contextmanager
def object_table(
    objects: Path, classes_path: Path, *, raster: Raster, classes: ClassTable
) -> Iterator[ObjectTable]:
    """Write two CSV files, each absent or complete: one row per object, one row per class.

    Lengths and areas are in um and um2, positions in pixels of the GeoJSON.
    """
    with (
        atomic_file(objects) as rows,
        atomic_file(classes_path) as totals,
        rows.open("w", encoding="utf-8", newline="") as file,
        totals.open("w", encoding="utf-8", newline="") as class_file,
    ):
        table = ObjectTable(file, raster, classes)
        yield table
        table.write_classes(class_file)
