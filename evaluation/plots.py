"""Plots as SVG text: sharp at any size, and small enough to live inside a page. No plotting library is needed."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

# Told apart by people who are colour-blind (Okabe and Ito); beyond eight, dashes tell lines of one colour apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d1f", "#555555")
DASHES = ("", "7 4", "2 3")

WIDTH, HEIGHT = 520, 360
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 34, 44
LEGEND_ROW = 17
STRIP = 90  # height of the lower histogram


@dataclass(frozen=True, eq=False)
class Line:
    """A line of a plot: ``y`` over ``x``, with NaN where it has a gap."""

    label: str
    x: ArrayLike
    y: ArrayLike


def line_style(index: int) -> tuple[str, str]:
    """Colour and dash pattern of the line with this index."""
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def line_plot(
    lines: Sequence[Line], title: str, x_label: str, y_label: str, x_range: tuple[float, float], width: int = WIDTH
) -> str:
    """A plot with a legend below it, as an ``<svg>`` element; the y axis goes from 0 to 1.

    Raises:
        ValueError: nothing to draw, or a range of no length.
    """
    if not lines or not x_range[1] > x_range[0]:
        raise ValueError(f"expected lines and a range that rises, got {len(lines)} lines and {x_range}")
    inner_w, inner_h = width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def at(x: float, y: float) -> tuple[float, float]:
        share = (x - x_range[0]) / (x_range[1] - x_range[0])
        return LEFT + inner_w * share, TOP + inner_h * (1 - y)

    parts = [_text(LEFT + inner_w / 2, 20, title, "middle", 14, "bold")]
    for step in range(6):
        value = x_range[0] + (x_range[1] - x_range[0]) * step / 5
        x, y = at(value, step / 5)
        parts.append(_rule(x, TOP, x, TOP + inner_h) + _rule(LEFT, y, LEFT + inner_w, y))
        parts.append(
            _text(x, TOP + inner_h + 16, f"{value:g}", "middle") + _text(LEFT - 7, y + 4, f"{step / 5:g}", "end")
        )
    parts.append(_text(LEFT + inner_w / 2, HEIGHT - 8, x_label, "middle", 12))
    parts.append(_upright(14, TOP + inner_h / 2, y_label))
    for index, line in enumerate(lines):
        stroke = _stroke(*line_style(index))
        parts += [_polyline([at(x, y) for x, y in piece], stroke) for piece in _pieces(line)]
        parts.append(_legend(HEIGHT + index * LEGEND_ROW + 8, line.label, stroke))
    return _document(parts, title, width, HEIGHT + len(lines) * LEGEND_ROW + 8)


def reliability_plot(
    frames: ArrayLike, hits: ArrayLike, absent: ArrayLike, fit: Line, marks: Mapping[str, float], title: str
) -> str:
    """How far a score in ``[0, 1]`` can be believed, as an ``<svg>`` element.

    Above, a bar a bin of the score: the share of its frames on the target, and under it the number of frames; over
    them the fit, and in grey a score that would be this share itself. Below, the scores of windows without the target.

    Args:
        frames: ``[B]`` frames in each of B equal bins.
        hits: ``[B]`` share of them on the target; NaN where there is no frame, which is drawn as no bar.
        absent: ``[B]`` share of the windows without the target.
        fit: share over score.
        marks: scores to mark in both parts, by what the legend calls them.
        title: over the plot.

    Raises:
        ValueError: the three differ in length, or are empty.
    """
    counts, shares, empty = np.asarray(frames), np.asarray(hits, float), np.asarray(absent, float)
    if not counts.size or not counts.shape == shares.shape == empty.shape:
        raise ValueError(
            f"expected a number a bin three times, got shapes {counts.shape}, {shares.shape} and {empty.shape}"
        )
    inner_w, bin_w = WIDTH - LEFT - RIGHT, (WIDTH - LEFT - RIGHT) / counts.size
    floor, strip_floor = HEIGHT - BOTTOM, HEIGHT + BOTTOM + STRIP
    scale = floor - TOP
    parts = [_text(LEFT + inner_w / 2, 20, title, "middle", 14, "bold")]
    for step in range(6):
        x, y = LEFT + inner_w * step / 5, floor - scale * step / 5
        parts.append(_rule(x, TOP, x, floor) + _rule(LEFT, y, LEFT + inner_w, y))
        parts.append(_rule(x, strip_floor - STRIP, x, strip_floor))
        parts.append(_text(x, floor + 16, f"{step / 5:g}", "middle") + _text(LEFT - 7, y + 4, f"{step / 5:g}", "end"))
        parts.append(_text(x, strip_floor + 16, f"{step / 5:g}", "middle"))
    for share in (0, 0.5, 1):
        y = strip_floor - STRIP * share
        parts.append(_rule(LEFT, y, LEFT + inner_w, y) + _text(LEFT - 7, y + 4, f"{share:g}", "end"))
    parts.append(_text(LEFT - 7, floor + 31, "frames", "end") + _text(LEFT - 7, strip_floor + 31, "share", "end"))
    parts.append(_text(LEFT + inner_w / 2, floor + 50, "score of tracked frames", "middle", 12))
    parts.append(_text(LEFT + inner_w / 2, strip_floor + 50, "score of windows without the target", "middle", 12))
    parts.append(_upright(14, TOP + scale / 2, "share of frames with IoU > 0.3"))
    parts.append(_upright(14, strip_floor - STRIP / 2, "share of windows"))
    for index, (count, share, windows) in enumerate(zip(counts.tolist(), shares.tolist(), empty.tolist(), strict=True)):
        left, middle = LEFT + bin_w * index + 2, LEFT + bin_w * (index + 0.5)
        if count:
            parts.append(_bar(left, floor, bin_w - 4, scale * share))
        parts.append(_text(middle, floor + 31, str(count), "middle"))
        parts.append(_bar(left, strip_floor, bin_w - 4, STRIP * windows))
        parts.append(_text(middle, strip_floor + 31, f"{windows:.3f}", "middle"))
    parts.append(_polyline([(LEFT, floor), (LEFT + inner_w, TOP)], _stroke("#999999", DASHES[1])))
    fit_stroke = _stroke(*line_style(0))
    for piece in _pieces(fit):
        parts.append(_polyline([(LEFT + inner_w * x, floor - scale * y) for x, y in piece], fit_stroke))
    row = strip_floor + 74
    parts.append(_legend(row, fit.label, fit_stroke))
    for index, (label, score) in enumerate(marks.items(), start=1):
        # Every other one in dashes, through which one at the same score is seen.
        x, stroke = LEFT + inner_w * score, _stroke(line_style(index)[0], DASHES[(index + 1) % 2])
        parts.append(_polyline([(x, TOP), (x, floor)], stroke))
        parts.append(_polyline([(x, strip_floor - STRIP), (x, strip_floor)], stroke))
        parts.append(_legend(row + index * LEGEND_ROW, label, stroke))
    return _document(parts, title, WIDTH, row + (len(marks) + 1) * LEGEND_ROW)


def _document(parts: Sequence[str], title: str, width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="sans-serif" role="img" aria-label="{html.escape(title)}">' + "".join(parts) + "</svg>"
    )


def _legend(y: float, label: str, stroke: str) -> str:
    return f'<line x1="{LEFT}" y1="{y}" x2="{LEFT + 30}" y2="{y}" {stroke}/>' + _text(
        LEFT + 38, y + 4, label, "start", 12
    )


def _stroke(colour: str, dash: str) -> str:
    return f'fill="none" stroke="{colour}" stroke-width="2"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _polyline(points: Sequence[tuple[float, float]], stroke: str) -> str:
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" {stroke}/>'


def _bar(left: float, floor: float, width: float, height: float) -> str:
    return f'<rect x="{left:.1f}" y="{floor - height:.1f}" width="{width:.1f}" height="{height:.1f}" fill="#cfe3f1"/>'


def _upright(x: float, y: float, text: str) -> str:
    """Text that is read from below, around a point of the y axis."""
    return f'<g transform="rotate(-90 {x} {y:.1f})">{_text(x, y, text, "middle", 12)}</g>'


def _pieces(line: Line) -> list[list[tuple[float, float]]]:
    """Stretches without a gap."""
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(np.asarray(line.x, float).tolist(), np.asarray(line.y, float).tolist(), strict=True):
        if np.isfinite(y):
            pieces[-1].append((x, min(max(y, 0.0), 1.0)))
        elif pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def _rule(x0: float, y0: float, x1: float, y1: float) -> str:
    return f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="#d8d8d8"/>'


def _text(x: float, y: float, text: str, anchor: str, size_px: int = 11, weight: str = "normal") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size_px}" font-weight="{weight}" '
        f'fill="#222">{html.escape(text)}</text>'
    )
