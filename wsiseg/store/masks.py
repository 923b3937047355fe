"""SlideMask: the labels of a whole slide, chunk by chunk, as an OME-Zarr (NGFF 0.5) label pyramid.

Layout: `0`, `1`, ... uint8 (H, W) labels, each level half the one before; 255 = not predicted.
`probability` is an NGFF image of its own with the same levels: uint8 (H, W), round(255 * p) of the
predicted class, where 0 also stands for not predicted. A chunk that holds only the fill value is
not stored. Format version 1 had `probability` as a single array.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from wsiseg.classes import IGNORE, ClassTable
from wsiseg.errors import StoreError
from wsiseg.geometry import Box, Raster
from wsiseg.runinfo import RunInfo
from wsiseg.store import layout
from wsiseg.store.mask_writer import PROBABILITY, MaskWriter
from wsiseg.store.ngff import num_pyramid_levels

UInt8 = npt.NDArray[np.uint8]

CHUNK_PX = 1024
"""Side of a chunk: one mebibyte of labels, which compress to kilobytes."""


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
            self._probability = self._open_probability(group)

    def _open_probability(self, group: zarr.Group) -> list["zarr.Array[Any]"] | None:
        if not self.has_probability:
            return None
        found = group[PROBABILITY]
        if isinstance(found, zarr.Array):  # format version 1
            return [found]
        return [layout.array(found, str(i)) for i in range(self.num_levels)]

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
    ) -> MaskWriter:
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
            "format_version": layout.FORMAT_VERSIONS["mask"],
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
        return None if self._probability is None else self._read(self._probability[0], box, 0)

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
