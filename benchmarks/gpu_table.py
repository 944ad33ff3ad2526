"""The table of `benchmarks.gpu_check`: what was checked, and with what result."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks import markdown_table


@dataclass(frozen=True)
class Check:
    """A line of the table.

    Attributes:
        check: what was looked at.
        subject: of which model, precision and engine.
        measured: what came out.
        wanted: what had to.
        result: "pass", "FAIL" or "skipped".
    """

    check: str
    subject: str
    measured: str
    wanted: str
    result: str


@dataclass
class Table:
    """Collects checks; a check that raises has failed."""

    checks: list[Check] = field(default_factory=list)

    def add(self, check: str, subject: str, measured: str, wanted: str, passed: bool) -> None:
        """A check that was made."""
        self._add(Check(check, subject, measured, wanted, "pass" if passed else "FAIL"))

    def skip(self, check: str, subject: str, reason: str) -> None:
        """A check that cannot be made here."""
        self._add(Check(check, subject, reason, "", "skipped"))

    @contextlib.contextmanager
    def attempt(self, check: str, subject: str) -> Iterator[None]:
        """Whatever is raised inside is a failure of this check, and the next ones go on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self._add(Check(check, subject, f"{type(error).__name__}: {error}", "no error", "FAIL"))

    @property
    def ok(self) -> bool:
        """Nothing failed, and something passed."""
        results = {check.result for check in self.checks}
        return "FAIL" not in results and "pass" in results

    def text(self) -> str:
        """Markdown."""
        rows = [(c.check, c.subject, c.measured, c.wanted, c.result) for c in self.checks]
        return markdown_table(["check", "of", "measured", "wanted", ""], rows)

    def _add(self, check: Check) -> None:
        self.checks.append(check)
        print(f"{check.result:8}{check.check}: {check.subject}: {check.measured}", flush=True)
