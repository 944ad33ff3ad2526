"""The papers' tables at small scale: rows to recipes, runs that are not repeated, arithmetic, one tiny run for real."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks.ablations import report, runs, tables
from benchmarks.ablations.__main__ import main
from benchmarks.ablations.report import csv_rows, put_section, section, spread, verdict
from benchmarks.ablations.runs import Result, finished, plan, read_clips
from benchmarks.ablations.tables import Table, fingerprint, read_table
from benchmarks.accuracy import HARDEST
from siamtrack.nets.build import build_model
from siamtrack.plain import merged
from tests.sequence_files import write_otb, write_video
from training.objectives import check_fit
from training.recipe import load_recipe, recipe_from_dict

pytestmark = pytest.mark.usefixtures("threads_as_before")

SHIPPED = sorted(Path(tables.__file__).parent.glob("*.yaml"))


# Rows to recipes


def test_mappings_merge_and_all_else_is_replaced() -> None:
    base = {"a": 1, "data": {"labels": {"nearest": True}, "videos": ["v"]}, "model_config": {"x": 1}}
    changes = {"a": 2, "data": {"labels": {"rule": "siamban"}, "videos": ["w"]}, "model_config": {}, "new": {"y": 1}}
    assert merged(base, changes) == {
        "a": 2,
        "data": {"labels": {"nearest": True, "rule": "siamban"}, "videos": ["w"]},
        "model_config": {"x": 1},
        "new": {"y": 1},
    }
    assert base["data"] == {"labels": {"nearest": True}, "videos": ["v"]}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_tables_are_runs(path: Path) -> None:
    table = read_table(path)
    base = load_recipe(tables.CHECKOUT / table.recipe)
    planned = plan(table, [], table.seeds, Path("out"))
    assert len({run.folder for run in planned}) == len(planned) == len(table.rows) * len(table.seeds)
    assert [run.row for run in planned[: len(table.rows)]] == list(table.rows)
    for run in planned:
        recipe = recipe_from_dict(run.recipe)
        assert recipe.seed == run.seed
        assert recipe.unfreeze_stages == 0
        assert recipe.data.validation_videos
        full = load_recipe(tables.CHECKOUT / "training" / "recipes" / f"{recipe.model}.yaml")
        assert recipe.model.startswith(table.name)
        assert recipe.epochs * recipe.pairs_per_epoch < full.epochs * full.pairs_per_epoch / 5
        assert dataclasses.replace(recipe.data, labels=base.data.labels) == base.data
    for row in table.rows:
        recipe = recipe_from_dict(table.recipe_of(row, 1))
        net = build_model(recipe.model, recipe.model_config)
        check_fit(recipe.objective_name, recipe.build_objective(), recipe.model, net.decoder)
        assert table.compared_with(row) is (None if row.name == "baseline" else table.row(row.against or "baseline"))
    assert len({json.dumps({**table.recipe_of(row, 1), "seed": 0}, sort_keys=True) for row in table.rows}) == len(
        table.rows
    )


def test_there_is_a_table_for_each_paper() -> None:
    assert [path.stem for path in SHIPPED] == ["dastsiam", "siamcan", "siamla"]


def table_of(tmp_path: Path, **changes: Any) -> Path:
    """A file with a table of two rows, over the recipe ``base.yaml`` beside it."""
    base = {
        "model": "siamcan-mobilenetv2",
        "epochs": 20,
        "batch_size": 2,
        "validation_pairs": 0,
        "objective_config": {"classification": "focal"},
        "data": {
            "videos": ["videos"],
            "validation_videos": ["clip1"],
            "labels": {"nearest": True},
            "pairs": {"mix": {"video": 1.0}, "negative": 0.0},
            "cache_gb": 0.1,
        },
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    content = {
        "title": "A table",
        "measure": "EAO",
        "recipe": str(tmp_path / "base.yaml"),
        "schedule": {"epochs": 2, "pairs_per_epoch": 4},
        "seeds": [1, 2],
        "rows": [
            {"name": "plain", "label": "neither", "paper": 0.3, "model_config": {"channel_attention": False}},
            {"name": "whole", "label": "both", "paper": 0.45},
        ],
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"row": []}, r"small\.yaml: unknown field row"),
        ({"seeds": []}, r"small\.yaml: seeds must name at least one run"),
        ({"rows": []}, r"rows must be there and have names of their own, got none"),
        ({"rows": [{"name": "a", "label": "x"}] * 2}, r"names of their own, got a, a"),
        ({"rows": [{"name": "A b", "label": "x"}]}, r"rows\[0\]: name must be of lower-case letters.* got 'A b'"),
        ({"rows": [{"name": "a", "label": "x", "against": "b"}]}, r"row a is against 'b'; expected one of a"),
    ],
)
def test_table_file_errors(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_table(table_of(tmp_path, **changes))


def test_table_file_that_is_a_list(tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match=r"t\.yaml: expected a mapping of fields, got list"):
        read_table(tmp_path / "t.yaml")


def test_row_changes_the_recipe_alone(tmp_path: Path) -> None:
    table = read_table(table_of(tmp_path))
    plain, whole = (table.recipe_of(row, 7) for row in table.rows)
    assert (plain["seed"], plain["epochs"], plain["batch_size"]) == (7, 2, 2)
    assert plain["objective_config"] == {"classification": "focal"}
    assert plain["data"] == whole["data"] and plain["data"]["labels"] == {"nearest": True}
    assert (plain["model_config"], whole["model_config"]) == ({"channel_attention": False}, {})


# Runs


def result_of(row: str, seed: int, dev: dict[str, float], held_out: dict[str, float]) -> Result:
    return Result(row, seed, "f", "c", dev, held_out)


def test_results_count_while_their_recipe_stays(tmp_path: Path) -> None:
    table, out = read_table(table_of(tmp_path)), tmp_path / "out"
    runs_of = {(run.row.name, run.seed): run for run in plan(table, [], [1, 2], out)}
    for name, seed in (("whole", 2), ("plain", 1), ("whole", 1)):
        run = runs_of[name, seed]
        run.folder.mkdir(parents=True)
        result = Result(name, seed, fingerprint(run.recipe), "", {"a": 0.5}, {"b": 0.25})
        run.result.write_text(json.dumps(dataclasses.asdict(result)))
    (runs_of["plain", 2].folder).mkdir()  # begun
    assert [(r.row, r.seed) for r in finished(table, out)] == [("plain", 1), ("whole", 1), ("whole", 2)]
    # What one row changes concerns that row; what the schedule changes, all.
    other = read_table(table_of(tmp_path, rows=[{"name": "plain", "label": "p"}, {"name": "whole", "label": "w"}]))
    assert [(r.row, r.seed) for r in finished(other, out)] == [("whole", 1), ("whole", 2)]
    assert finished(read_table(table_of(tmp_path, schedule={"epochs": 3})), out) == []


def test_rows_are_chosen_by_name(tmp_path: Path) -> None:
    table = read_table(table_of(tmp_path))
    assert [(run.row.name, run.seed) for run in plan(table, ["whole"], [3, 4], tmp_path)] == [
        ("whole", 3),
        ("whole", 4),
    ]
    with pytest.raises(ValueError, match="no row 'hole' in small; expected one of plain, whole"):
        plan(table, ["hole"], [1], tmp_path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A video to train on, one held out, two development sequences."""
    root = tmp_path / "data"
    for name in ("clip0", "clip1"):
        write_video(root / "videos" / name)
    for name in ("First", HARDEST):
        write_otb(root / "dev" / name)
    return root


