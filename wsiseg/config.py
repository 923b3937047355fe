"""YAML and flags to frozen dataclasses: one default, one help text, one place.

A setting is a dataclass field made with `setting(default, help)`. The command line generates its
options from these fields, the YAML file only carries values. Precedence: default < file < flag.
An unknown key is an error with a suggestion; nothing is ever executed or guessed from a file.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml

from wsiseg.errors import ConfigError

ConfigT = TypeVar("ConfigT")
Scalar = str | int | float | bool | None

MAX_CONFIG_BYTES = 1_000_000
"""A configuration is a page of text; a larger file is not one and is refused before parsing."""


def setting(
    default: Any,  # noqa: ANN401 - the type stands on the field itself
    help: str,
    *,
    flag: bool | str = True,
    choices: tuple[str, ...] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    affects_result: bool = True,
) -> Any:  # noqa: ANN401 - dataclasses.field is typed the same way
    """Declare one configuration field.

    Parameters
    ----------
    default
        The one default. A dataclass instance makes a nested section.
    help
        What it is, its unit, and why the default is what it is.
    flag
        True gives `--the-field-name`; a string gives further spellings ("-b"), separated by
        spaces; False keeps it off the command line (`--set section.key=value` still reaches it).
    choices, minimum, maximum
        Checked for every source.
    affects_result
        False for settings such as worker counts, which change speed but never the output: they
        are left out of `digest`, so that a run may be resumed with other values.
    """
    metadata = {
        "help": help,
        "flag": flag,
        "choices": choices,
        "minimum": minimum,
        "maximum": maximum,
        "affects_result": affects_result,
    }
    return dataclasses.field(default=default, metadata=metadata)


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses duplicate keys and aliases (which can expand without bound)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            msg = "aliases (*name) are not supported in a configuration file"
            raise ConfigError(msg)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(getattr(key_node, "value", key_node))
            if key in seen:
                msg = f"key {key!r} occurs twice (line {key_node.start_mark.line + 1})"
                raise ConfigError(msg)
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _parse_yaml(text: str) -> Any:  # noqa: ANN401 - whatever the file holds
    """Return the plain value of a YAML text; `_Loader` builds nothing else."""
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping safely.

    Raises
    ------
    ConfigError
        The file is missing, larger than `MAX_CONFIG_BYTES`, not UTF-8 YAML, or not a mapping.
    """
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            msg = f"config '{path}': {size} bytes, the limit is {MAX_CONFIG_BYTES}; not a config?"
            raise ConfigError(msg)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        msg = f"config '{path}': cannot be read: {error}"
        raise ConfigError(msg) from error
    try:
        data = _parse_yaml(text)
    except ConfigError as error:
        msg = f"config '{path}': {error}"
        raise ConfigError(msg) from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        msg = f"config '{path}': not valid YAML: {error}"
        raise ConfigError(msg) from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        msg = f"config '{path}': expected sections like 'tile:', found a {type(data).__name__}"
        raise ConfigError(msg)
    return data


def check_known_keys(
    keys: typing.Iterable[object], known: typing.Iterable[str], where: str
) -> None:
    """Raise ConfigError for the first key that is not known, with the nearest known one."""
    known = list(known)
    for key in keys:
        if key in known:
            continue
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(sorted(known))}"
        msg = f"{where}: unknown key {key!r}; {hint}"
        raise ConfigError(msg)


