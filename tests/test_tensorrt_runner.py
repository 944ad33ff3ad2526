"""TensorRT without a GPU: the engine class on a TensorRT that only takes notes, and how its runner is opened."""

from __future__ import annotations

import dataclasses
import logging
import types
from pathlib import Path
from typing import Any

import pytest

from siamtrack import Bundle, SiamTracker
from siamtrack.bundle import TensorSpec
from siamtrack.engines import EngineError, EngineGraph
from siamtrack.runners import BACKENDS, EngineOptions, facts_of, open_runner
from siamtrack.runners import tensorrt as tensorrt_runner
from siamtrack.runners.cuda.device import CudaError
from siamtrack.runners.onnxruntime import OnnxRuntimeRunner
from siamtrack.runners.tensorrt import TensorRTEngine, TensorRTRunner
from tests.host_cuda import HostDevice, onnx_engines


class Notes:
    """An object that records method calls and answers from a table."""

    def __init__(self, log: list[tuple[str, Any]], answers: dict[str, Any]) -> None:
        self._log, self._answers = log, answers

    def __getattr__(self, name: str) -> Any:
        if name not in self._answers:
            raise AttributeError(name)
        answer = self._answers[name]
        if not callable(answer):
            return answer

        def call(*arguments: Any) -> Any:
            self._log.append((name, arguments))
            return answer(*arguments)

        return call


def fake_engine(
    rtx: bool = False, capturable: bool = True, answers: dict[str, Any] | None = None
) -> tuple[TensorRTEngine, list[tuple[str, Any]], HostDevice]:
    log: list[tuple[str, Any]] = []
    device = HostDevice()
    inputs = (TensorSpec("image", "uint8", ("N", 9, 9, 3)), TensorSpec("tuning", "float32", (3,)))
    outputs = (TensorSpec("score", "float32", ("N",)),)
    shapes = {"image": (-1, 9, 9, 3), "tuning": (3,), "score": (-1,)}
    dtypes = {"image": "UINT8", "tuning": "FLOAT", "score": "FLOAT"}
    trt = types.SimpleNamespace(
        ExecutionContextAllocationStrategy=types.SimpleNamespace(USER_MANAGED="user managed"),
        TensorIOMode=types.SimpleNamespace(INPUT="in", OUTPUT="out"),
    )
    asks = {"is_stream_capturable": lambda stream: capturable or configs[-1].__dict__.get("cuda_graph_strategy")}
    context_answers = {
        "set_device_memory": lambda address, size: None,
        "set_optimization_profile_async": lambda profile, stream: True,
        "set_input_shape": lambda name, shape: True,
        "infer_shapes": lambda: [],
        "set_tensor_address": lambda name, address: True,
        "execute_async_v3": lambda stream: True,
        **(asks if rtx else {}),
        **(answers or {}),
    }
    configs: list[Any] = []

    def config() -> Any:
        configs.append(Notes(log, {"set_execution_context_allocation_strategy": lambda strategy: None}))
        return configs[-1]

    if rtx:
        trt.DynamicShapesKernelSpecializationStrategy = types.SimpleNamespace(EAGER="eager")
        trt.CudaGraphStrategy = types.SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph")
    plan = Notes(
        log,
        {
            "num_io_tensors": 3,
            "num_optimization_profiles": 2,
            "device_memory_size_v2": 1024,
            "get_tensor_name": lambda i: list(shapes)[i],
            "get_tensor_mode": lambda name: "out" if name == "score" else "in",
            "get_tensor_shape": lambda name: shapes[name],
            "get_tensor_dtype": lambda name: types.SimpleNamespace(name=dtypes[name]),
            "create_runtime_config": config,
            "create_execution_context": lambda how: Notes(log, context_answers),
            **(answers or {}),
        },
    )
    graph = EngineGraph("search.engine", "", "", inputs, outputs)
    words = types.SimpleNamespace(last_error="it said why")
    engine = TensorRTEngine(trt, object(), words, device, plan, graph, lambda batch: 0 if batch == 1 else 1)
    engine.scratch = 4096
    log.clear()
    return engine, log, device


PLACES = {"image": 256, "tuning": 512, "score": 768}


