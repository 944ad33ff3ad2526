"""INT8 graphs that read a crop's bytes: what the first convolution gives, and where the graph stays as it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from model_export import precision
from model_export.byte_input import read_bytes
from model_export.precision import INT8_SCHEMES, to_int8
from siamtrack import Bundle

SIZE = 16
IMAGES = np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3), np.uint8)


def make_model(
    mean: Any = 127.5, scale: Any = 1 / 127.5, cast_is_read: bool = False, bias: bool = True
) -> onnx.ModelProto:
    """Bytes, normalised, and three convolutions, of which the first gives ``a``."""
    rng = np.random.default_rng(1)
    shapes = {"w0": (8, 3, 3, 3), "b0": (8,), "w1": (8, 8, 3, 3), "b1": (8,), "w2": (4, 8, 1, 1)}
    constants = {name: rng.normal(0.1, 0.3, shape) for name, shape in shapes.items()}
    constants |= {"mean": np.array(mean), "scale": np.array(scale)}
    nodes = [
        helper.make_node("Cast", ["image"], ["float"], name="cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], name="transpose", perm=[0, 3, 1, 2]),
        helper.make_node("Sub", ["planes", "mean"], ["centred"], name="minus"),
        helper.make_node("Mul", ["centred", "scale"], ["x"], name="times"),
        helper.make_node("Conv", ["x", "w0", "b0"][: 2 + bias], ["a"], name="first", pads=[1] * 4),
        helper.make_node("Conv", ["a", "w1", "b1"], ["b"], name="second", pads=[1] * 4),
        helper.make_node("Conv", ["b", "w2"], ["c"], name="last"),
        helper.make_node("Sigmoid", ["c"], ["y"], name="decode"),
    ]
    outputs = ["y"]
    if cast_is_read:
        nodes.append(helper.make_node("Mul", ["float", "scale"], ["z"], name="other"))
        outputs.append("z")
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", SIZE, SIZE, 3])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def quantised(model: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch, target: str = "onnxruntime") -> onnx.ModelProto:
    """INT8, as it is before its bytes are read."""
    monkeypatch.setattr(precision, "read_bytes", lambda model: False)
    return to_int8(model, [{"image": image[None]} for image in IMAGES], INT8_SCHEMES[target])


def output(model: onnx.ModelProto, name: str, optimise: bool = False) -> NDArray[np.float32]:
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    if name not in {value.name for value in opened.graph.output}:
        opened.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(opened.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run([name], {"image": IMAGES})[0])


def operations(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if "Linear" not in node.op_type]


@pytest.mark.parametrize(
    ("mean", "scale"),
    [(127.5, 1 / 127.5), (114.5, 1 / 57.6), (0.0, 1.0), (np.full((1, 1, 1), 100.25), np.full(1, 0.01))],
)
def test_bytes_are_read_without_a_rounding_of_their_own(monkeypatch: pytest.MonkeyPatch, mean: Any, scale: Any) -> None:
    model = make_model(mean, scale)
    before = quantised(model, monkeypatch)
    after = onnx.ModelProto()
    after.CopyFrom(before)
    assert read_bytes(after)
    onnx.checker.check_model(after, full_check=True)
    assert operations(before) == operations(model)
    assert operations(after) == ["Transpose", "Conv", "Conv", "Conv", "Sigmoid"]
    # The first convolution with weights as they are rounded and inputs as they are: all that is left is its bias.
    exact = make_model(mean, scale)
    kept = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    weight = (kept["w0_quantized"] * kept["w0_scale"].reshape(-1, 1, 1, 1)).astype(np.float32)
    exact.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w0"))
    wanted, inner = output(exact, "a"), np.s_[:, :, 1:-1, 1:-1]
    step = kept["b0_quantized_scale"].max()
    assert np.abs(output(after, "a") - wanted)[inner].max() <= 0.51 * step + 1e-5 * np.abs(wanted).max()
    # At the edge half a byte more, in the taps beyond it.
    assert (
        np.abs(output(after, "a") - wanted).max()
        <= 0.5 * np.max(scale) * np.abs(weight).sum(axis=(1, 2, 3)).max() + step
    )
    assert np.abs(output(before, "a") - wanted).mean() >= np.abs(output(after, "a") - wanted).mean()


@pytest.mark.parametrize("optimise", [False, True])
def test_the_result_is_nearer_to_fp32(monkeypatch: pytest.MonkeyPatch, optimise: bool) -> None:
    model = make_model()
    before = quantised(model, monkeypatch)
    monkeypatch.undo()
    after = to_int8(model, [{"image": image[None]} for image in IMAGES], INT8_SCHEMES["onnxruntime"])
    wanted = output(model, "y")
    errors = [float(np.abs(output(m, "y", optimise) - wanted).mean()) for m in (before, after)]
    assert errors[1] < errors[0] < 0.05


@pytest.mark.parametrize(
    ("changes", "target"),
    [
        ({}, "tensorrt"),  # activations are int8
        ({"mean": np.full((3, 1, 1), 127.5)}, "onnxruntime"),
        ({"scale": np.full((3, 1, 1), 0.01)}, "onnxruntime"),
        ({"cast_is_read": True}, "onnxruntime"),
        ({"bias": False}, "onnxruntime"),
    ],
)
def test_other_graphs_stay_as_they_are(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], target: str) -> None:
    model = quantised(make_model(**changes), monkeypatch, target)
    before = model.SerializeToString()
    assert not read_bytes(model)
    assert model.SerializeToString() == before


def test_the_shipped_graph_reads_bytes(default_bundle: Bundle) -> None:
    model = onnx.load(str(default_bundle.int8_paths["search"]))
    assert {tensor.name for tensor in model.graph.initializer} <= {name for n in model.graph.node for name in n.input}
    (reader,) = [node for node in model.graph.node if "image" in node.input]
    assert reader.op_type == "Transpose"
    assert [n.op_type for n in model.graph.node if reader.output[0] in n.input] == ["DequantizeLinear"]
