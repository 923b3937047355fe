"""Polygons to the text of QuPath's features: encoded batch by batch, never held as objects."""

import hashlib
import math
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import orjson

from wsiseg.classes import ClassTable
from wsiseg.vector.batch import LargePolygon, PolygonBatch, Traced
from wsiseg.vector.objects import ObjectSink, WrittenObjects
from wsiseg.vector.rounding import Frame, GridPolygons, on_grid
from wsiseg.vector.text import rings_text, to_hundredths

NAMESPACE = uuid.UUID("6f5a1c1e-2f0b-5a55-9d0e-6b1c6f1e0d57")
"""Of the feature ids: the same polygon on the same slide always has the same id, so that QuPath
notices when a file is imported a second time."""

AREA = "Area µm^2"
MEAN_PROBABILITY = "Mean probability"
"""Names of the measurements, as QuPath itself spells the first."""

_COPY_BYTES = 1 << 20


class FeatureEncoder:
    """Turns polygons into features and counts them.

    Parameters
    ----------
    frame
        From the raster to the file.
    pixel_um2
        Area of a pixel of the raster.
    detection_below_px
        Objects of fewer pixels are detections, the others annotations.
    metadata
        Text for each feature's metadata.
    has_right_angles
        Whether outlines follow pixel edges, as they do unless simplified.
    sinks
        Also get the objects. Large polygons are loaded for them.
    """

    def __init__(  # noqa: PLR0913 - one argument per fact about the file
        self,
        *,
        frame: Frame,
        pixel_um2: float,
        classes: ClassTable,
        slide_id: str,
        detection_below_px: float,
        is_locked: bool,
        metadata: Mapping[str, str],
        has_right_angles: bool,
        sinks: Sequence[ObjectSink] = (),
    ) -> None:
        self.num_annotations = 0
        self.num_detections = 0
        self.num_vertices = 0
        self.most_vertices = 0
        """Of one feature."""
        self._frame = frame
        self._pixel_um2 = pixel_um2
        self._detection_below_px = detection_below_px
        self._has_right_angles = has_right_angles
        self._sinks = sinks
        self._seeds = {
            c.label: hashlib.sha1(
                NAMESPACE.bytes + f"{slide_id}/{c.label}/".encode(), usedforsecurity=False
            )
            for c in classes.classes
        }
        tail = {"isLocked": True} if is_locked else {}
        more = {"metadata": dict(metadata)} if metadata else {}
        self._heads = {
            (c.label, kind): b'"properties":'
            + orjson.dumps(
                {
                    "objectType": kind,
                    "classification": {"name": c.name, "color": list(c.color)},
                    **tail,
                    **more,
                }
            )[:-1]
            for c in classes.classes
            for kind in ("annotation", "detection")
        }

    @property
    def num_features(self) -> int:
        """How many were encoded."""
        return self.num_annotations + self.num_detections

    def encode(self, traced: Iterable[Traced]) -> Iterator[bytes]:
        """Yield the features as text, to be written one piece after the other."""
        for item in traced:
            if isinstance(item, LargePolygon) and self._streams_large:
                yield from self._large(item)
            else:
                yield from self._batch(item.loaded() if isinstance(item, LargePolygon) else item)

    @property
    def _streams_large(self) -> bool:
        return self._has_right_angles and self._frame.keeps_the_lattice and not self._sinks

    def _batch(self, batch: PolygonBatch) -> Iterator[bytes]:
        polygons = on_grid(batch, self._frame, has_right_angles=self._has_right_angles)
        text, offsets = rings_text(
            polygons.hundredths, polygons.ring_starts, polygons.polygon_starts
        )
        coordinates = memoryview(text.data)
        self._count_vertices(polygons)
        labels = batch.labels[polygons.source].tolist()
        areas = batch.areas_px[polygons.source].tolist()
        means = batch.probabilities[polygons.source].tolist()
        at = offsets.tolist()
        kinds = [self._kind(area_px) for area_px in areas]
        ids = []
        pieces: list[bytes | memoryview] = []
        for i, (label, area_px, mean) in enumerate(zip(labels, areas, means, strict=True)):
            outline = coordinates[at[i] : at[i + 1]]
            seed = self._seeds[label].copy()
            seed.update(outline)
            ids.append(_uuid5(seed.digest()))
            pieces += (
                b",\n" if i or self.num_features else b"\n",
                b'{"type":"Feature","id":"',
                ids[i].encode(),
                b'","geometry":{"type":"Polygon","coordinates":[',
                outline,
                b"]},",
                self._properties(label, kinds[i], area_px, mean),
            )
        if not pieces:
            return
        self._count_kinds(kinds)
        for sink in self._sinks:
            sink.add(
                WrittenObjects(
                    polygons, ids, kinds,
                    batch.labels[polygons.source],
                    batch.areas_px[polygons.source],
                    batch.probabilities[polygons.source],
                )
            )  # fmt: skip
        yield b"".join(pieces)

    def _large(self, polygon: LargePolygon) -> Iterator[bytes]:
        """Yield one feature whose outline is read and encoded piece by piece."""
        seed = self._seeds[polygon.label].copy()
        frame = self._frame
        num_vertices = 0
        with tempfile.TemporaryFile() as outline:
            for vertices, starts in polygon.pieces():
                moved = to_hundredths(
                    vertices, frame.scale_x, frame.scale_y, frame.offset_x, frame.offset_y
                )
                text, _ = rings_text(moved, starts, np.array([0, len(starts) - 1]))
                part = (b"," if num_vertices else b"") + text.tobytes()
                seed.update(part)
                outline.write(part)
                num_vertices += len(vertices) + len(starts) - 1
            yield b",\n" if self.num_features else b"\n"
            yield b'{"type":"Feature","id":"' + _uuid5(seed.digest()).encode()
            yield b'","geometry":{"type":"Polygon","coordinates":['
            outline.seek(0)
            while part := outline.read(_COPY_BYTES):
                yield part
        mean = math.nan if polygon.mean_probability is None else polygon.mean_probability
        kind = self._kind(polygon.area_px)
        yield b"]}," + self._properties(polygon.label, kind, polygon.area_px, mean)
        self._count_kinds([kind])
        self.num_vertices += num_vertices
        self.most_vertices = max(self.most_vertices, num_vertices)

    def _kind(self, area_px: int) -> str:
        return "detection" if area_px < self._detection_below_px else "annotation"

    def _count_kinds(self, kinds: Sequence[str]) -> None:
        self.num_detections += kinds.count("detection")
        self.num_annotations += kinds.count("annotation")

    def _count_vertices(self, polygons: GridPolygons) -> None:
        self.num_vertices += polygons.num_vertices
        per_polygon = np.diff(polygons.ring_starts[polygons.polygon_starts])
        per_polygon += np.diff(polygons.polygon_starts)
        self.most_vertices = max(self.most_vertices, int(per_polygon.max(initial=0)))

    def _properties(self, label: int, kind: str, area_px: int, mean: float) -> bytes:
        head = self._heads[label, kind]
        area_um2 = round(area_px * self._pixel_um2, 2)
        measurements = f',"measurements":{{"{AREA}":{area_um2!r}'
        if mean == mean:  # NaN: there was none to read  # noqa: PLR0124
            measurements += f',"{MEAN_PROBABILITY}":{round(mean, 4)!r}'
        return head + measurements.encode() + b"}}}"


def _uuid5(digest: bytes) -> str:
    """Return the UUID of version 5 that a SHA-1 makes (RFC 9562, section 5.5), as text."""
    value = bytearray(digest[:16])
    value[6] = value[6] & 0x0F | 0x50
    value[8] = value[8] & 0x3F | 0x80
    h = value.hex()
    return f"{h[:8]}-{h[8:12]}-{h[12:16]}-{h[16:20]}-{h[20:]}"
