"""Which codec tiles should be stored in: size, speed and loss on real H&E, one thread.

    python benchmarks/bench_codec.py [--images ../shared/data/nuinsseg/images] [--runs 3]

Tiles are resampled by 0.75, as most tiles of a store are: off the grid of the slide's own JPEG
blocks, which would flatter a second JPEG. MP/s are megapixels of tiles per second of processor
time, which other work on the machine disturbs less than the clock.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numcodecs.blosc
import numpy as np
import numpy.typing as npt
import simplejpeg
from numcodecs import Blosc, Delta, Zstd
from PIL import Image

from wsiseg.geometry import Box
from wsiseg.slides.reader import open_slide
from wsiseg.store.codecs import tile_codec

UInt8 = npt.NDArray[np.uint8]

SLIDE = Path(__file__).resolve().parents[1] / "tests" / "data" / "cmu-1-small-region.svs"
TILE_PX = 256
MAX_TILES = 120

_ZSTD = Zstd(level=1, checksum=True)
_BLOSC = Blosc(cname="zstd", clevel=1, shuffle=Blosc.SHUFFLE, typesize=3)
_OURS = tile_codec("delta")
_DELTA = Delta(dtype="u1")


def _planar_delta(tile: UInt8) -> bytes:
    """Stock zarr: transpose to planes, numcodecs.delta, zstd."""
    return bytes(_ZSTD.encode(_DELTA.encode(np.ascontiguousarray(tile.transpose(2, 0, 1)))))


def _undo_planar_delta(data: bytes) -> UInt8:
    flat = _DELTA.decode(_ZSTD.decode(data))
    return np.ascontiguousarray(flat.reshape(3, TILE_PX, TILE_PX).transpose(1, 2, 0))


def _green_delta(tile: UInt8) -> bytes:
    """Our own filter: red and blue less green, each less its left neighbour, planes, zstd."""
    planes = np.ascontiguousarray(tile.transpose(2, 0, 1))
    planes[0] -= planes[1]
    planes[2] -= planes[1]
    planes[:, :, 1:] -= planes[:, :, :-1].copy()
    return bytes(_ZSTD.encode(planes))


def _undo_green_delta(data: bytes) -> UInt8:
    planes = np.frombuffer(_ZSTD.decode(data), np.uint8).reshape(3, TILE_PX, TILE_PX)
    planes = np.add.accumulate(planes, axis=2, dtype=np.uint8)
    planes[0] += planes[1]
    planes[2] += planes[1]
    return np.ascontiguousarray(planes.transpose(1, 2, 0))


def _raw(data: bytes) -> UInt8:
    return np.frombuffer(data, np.uint8).reshape(TILE_PX, TILE_PX, 3)


CODECS: dict[str, tuple[Callable[[UInt8], bytes], Callable[[bytes], UInt8]]] = {
    "zstd 1": (lambda t: bytes(_ZSTD.encode(t)), lambda d: _raw(_ZSTD.decode(d))),
    "blosc zstd 1, shuffle": (lambda t: bytes(_BLOSC.encode(t)), lambda d: _raw(_BLOSC.decode(d))),
    "planes, delta, zstd 1 (stock zarr)": (_planar_delta, _undo_planar_delta),
    "the same as wsiseg does it (delta)": (
        _OURS.encode,
        lambda d: _OURS.decode(d, (TILE_PX, TILE_PX, 3)),
    ),
    "less green, delta, zstd 1": (_green_delta, _undo_green_delta),
    "WebP lossless, method 0": (
        lambda t: imagecodecs.webp_encode(t, lossless=True, level=0, method=0),
        imagecodecs.webp_decode,
    ),
    "JPEG XL lossless, effort 1": (
        lambda t: imagecodecs.jpegxl_encode(t, lossless=True, effort=1, numthreads=1),
        lambda d: imagecodecs.jpegxl_decode(d, numthreads=1),
    ),
    "JPEG XL distance 1, effort 3": (
        lambda t: imagecodecs.jpegxl_encode(t, distance=1.0, effort=3, numthreads=1),
        lambda d: imagecodecs.jpegxl_decode(d, numthreads=1),
    ),
    "JPEG 95, 4:4:4": (
        lambda t: simplejpeg.encode_jpeg(t, quality=95, colorsubsampling="444"),
        simplejpeg.decode_jpeg,
    ),
    "JPEG 90, 4:2:0": (
        lambda t: simplejpeg.encode_jpeg(t, quality=90, colorsubsampling="420"),
        simplejpeg.decode_jpeg,
    ),
}


def slide_tiles() -> list[UInt8]:
    """Return tiles of the real slide at 0.75 of its resolution."""
    with open_slide(SLIDE) as slide:
        raster = slide.meta.raster(0.499 / 0.75)
        return [
            slide.read(raster, Box(x, y, TILE_PX, TILE_PX))
            for y in range(0, raster.height_px - TILE_PX + 1, TILE_PX)
            for x in range(0, raster.width_px - TILE_PX + 1, TILE_PX)
        ][:MAX_TILES]


def image_tiles(folder: Path) -> list[UInt8]:
    """Return one tile of each image, resampled by 0.75."""
    tiles = []
    for path in sorted(folder.glob("*"))[:MAX_TILES]:
        with Image.open(path) as image:
            small = image.convert("RGB").reduce(1).resize((384, 384), Image.Resampling.BOX)
        tiles.append(np.ascontiguousarray(np.asarray(small)[:TILE_PX, :TILE_PX]))
    return tiles


def _seconds(work: Callable[[], object], runs: int) -> float:
    times = []
    for _ in range(runs):
        began = time.thread_time()
        work()
        times.append(time.thread_time() - began)
    return statistics.median(times)


def measure(tiles: list[UInt8], runs: int) -> None:
    """Print one line per codec."""
    megapixels = len(tiles) * TILE_PX**2 / 1e6
    print(f"{'':36s} {'ratio':>7s} {'encode':>8s} {'decode':>8s} MP/s   loss")
    for name, (encode, decode) in CODECS.items():
        coded = [encode(t) for t in tiles]
        encode_s = _seconds(lambda encode=encode: [encode(t) for t in tiles], runs)
        decode_s = _seconds(lambda decode=decode, coded=coded: [decode(c) for c in coded], runs)
        ratio = 3e6 * megapixels / sum(map(len, coded))
        error = np.mean(
            [np.mean((decode(c).astype(int) - t) ** 2) for c, t in zip(coded, tiles, strict=True)]
        )
        loss = "none" if error == 0 else f"{10 * np.log10(255**2 / error):.1f} dB"
        rates = f"{megapixels / encode_s:8.1f} {megapixels / decode_s:8.1f}"
        print(f"{name:36s} {ratio:6.2f}x {rates}        {loss}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=Path, help="folder of RGB images of 512 x 512 px")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    numcodecs.blosc.use_threads = False
    print(f"{SLIDE.name}, 0.67 um/px")
    measure(slide_tiles(), options.runs)
    if options.images is not None:
        tiles = image_tiles(options.images)
        print(f"{options.images}: {len(tiles)} images")
        measure(tiles, options.runs)


if __name__ == "__main__":
    main()
