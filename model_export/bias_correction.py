"""Bias correction: what rounding to INT8 shifts on average is taken back where it costs nothing.

Rounded weights and activations move the mean of a channel. The edge SiamCAN so draws boxes half a percent too large,
and a tracker that cuts the next crop by its last box multiplies that. Nagel et al., "Data-Free Quantization Through
Weight Equalization and Bias Correction", ICCV 2019, section 4.2, measures the shift on data and takes it off the bias.
Here that is done where the quantised graph computes in FP32 again: at the normalisation after the backbone and at the
heads' last convolutions. What is measured is what this CPU computes: make INT8 graphs on one with dot products of
bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from siamtrack.runners.onnxruntime import REWRITES_WEIGHTS

CORRECTED = frozenset({"BatchNormalization", "Conv"})
BIAS = 2  # which input of them it is


def correct_biases(
    quantised: onnx.ModelProto, reference: onnx.ModelProto, feeds: Sequence[dict[str, NDArray[Any]]]
) -> list[str]:
    """Give FP32 nodes that INT8 ones lead to the mean output they have in the FP32 graph, in graph order.

    Args:
        quantised: with explicit Q/DQ nodes; the biases of some nodes are replaced.
        reference: the FP32 graph it was made from, with the same names of nodes.
        feeds: inputs to measure on, at least one.

    Returns:
        The names of the corrected nodes.
    """
    outputs = {node.name: node.output[0] for node in reference.graph.node}
    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    nodes = [node for node in _float_nodes_after_int8(quantised) if node.name in outputs]
    wanted = channel_means(reference, [outputs[node.name] for node in nodes], feeds)
    for node, mean in zip(nodes, wanted, strict=True):
        (now,) = channel_means(quantised, [node.output[0]], feeds)
        bias = constants[node.input[BIAS]]
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + (mean - now), bias.name))
    return [node.name for node in nodes]


def _float_nodes_after_int8(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """Nodes of `CORRECTED` with FP32 weights and a bias of their own, behind a quantised convolution."""
    floats = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    users = [name for node in model.graph.node for name in node.input]
    after: set[str] = set()
    found = []
    for node in model.graph.node:
        behind = not after.isdisjoint(node.input)
        weighted = node.op_type in CORRECTED
        if behind or (weighted and node.input[1] not in floats):
            after.update(node.output)
        biased = weighted and len(node.input) > BIAS and floats.issuperset(node.input[1:])
        if behind and biased and users.count(node.input[BIAS]) == 1:
            found.append(node)
    return found


def channel_means(
    model: onnx.ModelProto, names: Sequence[str], feeds: Sequence[dict[str, NDArray[Any]]]
) -> list[NDArray[np.float32]]:
    """Means ``[C]`` over all feeds of tensors ``[N, C, H, W]``."""
    if not names:
        return []
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    present = {value.name for value in model.graph.output}
    opened.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names if name not in present
    )
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        opened.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=REWRITES_WEIGHTS
    )
    runs = [session.run(list(names), feed) for feed in feeds]
    return [np.mean([v.mean(axis=(0, 2, 3)) for v in values], axis=0) for values in zip(*runs, strict=True)]
