"""SlideMask: the labels of a whole slide, chunk by chunk, as an OME-Zarr (NGFF 0.5) label pyramid.

Layout: `0`, `1`, ... uint8 (H, W) labels, each level half the one before; 255 = not predicted.
`probability` uint8 (H, W) is round(255 * p) of the predicted class at level 0, where 0 also stands
for not predicted. A chunk that holds only the fill value is not stored.
"""

import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import zarr

from wsiseg import outputs
from wsiseg.classes import BACKGROUND, IGNORE, ClassTable
from wsiseg.errors import StoreError
from wsiseg.geometry import Box, Raster
from wsiseg.runinfo import RunInfo, check_same_run, fingerprint_of
from wsiseg.store import layout
from wsiseg.store.ledger import Journal

UInt8 = npt.NDArray[np.uint8]

CHUNK_PX = 1024
"""Side of a chunk: one mebibyte of labels, which compress to kilobytes."""

OVERVIEW_PX = 1024
"""The pyramid ends with the first level that fits in this."""

NGFF_VERSION = "0.5"


def num_pyramid_levels(width_px: int, height_px: int) -> int:
    """Return how many levels a mask has, level 0 included."""
    return 1 + max(0, math.ceil(math.log2(max(width_px, height_px) / OVERVIEW_PX)))


