"""TensorRT and TensorRT-RTX: a bundle's engines on an NVIDIA GPU.

Engines come from ``siamtrack-export engine``; `siamtrack.engines` says which may be loaded. The frame around them is
`siamtrack.runners.cuda.runner.CudaRunner`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from siamtrack.bundle import Bundle
from siamtrack.engine_files import DEFAULT_PRECISION
from siamtrack.engines import EngineError, EngineGraph, EngineSet, open_engines, trial_load
from siamtrack.gpu import load_tensorrt, runtime_info
from siamtrack.runners.cuda.device import CudaError, Device
from siamtrack.runners.cuda.driver import CudaDevice
from siamtrack.runners.cuda.runner import CudaRunner

DTYPES = {"FLOAT": "float32", "HALF": "float16", "UINT8": "uint8", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}

logger = logging.getLogger(__name__)


class TensorRTRunner(CudaRunner):
    """Runs a bundle's engines. Opens them for the calling thread, which alone may use the runner.

    Args:
        bundle: a verified bundle.
        precision: of the engines, one of `siamtrack.runners.PRECISION_CHOICES`; "auto" for `DEFAULT_PRECISION`.
        flavour: "tensorrt", "tensorrt-rtx", or "auto" for the first that is installed.
        key_file: key that the engines must be signed with; None takes unsigned ones too.
        build: "never" refuses where engines are missing or unfit; "auto" builds them at once, which takes minutes.
        max_batch: windows in one launch; 0 for as many as a lost target is searched in.
        trial: load the engines in a child process first, which a corrupt one may end; costs some seconds.
        response: see `CudaRunner`.
        graphs: likewise.

    Raises:
        EngineError: no TensorRT, no GPU or no usable engines. The message says how to mend it.
        CudaError: CUDA cannot be used, or there is not enough memory. Everything is given back.
    """

    def __init__(
        self,
        bundle: Bundle,
        precision: str = "auto",
        flavour: str = "auto",
        key_file: Path | None = None,
        build: str = "never",
        max_batch: int = 0,
        trial: bool = True,
        response: bool = True,
        graphs: bool = True,
    ) -> None:
        runtime = runtime_info(flavour)
        lost_windows = bundle.manifest.tracking.lost_windows
        max_batch = max_batch or lost_windows
        precision = DEFAULT_PRECISION if precision == "auto" else precision
        self.engines = open_engines(bundle, runtime, precision, key_file, build, max_batch)
        if trial:
            trial_load(self.engines)
        trt = load_tensorrt(runtime.flavour)
        device = CudaDevice()
        try:
            loaded = load_engines(trt, device, self.engines)
        except BaseException:
            device.close()
            raise
        often = (1, min(2, lost_windows), lost_windows)  # following, a second look, while LOST
        super().__init__(bundle, device, loaded, max_batch, often, response, graphs)
        logger.info("%s runs on %s", bundle.manifest.model, ", ".join(f"{k} {v}" for k, v in self.facts.items()))

    @property
    def facts(self) -> dict[str, str]:
        """See `siamtrack.runners.facts_of`."""
        built = self.engines.manifest
        return {
            **super().facts,
            "backend": built.flavour,
            "TensorRT": built.version,
            "precision": built.precision,
            "engines": self.engines.folder.name,
        }


def load_engines(trt: Any, device: Device, engines: EngineSet) -> dict[str, TensorRTEngine]:
    """Deserialise checked engines, for one stream and so with one scratch memory for all.

    Args:
        trt: module ``tensorrt`` or ``tensorrt_rtx``.
        device: owns stream and memory.
        engines: from `siamtrack.engines.open_engines`.

    Raises:
        EngineError: one does not load, or is not as its manifest says.
        OutOfMemory: no room for the scratch memory.
    """
    log = make_logger(trt)
    runtime = trt.Runtime(log)
    loaded: dict[str, TensorRTEngine] = {}
    try:
        for name, graph in engines.manifest.graphs.items():
            plan = runtime.deserialize_cuda_engine(engines.read(name))
            if plan is None:
                raise EngineError(f"{engines.folder}: {graph.file} does not load: {log.last_error}; build it again")
            profile = engines.manifest.profile
            loaded[name] = TensorRTEngine(trt, runtime, log, device, plan, graph, profile)
        nbytes = max(engine.scratch_bytes for engine in loaded.values())
        scratch = device.allocate(nbytes) if nbytes else 0
        for engine in loaded.values():
            engine.scratch = scratch
    except BaseException:
        for engine in loaded.values():
            engine.close()
        raise
    return loaded


class TensorRTEngine:
    """One deserialised engine; see `siamtrack.runners.cuda.engine.Engine` for the methods.

    There is an execution context for each batch, so that a captured frame keeps its own. They run one after the other
    on one stream, so they share their scratch memory, which is the runner's: nothing is allocated in flight.

    Args:
        trt: module ``tensorrt`` or ``tensorrt_rtx``.
        runtime: that deserialised the engine; must outlive it.
        log: from `make_logger`, likewise.
        device: owns the stream.
        plan: the deserialised engine.
        graph: what it should be.
        profile: index of the optimisation profile for a batch.

    Raises:
        EngineError: its tensors are not those of `graph`.
    """

    def __init__(
        self,
        trt: Any,
        runtime: Any,
        log: Any,
        device: Device,
        plan: Any,
        graph: EngineGraph,
        profile: Callable[[int], int],
    ) -> None:
        self.inputs, self.outputs = graph.inputs, graph.outputs
        self.scratch = 0
        self._trt, self._runtime, self._log, self._device = trt, runtime, log, device
        self._plan, self._file, self._profile = plan, graph.file, profile
        self._contexts: dict[int, Any] = {}
        self._own_graphs: set[int] = set()
        self._check(graph)
        self.scratch_bytes = int(plan.device_memory_size_v2)

    def bind(self, batch: int, tensors: Mapping[str, int]) -> Callable[[], None]:
        if batch not in self._contexts:
            self._contexts[batch] = self._open(batch, own_graphs=False)
        context = self._contexts[batch]
        self._set_addresses(context, tensors)
        if batch not in self._own_graphs and not self._is_capturable(context):
            # TensorRT-RTX alone knows where in this engine a capture has to begin and to end.
            del self._contexts[batch], context
            context = self._contexts[batch] = self._open(batch, own_graphs=True)
            self._own_graphs.add(batch)
            self._set_addresses(context, tensors)

        def enqueue() -> None:
            if not context.execute_async_v3(self._device.stream):
                raise CudaError(f"{self._file}: TensorRT could not run it: {self._log.last_error}")

        return enqueue

    def capturable(self, batch: int) -> bool:
        return batch not in self._own_graphs

    def close(self) -> None:
        # In this order: contexts, engine, runtime, logger.
        self._contexts.clear()
        self._plan = None
        self._runtime = None

    def _open(self, batch: int, own_graphs: bool) -> Any:
        """An execution context for a batch, shapes set."""
        trt, plan = self._trt, self._plan
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):  # TensorRT-RTX, which compiles kernels here
            config = plan.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            # At once rather than in the background: a captured frame would keep the slower kernels for ever.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            if own_graphs:
                config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = plan.create_execution_context(config)
        else:
            context = plan.create_execution_context(strategy)
        if context is None:
            raise CudaError(f"{self._file}: no execution context, perhaps for want of memory: {self._log.last_error}")
        if self.scratch_bytes:
            context.set_device_memory(self.scratch, self.scratch_bytes)
        batched = any(isinstance(side, str) for spec in self.inputs for side in spec.shape)
        if batched and plan.num_optimization_profiles > 1:
            if not context.set_optimization_profile_async(self._profile(batch), self._device.stream):
                raise CudaError(f"{self._file}: no profile for a batch of {batch}: {self._log.last_error}")
            self._device.synchronize()
        for spec in self.inputs:
            shape = tuple(batch if isinstance(side, str) else side for side in spec.shape)
            if shape != spec.shape and not context.set_input_shape(spec.name, shape):
                raise CudaError(f"{self._file}: {spec.name} cannot have the shape {shape}: {self._log.last_error}")
        missing = context.infer_shapes()
        if missing:
            raise EngineError(f"{self._file}: {', '.join(missing)} have no shape; build the engine again")
        return context

    def _set_addresses(self, context: Any, tensors: Mapping[str, int]) -> None:
        for spec in (*self.inputs, *self.outputs):
            if not context.set_tensor_address(spec.name, tensors[spec.name]):
                raise CudaError(f"{self._file}: {spec.name} has no place: {self._log.last_error}")

    def _is_capturable(self, context: Any) -> bool:
        ask = getattr(context, "is_stream_capturable", None)  # TensorRT-RTX 1.2 and later
        return True if ask is None else bool(ask(self._device.stream))

    def _check(self, graph: EngineGraph) -> None:
        """The engine's own word against its manifest's."""
        trt, plan = self._trt, self._plan
        actual = {}
        for i in range(plan.num_io_tensors):
            name = plan.get_tensor_name(i)
            mode = "input" if plan.get_tensor_mode(name) == trt.TensorIOMode.INPUT else "output"
            shape = tuple(None if side < 0 else int(side) for side in plan.get_tensor_shape(name))
            dtype = plan.get_tensor_dtype(name).name
            actual[name] = (mode, DTYPES.get(dtype, dtype), shape)
        wanted = {
            spec.name: (mode, spec.dtype, tuple(None if isinstance(side, str) else side for side in spec.shape))
            for mode, specs in (("input", graph.inputs), ("output", graph.outputs))
            for spec in specs
        }
        if actual != wanted:
            raise EngineError(f"{graph.file}: its tensors are {actual}, its manifest says {wanted}; build it again")


def make_logger(trt: Any) -> Any:
    """A TensorRT logger that writes to `logging` and keeps the last error for messages."""

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.last_error = "TensorRT gave no reason"

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR):
                self.last_error = message.strip()
                logger.error("TensorRT: %s", message.strip())
            elif severity == trt.ILogger.Severity.WARNING:
                logger.info("TensorRT: %s", message.strip())

    return Logger()
