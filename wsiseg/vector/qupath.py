"""Write polygons as the GeoJSON that QuPath imports, one feature at a time.

What QuPath demands, and where in its source, stands in the project's notes: rings closed, valid
after rounding to 0.01 px, a colour in every classification, `objectType` inside `properties`.
"""

import gzip
import io
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import orjson
import shapely

from wsiseg.classes import ClassTable
from wsiseg.geometry import Raster
from wsiseg.outputs import atomic_file
from wsiseg.settings.export import ExportConfig
from wsiseg.vector.simplify import drop_small, simplify_shared
from wsiseg.vector.trace import TracedPolygon

NAMESPACE = uuid.UUID("6f5a1c1e-2f0b-5a55-9d0e-6b1c6f1e0d57")
"""Of the feature ids: the same polygon on the same slide always has the same id, so that QuPath
notices when a file is imported a second time."""

MANY_OBJECTS = 5000
"""Above this, `objects: auto` makes detections: QuPath draws a million of them, but crawls with
ten thousand annotations."""

GRID_PX = 0.01
"""QuPath rounds every coordinate to this, and refuses a file in which that breaks a polygon."""

_BUFFER_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What was written. `objects` : "annotation" or "detection"."""

    features: int
    vertices: int
    size_bytes: int
    objects: str


def origin_l0(slide: Mapping[str, Any], origin: str) -> tuple[int, int]:
    """Return the level-0 point that is (0, 0) in the file.

    QuPath shows only the bounds of a slide that states them (MRXS) and counts from their corner.
    """
    bounds = slide.get("bounds")
    return (0, 0) if origin == "level0" or bounds is None else (int(bounds[0]), int(bounds[1]))


def write_geojson(
    path: Path,
    polygons: Iterable[TracedPolygon],
    *,
    raster: Raster,
    classes: ClassTable,
    slide: Mapping[str, Any],
    provenance: Mapping[str, Any],
    config: ExportConfig,
) -> WriteResult:
    """Write polygons as a FeatureCollection; absent or complete, the same bytes every time.

    Parameters
    ----------
    path
        `.geojson`, or `.geojson.gz` for gzip.
    polygons
        In the frame of `raster`; streamed, unless `config.simplify_um` needs them all.
    slide
        `SlideMeta.to_dict()`; its id and bounds are used.
    provenance
        Plain values for the foreign member "wsiseg" of the collection, which QuPath ignores.
    """
    chosen = _chosen(polygons, raster, config)
    head = list(islice(chosen, MANY_OBJECTS + 1))
    objects = config.objects
    if objects == "auto":
        objects = "detection" if len(head) > MANY_OBJECTS else "annotation"
    features = _Features(raster, classes, slide, config, objects)
    with atomic_file(path) as temporary:
        with temporary.open("wb") as raw:
            if path.name.endswith(".gz"):
                # No name and no time in the header: equal runs give equal bytes.
                with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as packed:
                    _write(packed, features.encode(chain(head, chosen)), provenance)
            else:
                _write(raw, features.encode(chain(head, chosen)), provenance)
        size = temporary.stat().st_size
    return WriteResult(features.num_features, features.num_vertices, size, objects)


def read_provenance(path: Path) -> dict[str, Any] | None:
    """Return the `provenance` of a file that `write_geojson` wrote, None for any other file."""
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if is_gzip else path.open("rb") as file:
            first_line = file.readline(_BUFFER_BYTES)
        found = orjson.loads(first_line + b"]}")["wsiseg"]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _chosen(
    polygons: Iterable[TracedPolygon], raster: Raster, config: ExportConfig
) -> Iterator[TracedPolygon]:
    """Apply the filters of the configuration, whose um become pixels of the raster."""
    if config.min_area_um2 or config.min_hole_um2:
        polygons = drop_small(
            polygons,
            min_area_px=raster.area_px_from_um2(config.min_area_um2),
            min_hole_px=raster.area_px_from_um2(config.min_hole_um2),
        )
    if config.simplify_um:
        polygons = simplify_shared(polygons, config.simplify_um / raster.mpp)
    return iter(polygons)


def _write(
    file: IO[bytes] | gzip.GzipFile, features: Iterable[bytes], provenance: Mapping[str, Any]
) -> None:
    buffer = io.BytesIO()
    buffer.write(b'{"type":"FeatureCollection","wsiseg":')
    buffer.write(orjson.dumps(dict(provenance), option=orjson.OPT_SORT_KEYS))
    buffer.write(b',"features":[')
    separator = b"\n"
    for feature in features:
        buffer.write(separator)
        buffer.write(feature)
        separator = b",\n"
        if buffer.tell() > _BUFFER_BYTES:
            file.write(buffer.getvalue())
            buffer = io.BytesIO()
    buffer.write(b"\n]}\n")
    file.write(buffer.getvalue())


class _Features:
    """Turns polygons into features and counts them."""

    def __init__(
        self,
        raster: Raster,
        classes: ClassTable,
        slide: Mapping[str, Any],
        config: ExportConfig,
        objects: str,
    ) -> None:
        self.num_features = 0
        self.num_vertices = 0
        self._scale = np.array([raster.downsample_x, raster.downsample_y])
        self._offset = np.array(origin_l0(slide, config.origin))
        self._pixel_um2 = raster.pixel_area_um2
        self._slide_id = str(slide["slide_id"])
        self._heads = {
            c.label: b'"properties":'
            + orjson.dumps(
                {
                    "objectType": objects,
                    "classification": {"name": c.name, "color": list(c.color)},
                    **({"isLocked": True} if config.locked else {}),
                }
            )[:-1]
            for c in classes.classes
        }

    def encode(self, polygons: Iterable[TracedPolygon]) -> Iterator[bytes]:
        """Yield one feature per polygon."""
        for polygon in polygons:
            for rings in self._coordinates(polygon):
                yield self._feature(polygon, rings)

    def _coordinates(self, polygon: TracedPolygon) -> list[list[npt.NDArray[Any]]]:
        """Return the polygon in the file's frame, rounded and valid; as several if it must be."""
        moved = [ring * self._scale - self._offset for ring in polygon.rings]
        if polygon.rings[0].dtype.kind == "i" and self._scale.min() >= 2 * GRID_PX:
            # Right angles on lattice lines that rounding keeps apart stay valid.
            return [[_rounded(np.concatenate([ring, ring[:1]])) for ring in moved]]
        shape = shapely.set_precision(shapely.Polygon(moved[0], moved[1:]), GRID_PX)
        return [
            [_rounded(np.asarray(ring.coords)) for ring in (part.exterior, *part.interiors)]
            for part in shapely.get_parts(shape)
            if isinstance(part, shapely.Polygon) and part.area > 0
        ]

    def _feature(self, polygon: TracedPolygon, rings: list[npt.NDArray[Any]]) -> bytes:
        coordinates = b",".join(orjson.dumps(r, option=orjson.OPT_SERIALIZE_NUMPY) for r in rings)
        identity = f"{self._slide_id}/{polygon.label}/".encode() + coordinates
        measurements: dict[str, float] = {
            "Area µm^2": round(polygon.area_px * self._pixel_um2, 2),
        }
        if polygon.mean_probability is not None:
            measurements["Mean probability"] = round(polygon.mean_probability, 4)
        self.num_features += 1
        self.num_vertices += sum(len(ring) for ring in rings)
        return b"".join(
            (
                b'{"type":"Feature","id":"',
                str(uuid.uuid5(NAMESPACE, identity.decode())).encode(),
                b'","geometry":{"type":"Polygon","coordinates":[',
                coordinates,
                b"]},",
                self._heads[polygon.label],
                b',"measurements":',
                orjson.dumps(measurements),
                b"}}",
            )
        )


def _rounded(points: npt.NDArray[np.float64]) -> npt.NDArray[Any]:
    """Return points on QuPath's grid; whole numbers as integers, which are exact and short."""
    rounded = np.round(points, 2) + 0.0  # + 0.0: never "-0.0"
    whole = rounded.astype(np.int64)
    return whole if (whole == rounded).all() else np.ascontiguousarray(rounded)
