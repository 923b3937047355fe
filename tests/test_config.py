"""YAML and flags to frozen dataclasses."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsiseg.config import (
    build,
    digest,
    merge,
    parse_assignments,
    read_yaml,
    result_settings,
    setting,
    to_dict,
)
from wsiseg.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Inner:
    rate: float = setting(0.5, "A rate.", minimum=0.0, maximum=1.0)
    sizes: tuple[int, ...] = setting((1, 2), "Sizes.", minimum=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    count: int = setting(3, "A count.", minimum=1)
    kind: str = setting("a", "A kind.", choices=("a", "b"))
    mode: Literal["x", "y"] = setting("x", "A mode.")
    file: Path | None = setting(None, "A file.")
    workers: int = setting(1, "Workers.", affects_result=False)
    inner: Inner = setting(Inner(), "A section.")
    other: Inner | None = setting(None, "A section that may be left out.")


def test_values_reach_nested_sections():
    config = build(Outer, {"count": 5, "inner": {"rate": 1, "sizes": [3]}}, where="t")
    assert (config.count, config.inner.rate, config.inner.sizes) == (5, 1.0, (3,))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({"cuont": 1}, r"t: unknown key 'cuont'; did you mean 'count'\?", id="typo"),
        pytest.param({"zzz": 1}, r"unknown key 'zzz'; known keys: count", id="unknown"),
        pytest.param(
            {"inner": {"rat": 1}}, r"t: inner: unknown key 'rat'; did you mean 'rate'", id="nested"
        ),
        pytest.param({"count": 0}, r"t: count: must be >= 1, got 0", id="minimum"),
        pytest.param({"inner": {"rate": 2}}, r"rate: must be <= 1.0, got 2", id="maximum"),
        pytest.param({"inner": {"sizes": [1, 0]}}, r"sizes: must be >= 1, got 0", id="item"),
        pytest.param({"kind": "c"}, r"kind: 'c' is not one of a, b", id="choice"),
        pytest.param({"mode": "z"}, r"mode: 'z' is not one of 'x', 'y'", id="literal"),
        pytest.param({"count": "5"}, r"count: expected int, got '5'", id="string"),
        pytest.param({"count": True}, r"count: expected int, got True", id="bool"),
        pytest.param({"count": 1.5}, r"count: expected int, got 1.5", id="float"),
        pytest.param({"inner": {"rate": float("nan")}}, r"must be a finite number", id="nan"),
        pytest.param({"other": 3}, r"other: expected a section, got 3", id="no optional section"),
        pytest.param({"other": {"rat": 1}}, r"other: unknown key 'rat'; did", id="optional"),
        pytest.param({"inner": 3}, r"inner: expected a section, got 3", id="no section"),
        pytest.param({"inner": {"sizes": 3}}, r"sizes: expected a list, got 3", id="no list"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(values, message):
    with pytest.raises(ConfigError, match=message):
        build(Outer, values, where="t")


@pytest.mark.parametrize("other", [None, {}, {"rate": 0.75}])
def test_to_dict_and_build_are_inverse(other):
    values = {"file": "a/b", "inner": {"rate": 0.25}, "other": other}
    config = build(Outer, values, where="t")
    assert config.other == (None if other is None else Inner(**other))
    assert build(Outer, to_dict(config), where="t") == config


def test_settings_that_only_change_speed_stay_out_of_the_digest():
    one, two = (result_settings(build(Outer, {"workers": n}, where="t")) for n in (1, 8))
    assert digest(one) == digest(two)
    assert "workers" not in one


def test_flags_win_over_the_file_key_by_key():
    assert merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}}) == {"a": {"x": 1, "y": 3}}


def test_assignments_are_yaml_values_in_nested_sections():
    assert parse_assignments(["inner.rate=0.1", "inner.sizes=[4, 5]", "kind=b"]) == {
        "inner": {"rate": 0.1, "sizes": [4, 5]},
        "kind": "b",
    }


@pytest.mark.parametrize("text", ["rate", "=1", "a..b=1", ".a=1"])
def test_an_assignment_without_key_or_value_is_refused(text):
    with pytest.raises(ConfigError, match=r"expected section\.key=value"):
        parse_assignments([text])


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


LAUGHS = "a: &a [x]\n" + "".join(
    f"{c}: &{c} [*{p}, *{p}]\n" for p, c in zip("abcdefg", "bcdefgh", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("a: !!python/object/apply:os.system ['true']", "not valid YAML", id="object"),
        pytest.param("a: !!python/name:os.system", "not valid YAML", id="name"),
        pytest.param(LAUGHS, r"aliases .* are not supported", id="billion laughs"),
        pytest.param("a: 1\na: 2", r"key 'a' occurs twice \(line 2\)", id="duplicate"),
        pytest.param("- 1", "expected sections like 'tile:', found a list", id="list"),
        pytest.param("[" * 3000, "not valid YAML", id="depth"),
        pytest.param(b"\xff\xfe\x00", "cannot be read", id="not text"),
        pytest.param("a: [1", "not valid YAML", id="syntax"),
        pytest.param("a: 2026-13-45", "not valid YAML", id="impossible date"),
        pytest.param(b"#" * 1_000_001, "the limit is 1000000", id="huge"),
    ],
)
def test_a_hostile_file_is_refused_without_running_anything(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_yaml(write(tmp_path, text))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none.yaml': cannot be read"):
        read_yaml(tmp_path / "none.yaml")


@given(st.binary(max_size=300))
def test_any_bytes_give_a_mapping_or_a_config_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("fuzz") / "c.yaml"
    path.write_bytes(data)
    try:
        assert isinstance(read_yaml(path), dict)
    except ConfigError as error:
        assert "c.yaml" in str(error)
