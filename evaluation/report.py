"""One page that shows how trackers did: tables, plots, and frames of the sequences they did best and worst on.

    python -m evaluation.report DIR... [--sequences DATA] [--out PAGE.html]

DIR is what ``python -m evaluation.ope --out`` wrote; several are compared. The page is a single file without links to
anything. The success and precision plots are also written beside it, as SVG.
"""

from __future__ import annotations

import argparse
import base64
import html
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from evaluation.metrics import PIXELS, THRESHOLDS, precision_curve, success_curve
from evaluation.onepass import scored_frames
from evaluation.plots import Line, line_plot, line_style
from evaluation.records import Record
from evaluation.sequences import read_frame
from evaluation.tables import Runs, Table, load_runs, tables
from siamtrack.boxes import iou_xywh
from siamtrack.drawing import contact_sheet
from siamtrack.version import __version__

STRIP_FRAMES = 6
TILE_PX = 320
JPEG_QUALITY = 80
TRUTH_COLOUR = "#ffffff"

STYLE = """
body { font: 15px/1.5 sans-serif; color: #222; margin: 2em auto; max-width: 1120px; padding: 0 1em; }
h1 { font-size: 1.6em; } h2 { font-size: 1.25em; margin-top: 2em; } h3 { font-size: 1.05em; margin-bottom: .3em; }
table { border-collapse: collapse; margin: .8em 0; } .wide { overflow-x: auto; }
th, td { padding: .25em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { border-bottom: 2px solid #999; }
figure { margin: 0 0 1.4em; } img { max-width: 100%; display: block; }
.plots { display: flex; flex-wrap: wrap; gap: 1em; } .note { color: #555; }
.key { display: inline-block; width: .9em; height: .9em; vertical-align: -.1em; margin: 0 .3em 0 1em; }
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0, or 2 where there are no results to show."""
    options = _parser().parse_args(arguments)
    page = options.out or options.folders[0] / "report.html"
    try:
        runs = load_runs(options.folders, options.sequences)
        figures = curves(runs)
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(build_page(runs, figures, options.strips), encoding="utf-8")
        for name, figure in figures.items():
            page.with_name(f"{page.stem}_{name}.svg").write_text(figure, encoding="utf-8")
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"wrote {page}")
    return 0


def curves(runs: Runs) -> dict[str, str]:
    """Success and precision plot over all sequences, every sequence counting the same; SVG by name."""
    success, precision = [], []
    for tracker in runs.trackers:
        over_iou, over_px = [], []
        for record in runs.records[tracker].values():
            boxes, truth = _scored(record)
            if len(boxes):
                over_iou.append(success_curve(iou_xywh(boxes, truth)))
                over_px.append(precision_curve(boxes, truth))
        if over_iou:
            means = np.mean(over_iou, axis=0), np.mean(over_px, axis=0)
            success.append(Line(f"{tracker} [{means[0].mean():.3f}]", THRESHOLDS, means[0]))
            precision.append(Line(f"{tracker} [{means[1][20]:.3f}]", PIXELS, means[1]))
    if not success:
        return {}
    return {
        "success": line_plot(success, "Success [AUC]", "IoU threshold", "share of frames above", (0, 1)),
        "precision": line_plot(
            precision, "Precision [at 20 px]", "centre error, px", "share of frames within", (0, 50)
        ),
    }


