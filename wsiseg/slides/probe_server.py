"""The helper process of `wsiseg.slides.probe`: reads requests, forks a child to try each slide.

Its libraries are imported once, so that a probe costs a fork and not a start of Python. It ends
when its input does. Only the children touch slides.
"""

import contextlib
import dataclasses
import gc
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from wsiseg.errors import SlideError
from wsiseg.geometry import Box, Raster
from wsiseg.slides.reader import Slide, open_slide

PROBE_PX = 64

MAX_ANSWER_BYTES = 1 << 20
"""The metadata of a slide have a kilobyte."""


def main() -> None:
    """Answer the requests on stdin, a line of JSON each, with a line of JSON on stdout."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's; we end with it
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # only answers may go to stdout, whatever a library prints
    gc.collect()
    gc.freeze()  # a child then shares all this memory, as nothing in it is ever touched
    for line in _lines(sys.stdin.fileno()):
        answers.write(json.dumps(_try_in_child(json.loads(line))).encode() + b"\n")


def _lines(descriptor: int) -> Iterator[bytes]:
    """Yield lines as they come; a buffered reader's lock or rest would be copied into children."""
    unread = b""
    while data := os.read(descriptor, 1 << 16):
        *lines, unread = (unread + data).split(b"\n")
        yield from lines


def _try_in_child(request: dict[str, Any]) -> dict[str, Any]:
    """Return what the child answers, or how it died."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _run_child(request, writing)
    os.close(writing)
    try:
        data = _read_all(reading, time.monotonic() + request["timeout_s"])
    finally:
        os.close(reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
    if data is None:
        return {"died": f"gave no answer within {request['timeout_s']:.0f} s"}
    try:
        answer: dict[str, Any] = json.loads(data)
    except ValueError:
        code = os.waitstatus_to_exitcode(status)
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return {"died": how}
    return answer


def _read_all(descriptor: int, deadline: float) -> bytes | None:
    """Return all that comes, or None if there is no end of it in time."""
    data = b""
    while len(data) <= MAX_ANSWER_BYTES:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return None
        part = os.read(descriptor, 1 << 16)
        if not part:
            break
        data += part
    return data


def _run_child(request: dict[str, Any], answer_to: int) -> NoReturn:
    """Be the child: limit ourselves, try the slide, answer and end."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        # Should the helper be killed, nobody else would end a hanging child.
        signal.setitimer(signal.ITIMER_REAL, request["timeout_s"] + 1)
        limit = int(request["memory_limit_bytes"])
        with contextlib.suppress(ValueError, OSError):  # macOS has no address space limit
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with os.fdopen(answer_to, "wb") as file:
            file.write(json.dumps(_answer(request)).encode())
    finally:
        os._exit(0)  # a child must never return into the loop of the helper


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    slide_id = request["slide_id"]
    try:
        os.chdir(bytes.fromhex(request["folder"]))
        with open_slide(
            Path(os.fsdecode(bytes.fromhex(request["path"]))),
            slide_id=slide_id,
            slide_mpp=request["slide_mpp"],
            require_mpp=request["require_mpp"],
        ) as slide:
            try_reading(slide)
            return {"meta": dataclasses.asdict(slide.meta)}
    except SlideError as error:
        return {"error": str(error), "kind": type(error).__name__}
    except MemoryError:
        text = f"slide '{slide_id}': needs more memory than a probe may use"
        return {"error": text, "kind": "SlideOpenError"}
    except Exception as error:  # noqa: BLE001 - whatever a library makes of a damaged file
        text = f"slide '{slide_id}': cannot be read ({type(error).__name__}: {str(error)[:200]})"
        return {"error": f"{text}; is the file damaged?", "kind": "SlideOpenError"}


def try_reading(slide: Slide) -> None:
    """Read a corner, the middle and the coarsest level."""
    meta = slide.meta
    for level in (0, len(meta.level_sizes) - 1):
        width, height = meta.level_sizes[level]
        raster = Raster(width, height, 1.0, 1.0, *meta.level_downsamples[level])
        for x, y in ((0, 0), (width // 2, height // 2)):
            slide.read(raster, Box(x, y, PROBE_PX, PROBE_PX).intersection(raster.box))


if __name__ == "__main__":
    main()
