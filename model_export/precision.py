"""Precision written into ONNX graphs: FP16 with delicate parts in FP32, and INT8 by explicit Q/DQ nodes.

TensorRT builds such graphs strongly typed, so every runtime computes with the types that stand in the graph. Inputs and
outputs keep the types of the bundle contract, template tensors among them: FP32. They are small, a target keeps them
for long, and so bundles and engines of any precision take each other's.

Kept in FP32 (`delicate_nodes`): what comes before the first convolution (the cast and normalisation of bytes, of which
`model_export/byte_input.py` leaves nothing in INT8 graphs for CPUs) and after the last (decode, ranking and naive
correlations, whose sums FP16 would cut); between them what turns a head's maps into boxes and sampling positions, and
every operation of `DELICATE_OPERATIONS`. INT8 touches convolutions of the search graph only, without the heads' last
ones; the graphs that run once a target or once an update cost little and set what everything else is compared with.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from model_export.bias_correction import correct_biases
from model_export.byte_input import read_bytes

DELICATE_OPERATIONS = frozenset(
    {
        "ArgMax", "BatchNormalization", "Exp", "GroupNormalization", "InstanceNormalization", "LayerNormalization",
        "Log", "LogSoftmax", "Pow", "Reciprocal", "ReduceL2", "ReduceLogSumExp", "ReduceMean", "ReduceProd",
        "ReduceSum", "ReduceSumSquare", "Sigmoid", "Softmax", "Softplus", "Sqrt", "TopK"
    }
)  # fmt: skip
"""What sums many values, or whose result FP16 would round visibly or overflow."""
FLOAT_INPUTS = {"Resize": (1, 2)}  # FP32 by the ONNX standard, whatever the node computes in
SUFFIXES: dict[int, str] = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16"}
FP16 = np.finfo(np.float16)
CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
PRODUCTS = frozenset({"MatMul", "Gemm", "Einsum"})
QUANTISERS = frozenset({"QuantizeLinear", "DequantizeLinear"})
INT8_OPSET = 19  # the first whose Q/DQ nodes take FP16 scales

Feeds = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Int8Scheme:
    """How a runtime likes its Q/DQ nodes.

    Attributes:
        symmetric: int8 activations about zero; else uint8 with a zero point.
        chains: Q/DQ after convolutions too, and about what stands between them; else before convolutions only.
        weight_nodes: weights stay float behind a Q/DQ pair; else they are stored as int8.
        quantise_bias: biases as int32; else float.
        rest: precision of everything that is not quantised.
        method: "MinMax", "Entropy" or "Percentile", of `onnxruntime.quantization.CalibrationMethod`.
    """

    symmetric: bool
    chains: bool
    weight_nodes: bool
    quantise_bias: bool
    rest: str
    method: str = "MinMax"


INT8_SCHEMES = {
    # TensorRT: signed, symmetric, no bias; it moves Q/DQ nodes itself and fuses what follows a convolution into it.
    "tensorrt": Int8Scheme(symmetric=True, chains=False, weight_nodes=True, quantise_bias=False, rest="fp16"),
    # ONNX Runtime on CPUs with dot-product instructions (VNNI): whole chains of 8-bit kernels.
    "onnxruntime": Int8Scheme(symmetric=False, chains=True, weight_nodes=False, quantise_bias=True, rest="fp32"),
}


def delicate_nodes(model: onnx.ModelProto) -> set[str]:
    """Names of the nodes that stay FP32: both ends of the graph, box geometry, and `DELICATE_OPERATIONS`."""
    nodes = model.graph.node
    after, before = _reach(nodes, forwards=True), _reach(nodes, forwards=False)
    ends = {node.name for node in nodes if node.op_type not in CONVOLUTIONS | QUANTISERS} - (after & before)
    return ends | _geometry(model, after) | {node.name for node in nodes if node.op_type in DELICATE_OPERATIONS}


def _geometry(model: onnx.ModelProto, after: Collection[str]) -> set[str]:
    """Names of the nodes between a convolution and the output ``box``, and of what else is made of their results.

    A head may look at features where its boxes lie, as SiamLA's does: then decode is no end of the graph, but pixel
    positions are what FP16 holds to 0.1 at best. Products and convolutions that take the results are none of it.
    """
    nodes = [n for n in model.graph.node if n.op_type not in CONVOLUTIONS | QUANTISERS and n.name in after]
    wanted = {value.name for value in model.graph.output if value.name == "box"}
    found: set[str] = set()
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            found.add(node.name)
            wanted.update(node.input)
    made: set[str] = set()
    for node in nodes:
        if node.name in found or (node.op_type not in PRODUCTS and made.intersection(node.input)):
            found.add(node.name)
            made.update(node.output)
    return found


def _reach(nodes: Iterable[onnx.NodeProto], forwards: bool) -> set[str]:
    """Names of the nodes that some convolution leads to, or with `forwards` false, that lead to one."""
    tensors: set[str] = set()
    reached = set()
    for node in nodes if forwards else reversed(list(nodes)):
        sources, sinks = (node.input, node.output) if forwards else (node.output, node.input)
        if tensors.intersection(sources):
            reached.add(node.name)
        if node.op_type in CONVOLUTIONS or node.name in reached:
            tensors.update(sinks)
    return reached


def to_fp16(model: onnx.ModelProto, keep_fp32: Collection[str] = ()) -> onnx.ModelProto:
    """A copy that computes in FP16 what is not delicate.

    Every node computes in one type, and casts stand where it changes: nothing is rounded between two FP32 nodes.

    Args:
        model: with FP32 weights and named nodes.
        keep_fp32: names of further nodes that stay FP32.

    Raises:
        ValueError: a name in `keep_fp32` is no node, a node has a subgraph, or the result does not check.
    """
    inferred = onnx.shape_inference.infer_shapes(_lifted(model), strict_mode=True)
    graph = inferred.graph
    fp32 = delicate_nodes(inferred) | set(keep_fp32)
    unknown = set(keep_fp32) - {node.name for node in graph.node}
    if unknown:
        raise ValueError(f"no such nodes to keep in FP32: {', '.join(sorted(unknown))}")
    constants = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    values = (*graph.input, *graph.output, *graph.value_info)
    types = {v.name: TensorProto.FLOAT for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    types |= dict.fromkeys(constants, TensorProto.FLOAT)
    outputs = {value.name for value in graph.output} & types.keys()
    narrow = {name: f"{name}_narrow" for n in graph.node if n.name not in fp32 for name in n.output if name in outputs}
    nodes: list[onnx.NodeProto] = []
    made: dict[str, onnx.TensorProto | None] = {}

    def take(name: str, kind: int) -> str:
        """The name under which a float tensor is had in another type; the first time it is made."""
        other = f"{name}_{SUFFIXES[kind]}"
        if other not in made:
            made[other] = _narrow(constants[name], other) if name in constants else None
            if name not in constants:
                nodes.append(helper.make_node("Cast", [name], [other], name=f"cast_{other}", to=kind))
        return other

    for node in graph.node:
        kind = TensorProto.FLOAT if node.name in fp32 else TensorProto.FLOAT16
        fixed = FLOAT_INPUTS.get(node.op_type, ())
        for i, name in enumerate(narrow.get(name, name) for name in list(node.input)):
            wanted = TensorProto.FLOAT if i in fixed else kind
            node.input[i] = name if types.get(name, wanted) == wanted else take(name, wanted)
        if kind == TensorProto.FLOAT16:
            _narrow_attributes(node)
            for i, name in enumerate(node.output):
                node.output[i] = narrow.get(name, name)
                if name in types:
                    types[node.output[i]] = kind
        nodes.append(node)
    for name, inner in narrow.items():
        nodes.append(helper.make_node("Cast", [inner], [name], name=f"cast_{name}", to=TensorProto.FLOAT))
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    kept += [tensor for tensor in made.values() if tensor is not None]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    return _checked(inferred)


def to_int8(
    model: onnx.ModelProto, feeds: Iterable[Feeds], scheme: Int8Scheme, keep_fp32: Collection[str] = ()
) -> onnx.ModelProto:
    """A copy whose convolutions, both ends apart, are INT8 between explicit Q/DQ nodes.

    It is then passed through `read_bytes` and `correct_biases`.

    Args:
        model: with FP32 weights and named nodes.
        feeds: inputs to calibrate activation ranges on, at least one.
        scheme: one of `INT8_SCHEMES`.
        keep_fp32: names of further nodes that stay FP32, when the rest of the graph becomes FP16 too.

    Raises:
        ValueError: nothing to calibrate on, nothing to quantise, or the result does not check.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    chosen = quantised_nodes(model, scheme.chains) - set(keep_fp32)
    if not chosen:
        raise ValueError(f"graph {model.graph.name!r} has no convolution to quantise")
    feeds = list(feeds)
    if not feeds:
        raise ValueError("INT8 needs crops to calibrate on; got none")
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for opset in copy.opset_import:
        if opset.domain == "":
            opset.version = max(opset.version, INT8_OPSET)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "int8.onnx"
        quantize_static(
            onnx.shape_inference.infer_shapes(copy),
            str(file),
            _Reader(feeds),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=sorted({n.op_type for n in model.graph.node if n.name in chosen}),
            nodes_to_quantize=sorted(chosen),
            per_channel=True,
            activation_type=QuantType.QInt8 if scheme.symmetric else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[scheme.method],
            extra_options={
                "ActivationSymmetric": scheme.symmetric,
                "AddQDQPairToWeight": scheme.weight_nodes,
                "QuantizeBias": scheme.quantise_bias,
                "OpTypesToExcludeOutputQuantization": [] if scheme.chains else ["Conv"],
            },
        )
        converted = onnx.load(str(file))
    read_bytes(converted)
    correct_biases(converted, model, feeds)
    converted.producer_name, converted.producer_version = model.producer_name, model.producer_version
    del converted.metadata_props[:]
    converted.ir_version = max(model.ir_version, 9)  # the oldest that holds this opset
    return to_fp16(converted, keep_fp32) if scheme.rest == "fp16" else _checked(converted)