def test_engine_prepares_a_context_for_each_batch_and_runs_it_on_the_stream() -> None:
    engine, log, device = fake_engine()
    work = engine.bind(2, PLACES)
    assert [entry for entry in log if not entry[0].startswith("get_")] == [
        ("create_execution_context", ("user managed",)),
        ("set_device_memory", (4096, 1024)),
        ("set_optimization_profile_async", (1, device.stream)),
        ("set_input_shape", ("image", (2, 9, 9, 3))),
        ("infer_shapes", ()),
        ("set_tensor_address", ("image", 256)),
        ("set_tensor_address", ("tuning", 512)),
        ("set_tensor_address", ("score", 768)),
    ]
    assert device.calls == ["synchronize"]  # a change of profile may copy
    log.clear()
    work()
    assert log == [("execute_async_v3", (device.stream,))]
    log.clear()
    engine.bind(2, {**PLACES, "image": 1024})  # moved buffers: the same context, other addresses
    assert [entry[0] for entry in log] == ["set_tensor_address"] * 3
    engine.bind(1, PLACES)
    assert ("set_optimization_profile_async", (0, device.stream)) in log
    assert engine.capturable(1)


def test_rtx_compiles_its_kernels_at_once_and_is_captured_where_it_can_be() -> None:
    engine, log, _ = fake_engine(rtx=True)
    engine.bind(1, PLACES)
    assert ("set_execution_context_allocation_strategy", ("user managed",)) in log
    (config,) = next(arguments for name, arguments in log if name == "create_execution_context")
    assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
    assert "cuda_graph_strategy" not in vars(config)
    assert engine.capturable(1)


def test_rtx_replays_graphs_of_its_own_where_it_cannot_be_captured() -> None:
    engine, log, _ = fake_engine(rtx=True, capturable=False)
    engine.bind(1, PLACES)
    configs = [arguments[0] for name, arguments in log if name == "create_execution_context"]
    assert [vars(config).get("cuda_graph_strategy") for config in configs] == [None, "whole graph"]
    assert not engine.capturable(1)
    log.clear()
    engine.bind(1, PLACES)
    assert "create_execution_context" not in [name for name, _ in log]


@pytest.mark.parametrize(
    ("answer", "value", "message"),
    [
        ("create_execution_context", lambda how: None, "no execution context"),
        ("set_optimization_profile_async", lambda profile, stream: False, "no profile for a batch of 2"),
        ("set_input_shape", lambda name, shape: False, r"image cannot have the shape \(2, 9, 9, 3\)"),
        ("infer_shapes", lambda: ["image"], "image have no shape"),
        ("set_tensor_address", lambda name, address: False, "image has no place"),
        ("execute_async_v3", lambda stream: False, "could not run it: it said why"),
    ],
)
def test_what_tensorrt_refuses_is_an_error_with_its_words(answer: str, value: Any, message: str) -> None:
    engine, _, _ = fake_engine(answers={answer: value})
    with pytest.raises((CudaError, EngineError), match=message):
        engine.bind(2, PLACES)()


def test_an_engine_that_is_not_as_its_manifest_says_is_refused() -> None:
    with pytest.raises(EngineError, match=r"search\.engine: its tensors are .*its manifest says .*build it again"):
        fake_engine(answers={"get_tensor_shape": lambda name: (1,)})


