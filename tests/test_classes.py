"""The table of classes."""

import pytest

from wsiseg.classes import ClassTable, TissueClass
from wsiseg.errors import ConfigError


def test_labels_follow_the_order_and_background_is_zero():
    table = ClassTable.of_names(["Tumor", "Stroma"])
    assert table.names == ("Background", "Tumor", "Stroma")
    assert table.num_labels == 3
    assert table.by_label(2).name == "Stroma"
    assert table.by_name("Tumor") == table.classes[0]
    assert table.by_name("Fat") is None


def test_a_table_survives_the_round_trip():
    table = ClassTable((TissueClass(1, "Gland", (1, 2, 3)),), roi="Region*", ignore=("Artefact",))
    assert ClassTable.from_dict(table.to_dict(), where="t") == table


def test_a_table_is_read_from_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("classes:\n  - name: Nucleus\n    color: [0, 0, 255]\n  - Gland\nroi: ROI\n")
    table = ClassTable.from_yaml(path)
    assert table.classes[0].color == (0, 0, 255)
    assert (table.classes[1].name, table.roi) == ("Gland", "ROI")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"classes": []}, "needs a list 'classes'"),
        ({"classes": ["a"], "rio": "x"}, "did you mean 'roi'"),
        ({"classes": [3]}, r"classes\[0\]: expected a name"),
        ({"classes": ["a", "a"]}, "unique names"),
        ({"classes": ["a: b"]}, "QuPath reads it as a derived class"),
        ({"classes": ["a\nb"]}, "without control characters"),
        ({"classes": [" "]}, "1 to 200 characters"),
        ({"classes": [{"name": "a", "color": [1, 2]}]}, "three whole numbers"),
        ({"classes": [{"name": "a", "color": [1, 2, 300]}]}, "three numbers 0..255"),
        ({"classes": [{"name": "a", "colour": [1, 2, 3]}]}, "did you mean 'color'"),
        ({"classes": ["a"], "ignore": "x"}, "ignore a list of names"),
    ],
)
def test_a_wrong_table_is_refused_with_the_reason(data, message):
    with pytest.raises(ConfigError, match=message):
        ClassTable.from_dict(data, where="t")
