"""One ONNX graph as a serialized engine, for TensorRT 10, 11 and TensorRT-RTX through their one Python API.

Networks are strongly typed: precision stands in the graph (`model_export.precision`), not in builder flags. A batched
graph gets one optimisation profile a requested batch: from the batch before it up to this one, and tuned for this one.
So any number of windows up to the largest runs, and the usual numbers run at their best.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from tqdm import tqdm

from siamtrack.bundle import TensorSpec
from siamtrack.gpu import EngineError, RuntimeInfo, load_tensorrt

PORTABLE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT-RTX builds for when nothing is said: Ampere and later, as far as its version knows them."""
DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32", "INT64": "int64"}


class EngineBuildError(EngineError):
    """TensorRT could not parse or build a graph; `said` holds its messages."""

    def __init__(self, message: str, said: Sequence[str]) -> None:
        super().__init__(message)
        self.said = tuple(said)


@dataclass(frozen=True)
class Plan:
    """A serialized engine and what is known of it.

    Attributes:
        content: the file's bytes.
        inputs: names, types and shapes; "N" is the batch.
        outputs: likewise.
        layers: how many of TensorRT's layers compute in what: ("CONVOLUTION", "fp16") -> 53.
        seconds: build time.
    """

    content: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    layers: Counter[tuple[str, str]]
    seconds: float


def build_plan(
    model: onnx.ModelProto,
    runtime: RuntimeInfo,
    batches: Sequence[int],
    capabilities: Sequence[str] = (),
    timing_cache: Path | None = None,
    title: str = "engine",
) -> Plan:
    """Build one graph.

    Args:
        model: in the precision that the engine shall have.
        runtime: what builds it.
        batches: numbers of windows to tune for, ascending.
        capabilities: compute capabilities to build ahead of time for, from `target_capabilities`.
        timing_cache: file that keeps the measured times of kernels between builds; TensorRT-RTX measures none.
        title: what the progress bar shows.

    Raises:
        EngineBuildError: TensorRT cannot parse or build it.
        KeyboardInterrupt: Ctrl-C while it built.
    """
    trt = load_tensorrt(runtime.flavour)
    said: list[str] = []
    builder = trt.Builder(_collector(trt, said))
    # Without the flag where every network is strongly typed.
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, _collector(trt, said))
    if not parser.parse(model.SerializeToString()):
        said += [str(parser.get_error(i)) for i in range(parser.num_errors)]
        raise _failure(f"{title}: {runtime.flavour} {runtime.version} cannot parse the ONNX graph", said)
    config = builder.create_builder_config()
    _set_flags(trt, config)
    _add_profiles(builder, config, network, batches)
    if capabilities:
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, _member(capability)), index)
    cache = _load_timing_cache(config, timing_cache) if runtime.flavour == "tensorrt" else None
    began = time.perf_counter()
    with tqdm(desc=title, unit="step", leave=False, disable=None) as bar, _interrupts_noted() as noted:
        config.progress_monitor = _monitor(trt, bar, noted)
        content = builder.build_serialized_network(network, config)
    if noted:
        raise KeyboardInterrupt
    if content is None:
        raise _failure(f"{title}: {runtime.flavour} {runtime.version} cannot build it", said)
    if cache is not None and timing_cache is not None:
        timing_cache.write_bytes(bytes(memoryview(config.get_timing_cache().serialize())))
    return Plan(
        bytes(memoryview(content)),
        tuple(_spec(network.get_input(i)) for i in range(network.num_inputs)),
        tuple(_spec(network.get_output(i)) for i in range(network.num_outputs)),
        _count_layers(network),
        time.perf_counter() - began,
    )


