"""TileWriter: writes a tile store shard by shard."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zarr

from wsiseg.classes import IGNORE
from wsiseg.errors import StoreError
from wsiseg.store import layout
from wsiseg.store.codecs import quiet_about_delta, tile_codec, with_checksum
from wsiseg.store.ledger import FileRecord
from wsiseg.store.shards import write_shard
from wsiseg.store.writer import StoreWriter

UInt8 = npt.NDArray[np.uint8]


class TileWriter(StoreWriter):
    """Writes a tile store shard by shard."""

    def __init__(
        self,
        path: Path,
        attributes: dict[str, Any],
        origins: npt.NDArray[np.int64],
        *,
        overwrite: bool,
    ) -> None:
        """Use `TileStore.create`."""
        if len(origins) == 0:
            msg = f"store '{path}': needs at least one tile"
            raise StoreError(msg)
        super().__init__(path, attributes, overwrite=overwrite)
        self._origins = origins
        self._codec = tile_codec(attributes["codec"])
        self._label_codec = tile_codec("zstd")
        self._shard_tiles = int(attributes["shard_tiles"])

    def _create_arrays(self, group: zarr.Group) -> None:
        num, size = len(self._origins), self._attributes["tile_size_px"]
        per_shard = self._shard_tiles
        shapes: dict[str, tuple[int, ...]] = {"images": (size, size, 3)}
        if self._attributes["has_labels"]:
            shapes["labels"] = (size, size)
        arguments = {"images": self._codec.arguments, "labels": self._label_codec.arguments}
        for name, inner in shapes.items():
            with quiet_about_delta():
                group.create_array(
                    name,
                    shape=(num, *inner),
                    chunks=(1, *inner),
                    shards=(per_shard, *inner),
                    dtype="uint8",
                    fill_value=0,
                    **arguments[name],
                )
        lists: dict[str, tuple[int, ...]] = {"origins": (2,), "labelled_px": ()}
        for name, inner in lists.items():
            group.create_array(
                name,
                shape=(num, *inner),
                chunks=(per_shard, *inner),
                dtype="int64",
                compressors=layout.checked_zstd(),
                fill_value=0,
                config={"write_empty_chunks": True},
            )
        layout.array(group, "origins")[:] = self._origins

    def _check_unfinished(self, attributes: dict[str, Any]) -> None:
        group = zarr.open_group(self._partial, mode="r")
        if not np.array_equal(layout.array(group, "origins")[:], self._origins):
            msg = (
                f"store '{self._partial}': its tiles lie elsewhere than those of this run (made "
                "by another version?); start again with --overwrite"
            )
            raise StoreError(msg)
        self._shard_tiles = int(attributes["shard_tiles"])

    def _open(self, group: zarr.Group) -> None:
        self._group = group

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

    def encode(self, image: UInt8) -> bytes:
        """Return the chunk of a tile uint8 (S, S, 3), for `write_chunks`; thread-safe."""
        size = self._attributes["tile_size_px"]
        if image.shape != (size, size, 3) or image.dtype != np.uint8:
            msg = f"a tile is {image.dtype} {image.shape}"
            raise ValueError(msg)
        return self._codec.encode(image)

    def keep(self, jpeg: bytes) -> bytes:
        """Return the chunk of a tile that is a JPEG already; only for the codec "source"."""
        if self._attributes["codec"] != "source":
            msg = f"codec {self._attributes['codec']} stores no JPEG as it is"
            raise ValueError(msg)
        return with_checksum(jpeg)

    def write_shard(self, shard: int, images: UInt8, labels: UInt8 | None) -> None:
        """Encode and write all tiles of a shard; on return it is committed.

        Parameters
        ----------
        images, labels
            uint8 (n, S, S, 3) and (n, S, S), n = `len(shard_tiles(shard))`; labels exactly if
            the store has them.
        """
        self.write_chunks(shard, [self.encode(image) for image in images], labels)

    def write_chunks(self, shard: int, chunks: Sequence[bytes], labels: UInt8 | None) -> None:
        """Write all tiles of a shard, which `encode` or `keep` made; on return it is committed."""
        tiles = self.shard_tiles(shard)
        size = self._attributes["tile_size_px"]
        if len(chunks) != len(tiles):
            msg = f"shard {shard}: {len(chunks)} images for {len(tiles)} tiles"
            raise ValueError(msg)
        if (labels is not None) != self._attributes["has_labels"]:
            msg = f"shard {shard}: labels must be given exactly if the store has them"
            raise ValueError(msg)
        path = layout.shard_path(self._partial / "images", shard, 4)
        files = {path: write_shard(path, chunks, self._shard_tiles)}
        labelled = np.zeros(len(tiles), np.int64)
        if labels is not None:
            if labels.shape != (len(tiles), size, size) or labels.dtype != np.uint8:
                msg = f"shard {shard}: labels are {labels.dtype} {labels.shape}"
                raise ValueError(msg)
            path = layout.shard_path(self._partial / "labels", shard, 3)
            coded = [self._label_codec.encode(label) for label in labels]
            files[path] = write_shard(path, coded, self._shard_tiles)
            labelled = (labels != IGNORE).sum(axis=(1, 2), dtype=np.int64)
        part = slice(tiles.start, tiles.stop)
        layout.array(self._group, "labelled_px")[part] = labelled
        path = self._partial / "labelled_px" / "c" / str(shard)
        if path.exists():  # not if all are 0
            files[path] = FileRecord.of(path)
        self._journal.commit({_unit(shard): files})

    def finish(self) -> None:
        """Seal the store and give it its final name."""
        self._check_all_done("shards", self.pending_shards())
        self._seal()


def _unit(shard: int) -> str:
    return f"shard-{shard}"
