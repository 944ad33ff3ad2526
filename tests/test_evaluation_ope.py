"""The command: results on disk, resumed, refused, in several processes, and the page made from them."""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import json
import re
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from evaluation import ope, parallel, records, report, tables
from evaluation.layouts import find_sequences
from evaluation.onepass import Result, run_ope
from evaluation.parallel import Job, run_job, run_jobs, schedule
from evaluation.peers import StaticTracker
from evaluation.plots import Line, line_plot, line_style
from evaluation.trackers import TrackerSpec, make_tracker, model_spec, peer_spec
from siamtrack import Bundle
from siamtrack.bundle import load_bundle, sha256, write_manifest
from siamtrack.cluster import LOCAL_CLUSTER
from siamtrack.runners import cpu_precision
from tests.sequence_files import TRUTH, write_lasot, write_otb, write_video

NAN = float("nan")
STATIC_AUC = 22 / 84  # of a box left at the start of TRUTH: 12, 7, 3 and 0 of 21 thresholds on four scored frames


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_otb(tmp_path / "data" / "a_otb")
    write_video(tmp_path / "data" / "b_video", np.vstack([np.full((1, 4), NAN), TRUTH]))
    return tmp_path / "data"


def run(data: Path, out: Path, *more: str) -> int:
    return ope.main(["--peers", "static", "--sequences", str(data), "--out", str(out), *more])


def written(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (out / "boxes" / "static").iterdir()}


# Results


