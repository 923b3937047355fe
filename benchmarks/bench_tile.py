"""Tiling a large slide: `wsiseg tile` against tiatoolbox's patch extraction and the raw codec.

    python benchmarks/bench_tile.py [--side 20000] [--runs 3] [--folder FOLDER]

All cut 256 px tiles of the tissue out of one synthetic JPEG slide (0.25 um/px, 4:2:0, quality 85,
levels at 1/4), in one run on the same cores, taking turns. Each is a process of its own that has
imported its libraries and opened nothing; the time is that from opening the slide to the end.

- wsiseg: the stage behind `wsiseg tile`, two threads: probe, tissue mask, reading, encoding, zarr
  store with checksums, renamed when complete.
- tiatoolbox: mask by its Otsu masker, SlidingWindowPatchExtractor; patches are counted and dropped,
  nothing is written. It reads in one thread, as it always does.
- raw limit: libjpeg-turbo (simplejpeg) decoding the very tiles of the store in two threads, from
  memory, dropped.
- source tiles: the slide's compressed tiles written into a store as `wsiseg tile --codec source`
  does, with all checksums and synced to disk, from memory.
- zarr: decoded tiles written through the zarr API with zstd, 64 to a shard, from memory; not
  synced.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from wsiseg.synthetic import SyntheticTissue, write_slide

COMMON = """
import sys, time
from pathlib import Path
slide, folder = Path(sys.argv[1]), Path(sys.argv[2])
"""

LOOP = """
for line in sys.stdin:
    seconds, megapixels = work(line.strip())
    print(seconds, megapixels, flush=True)
"""

OURS = """
from wsiseg import outputs
from wsiseg.settings.tile import TileConfig
from wsiseg.slides.cohort import CohortEntry
from wsiseg.stages.tile import TileJob, run
def work(what):
    mpp, codec = what.split()
    out = folder / f"{codec}-{mpp}.zarr"
    outputs.remove_tree(out)
    config = TileConfig(mpp=float(mpp), codec=codec)
    entry = CohortEntry(slide_id="slide", path=slide)
    began = time.perf_counter()
    summary = run(TileJob(entry=entry, config=config, output=out))
    return time.perf_counter() - began, summary.megapixels
"""

PEER = """
from tiatoolbox.tools.patchextraction import get_patch_extractor
from tiatoolbox.wsicore.wsireader import WSIReader
def work(mpp):
    began = time.perf_counter()
    reader = WSIReader.open(slide, mpp=(0.25, 0.25))  # it does not find this in the tags
    mask = reader.tissue_mask(method="otsu", resolution=8, units="mpp")
    patches = get_patch_extractor(
        "slidingwindow", input_img=reader, input_mask=mask, patch_size=(256, 256),
        stride=(256, 256), resolution=float(mpp), units="mpp", min_mask_ratio=0.1,
    )
    number = sum(1 for _ in patches)
    return time.perf_counter() - began, number * 0.065536
"""

RAW = """
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import simplejpeg
import zarr
from zarr.codecs import ZstdCodec
from wsiseg import outputs
from wsiseg.geometry import Box
from wsiseg.runinfo import RunInfo
from wsiseg.slides.reader import open_slide
from wsiseg.store.tiles import TileStore
store = TileStore.open(folder / "source-0.25.zarr")
with open_slide(slide) as opened:
    origins = store.origins[(store.origins % 256 == 0).all(axis=1)]  # not those at the border
    boxes = [Box(int(x), int(y), 256, 256) for x, y in origins]
    streams = [opened.jpeg_tile(store.raster, box) for box in boxes]
batch = np.stack([simplejpeg.decode_jpeg(s) for s in streams[:512]])
def decode(part):
    for stream in part:
        simplejpeg.decode_jpeg(stream)
