"""An ablation table: one YAML file, which is a base recipe, a short schedule, and what each row changes."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from siamtrack.plain import from_plain, merged, read_recipe, read_yaml

CHECKOUT = Path(__file__).resolve().parents[2]

Recipe = dict[str, Any]
"""Plain fields of a `training.recipe.Recipe`. Training runs as a program of its own, which checks them."""


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Attributes:
        name: what options, folders and the CSV call it: lower-case letters, digits and dashes.
        label: what the table calls it.
        paper: the paper's value for it; NaN where the paper has none.
        against: name of the row that it is compared with; empty for the table's first.
        model_config: merged into the recipe's, as the two others.
        objective_config: see `model_config`.
        labels: merged into the recipe's ``data.labels``.
    """

    name: str
    label: str
    paper: float = float("nan")
    against: str = ""
    model_config: dict[str, Any] = field(default_factory=dict)
    objective_config: dict[str, Any] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9-]+", self.name):
            raise ValueError(f"name must be of lower-case letters, digits and dashes, got {self.name!r}")


@dataclass(frozen=True)
class Table:
    """A table; `read_table` makes it from a file.

    Attributes:
        name: the file's, without its suffix.
        title: heading, with the paper and the table's number in it.
        measure: what the rows' `Row.paper` are.
        recipe: base recipe, relative to the checkout.
        schedule: merged into the recipe, for every row alike.
        seeds: a run each.
        rows: the first is the baseline.
    """

    name: str
    title: str
    measure: str
    recipe: str
    schedule: dict[str, Any]
    seeds: tuple[int, ...]
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds must name at least one run, got none")
        names = [row.name for row in self.rows]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"rows must be there and have names of their own, got {', '.join(names) or 'none'}")
        for row in self.rows:
            if row.against and row.against not in names:
                raise ValueError(f"row {row.name} is against {row.against!r}; expected one of {', '.join(names)}")

    def row(self, name: str) -> Row:
        """The row of that name.

        Raises:
            ValueError: there is none.
        """
        for row in self.rows:
            if row.name == name:
                return row
        raise ValueError(f"no row {name!r} in {self.name}; expected one of {', '.join(row.name for row in self.rows)}")

    def compared_with(self, row: Row) -> Row | None:
        """The row that `row` is compared with; None for the baseline itself."""
        other = self.row(row.against or self.rows[0].name)
        return None if other is row else other

    def recipe_of(self, row: Row, seed: int) -> Recipe:
        """The recipe of one run.

        Raises:
            OSError: the base recipe cannot be read.
        """
        base = read_recipe(CHECKOUT / self.recipe)
        changes = {
            "seed": seed,
            "model_config": row.model_config,
            "objective_config": row.objective_config,
            "data": {"labels": row.labels},
        }
        return merged(merged(base, self.schedule), changes)


def read_table(path: Path) -> Table:
    """Read a table's file.

    Raises:
        OSError: it cannot be read.
        ValueError: unknown or missing fields, or values that cannot be.
    """
    return from_plain(Table, {"name": path.stem, **read_yaml(path)}, str(path))


def fingerprint(recipe: Recipe) -> str:
    """Hash of a run's whole recipe: what a finished run must have been made from to count for the table."""
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
