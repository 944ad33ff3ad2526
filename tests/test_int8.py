"""INT8 graphs beside the FP32 ones: how they get into a bundle, when they go, which CPU runs them, and how well."""

from __future__ import annotations

import dataclasses
import os
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from stand_ins import lively

from benchmarks import tracker_factories
from evaluation.trackers import make_tracker, model_spec
from model_export import cli, compare
from model_export.compare import literal_runner, scene_clip
from model_export.convert import add_int8, calibration_feeds, convert_bundle
from model_export.crops import real_pairs
from model_export.onnx_export import export_bundle
from model_export.verify import compare_runtimes
from siamtrack import Bundle, BundleError, SiamTracker, load_bundle
from siamtrack import cli as siamtrack_cli
from siamtrack.boxes import iou_xywh
from siamtrack.bundle import DEFAULT_MODEL, sha256, write_manifest
from siamtrack.nets import MODELS
from siamtrack.runners import facts_of, open_runner
from siamtrack.runners import onnxruntime as onnxruntime_runner
from siamtrack.runners.onnxruntime import OnnxRuntimeRunner
from siamtrack.scene import SceneFrame


@pytest.fixture(scope="module")
def plain(default_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The default model without INT8 graphs."""
    return copied(default_bundle, tmp_path_factory.mktemp("plain") / "bundle", int8={})


@pytest.fixture(scope="module")
def converted(plain: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Of the same model, a bundle that is INT8 itself."""
    return convert_bundle(plain, "int8", tmp_path_factory.mktemp("int8"), crops=16)


@pytest.fixture(scope="module")
def both(plain: Bundle, converted: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle with INT8 graphs beside the FP32 ones; do not change it."""
    return add_int8(copied(plain, tmp_path_factory.mktemp("both") / "bundle"), converted)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets what instructions for INT8 the CPU has."""
    return lambda feature: monkeypatch.setattr("siamtrack.runners.dot_products_here", lambda: feature)


def copied(bundle: Bundle, folder: Path, **changes: Any) -> Bundle:
    """A copy of a bundle's graphs and manifest, changed."""
    folder.mkdir()
    for file in bundle.path.glob("*.onnx"):
        shutil.copy(file, folder)
    write_manifest(folder, dataclasses.replace(bundle.manifest, **changes))
    return load_bundle(folder)


def renew_search(bundle: Bundle) -> None:
    """Another FP32 search graph, as an export would leave it."""
    model = onnx.load(str(bundle.graph_path("search")))
    model.producer_name += " again"
    onnx.save(model, str(bundle.graph_path("search")))
    manifest = bundle.manifest
    search = dataclasses.replace(manifest.graphs["search"], sha256=sha256(bundle.graph_path("search")))
    write_manifest(bundle.path, dataclasses.replace(manifest, graphs={**manifest.graphs, "search": search}))


# --- into the bundle -----------------------------------------------------------------------------------------------


def test_int8_graphs_join_the_bundle_and_change_nothing_else(plain: Bundle, converted: Bundle, both: Bundle) -> None:
    added = both.manifest.int8
    assert list(added) == ["search"]
    assert added["search"].sha256 == converted.manifest.graphs["search"].sha256
    assert added["search"].source_sha256 == plain.manifest.graphs["search"].sha256
    provenance = {**plain.manifest.provenance, "int8_calibration_crops": "16 of the rendered scene"}
    assert both.manifest == dataclasses.replace(plain.manifest, int8=added, provenance=provenance)
    assert sorted(p.name for p in both.path.iterdir()) == [
        "manifest.json", "search.int8.onnx", "search.onnx", "template.onnx", "update.onnx",
    ]  # fmt: skip


def test_adding_again_replaces(plain: Bundle, both: Bundle, tmp_path: Path) -> None:
    again = copied(both, tmp_path / "bundle")
    other = convert_bundle(plain, "int8", tmp_path / "other", crops=2)
    found = add_int8(again, other)
    digest = found.manifest.int8["search"].sha256
    assert digest == other.manifest.graphs["search"].sha256
    assert digest != both.manifest.int8["search"].sha256
    assert found.manifest.provenance["int8_calibration_crops"] == "2 of the rendered scene"
    assert {p.name for p in again.path.iterdir()} == {p.name for p in both.path.iterdir()}


@pytest.mark.parametrize("call", ["copyfile", "second manifest"])
def test_a_break_in_the_middle_leaves_a_whole_bundle(
    both: Bundle, converted: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    bundle = copied(both, tmp_path / "bundle")
    written: list[Any] = []

    def fail(*arguments: Any) -> None:
        written.append(arguments)
        if call == "copyfile" or len(written) == 2:
            raise OSError("disk full")
        write_manifest(*arguments)

    monkeypatch.setattr("model_export.convert." + ("shutil.copyfile" if call == "copyfile" else "write_manifest"), fail)
    with pytest.raises(OSError, match="disk full"):
        add_int8(bundle, converted)
    assert load_bundle(bundle.path).int8_paths == {}
    monkeypatch.undo()
    assert add_int8(bundle, converted).int8_paths


def test_what_was_made_from_a_graph_that_is_gone_is_stale(
    both: Bundle, converted: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture, on_cpu: Callable[[str], None]
) -> None:
    on_cpu("avx512_vnni")
    bundle = copied(both, tmp_path / "bundle")
    renew_search(bundle)
    stale = load_bundle(bundle.path)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with open_runner(stale, threads=1) as runner:
        assert facts_of(runner)["precision"] == "fp32 (the bundle has no INT8 graphs)"
    with pytest.raises(BundleError, match=r"has no INT8 graphs; make them: siamtrack-export precision .* --add"):
        open_runner(stale, precision="int8")
    # Converted before the export, added after it: still stale.
    assert add_int8(bundle, converted).int8_paths == {}
    assert add_int8(stale, convert_bundle(stale, "int8", tmp_path / "again", crops=2)).int8_paths
    caplog.clear()
    assert load_bundle(bundle.path).int8_paths
    assert not caplog.records


def test_a_new_export_has_no_int8_graphs(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = MODELS["siamfc"]().eval()
    bundle = export_bundle("siamfc", net, tmp_path, "none")
    (tmp_path / "search.int8.onnx").write_bytes(b"of the network before")
    (tmp_path / "mine.int8.onnx").write_bytes(b"of somebody else")
    again = export_bundle("siamfc", net, tmp_path, "none")
    assert again.manifest.int8 == {} and again.manifest.graphs == bundle.manifest.graphs
    assert {p.name for p in tmp_path.iterdir()} == {"manifest.json", "search.onnx", "template.onnx", "mine.int8.onnx"}


def test_a_bundle_that_is_int8_itself_has_none_beside(both: Bundle, tmp_path: Path) -> None:
    assert convert_bundle(both, "int8", tmp_path, crops=2).manifest.int8 == {}


# --- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "COMPARED_CROPS", 4)
    monkeypatch.setattr(cli, "COMPARED_FRAMES", 8)


def test_command_adds_what_holds(
    plain: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    bundle = copied(plain, tmp_path / "bundle")
    before = {p.name: p.read_bytes() for p in bundle.path.iterdir()}
    command = ["precision", str(bundle.path), "--precision", "int8", "--add", "--calibration-crops", "8"]
    tolerant = compare.Tolerance(*[np.inf] * 4)  # how well it holds depends on the CPU
    monkeypatch.setitem(compare.TOLERANCES, "int8", dataclasses.replace(tolerant, response=0.0))
    assert cli.main(command) == 1
    said = capsys.readouterr().out
    assert "OUTSIDE TOLERANCE" in said and "stays as it is" in said
    assert {p.name: p.read_bytes() for p in bundle.path.iterdir()} == before
    monkeypatch.setitem(compare.TOLERANCES, "int8", tolerant)
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "4 crops, 8 frames" in said
    (row,) = (line.split() for line in said.splitlines() if line.startswith("ONNX Runtime int8"))
    assert float(row[4]) > 0, row  # response: or FP32 was compared with itself
    assert row[-1] == "ok"
    assert load_bundle(bundle.path).int8_paths


def test_command_refuses(
    plain: Bundle,
    converted: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = ["precision", str(plain.path), "--precision"]
    assert cli.main([*start, "fp16", "--add"]) == 2
    assert "--add is for int8, got fp16" in capsys.readouterr().err
    for place in ([], ["--add", "--out", str(tmp_path)]):
        with pytest.raises(SystemExit):
            cli.main([*start, "int8", *place])
        assert "--out" in capsys.readouterr().err
    assert cli.main(["precision", str(converted.path), "--precision", "int8", "--add"]) == 2
    assert "is int8: only an fp32 bundle becomes" in capsys.readouterr().err
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert cli.main([*start, "int8", "--add"]) == 2
    assert f"{plain.path} cannot be written to; copy it to a folder of yours" in capsys.readouterr().err


# --- which graphs run ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "wanted", "feature", "chosen"),
    [
        ("both", "auto", "avx512_vnni", "int8 (this CPU has avx512_vnni)"),
        ("both", "auto", "asimddp", "int8 (this CPU has asimddp)"),
        ("both", "auto", "", "fp32 (this CPU has no dot products of bytes)"),
        ("both", "fp32", "avx_vnni", "fp32 (as asked)"),
        ("both", "int8", "avx_vnni", "int8 (as asked)"),
        ("both", "int8", "", "int8 (as asked)"),
        ("both", "fp16", "avx_vnni", "fp32 (fp16 is for GPUs)"),
        ("plain", "auto", "avx512_vnni", "fp32 (the bundle has no INT8 graphs)"),
        ("plain", "auto", "", "fp32 (the bundle has no INT8 graphs)"),
        ("converted", "auto", "", "int8 (the bundle's only graphs)"),
        ("converted", "int8", "", "int8 (as asked)"),
        ("converted", "fp16", "", "int8 (fp16 is for GPUs)"),
    ],
)
def test_choice(
    request: pytest.FixtureRequest,
    on_cpu: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    which: str,
    wanted: str,
    feature: str,
    chosen: str,
) -> None:
    on_cpu(feature)
    opened: list[str] = []
    real = onnxruntime_runner._open

    def note(path: Path, *others: Any) -> Any:
        opened.append(path.name)
        return real(path, *others)

    monkeypatch.setattr(onnxruntime_runner, "_open", note)
    bundle: Bundle = request.getfixturevalue(which)
    with open_runner(bundle, threads=1, precision=wanted) as runner:
        assert facts_of(runner) == {"backend": "onnxruntime", "precision": chosen}
    beside = which == "both" and chosen.startswith("int8")
    assert sorted(opened) == ["search.int8.onnx" if beside else "search.onnx", "template.onnx", "update.onnx"]
    warned = [message for message in caplog.messages if "runs in" in message]
    assert len(warned) == (wanted == "fp16" or (which, wanted, feature) == ("both", "int8", ""))


def test_what_cannot_be_chosen_is_refused(plain: Bundle, converted: Bundle) -> None:
    with pytest.raises(ValueError, match="unknown precision 'half'; known: auto, fp32, fp16, int8"):
        SiamTracker.from_pretrained(plain.path, precision="half")
    with pytest.raises(BundleError, match=r"has no INT8 graphs; make them: siamtrack-export precision .* int8 --add"):
        SiamTracker.from_pretrained(plain.path, precision="int8")
    with pytest.raises(BundleError, match="is int8 and has no fp32 graphs; take the FP32 bundle it was made from"):
        SiamTracker.from_pretrained(converted.path, precision="fp32")


def test_a_runner_of_which_nothing_is_asked_runs_what_every_cpu_can(
    both: Bundle, on_cpu: Callable[[str], None]
) -> None:
    """What everything else is compared with must not depend on the machine."""
    on_cpu("avx512_vnni")
    with OnnxRuntimeRunner(both, threads=1) as runner:
        assert runner.facts["precision"] == "fp32 (as asked)"


def test_int8_tracks_as_fp32_does(both: Bundle, scene: list[SceneFrame]) -> None:
    boxes, scores = {}, {}
    for precision in ("fp32", "int8"):
        tracker = SiamTracker.from_pretrained(both.path, threads=1, precision=precision)
        tracker.init(scene[0].image, scene[0].box_xywh)
        tracks = [tracker.update(frame.image) for frame in scene[1:30]]
        boxes[precision], scores[precision] = (
            np.array([getattr(track, value) for track in tracks]) for value in ("box_xywh", "score")
        )
        tracker.close()
    assert iou_xywh(boxes["fp32"], boxes["int8"]).mean() > 0.7
    assert iou_xywh(boxes["int8"], [frame.box_xywh for frame in scene[1:30]]).mean() > 0.7
    assert 0 < np.abs(scores["fp32"] - scores["int8"]).mean() < 0.2  # not at all would be the same graph


def test_verify_takes_the_int8_graphs_that_are_there(both: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def convert(bundle: Bundle, precision: str, out: Path, images: Any, crops: int, target: str = "onnxruntime") -> Any:
        made.append(target)
        return convert_bundle(bundle, precision, out, images, crops, target)

    monkeypatch.setattr("model_export.verify.convert_bundle", convert)
    found = compare_runtimes(both, list(real_pairs(both, 2)), scene_clip(3, 320, 180), ("int8",), calibration_crops=2)
    assert [c.name for c in found[:2]] == ["ONNX Runtime int8", "ONNX Runtime int8, for CPUs"]
    assert made == ["tensorrt"]
    assert found[1].response > 0


# --- what people are told ------------------------------------------------------------------------------------------


def test_commands_say_which_graphs_run_and_why(
    both: Bundle,
    scene: list[SceneFrame],
    tmp_path: Path,
    on_cpu: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copied(both, tmp_path / DEFAULT_MODEL)
    monkeypatch.setattr("siamtrack.bundle.MODELS_DIR", tmp_path)
    for feature, chosen in (("avx_vnni", "int8 (this CPU has avx_vnni)"), ("", "fp32 (this CPU has no dot products")):
        on_cpu(feature)
        for command in ("models", "doctor"):
            assert siamtrack_cli.main([command]) == 0
            assert chosen in capsys.readouterr().out
    monkeypatch.setattr(siamtrack_cli, "Scene", lambda *_: types.SimpleNamespace(render=lambda i: scene[i]))
    bench = ["bench", "--iterations", "2", "--size", "480x270", "--threads", "1"]
    for options, said in ((), "fp32 (this CPU has no dot"), (("--precision", "int8"), "int8 (as asked)"):
        assert siamtrack_cli.main([*bench, *options]) == 0
        assert f"siamcan-mobilenetv2, onnxruntime, 480x270, precision {said}" in capsys.readouterr().out


# --- every edge model ----------------------------------------------------------------------------------------------

HEADS = {
    "siamcan-mobilenetv2": {"net.cls.predict", "net.loc.predict"},
    "siamla-mobilenetv2": {"net.cls_logits", "net.bbox_pred", "net.localise.score"},
    "dastsiam-mobilenetv2": {"net.cls", "net.second", "net.loc"},
}


@pytest.mark.parametrize("name", HEADS)
def test_edge_models_keep_both_ends_in_fp32(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = lively(MODELS[name]())
    with torch.no_grad():  # or every cell is at one end of the range, and differences do not show
        for head in HEADS[name]:
            net.get_submodule(head.removeprefix("net.")).weight.mul_(0.1)
    bundle = export_bundle(name, net, tmp_path / "fp32", "none")
    converted = convert_bundle(bundle, "int8", tmp_path / "int8", crops=6)
    graph = onnx.load(str(converted.graph_path("search"))).graph
    assert {node.domain for node in graph.node} == {""}  # any runtime can run it
    dequantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    convolutions = [node.input[1] for node in graph.node if node.op_type == "Conv"]
    assert {w.removesuffix(".weight") for w in convolutions if w not in dequantised} == HEADS[name]
    assert len(convolutions) > 40
    seen = {"image"}  # all that comes from the image: what comes from other inputs alone is not quantised
    for node in graph.node:
        if seen.intersection(node.input):
            seen.update(node.output)
    quantised = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    assert len(quantised) > 40
    assert quantised <= seen
    feeds = list(calibration_feeds(bundle, 10))[6:]
    with OnnxRuntimeRunner(bundle, threads=1) as exact, literal_runner(converted) as int8:
        for feed in feeds:
            wanted, found = (runner.session("search").run(["response"], feed)[0] for runner in (exact, int8))
            assert wanted.std() > 1e-3
            assert np.corrcoef(wanted.ravel(), found.ravel())[0, 1] > 0.6  # of random weights, calibrated on little


def test_measurements_name_their_precision(both: Bundle, on_cpu: Callable[[str], None]) -> None:
    on_cpu("avx512_vnni")  # where "auto" would take INT8
    makers = tracker_factories([str(both.path)], [], (), 1)
    assert list(makers) == [both.path.name, f"{both.path.name}-int8"]
    ran = [facts_of(make().runner)["precision"] for make in makers.values()]
    assert ran == ["fp32 (as asked)", "int8 (as asked)"]
    evaluated = make_tracker(model_spec(str(both.path), "onnxruntime", 1, []))
    assert facts_of(evaluated.runner)["precision"] == ran[0]
