"""Call a function on one item after another in a child process, which may die without us.

Slides are read by C libraries, and a damaged one or a want of memory can end the process that does.
The child tells its progress and its log as they come, so that it looks as if it worked here.
"""

import logging
import logging.handlers
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from wsiseg.progress import Progress

START_METHOD = "spawn"
"""A fork would copy the locks of threads that go on here only, and has no GPU."""


class Call(Protocol):
    """A function that is importable by name, whose value can be sent."""

    def __call__(self, item: Any, *, progress: Progress) -> object:  # noqa: ANN401 - the caller's
        """Work on one item."""


class ChildDiedError(Exception):
    """The child ended before it had an answer; its text says how.

    `exit_code` : of the process, negative if a signal killed it.
    """

    def __init__(self, exit_code: int) -> None:
        """Say how it ended."""
        self.exit_code = exit_code
        how = f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else ""
        super().__init__(how or f"ended with {exit_code}")


class UnsentError(Exception):
    """The value of a call cannot be sent from the child; its text says why."""


class Child:
    """Runs `call` in a child process, which is started when needed and again after a death."""

    def __init__(self, call: Call) -> None:
        """Keep what is called; close with `close`."""
        self._call = call
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def run(self, item: object, progress: Progress) -> Any:  # noqa: ANN401 - what the call returns
        """Return `call(item)`; progress and log records are passed on meanwhile.

        Raises
        ------
        ChildDiedError
            The process died; the next run has a new one.
        UnsentError
            The value cannot be sent.
        """
        connection = self._start()
        try:
            self._send(connection, item)
            while True:
                kind, content = self._receive(connection)
                if kind == "value":
                    return content
                if kind == "unsent":
                    raise UnsentError(content)  # noqa: TRY301 - the child goes on
                if kind == "log":
                    logging.getLogger(content.name).handle(content)
                else:
                    arguments, options = content
                    getattr(progress, kind)(*arguments, **options)
        except (UnsentError, ChildDiedError):
            raise
        except BaseException:
            self.close()  # its answer, which would come, is not that of the next item
            raise

    def close(self) -> None:
        """End the child at once; every output survives that."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _send(self, connection: Connection, item: object) -> None:
        try:
            connection.send(item)
        except OSError as error:
            raise self._death() from error

    def _receive(self, connection: Connection) -> tuple[str, Any]:
        """Return the next message; ChildDiedError if the process is over, whoever has its pipe."""
        assert self._process is not None
        wait([connection, self._process.sentinel])
        try:
            if connection.poll():
                message: tuple[str, Any] = connection.recv()
                return message
        except (EOFError, OSError) as error:
            raise self._death() from error
        raise self._death()

    def _start(self) -> Connection:
        if self._connection is not None:
            return self._connection
        context: Any = multiprocessing.get_context(START_METHOD)
        ours, its = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(its, self._call, _log_levels()), daemon=True
        )
        self._process.start()
        its.close()
        self._connection = ours
        return self._connection

    def _death(self) -> ChildDiedError:
        assert self._process is not None
        self._process.join()
        exit_code = self._process.exitcode or 0
        self.close()
        return ChildDiedError(exit_code)


def _log_levels() -> dict[str, int]:
    """Return the level of each logger that has one, the root's under no name."""
    loggers = {"": logging.getLogger(), **logging.getLogger().manager.loggerDict}
    found = {name: x for name, x in loggers.items() if isinstance(x, logging.Logger)}
    return {name: logger.level for name, logger in found.items() if logger.level}


def _serve(connection: Connection, call: Call, levels: dict[str, int]) -> None:
    """Be the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is our parent's, which then ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sender = _Sender(connection)
    logging.getLogger().handlers = [_LogSender(sender)]
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    progress = _ProgressSender(sender)
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        value = call(item, progress=progress)
        try:
            sender.send("value", value)
        except Exception as error:  # noqa: BLE001 - pickle raises anything
            sender.send("unsent", f"{type(error).__name__}: {error}")


def _end_with_parent() -> None:
    """End this process when the parent does, however that ends; it would hold its locks."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


class _Sender:
    """Sends from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, kind: str, content: object) -> None:
        with self._lock:
            self._connection.send((kind, content))


class _LogSender(logging.handlers.QueueHandler):
    """Sends records of the log; what cannot be sent of them is text by then."""

    def __init__(self, sender: _Sender) -> None:
        super().__init__(sender)  # type: ignore[arg-type] # `enqueue` is all that uses it
        self._sender = sender

    def enqueue(self, record: logging.LogRecord) -> None:
        self._sender.send("log", record)


class _ProgressSender:
    """A `wsiseg.progress.Progress` that is shown by the parent."""

    def __init__(self, sender: _Sender) -> None:
        self._send: Callable[[str, object], None] = sender.send

    def start(self, label: str, total: int, *, unit: str, done: int = 0) -> None:
        """See Progress."""
        self._send("start", ((label, total), {"unit": unit, "done": done}))

    def advance(self, amount: int = 1, *, note: str = "") -> None:
        """See Progress."""
        self._send("advance", ((amount,), {"note": note}))

    def finish(self) -> None:
        """See Progress."""
        self._send("finish", ((), {}))
