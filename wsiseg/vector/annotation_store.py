"""The objects of a GeoJSON as tiatoolbox's annotation store, written while it is."""

import json
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import shapely

from wsiseg.classes import ClassTable
from wsiseg.errors import ExportError
from wsiseg.outputs import atomic_file
from wsiseg.vector.objects import WrittenObjects

_WKB_LEVEL = 6

_STORE_SCHEMA = """
CREATE TABLE metadata (key TEXT UNIQUE, value TEXT);
CREATE VIRTUAL TABLE rtree USING rtree(id, min_x, max_x, min_y, max_y);
CREATE TABLE annotations(
    id INTEGER PRIMARY KEY, key TEXT UNIQUE, objtype TEXT, cx FLOAT NOT NULL, cy FLOAT NOT NULL,
    geometry BLOB, properties TEXT, area FLOAT NOT NULL
);
"""
"""As `tiatoolbox.annotation.storage.SQLiteStore` of tiatoolbox 2.1 creates it."""


class AnnotationStoreSink:
    """Fills tiatoolbox's SQLite annotation store, version 1.0.1. Use `annotation_store`."""

    def __init__(
        self, connection: sqlite3.Connection, classes: ClassTable, offset: tuple[int, int]
    ) -> None:
        self._connection = connection
        self._classes = classes
        self._offset = np.array(offset, np.float64)
        self._next_row = 1

    def add(self, objects: WrittenObjects) -> None:
        """Append some objects."""
        shapes = shapely.transform(objects.to_shapely(), lambda points: points + self._offset)
        centres = shapely.get_coordinates(shapely.centroid(shapes)).tolist()
        bounds = shapely.bounds(shapes).tolist()
        areas = shapely.area(shapes).tolist()
        first = self._next_row
        self._next_row += len(shapes)
        self._connection.executemany(
            "INSERT INTO annotations VALUES (?, ?, 'Polygon', ?, ?, ?, ?, ?)",
            (
                (
                    first + i, objects.ids[i], *centres[i], zlib.compress(wkb, _WKB_LEVEL),
                    self._properties(objects, i), areas[i],
                )
                for i, wkb in enumerate(shapely.to_wkb(shapes).tolist())
            ),
        )  # fmt: skip
        self._connection.executemany(
            "INSERT INTO rtree VALUES (?, ?, ?, ?, ?)",
            (
                (first + i, left, right, top, bottom)
                for i, (left, top, right, bottom) in enumerate(bounds)
            ),
        )

    def _properties(self, objects: WrittenObjects, i: int) -> str:
        entry = self._classes.by_label(int(objects.labels[i]))
        # TIAViz colours by "type" and reads a "color" of three numbers in 0..1.
        properties: dict[str, object] = {
            "type": entry.name,
            "class": entry.label,
            "color": [round(part / 255, 4) for part in entry.color],
        }
        mean = float(objects.probabilities[i])
        if np.isfinite(mean):
            properties["prob"] = round(mean, 4)
        return json.dumps(properties, separators=(",", ":"))


@contextmanager
def annotation_store(
    path: Path, *, classes: ClassTable, offset: tuple[int, int]
) -> Iterator[AnnotationStoreSink]:
    """Write an annotation store that tiatoolbox and its viewer open, absent or complete.

    Written with Python's own sqlite3: importing tiatoolbox takes 19 s and 1.3 GB, and its store
    needs a Python whose sqlite3 can load extensions, which many cannot. Coordinates are level 0,
    which is what tiatoolbox means also of slides with bounds.

    Parameters
    ----------
    offset
        What to add to the coordinates of the objects to have level 0.

    Raises
    ------
    ExportError
        This Python's sqlite3 has no R*Tree, which the store is made of.
    """
    with atomic_file(path) as temporary:
        temporary.unlink(missing_ok=True)  # of a run that was killed
        connection = sqlite3.connect(temporary, isolation_level=None)
        try:
            connection.executescript("PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF;")
            connection.execute("BEGIN")
            try:
                for statement in _STORE_SCHEMA.split(";\n"):
                    connection.execute(statement)
            except sqlite3.OperationalError as error:
                msg = (
                    f"annotation store '{path}': the sqlite3 of this Python cannot make it "
                    f"({error}); use a Python whose SQLite has R*Tree, or leave out "
                    "--annotation-store"
                )
                raise ExportError(msg) from error
            facts = {"version": "1.0.1", "compression": "zlib", "compression_level": 9}
            connection.executemany(
                "INSERT INTO metadata VALUES (?, ?)",
                [(key, json.dumps(value)) for key, value in facts.items()],
            )
            yield AnnotationStoreSink(connection, classes, offset)
            connection.execute("COMMIT")
        finally:
            connection.close()
