"""U9: marked text in every tag, name and label of a slide; no output, log or message repeats it."""

import contextlib
import gzip
import io
import json
import shutil
import struct
import zlib

import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile
import zarr
from PIL import Image
from reliability.test_not_slides import DAMAGED

CANARY = "KANARIENVOGEL"
TINY = ("--preset", "tiny", "--set", "model.dim=8", "--set", "model.mults=[1, 2]",
        "--set", "model.groups=4", "--set", "model.attention=none",
        "--batch-size", 2, "--steps", 2)  # fmt: skip
TEXT_TAGS = {
    269: "DocumentName", 271: "Make", 272: "Model", 285: "PageName", 305: "Software",
    306: "DateTime", 315: "Artist", 316: "HostComputer", 700: "XMP", 33432: "Copyright",
    33723: "IPTC", 37510: "UserComment", 65000: "Private",
}  # fmt: skip


def marked_jpeg(pixels):
    """Encode a tile with a comment, an application's segment and words behind its end."""
    data = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), colorspace="RGB", colorsubsampling="444"
    )
    text = CANARY.encode()
    size = struct.pack(">H", len(text) + 2)
    marked = b"".join((b"\xff\xfe", size, text, b"\xff\xe1", size, text))
    return data[:2] + marked + data[2:] + text


def write_slide(path, real_slide):
    """Write an Aperio slide whose every text, name and associated image holds the canary."""
    with openslide.OpenSlide(real_slide) as slide:
        pixels = np.asarray(slide.read_region((600, 900), 0, (640, 640)).convert("RGB"))
    description = (
        f"Aperio Image Library v12\r\n640x640 [0,0 640x640] (128x128) JPEG/RGB Q=70|AppMag = 20"
        f"|MPP = 0.5|Filename = {CANARY}|User = {CANARY}|Patient = {CANARY}|Barcode = {CANARY}"
        f"|ScanScope ID = {CANARY}|Title = {CANARY}"
    )
    tags = [
        (number, 2, 0, CANARY, True) for number in TEXT_TAGS if number not in (700, 33723, 37510)
    ] + [(n, 1, len(CANARY), CANARY.encode(), True) for n in (700, 33723, 37510)]
    marked = np.frombuffer((CANARY * 4000).encode()[:48_000], np.uint8).reshape(100, 160, 3)
    tiles = (
        marked_jpeg(pixels[128 * row : 128 * row + 128, 128 * column : 128 * column + 128])
        for row, column in np.ndindex(5, 5)
    )
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(
            tiles, shape=pixels.shape, dtype=np.uint8, photometric="ycbcr", tile=(128, 128),
            subsampling=(1, 1), compression="jpeg",
            description=description, metadata=None, software=False, extratags=tags,
        )  # fmt: skip
        for name, kind in (("thumbnail", 0), ("label", 1), ("macro", 9)):
            tiff.write(
                marked, photometric="rgb", rowsperstrip=100, metadata=None, software=CANARY,
                description=f"Aperio\r\n{name} 160x100 {CANARY}", subfiletype=kind,
            )  # fmt: skip


def annotation_text():
    ring = [[x, y] for x, y in ((50, 50), (600, 50), (600, 600), (50, 600), (50, 50))]
    inner = [[200, 200], [400, 200], [400, 400], [200, 400], [200, 200]]
    features = [
        {
            "type": "Feature", "id": CANARY,
            "geometry": {"type": "Polygon", "coordinates": [points]},
            "properties": {
                "classification": {"name": name}, "name": CANARY, "description": CANARY,
                "metadata": {"Patient": CANARY},
            },
        }
        for name, points in (("Region", ring), ("Nucleus", inner))
    ]  # fmt: skip
    return json.dumps({"type": "FeatureCollection", "features": features, "comment": CANARY})


def readings(path):
    """Yield everything that a file says: its bytes, unpacked and decoded."""
    data = path.read_bytes()
    yield data
    if data[:2] == b"\x1f\x8b":
        yield gzip.decompress(data)
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        with Image.open(io.BytesIO(data)) as image:
            yield repr(image.info).encode()
            yield np.asarray(image.convert("RGB")).tobytes()
    with contextlib.suppress(zlib.error):
        yield zlib.decompress(data)