def build(cls: type[ConfigT], values: Mapping[str, Any], *, where: str) -> ConfigT:
    """Make a frozen config from plain values, checking every key, type, choice and range.

    `where` names the source in messages ("config 'nuclei.yaml', section tile").
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type] # any dataclass
    check_known_keys(values, fields, where)
    hints = typing.get_type_hints(cls)
    parsed: dict[str, Any] = {}
    for name, value in values.items():
        field = fields[name]
        place = f"{where}: {name}"
        if dataclasses.is_dataclass(hints[name]):
            parsed[name] = _parse_section(value, hints[name], place)
        else:
            parsed[name] = _parse(value, hints[name], place)
            _check_limits(parsed[name], field.metadata, place)
    try:
        return cls(**parsed)
    except ConfigError as error:
        msg = f"{where}: {error}"
        raise ConfigError(msg) from error


def _parse_section(value: Any, hint: Any, place: str) -> Any:  # noqa: ANN401 - values come from YAML
    if not isinstance(value, Mapping):
        msg = f"{place}: expected a section, got {value!r}"
        raise ConfigError(msg)
    return build(hint, value, where=place)


def _parse(value: Any, hint: Any, place: str) -> Any:  # noqa: ANN401 - values come from YAML
    """Return `value` as the type `hint`, or raise ConfigError; no silent conversions."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(value, hint, place)
    if origin is tuple:
        return _parse_tuple(value, hint, place)
    if origin is typing.Literal:
        allowed = typing.get_args(hint)
        if value in allowed:
            return value
        msg = f"{place}: {value!r} is not one of {', '.join(map(repr, allowed))}"
        raise ConfigError(msg)
    if hint is Path and isinstance(value, str | Path):
        return Path(value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _finite(float(value), place)
    if isinstance(hint, type) and type(value) is hint:
        return value
    msg = f"{place}: expected {getattr(hint, '__name__', hint)}, got {value!r}"
    raise ConfigError(msg)


def _parse_union(value: Any, hint: Any, place: str) -> Any:  # noqa: ANN401 - values come from YAML
    options = [o for o in typing.get_args(hint) if o is not type(None)]
    if value is None and len(options) < len(typing.get_args(hint)):
        return None
    failure: ConfigError | None = None
    for option in options:
        try:
            parse = _parse_section if dataclasses.is_dataclass(option) else _parse
            return parse(value, option, place)
        except ConfigError as error:
            failure = error
    raise failure or ConfigError(f"{place}: {value!r} is not allowed")


def _parse_tuple(value: Any, hint: Any, place: str) -> tuple[Any, ...]:  # noqa: ANN401 - YAML
    if not isinstance(value, list | tuple):
        msg = f"{place}: expected a list, got {value!r}"
        raise ConfigError(msg)
    item_hint = typing.get_args(hint)[0]
    return tuple(_parse(item, item_hint, f"{place}[{i}]") for i, item in enumerate(value))


def _finite(value: float, place: str) -> float:
    if not math.isfinite(value):
        msg = f"{place}: must be a finite number, got {value}"
        raise ConfigError(msg)
    return value


def _check_limits(value: Any, metadata: Mapping[str, Any], place: str) -> None:  # noqa: ANN401 - YAML
    choices, low, high = (metadata.get(k) for k in ("choices", "minimum", "maximum"))
    if value is None:
        return
    if choices is not None and value not in choices:
        msg = f"{place}: {value!r} is not one of {', '.join(choices)}"
        raise ConfigError(msg)
    for item in value if isinstance(value, tuple) else (value,):
        if low is not None and item < low:
            msg = f"{place}: must be >= {low}, got {item}"
            raise ConfigError(msg)
        if high is not None and item > high:
            msg = f"{place}: must be <= {high}, got {item}"
            raise ConfigError(msg)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` laid on top; nested mappings merge key by key."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(below, value)
        else:
            merged[key] = value
    return merged


def parse_assignments(assignments: typing.Iterable[str]) -> dict[str, Any]:
    """Turn `["model.dim=32"]` (from `--set`) into nested values; values are YAML scalars."""
    result: dict[str, Any] = {}
    for assignment in assignments:
        path, sep, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not sep or not all(keys):
            msg = f"--set {assignment[:80]!r}: expected section.key=value"
            raise ConfigError(msg)
        try:
            value = _parse_yaml(text)
        except (yaml.YAMLError, ConfigError, RecursionError, ValueError) as error:
            msg = f"--set {assignment[:80]!r}: not a YAML value: {error}"
            raise ConfigError(msg) from error
        for key in reversed(keys):
            value = {key: value}
        result = merge(result, value)
    return result


def to_dict(config: object) -> dict[str, Any]:
    """Return a config as plain JSON values (paths as strings, tuples as lists)."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config), default=str))  # type: ignore[call-overload] # any dataclass
    return plain


def result_settings(config: object) -> dict[str, Any]:
    """Return only the settings that can change the result; see `setting(affects_result=)`."""
    kept: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type] # any dataclass
        if not field.metadata.get("affects_result", True):
            continue
        value = getattr(config, field.name)
        is_section = dataclasses.is_dataclass(value)
        kept[field.name] = result_settings(value) if is_section else value
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return plain


def digest(values: object) -> str:
    """Return the sha256 of the canonical JSON of plain values, as 64 hex digits."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
