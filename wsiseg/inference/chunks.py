"""From finished pieces of the band to chunks on disk, written by a thread of their own."""

import functools
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from wsiseg.classes import IGNORE
from wsiseg.geometry import Box
from wsiseg.inference.window import Piece
from wsiseg.slides.tissue import TissueMask
from wsiseg.store.mask_writer import MaskWriter

Chunk = tuple[int, int]
"""(row, column) of a chunk."""

WAITING_BYTES = 128 << 20
"""Finished chunks that may wait for the disk before blending waits for them."""


class ChunkAssembler:
    """Collects the pieces of pending chunks and writes each chunk when it is complete.

    A context manager: on leaving it everything handed in is on disk, or, after an error, what was
    not written yet is dropped. Only chunks that a piece touches take memory.
    """

    def __init__(self, writer: MaskWriter, tissue: TissueMask, pending: Collection[Chunk]) -> None:
        """Write to `writer` the chunks in `pending`; pixels outside `tissue` become 255."""
        self._writer = writer
        self._tissue = tissue
        self._pending = sorted(pending)[::-1]  # the next one is the last
        self._wanted = frozenset(pending)
        self._open: dict[Chunk, tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]] = {}
        self._disk = _Background(max(1, WAITING_BYTES // (2 * writer.chunk_px**2)))

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait for the disk."""
        self._disk.close(drop=error is not None)

    def add_all(self, pieces: Iterable[Piece], until: int) -> None:
        """Take pieces, and write the pending chunks that end above the line `until`."""
        for piece in pieces:
            self._add(piece)
        empty: list[Chunk] = []
        while self._pending and self._writer.chunk_box(*self._pending[-1]).bottom <= until:
            chunk = self._pending.pop()
            held = self._open.pop(chunk, None)
            if held is None:
                empty.append(chunk)
            else:
                self._disk.submit(functools.partial(self._write, chunk, *held))
        if empty:
            self._disk.submit(functools.partial(self._writer.skip_chunks, empty))

    def _add(self, piece: Piece) -> None:
        side = self._writer.chunk_px
        height, width = piece.labels.shape
        place = Box(piece.x, piece.y, width, height)
        for row in range(place.y // side, (place.bottom - 1) // side + 1):
            for column in range(place.x // side, (place.right - 1) // side + 1):
                if (row, column) not in self._wanted:
                    continue
                box = self._writer.chunk_box(row, column)
                labels, probability = self._held((row, column), box)
                part = place.intersection(box)
                target = np.s_[part.y - box.y : part.bottom - box.y,
                               part.x - box.x : part.right - box.x]  # fmt: skip
                source = np.s_[part.y - place.y : part.bottom - place.y,
                               part.x - place.x : part.right - place.x]  # fmt: skip
                labels[target] = piece.labels[source]
                probability[target] = piece.probability[source]

    def _held(self, chunk: Chunk, box: Box) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        if chunk not in self._open:
            shape = (box.height, box.width)
            self._open[chunk] = np.full(shape, IGNORE, np.uint8), np.zeros(shape, np.uint8)
        return self._open[chunk]

    def _write(
        self,
        chunk: Chunk,
        labels: npt.NDArray[np.uint8],
        probability: npt.NDArray[np.uint8],
    ) -> None:
        raster, box = self._writer.raster, self._writer.chunk_box(*chunk)
        if not self._tissue.covers(raster, box):
            is_glass = ~self._tissue.at(raster, box)
            labels[is_glass] = IGNORE
            probability[is_glass] = 0
        self._writer.write_chunk(
            *chunk, labels, probability if self._writer.has_probability else None
        )


class _Background:
    """One thread that does what it is given, in order; at most `limit` things wait for it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def submit(self, work: Callable[[], None]) -> None:
        """Hand over work; raises what earlier work raised."""
        while self._waiting and (self._waiting[0].done() or len(self._waiting) >= self._limit):
            self._waiting.popleft().result()
        self._waiting.append(self._pool.submit(work))

    def close(self, *, drop: bool) -> None:
        """End the thread after the work that waits, or without it if `drop`."""
        self._pool.shutdown(cancel_futures=drop)
        if not drop:
            for future in self._waiting:
                future.result()