def arrays(folder):
    for meta in folder.rglob("zarr.json"):
        if json.loads(meta.read_text())["node_type"] == "array":
            yield meta.parent, np.asarray(zarr.open_array(meta.parent, mode="r")[...]).tobytes()


def leaks(text):
    text = text.encode() if isinstance(text, str) else text
    lowered = text.lower()
    return any(CANARY.lower().encode(code) in lowered for code in ("utf-8", "utf-16-le"))


@pytest.fixture
def cohort(tmp_path, real_slide):
    """Two slides of two patients; names, folder and patients are marked, the slide_ids are not."""
    folder = tmp_path / f"{CANARY}-in"
    folder.mkdir()
    for name in "ab":
        write_slide(folder / f"{CANARY}-{name}.svs", real_slide)
        (folder / f"{CANARY}-{name}.geojson").write_text(annotation_text())
    lines = [
        f"{slide_id},{CANARY}-{name},{CANARY}-{name}.svs,{CANARY}-{name}.geojson,{split}"
        for slide_id, name, split in (("S1", "a", "train"), ("S2", "b", "val"))
    ]
    path = folder / "cohort.csv"
    path.write_text("slide_id,patient_id,path,annotation,split\n" + "\n".join(lines) + "\n")
    return path


@pytest.mark.slow
def test_nothing_of_a_patient_leaves_the_slide(wsiseg_here, tmp_path, cohort, scorecard):
    with openslide.OpenSlide(cohort.parent / f"{CANARY}-a.svs") as slide:
        assert sum(CANARY in value for value in slide.properties.values()) > 10
        assert {"thumbnail", "label", "macro"} <= {*slide.associated_images}
    classes = tmp_path / "classes.yaml"
    classes.write_text("classes:\n  - Nucleus\nroi: Region\n")
    work = tmp_path / "work"
    work.mkdir()
    chain = [
        ("info", cohort),
        ("-v", "tile", cohort, "-o", "tiles", "--tile-size", 128, "--classes", classes),
        ("-v", "pretrain", "tiles", "-o", "pre", *TINY),
        ("-v", "finetune", "tiles", "-o", "run", "--pretrained", "pre", "--steps", 2,
         "--batch-size", 2),
        ("-v", "segment", cohort, "--model", "run", "-o", "out"),
        ("export", "out/S1.mask.zarr", "-o", "again.geojson.gz"),
        ("evaluate", "out/S1.mask.zarr", "out/S1.geojson", "-o", "metrics.json"),
        ("check", "out/S1.geojson"),
        ("verify", "tiles/S1.zarr", "out/S1.mask.zarr"),
    ]  # fmt: skip
    said = ""
    for command in chain:
        done = wsiseg_here(*command, cwd=work)
        assert done.returncode == 0, done.stderr
        said += done.stdout + done.stderr
    assert not leaks(said)
    found, files = [], 0
    for path in work.rglob("*"):
        assert not leaks(str(path.relative_to(tmp_path)))
        if path.is_file():
            files += 1
            found += [path for reading in readings(path) if leaks(reading)]
            assert str(tmp_path).encode() not in path.read_bytes(), path
    found += [path for path, pixels in arrays(work) if leaks(pixels)]
    scorecard.add("PHI leaks", len(found))
    assert files > 30
    assert not found


def cut_off(path):
    path.write_bytes(path.read_bytes()[:3000])


def break_header(path):
    data = bytearray(path.read_bytes())
    data[4:8] = b"\xff\xff\xff\x7f"
    path.write_bytes(bytes(data))


def zero_tiles(path):
    with tifffile.TiffFile(path) as tiff:
        places = list(
            zip(tiff.pages.first.dataoffsets, tiff.pages.first.databytecounts, strict=True)
        )
    data = bytearray(path.read_bytes())
    for offset, count in places:
        data[offset : offset + count] = bytes(count)
    path.write_bytes(bytes(data))


