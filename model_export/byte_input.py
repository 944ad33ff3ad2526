"""INT8 graphs for CPUs read the bytes of a crop as they are.

Bytes are normalised, ``(byte - mean) * scale``, and quantised to bytes again, in four operations on the whole crop and
with a rounding of their own. Dequantised with that very scale, about the byte next to the mean, they are what the first
convolution wants but for a constant, which its bias takes. (Beyond the crop's edge, where convolutions see zeros, it is
then that byte in place of the mean.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

CHAIN = ["Cast", "Transpose", "Sub", "Mul", "QuantizeLinear", "DequantizeLinear", "Conv"]
"""What follows the input ``image``, uint8 ``[N, H, W, 3]``."""


def read_bytes(model: onnx.ModelProto) -> bool:
    """Take normalisation and quantisation from between the image and the first convolution, in place.

    Args:
        model: with explicit Q/DQ nodes.

    Returns:
        Whether it was done. It is not where something else than `CHAIN` follows the image or reads what is in between,
        the normalisation is not by one number each, activations are int8, or the convolution has no INT32 bias.
    """
    chain = _chain(model, "image")
    if [node.op_type for node in chain] != CHAIN:
        return False
    cast, transpose, minus, times, quantise, dequantise, convolution = chain
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    inputs = [makers[name] for name in convolution.input[1:] if name in makers]
    read = [minus.input[1], times.input[1], *dequantise.input[1:], *(name for node in inputs for name in node.input)]
    if [node.op_type for node in inputs] != ["DequantizeLinear"] * 2 or not constants.keys() >= set(read):
        return False
    values = {name: numpy_helper.to_array(constants[name]) for name in read}
    mean, scale, zero_point = (values[n] for n in (minus.input[1], times.input[1], dequantise.input[2]))
    if mean.size != 1 or scale.size != 1 or zero_point.dtype != np.uint8:
        return False

    mean, scale = mean.reshape(()), scale.reshape(())
    middle = np.rint(mean).clip(0, 255)
    weight, bias = (_dequantised(*(values[name] for name in node.input)) for node in inputs)
    bias_scale = scale * values[inputs[0].input[1]]  # as a sum of products of quantised inputs and weights has it
    bias += (middle - mean) * scale * weight.sum(axis=(1, 2, 3))
    for name, new in (
        (dequantise.input[1], scale),
        (dequantise.input[2], middle.astype(np.uint8)),
        (inputs[1].input[0], np.rint(bias / bias_scale).astype(np.int32)),
        (inputs[1].input[1], bias_scale),
    ):
        constants[name].CopyFrom(numpy_helper.from_array(new, name))
    transpose.input[0], dequantise.input[0] = cast.input[0], transpose.output[0]
    for node in (cast, minus, times, quantise):
        model.graph.node.remove(node)
    for name in (minus.input[1], times.input[1]):
        if not any(name in node.input for node in model.graph.node):
            model.graph.initializer.remove(constants[name])
    del model.graph.value_info[:]  # some say another type now
    return True


def _chain(model: onnx.ModelProto, name: str) -> list[onnx.NodeProto]:
    """Nodes from a tensor on, up to a convolution, as long as each reads what only it reads."""
    nodes: list[onnx.NodeProto] = []
    while not nodes or nodes[-1].op_type != "Conv":
        users = [node for node in model.graph.node if name in node.input]
        if len(users) != 1:
            break
        nodes.append(users[0])
        name = users[0].output[0]
    return nodes


def _dequantised(values: NDArray[Any], scale: NDArray[Any], zero_point: NDArray[Any]) -> NDArray[np.float64]:
    """Values ``[O, ...]`` with a scale ``[O]``."""
    shape = (-1,) + (1,) * (values.ndim - 1)
    return (values.astype(np.float64) - zero_point.reshape(shape)) * scale.reshape(shape)
