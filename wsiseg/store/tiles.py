"""TileStore: the tiles of one slide, with their labels, as a sharded zarr v3 group.

Layout: `images` uint8 (N, S, S, 3), `labels` uint8 (N, S, S) with 255 = ignore, `origins` int64
(N, 2) as (x, y) in raster pixels, `labelled_px` int64 (N,). One tile is one chunk; a shard holds
many and is written whole by one writer: tile by tile would cost nine times as much, and two
writers in one shard lose data. Anyone can read it with `zarr.open_group(path)`.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import zarr

from wsiseg import outputs
from wsiseg.classes import IGNORE, ClassTable
from wsiseg.config import digest
from wsiseg.errors import StoreError
from wsiseg.geometry import Raster
from wsiseg.runinfo import RunInfo, check_same_run, fingerprint_of
from wsiseg.store import layout
from wsiseg.store.ledger import Journal, read_ledger

SHARD_BYTES = 16 << 20
"""Raw size of the images of a shard: large enough that files are few, small enough to hold in
memory a few times and to lose little work when killed."""

MAX_TILES_PER_SHARD = 64

UInt8 = npt.NDArray[np.uint8]


def tiles_per_shard(tile_size_px: int) -> int:
    """Return how many tiles of a size make a shard."""
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
            group = zarr.open_group(path, mode="r")
            self._images = layout.array(group, "images")
            self._labels = layout.array(group, "labels") if self.has_labels else None
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
            if array.shape != wanted[name] or array.dtype != np.dtype(np.uint8):
                msg = (
                    f"store '{self.path}': {name} is {array.dtype} {array.shape}, expected uint8 "
                    f"{wanted[name]}"
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
        codec: str = "zstd",
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
        shard_tiles
            Tiles per shard; default: `tiles_per_shard(tile_size_px)`.
        overwrite
            Drop unfinished work; a finished store stays until the new one replaces it.
        """
        attributes = {
            "format_version": layout.FORMAT_VERSION,
            "kind": "tiles",
            "raster": layout.raster_to_dict(raster),
            "tile_size_px": tile_size_px,
            "slide": slide,
            "group_id": group_id,
            "split": split,
            "run": run.to_dict(),
            "classes": None if classes is None else classes.to_dict(),
            "has_labels": has_labels,
            "shard_tiles": shard_tiles or tiles_per_shard(tile_size_px),
        }
        return TileWriter(path, attributes, origins, codec=codec, overwrite=overwrite)

    @property
    def num_tiles(self) -> int:
        """Number of tiles N."""
        return len(self.origins)

    @property
    def num_labelled_tiles(self) -> int:
        """Tiles that hold at least one labelled pixel."""
        return int((self.labelled_px > 0).sum())

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

    def _read(
        self,
        array: zarr.Array[Any],
        indices: Sequence[int] | npt.NDArray[np.integer],
    ) -> UInt8:
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < self.num_tiles):
            msg = f"store '{self.path}': tile index outside 0..{self.num_tiles - 1}"
            raise IndexError(msg)
        first = int(wanted[0]) if wanted.size else 0
        with layout.reading(self.path, f"{array.basename} of tile {first} and following"):
            if np.array_equal(wanted, np.arange(first, first + len(wanted))):
                return np.asarray(array[first : first + len(wanted)])
            return np.asarray(array.oindex[wanted])


