"""Make the n-th change that a process makes under a folder fail, or kill the process there.

Counted are: opening to write, each write that reaches the operating system, fsync, truncate, rename
and replace, mkdir, unlink and rmdir. Some are seen through audit hooks, which the interpreter calls
before it calls the system; writes through a file class under Python's own buffers; the rest through
the functions of `os`. Nothing of wsiseg or zarr is changed.

A kill after a call leaves the disk as a kill before the next one does, so only "before" is needed;
a write has a kill in its middle as well.
"""

import builtins
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("ENOSPC", "EIO", "kill", "torn")
"""ENOSPC: from the n-th on, every call that takes space fails. EIO: the n-th fails. kill: SIGKILL
before the n-th. torn: half of the n-th is written, then SIGKILL; as kill if it is no write."""

_NEEDS_SPACE = {"open", "write", "mkdir", "fsync"}
_AUDITED = {
    "os.rename": "rename",
    "os.mkdir": "mkdir",
    "os.truncate": "truncate",
    "os.remove": "unlink",
    "os.rmdir": "rmdir",
}


@dataclass
class Faults:
    """Counts the calls under `root` of this process and makes the n-th (from 1) go wrong."""

    root: str
    kind: str | None = None
    n: int = 0
    log: list[str] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def hit(self, call: str, path: object, half: Callable[[], object] | None = None) -> None:
        """Count one call; called just before it is made."""
        name = _name(path)
        if not name.startswith(self.root):
            return
        with self.lock:
            self.log.append(f"{call} {name.removeprefix(self.root)}")
            number = len(self.log)
        if self.kind in ("kill", "torn") and number == self.n:
            if self.kind == "torn" and half is not None:
                half()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "EIO" and number == self.n:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.kind == "ENOSPC" and number >= self.n and call in _NEEDS_SPACE:
            if half is not None and number == self.n:
                half()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _name(path: object) -> str:
    if isinstance(path, int):
        try:
            return str(Path(f"/proc/self/fd/{path}").readlink())
        except OSError:
            return ""
    try:
        return os.path.abspath(os.fsdecode(path))  # type: ignore[arg-type] # noqa: PTH100
    except (TypeError, ValueError):
        return ""


def install(faults: Faults) -> None:
    """Watch this process from now on; there is no way back."""

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in _AUDITED:
            faults.hit(_AUDITED[event], args[0])
        elif event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
            faults.hit("open", args[0])

    sys.addaudithook(hook)
    for name in ("fsync", "ftruncate"):
        _watch(faults, name)
    _watch_writes(faults)


def _watch(faults: Faults, name: str) -> None:
    original = getattr(os, name)

    def watched(descriptor: int, *args: Any) -> Any:
        faults.hit(name, descriptor)
        return original(descriptor, *args)

    setattr(os, name, watched)


def _watch_writes(faults: Faults) -> None:
    original_write, original_open = os.write, io.open

    def write(descriptor: int, data: bytes) -> int:
        half = bytes(data)[: len(data) // 2]
        faults.hit("write", descriptor, lambda: original_write(descriptor, half))
        return original_write(descriptor, data)

    class WatchedFile(io.FileIO):
        def write(self, data: Any, /) -> int:
            half = bytes(data)[: len(data) // 2]
            faults.hit("write", self.fileno(), lambda: super(WatchedFile, self).write(half))
            return super().write(data)

    def watched_open(
        file: Any,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
        closefd: bool = True,
        opener: Any = None,
    ) -> Any:
        if not {*mode} & {*"wax+"} or not _name(file).startswith(faults.root):
            return original_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = WatchedFile(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline)

    os.write = write  # type: ignore[assignment]
    io.open = watched_open
    builtins.open = watched_open
