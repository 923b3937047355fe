"""Open and try an untrusted slide in a child process: what crashes there does not crash us.

A slide is decoded by C libraries; a damaged or hostile one may hang, eat all memory or end the
process. `python -m wsiseg.slides.probe` is the child.
"""

import contextlib
import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from wsiseg.errors import MissingMppError, SlideError, SlideOpenError, SlideReadError
from wsiseg.geometry import Box, Raster
from wsiseg.slides.reader import Slide, SlideMeta, default_slide_id, open_slide

TIMEOUT_S = 60.0
MEMORY_LIMIT_BYTES = 4 << 30
"""Address space; holds tiatoolbox, or a plain image as large as `sources.MAX_IMAGE_PIXELS`."""

PROBE_PX = 64

_ERRORS: dict[str, type[SlideError]] = {
    cls.__name__: cls for cls in (SlideOpenError, SlideReadError, MissingMppError)
}


def probe_slide(
    path: Path,
    *,
    slide_id: str | None = None,
    slide_mpp: float | None = None,
    require_mpp: bool = True,
    timeout_s: float = TIMEOUT_S,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> SlideMeta:
    """Return the metadata of a slide that was opened and read in a child process.

    Raises
    ------
    SlideOpenError, SlideReadError, MissingMppError
        As `open_slide` and `Slide.read`; also if the child died or hung.
    """
    slide_id = slide_id or default_slide_id(path)
    request = {
        "path": str(path),
        "slide_id": slide_id,
        "slide_mpp": slide_mpp,
        "require_mpp": require_mpp,
        "memory_limit_bytes": memory_limit_bytes,
    }
    # -P: the working folder often holds the slides, and a json.py there must not be imported.
    command = [sys.executable, "-P", "-m", "wsiseg.slides.probe"]
    # Each thread reserves address space, which is what is limited.
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired as error:
        msg = f"slide '{slide_id}': gave no answer within {timeout_s:.0f} s; is the file damaged?"
        raise SlideOpenError(msg) from error
    return _parse_answer(done, slide_id)


def _parse_answer(done: "subprocess.CompletedProcess[str]", slide_id: str) -> SlideMeta:
    try:
        answer: dict[str, Any] = json.loads(done.stdout)
    except ValueError as error:
        code = done.returncode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        msg = f"slide '{slide_id}': the process that tried to read it {how}; is the file damaged?"
        raise SlideOpenError(msg) from error
    if "error" in answer:
        raise _ERRORS.get(answer["kind"], SlideOpenError)(answer["error"])
    meta = answer["meta"]
    for name in ("level_sizes", "level_downsamples"):
        meta[name] = tuple(tuple(pair) for pair in meta[name])
    meta["background"] = tuple(meta["background"])
    meta["bounds"] = None if meta["bounds"] is None else Box(**meta["bounds"])
    return SlideMeta(**meta)


def _try_reading(slide: Slide) -> None:
    """Read a corner, the middle and the coarsest level."""
    meta = slide.meta
    for level in (0, len(meta.level_sizes) - 1):
        width, height = meta.level_sizes[level]
        raster = Raster(width, height, 1.0, 1.0, *meta.level_downsamples[level])
        for x, y in ((0, 0), (width // 2, height // 2)):
            slide.read(raster, Box(x, y, PROBE_PX, PROBE_PX).intersection(raster.box))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    try:
        with open_slide(
            Path(request["path"]),
            slide_id=request["slide_id"],
            slide_mpp=request["slide_mpp"],
            require_mpp=request["require_mpp"],
        ) as slide:
            _try_reading(slide)
            return {"meta": dataclasses.asdict(slide.meta)}
    except SlideError as error:
        return {"error": str(error), "kind": type(error).__name__}
    except MemoryError:
        text = f"slide '{request['slide_id']}': needs more memory than a probe may use"
        return {"error": text, "kind": "SlideOpenError"}


def main() -> None:
    """Answer the one request on stdin, as JSON."""
    request = json.loads(sys.stdin.read())
    limit = int(request["memory_limit_bytes"])
    with contextlib.suppress(ValueError, OSError):  # macOS has no address space limit
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Only the answer may go to stdout, whatever a library prints.
    answer_file = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    json.dump(_answer(request), answer_file)
    answer_file.close()


if __name__ == "__main__":
    main()
