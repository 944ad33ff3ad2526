"""The benchmark of training's speed: who has when its turn, what is made of the times, and one run of the command."""

from __future__ import annotations

import csv
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from benchmarks import training_throughput
from benchmarks.training_throughput import Epoch, Turns, main, rendered, speeds
from training.data import read_video
from training.module import SiameseModule
from training.recipe import recipe_from_dict


def test_streams_go_on_where_they_stood() -> None:
    turns = Turns(("cpu",), rounds=2, untimed=1, timed=2)
    streams: list[Any] = [itertools.count(0), itertools.count(100)]
    epoch = Epoch(streams, turns)
    assert len(epoch) == 12
    assert list(epoch) == [0, 1, 2, 100, 101, 102, 3, 4, 5, 103, 104, 105]
    assert next(iter(epoch)) == 6


def test_speeds_by_hand() -> None:
    """Two turns of each source; a first step of 9 s that does not count, then two that take a mean of so many s."""
    turns = Turns(("cpu", "device"), rounds=3, untimed=1, timed=2)
    means = np.array([[1.0, 2.0, 4.0], [1.0, 2.0, 4.0], [2.0, 8.0, 5.0]])
    steps = np.stack([np.full_like(means, 9.0), means - 0.5, means + 0.5], axis=-1).ravel()
    seconds = turns.seconds(steps)
    np.testing.assert_allclose(seconds, means[None])
    rows = list(speeds(seconds, turns, 8, ["thawed"]))
    assert [(row["backbone"], row["crops"], row["steps"]) for row in rows] == [
        ("thawed", source, 6) for source in ("random", "cpu", "device")
    ]
    assert [row["samples_per_s"] for row in rows] == [8.0, 4.0, 2.0]
    assert [row["of_random"] for row in rows] == [1.0, 0.5, 0.25]
    assert [(row["samples_per_s_min"], row["samples_per_s_max"]) for row in rows] == [(4, 8), (1, 4), (1.6, 2)]


def test_rendered_data_is_a_recipe_s(tmp_path: Path) -> None:
    recipe = recipe_from_dict(
        {"model": "siamcan-mobilenetv2", "data": {"stills": ["gone"], "labels": {"positives": 3}}}
    )
    data = rendered(recipe.data, tmp_path, clips=1, frames=2)
    assert (data.videos, data.stills, data.labels.positives) == (("clips",), (), 3)
    assert set(data.pairs.mix) == {"video", "cutout", "region"}
    (track,) = read_video(tmp_path / "clips" / "0")
    assert len(track.sightings) == 2
    for frame, seen in enumerate(track.sightings):
        x, y, w, h = (round(v) for v in seen.box_xywh)
        red = cv2.imread(str(tmp_path / "clips" / "0" / "img" / f"{frame:04d}.jpg"))[y : y + h, x : x + w]
        assert red[..., 2].mean() > red[..., 0].mean() + 30  # the scene's red target
        assert seen.mask is not None


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(training_throughput, "rendered", partial(rendered, clips=2, frames=2))
    path = tmp_path / "r.yaml"
    content = {"model": "siamcan-mobilenetv2", "batch_size": 2, "unfreeze_stages": 1, "backbone": "gone.safetensors"}
    path.write_text(json.dumps(content | {"data": {"cache_gb": 0.1}}))
    return path


def test_command(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[tuple[bytes, bool, bool]] = []
    step = SiameseModule.training_step

    def training_step(self: SiameseModule, batch: Any, batch_idx: int) -> Any:
        thawed = any(p.requires_grad for p in self.net.backbone.parameters())  # type: ignore[union-attr]
        seen.append((batch["search"].numpy().tobytes(), "search.table" in batch, thawed))
        return step(self, batch, batch_idx)

    monkeypatch.setattr(SiameseModule, "training_step", training_step)
    threads, cv2_threads = torch.get_num_threads(), cv2.getNumThreads()
    arguments = [
        str(recipe),
        "--devices",
        "1",
        "--rounds",
        "2",
        "--steps",
        "1",
        "--warmup",
        "0",
        "--out",
        str(tmp_path),
    ]
    try:
        assert main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
        cv2.setNumThreads(cv2_threads)
    crops, deferred, thawed = zip(*seen, strict=True)
    assert thawed == (False,) * 12 + (True,) * 12
    assert deferred == (False, False, False, False, True, True) * 4  # random, cpu, device: two steps each
    random = [content for turn, content in enumerate(crops) if turn % 6 < 2]
    pairs = [content for turn, content in enumerate(crops) if turn % 6 >= 2]
    assert len(set(random)) == 1
    assert len(set(pairs)) == len(pairs) == 16
    assert random[0] not in pairs
    lines = (tmp_path / "training_throughput.csv").read_text().splitlines()
    assert lines[0].startswith("# command: python -m benchmarks.training_throughput ")
    rows = list(csv.DictReader(lines[2:]))
    assert [(row["backbone"], row["crops"]) for row in rows] == [
        (backbone, source) for backbone in ("frozen", "thawed") for source in ("random", "cpu", "device")
    ]
    assert all(float(row["samples_per_s"]) > 0 for row in rows)
    assert {row["of_random"] for row in rows if row["crops"] == "random"} == {"1.0000"}
    assert {(row["model"], row["data"], row["processes"], row["workers"], row["batch_size"]) for row in rows} == {
        ("siamcan-mobilenetv2", "rendered", "1", "0", "2")
    }
    assert "| frozen | random |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "expected --rounds and --steps of at least 1"),
        (["--devices", "3"], "batch_size 2 does not split evenly over 3 devices"),
        (["--data", "nowhere"], "no backbone weights at nowhere"),
        (["--shards", "shards"], "--shards shards needs --data, the folder it is below"),
    ],
)
def test_command_says_what_is_wrong(
    recipe: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe), "--devices", "1", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
