"""T5: no patient is learned from and judged on, whatever the cohort looks like."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from soak import examples

from wsiseg.errors import CohortError
from wsiseg.slides.cohort import Cohort
from wsiseg.training.data import named_splits, split_groups

SPLIT = st.sampled_from([None, None, "train", "val", "test"])
PATIENT = st.one_of(st.none(), st.integers(0, 6).map("P{}".format))
ROWS = st.lists(st.tuples(PATIENT, SPLIT), min_size=1, max_size=40)


@examples(pr=1_000, night=20_000)
@given(rows=ROWS, val_fraction=st.floats(0.05, 0.9), seed=st.integers(0, 2**31))
def test_no_patient_is_in_two_splits(tmp_path_factory, rows, val_fraction, seed):
    path = tmp_path_factory.getbasetemp() / "cohort.csv"
    lines = [f"s{i},{patient or ''},s{i}.svs,{s or ''}" for i, (patient, s) in enumerate(rows)]
    path.write_text("slide_id,patient_id,path,split\n" + "\n".join(lines) + "\n")
    by_patient: dict[str, set[str]] = {}
    for patient, split in rows:
        if patient is not None and split is not None:
            by_patient.setdefault(patient, set()).add(split)
    if any(len(splits) > 1 for splits in by_patient.values()):
        with pytest.raises(CohortError, match="one patient is in two splits"):
            Cohort.from_csv(path)
        return
    entries = Cohort.from_csv(path).entries
    groups = named_splits((entry.group_id, entry.split) for entry in entries)
    splits = split_groups(groups, val_fraction=val_fraction, seed=seed)
    of_patient: dict[str, set[str]] = {}
    for entry, (patient, named) in zip(entries, rows, strict=True):
        key = patient or f"slide {entry.slide_id}"
        of_patient.setdefault(key, set()).add(splits[entry.group_id])
        if named is not None:
            assert splits[entry.group_id] == named
    assert all(len(found) == 1 for found in of_patient.values())
