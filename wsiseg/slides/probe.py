"""Open and try an untrusted slide in a child process: what crashes there does not crash us.

A slide is decoded by C libraries; a damaged or hostile one may hang, eat all memory or end the
process (0.7 % of damaged TIFFs abort inside OpenSlide). So one helper process is kept beside the
command (`wsiseg.slides.probe_server`), which forks a child for each slide. The helper ends with
this process, however that ends: its input closes.
"""

import atexit
import functools
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wsiseg.errors import MissingMppError, SlideError, SlideOpenError, SlideReadError
from wsiseg.geometry import Box
from wsiseg.runinfo import fingerprint_file

if TYPE_CHECKING:
    from wsiseg.slides.meta import SlideMeta

TIMEOUT_S = 60.0
MEMORY_LIMIT_BYTES = 4 << 30
"""Address space; holds tiatoolbox, or a plain image as large as `sources.MAX_IMAGE_PIXELS`."""

START_TIMEOUT_S = 60.0
"""Added to a slide's own time: the helper's imports on a busy machine, its network folder."""

_ERRORS: dict[str, type[SlideError]] = {
    cls.__name__: cls for cls in (SlideOpenError, SlideReadError, MissingMppError)
}


def start_probing() -> None:
    """Start the helper process, which then imports its libraries while the caller does the same."""
    _server_of(os.getpid()).start()


def probe_slide(
    path: Path,
    *,
    slide_id: str | None = None,
    slide_mpp: float | None = None,
    require_mpp: bool = True,
    timeout_s: float = TIMEOUT_S,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> "SlideMeta":
    """Return the metadata of a slide that was opened and read in a child process.

    Raises
    ------
    SlideOpenError, SlideReadError, MissingMppError
        As `open_slide` and `Slide.read`; also if the child died or hung.
    """
    from wsiseg.slides.reader import default_slide_id

    slide_id = slide_id or default_slide_id(path)
    request = {
        "path": os.fsencode(path).hex(),  # a name need not be text
        "folder": os.fsencode(Path.cwd()).hex(),
        "slide_id": slide_id,
        "slide_mpp": slide_mpp,
        "require_mpp": require_mpp,
        "timeout_s": timeout_s,
        "memory_limit_bytes": memory_limit_bytes,
    }
    answer = _server_of(os.getpid()).ask(request, timeout_s=timeout_s + START_TIMEOUT_S)
    if answer is None:
        answer = {"died": "was lost"}
    if "died" in answer:
        how = answer["died"]
        msg = f"slide '{slide_id}': the process that tried to read it {how}; is the file damaged?"
        raise SlideOpenError(msg)
    if "error" in answer:
        raise _ERRORS.get(answer["kind"], SlideOpenError)(answer["error"])
    return _parse_meta(answer["meta"])


def fingerprint_slide(path: Path, *, slide_id: str) -> str:
    """Return `fingerprint_file` of a slide that was probed; SlideOpenError if it cannot be read."""
    try:
        return fingerprint_file(path)
    except OSError as error:
        reason = "no such file any more" if isinstance(error, FileNotFoundError) else error.strerror
        msg = f"slide '{slide_id}': {reason}; was it moved while it was being read?"
        raise SlideOpenError(msg) from error


def _parse_meta(meta: dict[str, Any]) -> "SlideMeta":
    from wsiseg.slides.meta import SlideMeta

    for name in ("level_sizes", "level_downsamples"):
        meta[name] = tuple(tuple(pair) for pair in meta[name])
    meta["background"] = tuple(meta["background"])
    meta["bounds"] = None if meta["bounds"] is None else Box(**meta["bounds"])
    return SlideMeta(**meta)


@functools.cache
def _server_of(pid: int) -> "_Server":
    """Return the helper of a process; a fork of ours must not share the pipes of its parent."""
    return _Server()


class _Server:
    """The helper process, started when first needed and again should it die."""

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._unread = b""

    def start(self) -> "subprocess.Popen[bytes]":
        """Return the process, running; it may be importing still."""
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        # -P: the working folder often holds the slides, and a json.py there must not be imported.
        command = [sys.executable, "-P", "-m", "wsiseg.slides.probe_server"]
        # Each thread reserves address space, which is what is limited.
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        self._unread = b""
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # libraries write there what they find in a slide
            env=environment,
        )
        atexit.register(self._stop)
        return self._process

    def ask(self, request: dict[str, Any], *, timeout_s: float) -> dict[str, Any] | None:
        """Return the answer to a request, or None if the helper dies of it or gives none.

        Asked a second time, of a new helper, where it died: that may have been somebody's kill.
        """
        with self._lock:
            for _ in range(2):
                process = self.start()
                assert process.stdin is not None
                try:
                    process.stdin.write(json.dumps(request).encode() + b"\n")
                    process.stdin.flush()
                    line = self._read_line(process, time.monotonic() + timeout_s)
                except BrokenPipeError:
                    line = None
                except TimeoutError:
                    self._stop()
                    return None
                except BaseException:
                    self._stop()  # its answer, which would come, is not that of the next request
                    raise
                if line is not None:
                    answer: dict[str, Any] = json.loads(line)
                    return answer
                self._stop()
        return None

    def _read_line(self, process: "subprocess.Popen[bytes]", deadline: float) -> bytes | None:
        """Return the next line of the helper, or None if it ends; TimeoutError at the deadline."""
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        while b"\n" not in self._unread:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError
            data = os.read(descriptor, 1 << 16)
            if not data:
                return None
            self._unread += data
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None or self._pid != os.getpid():
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:
                    continue
        process.wait()