def target_capabilities(runtime: RuntimeInfo, asked: Sequence[str] = ()) -> tuple[str, ...]:
    """Compute capabilities to build for; empty for TensorRT, which builds for the GPU it runs on.

    Args:
        runtime: what builds.
        asked: such as "8.9"; none asks for the GPU here, or with TensorRT-RTX, which needs none, for
            `PORTABLE_CAPABILITIES`.

    Raises:
        EngineError: the flavour cannot build for these, or not without a GPU.
    """
    if runtime.flavour == "tensorrt":
        if asked:
            raise EngineError("TensorRT builds for the GPU it runs on; leave --compute-capability out, or build with "
                              "--runtime tensorrt-rtx")  # fmt: skip
        if runtime.gpu is None:
            raise EngineError(
                "TensorRT builds on the GPU that the engine is for, and none was found (no driver, or no cuda-python: "
                "pip install cuda-python); without one, --runtime tensorrt-rtx builds for RTX cards"
            )
        return ()
    members = load_tensorrt(runtime.flavour).ComputeCapability.__members__
    known = [f"{name[2:-1]}.{name[-1]}" for name in members if name.startswith("SM")]
    unknown = [capability for capability in asked if capability not in known]
    if unknown:
        raise EngineError(
            f"{runtime.flavour} {runtime.version} does not build for compute capability {', '.join(unknown)}; it knows "
            + ", ".join(known)
        )
    portable = tuple(capability for capability in PORTABLE_CAPABILITIES if capability in known)
    if not asked and runtime.gpu is not None and runtime.gpu.compute_capability not in portable:
        gpu = runtime.gpu
        if gpu.compute_capability not in known:
            raise EngineError(
                f"{runtime.flavour} {runtime.version} does not run on {gpu.name} (compute capability "
                f"{gpu.compute_capability}; it knows {', '.join(known)}); use --runtime tensorrt"
            )
        return (gpu.compute_capability,)
    return tuple(asked) or portable


def _member(capability: str) -> str:
    return f"SM{capability.replace('.', '')}"


def _set_flags(trt: Any, config: Any) -> None:
    config.clear_flag(trt.BuilderFlag.TF32)  # or FP32 would have FP16's mantissa
    # TensorRT-RTX (1.2 and later) allocates while it runs unless told not to, which cannot be captured in a CUDA graph.
    user_allocation = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if user_allocation is not None:
        config.set_flag(user_allocation)


def _add_profiles(builder: Any, config: Any, network: Any, batches: Sequence[int]) -> None:
    free = [t for t in map(network.get_input, range(network.num_inputs)) if -1 in tuple(t.shape)]
    smallest = 1
    for batch in batches if free else ():
        profile = builder.create_optimization_profile()
        for tensor in free:
            low, high = ([n if d == -1 else d for d in tuple(tensor.shape)] for n in (smallest, batch))
            profile.set_shape(tensor.name, low, high, high)
        config.add_optimization_profile(profile)
        smallest = batch + 1


def _load_timing_cache(config: Any, file: Path | None) -> Any:
    """The cache that was set, or None. One that is damaged, or of another TensorRT or GPU, starts anew."""
    if file is None:
        return None
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _collector(trt: Any, said: list[str]) -> Any:
    """A TensorRT logger that keeps errors for our own message and prints nothing."""

    class Collector(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR):
                said.append(message)

    return Collector()


@contextlib.contextmanager
def _interrupts_noted() -> Iterator[list[int]]:
    """Ctrl-C puts its number into the list meanwhile.

    Python would raise it in whatever TensorRT calls, logger or monitor. TensorRT swallows that and cancels the build,
    which then seems to have failed and would be tried again in FP32.
    """
    noted: list[int] = []
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield noted  # nobody raises KeyboardInterrupt here
        return
    signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _monitor(trt: Any, bar: Any, stop: Sequence[int]) -> Any:
    """A progress monitor that moves a bar, and cancels the build once there is something in `stop`."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            bar.total = (bar.total or 0) + num_steps
            bar.set_postfix_str(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            bar.refresh()

        def step_complete(self, phase_name: str, step: int) -> bool:
            bar.update()
            return not stop

    return Monitor()


def _count_layers(network: Any) -> Counter[tuple[str, str]]:
    kinds = {"FLOAT": "fp32", "HALF": "fp16"}
    counts: Counter[tuple[str, str]] = Counter()
    maker: dict[str, str] = {}
    for layer in map(network.get_layer, range(network.num_layers)):
        kind = layer.type.name
        sources = [layer.get_input(i) for i in range(layer.num_inputs)]
        precision = kinds.get(layer.get_output(0).dtype.name) if layer.num_outputs else None
        if kind == "CONVOLUTION" and maker.get(sources[0].name if sources[0] else "") == "DEQUANTIZE":
            precision = "int8"
        maker.update({layer.get_output(i).name: kind for i in range(layer.num_outputs)})
        if precision is not None and kind not in ("CONSTANT", "CAST", "QUANTIZE", "DEQUANTIZE"):
            counts[kind, precision] += 1
    return counts


def _spec(tensor: Any) -> TensorSpec:
    name = tensor.dtype.name
    return TensorSpec(
        tensor.name, DTYPES.get(name, name), tuple("N" if d == -1 else int(d) for d in tuple(tensor.shape))
    )


def _failure(message: str, said: Sequence[str]) -> EngineBuildError:
    return EngineBuildError(f"{message}: {' | '.join(said[:3]) or 'it does not say why'}", said)
