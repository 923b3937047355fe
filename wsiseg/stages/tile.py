"""Slide to tile store: tissue mask, grid, tiles, labels."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wsiseg.classes import IGNORE, ClassTable
from wsiseg.config import digest, result_settings
from wsiseg.errors import (
    AnnotationError,
    NoTissueError,
    SlideTooSmallError,
    SourceTilesError,
)
from wsiseg.geometry import Box, Raster
from wsiseg.grid import TileGrid
from wsiseg.outputs import check_not_read
from wsiseg.progress import Progress, SilentProgress
from wsiseg.runinfo import RunInfo, fingerprint_file
from wsiseg.settings.tile import TileConfig
from wsiseg.slides.cohort import CohortEntry
from wsiseg.slides.label_image import LabelImage
from wsiseg.slides.meta import SlideMeta
from wsiseg.slides.probe import fingerprint_slide, probe_slide
from wsiseg.slides.reader import Slide, open_slide
from wsiseg.slides.stain import make_normalizer
from wsiseg.slides.tissue import make_tissue_mask
from wsiseg.store.tile_writer import TileWriter
from wsiseg.store.tiles import TileStore
from wsiseg.vector.labels import AnnotationLabels, check_annotations
from wsiseg.vector.outline import read_outline
from wsiseg.vector.qupath_read import Annotation, read_annotations, read_class_names

TILES_PER_TASK = 8
"""Tiles that a thread makes at a time: enough that handing them out costs nothing."""

SHARDS_AHEAD = 2
"""Shards that are being made while one is written; they wait compressed."""

Labeller = Callable[[Raster, Box], npt.NDArray[np.uint8]]
"""Gives the labels uint8 (H, W) of a box on a raster."""

ImageFilter = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.uint8]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TileJob:
    """One slide to tile; sent to a worker as it is."""

    entry: CohortEntry
    config: TileConfig
    output: Path
    annotation: Path | None = None
    label_image: Path | None = None
    classes: ClassTable | None = None
    overwrite: bool = False
    threads: int = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSummary:
    """What came of one slide."""

    slide_id: str
    tiles: int
    labelled_tiles: int
    mpp: float
    megapixels: float
    seconds: float
    output: str
    note: str = ""


def derive_classes(annotations: Sequence[tuple[CohortEntry, Path]]) -> ClassTable:
    """Return a class table of all class names found in annotation files, in alphabetical order.

    Used where the user names no table; the same files always give the same labels. A file that
    cannot be read has no say here: it is an error of its own slide, when that is tiled.
    """
    names: set[str] = set()
    failure: AnnotationError | None = None
    for entry, path in annotations:
        try:
            names |= read_class_names(path, may_name=entry.may_name(path))
        except AnnotationError as error:
            failure = failure or AnnotationError(f"slide '{entry.slide_id}': {error}")
    kept = sorted(n for n in names if not n.startswith("Ignore"))
    if not kept:
        if failure is not None:
            raise failure
        slides = ", ".join(entry.slide_id for entry, _ in annotations[:3])
        msg = f"annotations of {slides}: no annotation has a class"
        raise AnnotationError(msg)
    return ClassTable.of_names(kept)


def run(job: TileJob, *, progress: Progress | None = None) -> TileSummary:
    """Tile one slide into `job.output`; a finished store of the same run is left as it is.

    Raises
    ------
    SlideError
        The slide cannot be opened or read, has no mpp or no tissue, is smaller than a tile, or
        its annotation does not fit.
    OutputExistsError
        `job.output` holds a store made from other inputs or settings.
    """
    began = time.perf_counter()
    entry, config = job.entry, job.config
    check_not_read(job.output, entry.path)
    slide_mpp = entry.mpp or config.slide_mpp
    # First of all: what is no file, or ends the process that reads it, must not be read here.
    probe_slide(entry.path, slide_id=entry.slide_id, slide_mpp=slide_mpp)
    info = _run_info(job)
    if not job.overwrite and TileStore.is_finished(job.output, info):
        return _summary(job, TileStore.open(job.output), began, note="already done")
    with open_slide(entry.path, slide_id=entry.slide_id, slide_mpp=slide_mpp) as slide:
        labeller = _labeller(job, slide.meta)
        grid = _tissue_grid(slide, config, labeller if config.labelled_only else None)
        codec = _settle_codec(slide, grid, config)
        normalize = _normalizer(config)
        with TileStore.create(
            job.output,
            raster=grid.raster,
            tile_size_px=grid.tile_size_px,
            origins=grid.origins,
            slide=slide.meta.to_dict(),
            run=info,
            has_labels=labeller is not None,
            classes=job.classes,
            codec=codec,
            group_id=entry.group_id,
            split=entry.split,
            overwrite=job.overwrite,
        ) as writer:
            maker = _Maker(
                slide, grid, labeller, normalize, writer,
                keeps_jpeg=codec == "source", checks_jpeg=config.codec == "auto",
            )  # fmt: skip
            note = _write_tiles(maker, job, progress or SilentProgress())
            writer.finish()
    return _summary(job, TileStore.open(job.output), began, note=note)


def _run_info(job: TileJob) -> RunInfo:
    inputs = {"slide": fingerprint_slide(job.entry.path, slide_id=job.entry.slide_id)}
    for name, path in (
        ("annotation", job.annotation),
        ("labels", job.label_image),
        ("tissue", job.config.tissue.annotation),
        ("stain_target", job.config.stain_target),
    ):
        if path is not None and path.exists():
            inputs[name] = fingerprint_file(path)
    settings = result_settings(job.config)
    # Paths name files whose content is in `inputs`; the name itself may hold a patient's.
    settings["stain_target"] = settings["tissue"]["annotation"] = None
    settings["slide_mpp"] = job.entry.mpp or job.config.slide_mpp
    if job.classes is not None:
        inputs["classes"] = digest(job.classes.to_dict())
    return RunInfo.of("tile", settings, inputs)


def _tissue_grid(slide: Slide, config: TileConfig, labeller: Labeller | None) -> TileGrid:
    raster = slide.meta.raster(config.mpp)
    size_px = config.tile_size
    if min(raster.width_px, raster.height_px) < size_px:
        msg = (
            f"slide '{slide.meta.slide_id}': {raster.width_px} x {raster.height_px} px at "
            f"{raster.mpp:.4g} um/px is smaller than one tile of {size_px} px; use a smaller "
            "--tile-size or --mpp"
        )
        raise SlideTooSmallError(msg)
    grid = TileGrid.covering(raster, tile_size_px=size_px, overlap_px=config.overlap)
    outline = read_outline(
        config.tissue.annotation, slide_id=slide.meta.slide_id, bounds=slide.meta.bounds
    )
    tissue = make_tissue_mask(slide, config.tissue, outline=outline)
    fractions = tissue.fractions(grid)
    keep = fractions >= max(config.min_tissue, np.finfo(float).tiny)
    if not keep.any():
        msg = (
            f"slide '{slide.meta.slide_id}': no tile has {config.min_tissue:.0%} tissue (most: "
            f"{fractions.max():.1%}); lower --min-tissue or choose another --tissue method"
        )
        raise NoTissueError(msg)
    if labeller is not None:
        keep &= [bool((labeller(raster, grid.box(i)) != IGNORE).any()) for i in range(len(grid))]
        if not keep.any():
            msg = f"slide '{slide.meta.slide_id}': no tissue tile holds a labelled pixel"
            raise AnnotationError(msg)
    return grid.select(keep)


def _labeller(job: TileJob, meta: SlideMeta) -> Labeller | None:
    if job.classes is None or (job.annotation is None and job.label_image is None):
        return None
    if job.label_image is not None:
        image = LabelImage.open(
            job.label_image,
            slide_id=meta.slide_id,
            width_px_l0=meta.width_px_l0,
            height_px_l0=meta.height_px_l0,
            classes=job.classes,
            may_name=job.entry.may_name(job.label_image),
        )
        return image.read
    assert job.annotation is not None
    annotations: list[Annotation] = read_annotations(
        job.annotation, bounds=meta.bounds, may_name=job.entry.may_name(job.annotation)
    )
    classes = job.classes
    check_annotations(
        annotations,
        classes,
        slide_id=meta.slide_id,
        width_px_l0=meta.width_px_l0,
        height_px_l0=meta.height_px_l0,
    )
    return AnnotationLabels(annotations, classes).read


def _normalizer(config: TileConfig) -> ImageFilter | None:
    if config.stain == "none":
        return None
    return make_normalizer(config.stain, config.stain_target)


def _settle_codec(slide: Slide, grid: TileGrid, config: TileConfig) -> str:
    """Return the codec of the store: "auto" keeps the slide's own tiles where they fit."""
    if config.codec == "source":
        _check_source_tiles(slide, grid)
    if config.codec != "auto":
        return config.codec
    size = grid.tile_size_px
    is_own = slide.jpeg_tile_px(grid.raster) == (size, size)
    return "source" if is_own and not config.overlap and config.stain == "none" else "delta"


