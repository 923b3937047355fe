"""Mask to polygons and to GeoJSON: ours, rasterio and tiatoolbox on the same mask in one run.

    python benchmarks/bench_export.py [--side 20000] [--runs 3] [--sides 20000 40000] [--quick]

Each contestant is a process of its own. Its time is taken inside, from the loaded mask to the
finished polygons or the closed file: imports are not counted (tiatoolbox's takes longer than all of
our export). What numba does in its first call is: it imports half of itself and of SciPy then, and
loads its cached machine code. A second call in the same process is told beside it. The memory is
the peak of the whole process, the mask (side squared bytes) included; what its imports alone need
is told beside it. Whether the result is right (areas, validity) is looked at after the clock has
stopped.

`--sides` adds the streamed path on squares of growing size, whose mask is never in memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from wsiseg.geometry import Box

ROWS = 512
CLASSES = ("Stroma", "Tumour", "Nucleus")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--side", type=int, default=20_000, help="of the mask compared on; 0: none")
    parser.add_argument("--runs", type=int, default=3, help="of ours and rasterio")
    parser.add_argument(
        "--peer-runs", type=int, default=1, help="of tiatoolbox, about a minute each"
    )
    parser.add_argument("--sides", type=int, nargs="*", default=[20_000, 40_000, 80_000])
    parser.add_argument("--quick", action="store_true", help="a 4000 px mask, one run, no scaling")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(*options.child)
        return
    if options.quick:
        options.side, options.runs, options.sides = 4000, 1, [2000, 4000]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.side:
            compare(folder, options.side, options.runs, options.peer_runs)
        scale(folder, options.sides)


def compare(folder: Path, side: int, runs: int, peer_runs: int) -> None:
    """Run every contestant on one mask."""
    mask = folder / "mask.npy"
    child("make", str(mask), str(side))
    print(f"mask of {side} x {side} px\n")
    print(f"{'':34s} {'min':>7s} {'median':>7s} {'max':>7s} s   peak   of it imports")
    results = {
        name: report(name, [child(name, str(mask), str(folder / name)) for _ in range(count)])
        for name, count in (
            ("ours-polygons", runs),
            ("rasterio-polygons", runs),
            ("ours-geojson", runs),
            ("tiatoolbox-geojson", peer_runs),
        )
        if count
    }
    ours, peer = results["ours-polygons"], results["rasterio-polygons"]
    print(
        f"\npolygons: {peer['seconds'] / ours['seconds']:.1f} x faster than rasterio + shapely, "
        f"a second call {peer['seconds'] / ours['again']:.1f} x"
    )
    if not peer_runs:
        return
    ours, peer = results["ours-geojson"], results["tiatoolbox-geojson"]
    print(
        f"GeoJSON: {peer['seconds'] / ours['seconds']:.1f} x faster than tiatoolbox "
        f"({peer['seconds'] / ours['again']:.1f} x in a second call), "
        f"{peer['peak_mib'] / ours['peak_mib']:.1f} x leaner, "
        f"{peer['megabytes'] / ours['megabytes']:.1f} x smaller"
    )
    above_imports = (peer["peak_mib"] - peer["import_mib"]) / (
        ours["peak_mib"] - ours["import_mib"]
    )
    print(f"         {above_imports:.1f} x leaner with the imports of both subtracted")


def scale(folder: Path, sides: list[int]) -> None:
    """Export squares of growing size, the mask made row by row while it is read."""
    if sides:
        print(f"\nstreamed {'':25s} {'time':>7s}    {'peak':>10s} {'GeoJSON':>12s}")
    for side in sides:
        result = child("stream-geojson", str(side), str(folder / "stream"))
        print(
            f"{side:6d} x {side:6d} px {result['features']:10,} objects {result['seconds']:7.1f} s "
            f"{result['peak_mib']:7.0f} MiB {result['megabytes']:9.1f} MB "
            f"(of the time, making the mask: {result['making']:.1f} s)",
            flush=True,
        )


def child(name: str, argument: str, output: str) -> dict[str, Any]:
    """Run one contestant as a process; return what it printed and its peak memory."""
    command = (sys.executable, __file__, "--child", name, argument, output)
    with tempfile.TemporaryFile("w+") as log:  # no pipe: tiatoolbox warns more than one holds
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        printed = process.stdout.read()
        log.seek(0)
        errors = log.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"{name} exited with {process.returncode}:\n{errors}")
    result: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return {**result, "peak_mib": usage.ru_maxrss / 1024}


def report(name: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """Print minimum, median and maximum time, highest peak, and whether the result is right."""
    times = [r["seconds"] for r in results]
    result = {**results[0], "seconds": statistics.median(times)}
    result["peak_mib"] = max(r["peak_mib"] for r in results)
    facts = ", ".join(f"{k} {v:,}" for k, v in results[0]["facts"].items())
    if "again" in result:
        result["again"] = statistics.median(r["again"] for r in results)
        facts = f"a second call {result['again']:.2f} s, {facts}"
    print(
        f"{name:34s} {min(times):7.2f} {result['seconds']:7.2f} {max(times):7.2f} s "
        f"{result['peak_mib']:6.0f} {result['import_mib']:7.0f} MiB  {facts}",
        flush=True,
    )
    return result


def run_child(name: str, argument: str, output: str) -> None:
    """Be one contestant."""
    if name == "make":
        make_mask(Path(argument), int(output))
        print("{}")
        return
    contestants: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
        "ours-polygons": ours_polygons,
        "rasterio-polygons": rasterio_polygons,
        "ours-geojson": ours_geojson,
        "tiatoolbox-geojson": tiatoolbox_geojson,
        "stream-geojson": stream_geojson,
    }
    print(json.dumps(contestants[name](Path(argument), Path(output))))


def make_mask(path: Path, side: int) -> None:
    """Write the mask."""
    from label_masks import LabelMask

    mask = LabelMask(side)
    out = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(side, side))
    for top in range(0, side, ROWS):
        rows = min(ROWS, side - top)
        out[top : top + rows] = mask.read(Box(0, top, side, rows))
    out.flush()


def peak_mib() -> float:
    """Return the peak memory of this process so far."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def polygon_facts(shapes: Any, mask: Any) -> dict[str, Any]:  # noqa: ANN401 - arrays
    """Say how many polygons there are, and how far they are from the mask."""
    import shapely

    pixels = sum(int(np.count_nonzero(mask[top : top + ROWS])) for top in range(0, len(mask), ROWS))
    return {
        "polygons": len(shapes),
        "vertices": int(shapely.get_num_coordinates(shapes).sum()),
        "invalid": int((~shapely.is_valid(shapes)).sum()),
        "pixels lost": pixels - float(shapely.area(shapes).sum()),
    }


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds that something takes, and what it returns."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def ours_polygons(path: Path, _: Path) -> dict[str, Any]:
    """Mask to shapely polygons."""
    from wsiseg.vector.batch import LargePolygon
    from wsiseg.vector.trace import source_of_array

    import_mib = peak_mib()
    mask = np.load(path)

    def trace() -> Any:  # noqa: ANN401 - an array
        traced = source_of_array(mask)(False)
        return np.concatenate(
            [(t.loaded() if isinstance(t, LargePolygon) else t).to_shapely() for t in traced]
        )

    seconds, shapes = timed(trace)
    facts = polygon_facts(shapes, mask)
    del shapes
    again, _ = timed(trace)
    return {"seconds": seconds, "again": again, "import_mib": import_mib, "facts": facts}


