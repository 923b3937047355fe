"""Find the annotation file of a slide, and read one as the outline of its tissue."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from wsiseg.geometry import Box
from wsiseg.vector.qupath_read import read_annotations

SUFFIXES = (".geojson", ".geojson.gz", ".json", ".json.gz")


def find_annotation(folder: Path, slide_id: str) -> Path | None:
    """Return the GeoJSON of a slide in a folder, by name; None if there is none."""
    names = (slide_id + suffix for suffix in SUFFIXES)
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_outline(
    path: Path | None, *, slide_id: str, bounds: Box | None
) -> list[list[npt.NDArray[np.float64]]] | None:
    """Return the polygons of all annotations, each a list of rings float64 (n, 2) in level 0.

    Parameters
    ----------
    path
        A GeoJSON, a folder of `<slide_id>.geojson`, or None, which gives None.
    bounds
        The slide's bounds, to which QuPath's coordinates refer.

    Raises
    ------
    AnnotationError
        The file is missing or cannot be read.
    """
    if path is None:
        return None
    if path.is_dir():
        path = find_annotation(path, slide_id) or path / f"{slide_id}.geojson"
    annotations = read_annotations(path, bounds=bounds)
    return [polygon for annotation in annotations for polygon in annotation.polygons]