def _check_source_tiles(slide: Slide, grid: TileGrid) -> None:
    """Raise SourceTilesError unless the tiles of a grid without overlap are the slide's own."""
    size = grid.tile_size_px
    found = slide.jpeg_tile_px(grid.raster)
    if found == (size, size):
        return
    meta = slide.meta
    offers = [
        (meta.level_raster(level), tile_px)
        for level in range(len(meta.level_sizes))
        if (tile_px := slide.jpeg_tile_px(meta.level_raster(level))) is not None
    ]
    if not offers:
        fits = "none of its levels has JPEG tiles that are read directly"
    else:
        fits = "its own tiles are " + " or ".join(
            f"{w} x {h} px at {raster.mpp:.4g} um/px" for raster, (w, h) in offers
        )
    if found is not None:
        wrong = f"--tile-size {size} is not the size of its JPEG tiles"
    elif meta.snapped_level(grid.raster) is not None:
        wrong = f"its level at {grid.raster.mpp:.4g} um/px has no JPEG tiles"
    else:
        wrong = f"--mpp {grid.raster.mpp:.4g} is not the resolution of one of its levels"
    msg = f"slide '{meta.slide_id}': --codec source: {wrong}; {fits}"
    raise SourceTilesError(msg)


@dataclass(frozen=True, slots=True)
class _Tile:
    chunk: bytes
    labels: npt.NDArray[np.uint8] | None
    is_kept: bool


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes one tile in any thread: reads, normalises, labels and encodes it."""

    slide: Slide
    grid: TileGrid
    labeller: Labeller | None
    normalize: ImageFilter | None
    writer: TileWriter
    keeps_jpeg: bool
    checks_jpeg: bool

    def make(self, indices: range) -> list[_Tile]:
        return [self._make(index) for index in indices]

    def _make(self, index: int) -> _Tile:
        raster, box = self.grid.raster, self.grid.box(index)
        labels = None if self.labeller is None else self.labeller(raster, box)
        if self.keeps_jpeg:
            jpeg = self.slide.jpeg_tile(raster, box, check=self.checks_jpeg)
            if jpeg is not None:
                return _Tile(self.writer.keep(jpeg), labels, is_kept=True)
        image = self.slide.read(raster, box)
        if self.normalize is not None:
            image = self.normalize(image)
        return _Tile(self.writer.encode(image), labels, is_kept=False)


def _write_tiles(maker: _Maker, job: TileJob, progress: Progress) -> str:
    """Write what is pending; return what is worth noting of it."""
    writer, num_tiles = maker.writer, len(maker.grid)
    pending = writer.pending_shards()
    num_pending = sum(len(writer.shard_tiles(i)) for i in pending)
    progress.start(job.entry.slide_id, num_tiles, unit="tiles", done=num_tiles - num_pending)
    num_encoded = 0
    with ThreadPoolExecutor(job.threads) as pool:
        try:
            for shard, tiles in _read_ahead(pool, maker, pending):
                labels = [t.labels for t in tiles if t.labels is not None]
                chunks = [t.chunk for t in tiles]
                writer.write_chunks(shard, chunks, np.stack(labels) if labels else None)
                num_encoded += sum(not t.is_kept for t in tiles)
                progress.advance(len(tiles))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    progress.finish()
    if maker.keeps_jpeg and num_encoded and not maker.checks_jpeg:
        return f"{num_encoded} tiles at the border are no whole tiles of the slide: WebP, lossless"
    return ""


def _read_ahead(
    pool: ThreadPoolExecutor, maker: _Maker, pending: list[int]
) -> Iterator[tuple[int, list[_Tile]]]:
    """Yield shards in order; the next ones are being made while the caller writes one."""
    waiting: deque[tuple[int, list[Future[list[_Tile]]]]] = deque()
    for shard in pending:
        tiles = maker.writer.shard_tiles(shard)
        starts = range(tiles.start, tiles.stop, TILES_PER_TASK)
        parts = [range(i, min(i + TILES_PER_TASK, tiles.stop)) for i in starts]
        waiting.append((shard, [pool.submit(maker.make, part) for part in parts]))
        if len(waiting) > SHARDS_AHEAD:
            yield _finished(waiting.popleft())
    while waiting:
        yield _finished(waiting.popleft())


def _finished(shard: tuple[int, list[Future[list[_Tile]]]]) -> tuple[int, list[_Tile]]:
    return shard[0], [tile for future in shard[1] for tile in future.result()]


def _summary(job: TileJob, store: TileStore, began: float, *, note: str = "") -> TileSummary:
    return TileSummary(
        slide_id=job.entry.slide_id,
        tiles=store.num_tiles,
        labelled_tiles=store.num_labelled_tiles,
        mpp=round(store.raster.mpp, 4),
        megapixels=round(store.num_tiles * store.tile_size_px**2 / 1e6, 2),
        seconds=round(time.perf_counter() - began, 2),
        output=str(job.output),
        note=note,
    )
