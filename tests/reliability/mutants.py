"""Slides to damage, and ways to: in the header with knowledge of it, anywhere, cut off."""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from reliability import vendor_slides

ODD_NUMBERS = (0, 1, 2, 3, 7, 255, 256, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
"""What breaks arithmetic: nothing, one, and the ends of each type."""

APERIO = "Aperio Image Library v12\r\n{0}x{1} [0,0 {0}x{1}] (128x128) {2}|AppMag = 20|MPP = 0.5"


def tissue_image(width, height, seed=0):
    """Return pink noise on glass, which the tissue mask finds."""
    rng = np.random.default_rng(seed)
    image = np.full((height, width, 3), 243, np.uint8)
    inner = image[height // 8 : -height // 8, width // 8 : -width // 8]
    inner[:] = np.array([200, 110, 160]) + rng.integers(-30, 30, inner.shape)
    return image


def write_pyramid(path, *, bigtiff=False):
    """A generic tiled TIFF with JPEG tiles and three levels."""
    full = tissue_image(640, 512)
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as tiff:
        for i, level in enumerate((full, full[::2, ::2], full[::4, ::4])):
            tiff.write(
                np.ascontiguousarray(level), photometric="ycbcr", tile=(128, 128),
                compression="jpeg", subfiletype=int(i > 0),
                resolution=(2e4, 2e4), resolutionunit=3, metadata=None,
            )  # fmt: skip


def write_jpeg2000(path):
    """What an Aperio scanner set to JPEG 2000 writes: level, thumbnail, smaller level."""
    full = tissue_image(640, 512)
    description = APERIO.format(640, 512, "J2K/KDU Q=70")
    with tifffile.TiffWriter(path) as tiff:
        for level in (full, np.ascontiguousarray(full[::2, ::2])):
            tiff.write(
                level, photometric="rgb", tile=(128, 128), compression=33005,
                description=description, metadata=None,
            )  # fmt: skip


@dataclass(frozen=True)
class Seed:
    """A whole slide in memory and where its header, its entries and its tiles lie."""

    name: str
    suffix: str
    data: bytes
    entries: tuple[tuple[int, int], ...]
    """(offset, bytes) of each directory entry and each array that an entry points to."""
    tiles: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, name, path):
        entries: list[tuple[int, int]] = [(0, 16)]
        tiles: list[tuple[int, int]] = []
        with tifffile.TiffFile(path) as tiff:
            for page in (p.aspage() for p in tiff.pages):
                for tag in page.tags:
                    entries.append((tag.offset, 20 if tiff.is_bigtiff else 12))
                    if tag.valueoffset != tag.offset + 8:
                        entries.append((tag.valueoffset, min(tag.valuebytecount, 256)))
                last = page.tags[max(page.tags.keys())]
                entries.append((last.offset + 12, 4))  # where the next directory is
                tiles += zip(page.dataoffsets, page.databytecounts, strict=True)
        return cls(name, path.suffix, path.read_bytes(), tuple(entries), tuple(tiles))


SHARES = {
    "generic.tif": 0.25,
    "big.tif": 0.1,
    "aperio-j2k.svs": 0.2,
    "real.svs": 0.1,
    "a.ndpi": 0.15,
    "ventana.bif": 0.1,
    "dicom.svs": 0.1,
}
"""How many of the damaged slides are made of which whole one."""


def make_seeds(folder: Path, real_slide: Path):
    """Return the slides that are damaged, in the order of `SHARES`."""
    write_pyramid(folder / "generic.tif")
    write_pyramid(folder / "big.tif", bigtiff=True)
    write_jpeg2000(folder / "aperio-j2k.svs")
    full = tissue_image(vendor_slides.WIDTH, vendor_slides.HEIGHT)
    vendor_slides.write_ndpi(folder / "a.ndpi", full)
    vendor_slides.write_bif(folder / "ventana.bif", full)
    # OpenSlide goes by content; a name in .dcm has tiatoolbox try what it refuses, 20 s each.
    dicom = folder / "dicom.svs"
    pixels_at, frames = vendor_slides.write_dicom(dicom, full)
    header = tuple((at, 8) for at in range(128, pixels_at, 8))
    seeds = [Seed.of(n, folder / n) for n in SHARES if n not in ("real.svs", dicom.name)]
    seeds.append(Seed.of("real.svs", real_slide))
    seeds.append(Seed(dicom.name, ".svs", dicom.read_bytes(), header, tuple(frames)))
    return sorted(seeds, key=lambda seed: [*SHARES].index(seed.name))


def mutate(seed, rng):
    """Return a damaged copy and what was done to it."""
    way = rng.choice(["entry", "entry", "number", "tile", "anywhere", "cut"])
    data = bytearray(seed.data)
    if way == "cut":
        cut = int(rng.integers(0, len(data)))
        return bytes(data[:cut]), f"cut at {cut}"
    done = []
    for _ in range(int(rng.integers(1, 5))):
        at, new = _patch(seed, way, len(data), rng)
        data[at : at + len(new)] = new
        done.append(f"{at}={new.hex()}")
    return bytes(data[: len(seed.data)]), f"{way}: {' '.join(done)}"


def with_own_series(data, number):
    """Return a slide that shares its DICOM series with none beside it, whole or damaged."""
    return data.replace(vendor_slides.SERIES, vendor_slides.SERIES[:-4] + b"%04d" % number)


def _patch(seed, way, size, rng):
    """Return (offset, new bytes) of one change."""
    if way == "anywhere":
        return int(rng.integers(size)), rng.bytes(1)
    if way == "tile":
        offset, count = seed.tiles[rng.integers(len(seed.tiles))]
        # Most of a codestream's structure is at its beginning.
        within = rng.integers(min(count, 64 if rng.random() < 0.7 else count))
        return int(offset + within), rng.bytes(1)
    offset, count = seed.entries[rng.integers(len(seed.entries))]
    if way == "entry":
        place = int(offset + rng.integers(count))
        # Numbers in XML and in DICOM's text: another byte is mostly no number any more.
        is_digit = seed.data[place : place + 1].isdigit() and rng.random() < 0.5
        return place, b"%d" % rng.integers(10) if is_digit else rng.bytes(1)
    number = ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))]
    place = offset + 4 * int(rng.integers(max(1, count // 4)))
    is_long = rng.random() < 0.7
    return place, struct.pack("<I", number) if is_long else struct.pack("<H", number % 65536)