def work(what):
    for name in ("keep", "zarr"):
        outputs.remove_tree(folder / f"{name}.zarr")
    began = time.perf_counter()
    if what == "keep":
        writer = TileStore.create(
            folder / "keep.zarr", raster=store.raster, tile_size_px=256, origins=origins,
            slide=store.slide, run=RunInfo(stage="bench", config={}), has_labels=False,
            classes=None, group_id="g", codec="source",
        )
        with writer:
            for shard in writer.pending_shards():
                kept = [writer.keep(streams[i]) for i in writer.shard_tiles(shard)]
                writer.write_chunks(shard, kept, None)
            writer.finish()
        return time.perf_counter() - began, len(streams) * 0.065536
    if what == "zarr":
        array = zarr.create_array(
            folder / "zarr.zarr", shape=batch.shape, chunks=(1, 256, 256, 3),
            shards=(64, 256, 256, 3), dtype="uint8",
            compressors=[ZstdCodec(level=1, checksum=True)],
        )
        for i in range(0, len(batch), 64):
            array[i : i + 64] = batch[i : i + 64]
        return time.perf_counter() - began, len(batch) * 0.065536
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(decode, (streams[0::2], streams[1::2])))
    return time.perf_counter() - began, len(streams) * 0.065536
"""

NATIVE, HALF = "0.25", "0.5"

ROWS = [
    ("raw limit: simplejpeg, 2 threads, decoded only", RAW, "decode"),
    ("zarr with zstd: written only", RAW, "zarr"),
    ("source tiles: written only, synced", RAW, "keep"),
    ("tiatoolbox, 0.25 um/px: patches dropped", PEER, NATIVE),
    ("wsiseg tile, 0.25 um/px (auto: own tiles, checked)", OURS, f"{NATIVE} auto"),
    ("wsiseg tile, 0.25 um/px, delta", OURS, f"{NATIVE} delta"),
    ("wsiseg tile, 0.25 um/px, source", OURS, f"{NATIVE} source"),
    ("tiatoolbox, 0.5 um/px: patches dropped", PEER, HALF),
    ("wsiseg tile, 0.5 um/px (auto: delta)", OURS, f"{HALF} auto"),
]


class Worker:
    """A process that does one kind of work, again and again."""

    def __init__(self, code: str, slide: Path, folder: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMON + code + LOOP, str(slide), str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def rate(self, what: str) -> float:
        """Return MP/s of the tiles made by one run."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline().split()
        if len(answer) != 2:
            sys.exit(f"the process for {what!r} ended with {self._process.wait()}")
        return float(answer[1]) / float(answer[0])

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(slide: Path, folder: Path, runs: int) -> dict[str, float]:
    """Print a line for each row; return the median rates."""
    workers = {OURS: Worker(OURS, slide, folder)}
    workers[OURS].rate(f"{NATIVE} source")  # the others need its tiles; compiles and warms, too
    workers[OURS].rate(f"{HALF} auto")
    workers |= {code: Worker(code, slide, folder) for code in (RAW, PEER)}
    workers[PEER].rate(HALF)
    workers[RAW].rate("decode")
    rates: dict[str, list[float]] = {name: [] for name, _, _ in ROWS}
    for _ in range(runs):
        for name, code, what in ROWS:
            rates[name].append(workers[code].rate(what))
            print(f"{name:50s} {rates[name][-1]:8.1f}", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.close()
    print(f"{'tiles, MP/s':50s} {'median':>8s} {'min':>8s} {'max':>8s}")
    for name, values in rates.items():
        print(f"{name:50s} {statistics.median(values):8.1f} {min(values):8.1f} {max(values):8.1f}")
    return {what: statistics.median(rates[name]) for name, _, what in ROWS}


def megabytes(folder: Path) -> float:
    """Return the size of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=20000, help="side of the slide in pixels")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "wsiseg-bench",
        help="where the slide is kept for the next run",
    )  # fmt: skip
    options = parser.parse_args()
    slide = options.folder / f"tile-{options.side}.tiff"
    if not slide.exists():
        tissue = SyntheticTissue(width_px=options.side, height_px=options.side, mpp=0.25)
        write_slide(slide, tissue, jpeg_quality=85)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        rates = measure(slide, Path(name), options.runs)
        sizes = {p.stem: megabytes(p) for p in Path(name).glob("*-*.zarr")}
    for codec in ("auto", "delta", "source"):
        ours = rates[f"{NATIVE} {codec}"]
        print(
            f"{codec:7s} {ours / rates[NATIVE]:6.1f} x tiatoolbox, {ours / rates['decode']:6.2f} "
            f"of the raw limit, {sizes[f'{codec}-{NATIVE}']:.0f} MB"
        )
    print(f"source tiles written: {rates['keep'] / rates['zarr']:.0f} x zarr with zstd")
    print(f"at 0.5 um/px: {rates[f'{HALF} auto'] / rates[HALF]:.1f} x tiatoolbox")


if __name__ == "__main__":
    main()
