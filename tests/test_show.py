"""The sheet of training samples: what is drawn is what the network gets, with boxes and labels in their places."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from siamtrack.nets.decode import Grid
from training.dataset import Sample
from training.labels import Cells, siamcan_labels, siamla_labels
from training.show import BACKGROUND, BOUNDARY, BOX, GAP_PX, TARGET, ZOOM, cell_labels, draw_sample, main

GRID = Grid(size=15, stride=16, origin=16.0)
CELLS = Cells(GRID.points().numpy(), stride=16)
GREY = 100


def sample(box: tuple[float, float, float, float], labels: np.ndarray, positive: bool = True) -> Sample:
    rng = np.random.default_rng(0)
    return {
        "template": rng.integers(0, 256, (127, 127, 3)).astype(np.uint8),
        "search": np.full((255, 255, 3), GREY, np.uint8),
        "box": np.array(box, np.float32),
        "labels": labels,
        "positive": np.array(positive),
    }


def test_template_box_and_label_map_are_in_their_places() -> None:
    box = (130.0, 100.0, 80.0, 60.0)
    drawn = sample(box, siamla_labels(CELLS, np.array(box)))
    tile = draw_sample(drawn, CELLS)
    np.testing.assert_array_equal(tile[:127, :127], drawn["template"])
    search = tile[: 255 * ZOOM, 127:]
    blue = np.argwhere((search == BOX).all(axis=2))
    assert blue.min(axis=0) == pytest.approx([70 * ZOOM, 90 * ZOOM], abs=2)
    assert blue.max(axis=0) == pytest.approx([130 * ZOOM, 170 * ZOOM], abs=2)
    # Every cell's dot has its label's colour: centre, boundary and background of SiamLA.
    for (x, y), label in zip(CELLS.points, drawn["labels"], strict=True):
        colour = {0: BACKGROUND, 1: TARGET, 2: BOUNDARY}[int(label)]
        assert tuple(search[round(float(y) * ZOOM), round(float(x) * ZOOM)]) == colour
    assert set(drawn["labels"].tolist()) == {0, 1, 2}


def test_ignored_cells_have_no_dot_and_a_foreign_box_is_red() -> None:
    box = (130.0, 100.0, 100.0, 100.0)
    labels = siamcan_labels(CELLS, np.array(box))
    search = draw_sample(sample(box, labels), CELLS)[: 255 * ZOOM, 127:]
    ignored = CELLS.points[labels == -1]
    assert len(ignored)
    for x, y in ignored:
        assert tuple(search[round(float(y) * ZOOM), round(float(x) * ZOOM)]) in {(GREY,) * 3, BOX}
    negative = draw_sample(sample(box, np.zeros(225, np.int8), positive=False), CELLS)[: 255 * ZOOM, 127:]
    assert not (negative == BOX).all(axis=2).any()
    assert not (negative == TARGET).all(axis=2).any()
    assert tuple(negative[50 * ZOOM, 130 * ZOOM]) == BACKGROUND


def test_a_cell_is_target_if_one_of_its_anchors_is() -> None:
    points = np.array([[0, 0], [8, 0], [0, 0], [8, 0]], np.float32)
    where, labels = cell_labels(np.array([-1, 0, 1, -1], np.int8), Cells(points, stride=8))
    assert where.tolist() == [[0, 0], [8, 0]]
    assert labels.tolist() == [1, 0]


def test_further_templates_are_below_the_first() -> None:
    drawn = sample((130.0, 100.0, 80.0, 60.0), np.zeros(225, np.int8))
    drawn |= {"history": drawn["template"] // 2, "current": drawn["template"] // 3}
    tile = draw_sample(drawn, CELLS)
    np.testing.assert_array_equal(tile[127:254, :127], drawn["history"])
    np.testing.assert_array_equal(tile[254:381, :127], drawn["current"])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    for v in range(2):
        folder = tmp_path / "videos" / f"clip{v}"
        (folder / "img").mkdir(parents=True)
        for i in range(3):
            image = np.random.default_rng([v, i]).integers(0, 256, (120, 160, 3)).astype(np.uint8)
            assert cv2.imwrite(str(folder / "img" / f"{i}.png"), image)
        (folder / "groundtruth.txt").write_text("40,30,40,30\n" * 3)
    path = tmp_path / "r.yaml"
    data = {"videos": ["videos"], "pairs": {"mix": {"video": 1.0}}, "labels": {"nearest": True}}
    path.write_text(json.dumps({"model": "siamcan-mobilenetv2", "data": data}))
    return path


def test_command_writes_a_sheet(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheets = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        out = tmp_path / "sheets" / f"{name}.png"
        arguments = [str(recipe), "--data", str(tmp_path), "--out", str(out), "--pairs", "4", "--seed", seed]
        assert main(arguments) == 0
        assert f"4 samples of siamcan-mobilenetv2: {out}" in capsys.readouterr().out
        sheets.append(cv2.imread(str(out)))
    rows, columns = sheets[0].shape[:2]
    assert (columns - GAP_PX) % 3 == (rows - GAP_PX) % 2 == 0  # four tiles: three and one
    np.testing.assert_array_equal(sheets[0], sheets[1])
    assert (sheets[0] != sheets[2]).any()
    assert (sheets[0] == TARGET).all(axis=2).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--pairs", "0"], "--pairs must be at least 1, got 0"),
        (["--out", "sheet.text"], "cannot write sheet.text|could not find a writer"),
        (["--data", "nowhere"], "no folder of videos at nowhere/videos; check --data"),
    ],
)
def test_command_errors(
    recipe: Path, tmp_path: Path, change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(recipe), "--data", str(tmp_path), "--out", str(tmp_path / "a.png"), "--pairs", "1", *change]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert any(part in error for part in message.split("|"))
