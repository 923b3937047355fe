"""TileStore: the tiles of one slide, with their labels, as a sharded zarr v3 group.

Layout: `images` uint8 (N, S, S, 3), `labels` uint8 (N, S, S) with 255 = ignore, `origins` int64
(N, 2) as (x, y) in raster pixels, `labelled_px` int64 (N,). One tile is one chunk; a shard holds
many and is written whole by one writer: tile by tile would cost nine times as much, and two
writers in one shard lose data. Anyone can read it with `zarr.open_group(path)`, for the codecs
"source" and "jpeg" with wsiseg installed. Here tiles are read past zarr, which costs more time on
each than the codec does.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from wsiseg.classes import IGNORE, ClassTable
from wsiseg.config import digest
from wsiseg.errors import ConfigError, StoreError
from wsiseg.geometry import Raster
from wsiseg.runinfo import RunInfo
from wsiseg.store import layout
from wsiseg.store.ledger import read_ledger
from wsiseg.store.tile_array import TileArray
from wsiseg.store.tile_writer import TileWriter

SHARD_BYTES = 16 << 20
"""Raw size of the images of a shard: large enough that files are few, small enough to lose little
work when killed."""

MAX_TILES_PER_SHARD = 64

SOURCE_TILES_PER_SHARD = 1024
"""The slide's own JPEGs are copied at thousands of tiles per second, some 12 kB each."""

UInt8 = npt.NDArray[np.uint8]


def tiles_per_shard(tile_size_px: int, codec: str) -> int:
    """Return how many tiles of a size make a shard."""
    if codec == "source":
        return SOURCE_TILES_PER_SHARD
    return max(1, min(MAX_TILES_PER_SHARD, SHARD_BYTES // (3 * tile_size_px**2)))


class TileStore:
    """A finished tile store, read only. Reads are thread-safe."""

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        """Use `TileStore.open`."""
        self.path = path
        with layout.parsing(path):
            self.raster = Raster(**attributes["raster"])
            self.tile_size_px = int(attributes["tile_size_px"])
            self.slide: dict[str, Any] = dict(attributes["slide"])
            self.slide_id = str(self.slide["slide_id"])
            self.group_id = str(attributes["group_id"])
            split = attributes["split"]
            self.split: str | None = None if split is None else str(split)
            self.run: dict[str, Any] = dict(attributes["run"])
            self.classes: ClassTable | None = layout.classes_from(attributes, path)
            self.has_labels = bool(attributes["has_labels"])
            self.codec = str(attributes.get("codec", "zstd"))
            self._images = TileArray(path / "images", self.codec)
            self._labels = TileArray(path / "labels", "zstd") if self.has_labels else None
            group = zarr.open_group(path, mode="r")
            with layout.reading(path, "the list of tiles"):
                self.origins: npt.NDArray[np.int64] = np.asarray(layout.array(group, "origins")[:])
                self.labelled_px: npt.NDArray[np.int64] = np.asarray(
                    layout.array(group, "labelled_px")[:]
                )
            self._check_shapes()

    def _check_shapes(self) -> None:
        size, num = self.tile_size_px, len(self.origins)
        wanted = {"images": (num, size, size, 3), "labels": (num, size, size)}
        for name, array in (("images", self._images), ("labels", self._labels)):
            if array is None:
                continue
            if array.shape != wanted[name] or array.data_type != "uint8":
                msg = (
                    f"store '{self.path}': {name} is {array.data_type} {array.shape}, expected "
                    f"uint8 {wanted[name]}"
                )
                raise StoreError(msg)

    @classmethod
    def open(cls, path: Path) -> "TileStore":
        """Open a finished store.

        Raises
        ------
        StoreError
            Not a tile store, unfinished, or of a newer format.
        StoreCorruptError
            A file is missing or truncated.
        """
        return cls(path, layout.open_finished(path, "tiles"))

    @staticmethod
    def is_finished(path: Path, run: RunInfo) -> bool:
        """Whether a finished store of `run` is at `path`; OutputExistsError if it is another's."""
        return layout.is_finished(path, "tiles", run)

    @staticmethod
    def create(  # noqa: PLR0913 - one argument per attribute of the store
        path: Path,
        *,
        raster: Raster,
        tile_size_px: int,
        origins: npt.NDArray[np.int64],
        slide: dict[str, Any],
        run: RunInfo,
        has_labels: bool,
        classes: ClassTable | None,
        group_id: str,
        split: str | None = None,
        codec: str = "delta",
        shard_tiles: int | None = None,
        overwrite: bool = False,
    ) -> "TileWriter":
        """Begin a store, or go on with an unfinished one of the same run.

        Parameters
        ----------
        origins
            int64 (N, 2), N >= 1, (x, y) of each tile's top left in raster pixels.
        slide
            `SlideMeta.to_dict()`.
        group_id
            The patient: tiles of one group never stand in two splits.
        codec
            One of `settings.tile.CODECS`, for the images; labels are always "zstd".
        shard_tiles
            Tiles per shard; default: `tiles_per_shard`.
        overwrite
            Drop unfinished work; a finished store stays until the new one replaces it.
        """
        attributes = {
            "format_version": layout.FORMAT_VERSIONS["tiles"],
            "kind": "tiles",
            "raster": layout.raster_to_dict(raster),
            "tile_size_px": tile_size_px,
            "slide": slide,
            "group_id": group_id,
            "split": split,
            "run": run.to_dict(),
            "classes": None if classes is None else classes.to_dict(),
            "has_labels": has_labels,
            "codec": codec,
            "shard_tiles": shard_tiles or tiles_per_shard(tile_size_px, codec),
        }
        return TileWriter(path, attributes, origins, overwrite=overwrite)

    @property
    def num_tiles(self) -> int:
        """Number of tiles N."""
        return len(self.origins)

    @property
    def num_labelled_tiles(self) -> int:
        """Tiles that hold at least one labelled pixel."""
        return int((self.labelled_px > 0).sum())

    def check_halvable(self, divisor: int) -> None:
        """Raise ConfigError unless tiles can be halved as often as a network of `divisor` does."""
        if self.tile_size_px % divisor:
            msg = (
                f"tiles of {self.tile_size_px} px do not fit this network, which needs a multiple "
                f"of {divisor} px; tile with another --tile-size"
            )
            raise ConfigError(msg)

    @property
    def content_digest(self) -> str:
        """sha256 of the checksums of all files: equal for equal content."""
        return digest({name: file.sha256 for name, file in read_ledger(self.path).items()})

    def read_images(self, indices: Sequence[int] | npt.NDArray[np.integer]) -> UInt8:
        """Return tiles as uint8 (n, S, S, 3) RGB, in the order of `indices`."""
        return self._read(self._images, indices)

    def read_labels(self, indices: Sequence[int] | npt.NDArray[np.integer]) -> UInt8:
        """Return labels as uint8 (n, S, S); 255 = ignore. All ignore if the store has none."""
        if self._labels is None:
            size = self.tile_size_px
            return np.full((len(indices), size, size), IGNORE, np.uint8)
        return self._read(self._labels, indices)

    def _read(self, array: TileArray, indices: Sequence[int] | npt.NDArray[np.integer]) -> UInt8:
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.num_tiles):
            msg = f"store '{self.path}': tile index outside 0..{self.num_tiles - 1}"
            raise IndexError(msg)
        first = int(wanted[0]) if wanted.size else 0
        with layout.reading(self.path, f"{array.name} of tile {first} and following"):
            return array.read(wanted.tolist())
