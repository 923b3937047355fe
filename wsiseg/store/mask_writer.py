"""MaskWriter: fills a slide mask chunk by chunk and builds its pyramids."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from wsiseg.classes import IGNORE, ClassTable
from wsiseg.errors import StoreError
from wsiseg.geometry import Box, Raster
from wsiseg.store import layout, ngff
from wsiseg.store.ledger import FileRecord
from wsiseg.store.writer import StoreWriter

UInt8 = npt.NDArray[np.uint8]

PROBABILITY = "probability"
"""Name of the group that holds the probability's pyramid."""


class MaskWriter(StoreWriter):
    """Writes a slide mask chunk by chunk, from one thread."""

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
        ome = ngff.label_attributes(raster, classes)
        super().__init__(path, attributes, overwrite=overwrite, foreign={"ome": ome})
        self.raster = raster
        self.chunk_px = int(attributes["chunk_px"])
        self.has_probability = bool(attributes["has_probability"])
        self.num_labels = classes.num_labels
        self._num_levels = ngff.num_pyramid_levels(raster.width_px, raster.height_px)

    def _create_arrays(self, group: zarr.Group) -> None:
        self._create_levels(group, fill=IGNORE)
        if self.has_probability:
            ome = ngff.image_attributes(self.raster, PROBABILITY)
            self._create_levels(group.create_group(PROBABILITY, attributes={"ome": ome}), fill=0)

    def _create_levels(self, group: zarr.Group, *, fill: int) -> None:
        for level in range(self._num_levels):
            group.create_array(
                str(level),
                shape=ngff.level_shape(self.raster, level),
                chunks=(self.chunk_px, self.chunk_px),
                dtype="uint8",
                compressors=layout.checked_zstd(),
                fill_value=fill,
                dimension_names=("y", "x"),
            )

    def _check_unfinished(self, attributes: dict[str, Any]) -> None:
        if attributes["raster"] != self._attributes["raster"]:
            msg = f"store '{self._partial}': lies on another pixel grid; start with --overwrite"
            raise StoreError(msg)
        self.chunk_px = int(attributes["chunk_px"])

    def _open(self, group: zarr.Group) -> None:
        self._labels = self._levels(group, "")
        self._probability = self._levels(group, f"{PROBABILITY}/")

    def _levels(self, group: zarr.Group, prefix: str) -> list["zarr.Array[Any]"]:
        if prefix and not self.has_probability:
            return []
        return [layout.array(group, f"{prefix}{level}") for level in range(self._num_levels)]

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
        arrays = [self._labels[0], *self._probability[:1]]
        given = [labels] if probability is None else [labels, probability]
        for array, values in zip(arrays, given, strict=True):
            if values.shape != (box.height, box.width) or values.dtype != np.uint8:
                msg = f"chunk {row, column}: {array.name} must be uint8 and fill {box}"
                raise ValueError(msg)
            array[box.y : box.bottom, box.x : box.right] = values
            files.append(self._partial / array.path / "c" / str(row) / str(column))
        # A chunk of nothing but fill value has no file.
        records = {path: FileRecord.of(path) for path in files if path.exists()}
        self._journal.commit({f"{row}/{column}": records})

    def skip_chunks(self, chunks: Iterable[tuple[int, int]]) -> None:
        """Commit chunks (row, column) in which nothing was predicted; they are not stored."""
        self._journal.commit({f"{row}/{column}": {} for row, column in chunks})

    def read(self, box: Box) -> UInt8:
        """Return labels written so far: uint8 (box.height, box.width), box inside the raster."""
        return np.asarray(self._labels[0][box.y : box.bottom, box.x : box.right])

    def finish(self) -> None:
        """Build the pyramids, seal the mask and give it its final name."""
        self._check_all_done("chunks", self.pending_chunks())
        for level in range(1, 1 if self._journal.is_sealed else self._num_levels):
            self._build_level(self._labels, level, ngff.halve)
            if self._probability:
                self._build_level(self._probability, level, ngff.halve_mean)
        self._seal()

    def _build_level(
        self, levels: "list[zarr.Array[Any]]", level: int, halve: Callable[[UInt8], UInt8]
    ) -> None:
        above, target = levels[level - 1], levels[level]
        folder = self._partial / above.path / "c"
        side = self.chunk_px
        for row in range(-(-target.shape[0] // side)):
            for column in range(-(-target.shape[1] // side)):
                places = [(2 * row + i, 2 * column + j) for i in (0, 1) for j in (0, 1)]
                if not any((folder / str(r) / str(c)).exists() for r, c in places):
                    continue  # nothing but fill value, which stays unwritten
                y, x = row * side, column * side
                half = halve(np.asarray(above[2 * y : 2 * (y + side), 2 * x : 2 * (x + side)]))
                target[y : y + half.shape[0], x : x + half.shape[1]] = half
