"""A slide and a network to a slide mask."""

import contextlib
import dataclasses
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from wsiseg.geometry import Box
from wsiseg.grid import TileGrid
from wsiseg.inference.chunks import Chunk, ChunkAssembler
from wsiseg.inference.engine import Engine
from wsiseg.inference.meter import Use
from wsiseg.inference.window import Band, strip_chunks, window_rows
from wsiseg.progress import Progress
from wsiseg.slides.reader import Slide
from wsiseg.slides.tissue import TissueMask
from wsiseg.store.mask_writer import MaskWriter

Place = tuple[int, int]
"""(x, y) of a window in raster pixels."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Strip:
    """Columns of the slide that are predicted together."""

    box: Box
    windows: TileGrid
    pending: frozenset[Chunk]


def predict_slide(
    slide: Slide,
    engine: Engine,
    writer: MaskWriter,
    windows: TileGrid,
    *,
    tissue: TissueMask,
    progress: Progress,
) -> list[Use]:
    """Fill the chunks of `writer` that are still pending with the labels of the network.

    Parameters
    ----------
    windows
        What the network sees, on the writer's raster: only windows that hold tissue. Those that
        touch no pending chunk are not read.
    tissue
        Pixels outside it become 255 (not predicted), like those that no window covers: glass is
        seldom annotated, and a network that never saw it may call it anything.

    Returns
    -------
    list of Use
        What the engine spent, for each strip of the slide; most slides are one.

    Raises
    ------
    SlideReadError
        The slide cannot be read somewhere; what was finished before stays in `writer`.
    """
    strips = list(_strips(writer, windows))
    left = sum(len(strip.windows) for strip in strips)
    total = max(left, len(windows))
    progress.start(slide.meta.slide_id, total, unit="windows", done=total - left)
    uses = []
    for strip in strips:
        _predict_strip(slide, engine, writer, strip, tissue=tissue, progress=progress)
        uses.append(engine.use)
    progress.finish()
    return uses


def _predict_strip(
    slide: Slide,
    engine: Engine,
    writer: MaskWriter,
    strip: _Strip,
    *,
    tissue: TissueMask,
    progress: Progress,
) -> None:
    raster, size_px = strip.windows.raster, strip.windows.tile_size_px

    def read(place: Place) -> npt.NDArray[np.uint8]:
        return slide.read(raster, Box(*place, size_px, size_px))

    band = Band(
        strip.box, window_px=size_px, num_labels=writer.num_labels, block_px=writer.chunk_px
    )
    rows = window_rows(strip.windows)
    places = ((x, row.y) for row in rows for x in row.xs)
    with (
        ChunkAssembler(writer, tissue, strip.pending) as chunks,
        contextlib.closing(engine.run(places, read)) as results,
    ):
        for row in rows:  # no window from here on reaches above this one
            chunks.add_all(band.finish(row.y), row.y)
            for _ in row.xs:
                (x, y), probabilities = next(results)
                band.add(x, y, probabilities)
                progress.advance()
        chunks.add_all(band.finish(raster.height_px), raster.height_px)


def _strips(writer: MaskWriter, windows: TileGrid) -> Iterator[_Strip]:
    """Cut the slide into strips of chunk columns, each with the work that is left in it."""
    rows, columns = writer.chunk_grid
    is_pending = np.zeros((rows, columns), bool)
    for row, column in writer.pending_chunks():
        is_pending[row, column] = True
    firsts = strip_chunks(
        columns,
        chunk_px=writer.chunk_px,
        window_px=windows.tile_size_px,
        num_labels=writer.num_labels,
    )
    for first in firsts:
        part = is_pending.copy()
        part[:, :first] = part[:, first + firsts.step :] = False
        if not part.any():
            continue
        top = int(part.any(axis=1).argmax()) * writer.chunk_px
        left = first * writer.chunk_px
        right = min(left + firsts.step * writer.chunk_px, writer.raster.width_px)
        box = Box(left, top, right - left, writer.raster.height_px - top)
        pending = frozenset((int(r), int(c)) for r, c in np.argwhere(part))
        yield _Strip(box, windows.select(_touching(windows, part, writer.chunk_px)), pending)


def _touching(
    windows: TileGrid, is_wanted: npt.NDArray[np.bool_], chunk_px: int
) -> npt.NDArray[np.bool_]:
    """Return which windows (N,) share a pixel with a wanted chunk of the grid (rows, columns)."""
    rows, columns = is_wanted.shape
    counts = np.zeros((rows + 1, columns + 1), np.int64)
    counts[1:, 1:] = is_wanted.cumsum(axis=0).cumsum(axis=1)
    x0, y0 = windows.origins.T // chunk_px
    # A window larger than the raster reaches over the last chunk.
    x1, y1 = np.minimum(
        (windows.origins + windows.tile_size_px - 1) // chunk_px + 1, [columns, rows]
    ).T
    inside = counts[y1, x1] - counts[y0, x1] - counts[y1, x0] + counts[y0, x0]
    touching: npt.NDArray[np.bool_] = inside > 0
    return touching
