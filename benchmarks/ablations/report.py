"""Finished runs as a CSV, a row a run, and as a section of the page, with the seeds' spread beside every difference."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import markdown_table
from benchmarks.ablations.runs import Clips, Result
from benchmarks.ablations.tables import Table
from benchmarks.accuracy import HARDEST

MEASURES: dict[str, Callable[[Result], float]] = {
    "dev AUC": lambda result: result.dev_auc,
    f"dev AUC without {HARDEST}": lambda result: result.dev_auc_without_hardest,
    "held-out AUC": lambda result: result.held_out_auc,
}
PAGE = """# The papers' ablations, small

How this was made and how to read it: [docs/ablations.md](../../docs/ablations.md).

"""


def csv_rows(table: Table, results: Sequence[Result]) -> list[dict[str, Any]]:
    """A CSV row for every run: its measures, then the AUC of each sequence.

    Raises:
        ValueError: the runs were evaluated on different sequences.
    """
    check_same_sequences(results)
    return [
        {
            "row": result.row,
            "label": table.row(result.row).label,
            "seed": result.seed,
            **{re.sub(r"\W", "_", name.lower()): measure(result) for name, measure in MEASURES.items()},
            **{f"dev/{name}": auc for name, auc in result.dev.items()},
            **{f"held_out/{name}": auc for name, auc in result.held_out.items()},
            "fingerprint": result.fingerprint,
            "commit": result.commit,
        }
        for result in results
    ]


def check_same_sequences(results: Sequence[Result], clips: Clips | None = None) -> None:
    """Refuse to compare runs that were not evaluated on the same sequences.

    Args:
        results: the runs.
        clips: what further runs will be evaluated on; None where there are none to come.

    Raises:
        ValueError: as said.
    """
    if not results:
        return
    first = {*results[0].dev, *results[0].held_out}
    others = [(f"row {r.row}, seed {r.seed} was evaluated on", {*r.dev, *r.held_out}) for r in results]
    if clips is not None:
        others.append(("the data has", {sequence.name for sequence in (*clips.dev, *clips.held_out)}))
    for what, sequences in others:
        if sequences != first:
            raise ValueError(
                f"{what} other sequences than row {results[0].row}, seed {results[0].seed} was evaluated on "
                f"(in one only: {', '.join(sorted(sequences ^ first))}); evaluate all again with --evaluate-only"
            )


def section(table: Table, results: Sequence[Result], command_line: str) -> str:
    """Markdown: each row's means with their spread, then the differences.

    Raises:
        ValueError: the runs were evaluated on different sequences.
    """
    check_same_sequences(results)
    of = {row.name: [result for result in results if result.row == row.name] for row in table.rows}
    recipe = table.recipe_of(table.rows[0], table.seeds[0])
    means = [
        [row.label, row.paper, len(of[row.name]), *(spread([m(r) for r in of[row.name]]) for m in MEASURES.values())]
        for row in table.rows
    ]
    differences = []
    for row in table.rows:
        other = table.compared_with(row)
        if other is not None:
            pairs = [([m(r) for r in of[row.name]], [m(r) for r in of[other.name]]) for m in MEASURES.values()]
            paper = signed(row.paper - other.paper)
            differences.append([f"{row.label}, against {other.label}", paper, *(verdict(*pair) for pair in pairs)])
    commits = sorted({re.sub(r"^(\w{10})\w*", r"\1", result.commit) or "unknown" for result in results})
    parts = [
        f"## {table.title}",
        f"`{command_line}`; recipe `{table.recipe}`, {recipe['epochs'] * recipe['pairs_per_epoch']} pairs a run, "
        f"code {', '.join(commits)}. Success AUC: mean over the seeds (lowest to highest). Thresholds are not "
        "calibrated: the tracker never calls a target lost, so that boxes alone are compared.",
        markdown_table(["row", f"paper: {table.measure}", "seeds", *MEASURES], means),
        "What a row brings. Within the spread: no more than the larger range over the seeds of the two rows compared.",
        markdown_table(["difference", f"paper: {table.measure}", *MEASURES], differences),
    ]
    return "\n\n".join(parts) + "\n"


def spread(values: Sequence[float]) -> str:
    """``mean (lowest to highest)``; a dash for no value, and no range for one."""
    if not values:
        return "-"
    return f"{fmean(values):.3f}" + (f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else "")


def verdict(ours: Sequence[float], others: Sequence[float]) -> str:
    """The difference of two rows' means, and whether it is more than the seeds alone make.

    It is when it exceeds the larger of both rows' ranges, highest less lowest over the seeds.
    """
    if not ours or not others:
        return "-"
    difference = fmean(ours) - fmean(others)
    if min(len(ours), len(others)) < 2:
        return f"{signed(difference)}, spread unknown: a row has one seed"
    noise = max(max(values) - min(values) for values in (ours, others))
    return f"{signed(difference)}, " + (
        "more than the seeds' spread" if abs(difference) > noise else "within the seeds' spread"
    )


def signed(value: float) -> str:
    """With its sign and three decimals; a dash for NaN."""
    return "-" if value != value else f"{value:+.3f}"


def put_section(path: Path, name: str, text: str) -> None:
    """Replace the section called `name` of the page at `path`, or add it at the end; other sections stay."""
    page = path.read_text(encoding="utf-8") if path.exists() else PAGE
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
    before, _, rest = page.partition(begin)
    after = rest.partition(end)[2]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(before + begin + text + end + after, encoding="utf-8")
