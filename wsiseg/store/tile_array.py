"""TileArray: one array of a tile store, read chunk by chunk past zarr-python."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wsiseg.store import layout
from wsiseg.store.codecs import tile_codec
from wsiseg.store.shards import ShardReader

UInt8 = npt.NDArray[np.uint8]


class TileArray:
    """Tiles uint8 (N, S, S) or (N, S, S, 3) in shards. Reads are thread-safe."""

    def __init__(self, folder: Path, codec: str) -> None:
        """Parse `zarr.json`; OSError, KeyError, TypeError or ValueError if it is no such array."""
        metadata = json.loads((folder / "zarr.json").read_bytes())
        self.name = folder.name
        self.data_type = str(metadata["data_type"])
        self.shape = tuple(int(n) for n in metadata["shape"])
        self._folder = folder
        self._codec = tile_codec(codec)
        self._per_shard = int(metadata["chunk_grid"]["configuration"]["chunk_shape"][0])
        self._shards = ShardReader(self._per_shard)

    def read(self, indices: Sequence[int]) -> UInt8:
        """Return tiles in the order of `indices`, which must lie in the array.

        Raises OSError, ValueError or RuntimeError if a chunk is missing or damaged.
        """
        inner = self.shape[1:]
        out = np.empty((len(indices), *inner), np.uint8)
        for i, index in enumerate(indices):
            shard, place = divmod(index, self._per_shard)
            path = layout.shard_path(self._folder, shard, len(self.shape))
            out[i] = self._codec.decode(self._shards.read(path, place), inner)
        return out
