"""Where the frames of a DICOM slide lie, looked at before OpenSlide does.

libdicom 1.3 ends the process when it reads a frame whose offset in the table points elsewhere than
to a frame, and a probe reads few frames. Only the file that is named is looked at: OpenSlide also
opens the files of its series in the same folder.
"""

import struct
from pathlib import Path
from typing import BinaryIO

_PIXELS = b"\xe0\x7f\x10\x00O"
"""The tag of the pixels, in whatever form."""

_ITEM = b"\xfe\xff\x00\xe0"

_FRAMES = _PIXELS + b"B\0\0\xff\xff\xff\xff" + _ITEM
"""Pixels in frames, and the item that is the table of their offsets."""

MAX_HEADER_BYTES = 64 << 20
"""What lies before the pixels: some kilobytes, or tens of bytes a frame where each has a place."""

MAX_FRAMES_READ = 4096
"""Frames that are looked at; of more only the order is checked, since a network disk takes up to
a millisecond for each and a slide may have 100,000."""

_READ_BYTES = 1 << 20


def check_dicom(path: Path) -> None:
    """Raise ValueError if a DICOM's table of frames does not fit its frames; other files pass."""
    with path.open("rb") as file:
        file.seek(128)
        table_at = _find_table(file) if file.read(4) == b"DICM" else None
        if table_at is None:
            return
        file.seek(table_at)
        (num_bytes,) = struct.unpack("<I", _exactly(file, 4))
        if num_bytes > MAX_HEADER_BYTES or num_bytes % 4:
            msg = f"its table of frames claims {num_bytes} bytes"
            raise ValueError(msg)
        offsets = struct.unpack(f"<{num_bytes // 4}I", _exactly(file, num_bytes))
        _check_offsets(file, offsets, first_at=table_at + 4 + num_bytes)


def _find_table(file: BinaryIO) -> int | None:
    """Return where the length of the table stands, None if there are no frames."""
    rest, at = b"", file.tell()
    while at < MAX_HEADER_BYTES and (part := file.read(_READ_BYTES)):
        data = rest + part
        found = data.find(_PIXELS)
        if found >= 0:
            begin = at - len(rest) + found
            file.seek(begin)
            return begin + len(_FRAMES) if file.read(len(_FRAMES)) == _FRAMES else None
        at += len(part)
        rest = data[1 - len(_PIXELS) :]
    return None


def _check_offsets(file: BinaryIO, offsets: tuple[int, ...], *, first_at: int) -> None:
    step = max(1, -(-len(offsets) // MAX_FRAMES_READ))
    for i, offset in enumerate(offsets):
        is_in_order = offset > offsets[i - 1] if i else offset == 0
        if is_in_order and i % step == 0:
            file.seek(first_at + offset)
            is_in_order = file.read(len(_ITEM)) == _ITEM
        if not is_in_order:
            msg = f"its table says that frame {i} lies at {offset}, where no frame is"
            raise ValueError(msg)


def _exactly(file: BinaryIO, num_bytes: int) -> bytes:
    data = file.read(num_bytes)
    if len(data) != num_bytes:
        msg = "it ends within its table of frames"
        raise ValueError(msg)
    return data
