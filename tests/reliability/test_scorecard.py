"""The scorecard counts, and never claims what was not looked for."""

import pytest
from reliability.scorecard import Scorecard


def test_rows_add_up_and_untouched_rows_are_not_run():
    card = Scorecard()
    card.add("kills survived")
    card.add("kills survived", 1999)
    card.add("silent corruptions", 0)
    lines = {line[:22].strip(): line[22:].strip() for line in card.lines()}
    assert lines["kills survived"] == "2,000"
    assert lines["silent corruptions"] == "0"
    assert lines["PHI leaks"] == "not run"


def test_what_must_be_zero_and_is_not_stands_out():
    card = Scorecard()
    card.add("parent deaths", 2)
    assert any(line.startswith("parent deaths") and "must be 0" in line for line in card.lines())


def test_a_misspelt_row_is_refused():
    with pytest.raises(KeyError, match="no row of the scorecard"):
        Scorecard().add("kils survived")
