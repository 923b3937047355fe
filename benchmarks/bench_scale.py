"""Cost against the area of the slide: tile, segment and export of larger and larger slides.

    python benchmarks/bench_scale.py [--sides 12500 25000 50000 100000] [--mpp 2.0]

The slides are synthetic (0.25 um/px, half tissue, JPEG pyramid; `write_large_slide`). `tile` reads
the tissue of level 0 and stores it at 0.5 um/px. `segment` and `export` work at `--mpp`, with a
tiny network trained for seconds: the figures are those of everything around the network, and the
network's own share is printed. Each stage is a process of its own, `export` is timed again after
`segment`, which contains it. Everything is written to a temporary folder on disk.
"""

import argparse
import json
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from measure import cost

STAGES = ("generate", "tile", "segment", "export")


@dataclass(frozen=True, slots=True)
class Row:
    """What one stage cost on one slide."""

    side_px: int
    stage: str
    seconds: float
    cpu_s: float
    peak_mib: float
    output_mb: float


def size_mb(path: Path) -> float:
    """Return the size of a file or folder in megabytes."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files) / 1e6


def measure_slide(side_px: int, model: Path, folder: Path, slides: Path) -> list[Row]:
    """Run every stage on one slide and drop what they wrote."""
    slide = slides / f"s{side_px}.tiff"
    wsiseg = (sys.executable, "-m", "wsiseg")
    mask, geojson = folder / f"s{side_px}.mask.zarr", folder / f"s{side_px}.geojson"
    commands = {
        "generate": (sys.executable, __file__, "--write", str(slide), "--sides", str(side_px)),
        "tile": (*wsiseg, "tile", str(slide), "-o", str(folder / "tiles")),
        "segment": (*wsiseg, "segment", str(slide), "--model", str(model), "-o", str(folder)),
        "export": (*wsiseg, "export", str(mask), "-o", str(folder / "again.geojson"), "--json"),
    }
    outputs = {
        "generate": slide,
        "tile": folder / "tiles" / f"s{side_px}.zarr",
        "segment": mask,
        "export": geojson,
    }
    rows = []
    for stage in STAGES:
        if stage == "generate" and slide.exists():
            continue
        spent = cost(*commands[stage])
        output_mb = size_mb(outputs[stage])
        row = Row(side_px, stage, spent.seconds, spent.cpu_s, spent.peak_mib, output_mb)
        rows.append(row)
        print(
            f"{side_px:8d} {stage:10s} {row.seconds:9.1f} s {row.cpu_s:8.1f} CPU s "
            f"{row.peak_mib:7.0f} MiB "
            f"{row.output_mb:9.1f} MB",
            flush=True,
        )
        if stage == "tile":
            shutil.rmtree(folder / "tiles")
    summary = json.loads(spent.output)["results"][0]
    print(f"{'':8s} {summary['features']} features, {summary['vertices']} vertices", flush=True)
    for path in (geojson, folder / "again.geojson", geojson.with_suffix(".png")):
        path.unlink()
    shutil.rmtree(mask)
    return rows


def print_lines(rows: list[Row]) -> None:
    """Print the straight line of each stage's CPU time against area, and how well it fits."""
    print(
        f"\n{'stage':10s} {'fixed s':>9s} {'s per Gpx':>10s} {'R2':>8s}  CPU time / line per size"
    )
    for stage in STAGES[1:]:
        chosen = [row for row in rows if row.stage == stage]
        area = np.array([row.side_px**2 / 1e9 for row in chosen])
        seconds = np.array([row.cpu_s for row in chosen])
        # Relative errors are minimised: a straight line through the largest alone proves nothing.
        design = np.stack([np.ones_like(area), area], axis=1) / seconds[:, None]
        (fixed, slope), *_ = np.linalg.lstsq(design, np.ones_like(seconds), rcond=None)
        line = fixed + slope * area
        spread = ((seconds - seconds.mean()) ** 2).sum()
        r2 = 1 - ((seconds - line) ** 2).sum() / spread if len(chosen) > 2 else float("nan")
        ratios = "  ".join(f"{value:.2f}" for value in seconds / line)
        print(f"{stage:10s} {fixed:9.2f} {slope:10.2f} {r2:8.4f}  {ratios}")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sides", type=int, nargs="+", default=[12_500, 25_000, 50_000, 100_000])
    parser.add_argument("--mpp", type=float, default=2.0, help="resolution of the network, um/px")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--slides", type=Path, help="keep the slides here, and use those here")
    parser.add_argument("--model", type=Path, help="this segmenter instead of one trained here")
    parser.add_argument("--json", type=Path, help="write the rows here, too")
    options = parser.parse_args()
    if options.write is not None:  # in a child: what a parent holds counts as its children's peak
        from wsiseg.synthetic import write_large_slide

        write_large_slide(options.write, side_px=options.sides[0])
        return
    print(f"{platform.machine()}, {platform.python_version()}, network at {options.mpp} um/px")
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = options.model or folder / "model"
        if options.model is None:
            script = Path(__file__).with_name("tiny_model.py")
            cost(sys.executable, str(script), str(model), str(options.mpp))
        for side_px in options.sides:
            rows += measure_slide(side_px, model, folder, options.slides or folder)
            if options.slides is None:
                (folder / f"s{side_px}.tiff").unlink()
            if options.json is not None:
                text = json.dumps([[getattr(r, f) for f in Row.__slots__] for r in rows])
                options.json.write_text(text)
    if len(options.sides) > 1:
        print_lines(rows)


if __name__ == "__main__":
    main()
