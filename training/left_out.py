"""What readers of large data sets leave out, counted by reason."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from training.tracks import NumberedFrames, Track


@dataclass
class LeftOut:
    """Counts, by reason, of the annotations that a reader could not use."""

    counts: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str, number: int = 1) -> None:
        """Count some more."""
        if number:
            self.counts[reason] += number

    def warn(self, path: Path) -> None:
        """One warning with all counts, if there are any."""
        if self.counts:
            reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(self.counts.items()))
            warnings.warn(f"{path}: left out {reasons}", stacklevel=3)


def existing(name: str, frames: NumberedFrames, left_out: LeftOut) -> Iterator[Track]:
    """A track, if its first and its last image are there: a half-unpacked video would end a run days later."""
    if all(Path(frames[i].image).exists() for i in (0, -1)):  # type: ignore[arg-type]
        yield Track(name, frames, frames.numbers)  # type: ignore[arg-type]
    else:
        left_out.add("without an image", len(frames))
