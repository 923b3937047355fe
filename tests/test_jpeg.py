"""A tile of a TIFF becomes a JPEG that decodes alone, to the same pixels, or not at all."""

import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.geometry import Box
from wsiseg.jpeg import (
    TileStreams,
    check_jpeg,
    complete_jpeg,
    decode_jpeg,
    encode_jpeg,
    read_frame,
)
from wsiseg.synthetic import SyntheticTissue

PIXELS, _ = SyntheticTissue(width_px=800, height_px=800).region(Box(300, 300, 96, 64))


def block_means(pixels, factor):
    height, width, _ = pixels.shape
    blocks = pixels.reshape(height // factor, factor, width // factor, factor, 3)
    return (blocks.sum(axis=(1, 3), dtype=int) + factor**2 // 2) // factor**2


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize(("sampling", "rms", "most"), [("444", 0.6, 4), ("420", 1.2, 30)])
def test_shrinking_while_decoding_gives_the_means_of_blocks(sampling, rms, most, factor):
    data = simplejpeg.encode_jpeg(PIXELS, quality=85, colorsubsampling=sampling)
    assert read_frame(data).is_mean_when_scaled
    whole = decode_jpeg(data, width_px=96, height_px=64)
    small = decode_jpeg(data, width_px=96, height_px=64, factor=factor)
    error = small - block_means(whole, factor)
    assert np.sqrt(np.mean(error**2)) < rms
    assert np.abs(error).max() <= most


def test_colour_sampled_differently_along_the_axes_is_not_shrunk_while_decoding():
    data = simplejpeg.encode_jpeg(PIXELS, colorsubsampling="422")
    assert not read_frame(data).is_mean_when_scaled


def test_the_page_says_what_the_samples_are_whatever_the_stream_hints():
    jfif = encode_jpeg(PIXELS, 90)
    assert b"JFIF" in jfif
    alone = complete_jpeg(jfif, None, "rgb")
    assert b"JFIF" not in alone
    assert simplejpeg.decode_jpeg_header(alone)[2] == "RGB"
    back = complete_jpeg(alone, None, "ycbcr")
    np.testing.assert_array_equal(
        decode_jpeg(back, width_px=96, height_px=64), decode_jpeg(jfif, width_px=96, height_px=64)
    )


def test_tables_of_the_page_are_put_into_the_tile(real_slide):
    with tifffile.TiffFile(real_slide) as tiff, real_slide.open("rb") as file:
        page = tiff.pages.first
        file.seek(page.dataoffsets[40])
        tile = file.read(page.databytecounts[40])
        with pytest.raises(ValueError, match=r"(?i)table"):
            decode_jpeg(tile, width_px=240, height_px=240)
        alone = complete_jpeg(tile, page.jpegtables, "rgb")
        pixels = decode_jpeg(alone, width_px=240, height_px=240)
        streams = TileStreams(page.jpegtables, "rgb")
        same = streams.decode(tile, width_px=240, height_px=240)
        wanted, _, _ = page.decode(tile, 40, jpegtables=page.jpegtables)
        assert wanted is not None
    np.testing.assert_array_equal(pixels, wanted[0])
    np.testing.assert_array_equal(pixels, same)


@given(cut=st.floats(0, 0.98), flip=st.integers(0, 7))
@settings(max_examples=60, deadline=None)
def test_a_tile_that_is_cut_off_is_an_error_and_not_grey(cut, flip):
    data = encode_jpeg(PIXELS, 90)
    part = data[: int(cut * len(data))]
    with pytest.raises(ValueError, match=r"."):
        decode_jpeg(part, width_px=96, height_px=64)
    with pytest.raises(ValueError, match=r"JPEG"):
        complete_jpeg(part, None, "ycbcr")


def is_refused(function, data):
    try:
        function(data, width_px=96, height_px=64)
    except ValueError:
        return True
    return False


STREAMS = [
    encode_jpeg(PIXELS, 90),
    simplejpeg.encode_jpeg(PIXELS, quality=80, colorsubsampling="420"),
    simplejpeg.encode_jpeg(PIXELS, quality=85, colorsubsampling="422"),
    complete_jpeg(encode_jpeg(PIXELS, 70), None, "rgb"),
    imagecodecs.jpeg8_encode(PIXELS, level=85, subsampling="420", optimize=True),
]


@given(which=st.integers(0, len(STREAMS) - 1), changes=st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=3))  # fmt: skip
@settings(max_examples=1500, deadline=None)
def test_a_check_refuses_what_decoding_refuses_and_nothing_else(which, changes):
    data = bytearray(STREAMS[which])
    for place, value in changes:
        data[int(place * len(data))] = value
    damaged = bytes(data)
    assert is_refused(check_jpeg, damaged) == is_refused(decode_jpeg, damaged)


def test_tiles_that_begin_alike_and_tiles_that_do_not_are_each_completed():
    streams = TileStreams(None, "ycbcr")
    for data in (*STREAMS[:3], *STREAMS[:3], STREAMS[0], STREAMS[0][:4] + STREAMS[1][4:]):
        assert streams.complete(data) == complete_jpeg(data, None, "ycbcr")


@given(data=st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_noise_is_an_error(data):
    for stream in (data, b"\xff\xd8" + data, b"\xff\xd8\xff\xc0" + data):
        with pytest.raises(ValueError, match=r"."):
            decode_jpeg(stream, width_px=96, height_px=64)


def test_a_stream_of_another_size_is_refused_before_it_is_decoded():
    data = bytearray(encode_jpeg(PIXELS, 90))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = b"\xff\xff\xff\xff"
    with pytest.raises(ValueError, match="65535 x 65535 px, not 96 x 64"):
        decode_jpeg(bytes(data), width_px=96, height_px=64)