def build_page(runs: Runs, figures: dict[str, str], strips: int) -> str:
    """The page as HTML; `strips` is how many of the best and of the worst sequences are shown."""
    trackers = runs.trackers
    title = f"{', '.join(trackers[:3])}{' and others' * (len(trackers) > 3)} on {len(runs.sequences)} sequences"
    parts = [f"<h1>{html.escape(title)}</h1>"]
    first, *others = tables(runs)
    parts += [_table(first), f'<div class="plots">{"".join(figures.values())}</div>', *map(_table, others)]
    auc = np.nan_to_num([row["auc"] for row in runs.rows(trackers[0])])
    order = [runs.sequences[i] for i in np.argsort(-auc, kind="stable")]
    strips = min(strips, (len(order) + 1) // 2)
    missing: list[str] = []
    for heading, names in (("Best", order[:strips]), ("Worst", order[-strips:][::-1] if strips else [])):
        chosen = [name for name in names if heading == "Best" or name not in order[:strips]]
        if chosen:
            parts.append(f"<h2>{heading} sequences of {html.escape(trackers[0])}</h2>{_key(trackers)}")
        parts += [_sequence(runs, name, missing) for name in chosen]
    if missing:
        note = f"No images found for {', '.join(missing)}: give the data set's folder with --sequences."
        parts.append(f'<p class="note">{html.escape(note)}</p>')
    parts.append(f'<p class="note">siamtrack {__version__}</p>')
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{chr(10).join(parts)}</body></html>\n'


def strip(records: Sequence[Record], count: int = STRIP_FRAMES) -> NDArray[np.uint8]:
    """Evenly spaced frames of one sequence with the true box and every tracker's, uint8 ``[H, W, 3]`` BGR.

    Args:
        records: one for each tracker, of the same sequence.
        count: frames.

    Raises:
        ValueError: an image does not decode.
    """
    sequence, start = records[0].sequence, records[0].result.start
    chosen = np.unique(np.linspace(start, len(sequence.frames) - 1, count).round().astype(int)).tolist()
    images, captions = [], []
    for index in chosen:
        image = read_frame(sequence.frames[index])
        truth = sequence.truth_xywh[index]
        thickness = max(round(image.shape[1] / TILE_PX * 1.5), 1)
        if sequence.has_truth[index]:
            _draw(image, truth, TRUTH_COLOUR, thickness)
        overlaps = []
        for number, record in enumerate(records):
            box = record.result.boxes_xywh[index]
            _draw(image, box, line_style(number)[0], thickness)
            overlaps.append(f"{iou_xywh(box, truth):.2f}" if sequence.has_truth[index] else "-")
        images.append(image)
        captions.append(f"frame {index}, IoU {' / '.join(overlaps)}")
    return contact_sheet(images, captions, columns=3, tile_width=TILE_PX)


def _sequence(runs: Runs, name: str, missing: list[str]) -> str:
    """Strip and IoU over time of one sequence; appends the name to `missing` where its images are not found."""
    records = [runs.records[tracker][name] for tracker in runs.trackers]
    position = runs.sequences.index(name)
    scores = ", ".join(f"{runs.rows(tracker)[position]['auc']:.3f}" for tracker in runs.trackers)
    parts = [f"<h3>{html.escape(name)}: AUC {scores}</h3>"]
    if records[0].sequence.frames[records[0].result.start].is_file():
        sheet = strip(records)
        data = cv2.imencode(".jpg", sheet, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()
        encoded = base64.b64encode(data).decode("ascii")
        parts.append(f'<img alt="frames of {html.escape(name)}" src="data:image/jpeg;base64,{encoded}">')
    else:
        missing.append(name)
    lines = []
    for tracker, record in zip(runs.trackers, records, strict=True):
        ious = iou_xywh(record.result.boxes_xywh, record.sequence.truth_xywh)
        ious[~scored_frames(record.result, record.sequence)] = np.nan
        lines.append(Line(tracker, np.arange(len(ious)), ious))
    last = max(len(records[0].sequence.frames) - 1, 1)
    parts.append(line_plot(lines, "IoU over time", "frame", "IoU", (0, last), width=980))
    return f"<figure>{''.join(parts)}</figure>"


def _scored(record: Record) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    scored = scored_frames(record.result, record.sequence)
    return record.result.boxes_xywh[scored], record.sequence.truth_xywh[scored]


def _draw(image: NDArray[np.uint8], box_xywh: NDArray[np.float64], colour: str, thickness: int) -> None:
    if np.isfinite(box_xywh).all():
        x, y, w, h = np.clip(box_xywh, -1e5, 1e5)
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        corners = (round(x), round(y)), (round(x + w), round(y + h))
        cv2.rectangle(image, *corners, (blue, green, red), thickness)


def _key(trackers: Sequence[str]) -> str:
    names = [("truth", TRUTH_COLOUR), *((name, line_style(i)[0]) for i, name in enumerate(trackers))]
    spans = (
        f'<span class="key" style="background:{colour};outline:1px solid #888"></span>{html.escape(name)}'
        for name, colour in names
    )
    return f'<p class="note">Boxes:{"".join(spans)}; each IoU is in this order.</p>'


def _table(table: Table) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in table.columns)
    rows = "".join("<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row) + "</tr>" for row in table.rows)
    note = f'<p class="note">{html.escape(table.note)}</p>' if table.note else ""
    return f'<h2>{html.escape(table.title)}</h2>{note}<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "-" if value != value else f"{value:.3f}"
    return html.escape(str(value))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m evaluation.report", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders of results")
    parser.add_argument("--sequences", type=Path, metavar="DIR", help="the data set's folder, where it has moved since")
    parser.add_argument("--out", type=Path, metavar="HTML", help="the page (default: report.html in the first DIR)")
    parser.add_argument("--strips", type=int, default=3, help="best and worst sequences to show (default 3 of each)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