def level_shape(raster: Raster, level: int) -> tuple[int, int]:
    """Return (height, width) of a level in pixels."""
    scale = 1 << level
    return -(-raster.height_px // scale), -(-raster.width_px // scale)


class SlideMask:
    """A finished slide mask, read only. Reads are thread-safe."""

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        """Use `SlideMask.open`."""
        self.path = path
        with layout.parsing(path):
            self.raster = Raster(**attributes["raster"])
            self.slide: dict[str, Any] = dict(attributes["slide"])
            self.slide_id = str(self.slide["slide_id"])
            self.run: dict[str, Any] = dict(attributes["run"])
            self.chunk_px = int(attributes["chunk_px"])
            self.model_digest = str(attributes["model_digest"])
            self.has_probability = bool(attributes["has_probability"])
            self.num_levels = num_pyramid_levels(self.raster.width_px, self.raster.height_px)
            classes = layout.classes_from(attributes, path)
            if classes is None:
                msg = f"store '{path}': has no class table"
                raise StoreError(msg)
            self.classes: ClassTable = classes
            group = zarr.open_group(path, mode="r")
            self._levels = [layout.array(group, str(i)) for i in range(self.num_levels)]
            self._probability = layout.array(group, "probability") if self.has_probability else None

    @classmethod
    def open(cls, path: Path) -> "SlideMask":
        """Open a finished mask.

        Raises
        ------
        StoreError
            Not a slide mask, unfinished, or of a newer format.
        StoreCorruptError
            A file is missing or truncated.
        """
        return cls(path, layout.open_finished(path, "mask"))

    @staticmethod
    def is_finished(path: Path, run: RunInfo) -> bool:
        """Whether a finished mask of `run` is at `path`; OutputExistsError if it is another's."""
        return layout.is_finished(path, "mask", run)

    @staticmethod
    def create(  # noqa: PLR0913 - one argument per attribute of the store
        path: Path,
        *,
        raster: Raster,
        slide: dict[str, Any],
        classes: ClassTable,
        run: RunInfo,
        model_digest: str,
        with_probability: bool,
        chunk_px: int = CHUNK_PX,
        overwrite: bool = False,
    ) -> "MaskWriter":
        """Begin a mask, or go on with an unfinished one of the same run.

        Parameters
        ----------
        slide
            `SlideMeta.to_dict()`.
        chunk_px
            Side of the unit of writing. An unfinished mask keeps the one that it was begun with.
        overwrite
            Drop unfinished work; a finished mask stays until the new one replaces it.
        """
        attributes = {
            "format_version": layout.FORMAT_VERSION,
            "kind": "mask",
            "raster": layout.raster_to_dict(raster),
            "slide": slide,
            "classes": classes.to_dict(),
            "run": run.to_dict(),
            "model_digest": model_digest,
            "has_probability": with_probability,
            "chunk_px": chunk_px,
        }
        return MaskWriter(path, attributes, raster, classes, overwrite=overwrite)

    def read(self, box: Box) -> UInt8:
        """Return the labels of a box of the raster: uint8 (box.height, box.width).

        255 where nothing was predicted and outside the slide.
        """
        return self._read(self._levels[0], box, IGNORE)

    def read_probability(self, box: Box) -> UInt8 | None:
        """Return round(255 * probability of the label) like `read`; None if it was not kept."""
        return None if self._probability is None else self._read(self._probability, box, 0)

    def read_level(self, level: int, box: Box) -> UInt8:
        """Return the labels of a box in the pixels of pyramid level `level`."""
        return self._read(self._levels[level], box, IGNORE)

    def _read(self, array: "zarr.Array[Any]", box: Box, fill: int) -> UInt8:
        out = np.full((box.height, box.width), fill, np.uint8)
        height, width = array.shape
        inner = box.intersection(Box(0, 0, width, height))
        if not inner.is_empty:
            with layout.reading(self.path, f"{array.basename} at {box}"):
                out[
                    inner.y - box.y : inner.bottom - box.y, inner.x - box.x : inner.right - box.x
                ] = array[inner.y : inner.bottom, inner.x : inner.right]
        return out


class MaskWriter:
    """Writes a slide mask chunk by chunk; a context manager that holds the output's lock.

    The work lies at `<path>.partial` and is renamed by `finish`. One thread writes.
    """

    def __init__(
        self,
        path: Path,
        attributes: dict[str, Any],
        raster: Raster,
        classes: ClassTable,
        *,
        overwrite: bool,
    ) -> None:
        """Use `SlideMask.create`."""
        self.raster = raster
        self.chunk_px = int(attributes["chunk_px"])
        self.has_probability = bool(attributes["has_probability"])
        self.num_labels = classes.num_labels
        self._path = path
        self._partial = outputs.partial_path(path)
        self._attributes = attributes
        self._classes = classes
        self._overwrite = overwrite
        self._lock = ExitStack()

    def __enter__(self) -> Self:
        """Take the lock and open or begin the unfinished mask."""
        self._lock.enter_context(outputs.output_lock(self._path))
        try:
            if self._overwrite or not (self._partial / "zarr.json").exists():
                outputs.remove_tree(self._partial)
                self._begin()
            else:
                self._check_resumable()
            self._group = zarr.open_group(self._partial, mode="r+")
            self._journal = Journal(self._partial)
        except BaseException:
            self._lock.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drop the lock; unfinished work stays for the next run to go on with."""
        self._lock.close()

    def _begin(self) -> None:
        new = outputs.partial_path(self._path.with_name(self._path.name + ".new"))
        outputs.remove_tree(new)
        num_levels = num_pyramid_levels(self.raster.width_px, self.raster.height_px)
        group = zarr.create_group(
            new,
            attributes={
                layout.ATTRIBUTES: self._attributes,
                "ome": _ngff(self.raster, self._classes, num_levels),
            },
        )
        for level in range(num_levels):
            self._create_array(group, str(level), level_shape(self.raster, level), fill=IGNORE)
        if self.has_probability:
            self._create_array(group, "probability", level_shape(self.raster, 0), fill=0)
        new.rename(self._partial)

    def _create_array(
        self, group: zarr.Group, name: str, shape: tuple[int, int], *, fill: int
    ) -> None:
        group.create_array(
            name,
            shape=shape,
            chunks=(self.chunk_px, self.chunk_px),
            dtype="uint8",
            compressors=layout.checked_zstd(),
            fill_value=fill,
            dimension_names=("y", "x"),
        )

    def _check_resumable(self) -> None:
        found = layout.read_attributes(self._partial, "mask")
        wanted = fingerprint_of(self._attributes["run"])
        check_same_run(fingerprint_of(found["run"]), wanted, output=self._partial)
        if found["raster"] != self._attributes["raster"]:
            msg = f"store '{self._partial}': lies on another pixel grid; start with --overwrite"
            raise StoreError(msg)
        self.chunk_px = int(found["chunk_px"])

    @property
    def chunk_grid(self) -> tuple[int, int]:
        """Number of chunks as (rows, columns)."""
        side = self.chunk_px
        return -(-self.raster.height_px // side), -(-self.raster.width_px // side)

    def chunk_box(self, row: int, column: int) -> Box:
        """Return the part of the raster that a chunk covers; smaller at the far edges."""
        side = self.chunk_px
        return Box(column * side, row * side, side, side).intersection(self.raster.box)

    def pending_chunks(self) -> list[tuple[int, int]]:
        """Return (row, column) of the chunks that are still to be written, in order."""
        rows, columns = self.chunk_grid
        return [
            (r, c)
            for r in range(rows)
            for c in range(columns)
            if not self._journal.is_done(f"{r}/{c}")
        ]

    def write_chunk(
        self, row: int, column: int, labels: UInt8, probability: UInt8 | None = None
    ) -> None:
        """Write one chunk; on return it is committed.

        Parameters
        ----------
        labels, probability
            uint8, the shape of `chunk_box`; probability exactly if the mask has it.
        """
        box = self.chunk_box(row, column)
        if (probability is not None) != self.has_probability:
            msg = f"chunk {row, column}: probability must be given exactly if the mask has it"
            raise ValueError(msg)
        files = []
        for name, values in (("0", labels), ("probability", probability)):
            if values is None:
                continue
            if values.shape != (box.height, box.width) or values.dtype != np.uint8:
                msg = f"chunk {row, column}: {name} is {values.dtype} {values.shape}, box {box}"
                raise ValueError(msg)
            layout.array(self._group, name)[box.y : box.bottom, box.x : box.right] = values
            files.append(self._partial / name / "c" / str(row) / str(column))
        self._journal.commit(f"{row}/{column}", files)

    def read(self, box: Box) -> UInt8:
        """Return labels written so far: uint8 (box.height, box.width), box inside the raster."""
        return np.asarray(layout.array(self._group, "0")[box.y : box.bottom, box.x : box.right])

    def finish(self) -> None:
        """Build the pyramid, seal the mask and give it its final name."""
        if pending := self.pending_chunks():
            msg = f"store '{self._path}': chunks {pending[:5]} are not written yet"
            raise StoreError(msg)
        for level in range(1, num_pyramid_levels(self.raster.width_px, self.raster.height_px)):
            self._build_level(level)
        self._journal.finalise()
        outputs.promote_folder(self._partial, self._path)

    def _build_level(self, level: int) -> None:
        above, target = (
            layout.array(self._group, str(level - 1)),
            layout.array(self._group, str(level)),
        )
        folder = self._partial / str(level - 1) / "c"
        side = self.chunk_px
        for row in range(-(-target.shape[0] // side)):
            for column in range(-(-target.shape[1] // side)):
                places = [(2 * row + i, 2 * column + j) for i in (0, 1) for j in (0, 1)]
                if not any((folder / str(r) / str(c)).exists() for r, c in places):
                    continue  # nothing but fill value, which stays unwritten
                y, x = row * side, column * side
                labels = np.asarray(above[2 * y : 2 * (y + side), 2 * x : 2 * (x + side)])
                half = halve(labels)
                target[y : y + half.shape[0], x : x + half.shape[1]] = half


def halve(labels: UInt8) -> UInt8:
    """Return labels at half size, uint8 (ceil(H/2), ceil(W/2)): the most frequent of each 2 x 2.

    Ties go to the first in reading order; odd edges count their last row or column twice.
    """
    height, width = labels.shape
    padded = np.pad(labels, ((0, height % 2), (0, width % 2)), mode="edge")
    a, b = padded[0::2, 0::2], padded[0::2, 1::2]
    c, d = padded[1::2, 0::2], padded[1::2, 1::2]
    is_a = (a == b) | (a == c) | (a == d) | ((b != c) & (b != d) & (c != d))
    is_b = (b == c) | (b == d)
    return np.where(is_a, a, np.where(is_b, b, c))


def _ngff(raster: Raster, classes: ClassTable, num_levels: int) -> dict[str, Any]:
    """Return the `ome` attributes: NGFF 0.5 multiscales and image-label."""
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [
                {
                    "type": "scale",
                    "scale": [raster.mpp_y * (1 << level), raster.mpp_x * (1 << level)],
                },
                {
                    # Pixel centres: the first pixel of a level covers several of level 0.
                    "type": "translation",
                    "translation": [
                        raster.mpp_y * ((1 << level) - 1) / 2,
                        raster.mpp_x * ((1 << level) - 1) / 2,
                    ],
                },
            ],
        }
        for level in range(num_levels)
    ]
    axes = [{"name": name, "type": "space", "unit": "micrometer"} for name in ("y", "x")]
    return {
        "version": NGFF_VERSION,
        "multiscales": [{"name": "labels", "axes": axes, "datasets": datasets}],
        "image-label": _image_label(classes),
    }


def _image_label(classes: ClassTable) -> Mapping[str, Any]:
    colors = [{"label-value": BACKGROUND, "rgba": [0, 0, 0, 0]}]
    properties: list[dict[str, Any]] = [{"label-value": BACKGROUND, "class": classes.names[0]}]
    for item in classes.classes:
        colors.append({"label-value": item.label, "rgba": [*item.color, 255]})
        properties.append({"label-value": item.label, "class": item.name})
    colors.append({"label-value": IGNORE, "rgba": [0, 0, 0, 0]})
    properties.append({"label-value": IGNORE, "class": "Not predicted"})
    return {"colors": colors, "properties": properties}