def quantised_nodes(model: onnx.ModelProto, chains: bool = False) -> set[str]:
    """Names of what INT8 quantises.

    Convolutions that lead to others, without those whose result becomes a box, and without one-hot gathers, which only
    copy. With `chains`, also what stands between them and has an 8-bit form: activations, pooling, and additions of
    what convolutions lead to (what else is added, a few crops to calibrate on may not show the range of).
    """
    nodes = model.graph.node
    leads_on, after = _reach(nodes, forwards=False), _reach(nodes, forwards=True)
    delicate, geometry = delicate_nodes(model), _geometry(model, after)
    decoded = {name for node in nodes if node.name in geometry for name in node.input}
    features = {name for node in nodes if node.name in after or node.op_type in CONVOLUTIONS for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    chosen = set()
    for node in nodes:
        if node.name not in leads_on or node.name in delicate:
            continue
        if node.op_type == "Conv":
            weight = constants.get(node.input[1])
            copies = weight is None or _is_one_hot(numpy_helper.to_array(weight))
            if not copies and not decoded.intersection(node.output):
                chosen.add(node.name)
        elif chains and (
            node.op_type in ("Relu", "Clip", "MaxPool") or (node.op_type == "Add" and features.issuperset(node.input))
        ):
            chosen.add(node.name)
    return chosen


def count_precisions(model: onnx.ModelProto) -> Counter[tuple[str, str]]:
    """How many nodes compute in what: ("Conv", "fp16") -> 53. A convolution of dequantised values counts as int8."""
    inferred = onnx.shape_inference.infer_shapes(model)
    values = (*inferred.graph.value_info, *inferred.graph.output)
    types = {value.name: SUFFIXES.get(value.type.tensor_type.elem_type) for value in values}
    dequantised = {n.output[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    counts: Counter[tuple[str, str]] = Counter()
    for node in model.graph.node:
        kind = types.get(node.output[0])
        if node.op_type in CONVOLUTIONS and dequantised.issuperset(node.input[:2]):
            kind = "int8"
        if kind is not None and node.op_type not in QUANTISERS | {"Cast", "Constant"}:
            counts[node.op_type, kind] += 1
    return counts


class _Reader:
    """Calibration feeds as ONNX Runtime's quantiser asks for them."""

    def __init__(self, feeds: Iterable[Feeds]) -> None:
        self._feeds = iter(feeds)

    def get_next(self) -> Feeds | None:
        return next(self._feeds, None)


def _is_one_hot(weight: NDArray[Any]) -> bool:
    """Weights that only pick values, as in `siamtrack.nets.correlation.depthwise_matmul`."""
    return bool(((weight == 0) | (weight == 1)).all() and (weight.reshape(weight.shape[0], -1).sum(1) == 1).all())


def _lifted(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose Constant nodes are initialisers, refused where a node has a name twice or holds a subgraph."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    names = Counter(node.name for node in copy.graph.node)
    twice = [name for name, count in names.items() if count > 1 or not name]
    if twice:
        raise ValueError(f"nodes need names, each its own; {twice[0]!r} stands {names[twice[0]]} times")
    nodes = []
    for node in copy.graph.node:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise ValueError(f"node {node.name!r} ({node.op_type}) holds a subgraph, which is not converted")
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensor = copy.graph.initializer.add()
            tensor.CopyFrom(node.attribute[0].t)
            tensor.name = node.output[0]
        else:
            nodes.append(node)
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy


def _narrow(tensor: onnx.TensorProto, name: str) -> onnx.TensorProto:
    """An FP32 tensor as FP16: finite values stay finite, and none but zero becomes zero (it may be divided by)."""
    values = numpy_helper.to_array(tensor)
    finite = np.clip(values, -FP16.max, FP16.max)
    finite = np.where((values != 0) & (np.abs(values) < FP16.smallest_subnormal), FP16.smallest_subnormal, finite)
    return numpy_helper.from_array(np.where(np.isfinite(values), finite, values).astype(np.float16), name)


def _narrow_attributes(node: onnx.NodeProto) -> None:
    """Types that stand in a node's attributes: what a cast gives, and values of constants."""
    for attribute in node.attribute:
        if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_narrow(attribute.t, attribute.t.name))


def _checked(model: onnx.ModelProto) -> onnx.ModelProto:
    del model.graph.value_info[:]
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValueError(f"graph {model.graph.name!r} does not check after conversion: {error}") from error
    return model