def test_clips_are_dev_and_what_the_recipe_holds_out(data: Path, tmp_path: Path) -> None:
    recipe = read_table(table_of(tmp_path)).recipe_of(read_table(table_of(tmp_path)).rows[0], 1)
    clips = read_clips(data, recipe)
    assert [sequence.name for sequence in clips.dev] == ["First", HARDEST]
    assert [sequence.name for sequence in clips.held_out] == ["clip1"]
    with pytest.raises(ValueError, match=r"no data\.validation_videos"):
        read_clips(data, merged(recipe, {"data": {"validation_videos": []}}))


def test_tiny_table(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Everything for real: stopped between training and export, gone on with, not repeated, evaluated again."""
    modules: list[str] = []

    def call(module: str, arguments: Sequence[object], log: Path, threads: int) -> None:
        """In this process, which has the libraries already."""
        modules.append(module)
        if module == "model_export.cli" and len(modules) == 2:
            raise RuntimeError("power cut")
        assert importlib.import_module(module).main([str(argument) for argument in arguments]) == 0

    monkeypatch.setattr(runs, "_call", call)
    path, out, results = table_of(tmp_path), tmp_path / "out", tmp_path / "results"
    arguments = [str(path), "--data", str(data), "--out", str(out), "--results", str(results), "--seeds", "5"]
    whole = [*arguments, "--rows", "whole"]
    (run,) = plan(read_table(path), ["whole"], [5], out)

    assert main(whole) == 1
    assert "small whole, seed 5: power cut" in capsys.readouterr().err
    assert (run.folder / "training" / "last.ckpt").is_file() and not run.result.exists() and not results.exists()

    assert main(whole) == 0
    assert modules == ["training.train", "model_export.cli"] * 2
    lines = (run.folder / "training" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1]  # the two epochs of the first start, none anew
    assert not list(run.folder.glob("training/*.ckpt")) and not list(run.folder.glob("training/events*"))
    assert load_recipe(run.folder / "recipe.yaml") == recipe_from_dict(run.recipe)
    assert run.bundle.is_dir() and not (run.folder / "bundle.part").exists()
    (result,) = finished(read_table(path), out)
    assert set(result.dev) == {"First", HARDEST} and set(result.held_out) == {"clip1"}
    assert all(0 <= auc <= 1 for auc in (*result.dev.values(), *result.held_out.values()))
    table = (results / "ablations_small.csv").read_text().splitlines()
    (row,) = csv.DictReader(line for line in table if not line.startswith("#"))
    assert (row["row"], row["seed"], row["fingerprint"]) == ("whole", "5", fingerprint(run.recipe))
    assert row["dev_auc"] == f"{(result.dev['First'] + result.dev[HARDEST]) / 2:.4f}"
    page = (results / "ablations.md").read_text()
    assert "## A table" in page and "| neither | 0.300 | 0 | - | - | - |" in page

    capsys.readouterr()
    assert main(whole) == 0
    assert len(modules) == 4
    assert capsys.readouterr().out.startswith("small whole, seed 5: done before\n")

    run.result.write_text(json.dumps({**dataclasses.asdict(result), "dev": {"First": 1.0}}))
    assert main([*arguments, "--evaluate-only"]) == 0
    assert len(modules) == 4
    assert "small plain, seed 5: not trained" in capsys.readouterr().out
    assert finished(read_table(path), out) == [result]

    other = json.loads(run.result.read_text())
    (second,) = plan(read_table(path), ["whole"], [6], out)
    second.bundle.parent.mkdir(parents=True)
    shutil.copytree(run.bundle, second.bundle)
    shutil.copytree(run.folder / "training", second.folder / "training")
    second.result.write_text(json.dumps({**other, "seed": 6, "fingerprint": second.folder.name.rpartition("-")[2]}))
    write_otb(data / "dev" / "Later")
    both = [str(path), "--data", str(data), "--out", str(out), "--results", str(results), "--rows", "whole", "--seeds"]
    assert main([*both, "5", "6", "7"]) == 2  # before anything is trained
    assert len(modules) == 4
    assert re.search(
        r"the data has other sequences .*\(in one only: Later\); .*--evaluate-only", capsys.readouterr().err
    )
    assert main([*both, "5", "6", "--evaluate-only"]) == 0
    assert all("Later" in result.dev for result in finished(read_table(path), out))


def test_program_that_fails_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"benchmarks\.ablations ended with status 2: .*nowhere\.yaml.*log\.txt\)"):
        runs._call("benchmarks.ablations", ["nowhere.yaml"], tmp_path / "log.txt", 1)
    assert "nowhere.yaml" in (tmp_path / "log.txt").read_text()


def test_programs_get_their_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "threads.py").write_text("import os\nprint(os.environ['OMP_NUM_THREADS'])\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    runs._call("threads", [], tmp_path / "log.txt", 3)
    assert (tmp_path / "log.txt").read_text() == "3\n"


def test_command_without_table_or_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    assert main([str(table_of(tmp_path)), "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Arithmetic


def test_measures_are_means_over_sequences() -> None:
    result = result_of("a", 1, {"x": 0.8, "y": 0.6, HARDEST: 0.1}, {"z": 0.2, "w": 0.4})
    assert result.dev_auc == pytest.approx(0.5)
    assert result.dev_auc_without_hardest == pytest.approx(0.7)
    assert result.held_out_auc == pytest.approx(0.3)
    assert np.isnan(result_of("a", 1, {HARDEST: 0.5}, {}).dev_auc_without_hardest)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([], "-"),
        ([0.5], "0.500"),
        ([0.5, 0.6, 0.4], "0.500 (0.400 to 0.600)"),
    ],
)
def test_spread(values: list[float], text: str) -> None:
    assert spread(values) == text


@pytest.mark.parametrize(
    ("ours", "others", "text"),
    [
        ([0.7, 0.75, 0.8], [0.5, 0.55, 0.6], "+0.200, more than the seeds' spread"),
        ([0.5, 0.55, 0.6], [0.7, 0.75, 0.8], "-0.200, more than the seeds' spread"),
        ([0.625, 0.625, 0.625], [0.375, 0.5, 0.625], "+0.125, within the seeds' spread"),  # the others' range is 0.25
        ([0.25, 0.75], [0.25, 0.25], "+0.250, within the seeds' spread"),  # ours is 0.5
        ([0.5, 0.75], [0.25, 0.5], "+0.250, within the seeds' spread"),  # as large is not larger
        ([0.7], [0.5, 0.6], "+0.150, spread unknown: a row has one seed"),
        ([], [0.5, 0.6], "-"),
    ],
)
def test_verdict(ours: list[float], others: list[float], text: str) -> None:
    assert verdict(ours, others) == text


def small_results(table: Table) -> list[Result]:
    aucs = {"plain": (0.40, 0.42), "whole": (0.60, 0.62)}
    return [
        result_of(row.name, seed, {"x": auc, HARDEST: 0.0}, {"z": 0.5})
        for row in table.rows
        for seed, auc in zip((1, 2), aucs[row.name], strict=True)
    ]


def test_section_and_csv(tmp_path: Path) -> None:
    table = read_table(table_of(tmp_path))
    results = small_results(table)
    text = section(table, results, "python -m benchmarks.ablations small.yaml")
    assert text.startswith("## A table\n") and ", 8 pairs a run, code c. " in text
    assert "never calls a target lost" in text
    assert "| neither | 0.300 | 2 | 0.205 (0.200 to 0.210) | 0.410 (0.400 to 0.420) | 0.500 (0.500 to 0.500) |" in text
    assert (
        "| both, against neither | +0.150 | +0.100, more than the seeds' spread | +0.200, more than the seeds' spread "
        "| +0.000, within the seeds' spread |" in text
    )
    rows = csv_rows(table, results)
    assert [(row["row"], row["label"], row["seed"]) for row in rows][2] == ("whole", "both", 1)
    assert rows[2]["dev_auc"] == pytest.approx(0.3) and rows[2][f"dev_auc_without_{HARDEST.lower()}"] == 0.60
    assert (rows[2]["dev/x"], rows[2][f"dev/{HARDEST}"], rows[2]["held_out/z"]) == (0.60, 0.0, 0.5)


def test_runs_on_different_sequences_are_not_compared(tmp_path: Path) -> None:
    table = read_table(table_of(tmp_path))
    results = [*small_results(table)[:2], result_of("whole", 1, {"x": 0.5}, {"z": 0.5})]
    for publish in (lambda: csv_rows(table, results), lambda: section(table, results, "")):
        with pytest.raises(ValueError, match=rf"row whole, seed 1 .*in one only: {HARDEST}\).*--evaluate-only"):
            publish()


def test_sections_of_other_tables_stay(tmp_path: Path) -> None:
    page = tmp_path / "results" / "ablations.md"
    for name, text in (("a", "old a\n"), ("b", "old b\n"), ("a", "new a\n"), ("b", "new b\n"), ("c", "new c\n")):
        put_section(page, name, text)
    body = page.read_text().removeprefix(report.PAGE)
    assert [line for line in body.splitlines() if not line.startswith("<!--")] == ["new a", "new b", "new c"]
