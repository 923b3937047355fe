"""What /proc tells of processes: which read what, and how much memory one has."""

import contextlib
from collections.abc import Collection
from pathlib import Path


def workers_at(slides: Collection[Path]) -> dict[int, Path]:
    """Return the dask workers that have one of these files open, with the file."""
    names = {str(slide): slide for slide in slides}
    found = {}
    for descriptors in Path("/proc").glob("[0-9]*/fd"):
        with contextlib.suppress(OSError):
            opened = {str(fd.readlink()) for fd in descriptors.iterdir()} & names.keys()
            if not opened:
                continue
            command = (descriptors.parent / "cmdline").read_bytes()
            if b"multiprocessing" in command and b"probe" not in command:
                found[int(descriptors.parent.name)] = names[opened.pop()]
    return found


def memory_bytes(pid: int, name: str) -> int:
    """Return a line of a process's status, such as VmRSS (what it has) or VmSize (may touch)."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return 0  # it has ended