def test_the_command_writes_every_form(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(data, out) == 0
    said = capsys.readouterr()
    assert "| static | 0.262 |" in said.out and "2 sequences to run, 0 done before" in said.err
    assert "Benchmark's own numbers: otb\n\n1 sequences, counted as pysot counts" in said.out
    assert (out / "results.md").read_text() in said.out
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [row["sequence"] for row in rows] == ["a_otb", "b_video", "mean"]
    assert rows[2]["auc"] == f"{STATIC_AUC:.4f}" and rows[2]["frames"] == "8"
    still = "10.0000,20.0000,20.0000,10.0000\n"
    for form in ("pysot", "trackingnet"):
        assert (out / form / "static" / "a_otb.txt").read_text() == still * 5
        assert (out / form / "static" / "b_video.txt").read_text() == "nan,nan,nan,nan\n" + still * 5
    assert (out / "got10k" / "static" / "a_otb" / "a_otb_001.txt").read_text() == still * 5
    seconds = np.loadtxt(out / "got10k" / "static" / "a_otb" / "a_otb_time.txt")
    assert seconds.shape == (5,) and (seconds >= 0).all()
    assert not list(out.rglob("*.part"))


def test_a_record_gives_back_what_was_written(data, tmp_path):
    refs = find_sequences(data)
    sequence = refs[1].load()
    result = run_ope(StaticTracker, sequence)
    path = records.write_record(tmp_path, "static", "print", refs[1], sequence, result)
    again = records.read_record(path)
    assert again.header.fingerprint == "print" and again.header.digest == refs[1].digest()
    assert again.sequence.frames == sequence.frames and again.sequence.start == again.result.start == 1
    for name in ("boxes_xywh", "scores", "seconds"):
        np.testing.assert_allclose(getattr(again.result, name), getattr(result, name), atol=1e-4)
    np.testing.assert_allclose(again.sequence.truth_xywh, sequence.truth_xywh)
    assert again.result.states == result.states and again.result.size_px == (96, 64)
    moved = records.read_record(path, tmp_path / "elsewhere")
    assert moved.sequence.frames[0] == tmp_path / "elsewhere" / "b_video" / "img" / "00001.jpg"


@pytest.mark.parametrize("damage", ["cut", "version", "header", "columns"])
def test_a_damaged_record_is_not_taken_for_a_result(data, tmp_path, damage):
    [ref, _] = find_sequences(data)
    sequence = ref.load()
    path = records.write_record(tmp_path, "static", "print", ref, sequence, run_ope(StaticTracker, sequence))
    first, columns, *rows = path.read_text().splitlines(keepends=True)
    if damage == "cut":
        path.write_text("".join([first, columns, *rows[:-1]]))
    elif damage == "version":
        path.write_text("".join([first.replace('"version": 1', '"version": 0'), columns, *rows]))
    elif damage == "header":
        path.write_text("".join([columns, *rows]))
    else:
        path.write_text("".join([first, columns.replace("score", "points"), *rows]))
    assert (records.read_header(path) is None) == (damage != "columns")
    with pytest.raises(ValueError, match="delete it and run the evaluation again"):
        records.read_record(path)


def test_finished_sequences_are_not_run_again(data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(data, out, "--names", "a_otb") == 0
    first = written(out)
    assert run(data, out) == 0
    assert "1 sequences to run, 1 done before" in capsys.readouterr().err
    both = written(out)
    assert both["a_otb.csv"] == first["a_otb.csv"] and "b_video.csv" in both
    whole = (out / "boxes" / "static" / "b_video.csv").read_text()
    (out / "boxes" / "static" / "b_video.csv").write_text(whole[: len(whole) // 2])  # as if the disk had been full
    assert run(data, out) == 0
    rows = (out / "boxes" / "static" / "b_video.csv").read_text().splitlines()
    assert len(rows) == len(whole.splitlines()) and written(out)["a_otb.csv"] == first["a_otb.csv"]


def test_results_of_something_else_are_refused_and_replaced_on_demand(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert run(data, out) == 0
    before = written(out)
    monkeypatch.setattr(TrackerSpec, "fingerprint", lambda self: "another")
    assert run(data, out) == 2
    said = capsys.readouterr().err
    assert "2 results called static that are not of this model" in said and "--rerun" in said
    assert written(out) == before
    assert run(data, out, "--rerun") == 0
    after = written(out)
    assert all(after[name] > before[name] for name in before)
    (data / "a_otb" / "groundtruth_rect.txt").write_text("11,21,22,10\n" * 5)  # the data were corrected
    assert run(data, out) == 2
    assert "1 results called static" in capsys.readouterr().err


def test_results_of_two_models_are_never_mixed(data, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert run(data, out) == 0
    record = out / "boxes" / "static" / "b_video.csv"
    record.write_text(record.read_text().replace('"fingerprint": "', '"fingerprint": "f'))
    with pytest.raises(ValueError, match=r"results of several models or settings \(a_otb: [0-9a-f]+; b_video: f"):
        tables.load_runs([out])
    assert run(data, out, "--names", "a_otb") == 2  # not asked for, but it would stand in the same tables
    assert "1 results called static" in capsys.readouterr().err
    assert run(data, out, "--names", "a_otb", "--rerun") == 0
    assert "1 done before" in capsys.readouterr().err and not record.exists()
    monkeypatch.setattr(TrackerSpec, "fingerprint", lambda self: "another")
    (data / "a_otb" / "img" / "0003.jpg").write_text("not an image")
    assert run(data, out, "--rerun") == 1
    assert set(written(out)) == {"b_video.csv"}  # no old result stands in for the one that failed
    for form in records.FORMS:
        assert [path.stem for path in (out / form / "static").rglob("*a_otb*.txt")] == []


def test_labels_that_come_later_are_seen(tmp_path, capsys):
    root, out = tmp_path / "lasot", tmp_path / "out"
    folder = write_lasot(root / "bird" / "bird-1")
    assert run(root, out) == 0
    (root / "att").mkdir()
    (root / "att" / "bird-1.txt").write_text(",".join(["1"] + ["0"] * 13))
    assert run(root, out) == 0  # attributes change no box
    said = capsys.readouterr()
    assert "0 sequences to run, 1 done before" in said.err and "| illumination variation | 1 |" in said.out
    (folder / "full_occlusion.txt").write_text("0,0,0,1,0")  # this changes what is scored
    assert run(root, out) == 2
    assert run(root, out, "--rerun") == 0
    assert "1 sequences, 3 scored frames" in capsys.readouterr().out


def test_names_choose_sequences(data, tmp_path, capsys):
    (tmp_path / "split.txt").write_text("b_video\na_otb\n")
    assert [ref.name for ref in ope.choose(find_sequences(data), [f"@{tmp_path / 'split.txt'}"])] == [
        "b_video",
        "a_otb",
    ]
    assert run(data, tmp_path / "out", "--names", "nothing") == 2
    assert "no sequence called nothing" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing: not a bundle"),
        (["--peers", "static", "static"], "two trackers of one name"),
        (["--peers"], "nothing to evaluate"),
        (["--peers", "sort"], "no peer 'sort'"),
    ],
)
def test_unusable_trackers_are_named(data, tmp_path, capsys, arguments, message):
    assert ope.main([*arguments, "--sequences", str(data), "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_one_bad_sequence_does_not_end_the_others(data, tmp_path, capsys):
    (data / "a_otb" / "img" / "0003.jpg").write_text("not an image")
    assert run(data, tmp_path / "out") == 1
    said = capsys.readouterr()
    assert re.search(r"failed: static on a_otb: ValueError: cannot decode .*0003\.jpg", said.err)
    assert "1 sequences, 4 scored frames" in said.out
    shutil.rmtree(data / "a_otb" / "img")
    (data / "a_otb" / "img").mkdir()  # not unpacked yet
    assert run(data, tmp_path / "out") == 1
    assert "failed: static on a_otb: FileNotFoundError: no image in" in capsys.readouterr().err
    for path in (data / "b_video" / "img").iterdir():
        path.unlink()
    assert run(data, tmp_path / "out") == 1  # what was made of it when it was there stands
    assert set(written(tmp_path / "out")) == {"b_video.csv"} and "1 sequences, 4" in capsys.readouterr().out


# Trackers


def test_a_fingerprint_holds_model_and_parameters(default_bundle: Bundle):
    name = default_bundle.path.name
    plain = model_spec(name, "onnxruntime", 1, [])
    assert (
        plain.name == name
        and plain.fingerprint() == model_spec(str(default_bundle.path), "onnxruntime", 1, []).fingerprint()
    )
    more = [
        model_spec(f"other={name}", "onnxruntime", 2, []),
        model_spec(name, "onnxruntime", 1, [("window_influence", 0.123)]),
        model_spec(name, "onnxruntime", 1, [("lost_windows", 7)]),
        peer_spec("static"),
    ]
    prints = [spec.fingerprint() for spec in more]
    assert more[0].name == "other" and prints[0] == plain.fingerprint()  # neither name nor threads change boxes
    assert len({plain.fingerprint(), *prints}) == 4
    assert plain.precision == default_bundle.manifest.precision  # not what this CPU is fast at
    assert model_spec(name, "onnxruntime", 1, [], "auto").precision == cpu_precision(default_bundle).precision
    assert model_spec(name, "onnxruntime", 1, [], "int8").fingerprint() != plain.fingerprint()
    assert model_spec(name, "tensorrt", 1, []).precision == "auto"
    with pytest.raises(ValueError, match="no tracking parameter 'window'; expected one of penalty_k"):
        model_spec(name, "onnxruntime", 1, [("window", 0.5)])
    with pytest.raises(ValueError, match=r"lost_windows is a whole number, got 2\.7"):
        model_spec(name, "onnxruntime", 1, [("lost_windows", 2.7)])
    tracker = make_tracker(more[2])
    assert tracker.tracking.lost_windows == 7 and type(tracker.tracking.lost_windows) is int
    assert make_tracker(more[2]) is tracker


def test_a_fingerprint_holds_the_int8_graphs(default_bundle: Bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(default_bundle.path, folder)
    before = [model_spec(str(folder), "onnxruntime", 1, [], p).fingerprint() for p in ("fp32", "int8")]
    manifest = load_bundle(folder).manifest
    search = manifest.int8["search"]
    with (folder / search.file).open("ab") as file:
        file.write(b"quantised otherwise")
    changed = dataclasses.replace(search, sha256=sha256(folder / search.file))
    write_manifest(folder, dataclasses.replace(manifest, int8={"search": changed}))
    after = [model_spec(str(folder), "onnxruntime", 1, [], p).fingerprint() for p in ("fp32", "int8")]
    assert before[0] == after[0] and before[1] != after[1]


# In parallel


def jobs_of(lengths: list[int]) -> list[Job]:
    spec, refs = TrackerSpec("static", peer="static"), []
    for index in range(len(lengths)):
        refs.append(records.SequenceRef(f"s{index}", "otb", Path(), Path(), Path()))
    return [Job(spec, ref, length) for ref, length in zip(refs, lengths, strict=True)]


def test_work_is_dealt_so_that_processes_end_together():
    dev = [71, 291, 81, 120, 113, 164, 250]  # longest first would end after 566 frames, half of all are 545
    assert parallel._finish(schedule(jobs_of(dev), 2), 2) <= 555
    many = schedule(jobs_of(list(range(1, 101))), 3)
    assert many[0].frames == 100 and parallel._finish(many, 3) < 5050 / 3 * 1.02
    assert sorted(job.frames for job in many) == list(range(1, 101)) and schedule([], 2) == []


def test_two_processes_give_the_same_boxes(data, tmp_path, default_bundle):
    model = default_bundle.path.name
    for processes in ("1", "2"):
        arguments = [model, "--sequences", str(data), "--out", str(tmp_path / processes), "--processes", processes]
        assert ope.main(arguments) == 0
    for name in ("a_otb", "b_video"):
        one, two = ((tmp_path / n / "pysot" / model / f"{name}.txt").read_text() for n in "12")
        assert one == two and len(set(one.splitlines())) > 3


def test_a_failed_job_says_why(tmp_path):
    [job] = jobs_of([5])
    assert "FileNotFoundError" in run_job(job).error and run_job(job).result is None


def test_a_cluster_needs_ray(monkeypatch, data, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(data, tmp_path / "out", "--cluster", "local") == 2
    assert "pip install 'siamtrack[cluster]'" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install 'siamtrack[cluster]'")
def test_a_real_ray_gives_the_same_boxes(data):
    jobs = [Job(peer_spec("static"), ref, 5) for ref in find_sequences(data)]
    outcomes = {outcome.job.ref.name: outcome for outcome in run_jobs(jobs, 1, LOCAL_CLUSTER)}
    assert sorted(outcomes) == ["a_otb", "b_video"]
    for job in jobs:
        np.testing.assert_array_equal(outcomes[job.ref.name].result.boxes_xywh, run_job(job).result.boxes_xywh)


# Tables and page


def two_trackers(data: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Results of a box that stays, and of one that knows the truth, in folders of their own."""
    still, perfect = tmp_path / "still", tmp_path / "perfect"
    assert run(data, still) == 0
    for ref in find_sequences(data):
        sequence = ref.load()
        count = len(sequence.frames)
        result = Result(
            sequence.truth_xywh,
            np.full(count, 0.9),
            ("TRACKING",) * count,
            np.full(count, 0.002),
            sequence.start,
            (96, 64),
        )
        records.write_record(perfect, "perfect", "p", ref, sequence, result)
    return still, perfect


def test_tables_by_attribute(tmp_path):
    root = tmp_path / "lasot"
    write_lasot(root / "bird" / "bird-1")
    write_lasot(root / "bird" / "bird-2")
    write_lasot(root / "bird" / "bird-3")
    (root / "att").mkdir()
    flags = {"bird-1": (0, 8), "bird-2": (8,), "bird-3": ()}
    for name, chosen in flags.items():
        (root / "att" / f"{name}.txt").write_text(",".join(str(int(i in chosen)) for i in range(14)))
    still, perfect = two_trackers(root, tmp_path)
    runs = tables.load_runs([still, perfect])
    assert runs.trackers == ("perfect", "static")
    by_title = {table.title: table for table in tables.tables(runs)}
    attributes = by_title["AUC by attribute"]
    assert attributes.columns == ("attribute", "sequences", "perfect", "static")
    assert [row[:2] for row in attributes.rows] == [("illumination variation", 1), ("scale variation", 2)]
    assert attributes.rows[1][2:] == (pytest.approx(20 / 21), pytest.approx(STATIC_AUC))
    own = by_title["Benchmark's own numbers: lasot"]
    assert own.rows[1] == ("static", pytest.approx(42 / 5 / 21), 1.0, pytest.approx(1 / 5))


def test_only_shared_sequences_are_compared(data, tmp_path):
    still, perfect = two_trackers(data, tmp_path)
    (perfect / "boxes" / "perfect" / "a_otb.csv").unlink()
    runs = tables.load_runs([still, perfect])
    assert runs.sequences == ("b_video",) and runs.left_out == ("a_otb",)
    assert "left out: a_otb" in tables.tables(runs)[0].note
    (perfect / "boxes" / "perfect" / "b_video.csv").unlink()
    with pytest.raises(FileNotFoundError, match="no results in"):
        tables.load_runs([still, perfect])


def test_results_on_different_data_are_not_compared(data, tmp_path):
    still, perfect = two_trackers(data, tmp_path)
    record = perfect / "boxes" / "perfect" / "a_otb.csv"
    digest = json.loads(record.read_text().splitlines()[0][2:])["digest"]
    record.write_text(record.read_text().replace(digest, "0" * 16))
    with pytest.raises(ValueError, match="different data called a_otb"):
        tables.load_runs([still, perfect])


def test_trackers_of_one_name_are_told_apart(data, tmp_path):
    still, _ = two_trackers(data, tmp_path)
    again = tmp_path / "again"
    assert run(data, again) == 0
    assert set(tables.load_runs([still, again]).trackers) == {"still/static", "again/static"}
    old = tmp_path / "old" / "again"
    shutil.copytree(again, old)
    trackers = tables.load_runs([again, old, still]).trackers
    assert set(trackers) == {f"{tmp_path.name}/again/static", "old/again/static", "still/static"}


def test_the_page_holds_everything_itself(data, tmp_path, capsys):
    still, perfect = two_trackers(data, tmp_path)
    page = tmp_path / "pages" / "page.html"
    assert report.main([str(still), str(perfect), "--out", str(page), "--strips", "1"]) == 0
    text = page.read_text()
    assert not re.search(r'(?:src|href)="(?!data:)', text) and "<script" not in text
    assert text.count("data:image/jpeg;base64,") == 2  # one best, one worst
    assert "perfect [0.952]" in text and "static [0.262]" in text
    for name in ("success", "precision"):
        ElementTree.parse(page.with_name(f"page_{name}.svg"))
    for figure in re.findall(r"<svg.*?</svg>", text):
        ElementTree.fromstring(figure)


def test_the_page_does_without_images_and_says_so(data, tmp_path, capsys):
    still, _ = two_trackers(data, tmp_path)
    data.rename(tmp_path / "moved")
    assert report.main([str(still)]) == 0
    text = (still / "report.html").read_text()
    assert "No images found for" in text and "data:image" not in text and "IoU over time" in text
    assert report.main([str(still), "--sequences", str(tmp_path / "moved")]) == 0
    assert "data:image" in (still / "report.html").read_text()
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert "no results in" in capsys.readouterr().err


def test_strip_draws_truth_and_every_tracker(data, tmp_path):
    still, perfect = two_trackers(data, tmp_path)
    runs = tables.load_runs([still, perfect])
    sheet = report.strip([runs.records[name]["a_otb"] for name in runs.trackers], count=2)
    for colour in (line_style(0)[0], line_style(1)[0]):
        bgr = np.array([int(colour[i : i + 2], 16) for i in (5, 3, 1)])
        assert (np.abs(sheet.astype(int) - bgr).max(axis=2) < 30).any()


def test_a_line_plot_has_gaps_where_there_is_no_value():
    figure = line_plot([Line("a <b>", [0, 1, 2, 3], [0.5, NAN, 1, 0])], "t", "x", "y", (0, 3))
    root = ElementTree.fromstring(figure)
    lines = root.findall(".//{http://www.w3.org/2000/svg}polyline")
    assert [len(line.get("points").split()) for line in lines] == [1, 2]
    assert "a &lt;b&gt;" in figure
    with pytest.raises(ValueError, match="expected lines"):
        line_plot([], "t", "x", "y", (0, 1))
