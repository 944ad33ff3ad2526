"""Frozen dataclasses from plain JSON or YAML values and back, with errors that name the field."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def from_plain(kind: type[T], content: Any, where: str) -> T:
    """Build a dataclass, nested ones included.

    Args:
        kind: the dataclass.
        content: mapping of its fields, as a parser gives them.
        where: what to call it in errors, such as a file name.

    Raises:
        ValueError: a field is unknown, missing or of the wrong sort, or the dataclass refuses its values.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {type(content).__name__}")
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(content) - set(hints))
    if unknown:
        raise ValueError(f"{where}: unknown field {', '.join(map(str, unknown))}; known: {', '.join(sorted(hints))}")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    required = {f.name for f in fields if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(content))
    if missing:
        raise ValueError(f"{where}: missing field {', '.join(missing)}")
    values = {name: _value(hints[name], value, f"{where}.{name}") for name, value in content.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def to_plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as dicts, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
        for option in options[:-1]:
            try:
                return _value(option, value, where)
            except ValueError:
                continue
        return _value(options[-1], value, where)
    if dataclasses.is_dataclass(hint):
        return from_plain(typing.cast(type, hint), value, where)
    if origin is tuple:
        _check(isinstance(value, (list, tuple)), where, "a list", value)
        return tuple(_value(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        _check(isinstance(value, Mapping), where, "a mapping", value)
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float:
        _check(not isinstance(value, bool), where, "a number", value)
        try:
            return float(value)  # YAML reads 1e-4 as text
        except (TypeError, ValueError):
            _check(False, where, "a number", value)
    if hint in (int, bool, str):
        _check(type(value) is hint, where, {int: "a whole number", bool: "true or false", str: "text"}[hint], value)
    return value


def _check(ok: bool, where: str, expected: str, value: Any) -> None:
    if not ok:
        raise ValueError(f"{where}: expected {expected}, got {value!r}")


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields of a YAML file.

    Raises:
        OSError: it cannot be read.
        ImportError: PyYAML is not installed.
        ValueError: not YAML, or not a mapping.
    """
    import yaml  # here: what only runs trackers does without it

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of fields, got {type(content).__name__}")
    return content


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes`: mappings are merged, at any depth; everything else is replaced."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The fields of a YAML file, and of the one that its `base` names, where it has not got them itself.

    Args:
        path: `base` is relative to its folder.
        above: files that started from this one.

    Raises:
        OSError, ImportError: as `read_yaml`.
        ValueError: as `read_yaml`; there is no such base; or files start from each other.
    """
    path = path.resolve()
    if path in above:
        raise ValueError(f"{path}: recipes that start from each other: {', '.join(file.name for file in above)}")
    content = read_yaml(path)
    base = content.pop("base", None)
    if base is None:
        return content
    if not (path.parent / str(base)).is_file():
        raise ValueError(f"{path}: there is no recipe {base} to start from; correct `base`")
    return merged(read_recipe(path.parent / str(base), (*above, path)), content)
