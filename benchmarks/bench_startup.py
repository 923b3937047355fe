"""How long `wsiseg --help` and `wsiseg tile` on the small real slide take from the shell.

    python benchmarks/bench_startup.py

The peer is the import that every tiatoolbox command pays before it does anything.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SLIDE = Path(__file__).resolve().parents[1] / "tests" / "data" / "cmu-1-small-region.svs"
RUNS = 5


def seconds(*command: str) -> float:
    """Return the wall time of one child process that must succeed."""
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def report(name: str, times: list[float]) -> float:
    """Print minimum, median and maximum; return the median."""
    median = statistics.median(times)
    print(f"{name:44s} {min(times):7.2f} {median:7.2f} {max(times):7.2f} s")
    return median


def main() -> None:
    """Measure and print."""
    wsiseg = (sys.executable, "-m", "wsiseg")
    print(f"{'':44s}     min  median     max")
    ours = report("wsiseg --help", [seconds(*wsiseg, "--help") for _ in range(RUNS)])
    with tempfile.TemporaryDirectory() as folder:
        times = [
            seconds(*wsiseg, "tile", str(SLIDE), "-o", str(Path(folder, str(i))))
            for i in range(RUNS)
        ]
    report("wsiseg tile cmu-1-small-region.svs", times)
    peer = report(
        "python -c 'import tiatoolbox.wsicore'",
        [seconds(sys.executable, "-c", "import tiatoolbox.wsicore.wsireader") for _ in range(2)],
    )
    print(f"import of the peer / wsiseg --help: {peer / ours:.0f} x")


if __name__ == "__main__":
    main()
