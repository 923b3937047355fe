"""Shard files of zarr v3 (`sharding_indexed`), written whole and read chunk by chunk.

A shard is its chunks one after the other, then an index of (offset, length) for each place, then
the index's CRC-32C. Going through zarr-python instead costs a millisecond per chunk.
Specification: zarr-specs, v3, codecs/sharding-indexed, version 1.0.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wsiseg import outputs
from wsiseg.store.codecs import with_checksum, without_checksum
from wsiseg.store.ledger import FileRecord

_ABSENT = (1 << 64) - 1
_ENTRY_BYTES = 16
_CHECKSUM_BYTES = 4

MAX_OPEN_INDICES = 4096
"""Indices of shards kept: 4 MiB with 64 chunks each."""


def write_shard(path: Path, chunks: Sequence[bytes], chunks_per_shard: int) -> FileRecord:
    """Write a shard whose first places hold `chunks`; it is absent or complete.

    Returns what the file must be, computed from memory beside the writing.
    """
    index = np.full((chunks_per_shard, 2), _ABSENT, "<u8")
    lengths = np.fromiter((len(chunk) for chunk in chunks), np.uint64, len(chunks))
    index[: len(chunks), 0] = np.cumsum(lengths) - lengths
    index[: len(chunks), 1] = lengths
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = outputs.partial_path(path)
    parts = [*chunks, with_checksum(index.tobytes())]
    with ThreadPoolExecutor(1) as beside, partial.open("wb") as file:
        record = beside.submit(FileRecord.of_parts, parts)
        file.writelines(parts)
    partial.replace(path)
    return record.result()


class ShardReader:
    """Reads chunks out of the shards of one array. Thread-safe; holds no file open."""

    def __init__(self, chunks_per_shard: int) -> None:
        self._chunks_per_shard = chunks_per_shard
        self._indices: OrderedDict[Path, npt.NDArray[np.uint64]] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, place: int) -> bytes:
        """Return the chunk at a place of a shard.

        Raises
        ------
        OSError, ValueError
            The shard cannot be read, its index is damaged, or it holds no such chunk.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            offset, length = (int(x) for x in self._index(path, descriptor)[place])
            size = os.fstat(descriptor).st_size
            if offset == _ABSENT or offset + length > size:
                msg = f"{path.name} holds no chunk {place}"
                raise ValueError(msg)
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)

    def _index(self, path: Path, descriptor: int) -> npt.NDArray[np.uint64]:
        with self._lock:
            found = self._indices.get(path)
            if found is not None:
                return found
        length = self._chunks_per_shard * _ENTRY_BYTES + _CHECKSUM_BYTES
        start = os.fstat(descriptor).st_size - length
        if start < 0:
            msg = f"{path.name} is shorter than its index"
            raise ValueError(msg)
        raw = without_checksum(os.pread(descriptor, length, start))
        index = np.frombuffer(raw, "<u8").reshape(-1, 2)
        with self._lock:
            self._indices[path] = index
            while len(self._indices) > MAX_OPEN_INDICES:
                self._indices.popitem(last=False)
        return index
