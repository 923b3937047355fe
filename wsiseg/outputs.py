"""Outputs that are absent or complete: atomic files and folders, and one writer per output.

The only place that renames, fsyncs or locks; every stage writes through it. The order is always:
temporary name in the same folder, write, flush, fsync, rename, fsync of the folder.
"""

import contextlib
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from wsiseg.errors import OutputLockedError

PARTIAL_SUFFIX = ".partial"
"""What unfinished work is called. Nothing with this suffix is ever read as a result."""


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_file(path: Path) -> None:
    """Force the content of a closed file to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_path(path: Path) -> Path:
    """Return the name that `path` has while it is being written, in the same folder."""
    return path.with_name(path.name + PARTIAL_SUFFIX)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; on success it becomes `path`, on any error it is removed.

    A partial file left by a killed process is overwritten by the next run.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_path(path)
    try:
        yield temporary
        fsync_file(temporary)
        temporary.replace(path)
        fsync_folder(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically and durably."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 text file atomically and durably."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: object) -> None:
    """Write JSON atomically: sorted keys, no NaN, so that equal runs give equal bytes."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def promote_folder(partial: Path, final: Path) -> None:
    """Rename a finished folder to its final name, replacing an older result there."""
    if final.exists():
        doomed = final.with_name(final.name + ".old" + PARTIAL_SUFFIX)
        remove_tree(doomed)
        final.rename(doomed)
        partial.rename(final)
        remove_tree(doomed)
    else:
        partial.rename(final)
    fsync_folder(final.parent)


def remove_tree(path: Path) -> None:
    """Delete a file or folder of ours if it exists; a symbolic link is removed, not followed."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextlib.contextmanager
def output_lock(path: Path) -> Iterator[None]:
    """Hold the sole right to write `path` (a file or folder, which need not exist yet).

    The kernel drops the lock when the holder dies, so a stale one is taken over by itself; the
    lock file names pid and host for the message only.

    Raises
    ------
    OutputLockedError
        Another live process holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock_path = path.with_name(path.name + ".lock")
    descriptor = _acquire(lock_path, path)
    try:
        yield
    finally:
        lock_path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(lock_path: Path, output: Path) -> int:
    while True:
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = (
                os.read(descriptor, 200).decode("utf-8", "replace").strip() or "another process"
            )
            os.close(descriptor)
            msg = f"output '{output}' is locked by {holder}; wait for it or choose another output"
            raise OutputLockedError(msg) from None
        # The previous holder may have removed the file between our open and our lock.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == lock_path.stat().st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        os.close(descriptor)
