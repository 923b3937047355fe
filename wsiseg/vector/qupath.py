"""Write polygons as the GeoJSON that QuPath imports, streamed, absent or complete.

What QuPath demands, and where in its source, stands in the project's notes: rings closed, valid
after rounding to 0.01 px, a colour in every classification, `objectType` inside `properties`.
"""

import gzip
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any

import orjson

from wsiseg.classes import ClassTable
from wsiseg.errors import ConfigError
from wsiseg.geometry import Raster
from wsiseg.outputs import atomic_file
from wsiseg.settings.export import ExportConfig
from wsiseg.vector.batch import LargePolygon, PolygonBatch, Traced, drop_small, joined
from wsiseg.vector.features import FeatureEncoder
from wsiseg.vector.objects import ObjectSink
from wsiseg.vector.rounding import Frame
from wsiseg.vector.simplify import simplify_shared

MANY_OBJECTS = 5000
"""Above this, `objects: auto` makes detections of small objects: QuPath draws a million of them,
but crawls with ten thousand annotations."""

LARGE_OBJECT_UM2 = 10_000.0
"""From this on `objects: auto` makes an annotation of an object even among many: a square of
100 um is larger than any cell, and a slide has few of them."""

COMFORT_BYTES = 200_000_000
"""QuPath parses the whole file into a tree in its heap, about twenty bytes per byte of text: this
needs 4 GB, the half of a usual machine's memory that QuPath takes."""

COMFORT_VERTICES = 500_000
"""Of one object: QuPath redraws and edits an outline as a whole."""

MAX_SIMPLIFY_PX = 64.0
"""The most that `max_vertices` raises the tolerance to, in pixels of the mask."""

GZIP_LEVEL = 6
"""The usual trade: level 9 takes four times as long for 2 % less."""

_HEAD_BYTES = 1 << 20

Source = Callable[[bool], Iterable[Traced]]
"""Traces a raster anew at each call; the argument is `with_junctions` of `trace_batches`."""


@dataclass(frozen=True, slots=True)
class WriteResult:
    """What was written.

    `objects` : "annotation", "detection" or "annotation, detection". `simplify_um` : the tolerance
    used, which `max_vertices` may have raised. `most_vertices` : of one feature.
    """

    features: int
    annotations: int
    detections: int
    vertices: int
    most_vertices: int
    size_bytes: int
    simplify_um: float

    @property
    def objects(self) -> str:
        """The types of the objects."""
        kinds = ("annotation", self.annotations), ("detection", self.detections)
        return ", ".join(kind for kind, count in kinds if count) or "none"

    @property
    def warning(self) -> str:
        """What QuPath would choke on, and the remedy; empty if it would not."""
        what = []
        if self.size_bytes > COMFORT_BYTES:
            heap_gb = 20 * self.size_bytes / 1e9
            what.append(f"{self.size_bytes / 1e6:.0f} MB need about {heap_gb:.0f} GB of its memory")
        if self.most_vertices > COMFORT_VERTICES:
            what.append(f"one object has {self.most_vertices:,} vertices")
        if self.annotations > 2 * MANY_OBJECTS:
            what.append(f"{self.annotations:,} annotations (use --objects auto)")
        if not what:
            return ""
        remedy = "try --simplify-um, --min-area-um2, --min-hole-um2 or --max-vertices"
        return f"QuPath will be slow or fail: {'; '.join(what)}; {remedy}"


def origin_l0(slide: Mapping[str, Any], origin: str) -> tuple[int, int]:
    """Return the level-0 point that is (0, 0) in the file.

    QuPath shows only the bounds of a slide that states them (MRXS) and counts from their corner.
    """
    bounds = slide.get("bounds")
    return (0, 0) if origin == "level0" or bounds is None else (int(bounds[0]), int(bounds[1]))


