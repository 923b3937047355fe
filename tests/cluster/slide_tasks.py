"""Functions that the tests send to real worker processes; importable there by this name."""

import fcntl
import logging
import os
import signal
import threading
import time
from pathlib import Path

from wsiseg.errors import SlideOpenError
from wsiseg.progress import Progress


def square(number: int) -> int:
    return number * number


def slow_when_early(number: int) -> int:
    time.sleep(0.3 if number == 0 else 0.0)
    return number


def fail_on_two(number: int) -> int:
    if number == 2:
        msg = "slide 's2': not a slide"
        raise SlideOpenError(msg)
    if number == 3:
        raise KeyError("levels")
    return number


def kill_own_worker_on_two(item: tuple[Path, int]) -> int:
    """Item 2 kills whatever runs it, each time; each start leaves a line in the diary."""
    folder, number = item
    with (folder / str(number)).open("a") as diary:
        diary.write(f"{os.getpid()}\n")
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
    return number


def kill_own_worker_once(item: tuple[Path, int]) -> int:
    """Every item kills its first worker, as a node that is taken away would."""
    folder, number = item
    mark = folder / str(number)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def take_memory(megabytes: int) -> int:
    """Take memory slowly enough for the nanny, which looks every 0.1 s, to see it."""
    held = []
    for _ in range(megabytes // 25):
        held.append(b"\xff" * 25_000_000)
        time.sleep(0.05)
    return sum(map(len, held))


def return_what_cannot_be_sent(number: int) -> object:
    return threading.Lock() if number == 1 else number


def environment(_: int) -> dict[str, str]:
    return dict(os.environ)


def listening_addresses(_: int) -> list[str]:
    """Addresses (hexadecimal, /proc/net/tcp) on which this process listens."""
    sockets = {str(f.readlink()) for f in Path("/proc/self/fd").iterdir() if f.is_symlink()}
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.append(fields[1].split(":")[0])
    return found


def sleep_a_minute(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(60)


def tell(number: int, *, progress: Progress) -> int:
    """Show progress and log a line, as a stage does."""
    progress.start(f"item {number}", 2, unit="tiles")
    progress.advance(note="half")
    logging.getLogger("wsiseg.slides").warning("slide %d is odd: %s", number, threading.Lock())
    logging.getLogger("tifffile").warning("is not asked")
    progress.advance()
    return os.getpid()


def hold_a_lock(folder: Path) -> None:
    """Say that the work has begun, and work for a minute."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        (folder / "pid").write_text(str(os.getpid()))
        time.sleep(60)
