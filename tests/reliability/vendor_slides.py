"""Slides as small as their formats allow: Hamamatsu NDPI, Ventana BIF, DICOM; OpenSlide opens each.

Written by hand where no library of ours writes the format.
"""

import io
import os
import struct
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

WIDTH, HEIGHT, TILE = 640, 512, 128

SERIES = b"1.2.826.0.1.3680043.9.1.0000"
"""What a DICOM slide's files have in common; OpenSlide looks for them in the whole folder."""

VL_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"


def _jpeg(image, **options):
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image)).save(buffer, "JPEG", quality=80, **options)
    return buffer.getvalue()


def write_ndpi(path: Path, full) -> None:
    """Two levels and a macro image, each one JPEG with restart markers for its tiles."""
    pages = ((20.0, full), (10.0, full[::2, ::2]), (-1.0, full[::4, ::4]))
    with path.open("wb") as file:
        file.write(b"II*\0" + bytes(8))
        pointer = 4
        for lens, image in pages:
            data = _jpeg(image, restart_marker_blocks=4, subsampling=0)
            height, width = image.shape[:2]
            pixels_at = file.tell()
            per_cm_at = file.write(data) + pixels_at
            bits_at = file.write(struct.pack("<II", 20_000, 1)) + per_cm_at
            begin = file.write(struct.pack("<4H", 8, 8, 8, 0)) + bits_at
            tags = [
                (256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, bits_at), (259, 3, 1, 7),
                (262, 3, 1, 6), (273, 4, 1, pixels_at), (277, 3, 1, 3), (278, 4, 1, height),
                (279, 4, 1, len(data)), (282, 5, 1, per_cm_at), (283, 5, 1, per_cm_at),
                (296, 3, 1, 3), (65420, 4, 1, 1),
                (65421, 11, 1, struct.unpack("<I", struct.pack("<f", lens))[0]), (65424, 9, 1, 0),
            ]  # fmt: skip
            entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
            # A classic TIFF, but for eight bytes in each offset of a page, and the upper halves
            # of all values behind the last of them.
            file.write(struct.pack("<H", len(tags)) + entries)
            following = file.tell()
            file.write(bytes(8 + 4 * len(tags)))
            file.seek(pointer)
            file.write(struct.pack("<I", begin))
            file.seek(0, os.SEEK_END)
            pointer = following


