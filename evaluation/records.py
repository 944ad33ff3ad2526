"""Result files: what a tracker did on a sequence, so that it need not be done again.

``OUT/boxes/TRACKER/SEQUENCE.csv`` is the record everything else is made from: a header line of JSON (what was run, on
what, in which frames) and a row a frame with the tracker's box and the true one. It is written whole or not at all.
Beside it lie the text forms that public toolkits read:

* ``OUT/pysot/TRACKER/SEQUENCE.txt``: ``x,y,w,h`` a row, 0-based, the given box first;
* ``OUT/got10k/TRACKER/SEQUENCE/SEQUENCE_001.txt`` and ``SEQUENCE_time.txt``: the same boxes, and seconds a frame;
* ``OUT/trackingnet/TRACKER/SEQUENCE.txt``: the same; zip a tracker's folder to submit it.
"""

from __future__ import annotations

import csv
import io
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.layouts import SequenceRef
from evaluation.onepass import Result
from evaluation.sequences import Sequence

RECORDS = "boxes"
FORMS = ("pysot", "got10k", "trackingnet")
COLUMNS = ("image", "x", "y", "w", "h", "score", "state", "ms", "true_x", "true_y", "true_w", "true_h", "visible")
VERSION = 1


@dataclass(frozen=True)
class Header:
    """First line of a record.

    Attributes:
        tracker: name of the tracker.
        fingerprint: hash of its model and tracking parameters (`evaluation.trackers.TrackerSpec.fingerprint`).
        sequence: name of the sequence.
        layout: name of its layout.
        digest: hash of its truth, visibility and image names (`SequenceRef.digest`).
        root: the data set's folder when it was run.
        images: folder of its images, relative to that.
        size_px: width and height of the images.
        start: index of the frame the tracker was started on.
        frames: rows of the record.
        attributes: what the sequence is an example of.
        version: of this format.
    """

    tracker: str
    fingerprint: str
    sequence: str
    layout: str
    digest: str
    root: str
    images: str
    size_px: tuple[int, int]
    start: int
    frames: int
    attributes: tuple[str, ...]
    version: int = VERSION


@dataclass(frozen=True, eq=False)
class Record:
    """A finished run as it was read back from its file."""

    header: Header
    sequence: Sequence
    result: Result


def record_path(out: Path, tracker: str, sequence: str) -> Path:
    """Where a record lies below the folder of results."""
    return out / RECORDS / tracker / f"{sequence}.csv"


def records_of(out: Path, tracker: str) -> list[Path]:
    """All records of a tracker below the folder of results, by name."""
    return sorted((out / RECORDS / tracker).glob("*.csv"))


def write_record(
    out: Path, tracker: str, fingerprint: str, ref: SequenceRef, sequence: Sequence, result: Result
) -> Path:
    """Write a run's record and its text forms; returns the record's path."""
    path = record_path(out, tracker, ref.name)
    header = Header(
        tracker=tracker,
        fingerprint=fingerprint,
        sequence=ref.name,
        layout=ref.layout,
        digest=ref.digest(),
        root=str(ref.root.resolve()),
        images=os.path.relpath(ref.images, ref.root),
        size_px=result.size_px,
        start=result.start,
        frames=len(sequence.frames),
        attributes=sequence.attributes,
    )
    text = io.StringIO()
    text.write("# " + json.dumps(asdict(header)) + "\n")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    visible = sequence.has_truth if sequence.visible is None else sequence.visible
    for index, image in enumerate(sequence.frames):
        box = [f"{value:.4f}" for value in result.boxes_xywh[index]]
        truth = [f"{value:.4f}" for value in sequence.truth_xywh[index]]
        scores = [f"{result.scores[index]:.4f}", result.states[index], f"{1000 * result.seconds[index]:.3f}"]
        writer.writerow([image.name, *box, *scores, *truth, int(visible[index])])
    # The forms first: a record says that all is there.
    for form in FORMS:
        _write_form(out / form / tracker, form, ref.name, result)
    _write(path, text.getvalue())
    return path


def delete_record(path: Path) -> None:
    """Delete a record and the text forms beside it."""
    tracker, sequence, out = path.parent.name, path.stem, path.parents[2]
    path.unlink()
    for form in FORMS:
        for file in _form_files(out / form / tracker, form, sequence):
            file.unlink(missing_ok=True)


def write_attributes(path: Path, attributes: tuple[str, ...]) -> None:
    """Put other attributes into a record; what the tracker did stays."""
    first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    header = {**json.loads(first.removeprefix("# ")), "attributes": attributes}
    _write(path, f"# {json.dumps(header)}\n{rest}")


def read_header(path: Path) -> Header | None:
    """The header of a record; None where the file is missing, of another format, or cut short."""
    try:
        with path.open(encoding="utf-8") as file:
            fields: dict[str, Any] = json.loads(file.readline().removeprefix("# "))
            rows = sum(1 for _ in file) - 1
        if fields.get("version") != VERSION or fields.get("frames") != rows:
            return None
        fields["size_px"] = (int(fields["size_px"][0]), int(fields["size_px"][1]))
        return Header(**{**fields, "attributes": tuple(fields["attributes"])})
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def read_record(path: Path, root: Path | None = None) -> Record:
    """Read a record back.

    Args:
        path: its file.
        root: the data set's folder, where it is not what it was when the record was written.

    Raises:
        ValueError: not a complete record of this version.
    """
    header = read_header(path)
    if header is None:
        raise ValueError(f"{path} is not a complete result of this version; delete it and run the evaluation again")
    with path.open(encoding="utf-8", newline="") as file:
        file.readline()
        rows = list(csv.DictReader(file))
    if not rows or tuple(rows[0]) != COLUMNS:
        raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}; delete it and run the evaluation again")

    def numbers(*columns: str) -> NDArray[np.float64]:
        return np.array([[float(row[column]) for column in columns] for row in rows])

    folder = (root or Path(header.root)) / header.images
    visible = numbers("visible")[:, 0] > 0
    sequence = Sequence(
        header.sequence,
        tuple(folder / row["image"] for row in rows),
        numbers("true_x", "true_y", "true_w", "true_h"),
        visible,
        header.attributes,
    )
    states = tuple(row["state"] for row in rows)
    seconds = numbers("ms")[:, 0] / 1000
    boxes = numbers("x", "y", "w", "h")
    result = Result(boxes, numbers("score")[:, 0], states, seconds, header.start, header.size_px)
    return Record(header, sequence, result)


def _write_form(folder: Path, form: str, name: str, result: Result) -> None:
    boxes, *times = _form_files(folder, form, name)
    _write(boxes, "".join(",".join(f"{value:.4f}" for value in box) + "\n" for box in result.boxes_xywh))
    for path in times:
        _write(path, "".join(f"{value:.8f}\n" for value in result.seconds))


def _form_files(folder: Path, form: str, name: str) -> list[Path]:
    """The file of boxes, and for GOT-10k that of seconds."""
    if form == "got10k":
        return [folder / name / f"{name}_001.txt", folder / name / f"{name}_time.txt"]
    return [folder / f"{name}.txt"]


def _write(path: Path, text: str) -> None:
    """Write a file whole or not at all: a run that is killed leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
