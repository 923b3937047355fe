"""Slide to tile store: tissue mask, grid, tiles, labels."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wsiseg.classes import IGNORE, ClassTable
from wsiseg.config import digest, result_settings
from wsiseg.errors import AnnotationError, NoTissueError, SlideTooSmallError
from wsiseg.geometry import Box, Raster
from wsiseg.grid import TileGrid
from wsiseg.progress import Progress, SilentProgress
from wsiseg.runinfo import RunInfo, fingerprint_file
from wsiseg.settings.tile import TileConfig
from wsiseg.slides.cohort import CohortEntry
from wsiseg.slides.label_image import LabelImage
from wsiseg.slides.probe import probe_slide
from wsiseg.slides.reader import Slide, SlideMeta, open_slide
from wsiseg.slides.stain import make_normalizer
from wsiseg.slides.tissue import make_tissue_mask
from wsiseg.store.tiles import TileStore, TileWriter
from wsiseg.vector.labels import AnnotationLabels, check_annotations
from wsiseg.vector.outline import read_outline
from wsiseg.vector.qupath_read import Annotation, read_annotations, read_class_names

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


def derive_classes(annotations: list[Path]) -> ClassTable:
    """Return a class table of all class names found in annotation files, in alphabetical order.

    Used where the user names no table; the same files always give the same labels. A file that
    cannot be read has no say here: it is an error of its own slide, when that is tiled.
    """
    names: set[str] = set()
    failure: AnnotationError | None = None
    for path in annotations:
        try:
            names |= read_class_names(path)
        except AnnotationError as error:
            failure = failure or error
    kept = sorted(n for n in names if not n.startswith("Ignore"))
    if not kept:
        if failure is not None:
            raise failure
        msg = f"annotations {[p.name for p in annotations[:3]]}: no annotation has a class"
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
    slide_mpp = entry.mpp or config.slide_mpp
    # First of all: what is no file, or ends the process that reads it, must not be read here.
    probe_slide(entry.path, slide_id=entry.slide_id, slide_mpp=slide_mpp)
    info = _run_info(job)
    if not job.overwrite and TileStore.is_finished(job.output, info):
        return _summary(job, TileStore.open(job.output), began, note="already done")
    with open_slide(entry.path, slide_id=entry.slide_id, slide_mpp=slide_mpp) as slide:
        labeller = _labeller(job, slide.meta)
        grid = _tissue_grid(slide, config, labeller if config.labelled_only else None)
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
            codec=config.codec,
            group_id=entry.patient_id or entry.slide_id,
            split=entry.split,
            overwrite=job.overwrite,
        ) as writer:
            _write_tiles(
                slide, grid, labeller, normalize, writer, job, progress or SilentProgress()
            )
            writer.finish()
    return _summary(job, TileStore.open(job.output), began)


def _run_info(job: TileJob) -> RunInfo:
    inputs = {"slide": fingerprint_file(job.entry.path)}
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
        )
        return image.read
    assert job.annotation is not None
    annotations: list[Annotation] = read_annotations(job.annotation, bounds=meta.bounds)
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


@dataclass(frozen=True, slots=True)
class _Shard:
    index: int
    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8] | None


def _write_tiles(
    slide: Slide,
    grid: TileGrid,
    labeller: Labeller | None,
    normalize: ImageFilter | None,
    writer: TileWriter,
    job: TileJob,
    progress: Progress,
) -> None:
    pending = writer.pending_shards()
    num_pending = sum(len(writer.shard_tiles(i)) for i in pending)
    progress.start(job.entry.slide_id, len(grid), unit="tiles", done=len(grid) - num_pending)

    def read(index: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8] | None]:
        box = grid.box(index)
        image = slide.read(grid.raster, box)
        if normalize is not None:
            image = normalize(image)
        return image, None if labeller is None else labeller(grid.raster, box)

    with ThreadPoolExecutor(job.threads) as pool:
        try:
            for shard in _read_ahead(pool, read, pending, writer):
                writer.write_shard(shard.index, shard.images, shard.labels)
                progress.advance(len(shard.images))
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    progress.finish()


TileRead = tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8] | None]


def _read_ahead(
    pool: ThreadPoolExecutor,
    read: Callable[[int], TileRead],
    pending: list[int],
    writer: TileWriter,
) -> Iterator[_Shard]:
    """Yield shards in order; the next one is being read while the caller writes the last."""
    waiting: list[tuple[int, list[Future[TileRead]]]] = []
    for shard in [*pending, None]:
        if shard is not None:
            waiting.append((shard, [pool.submit(read, i) for i in writer.shard_tiles(shard)]))
        if len(waiting) == 2 or (shard is None and waiting):
            index, futures = waiting.pop(0)
            tiles = [f.result() for f in futures]
            labels = [t[1] for t in tiles if t[1] is not None]
            yield _Shard(
                index, np.stack([t[0] for t in tiles]), np.stack(labels) if labels else None
            )


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
