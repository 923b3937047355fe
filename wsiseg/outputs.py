"""Outputs that are absent or complete: atomic files and folders, and one writer per output.

The only place that renames, fsyncs or locks; every stage writes through it. The order is always:
temporary name in the same folder, write, flush, fsync, rename, fsync of the folder.
"""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from wsiseg.errors import OutputExistsError, OutputLockedError, OutputWriteError, WsisegError

PARTIAL_SUFFIX = ".partial"
"""What unfinished work is called. Nothing with this suffix is ever read as a result."""

_NAMED_WITHIN_S = 1.0
"""A process that has a lock writes its name into it next, which may be a moment later."""

_NO_SPACE = "free some space, then run the same command again to go on"
_NOT_ALLOWED = "choose another output or allow writing there"
_NO_FOLDER = "a file stands where a folder should be; choose another output"
_REMEDIES = {
    errno.ENOSPC: _NO_SPACE,
    errno.EDQUOT: _NO_SPACE,
    errno.EFBIG: _NO_SPACE,
    errno.EIO: "check the disk, then run the same command again to go on",
    errno.EACCES: _NOT_ALLOWED,
    errno.EPERM: _NOT_ALLOWED,
    errno.EROFS: _NOT_ALLOWED,
    errno.EEXIST: _NO_FOLDER,
    errno.ENOTDIR: _NO_FOLDER,
    errno.ENAMETOOLONG: "choose an output or a slide_id with a shorter name",
}
"""What to do about the errors that the operating system gives a writer."""


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


def check_not_read(output: Path, source: Path) -> None:
    """Raise OutputExistsError if writing `output` would replace `source`, which is an input."""
    # Not Path.resolve, which raises where a link leads to itself.
    read, written = (Path(os.path.realpath(path)) for path in (source, output))
    if read.is_relative_to(written):
        msg = f"output '{output}' is what is read here; choose another output with -o"
        raise OutputExistsError(msg)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Give a temporary path to write; on success it becomes `path`, on any error it is removed.

    A partial file left by a killed process is overwritten by the next run. Raises OutputWriteError
    where the operating system refuses.
    """
    temporary = partial_path(path)
    with explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_link(temporary)
        try:
            yield temporary
            fsync_file(temporary)
            temporary.replace(path)
            fsync_folder(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Turn what the operating system says about writing `path` into an error that says what to do.

    Raises
    ------
    OutputWriteError
        In the place of a plain OSError whose remedy is known.
    """
    try:
        yield
    except WsisegError:
        raise
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        place = "" if error.filename in (None, str(path)) else f" ({error.filename})"
        msg = f"output '{path}': {error.strerror}{place}; {remedy}"
        raise OutputWriteError(msg) from error


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically and durably."""
    with atomic_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 text file atomically and durably."""
    write_bytes(path, text.encode("utf-8"))


def json_text(value: object) -> str:
    """Return JSON with sorted keys and no NaN: equal values give equal bytes."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text + "\n"


def write_json(path: Path, value: object) -> None:
    """Write `json_text` atomically and durably."""
    write_text(path, json_text(value))


def promote_folder(partial: Path, final: Path) -> None:
    """Rename a finished folder to its final name, replacing an older result there.

    Two renames, and between them neither is there: who is killed at that point leaves the finished
    folder, to which the next holder of the lock gives the name.
    """
    old = _old_path(final)
    remove_tree(old)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    fsync_folder(final.parent)
    remove_tree(old)


def discard(path: Path) -> None:
    """Delete a result at once: a killed run leaves all of it, or nothing under its name."""
    old = _old_path(path)
    remove_tree(old)
    if path.exists():
        path.rename(old)
        remove_tree(old)


def recover(path: Path) -> None:
    """Finish what a killed process was doing to the name of `path`, and drop its lock.

    For those who look whether a result is there before they take its lock, which does the same.
    """
    with explaining(path):
        is_needed = _old_path(path).exists() or _lock_path(path).exists()
    if is_needed:
        with output_lock(path):
            pass


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _old_path(path: Path) -> Path:
    return path.with_name(path.name + ".old" + PARTIAL_SUFFIX)


def _finish_renaming(path: Path) -> None:
    old, partial = _old_path(path), partial_path(path)
    if old.exists():
        if not path.exists() and partial.exists():
            partial.rename(path)  # its promotion had begun, so it is whole
            fsync_folder(path.parent)
        remove_tree(old)


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
    OutputWriteError
        In the place of any error that the operating system gives in here for want of space or
        rights.
    """
    with explaining(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock_path = _lock_path(path)
        descriptor = _acquire(lock_path, path)
        try:
            _finish_renaming(path)
            yield
        finally:
            lock_path.unlink(missing_ok=True)
            os.close(descriptor)


def _drop_link(path: Path) -> None:
    """Remove a symbolic link where we are about to write: it would lead the writing elsewhere."""
    if path.is_symlink():
        path.unlink()


def _acquire(lock_path: Path, output: Path) -> int:
    _drop_link(lock_path)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    named_by_s = time.monotonic() + _NAMED_WITHIN_S
    while True:
        descriptor = os.open(lock_path, flags, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode("utf-8", "replace").strip()
            os.close(descriptor)
            if not holder and time.monotonic() < named_by_s:
                time.sleep(0.01)  # it has the lock, and writes its name next
                continue
            holder = holder or "another process"
            msg = f"output '{output}' is locked by {holder}; wait for it or choose another output"
            raise OutputLockedError(msg) from None
        try:
            # The previous holder may have removed the file between our open and our lock.
            if os.fstat(descriptor).st_ino == lock_path.stat().st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
                return descriptor
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
