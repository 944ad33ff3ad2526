"""Precision in ONNX graphs: what stays FP32, that types are consistent, and that the numbers still come out."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from model_export import cli
from model_export.bias_correction import channel_means, correct_biases
from model_export.compare import literal_runner
from model_export.convert import calibration_feeds, convert_bundle, convert_graph
from model_export.precision import (
    DELICATE_OPERATIONS,
    INT8_SCHEMES,
    count_precisions,
    delicate_nodes,
    quantised_nodes,
    to_fp16,
    to_int8,
)
from siamtrack import Bundle, SiamTracker, load_bundle
from siamtrack.boxes import iou_xywh
from siamtrack.bundle import write_manifest
from siamtrack.runners.onnxruntime import OnnxRuntimeRunner
from siamtrack.scene import SceneFrame

Feeds = dict[str, NDArray[Any]]


def run(model: onnx.ModelProto, feeds: Feeds, optimise: bool = False) -> list[NDArray[Any]]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def make_model(nodes: list[onnx.NodeProto], constants: dict[str, NDArray[Any]], outputs: list[str]) -> onnx.ModelProto:
    """A graph with the float input ``x`` [N, 4, 8, 8]."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 8, 8])
    graph = helper.make_graph(
        nodes,
        "test",
        [x],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def two_convolutions(*tail: onnx.NodeProto, outputs: list[str] | None = None, **constants: Any) -> onnx.ModelProto:
    """Normalisation, convolution, softmax, convolution, and a tail on ``b``."""
    rng = np.random.default_rng(0)
    weights = {f"w{i}": rng.standard_normal((4, 4, 3, 3)).astype(np.float32) * 0.2 for i in range(2)}
    nodes = [
        helper.make_node("Mul", ["x", "half"], ["scaled"], name="normalise"),
        helper.make_node("Conv", ["scaled", "w0"], ["a"], name="first", pads=[1] * 4),
        helper.make_node("Mul", ["a", "half"], ["a_half"], name="halve"),
        helper.make_node("Softmax", ["a_half"], ["soft"], name="attend", axis=1),
        helper.make_node("Conv", ["soft", "w1"], ["b"], name="second", pads=[1] * 4),
        *tail,
    ]
    return make_model(nodes, {"half": np.float32(0.5).reshape(1), **weights, **constants}, outputs or ["b"])


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    values = (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input)
    return {value.name: value.type.tensor_type.elem_type for value in values}


def kinds(model: onnx.ModelProto) -> dict[str, int]:
    """Type that each named node gives."""
    types = types_of(model)
    return {node.name: types[node.output[0]] for node in model.graph.node}


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


X = {"x": np.random.default_rng(1).standard_normal((2, 4, 8, 8)).astype(np.float32)}


@pytest.fixture(scope="module")
def search(default_bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(str(default_bundle.graph_path("search")))


@pytest.fixture(scope="module")
def feeds(default_bundle: Bundle) -> list[Feeds]:
    return list(calibration_feeds(default_bundle, 8))


# --- FP16 ----------------------------------------------------------------------------------------------------------


def test_ends_and_delicate_operations_stay_fp32() -> None:
    model = two_convolutions(helper.make_node("Add", ["b", "b"], ["c"], name="decode"), outputs=["c"])
    assert delicate_nodes(model) == {"normalise", "attend", "decode"}
    found = kinds(to_fp16(model))
    half, full = TensorProto.FLOAT16, TensorProto.FLOAT
    assert {name: found[name] for name in ("normalise", "first", "halve", "attend", "second", "decode")} == {
        "normalise": full,
        "first": half,
        "halve": half,
        "attend": full,
        "second": half,
        "decode": full,
    }


def test_boxes_and_sampling_positions_stay_fp32_although_convolutions_follow() -> None:
    """As in SiamLA, whose quality is read from the features where its boxes lie."""
    tail = [
        helper.make_node("Clip", ["b", "zero", "big"], ["ltrb"], name="distances"),
        helper.make_node("MatMul", ["ltrb", "mix"], ["box"], name="decode"),
        helper.make_node("Sub", ["ltrb", "zero"], ["at"], name="position"),
        helper.make_node("Abs", ["at"], ["weights"], name="hat"),
        helper.make_node("MatMul", ["weights", "soft"], ["sample"], name="sample"),
        helper.make_node("Relu", ["sample"], ["rectified"], name="rectify"),
        helper.make_node("Conv", ["rectified", "w1"], ["quality"], name="third", pads=[1] * 4),
    ]
    zero, big = np.array(0, np.float32), np.array(400, np.float32)
    constants = {"zero": zero, "big": big, "mix": np.eye(8, dtype=np.float32)}
    model = two_convolutions(*tail, outputs=["box", "quality"], **constants)
    found = kinds(to_fp16(model))
    assert {found[name] for name in ("distances", "decode", "position", "hat")} == {TensorProto.FLOAT}
    assert {found[name] for name in ("second", "sample", "rectify", "third")} == {TensorProto.FLOAT16}
    (result, _), (exact, _) = (run(m, X) for m in (to_fp16(model, ["first", "halve", "second"]), model))
    np.testing.assert_array_equal(result, exact)  # nothing is rounded on the way to a box but by the network itself


@pytest.mark.parametrize("operation", ["Sigmoid", "Exp", "ReduceSum", "LayerNormalization", "InstanceNormalization"])
def test_operations_that_round_badly_are_delicate(operation: str) -> None:
    assert operation in DELICATE_OPERATIONS


def test_inputs_and_outputs_keep_their_types() -> None:
    # Made by an FP16 node, used by another, and given out: the output is FP32 all the same.
    model = two_convolutions(outputs=["a", "b"])
    converted = to_fp16(model)
    assert [v.name for v in converted.graph.output] == ["a", "b"]
    for a, b in zip(run(converted, X), run(model, X), strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)
        assert (a != b).any()  # or nothing was converted


def test_nothing_is_rounded_between_fp32_nodes() -> None:
    # 2049 is no FP16 number: it would come out as 2048.
    tail = [
        helper.make_node("Mul", ["b", "zero"], ["nothing"], name="t0"),
        helper.make_node("Add", ["nothing", "big"], ["c"], name="t1"),
        helper.make_node("Add", ["c", "zero"], ["d"], name="t2"),
    ]
    constants = {"zero": np.zeros(1, np.float32), "big": np.full(1, 2049, np.float32)}
    converted = to_fp16(two_convolutions(*tail, outputs=["d"], **constants))
    assert (run(converted, X)[0] == 2049).all()


def test_constant_shared_by_both_types_stays_exact_where_it_is_fp32() -> None:
    # "third" is used by the normalisation (FP32) and between the convolutions (FP16).
    third = np.full(1, 1 / 3, np.float32)
    model = two_convolutions()
    model.graph.initializer.append(numpy_helper.from_array(third, "third"))
    for node in model.graph.node:
        node.input[:] = ["third" if name == "half" else name for name in node.input]
    converted = to_fp16(model)
    constants = {t.name: numpy_helper.to_array(t) for t in converted.graph.initializer}
    used = {node.name: constants[node.input[1]] for node in converted.graph.node if node.name in ("normalise", "halve")}
    assert used["normalise"].dtype == np.float32
    assert used["normalise"] == third
    assert used["halve"].dtype == np.float16


def test_values_beyond_fp16_stay_finite_and_nonzero() -> None:
    model = two_convolutions()
    extremes = np.array([1e6, -1e6, 1e-10, 0], np.float32).reshape(1, 4, 1, 1)
    model.graph.initializer.append(numpy_helper.from_array(extremes, "extremes"))
    halve = next(node for node in model.graph.node if node.name == "halve")
    halve.input[1] = "extremes"
    constant = next(t for t in to_fp16(model).graph.initializer if t.name == "extremes_fp16")
    values = numpy_helper.to_array(constant).astype(np.float64).ravel()
    assert values[0] == 65504 == -values[1]
    assert 0 < values[2] < 1e-7  # it may be divided by
    assert values[3] == 0


def test_nodes_can_be_kept_fp32_by_name() -> None:
    model = two_convolutions()
    assert kinds(to_fp16(model))["first"] == TensorProto.FLOAT16
    assert kinds(to_fp16(model, ["first"]))["first"] == TensorProto.FLOAT
    everything = [node.name for node in model.graph.node]
    np.testing.assert_array_equal(run(to_fp16(model, everything), X)[0], run(model, X)[0])


def test_what_cannot_be_converted_is_refused() -> None:
    with pytest.raises(ValueError, match="no such nodes to keep in FP32: third"):
        to_fp16(two_convolutions(), ["third"])
    twins = two_convolutions()
    twins.graph.node[2].name = twins.graph.node[1].name
    with pytest.raises(ValueError, match="'first' stands 2 times"):
        to_fp16(twins)
    branch = helper.make_graph([], "branch", [], [helper.make_tensor_value_info("w0", TensorProto.FLOAT, None)])
    branching = two_convolutions()
    branching.graph.node.append(
        helper.make_node("If", ["flag"], ["c"], name="branching", then_branch=branch, else_branch=branch)
    )
    branching.graph.initializer.append(numpy_helper.from_array(np.array(True), "flag"))
    with pytest.raises(ValueError, match=r"'branching' \(If\) holds a subgraph"):
        to_fp16(branching)


def test_conversion_leaves_the_original_alone() -> None:
    model = two_convolutions()
    before = model.SerializeToString()
    to_fp16(model)
    assert model.SerializeToString() == before


def test_constant_nodes_are_converted_too() -> None:
    value = numpy_helper.from_array(np.full(1, 0.5, np.float32), "value")
    model = two_convolutions()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c_half"], name="constant", value=value))
    next(node for node in model.graph.node if node.name == "halve").input[1] = "c_half"
    converted = to_fp16(model)
    halve = next(node for node in converted.graph.node if node.name == "halve")
    assert types_of(converted)[halve.output[0]] == TensorProto.FLOAT16
    assert not [node for node in converted.graph.node if "c_half" in node.input]  # no cast at run time
    np.testing.assert_allclose(run(converted, X)[0], run(model, X)[0], rtol=2e-3, atol=2e-3)


def test_shipped_graphs_in_fp16(default_bundle: Bundle, search: onnx.ModelProto, feeds: list[Feeds]) -> None:
    converted = to_fp16(search)
    counts = count_precisions(converted)
    assert counts["Conv", "fp16"] == sum(node.op_type == "Conv" for node in search.graph.node)
    assert not counts["Conv", "fp32"]
    for operation in ("Sigmoid", "Exp", "Log", "ReduceMean", "GatherElements"):
        assert counts[operation, "fp32"]
        assert not counts[operation, "fp16"]
    errors = [np.abs(run(converted, f)[3] - run(search, f)[3]).max() for f in feeds]
    assert 0 < max(errors) < 0.02
    assert len(converted.SerializeToString()) < 0.6 * len(search.SerializeToString())


# --- INT8 ----------------------------------------------------------------------------------------------------------


def test_int8_takes_convolutions_but_not_the_last_and_not_copies(search: onnx.ModelProto) -> None:
    chosen = quantised_nodes(search)
    convolutions = [node for node in search.graph.node if node.op_type == "Conv"]
    assert chosen < {node.name for node in convolutions}
    assert len(chosen) == len(convolutions) - 2  # the two branches' predictions
    with_chains = quantised_nodes(search, chains=True) - chosen
    assert {n.op_type for n in search.graph.node if n.name in with_chains} == {"Add", "Clip", "Relu"}


def test_one_hot_gathers_are_not_quantised() -> None:
    gather = np.eye(9, dtype=np.float32).reshape(9, 1, 3, 3).repeat(4, 0)
    model = two_convolutions(
        helper.make_node("Conv", ["b", "gather"], ["c"], name="gathering", group=4),
        helper.make_node("Conv", ["c", "w2"], ["d"], name="last"),
        outputs=["d"],
        gather=gather,
        w2=np.ones((4, 36, 1, 1), np.float32),
    )
    assert quantised_nodes(model) == {"first", "second"}


def test_a_head_of_boxes_is_not_quantised_although_convolutions_follow() -> None:
    """As in SiamLA: eight bits would round distances to some percent."""
    tail = [
        helper.make_node("Exp", ["b"], ["box"], name="decode"),
        helper.make_node("Add", ["box", "soft"], ["sample"], name="sample"),
        helper.make_node("Conv", ["sample", "w1"], ["quality"], name="third", pads=[1] * 4),
        helper.make_node("Conv", ["a", "w1"], ["c"], name="fourth", pads=[1] * 4),
        helper.make_node("Conv", ["c", "w1"], ["d"], name="fifth", pads=[1] * 4),
    ]
    assert quantised_nodes(two_convolutions(*tail, outputs=["box", "quality", "d"])) == {"first", "fourth"}


def test_only_features_are_added_in_int8() -> None:
    tail = [
        helper.make_node("Add", ["a", "b"], ["features"], name="features"),
        helper.make_node("Add", ["features", "scaled"], ["told"], name="told"),  # of what no convolution leads to
        helper.make_node("Add", ["told", "half"], ["shifted"], name="shifted"),
        helper.make_node("Conv", ["shifted", "w1"], ["c"], name="third", pads=[1] * 4),
    ]
    model = two_convolutions(*tail, outputs=["c"])
    assert quantised_nodes(model, chains=True) == {"first", "second", "features"}
    assert quantised_nodes(model) == {"first", "second"}


@pytest.mark.parametrize("target", sorted(INT8_SCHEMES))
def test_shipped_search_graph_in_int8(search: onnx.ModelProto, feeds: list[Feeds], target: str) -> None:
    converted = to_int8(search, feeds, INT8_SCHEMES[target])
    counts = count_precisions(converted)
    assert counts["Conv", "int8"] == len(quantised_nodes(search))
    constants = {t.name: numpy_helper.to_array(t) for t in converted.graph.initializer}
    zeros = [constants[n.input[2]] for n in converted.graph.node if n.op_type == "QuantizeLinear"]
    symmetric = target == "tensorrt"
    assert all(zero.dtype == np.int8 and not zero.any() for zero in zeros) is symmetric
    scales = [constants[n.input[1]] for n in converted.graph.node if n.op_type == "DequantizeLinear"]
    assert max(scale.size for scale in scales) > 1  # weights: a scale a channel
    assert any(c.dtype == np.int32 and c.size > 1 for c in constants.values()) is not symmetric  # quantised biases
    errors = [np.abs(run(converted, f)[3] - run(search, f)[3]).max() for f in feeds]
    assert 0 < max(errors) < 0.2
    assert np.median([np.abs(run(converted, f)[0] - run(search, f)[0]).max() for f in feeds]) < 4


@pytest.mark.parametrize("target", sorted(INT8_SCHEMES))
def test_the_mean_that_rounding_moves_is_put_back(
    search: onnx.ModelProto, feeds: list[Feeds], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = dataclasses.replace(INT8_SCHEMES[target], rest="fp32")
    corrected = to_int8(search, feeds, scheme)
    monkeypatch.setattr("model_export.precision.correct_biases", lambda *_: [])
    plain = to_int8(search, feeds, scheme)
    names = correct_biases(copy_of(plain), search, feeds)
    outputs = {node.name: node.output[0] for node in search.graph.node}
    assert len(names) == 3  # the neck's normalisation and the branches' predictions
    # After each came its correction only INT8 nodes moved, so all of them have their FP32 mean again.
    for wanted, before, after in zip(
        *(channel_means(model, [outputs[name] for name in names], feeds) for model in (search, plain, corrected)),
        strict=True,
    ):
        assert np.abs(after - wanted).max() < 0.1 * np.abs(before - wanted).max() + 1e-4


def test_a_bias_that_two_nodes_share_is_left_alone() -> None:
    w, b = np.eye(4, dtype=np.float32).reshape(4, 4, 1, 1) / 3, np.zeros(4, np.float32)
    tail = [
        helper.make_node("Conv", ["b", "w", "bias"], ["c"], name="third"),
        helper.make_node("Conv", ["c", "w", "bias"], ["d"], name="fourth"),
    ]
    model = two_convolutions(*tail, outputs=["d"], w=w, bias=b)
    converted = to_int8(model, [X], INT8_SCHEMES["tensorrt"], keep_fp32=["third", "fourth"])
    assert not next(numpy_helper.to_array(t) for t in converted.graph.initializer if t.name == "bias").any()


def test_weights_kept_in_fp32_are_run_in_fp32(
    search: onnx.ModelProto, feeds: list[Feeds], default_bundle: Bundle, tmp_path: Path
) -> None:
    """Those of a depthwise convolution between INT8 ones, whose size differs much between channels."""
    depthwise = [node for node in search.graph.node if node.op_type == "Conv"][1]
    converted = to_int8(search, feeds, INT8_SCHEMES["onnxruntime"], keep_fp32=[depthwise.name])
    means = (channel_means(model, depthwise.output, feeds[:1])[0] for model in (search, converted))
    np.testing.assert_allclose(*means, atol=0.004)

    folder = shutil.copytree(default_bundle.path, tmp_path / "bundle")
    onnx.save(converted, folder / default_bundle.manifest.int8["search"].file)
    with OnnxRuntimeRunner(Bundle(folder, default_bundle.manifest), threads=1, precision="int8") as runner:
        for feed in feeds:
            response = runner.session("search").run(["response"], feed)[0]
            assert np.abs(response - run(search, feed)[3]).max() < 0.05


def test_int8_needs_something_to_quantise_and_crops(search: onnx.ModelProto) -> None:
    model = make_model([helper.make_node("Relu", ["x"], ["y"], name="relu")], {}, ["y"])
    with pytest.raises(ValueError, match="no convolution to quantise"):
        to_int8(model, [X], INT8_SCHEMES["tensorrt"])
    with pytest.raises(ValueError, match="needs crops to calibrate on"):
        to_int8(search, [], INT8_SCHEMES["tensorrt"])


def test_calibration_feeds_are_what_tracking_gives(default_bundle: Bundle, feeds: list[Feeds]) -> None:
    spec = {s.name: s for s in default_bundle.manifest.graphs["search"].inputs}
    assert len(feeds) == 8
    for feed in feeds:
        assert set(feed) == set(spec)
        for name, value in feed.items():
            assert value.dtype.name == spec[name].dtype
            assert list(value.shape) == [1 if d == "N" else d for d in spec[name].shape]
    assert (feeds[0]["kernel"] != feeds[1]["kernel"]).any()


# --- bundles and the command ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def int8_bundle(default_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return convert_bundle(default_bundle, "int8", tmp_path_factory.mktemp("int8"), crops=16)


def test_converted_bundle_says_what_it_is(default_bundle: Bundle, int8_bundle: Bundle) -> None:
    manifest, original = int8_bundle.manifest, default_bundle.manifest
    assert manifest.precision == "int8"
    assert manifest.accuracy == {}  # measured of another
    assert manifest.provenance["converted_from_search_sha256"] == original.graphs["search"].sha256
    assert manifest.provenance["calibration_crops"] == "16 of the rendered scene"
    assert manifest.graphs["search"].sha256 != original.graphs["search"].sha256
    changed = {"graphs": manifest.graphs, "precision": "int8", "int8": {}, "accuracy": {}}
    assert manifest == dataclasses.replace(original, **changed, provenance=manifest.provenance)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_converted_bundle_tracks(
    default_bundle: Bundle, int8_bundle: Bundle, scene: list[SceneFrame], tmp_path: Path, precision: str
) -> None:
    bundle = int8_bundle if precision == "int8" else convert_bundle(default_bundle, "fp16", tmp_path)
    with OnnxRuntimeRunner(bundle, threads=1) as runner:
        tracker = SiamTracker(runner)
        tracker.init(scene[0].image, scene[0].box_xywh)
        boxes = [tracker.update(frame.image).box_xywh for frame in scene[1:30]]
    overlap = iou_xywh(boxes, [frame.box_xywh for frame in scene[1:30]])
    assert overlap.mean() > 0.7


def test_literal_runner_computes_what_tensorrt_gets(default_bundle: Bundle, tmp_path: Path, feeds: list[Feeds]) -> None:
    bundle = convert_bundle(default_bundle, "int8", tmp_path, crops=8, target="tensorrt")
    with OnnxRuntimeRunner(default_bundle, threads=1) as exact, literal_runner(bundle) as runner:
        for feed in feeds[:3]:
            ours, reference = (r.session("search").run(["response"], feed)[0] for r in (runner, exact))
            assert np.abs(ours - reference).max() < 0.2


def test_only_fp32_bundles_are_converted(default_bundle: Bundle, int8_bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="only an fp32 bundle becomes"):
        convert_bundle(int8_bundle, "fp16", tmp_path)
    with pytest.raises(ValueError, match="is the bundle itself"):
        convert_bundle(default_bundle, "fp16", default_bundle.path)
    with pytest.raises(ValueError, match="is int8 already and cannot become fp16"):
        convert_graph(int8_bundle, "search", "fp16", "tensorrt")
    with pytest.raises(ValueError, match="got precision 'fp8'"):
        convert_graph(default_bundle, "search", "fp8", "tensorrt")
    assert convert_graph(int8_bundle, "search", "int8", "tensorrt") == onnx.load(str(int8_bundle.graph_path("search")))


def test_quantiser_leaves_logging_as_it_was(int8_bundle: Bundle) -> None:
    assert logging.getLogger().level == logging.WARNING


def test_command_writes_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "fp16"
    assert cli.main(["precision", "siamcan-mobilenetv2", "--precision", "fp16", "--out", str(out)]) == 0
    assert "fp16" in capsys.readouterr().out
    assert load_bundle(out).manifest.precision == "fp16"


def test_command_refuses(tmp_path: Path, default_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--precision", "fp16", "--out", str(tmp_path / "out")]
    assert cli.main(["precision", str(tmp_path / "nothing"), *arguments]) == 2
    assert "not a bundle" in capsys.readouterr().err
    half = dataclasses.replace(default_bundle.manifest, precision="fp16", int8={})
    copy = tmp_path / "half"
    copy.mkdir()
    for graph in half.graphs.values():
        (copy / graph.file).write_bytes((default_bundle.path / graph.file).read_bytes())
    write_manifest(copy, half)
    assert cli.main(["precision", str(copy), *arguments]) == 2
    assert "only an fp32 bundle becomes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
