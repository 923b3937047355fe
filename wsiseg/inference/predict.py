"""A slide and a network to a slide mask."""

import contextlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from wsiseg.classes import IGNORE
from wsiseg.geometry import Box
from wsiseg.grid import TileGrid
from wsiseg.inference.engine import Engine
from wsiseg.inference.window import Band, Lines, window_rows
from wsiseg.progress import Progress
from wsiseg.slides.reader import Slide
from wsiseg.slides.tissue import TissueMask
from wsiseg.store.masks import MaskWriter

Place = tuple[int, int]
"""(x, y) of a window in raster pixels."""


def predict_slide(
    slide: Slide,
    engine: Engine,
    writer: MaskWriter,
    windows: TileGrid,
    *,
    tissue: TissueMask,
    progress: Progress,
) -> None:
    """Fill the chunks of `writer` that are still pending with the labels of the network.

    Parameters
    ----------
    windows
        What the network sees, on the writer's raster: only windows that hold tissue.
    tissue
        Pixels outside it become 255 (not predicted), like those that no window covers: glass is
        seldom annotated, and a network that never saw it may call it anything.

    Raises
    ------
    SlideReadError
        The slide cannot be read somewhere; what was finished before stays in `writer`.
    """
    pending = set(writer.pending_chunks())
    if not pending:
        return
    top = min(row for row, _ in pending) * writer.chunk_px
    size_px = windows.tile_size_px
    all_rows = window_rows(windows)
    rows = [row for row in all_rows if row.y + size_px > top]
    total = sum(len(row.xs) for row in all_rows)
    left = sum(len(row.xs) for row in rows)
    progress.start(slide.meta.slide_id, total, unit="windows", done=total - left)

    def read(place: Place) -> npt.NDArray[np.uint8]:
        return slide.read(windows.raster, Box(*place, size_px, size_px))

    band = Band(windows.raster, window_px=size_px, num_labels=writer.num_labels, top=top)
    chunks = ChunkLines(writer, tissue, top)
    places = ((x, row.y) for row in rows for x in row.xs)
    with contextlib.closing(engine.run(places, read)) as results:
        for row in rows:
            chunks.add_all(band.finish(row.y))  # no window from here on reaches above this one
            for _ in row.xs:
                (x, y), probabilities = next(results)
                band.add(x, y, probabilities)
                progress.advance()
    chunks.add_all(band.finish(windows.raster.height_px))
    progress.finish()


class ChunkLines:
    """Collects finished lines until a row of chunks is full, and writes its pending chunks."""

    def __init__(self, writer: MaskWriter, tissue: TissueMask, top: int) -> None:
        self._writer = writer
        self._tissue = tissue
        self._pending = set(writer.pending_chunks())
        self._row = top // writer.chunk_px
        self._filled = 0
        self._labels: npt.NDArray[np.uint8]
        self._probability: npt.NDArray[np.uint8]
        self._begin_row()

    def _begin_row(self) -> None:
        raster, side = self._writer.raster, self._writer.chunk_px
        self._height = min(side, raster.height_px - self._row * side)
        self._labels = np.empty((max(0, self._height), raster.width_px), np.uint8)
        self._probability = np.empty_like(self._labels)
        self._filled = 0

    def add_all(self, parts: Iterator[Lines]) -> None:
        """Take the next lines, which follow the last ones without a gap."""
        for lines in parts:
            taken = 0
            while taken < len(lines.labels):
                count = min(self._height - self._filled, len(lines.labels) - taken)
                target = slice(self._filled, self._filled + count)
                self._labels[target] = lines.labels[taken : taken + count]
                self._probability[target] = lines.probability[taken : taken + count]
                self._filled += count
                taken += count
                if self._filled == self._height:
                    self._write_row()
                    self._row += 1
                    self._begin_row()

    def _write_row(self) -> None:
        for column in range(self._writer.chunk_grid[1]):
            if (self._row, column) not in self._pending:
                continue
            box = self._writer.chunk_box(self._row, column)
            part = np.s_[:, box.x : box.right]
            is_tissue = self._tissue.at(self._writer.raster, box)
            labels = np.where(is_tissue, self._labels[part], IGNORE).astype(np.uint8)
            probability = self._probability[part] * is_tissue
            self._writer.write_chunk(
                self._row, column, labels, probability if self._writer.has_probability else None
            )
