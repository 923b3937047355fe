"""A DICOM's table of frames is held against its frames before OpenSlide reads one."""

import struct

import pytest
from reliability.mutants import tissue_image
from reliability.vendor_slides import HEIGHT, WIDTH, write_dicom

from wsiseg.errors import SlideOpenError
from wsiseg.slides import dicom_frames
from wsiseg.slides.dicom_frames import check_dicom
from wsiseg.slides.reader import open_slide

FRAMES = 20


@pytest.fixture
def dicom(tmp_path):
    """Return a slide and the offset of its table's first entry."""
    path = tmp_path / "a.dcm"
    pixels_at, _ = write_dicom(path, tissue_image(WIDTH, HEIGHT))
    return path, pixels_at - 4 * FRAMES


def put(path, at, value):
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, at, value)
    path.write_bytes(data)


def test_a_whole_slide_passes_and_is_read(dicom):
    path, _ = dicom
    check_dicom(path)
    with open_slide(path) as slide:
        assert slide.meta.level_sizes == ((WIDTH, HEIGHT),)


@pytest.mark.parametrize("value", [0, 1, 7, 8, 255, 2**16, 2**31, 2**32 - 1])
@pytest.mark.parametrize("frame", [1, 7, 19])
def test_an_offset_where_no_frame_is_is_refused(dicom, frame, value):
    path, table_at = dicom
    put(path, table_at + 4 * frame, value)
    with pytest.raises(SlideOpenError, match=r"slide 'a': its table says that frame \d+ lies at"):
        open_slide(path)


@pytest.mark.parametrize("num_bytes", [3, 81, 2**31, 2**32 - 1])
def test_a_table_of_an_absurd_length_is_refused(dicom, num_bytes):
    path, table_at = dicom
    put(path, table_at - 4, num_bytes)
    with pytest.raises(ValueError, match=f"its table of frames claims {num_bytes} bytes"):
        check_dicom(path)


def test_a_file_that_ends_within_its_table_is_refused(dicom):
    path, table_at = dicom
    path.write_bytes(path.read_bytes()[: table_at + 10])
    with pytest.raises(ValueError, match="it ends within its table of frames"):
        check_dicom(path)


def test_of_more_frames_than_are_looked_at_the_order_is_checked(dicom, monkeypatch):
    path, table_at = dicom
    monkeypatch.setattr(dicom_frames, "MAX_FRAMES_READ", 4)
    check_dicom(path)
    put(path, table_at + 4 * 7, 5)
    with pytest.raises(ValueError, match="frame 7 lies at 5"):
        check_dicom(path)


def test_what_is_no_dicom_or_has_no_frames_passes(tmp_path):
    path = tmp_path / "a.dcm"
    for content in (b"", b"II*\0", bytes(128) + b"DICM", bytes(128) + b"DICM" + bytes(3 << 20)):
        path.write_bytes(content)
        check_dicom(path)
