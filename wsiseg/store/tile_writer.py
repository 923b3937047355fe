"""TileWriter: writes a tile store shard by shard, goes on where it was interrupted."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import zarr

from wsiseg import outputs
from wsiseg.classes import IGNORE
from wsiseg.errors import StoreError
from wsiseg.runinfo import check_same_run, fingerprint_of
from wsiseg.store import layout
from wsiseg.store.codecs import quiet_about_delta, tile_codec, with_checksum
from wsiseg.store.ledger import Journal
from wsiseg.store.shards import write_shard

UInt8 = npt.NDArray[np.uint8]


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
        self._codec = tile_codec(attributes["codec"])
        self._label_codec = tile_codec("zstd")
        self._overwrite = overwrite
        self._shard_tiles = int(attributes["shard_tiles"])
        self._lock = ExitStack()

    def __enter__(self) -> Self:
        """Take the lock and open or begin the unfinished store."""
        with ExitStack() as lock:
            lock.enter_context(outputs.output_lock(self._path))
            if self._overwrite or not (self._partial / "zarr.json").exists():
                outputs.discard(self._partial)
                self._begin()
            else:
                self._check_resumable()
            self._group = zarr.open_group(self._partial, mode="r+")
            self._journal = Journal(self._partial)
            self._lock = lock.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drop the lock; unfinished work stays for the next run to go on with."""
        self._lock.__exit__(kind, error, trace)

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
        files = [layout.shard_path(self._partial / "images", shard, 4)]
        write_shard(files[0], chunks, self._shard_tiles)
        labelled = np.zeros(len(tiles), np.int64)
        if labels is not None:
            if labels.shape != (len(tiles), size, size) or labels.dtype != np.uint8:
                msg = f"shard {shard}: labels are {labels.dtype} {labels.shape}"
                raise ValueError(msg)
            files.append(layout.shard_path(self._partial / "labels", shard, 3))
            coded = [self._label_codec.encode(label) for label in labels]
            write_shard(files[1], coded, self._shard_tiles)
            labelled = (labels != IGNORE).sum(axis=(1, 2), dtype=np.int64)
        part = slice(tiles.start, tiles.stop)
        layout.array(self._group, "labelled_px")[part] = labelled
        files.append(self._partial / "labelled_px" / "c" / str(shard))
        self._journal.commit({_unit(shard): files})

    def finish(self) -> None:
        """Seal the store and give it its final name."""
        if pending := self.pending_shards():
            msg = f"store '{self._path}': shards {pending[:5]} are not written yet"
            raise StoreError(msg)
        self._journal.finalise()
        outputs.promote_folder(self._partial, self._path)


def _unit(shard: int) -> str:
    return f"shard-{shard}"
