"""S4 and S6: things that are no slides, and good slides with a tile that is broken or missing."""

import gzip
import json
import os
import re
import socket
import struct
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from reliability.mutants import APERIO, tissue_image, write_jpeg2000, write_pyramid

from wsiseg.errors import SlideReadError
from wsiseg.geometry import Box
from wsiseg.slides.probe import probe_slide
from wsiseg.slides.reader import open_slide
from wsiseg.store.tiles import TileStore

DAMAGED = Path(__file__).parents[1] / "corpus" / "slides" / "damaged-last-tile.tif"
"""Four LZW tiles, each of one colour, the last one zeroed."""


def write_socket(path):
    with socket.socket(socket.AF_UNIX) as listener:
        here = os.getcwd()  # noqa: PTH109 - a socket's name has at most 108 bytes
        os.chdir(path.parent)
        try:
            listener.bind(path.name)
        finally:
            os.chdir(here)


def image(path, mode="RGB", **options):
    Image.fromarray(tissue_image(300, 300)).convert(mode).save(path, **options)


def cut(write, size):
    def write_part(path):
        write(path)
        path.write_bytes(path.read_bytes()[:size])

    return write_part


def mrxs(inner):
    def write(path):
        path.write_bytes(b"\xff\xd8")
        if inner is not None:
            path.with_suffix("").mkdir()
            (path.with_suffix("") / "Slidedat.ini").write_text(inner)

    return write


NOT_SLIDES = {
    "missing.svs": lambda path: None,
    "empty.svs": lambda path: path.touch(),
    "text.svs": lambda path: path.write_text("a letter\n" * 99),
    "html.svs": lambda path: path.write_text("<html><body>404 Not Found</body></html>"),
    "pointer.svs": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "zip.svs": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)),
    "gzip.svs": lambda path: path.write_bytes(gzip.compress(b"slide")),
    "pdf.tif": lambda path: path.write_bytes(b"%PDF-1.7\n" + bytes(99)),
    "zeros.ndpi": lambda path: path.write_bytes(bytes(5000)),
    "magic.tif": lambda path: path.write_bytes(b"II*\0"),
    "nothing.tif": lambda path: path.write_bytes(b"II*\0" + struct.pack("<I", 0)),
    "folder.svs": lambda path: path.mkdir(),
    "folder.zarr": lambda path: path.mkdir(),
    "fifo.svs": os.mkfifo,
    "socket.svs": write_socket,
    "device.svs": lambda path: path.symlink_to("/dev/zero"),
    "loop.svs": lambda path: path.symlink_to(path.name),
    "dangling.svs": lambda path: path.symlink_to("nowhere"),
    "alone.mrxs": mrxs(None),
    "hollow.mrxs": mrxs(""),
    "damaged.mrxs": mrxs("[GENERAL]\nSLIDE_ID=\n"),
    "text.dcm": lambda path: path.write_bytes(bytes(128) + b"DIC"),
    "text.jp2": lambda path: path.write_text("jp2"),
    "text.vms": lambda path: path.write_text("[Virtual Microscope Specimen]\n"),
    "cut.png": cut(lambda p: image(p, format="PNG"), 4000),
    "cut.jpg": cut(lambda p: image(p, format="JPEG"), 4000),
    "cut.tif": cut(write_pyramid, 100_000),
    "cut.svs": cut(write_jpeg2000, 100_000),
    "sixteen.png": lambda path: Image.fromarray(
        np.full((300, 300), 4000, np.uint16)
    ).save(path),
    "words.tiff": lambda path: tifffile.imwrite(path, np.zeros((300, 300), np.float32)),
}  # fmt: skip


def test_what_is_no_slide_is_one_line_and_the_good_one_comes_out(wsiseg_here, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    paths = []
    for name, write in NOT_SLIDES.items():
        paths.append(folder / f"{name.replace('.', '-')}{name[name.index('.') :]}")
        write(paths[-1])
    write_pyramid(folder / "good.tif")
    done = wsiseg_here(
        "tile", *paths[:15], folder / "good.tif", *paths[15:], "-o", tmp_path / "out",
        "--tile-size", 128, "--slide-mpp", 0.5, "--tissue", "none", "--json",
    )  # fmt: skip
    assert done.returncode == 1
    rows = {row["slide_id"]: row["status"] for row in json.loads(done.stdout)["results"]}
    assert rows == {p.stem: "failed" for p in paths} | {"good": "ok"}
    lines = done.stderr.splitlines()
    assert len(lines) == len(paths), done.stderr
    for path, line in zip(paths, lines, strict=True):
        assert line.startswith(f"error: slide '{path.stem}': ")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"good.zarr"}