def rasterio_polygons(path: Path, _: Path) -> dict[str, Any]:
    """Mask to shapely polygons through GDAL."""
    import rasterio.features
    import shapely.geometry

    import_mib = peak_mib()
    mask = np.load(path)
    began = time.perf_counter()
    found = rasterio.features.shapes(mask, mask=mask > 0, connectivity=4)
    shapes = np.array([shapely.geometry.shape(geometry) for geometry, _ in found])
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "import_mib": import_mib, "facts": polygon_facts(shapes, mask)}


def write_ours(source: Callable[[bool], Any], side: int, output: Path) -> dict[str, Any]:
    """Write GeoJSON; return what was written."""
    from wsiseg.classes import ClassTable
    from wsiseg.geometry import Raster
    from wsiseg.settings.export import ExportConfig
    from wsiseg.vector.qupath import write_geojson

    result = write_geojson(
        output.with_suffix(".geojson"),
        source,
        raster=Raster(side, side, 0.25, 0.25, 1.0, 1.0),
        classes=ClassTable.of_names(list(CLASSES)),
        slide={"slide_id": "mask", "bounds": None},
        provenance={},
        config=ExportConfig(),
    )
    return {
        "features": result.features,
        "megabytes": result.size_bytes / 1e6,
        "facts": {"features": result.features, "vertices": result.vertices},
    }


def ours_geojson(path: Path, output: Path) -> dict[str, Any]:
    """Mask to file."""
    import wsiseg.vector.qupath  # noqa: F401 - not to be timed
    from wsiseg.vector.trace import source_of_array

    import_mib = peak_mib()
    mask = np.load(path)

    def write() -> dict[str, Any]:
        return write_ours(source_of_array(mask), len(mask), output)

    seconds, result = timed(write)
    again, _ = timed(write)
    return {**result, "seconds": seconds, "again": again, "import_mib": import_mib}


def tiatoolbox_geojson(path: Path, output: Path) -> dict[str, Any]:
    """Mask to file with tiatoolbox's export for QuPath."""
    from tiatoolbox.utils.misc import dict_to_store_semantic_segmentor

    import_mib = peak_mib()
    mask = np.load(path)
    began = time.perf_counter()
    written = dict_to_store_semantic_segmentor(
        {"predictions": mask},
        (1, 1),
        "qupath",
        dict(enumerate(("Background", *CLASSES))),
        output,
        ignore_index=0,
        verbose=False,
    )
    seconds = time.perf_counter() - began
    return {
        "seconds": seconds,
        "import_mib": import_mib,
        "megabytes": Path(written).stat().st_size / 1e6,
        "facts": {},
    }


def stream_geojson(side_text: Path, output: Path) -> dict[str, Any]:
    """Mask that is made while it is read, to file."""
    from label_masks import LabelMask

    from wsiseg.vector.batch import Traced
    from wsiseg.vector.trace import trace_batches

    side = int(str(side_text))
    mask = LabelMask(side)
    import_mib = peak_mib()
    making = 0.0

    def read(box: Box) -> Any:  # noqa: ANN401 - an array
        nonlocal making
        began = time.perf_counter()
        labels = mask.read(box)
        making += time.perf_counter() - began
        return labels

    def source(with_junctions: bool) -> Iterator[Traced]:
        return trace_batches(
            read, Box(0, 0, side, side), block_rows=ROWS, with_junctions=with_junctions
        )

    began = time.perf_counter()
    result = write_ours(source, side, output)
    seconds = time.perf_counter() - began
    return {**result, "seconds": seconds, "making": making, "import_mib": import_mib}


if __name__ == "__main__":
    main()