class TileWriter:
    """Writes a tile store shard by shard; a context manager that holds the output's lock.

    The work lies at `<path>.partial` and is renamed by `finish`.
    """

    def __init__(
        self,
        path: Path,
        attributes: dict[str, Any],
        origins: npt.NDArray[np.int64],
        *,
        codec: str,
        overwrite: bool,
    ) -> None:
        """Use `TileStore.create`."""
        if len(origins) == 0:
            msg = f"store '{path}': needs at least one tile"
            raise StoreError(msg)
        self._path = path
        self._partial = outputs.partial_path(path)
        self._attributes = attributes
        self._origins = origins
        self._codec = codec
        self._overwrite = overwrite
        self._shard_tiles = int(attributes["shard_tiles"])
        self._lock = ExitStack()

    def __enter__(self) -> Self:
        """Take the lock and open or begin the unfinished store."""
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
        """Write the arrays' metadata; `zarr.json` of the group comes last, as the sign of it."""
        num, size = len(self._origins), self._attributes["tile_size_px"]
        per_shard = self._shard_tiles
        new = outputs.partial_path(self._path.with_name(self._path.name + ".new"))
        outputs.remove_tree(new)
        group = zarr.create_group(new, attributes={layout.ATTRIBUTES: self._attributes})
        shapes: dict[str, tuple[int, ...]] = {"images": (size, size, 3)}
        if self._attributes["has_labels"]:
            shapes["labels"] = (size, size)
        for name, inner in shapes.items():
            group.create_array(
                name,
                shape=(num, *inner),
                chunks=(1, *inner),
                shards=(per_shard, *inner),
                dtype="uint8",
                compressors=layout.codecs(self._codec),
                fill_value=0,
                config={"write_empty_chunks": True},
            )
        lists: dict[str, tuple[int, ...]] = {"origins": (2,), "labelled_px": ()}
        for name, inner in lists.items():
            group.create_array(
                name,
                shape=(num, *inner),
                chunks=(per_shard, *inner),
                dtype="int64",
                compressors=layout.codecs("zstd"),
                fill_value=0,
                config={"write_empty_chunks": True},
            )
        layout.array(group, "origins")[:] = self._origins
        new.rename(self._partial)

    def _check_resumable(self) -> None:
        found = layout.read_attributes(self._partial, "tiles")
        wanted = fingerprint_of(self._attributes["run"])
        check_same_run(fingerprint_of(found["run"]), wanted, output=self._partial)
        group = zarr.open_group(self._partial, mode="r")
        if not np.array_equal(layout.array(group, "origins")[:], self._origins):
            msg = (
                f"store '{self._partial}': its tiles lie elsewhere than those of this run (made "
                "by another version?); start again with --overwrite"
            )
            raise StoreError(msg)
        self._shard_tiles = int(found["shard_tiles"])

    @property
    def _num_shards(self) -> int:
        return -(-len(self._origins) // self._shard_tiles)

    def pending_shards(self) -> list[int]:
        """Return the shards that are still to be written, in order."""
        return [i for i in range(self._num_shards) if not self._journal.is_done(_unit(i))]

    def shard_tiles(self, shard: int) -> range:
        """Return the indices of the tiles of a shard."""
        first = shard * self._shard_tiles
        return range(first, min(first + self._shard_tiles, len(self._origins)))

    def write_shard(self, shard: int, images: UInt8, labels: UInt8 | None) -> None:
        """Write all tiles of a shard; on return it is committed.

        Parameters
        ----------
        images, labels
            uint8 (n, S, S, 3) and (n, S, S), n = `len(shard_tiles(shard))`; labels exactly if
            the store has them.
        """
        tiles = self.shard_tiles(shard)
        size = self._attributes["tile_size_px"]
        if images.shape != (len(tiles), size, size, 3) or images.dtype != np.uint8:
            msg = f"shard {shard}: images are {images.dtype} {images.shape}"
            raise ValueError(msg)
        if (labels is not None) != self._attributes["has_labels"]:
            msg = f"shard {shard}: labels must be given exactly if the store has them"
            raise ValueError(msg)
        part = slice(tiles.start, tiles.stop)
        layout.array(self._group, "images")[part] = images
        files = [self._partial / "images" / "c" / str(shard) / "0" / "0" / "0"]
        labelled = np.zeros(len(tiles), np.int64)
        if labels is not None:
            if labels.shape != images.shape[:3] or labels.dtype != np.uint8:
                msg = f"shard {shard}: labels are {labels.dtype} {labels.shape}"
                raise ValueError(msg)
            layout.array(self._group, "labels")[part] = labels
            files.append(self._partial / "labels" / "c" / str(shard) / "0" / "0")
            labelled = (labels != IGNORE).sum(axis=(1, 2), dtype=np.int64)
        layout.array(self._group, "labelled_px")[part] = labelled
        files.append(self._partial / "labelled_px" / "c" / str(shard))
        self._journal.commit(_unit(shard), files)

    def finish(self) -> None:
        """Seal the store and give it its final name."""
        if pending := self.pending_shards():
            msg = f"store '{self._path}': shards {pending[:5]} are not written yet"
            raise StoreError(msg)
        self._journal.finalise()
        outputs.promote_folder(self._partial, self._path)


def _unit(shard: int) -> str:
    return f"shard-{shard}"
