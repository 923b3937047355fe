"""What the probe of a slide costs: its time, and the peak memory of the child that reads.

Run as a script, with one JSON array of paths on stdin: a line of JSON for each on stdout.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cost:
    """How a probe ended: `answer` is "ok", or its error, or how its child died."""

    answer: str
    seconds: float
    max_rss_bytes: int
    """Libraries included, which have some 80 MB."""


def probe_costs(paths: Sequence[Path]) -> list[Cost]:
    """Probe slides one by one, each in forks of one process that has the libraries loaded."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps([str(p) for p in paths]),
        capture_output=True, text=True, check=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return [Cost(**json.loads(line)) for line in done.stdout.splitlines()]


def main() -> None:
    """Serve one array of paths."""
    from wsiseg.slides import probe, probe_server

    for path in json.loads(sys.stdin.read()):
        request = {
            "path": os.fsencode(path).hex(),
            "folder": os.fsencode(Path.cwd()).hex(),
            "slide_id": Path(path).stem,
            "slide_mpp": 0.5,
            "require_mpp": True,
            "timeout_s": probe.TIMEOUT_S,
            "memory_limit_bytes": probe.MEMORY_LIMIT_BYTES,
        }
        began = time.monotonic()
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:  # stands for the helper: what the kernel says of it covers its child
            os.write(writing, json.dumps(probe_server._try_in_child(request)).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as file:
            answer = json.loads(file.read())
        _, _, usage = os.wait4(pid, 0)
        cost = {
            "answer": answer.get("died") or answer.get("error") or "ok",
            "seconds": time.monotonic() - began,
            "max_rss_bytes": usage.ru_maxrss * 1024,
        }
        sys.stdout.write(json.dumps(cost) + "\n")


if __name__ == "__main__":
    main()
