"""Slides as paths, globs, folders and tables; a table that contradicts itself is refused."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.errors import CohortError
from wsiseg.slides.cohort import Cohort, CohortEntry, resolve_slides

HEADER = "slide_id,patient_id,path,mpp,annotation,split\n"


def table(folder, text, name="cohort.csv"):
    path = folder / name
    path.write_text(text)
    return path


def test_a_table_is_read_as_it_stands(tmp_path):
    lines = ["a,p1,x/a.svs,0.25,a.geojson,train", ",,b.ndpi,,,", '"c",p2,/q/c.tif,,,val', ""]
    path = table(tmp_path, HEADER + "\n".join(lines))
    assert Cohort.from_csv(path).entries == (
        CohortEntry(
            slide_id="a", patient_id="p1", path=tmp_path / "x/a.svs", mpp=0.25,
            annotation=tmp_path / "a.geojson", split="train",
        ),
        CohortEntry(slide_id="b", path=tmp_path / "b.ndpi"),
        CohortEntry(slide_id="c", patient_id="p2", path=Path("/q/c.tif"), split="val"),
    )  # fmt: skip


def test_a_table_of_a_spreadsheet_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "c.csv"
    path.write_bytes(b"\xef\xbb\xbfpath,slide_id\r\na.svs,x\r\n")
    assert Cohort.from_csv(path).entries[0].slide_id == "x"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEADER, "names no slide"),
        ("slide_id,mpp\na,1\n", "no column 'path'"),
        ("path,pateint_id\na.svs,1\n", "unknown column.*did you mean 'patient_id'"),
        ("path,path\na.svs,b.svs\n", "column 'path' twice"),
        (HEADER + "a,p,,,,\n", "line 2: path ''"),
        (HEADER + "a,p,a.svs,0,,\n", "line 2: mpp '0' is not a number from"),
        (HEADER + "a,p,a.svs,nan,,\n", "line 2: mpp 'nan'"),
        (HEADER + "a,p,a.svs,-0.25,,\n", "line 2: mpp '-0.25'"),
        (HEADER + 'a,p,a.svs,"0,25",,\n', "line 2: mpp '0,25'"),
        (HEADER + "a,p,a.svs,250,,\n", "line 2: mpp '250'"),
        (HEADER + "a,p,a.svs,,,training\n", "line 2: split 'training' is not one of train"),
        (HEADER + "a/b,p,a.svs,,,\n", "line 2: slide_id 'a/b' cannot be the name"),
        (HEADER + "..,p,a.svs,,,\n", "line 2: slide_id '..' cannot be the name"),
        (HEADER + "a,p,a.svs,,,,more\n", "line 2: has more values"),
        (HEADER + "a,p,a.svs,,,\na,p,b.svs,,,\n", "line 3: slide_id 'a' stands for two slides"),
        (
            HEADER + "a,p,a.svs,,,train\nb,p,b.svs,,,val\n",
            "line 3: one patient is in two splits: slide 'a' in train",
        ),
    ],
)
def test_a_table_that_is_wrong_says_where(tmp_path, text, words):
    with pytest.raises(CohortError, match=words) as caught:
        Cohort.from_csv(table(tmp_path, text))
    assert "cohort.csv" in str(caught.value)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    path = tmp_path / "c.csv"
    path.write_bytes(b"\xff\xfe\x00path")
    with pytest.raises(CohortError, match="cannot be read as a CSV table"):
        Cohort.from_csv(path)


@given(
    splits=st.lists(
        st.tuples(st.sampled_from("pqrs"), st.sampled_from(["train", "val", "test", None])),
        min_size=1, max_size=8,
    )
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_no_patient_is_ever_in_two_splits(tmp_path_factory, splits):
    lines = [f"s{i},{p},s{i}.svs,,,{split or ''}\n" for i, (p, split) in enumerate(splits)]
    named = {(p, split) for p, split in splits if split}
    is_sound = len(named) == len({p for p, _ in named})
    path = table(tmp_path_factory.mktemp("c"), HEADER + "".join(lines))
    if is_sound:
        assert len(Cohort.from_csv(path).entries) == len(splits)
    else:
        with pytest.raises(CohortError, match="is in two splits"):
            Cohort.from_csv(path)


@pytest.fixture
def folder(tmp_path):
    for name in ("b.svs", "a.tiff", "c.PNG", ".hidden.svs", "notes.txt", "x.svs.partial"):
        (tmp_path / name).touch()
    return tmp_path


def names(cohort):
    return [entry.path.name for entry in cohort.entries]


def test_a_folder_gives_its_slides_by_name(folder):
    assert names(resolve_slides([folder])) == ["a.tiff", "b.svs", "c.PNG"]


def test_a_glob_gives_what_matches_and_nothing_unfinished(folder):
    assert names(resolve_slides([f"{folder}/*.svs*"])) == [".hidden.svs", "b.svs"]
    assert names(resolve_slides([f"{folder}/[bc].*"])) == ["b.svs", "c.PNG"]


def test_a_name_with_brackets_is_a_file_before_it_is_a_glob(folder):
    (folder / "s[1].svs").touch()
    assert names(resolve_slides([folder / "s[1].svs"])) == ["s[1].svs"]


def test_a_slide_named_twice_is_one_slide_and_a_missing_one_is_kept(folder):
    found = resolve_slides([folder / "b.svs", f"{folder}/b.*", folder / "gone.svs"])
    assert names(found) == ["b.svs", "gone.svs"]


def test_a_table_among_paths_brings_its_own_resolution(folder):
    path = table(folder, "path,mpp\nb.svs,0.25\na.tiff,\n")
    found = resolve_slides([path, folder / "c.PNG"], slide_mpp=0.5)
    assert [entry.mpp for entry in found.entries] == [0.25, 0.5, 0.5]


@pytest.mark.parametrize(
    ("pattern", "words"), [("*.mrxs", "no file matches"), ("empty", "holds no slide")]
)
def test_nothing_found_is_an_error(folder, pattern, words):
    (folder / "empty").mkdir()
    with pytest.raises(CohortError, match=words):
        resolve_slides([folder / pattern])


def test_two_slides_of_one_name_must_be_told_apart(folder):
    (folder / "b.tiff").touch()
    with pytest.raises(CohortError, match=r"slide_id 'b' stands for two slides.*cohort CSV"):
        resolve_slides([folder])
