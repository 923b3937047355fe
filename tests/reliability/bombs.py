"""Small files that claim much, most of a few kilobytes."""

import io
import struct
import zlib
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from PIL import Image
from reliability.mutants import APERIO, tissue_image

BOMBS: dict[str, Any] = {}


def bomb(suffix, *, is_fine=False):
    """Register a writer; `is_fine` says that it may also be read, if it costs nothing."""

    def register(write):
        BOMBS[write.__name__] = (suffix, is_fine, write)
        return write

    return register


def tags_patched(path, **values):
    """Overwrite tags of the first page where they stand; names as tifffile has them."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        for name, value in values.items():
            tag = tiff.pages.first.tags[name]
            tiff.filehandle.seek(tag.valueoffset)
            tiff.filehandle.write(struct.pack("<I" if tag.dtype == 4 else "<H", value))


def tiled(path, *, width=256, height=256, tile=128, level=None, **more):
    image = tissue_image(width, height) if level is None else level
    settings = {"photometric": "rgb", "compression": "deflate", "metadata": None, **more}
    tifffile.imwrite(path, image, tile=(tile, tile), **settings)


@bomb(".tif")
def claims_2_31_squared(path):
    tiled(path)
    tags_patched(path, ImageWidth=2**31 - 1, ImageLength=2**31 - 1)


@bomb(".tif")
def claims_2_20_squared_sparsely(path):
    """All tiles missing but with tables of the right length: a terapixel of nothing."""
    side = 1 << 20
    count = (side // 16384) ** 2
    tiled(path, level=np.zeros((16384, 16384, 3), np.uint8), tile=16384)
    tags_patched(path, ImageWidth=side, ImageLength=side)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        offsets = [tiff.pages.first.tags[name].offset for name in ("TileOffsets", "TileByteCounts")]
    for offset in offsets:
        struct.pack_into("<HII", data, offset + 2, 4, count, len(data))
        data += bytes(4 * count)
    path.write_bytes(bytes(data))


def _directories(path, num, next_of):
    """Write `num` one-tile directories; `next_of(i)` is the index of the next one or None."""
    width = 16
    tags = [
        (254, 4, 1), (256, 4, width), (257, 4, width), (258, 3, 8), (259, 3, 1), (262, 3, 1),
        (277, 3, 1), (322, 4, width), (323, 4, width), (324, 4, 8), (325, 4, width * width),
    ]  # fmt: skip
    size = 2 + 12 * len(tags) + 4
    first = 8 + width * width
    body = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    with path.open("wb") as file:
        file.write(b"II*\0" + struct.pack("<I", first) + bytes(width * width))
        for i in range(num):
            after = next_of(i)
            following = 0 if after is None else first + after * size
            file.write(struct.pack("<H", len(tags)) + body + struct.pack("<I", following))


@bomb(".tif")
def has_60_000_levels(path):
    _directories(path, 60_000, lambda i: i + 1 if i < 59_999 else None)


@bomb(".tif")
def directory_follows_itself(path):
    _directories(path, 1, lambda i: 0)


@bomb(".tif")
def directories_in_a_circle(path):
    _directories(path, 100, lambda i: (i + 1) % 100)


@bomb(".tif")
def tile_of_16384_squared(path):
    """One tile of zeros: 0.8 MB that unpack to 0.8 GB."""
    tiled(path, level=np.zeros((16384, 16384, 3), np.uint8), tile=16384)


@bomb(".tif")
def tile_claims_65520_squared(path):
    tiled(path)
    tags_patched(path, TileWidth=65520, TileLength=65520, ImageWidth=65520, ImageLength=65520)


@bomb(".svs", is_fine=True)
def huge_associated_image(path):
    description = APERIO.format(256, 256, "JPEG/RGB Q=70")
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            tissue_image(256, 256), photometric="rgb", tile=(128, 128), compression="deflate",
            description=description, metadata=None,
        )  # fmt: skip
        tiff.write(
            np.zeros((20_000, 20_000), np.uint8), photometric="minisblack", rowsperstrip=20_000,
            compression="deflate", description="Aperio\r\nmacro 20000x20000", metadata=None,
        )  # fmt: skip


@bomb(".svs", is_fine=True)
def description_claims_2_gigabytes(path):
    tiled(path, description=APERIO.format(256, 256, "Q=70"))
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages.first.tags["ImageDescription"].offset
    struct.pack_into("<I", data, offset + 4, 2**31 - 1)
    path.write_bytes(bytes(data))


@bomb(".tif")
def bigtiff_claims_2_60_tiles(path):
    tiled(path, bigtiff=True)
    data = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages.first.tags["TileOffsets"].offset
    struct.pack_into("<Q", data, offset + 4, 2**60)
    path.write_bytes(bytes(data))


@bomb(".tif")
def strip_claims_60000_squared(path):
    tifffile.imwrite(
        path, tissue_image(64, 64), photometric="rgb", compression="deflate", metadata=None
    )
    tags_patched(path, ImageWidth=60_000, ImageLength=60_000, RowsPerStrip=60_000)


@bomb(".tif", is_fine=True)
def one_tile_unpacks_to_more_than_its_size(path):
    """Deflate data of 512 MB in a tile that has room for 48 kB."""
    tiled(path, width=128, height=128)
    packer = zlib.compressobj(9)
    data = b"".join(packer.compress(bytes(1 << 20)) for _ in range(512)) + packer.flush()
    _replace_tile(path, data)


def _replace_tile(path, data):
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        tags = [tiff.pages.first.tags[n] for n in ("TileOffsets", "TileByteCounts")]
    for tag, value in zip(tags, (len(content), len(data)), strict=True):
        kind = {3: "<H", 4: "<I"}[int(tag.dtype)]
        if kind == "<H":
            struct.pack_into("<HII", content, tag.offset + 2, 4, 1, value)
        else:
            struct.pack_into(kind, content, tag.valueoffset, value)
    path.write_bytes(bytes(content) + data)


def _jpeg_claiming(side):
    buffer = io.BytesIO()
    Image.fromarray(tissue_image(128, 128)).save(buffer, format="JPEG")
    data = bytearray(buffer.getvalue())
    at = data.index(b"\xff\xc0")
    struct.pack_into(">HH", data, at + 5, side, side)
    return bytes(data)


@bomb(".tif")
def jpeg_tile_claims_65500_squared(path):
    tiled(path, width=128, height=128, compression="jpeg", photometric="ycbcr")
    _replace_tile(path, _jpeg_claiming(65_500))


@bomb(".svs")
def jpeg2000_tile_claims_2_30_squared(path):
    description = APERIO.format(128, 128, "J2K/KDU Q=70")
    tiled(path, width=128, height=128, compression=33005, description=description)
    codestream = bytearray(imagecodecs.jpeg2k_encode(tissue_image(128, 128), codecformat="j2k"))
    at = codestream.index(b"\xff\x51")
    struct.pack_into(">II", codestream, at + 6, 2**30, 2**30)
    _replace_tile(path, bytes(codestream))


@bomb(".jpg")
def tiny_jpeg_claims_65500_squared(path):
    path.write_bytes(_jpeg_claiming(65_500))


def _png(path, width, height, data):
    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", data), chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))


@bomb(".png")
def png_claims_2_31_squared(path):
    _png(path, 2**31 - 1, 2**31 - 1, zlib.compress(bytes(1000)))


@bomb(".png")
def png_of_zeros(path):
    packer = zlib.compressobj(9)
    row = bytes(1 + 3 * 20_000)
    data = b"".join(packer.compress(row) for _ in range(20_000)) + packer.flush()
    _png(path, 20_000, 20_000, data)


@bomb(".png", is_fine=True)
def png_text_unpacks_to_a_gigabyte(path):
    packed = zlib.compressobj(9)
    text = b"".join(packed.compress(bytes(1 << 20)) for _ in range(1024)) + packed.flush()
    Image.fromarray(tissue_image(64, 64)).save(path)
    data = path.read_bytes()
    body = b"zTXt" + b"Comment\0\0" + text
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(data[:33] + chunk + data[33:])


@bomb(".bmp")
def bmp_claims_2_31_squared(path):
    Image.fromarray(tissue_image(64, 64)).save(path)
    data = bytearray(path.read_bytes())
    struct.pack_into("<ii", data, 18, 2**31 - 1, 2**31 - 1)
    path.write_bytes(bytes(data))


@bomb(".webp")
def webp_claims_16383_squared_lossless(path):
    """The format's own largest size, in a file of nothing else."""
    Image.fromarray(np.zeros((16_383, 16_383), np.uint8)).resize((64, 64)).save(path, lossless=True)
    data = bytearray(path.read_bytes())
    at = data.index(b"VP8L") + 9
    struct.pack_into("<I", data, at, (16_382) | (16_382 << 14))
    path.write_bytes(bytes(data))


@bomb(".mrxs")
def mrxs_claims_2_31_images(path):
    path.write_bytes(b"")
    folder = path.with_suffix("")
    folder.mkdir()
    (folder / "Slidedat.ini").write_text(
        "[GENERAL]\nSLIDE_VERSION=01.02\nSLIDE_ID=X\nIMAGENUMBER_X=2147483647\n"
        "IMAGENUMBER_Y=2147483647\nCameraImageDivisionsPerSide=1\n[HIERARCHICAL]\n"
        "HIER_COUNT=1\nNONHIER_COUNT=0\nINDEXFILE=Index.dat\nHIER_0_NAME=Slide zoom level\n"
        "HIER_0_COUNT=2147483647\n[DATAFILE]\nFILE_COUNT=2147483647\n"
    )
    path.write_bytes(b"x")


@bomb(".vms")
def vms_claims_2_31_columns(path):
    path.write_text(
        "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=2147483647\n"
        "NoJpegRows=2147483647\nImageFile=a.jpg\nMacroImage=a.jpg\nMapFile=a.jpg\n"
    )
