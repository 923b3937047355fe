"""Settings of `wsiseg export`."""

from dataclasses import dataclass
from pathlib import Path

from wsiseg.config import setting

GEOJSON_SUFFIXES = (".geojson", ".geojson.gz")
"""What the name of an output ends in; the second is packed with gzip."""


OBJECTS_CSV, CLASSES_CSV = ".objects.csv", ".classes.csv"
ANNOTATION_STORE, OME_TIFF = ".db", ".ome.tiff"
"""What the names of the files beside a GeoJSON end in."""


def beside_geojson(path: Path, end: str) -> Path:
    """Return `X` + `end` for a GeoJSON `X.geojson` or `X.geojson.gz`."""
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".geojson") + end)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportConfig:
    """How a slide mask becomes polygons."""

    origin: str = setting(
        "auto",
        "Frame of the coordinates: level 0 as OpenSlide counts it, or the cropped bounds "
        "that QuPath shows (MRXS); auto shifts where the slide has bounds, as QuPath does.",
        choices=("auto", "level0", "bounds"),
    )
    objects: str = setting(
        "auto",
        "Export as QuPath annotations or detections; auto makes annotations, but if there are "
        "more than 5000 objects it makes detections of those below 10,000 um2, of which QuPath "
        "handles far more.",
        choices=("auto", "annotation", "detection"),
    )
    min_area_um2: float = setting(0.0, "Smaller polygons are dropped (um2).", minimum=0.0)
    min_hole_um2: float = setting(0.0, "Smaller holes are filled (um2).", minimum=0.0)
    simplify_um: float = setting(
        0.0,
        "Tolerance of the outline in um; shared borders stay shared. 0 keeps every pixel edge.",
        minimum=0.0,
    )
    max_vertices: int = setting(
        0,
        "Budget of vertices in the file: the tolerance is raised until it is kept, which the "
        "summary states. 0 is no budget.",
        minimum=0,
    )
    locked: bool = setting(
        True, "Lock the objects in QuPath against accidental dragging.", flag="--locked/--unlocked"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtraOutputs:
    """What is written beside the GeoJSON `X.geojson`; chosen anew at each run."""

    csv: bool = False
    """`X.objects.csv`, a row per object, and `X.classes.csv`, a row per class."""
    ome_tiff: bool = False
    """`X.ome.tiff`, the mask itself as a pyramid."""
    annotation_store: bool = False
    """`X.db`, the objects for tiatoolbox and its viewer."""

    def paths(self, geojson: Path) -> list[Path]:
        """Return the files that are written beside a GeoJSON."""
        chosen = {
            OBJECTS_CSV: self.csv,
            CLASSES_CSV: self.csv,
            ANNOTATION_STORE: self.annotation_store,
            OME_TIFF: self.ome_tiff,
        }
        return [beside_geojson(geojson, end) for end, is_chosen in chosen.items() if is_chosen]
