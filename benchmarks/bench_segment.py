"""Segmenting a large synthetic slide: time and peak memory of the whole command.

    python benchmarks/bench_segment.py [--side 20000] [--runs 1] [--mpp 0.5]

The slide has 0.25 um/px and is half tissue; the network is tiny, trained for seconds.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from measure import cost, header, report


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=20_000, help="side of the slide in pixels")
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--mpp", type=float, default=0.5, help="resolution of the network, um/px")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slide = folder / "slide.tiff"
        scripts = Path(__file__).parent
        cost(
            sys.executable, str(scripts / "bench_scale.py"),
            "--write", str(slide), "--sides", str(options.side),
        )  # fmt: skip
        model = str(folder / "model")
        cost(sys.executable, str(scripts / "tiny_model.py"), model, str(options.mpp))
        header()
        command = (sys.executable, "-m", "wsiseg", "segment", str(slide))
        costs = [
            cost(*command, "--model", str(folder / "model"), "-o", str(folder / f"out-{i}"))
            for i in range(options.runs)
        ]
        seconds = report(f"wsiseg segment, {options.side} x {options.side} px", costs)
        exports = [
            cost(
                sys.executable, "-m", "wsiseg", "export", str(folder / "out-0/slide.mask.zarr"),
                "-o", str(folder / f"again-{i}.geojson"),
            )
            for i in range(options.runs)
        ]  # fmt: skip
        report("wsiseg export of its mask", exports)
        size = (folder / "out-0" / "slide.geojson").stat().st_size
    print(f"{options.side**2 / 1e6 / seconds:.2f} Mpx/s; GeoJSON of {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
