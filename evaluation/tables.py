"""Tables of finished runs: by tracker, by attribute, by sequence, and the benchmarks' own numbers."""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.layouts import LAYOUTS
from evaluation.metrics import STATES, mean_row
from evaluation.official import SCORINGS, overall
from evaluation.onepass import official_run, summarise
from evaluation.records import RECORDS, Record, read_record, records_of

MEANS = {
    "auc": "AUC",
    "sr50": "SR50",
    "sr75": "SR75",
    "precision20": "precision@20",
    "norm_precision": "norm precision@.2",
    "ao": "AO",
    "ms_median": "ms median",
    "ms_p95": "ms p95",
}
STATE_COLUMNS = {
    f"{kind}_{state.lower()}": title
    for state in STATES
    for kind, title in (("share", state), ("hit", f"on target in {state}"))
}


@dataclass(frozen=True)
class Table:
    """A titled table: the first column is text, floats are written with three decimals."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True, eq=False)
class Runs:
    """Every tracker's records of the same sequences.

    Attributes:
        records: by tracker, then by sequence; every tracker has the same sequences.
        left_out: sequences that not every tracker has finished.
    """

    records: Mapping[str, Mapping[str, Record]]
    left_out: tuple[str, ...]

    @functools.cached_property
    def trackers(self) -> tuple[str, ...]:
        """Names, the best mean AUC first."""
        scores = {name: mean_row(self.rows(name))["auc"] for name in self.records}
        return tuple(sorted(scores, key=lambda name: -scores[name]))

    @property
    def sequences(self) -> tuple[str, ...]:
        """Names in alphabetical order."""
        return tuple(sorted(next(iter(self.records.values()))))

    @functools.cached_property
    def _rows(self) -> dict[str, list[dict[str, float]]]:
        return {
            tracker: [summarise(runs[name].result, runs[name].sequence) for name in self.sequences]
            for tracker, runs in self.records.items()
        }

    def rows(self, tracker: str) -> list[dict[str, float]]:
        """`evaluation.onepass.summarise` of each sequence, in the order of `sequences`."""
        return self._rows[tracker]


def load_runs(folders: Sequence[Path], root: Path | None = None, trackers: Sequence[str] = ()) -> Runs:
    """Read the records in folders of results.

    Args:
        folders: written by ``evaluation.ope --out``; where two hold a tracker of one name, the folder's name is put
            before it, or as much of its path as tells them apart.
        root: the data set's folder, where it has moved since.
        trackers: only these; all when empty.

    Raises:
        FileNotFoundError: a folder holds no results, or the trackers have no sequence in common.
        ValueError: a record cannot be read, or a tracker's records are of two models or settings.
    """
    found: dict[str, dict[str, Record]] = {}
    sources: list[tuple[Path, str]] = []
    for folder in folders:
        names = _trackers(folder)
        if not names:
            raise FileNotFoundError(f"no results in {folder}; expected the --out folder of python -m evaluation.ope")
        sources += [(folder, name) for name in names if not trackers or name in trackers]
    for title, (folder, name) in zip(_titles(sources), sources, strict=True):
        records = [read_record(file, root) for file in records_of(folder, name)]
        _check_one_model(folder / RECORDS / name, records)
        found[title] = {record.header.sequence: record for record in records}
    common = set.intersection(*(set(records) for records in found.values())) if found else set()
    if not common:
        raise FileNotFoundError(f"the trackers {', '.join(found) or '(none)'} have no finished sequence in common")
    left_out = sorted(set().union(*found.values()) - common)
    shared = {title: {name: records[name] for name in common} for title, records in found.items()}
    _check_same_truth(shared)
    return Runs(shared, tuple(left_out))


def tables(runs: Runs) -> list[Table]:
    """Everything there is to say in numbers, the most important first."""
    parts = [_means(runs), *_official(runs), _by_attribute(runs), _by_sequence(runs), _states(runs)]
    return [part for part in parts if part.rows]


def write_rows(path: Path, runs: Runs) -> None:
    """A CSV with a row for each tracker and sequence, and one called ``mean`` for each tracker."""
    rows: list[dict[str, Any]] = []
    for tracker in runs.trackers:
        scores = runs.rows(tracker)
        for name, score in zip(runs.sequences, scores, strict=True):
            rows.append({"tracker": tracker, "sequence": name, **score})
        rows.append({"tracker": tracker, "sequence": "mean", **mean_row(scores)})
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{v:.4f}" if isinstance(v, float) else v for key, v in row.items()})


def markdown(parts: Sequence[Table]) -> str:
    """Tables as a Markdown page."""
    blocks = [(f"## {part.title}", part.note, markdown_table(part.columns, part.rows)) for part in parts]
    return "\n\n".join(text for block in blocks for text in block if text) + "\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], decimals: int = 3) -> str:
    """A Markdown table; floats with `decimals` decimals, NaN as a dash, numbers right-aligned."""
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    for row in rows:
        cells = [f"{cell:.{decimals}f}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append("| " + " | ".join("-" if cell == "nan" else cell for cell in cells) + " |")
    return "\n".join(lines)


def _means(runs: Runs) -> Table:
    rows = tuple((name, *(mean_row(runs.rows(name))[key] for key in MEANS)) for name in runs.trackers)
    frames = int(sum(row["frames"] for row in runs.rows(runs.trackers[0])))
    note = (
        f"One pass over {len(runs.sequences)} sequences, {frames} scored frames; every sequence counts the same. The "
        "first frame and frames without truth are left out."
    )
    if runs.left_out:
        note += f" Not finished by every tracker, and left out: {', '.join(runs.left_out)}."
    return Table("Mean", note, ("tracker", *MEANS.values()), rows)


def _official(runs: Runs) -> list[Table]:
    """A table for each benchmark that the sequences belong to."""
    parts = []
    for layout in sorted({record.header.layout for record in runs.records[runs.trackers[0]].values()}):
        name = LAYOUTS[layout].scoring
        if name is None:
            continue
        scoring, rows = SCORINGS[name], []
        for tracker in runs.trackers:
            mine = [r for r in runs.records[tracker].values() if r.header.layout == layout]
            total = overall(scoring, [scoring.score(official_run(r.result, r.sequence)) for r in mine])
            rows.append((tracker, *(total[column] for column in scoring.columns)))
        note = (
            f"{len(mine)} sequences, counted as {name} counts, for comparison with published tables of the same "
            "sequences (see docs/evaluation.md)."
        )
        parts.append(Table(f"Benchmark's own numbers: {layout}", note, ("tracker", *scoring.columns), tuple(rows)))
    return parts


def _by_attribute(runs: Runs) -> Table:
    """Mean AUC of the sequences that have an attribute, a row an attribute."""
    first = runs.records[runs.trackers[0]]
    names = sorted({attribute for record in first.values() for attribute in record.header.attributes})
    rows = []
    for attribute in names:
        chosen = [i for i, name in enumerate(runs.sequences) if attribute in first[name].header.attributes]
        means = (mean_row([runs.rows(tracker)[i] for i in chosen])["auc"] for tracker in runs.trackers)
        rows.append((attribute, len(chosen), *means))
    return Table("AUC by attribute", "", ("attribute", "sequences", *runs.trackers), tuple(rows))


def _by_sequence(runs: Runs) -> Table:
    auc = {name: [row["auc"] for row in runs.rows(name)] for name in runs.trackers}
    frames = [int(row["frames"]) for row in runs.rows(runs.trackers[0])]
    rows = [(name, frames[i], *(auc[tracker][i] for tracker in runs.trackers)) for i, name in enumerate(runs.sequences)]
    return Table("AUC by sequence", "", ("sequence", "frames", *runs.trackers), tuple(rows))


def _states(runs: Runs) -> Table:
    rows = tuple((name, *(mean_row(runs.rows(name))[key] for key in STATE_COLUMNS)) for name in runs.trackers)
    note = "Share of frames in each state, and of those the share whose box is on the target (IoU above 0.3)."
    return Table("States", note, ("tracker", *STATE_COLUMNS.values()), rows)


def _trackers(folder: Path) -> list[str]:
    records = folder / RECORDS
    names = sorted(path.name for path in records.iterdir()) if records.is_dir() else []
    return [name for name in names if records_of(folder, name)]


def _titles(sources: Sequence[tuple[Path, str]]) -> list[str]:
    """Names of trackers, with as many of their folder's last parts before them as makes each of them the only one."""
    paths = [(*folder.resolve().parts, name) for folder, name in sources]
    titles = []
    for path in paths:
        twins = [other for other in set(paths) - {path} if other[-1] == path[-1]]
        parts = next(n for n in range(1, len(path) + 1) if all(other[-n:] != path[-n:] for other in twins))
        titles.append("/".join(path[-parts:]))
    return titles


def _check_one_model(folder: Path, records: Sequence[Record]) -> None:
    models = {record.header.fingerprint: record.header.sequence for record in records}
    if len(models) > 1:
        (a, on_a), (b, on_b), *_ = models.items()
        raise ValueError(
            f"{folder} holds results of several models or settings ({on_a}: {a}; {on_b}: {b}); run python -m "
            "evaluation.ope with --rerun, or delete those that do not belong"
        )


def _check_same_truth(records: Mapping[str, Mapping[str, Record]]) -> None:
    first, *others = records
    for name, record in records[first].items():
        for other in others:
            if records[other][name].header.digest != record.header.digest:
                raise ValueError(f"{first} and {other} were run on different data called {name}: run one of them again")