def test_open_runner_refuses_or_falls_back_with_a_reason(
    default_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert set(BACKENDS) == {"onnxruntime", "tensorrt", "auto"}
    asked: list[Any] = []

    def refuse(bundle: Bundle, **options: Any) -> Any:
        asked.append(options)
        raise EngineError("no engine: siamtrack-export engine would build it")

    monkeypatch.setattr(tensorrt_runner, "TensorRTRunner", refuse)
    with pytest.raises(EngineError, match="siamtrack-export engine"):
        options = EngineOptions(key_file=Path("key"), build="auto")
        open_runner(default_bundle, "tensorrt", engines=options, precision="int8")
    assert asked[0] == {
        "precision": "int8", "flavour": "auto", "key_file": Path("key"), "build": "auto", "max_batch": 0
    }  # fmt: skip
    with pytest.raises(EngineError):
        SiamTracker.from_pretrained(backend="tensorrt", precision="fp32")
    assert asked[1]["precision"] == "fp32"
    # INT8 engines were wanted: that the bundle has no INT8 graphs is no reason to refuse on the CPU.
    plain = dataclasses.replace(default_bundle, manifest=dataclasses.replace(default_bundle.manifest, int8={}))
    with caplog.at_level(logging.WARNING), open_runner(plain, "auto", threads=1, precision="int8") as runner:
        assert isinstance(runner, OnnxRuntimeRunner)
        assert facts_of(runner) == {"backend": "onnxruntime", "precision": "fp32 (the bundle has no INT8 graphs)"}
    assert [record.getMessage() for record in caplog.records] == [
        "running on the CPU with ONNX Runtime, because TensorRT cannot be used: no engine: siamtrack-export engine "
        "would build it"
    ]


@pytest.mark.parametrize(("precision", "wanted_precision"), [("auto", "fp16"), ("int8", "int8")])
@pytest.mark.parametrize("max_batch", [0, 5])
def test_the_tensorrt_runner_says_what_runs_and_takes_its_batch_from_the_model(
    default_bundle: Bundle,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    max_batch: int,
    precision: str,
    wanted_precision: str,
) -> None:
    device = HostDevice()
    wanted: list[Any] = []
    manifest = types.SimpleNamespace(flavour="tensorrt-rtx", version="1.7", precision="int8")
    engines = types.SimpleNamespace(folder=Path("engines/a-key"), manifest=manifest)

    def find(bundle: Bundle, runtime: Any, precision: str, key_file: Any, build: str, batch: int) -> Any:
        wanted.append((precision, key_file, build, batch))
        return engines

    monkeypatch.setattr(tensorrt_runner, "runtime_info", lambda flavour: types.SimpleNamespace(flavour="tensorrt-rtx"))
    monkeypatch.setattr(tensorrt_runner, "load_tensorrt", lambda flavour: None)
    monkeypatch.setattr(tensorrt_runner, "open_engines", find)
    monkeypatch.setattr(tensorrt_runner, "trial_load", lambda found: wanted.append(found))
    monkeypatch.setattr(tensorrt_runner, "CudaDevice", lambda: device)
    monkeypatch.setattr(tensorrt_runner, "load_engines", lambda *_: onnx_engines(default_bundle, device))
    options = EngineOptions(key_file=Path("key"), build="auto", max_batch=max_batch)
    with (
        caplog.at_level(logging.INFO, "siamtrack"),
        open_runner(default_bundle, "tensorrt", engines=options, precision=precision) as runner,
    ):
        assert wanted == [
            (wanted_precision, Path("key"), "auto", max_batch or default_bundle.manifest.tracking.lost_windows),
            engines,
        ]
        assert facts_of(runner) == {
            "backend": "tensorrt-rtx",
            "TensorRT": "1.7",
            "precision": "int8",
            "engines": "a-key",
            "binding": "host memory",
            "CUDA graphs": "replayed",
        }
        assert runner.helper_cores == frozenset()
        runner.uses_graphs, runner.capture_error = False, "no room"  # type: ignore[attr-defined]
        assert facts_of(runner)["CUDA graphs"] == "not used: no room"
    (said,) = (record.getMessage() for record in caplog.records if "runs on" in record.getMessage())
    assert said.startswith(
        "siamcan-mobilenetv2 runs on backend tensorrt-rtx, binding host memory, CUDA graphs replayed"
    )


@pytest.mark.parametrize(("lost_windows", "wanted"), [(1, {1}), (2, {1, 2}), (5, {1, 2, 5})])
def test_every_usual_number_of_windows_is_prepared(
    default_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, lost_windows: int, wanted: set[int]
) -> None:
    manifest = default_bundle.manifest
    tracking = dataclasses.replace(manifest.tracking, lost_windows=lost_windows)
    bundle = dataclasses.replace(default_bundle, manifest=dataclasses.replace(manifest, tracking=tracking))
    device = HostDevice()
    found = types.SimpleNamespace(manifest=types.SimpleNamespace(flavour="", version="", precision=""))
    found.folder = Path("engines/a-key")
    monkeypatch.setattr(tensorrt_runner, "runtime_info", lambda flavour: types.SimpleNamespace(flavour=""))
    monkeypatch.setattr(tensorrt_runner, "load_tensorrt", lambda flavour: None)
    monkeypatch.setattr(tensorrt_runner, "open_engines", lambda *_: found)
    monkeypatch.setattr(tensorrt_runner, "CudaDevice", lambda: device)
    monkeypatch.setattr(tensorrt_runner, "load_engines", lambda *_: onnx_engines(bundle, device))
    searched: set[int] = set()
    search = TensorRTRunner.search

    def record(self: TensorRTRunner, image: Any, windows: Any, *rest: Any) -> Any:
        searched.add(len(windows))
        return search(self, image, windows, *rest)

    monkeypatch.setattr(TensorRTRunner, "search", record)
    with TensorRTRunner(bundle, trial=False):
        assert searched == wanted
