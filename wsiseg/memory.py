"""How the libraries say that there is no memory left: each in its own way."""

import errno

_PHRASES = (
    "out of memory",  # torch on a GPU, whose own type is a RuntimeError, and on MPS
    "can't allocate memory",  # torch on a CPU
    "not enough memory",  # torch on a CPU, elsewhere than on Linux
    "bad_alloc",  # C++ whose exception torch passed on as a RuntimeError
    "can't start new thread",  # a thread reserves its stack; the limit of processes reads the same
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error, or one that it was raised from, is a want of memory."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        if _says_so(cause):
            return True
        seen.append(cause)
        cause = cause.__cause__
    return False


def in_one_line(error: BaseException) -> str:
    """Return what a library says of a want of memory; torch writes a paragraph."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def _says_so(error: BaseException) -> bool:
    if isinstance(error, RuntimeError):
        text = str(error).lower()
        return any(phrase in text for phrase in _PHRASES)
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError)
