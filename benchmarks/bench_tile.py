"""Tiling a large slide: `wsiseg tile` against tiatoolbox's patch extraction, in one run.

    python benchmarks/bench_tile.py [--side 16384] [--runs 3]

Both cut 256 px tiles of the tissue at 0.5 um/px out of the same synthetic pyramidal JPEG TIFF, and
each is timed as a process of its own. Ours also compresses and stores every tile; the peer's are
dropped, so the comparison is in its favour, save for its import, which is subtracted in the last
line.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from measure import cost, header, report

from wsiseg.synthetic import SyntheticTissue, write_slide

PEER = """
import sys
from tiatoolbox.tools.patchextraction import get_patch_extractor
from tiatoolbox.wsicore.wsireader import WSIReader
reader = WSIReader.open(sys.argv[1])
mask = reader.tissue_mask(method="otsu", resolution=8, units="mpp")
patches = get_patch_extractor(
    "slidingwindow", input_img=reader, input_mask=mask, patch_size=(256, 256),
    stride=(256, 256), resolution=0.5, units="mpp", min_mask_ratio=0.1,
)
print(sum(1 for _ in patches))
"""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=16384, help="side of the slide in pixels")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    header()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slide = folder / "slide.tiff"
        write_slide(slide, SyntheticTissue(width_px=options.side, height_px=options.side))
        imports, peers, ours = [], [], []
        for i in range(options.runs):  # alternating, so that a noisy minute hits both
            imports.append(cost(sys.executable, "-c", "import tiatoolbox.tools.patchextraction"))
            peers.append(cost(sys.executable, "-c", PEER, str(slide)))
            out = str(folder / f"out-{i}")
            ours.append(cost(sys.executable, "-m", "wsiseg", "tile", str(slide), "-o", out))
    import_s = report("import tiatoolbox.tools.patchextraction", imports)
    peer_s = report("tiatoolbox: mask and 256 px patches, dropped", peers)
    ours_s = report("wsiseg tile: mask, tiles, zarr store", ours)
    print(f"peer / ours, as processes: {peer_s / ours_s:.2f} x")
    print(f"peer without its import / ours: {(peer_s - import_s) / ours_s:.2f} x")


if __name__ == "__main__":
    main()