def write_geojson(  # noqa: PLR0913 - one argument per part of the file
    path: Path,
    source: Source,
    *,
    raster: Raster,
    classes: ClassTable,
    slide: Mapping[str, Any],
    provenance: Mapping[str, Any],
    config: ExportConfig,
    metadata: Mapping[str, str] | None = None,
    sinks: Sequence[ObjectSink] = (),
) -> WriteResult:
    """Write polygons as a FeatureCollection; absent or complete, the same bytes every time.

    Parameters
    ----------
    path
        `.geojson`, or `.geojson.gz` for gzip.
    source
        Gives polygons in the frame of `raster`; streamed, unless they are to be simplified, for
        which all are needed at once.
    slide
        `SlideMeta.to_dict()`; its id and bounds are used.
    provenance
        Plain values for the foreign member "wsiseg" of the collection, which QuPath ignores.
    metadata
        Text that each feature carries.
    sinks
        Also get the objects that are written.

    Raises
    ------
    ConfigError
        `config.max_vertices` cannot be kept.
    """
    traced, simplify_um = _chosen(source, raster, config)
    head, small_px = _split(traced, raster, config)
    x, y = origin_l0(slide, config.origin)
    encoder = FeatureEncoder(
        frame=Frame(raster.downsample_x, raster.downsample_y, x, y),
        pixel_um2=raster.pixel_area_um2,
        classes=classes,
        slide_id=str(slide["slide_id"]),
        detection_below_px=small_px,
        is_locked=config.locked,
        metadata=metadata or {},
        has_right_angles=simplify_um == 0,
        sinks=sinks,
    )
    with atomic_file(path) as temporary:
        with temporary.open("wb") as raw:
            features = encoder.encode(chain(head, traced))
            if path.name.endswith(".gz"):
                # No name and no time in the header: equal runs give equal bytes.
                with gzip.GzipFile("", "wb", GZIP_LEVEL, fileobj=raw, mtime=0) as packed:
                    _write(packed, features, provenance)
            else:
                _write(raw, features, provenance)
        size = temporary.stat().st_size
    return WriteResult(
        features=encoder.num_features,
        annotations=encoder.num_annotations,
        detections=encoder.num_detections,
        vertices=encoder.num_vertices,
        most_vertices=encoder.most_vertices,
        size_bytes=size,
        simplify_um=simplify_um,
    )


def read_provenance(path: Path) -> dict[str, Any] | None:
    """Return the `provenance` of a file that `write_geojson` wrote, None for any other file."""
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path) if is_gzip else path.open("rb") as file:
            first_line = file.readline(_HEAD_BYTES)
        found = orjson.loads(first_line + b"]}")["wsiseg"]
    except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None


def _chosen(source: Source, raster: Raster, config: ExportConfig) -> tuple[Iterator[Traced], float]:
    """Return the polygons to write, and the tolerance in um to which they are simplified."""

    def filtered(traced: Iterable[Traced]) -> Iterable[Traced]:
        if not config.min_area_um2 and not config.min_hole_um2:
            return traced
        return drop_small(
            traced,
            min_area_px=raster.area_px_from_um2(config.min_area_um2),
            min_hole_px=raster.area_px_from_um2(config.min_hole_um2),
        )

    budget = config.max_vertices or math.inf
    if not config.simplify_um and (
        not config.max_vertices or _num_vertices(filtered(source(False))) <= budget
    ):
        return iter(filtered(source(False))), 0.0
    # Simplified before it is filtered: what is left out leaves borders as they were.
    whole = joined(source(True))
    tolerance_px = config.simplify_um / raster.mpp or 0.5
    while True:
        simple = joined(filtered([simplify_shared(whole, tolerance_px)]))
        if simple.num_vertices <= budget:
            return iter([simple] if len(simple) else []), tolerance_px * raster.mpp
        if tolerance_px >= MAX_SIMPLIFY_PX:
            msg = (
                f"max_vertices: {len(simple):,} objects keep {simple.num_vertices:,} vertices at "
                f"the coarsest tolerance ({tolerance_px * raster.mpp:.3g} um), more than "
                f"{config.max_vertices:,}; drop small ones with --min-area-um2, or raise it"
            )
            raise ConfigError(msg)
        tolerance_px = min(2 * tolerance_px, MAX_SIMPLIFY_PX)


def _num_vertices(traced: Iterable[Traced]) -> int:
    total = 0
    for item in traced:
        if isinstance(item, LargePolygon):
            total += sum(len(v) + len(s) - 1 for v, s in item.pieces())
        else:
            total += item.num_vertices
    return total


def _split(
    traced: Iterator[Traced], raster: Raster, config: ExportConfig
) -> tuple[list[Traced], float]:
    """Look whether there are many objects, and up to which area in pixels they are detections.

    Returns what was looked at, to be written before the rest.
    """
    if config.objects != "auto":
        return [], math.inf if config.objects == "detection" else 0.0
    head: list[Traced] = []
    count = 0
    for item in traced:
        head.append(item)
        count += len(item) if isinstance(item, PolygonBatch) else 1
        if count > MANY_OBJECTS:
            return head, raster.area_px_from_um2(LARGE_OBJECT_UM2)
    return head, 0.0


def _write(
    file: IO[bytes] | gzip.GzipFile, features: Iterable[bytes], provenance: Mapping[str, Any]
) -> None:
    file.write(b'{"type":"FeatureCollection","wsiseg":')
    file.write(orjson.dumps(dict(provenance), option=orjson.OPT_SORT_KEYS))
    file.write(b',"features":[')
    for text in features:
        file.write(text)
    file.write(b"\n]}\n")