def write_bif(path: Path, full) -> None:
    """A label image with the scanner's XML, three levels, and how the tiles were stitched."""
    scan = b'<iScan Magnification="20" ScanRes="0.5" UnitNumber="7"></iScan>'
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            np.ascontiguousarray(full[::4, ::4]), photometric="rgb", compression="jpeg",
            description="Label Image", metadata=None, extratags=[_xml(scan)],
        )  # fmt: skip
        for level in range(3):
            step = 2**level
            tiff.write(
                np.ascontiguousarray(full[::step, ::step]), photometric="ycbcr",
                compression="jpeg", tile=(TILE, TILE), metadata=None,
                description=f"level={level} mag={20 / step:g} quality=90",
                extratags=[_xml(_stitching(WIDTH // TILE, HEIGHT // TILE))] if level == 0 else [],
            )  # fmt: skip


def _xml(text: bytes):
    return (700, 1, len(text), text, True)


def _stitching(columns: int, rows: int) -> bytes:
    def number(column, row):
        """Tiles are numbered from the bottom, every second row from the right."""
        up = rows - 1 - row
        return up * columns + (columns - 1 - column if up % 2 else column) + 1

    pairs = [
        ("RIGHT", number(x, y), number(x + 1, y)) for y in range(rows) for x in range(columns - 1)
    ] + [("UP", number(x, y), number(x, y - 1)) for y in range(1, rows) for x in range(columns)]
    joints = "".join(
        f'<TileJointInfo FlagJoined="1" Confidence="98" Direction="{direction}" Tile1="{one}" '
        f'Tile2="{other}" OverlapX="2" OverlapY="1"/>'
        for direction, one, other in pairs
    )
    return (
        f'<EncodeInfo Ver="2"><SlideStitchInfo><ImageInfo AOIScanned="1" AOIIndex="0" '
        f'NumRows="{rows}" NumCols="{columns}" Width="{TILE}" Height="{TILE}" Pos-X="0" '
        f'Pos-Y="0">{joints}</ImageInfo></SlideStitchInfo><AoiOrigin><AOI0 OriginX="0" '
        f'OriginY="0"/></AoiOrigin></EncodeInfo>'
    ).encode()


def write_dicom(path: Path, full):
    """One level of JPEG frames; return the offset of the pixels and (offset, bytes) of frames."""
    corners = [(x, y) for y in range(0, HEIGHT, TILE) for x in range(0, WIDTH, TILE)]
    frames = [_jpeg(full[y : y + TILE, x : x + TILE]) for x, y in corners]
    frames = [frame + bytes(len(frame) % 2) for frame in frames]
    series = SERIES.decode()
    meta = (
        _element(0x0002_0001, "OB", b"\0\1")
        + _element(0x0002_0002, "UI", VL_WHOLE_SLIDE)
        + _element(0x0002_0003, "UI", f"{series}.1")
        + _element(0x0002_0010, "UI", JPEG_BASELINE)
        + _element(0x0002_0012, "UI", "1.2.826.0.1.3680043.9")
    )
    spacing = _item(_element(0x0028_0030, "DS", "0.0005\\0.0005"))
    header = b"".join([
        bytes(128), b"DICM", _element(0x0002_0000, "UL", len(meta)), meta,
        _element(0x0008_0008, "CS", "ORIGINAL\\PRIMARY\\VOLUME\\NONE"),
        _element(0x0008_0016, "UI", VL_WHOLE_SLIDE), _element(0x0008_0018, "UI", f"{series}.1"),
        _element(0x0008_0060, "CS", "SM"), _element(0x0020_000D, "UI", f"{series}.2"),
        _element(0x0020_000E, "UI", series), _element(0x0020_0052, "UI", f"{series}.3"),
        _element(0x0020_9311, "CS", "TILED_FULL"), _element(0x0028_0002, "US", 3),
        _element(0x0028_0004, "CS", "YBR_FULL_422"), _element(0x0028_0006, "US", 0),
        _element(0x0028_0008, "IS", str(len(frames))), _element(0x0028_0010, "US", TILE),
        _element(0x0028_0011, "US", TILE), _element(0x0028_0100, "US", 8),
        _element(0x0028_0101, "US", 8), _element(0x0028_0102, "US", 7),
        _element(0x0028_0103, "US", 0), _element(0x0048_0006, "UL", WIDTH),
        _element(0x0048_0007, "UL", HEIGHT),
        _element(0x0048_0105, "SQ", _item(_element(0x0048_0112, "DS", "20"))),
        _element(0x0048_0303, "UL", 1),
        _element(0x5200_9229, "SQ", _item(_element(0x0028_9110, "SQ", spacing))),
    ])  # fmt: skip
    starts = np.cumsum([0, *(8 + len(frame) for frame in frames)])
    table = _item(struct.pack(f"<{len(frames)}I", *starts[:-1]))
    begin = struct.pack("<HH2sHI", 0x7FE0, 0x0010, b"OB", 0, 0xFFFF_FFFF) + table
    end = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
    path.write_bytes(header + begin + b"".join(map(_item, frames)) + end)
    at = len(header) + len(begin)
    return at, [(at + int(s) + 8, len(f)) for s, f in zip(starts[:-1], frames, strict=True)]


def _element(tag, kind, value):
    """Return an element in explicit little endian."""
    if isinstance(value, int):
        value = struct.pack({"US": "<H", "UL": "<I"}[kind], value)
    data = value.encode() if isinstance(value, str) else value
    data += (b"\0" if kind == "UI" else b" ") * (len(data) % 2)
    has_long_length = kind in ("OB", "SQ")
    length = struct.pack("<HI" if has_long_length else "<H", *[0] * has_long_length, len(data))
    return struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, kind.encode()) + length + data


def _item(data):
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(data)) + data
