"""Checks that the configuration dataclasses share."""

from __future__ import annotations

from collections.abc import Iterable


def one_of(name: str, value: str, choices: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def not_negative(**values: float) -> None:
    """Raise ValueError for a value under 0 or not a number."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
