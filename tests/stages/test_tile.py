"""A slide becomes a store of tiles: the slide's pixels, whole or not at all, in any codec."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from wsiseg.classes import ClassTable
from wsiseg.errors import (
    AnnotationError,
    ConfigError,
    NoTissueError,
    SlideReadError,
    SlideTooSmallError,
    SourceTilesError,
    StoreCorruptError,
)
from wsiseg.geometry import Box
from wsiseg.progress import SilentProgress
from wsiseg.settings.tile import TileConfig, TissueConfig
from wsiseg.slides.cohort import CohortEntry
from wsiseg.slides.reader import open_slide
from wsiseg.stages.tile import TileJob, run
from wsiseg.store.tiles import TileStore
from wsiseg.store.verify import verify_store
from wsiseg.synthetic import SyntheticTissue, write_slide

TISSUE = SyntheticTissue(width_px=2100, height_px=1500, mpp=0.5, seed=3)
WHOLE = TissueConfig(method="none")


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    """A JPEG pyramid (levels at 1 and 1/4) with tiles of 256 px and a rest at both borders."""
    path = tmp_path_factory.mktemp("slide") / "s1.tiff"
    write_slide(path, TISSUE)
    return path


def job(path, output, *, threads=2, overwrite=False, **config):
    entry = CohortEntry(slide_id=path.stem, path=path, patient_id="p1", split="train")
    settings = TileConfig(**config)
    return TileJob(
        entry=entry, config=settings, output=output, threads=threads, overwrite=overwrite
    )


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.mark.parametrize("codec", ["auto", "delta", "zstd", "source"])
@pytest.mark.parametrize("mpp", [0.5, 2.0])
def test_tiles_are_the_slides_pixels(slide_path, tmp_path, codec, mpp):
    out = tmp_path / "s1.zarr"
    summary = run(job(slide_path, out, codec=codec, mpp=mpp, tissue=WHOLE))
    store = TileStore.open(out)
    assert summary.tiles == store.num_tiles
    assert store.codec == ("source" if codec == "auto" else codec)
    assert store.group_id == job(slide_path, out).entry.group_id
    assert store.group_id not in ("p1", "patient:p1")
    assert store.split == "train"
    assert verify_store(out) == []
    images = store.read_images(range(store.num_tiles))
    with open_slide(slide_path) as slide:
        assert slide.meta.raster(mpp) == store.raster
        for (x, y), image in zip(store.origins, images, strict=True):
            wanted = slide.read(store.raster, Box(int(x), int(y), 256, 256))
            np.testing.assert_array_equal(image, wanted)


@pytest.mark.parametrize("mpp", [0.61, 1.0, 1.7])
def test_resampled_tiles_lie_where_their_origins_say(slide_path, tmp_path, mpp):
    run(job(slide_path, tmp_path / "s.zarr", mpp=mpp, tile_size=128, tissue=WHOLE))
    store = TileStore.open(tmp_path / "s.zarr")
    down = store.raster.downsample_x
    images = store.read_images(range(store.num_tiles)).astype(float)
    for (x, y), image in zip(store.origins, images, strict=True):
        left, top = round(float(x * down)), round(float(y * down))
        size = min(int(128 * down), 2100 - left, 1500 - top)
        truth, _ = TISSUE.region(Box(left, top, size, size))
        # A shift by two level-0 pixels would part these; JPEG and rounding do not.
        step = size // 8
        for i in range(8):
            line = truth[:, i * step : (i + 1) * step].mean(axis=(0, 1))
            columns = slice(round(i * step / down), round((i + 1) * step / down))
            rows = slice(0, round(size / down))
            assert np.abs(image[rows, columns].mean(axis=(0, 1)) - line).max() < 4


def test_source_keeps_the_slides_own_bytes(slide_path, tmp_path):
    out = tmp_path / "s1.zarr"
    summary = run(job(slide_path, out, codec="source", tissue=WHOLE))
    inside = 8 * 5  # whole tiles; a column and a row more reach over the border
    assert summary.note.startswith(f"{summary.tiles - inside} tiles at the border")
    shards = b"".join(p.read_bytes() for p in (out / "images" / "c").rglob("0") if p.is_file())
    with tifffile.TiffFile(slide_path) as tiff, slide_path.open("rb") as file:
        page = tiff.pages.first
        for row in range(5):
            file.seek(page.dataoffsets[9 * row])
            data = file.read(page.databytecounts[9 * row])
            scan = data[data.index(b"\xff\xda") :]
            assert scan in shards


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tile_size": 240}, r"--tile-size 240 is not .* 256 x 256 px at 0\.5 um/px or 256 x 256"),
        ({"tile_size": 512}, "--tile-size 512 is not"),
        (
            {"mpp": 1.0},
            r"--mpp 1 is not the resolution of one of its levels.*0\.5 um/px or .* 2 um",
        ),
    ],
    ids=["size", "two tiles", "mpp"],
)
def test_source_says_which_of_size_and_resolution_differs_and_what_fits(
    slide_path, tmp_path, options, words
):
    with pytest.raises(SourceTilesError, match=words) as caught:
        run(job(slide_path, tmp_path / "s.zarr", codec="source", **options))
    assert str(caught.value).startswith("slide 's1': --codec source: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("options", [{"tile_size": 240}, {"mpp": 1.0}, {"overlap": 16}])
def test_auto_is_delta_where_the_tiles_are_not_the_slides_own(slide_path, tmp_path, options):
    run(job(slide_path, tmp_path / "s.zarr", **options))
    assert TileStore.open(tmp_path / "s.zarr").codec == "delta"


def test_source_needs_jpeg_tiles(tmp_path):
    pixels, _ = TISSUE.region(Box(700, 500, 300, 300))
    Image.fromarray(pixels).save(tmp_path / "x.png")
    with pytest.raises(SourceTilesError, match="none of its levels has JPEG tiles"):
        run(job(tmp_path / "x.png", tmp_path / "x.zarr", codec="source", slide_mpp=0.5))


def test_source_on_the_real_slide_takes_its_own_tile_size(real_slide, tmp_path):
    with pytest.raises(SourceTilesError, match=r"its own tiles are 240 x 240 px at 0\.499 um/px"):
        run(job(real_slide, tmp_path / "a.zarr", codec="source"))
    run(job(real_slide, tmp_path / "a.zarr", codec="source", tile_size=240))
    run(job(real_slide, tmp_path / "b.zarr", codec="delta", tile_size=240))
    ours, same = (TileStore.open(tmp_path / f"{name}.zarr") for name in "ab")
    everything = range(ours.num_tiles)
    np.testing.assert_array_equal(ours.read_images(everything), same.read_images(everything))


@pytest.mark.parametrize("options", [{"stain": "macenko"}, {"overlap": 32}])
def test_source_goes_with_nothing_that_changes_pixels_or_grid(options):
    with pytest.raises(ConfigError, match=r"neither --stain-norm nor --overlap"):
        TileConfig(codec="source", **options)


def damaged(slide_path, folder):
    """A copy whose tile at (512, 512) ends in the middle, as after a bad block on a disk."""
    path = folder / "torn.tiff"
    path.write_bytes(slide_path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        offset, count = page.dataoffsets[2 * 9 + 2], page.databytecounts[2 * 9 + 2]
    with path.open("r+b") as file:
        file.seek(offset + count // 2)
        file.write(b"\0" * (count - count // 2))
    return path


@pytest.mark.parametrize("codec", ["auto", "delta", "source"])
def test_a_damaged_tile_fails_the_slide_and_is_never_a_dark_square(slide_path, tmp_path, codec):
    path = damaged(slide_path, tmp_path)
    with pytest.raises(SlideReadError, match=r"slide 'torn'.*x=512 y=512.*damaged"):
        run(job(path, tmp_path / "t.zarr", codec=codec, tissue=WHOLE))
    assert not (tmp_path / "t.zarr").exists()


def test_damage_inside_a_tile_fails_the_slide_unless_source_is_asked_for(slide_path, tmp_path):
    path = tmp_path / "bad.tiff"
    path.write_bytes(slide_path.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        offset, count = page.dataoffsets[2 * 9 + 2], page.databytecounts[2 * 9 + 2]
    with path.open("r+b") as file:
        file.seek(offset + count // 2)
        file.write(b"\xff\xd9" + b"\0" * 40)
    with pytest.raises(SlideReadError, match=r"slide 'bad'.*x=512 y=512.*damaged"):
        run(job(path, tmp_path / "a.zarr", tissue=WHOLE))
    run(job(path, tmp_path / "b.zarr", codec="source", tissue=WHOLE))
    store = TileStore.open(tmp_path / "b.zarr")
    with pytest.raises(StoreCorruptError, match="cannot be decoded"):
        store.read_images(range(store.num_tiles))


class Stop(Exception):
    pass


class StopsAfter(SilentProgress):
    """Ends the run after some shards, as a kill would, once they are on disk."""

    def __init__(self, shards):
        self.left = shards

    def advance(self, amount=1, *, note=""):
        self.left -= 1
        if self.left == 0:
            raise Stop


@pytest.mark.parametrize("codec", ["delta", "source"])
@pytest.mark.parametrize("shards", [1, 3])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_bytes(
    slide_path, tmp_path, monkeypatch, codec, shards
):
    for name in ("MAX_TILES_PER_SHARD", "SOURCE_TILES_PER_SHARD"):
        monkeypatch.setattr(f"wsiseg.store.tiles.{name}", 12)
    options = {"codec": codec, "tissue": WHOLE}
    with pytest.raises(Stop):
        run(job(slide_path, tmp_path / "a.zarr", **options), progress=StopsAfter(shards))
    assert not (tmp_path / "a.zarr").exists()
    run(job(slide_path, tmp_path / "a.zarr", threads=1, **options))
    run(job(slide_path, tmp_path / "b.zarr", threads=3, **options))
    assert contents(tmp_path / "a.zarr") == contents(tmp_path / "b.zarr")


def test_the_same_run_twice_is_done_once(slide_path, tmp_path):
    run(job(slide_path, tmp_path / "a.zarr", mpp=2.0))
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a.zarr").rglob("*")}
    assert run(job(slide_path, tmp_path / "a.zarr", mpp=2.0)).note == "already done"
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a.zarr").rglob("*")} == before


def test_only_tissue_is_tiled(slide_path, tmp_path):
    run(job(slide_path, tmp_path / "a.zarr", tile_size=64, min_tissue=0.5))
    store = TileStore.open(tmp_path / "a.zarr")
    images = store.read_images(range(store.num_tiles)).astype(int)
    colour = (images.max(axis=-1) - images.min(axis=-1)).mean(axis=(1, 2))
    assert (colour > 15).mean() > 0.97
    assert 0.3 < store.num_tiles / (33 * 24) < 0.8


def test_a_white_slide_has_no_tissue(tmp_path):
    Image.fromarray(np.full((700, 700, 3), 244, np.uint8)).save(tmp_path / "white.png")
    with pytest.raises(NoTissueError, match=r"slide 'white': no tissue found.*--tissue none"):
        run(job(tmp_path / "white.png", tmp_path / "w.zarr", slide_mpp=0.5))


def test_a_slide_smaller_than_a_tile_is_refused(tmp_path):
    Image.fromarray(np.full((100, 300, 3), 99, np.uint8)).save(tmp_path / "s.png")
    with pytest.raises(SlideTooSmallError, match=r"slide 's': 300 x 100 px.*--tile-size"):
        run(job(tmp_path / "s.png", tmp_path / "w.zarr", slide_mpp=0.5))


def with_labels(slide_path, tmp_path, labels, **config):
    Image.fromarray(labels).save(tmp_path / "mask.png")
    plain = job(slide_path, tmp_path / "l.zarr", tissue=WHOLE, **config)
    return TileJob(
        entry=plain.entry, config=plain.config, output=plain.output,
        label_image=tmp_path / "mask.png", classes=ClassTable.of_names(["Gland", "Vessel"]),
    )  # fmt: skip


@pytest.mark.parametrize("codec", ["delta", "source"])
def test_labels_travel_with_their_tiles(slide_path, tmp_path, codec):
    _, truth = TISSUE.region(Box(0, 0, 2100, 1500))
    run(with_labels(slide_path, tmp_path, truth, codec=codec))
    store = TileStore.open(tmp_path / "l.zarr")
    labels = store.read_labels(range(store.num_tiles))
    for (x, y), tile_labels in zip(store.origins, labels, strict=True):
        np.testing.assert_array_equal(tile_labels, truth[y : y + 256, x : x + 256])


def test_labelled_only_keeps_what_is_labelled(slide_path, tmp_path):
    labels = np.full((1500, 2100), 255, np.uint8)
    labels[300:310, 600:610] = 1
    run(with_labels(slide_path, tmp_path, labels, labelled_only=True))
    assert TileStore.open(tmp_path / "l.zarr").origins.tolist() == [[512, 256]]


def test_no_labelled_tile_is_an_error(slide_path, tmp_path):
    labels = np.full((1500, 2100), 255, np.uint8)
    with pytest.raises(AnnotationError, match="no tissue tile holds a labelled pixel"):
        run(with_labels(slide_path, tmp_path, labels, labelled_only=True))


def test_the_command_prints_no_warning(wsiseg, slide_path, tmp_path):
    """Not that of zarr either, that other programs may not know numcodecs.delta."""
    arguments = ("tile", slide_path, "-o", tmp_path, "--codec", "delta", "--mpp", 2.0)
    for again in (False, True):
        result = wsiseg(*arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert ("already done" in result.stdout) == again