def test_an_image_without_resolution_names_the_option(wsiseg_here, tmp_path):
    image(tmp_path / "a.png")
    done = wsiseg_here("tile", tmp_path / "a.png", "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "--slide-mpp" in done.stderr


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_slide_that_may_not_be_read_is_one_line(wsiseg_here, tmp_path):
    image(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    done = wsiseg_here("tile", tmp_path / "a.png", "-o", tmp_path / "out", "--slide-mpp", 0.5)
    assert done.returncode == 1
    assert "Permission denied" in done.stderr


def test_a_slide_that_goes_away_after_its_probe_is_one_line(wsiseg_here, tmp_path, monkeypatch):
    path = tmp_path / "a.tif"
    write_pyramid(path)

    def probe_then_remove(*args, **options):
        meta = probe_slide(*args, **options)
        path.unlink()
        return meta

    monkeypatch.setattr("wsiseg.stages.tile.probe_slide", probe_then_remove)
    done = wsiseg_here("tile", path, "-o", tmp_path / "out", "--slide-mpp", 0.5)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "slide 'a': " in done.stderr
    assert "no such file any more" in done.stderr


def write_tiled(path, codec):
    """Write 5 x 4 tiles of 128 px; a probe looks at the corner and the middle only."""
    options = {
        "jpeg": {"photometric": "ycbcr", "compression": "jpeg"},
        "deflate": {"photometric": "rgb", "compression": "deflate"},
        "lzw": {"photometric": "rgb", "compression": "lzw"},
        "jpeg2000": {
            "photometric": "rgb", "compression": 33005,
            "description": APERIO.format(640, 512, "J2K/KDU Q=70"),
        },
    }[codec]  # fmt: skip
    tifffile.imwrite(path, tissue_image(640, 512), tile=(128, 128), metadata=None, **options)


def tile_places(path):
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        counts = page.tags["TileByteCounts"]
        return page.dataoffsets, page.databytecounts, counts.valueoffset, counts.dtype


def zero(data, at, count, counts_at):
    data[at : at + count] = bytes(count)


def noise(data, at, count, counts_at):
    data[at : at + count] = np.random.default_rng(at).bytes(count)


def halve(data, at, count, counts_at):
    struct.pack_into("<I", data, counts_at, count // 2)


def point_beyond(data, at, count, counts_at):
    struct.pack_into("<I", data, counts_at, 2**31 - 1)


def place_in(text):
    (numbers,) = re.findall(r"x=(\d+) y=(\d+) (\d+) x (\d+) px", text)
    return Box(*map(int, numbers))


@pytest.mark.parametrize("codec", ["jpeg", "deflate", "lzw", "jpeg2000"])
@pytest.mark.parametrize("damage", [zero, noise, halve, point_beyond])
def test_a_damaged_tile_is_reported_with_its_place(
    wsiseg_here, tmp_path, figure, seed, codec, damage
):
    path, out = tmp_path / ("a.svs" if codec == "jpeg2000" else "a.tif"), tmp_path / "out"
    command = (
        "tile", path, "-o", out, "--tile-size", 128, "--slide-mpp", 0.5, "--tissue", "none",
        "--codec", "zstd", "--overwrite",
    )  # fmt: skip
    write_tiled(path, codec)
    assert wsiseg_here(*command).returncode == 0
    pixels = TileStore.open(out / "a.zarr").read_images(range(20))
    whole = path.read_bytes()
    offsets, counts, counts_at, kind = tile_places(path)
    assert kind == 4  # TIFF LONG
    for index in np.random.default_rng(seed).permutation(20)[: figure(pr=2, night=20)]:
        data = bytearray(whole)
        damage(data, offsets[index], counts[index], counts_at + 4 * int(index))
        path.write_bytes(bytes(data))
        done = wsiseg_here(*command)
        if damage is point_beyond and done.returncode == 0:  # its data end by themselves
            assert codec in ("deflate", "lzw")
            found = TileStore.open(out / "a.zarr").read_images(range(20))
            np.testing.assert_array_equal(found, pixels)
            continue
        assert done.returncode == 1, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert "slide 'a': " in done.stderr
        row, column = divmod(int(index), 5)
        tile = Box(128 * column, 128 * row, 128, 128)
        assert not place_in(done.stderr).intersection(tile).is_empty, done.stderr
        assert path.name not in done.stderr


def test_after_a_damaged_tile_the_others_are_still_read_and_the_file_is_not_named():
    with open_slide(DAMAGED, slide_id="S1") as slide:
        raster = slide.meta.raster(0.5)
        for _ in range(2):
            with pytest.raises(SlideReadError, match=r"slide 'S1': .* x=128 y=128 ") as caught:
                slide.read(raster, Box(128, 128, 128, 128))
            assert DAMAGED.name not in str(caught.value)
            for i, (x, y) in enumerate([(0, 0), (128, 0), (0, 128)]):
                pixels = slide.read(raster, Box(x, y, 128, 128))
                assert (pixels == (60 + 40 * i, 90, 120)).all()


@pytest.mark.parametrize("codec", ["jpeg", "deflate"])
def test_a_tile_that_was_never_scanned_is_background_and_not_black(wsiseg_here, tmp_path, codec):
    path = tmp_path / "a.tif"
    write_tiled(path, codec)
    _, _, counts_at, _ = tile_places(path)
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, counts_at + 4 * 6, 0)
    path.write_bytes(bytes(data))
    done = wsiseg_here(
        "tile", path, "-o", tmp_path / "out", "--tile-size", 128, "--slide-mpp", 0.5,
        "--tissue", "none",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    store = TileStore.open(tmp_path / "out" / "a.zarr")
    (index,) = np.flatnonzero((store.origins == (128, 128)).all(axis=1))
    assert (store.read_images([int(index)]) == 255).all()
