"""The folder of a training run: taken up by the same run only, and never anybody else's."""

import pytest

from tests.stores_on_disk import run_info, write_tiles
from wsiseg.errors import OutputExistsError, OutputLockedError, StoreError
from wsiseg.settings.training import PretrainConfig
from wsiseg.training.runs import open_run, open_stores, store_inputs


def opened(path, *, overwrite=False, **config):
    return open_run(
        path, run_info(**config), PretrainConfig(), section="pretrain", overwrite=overwrite
    )


def test_a_run_is_taken_up_by_the_same_settings(tmp_path):
    for _ in range(2):
        with opened(tmp_path / "run", a=1) as run:
            assert not run.is_finished
            (run.path / "kept").touch()
    assert (tmp_path / "run" / "kept").exists()
    assert "pretrain:" in (tmp_path / "run" / "config.yaml").read_text()


def test_other_settings_are_refused_with_the_difference(tmp_path):
    with opened(tmp_path / "run", a=1):
        pass
    with (
        pytest.raises(OutputExistsError, match=r"(?s)run.*a.*1 -> 2"),
        opened(tmp_path / "run", a=2),
    ):
        pass


def test_overwriting_begins_anew(tmp_path):
    with opened(tmp_path / "run", a=1) as run:
        (run.path / "old").touch()
    with opened(tmp_path / "run", a=2, overwrite=True) as run:
        assert not run.is_finished
        assert not (run.path / "old").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_somebody_else_is_never_touched(tmp_path, overwrite):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(OutputExistsError, match="exists and is not a run of wsiseg; choose another"),
        opened(tmp_path / "run", overwrite=overwrite),
    ):
        pass
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_what_a_kill_in_the_first_moment_leaves_is_no_obstacle(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json.partial").touch()
    with opened(tmp_path / "run") as run:
        assert not run.is_finished


def test_a_folder_with_a_model_is_finished_and_loses_its_resume_points(tmp_path):
    with opened(tmp_path / "run") as run:
        (run.path / "model.json").write_text("{}")
        (run.path / "resume").mkdir()
    (tmp_path / "run" / "resume").mkdir(exist_ok=True)
    with opened(tmp_path / "run") as run:
        assert run.is_finished
    assert not (tmp_path / "run" / "resume").exists()


def test_one_process_at_a_time_has_a_run(tmp_path):
    with (
        opened(tmp_path / "run"),
        pytest.raises(OutputLockedError, match="run' is locked by pid"),
        opened(tmp_path / "run"),
    ):
        pass


def test_a_run_needs_a_store():
    with pytest.raises(StoreError, match="no tile store given; make some with `wsiseg tile`"):
        open_stores([])


def test_stores_are_known_by_their_content(tmp_path):
    stores = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        stores.append(open_stores([write_tiles(tmp_path / folder / "s1.zarr")]))
    assert store_inputs(stores[0]) == store_inputs(stores[1])
    changed = open_stores([write_tiles(tmp_path / "s1.zarr", num=9)])
    assert store_inputs(changed) != store_inputs(stores[0])