def put_a_tile_whose_error_names_the_file(path):
    shutil.copy(DAMAGED, path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.unlink(),
        cut_off,
        break_header,
        zero_tiles,
        put_a_tile_whose_error_names_the_file,
    ],
)
def test_an_error_names_the_pseudonym_and_nothing_else(
    wsiseg_here, tmp_path, cohort, scorecard, damage
):
    damage(cohort.parent / f"{CANARY}-a.svs")
    out = tmp_path / "out"
    command = ("--tile-size", 128, "--tissue", "none", "--json")
    done = wsiseg_here("-v", "tile", cohort, "-o", out, *command)
    assert done.returncode == 1
    assert "slide 'S1'" in done.stderr
    lines = done.stderr.splitlines()
    # What -v adds of a traceback is this program's own text and the name of the cohort's folder.
    shown = [line for line in lines if line.startswith(("error", "WARNING", "ERROR"))]
    scorecard.add("PHI leaks", sum(leaks(line) for line in shown) + leaks(done.stdout))
    assert not any(leaks(line) for line in shown), shown
    assert not leaks(done.stdout)


@pytest.mark.parametrize(
    "text",
    [
        None, "", "{", "[1e400]", '{"features": [null]}', "\xe9",
        annotation_text().replace("50, 50", '50, "x"'),
        annotation_text().replace("600, 600", "1e12, 600"),
        annotation_text().replace("Nucleus", "Other"),
    ],
    ids=["gone", "empty", "cut-off", "infinite", "null", "latin-1", "text", "far", "class"],
)  # fmt: skip
def test_an_error_in_an_annotation_names_the_pseudonym_and_not_its_file(
    wsiseg_here, tmp_path, cohort, scorecard, text
):
    path = cohort.parent / f"{CANARY}-a.geojson"
    path.unlink() if text is None else path.write_bytes(text.encode("latin-1"))
    classes = tmp_path / "classes.yaml"
    classes.write_text("classes:\n  - Nucleus\nroi: Region\n")
    command = ("--tile-size", 128, "--classes", classes, "--json")
    done = wsiseg_here("tile", cohort, "-o", tmp_path / "out", *command)
    assert done.returncode == 1, done.stderr
    assert "slide 'S1'" in done.stderr
    scorecard.add("PHI leaks", leaks(done.stderr) + leaks(done.stdout))
    assert not leaks(done.stderr), done.stderr
    assert not leaks(done.stdout)


@pytest.mark.parametrize("mode", ["not an image", "RGB", "L"])
def test_an_error_in_a_mask_image_names_the_pseudonym_and_not_its_file(
    wsiseg_here, tmp_path, cohort, scorecard, mode
):
    path = cohort.parent / f"{CANARY}-a.png"
    path.touch() if mode == "not an image" else Image.new(mode, (9, 9)).save(path)
    cohort.write_text(cohort.read_text().replace(f"{CANARY}-a.geojson", path.name))
    done = wsiseg_here("tile", cohort, "-o", tmp_path / "out", "--tile-size", 128, "--json")
    assert done.returncode == 1, done.stderr
    assert "slide 'S1': mask image" in done.stderr
    scorecard.add("PHI leaks", leaks(done.stderr) + leaks(done.stdout))
    assert not leaks(done.stderr), done.stderr
    assert not leaks(done.stdout)


def test_annotations_without_a_class_are_refused_by_the_pseudonyms(wsiseg_here, tmp_path, cohort):
    for name in "ab":
        (cohort.parent / f"{CANARY}-{name}.geojson").write_text("{" if name == "a" else "[]")
    done = wsiseg_here("tile", cohort, "-o", tmp_path / "out", "--tile-size", 128)
    assert done.returncode == 1
    assert done.stderr.startswith("error: slide 'S1': annotation: not GeoJSON")
    assert not leaks(done.stderr)
    (cohort.parent / f"{CANARY}-a.geojson").write_text("[]")
    done = wsiseg_here("tile", cohort, "-o", tmp_path / "out", "--tile-size", 128)
    assert done.returncode == 1
    assert "annotations of S1, S2: no annotation has a class" in done.stderr
    assert not leaks(done.stderr)


def test_an_inconsistent_cohort_is_refused_without_naming_the_patient(wsiseg_here, tmp_path):
    cohort = tmp_path / "cohort.csv"
    cohort.write_text(
        "slide_id,patient_id,path,split\n"
        f"S1,{CANARY},{CANARY}1.svs,train\nS2,{CANARY},{CANARY}2.svs,val\n"
    )
    done = wsiseg_here("tile", cohort, "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "'S1'" in done.stderr
    assert "'S2'" in done.stderr
    assert not leaks(done.stderr)
