"""Small stores with random content, really written to disk; shared by the tests."""

import numpy as np

from wsiseg.classes import ClassTable
from wsiseg.geometry import Raster
from wsiseg.runinfo import RunInfo
from wsiseg.store.masks import SlideMask
from wsiseg.store.tiles import TileStore

CLASSES = ClassTable.of_names(["Tumor", "Stroma"])


def run_info(**config):
    return RunInfo(stage="test", config=config, inputs={"slide": "00"})


def raster(width=200, height=130):
    return Raster(width, height, 0.5, 0.5, 2.0, 2.0)


def slide_dict():
    return {"slide_id": "s1", "width_px_l0": 400, "height_px_l0": 260, "bounds": None}


def tile_data(num, size, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num, size, size, 3), dtype=np.uint8)
    labels = rng.choice(np.array([0, 1, 2, 255], np.uint8), (num, size, size))
    return images, labels


def begin_tiles(
    path, *, num=10, size=16, shard_tiles=4, has_labels=True, overwrite=False, **config
):
    return TileStore.create(
        path,
        raster=raster(),
        tile_size_px=size,
        origins=np.stack([np.arange(num) * 3, np.arange(num)], axis=1),
        slide=slide_dict(),
        run=run_info(**config),
        has_labels=has_labels,
        classes=CLASSES if has_labels else None,
        group_id="p1",
        split="train",
        shard_tiles=shard_tiles,
        overwrite=overwrite,
        codec=config.get("codec", "delta"),
    )


def write_tiles(path, **options):
    with begin_tiles(path, **options) as writer:
        num, size = options.get("num", 10), options.get("size", 16)
        images, labels = tile_data(num, size)
        for shard in writer.pending_shards():
            part = writer.shard_tiles(shard)
            part = slice(part.start, part.stop)
            writer.write_shard(
                shard, images[part], labels[part] if options.get("has_labels", True) else None
            )
        writer.finish()
    return path


def begin_mask(
    path, *, width=200, height=130, chunk_px=64, probability=True, overwrite=False, **config
):
    return SlideMask.create(
        path,
        raster=raster(width, height),
        slide=slide_dict(),
        classes=CLASSES,
        run=run_info(**config),
        model_digest="ab",
        with_probability=probability,
        chunk_px=chunk_px,
        overwrite=overwrite,
    )


def mask_data(width=200, height=130, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.array([0, 1, 2, 255], np.uint8), (height, width))
    return labels, rng.integers(0, 256, (height, width), dtype=np.uint8)


def write_mask(path, **options):
    with begin_mask(path, **options) as writer:
        labels, probability = mask_data(options.get("width", 200), options.get("height", 130))
        for row, column in writer.pending_chunks():
            write_one(writer, row, column, labels, probability)
        writer.finish()
    return path


def write_one(writer, row, column, labels, probability):
    box = writer.chunk_box(row, column)
    part = (slice(box.y, box.bottom), slice(box.x, box.right))
    kept = probability[part] if writer.has_probability else None
    writer.write_chunk(row, column, labels[part], kept)
