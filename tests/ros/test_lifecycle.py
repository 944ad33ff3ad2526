"""Every transition of the life cycle, what each holds and gives back, and many of them in a row."""

from __future__ import annotations

import dataclasses
import gc
import logging
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from lifecycle_msgs.msg import Transition
from lifecycle_msgs.srv import ChangeState
from rclpy.logging import get_logger

from ros2_siamtrack import image_input
from ros2_siamtrack.log_bridge import LogBridge
from siamtrack import Bundle
from siamtrack.bundle import write_manifest
from siamtrack.runners import EngineOptions
from siamtrack.runners.onnxruntime import OnnxRuntimeRunner
from tests.ros.conftest import ListeningTracker, Parameter, Rig, until


def go(rig: Rig, transition: str) -> str:
    """Where a transition leads: its return code and the state after it."""
    code = rig.spinner.call(getattr(rig.tracker, f"trigger_{transition}"))
    return f"{str(code).rpartition('.')[2]} {rig.tracker._state_machine.current_state[1]}"


def tracker_threads() -> list[str]:
    return sorted(t.name for t in threading.enumerate() if t.name.startswith("siamtrack"))


def test_every_transition(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(start=False)
    node = rig.tracker
    assert node._worker is None and tracker_threads() == []
    assert go(rig, "configure") == "SUCCESS inactive"
    assert tracker_threads() == ["siamtrack"] and not node._held_subscriptions
    assert go(rig, "activate") == "SUCCESS active"
    assert tracker_threads() == ["siamtrack", "siamtrack debug image"] and node._held_subscriptions
    rig.follow(0, 1)
    rig.state("TRACKING")
    assert go(rig, "deactivate") == "SUCCESS inactive"
    rig.state("IDLE")
    assert tracker_threads() == ["siamtrack"] and not node._held_subscriptions and not node._held_timers
    assert go(rig, "activate") == "SUCCESS active"
    rig.show(2)  # the target was forgotten
    rig.diagnosis(state="IDLE", frames_received="3")
    rig.follow(3, 4)
    rig.state("TRACKING")
    assert go(rig, "deactivate") == "SUCCESS inactive"
    assert go(rig, "cleanup") == "SUCCESS unconfigured"
    assert tracker_threads() == [] and not node._outputs.publishers and not node._managed_entities
    assert go(rig, "configure") == "SUCCESS inactive"
    assert go(rig, "cleanup") == "SUCCESS unconfigured"
    rig.start()
    rig.follow(5, 6)
    rig.state("TRACKING")
    rig.diagnosis(frames_received="2")


@pytest.mark.parametrize("transitions", [(), ("configure",), ("configure", "activate")])
def test_shutdown_from_any_state(make_rig: Callable[..., Rig], transitions: tuple[str, ...]) -> None:
    rig = make_rig(start=False)
    for transition in transitions:
        go(rig, transition)
    assert go(rig, "shutdown") == "SUCCESS finalized"
    assert tracker_threads() == [] and not rig.tracker._outputs.publishers


def test_destruction_while_active(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    rig.follow(0, 1)
    rig.close()
    assert tracker_threads() == []


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ({"model": "no_such_model"}, "no_such_model"),
        ({"model": "/nowhere/at/all"}, "/nowhere/at/all"),
        ({"backend": "abacus"}, "backend must be one of onnxruntime, tensorrt, auto, got 'abacus'"),
        ({"precision": "fp8"}, "precision must be one of auto, fp32, fp16, int8, got 'fp8'"),
        ({"build_engines": "always"}, "build_engines must be one of never, auto, got 'always'"),
        ({"engine_key_file": "/no/key"}, "engine_key_file must be a file, or empty"),
        ({"image_transport": "telepathy"}, "image_transport must be one of raw, compressed, got 'telepathy'"),
        ({"processing": "some"}, "processing must be one of newest, every"),
    ],
)
def test_what_cannot_be_configured_is_told_and_the_node_lives(
    make_rig: Callable[..., Rig], parameters: dict, why: str
) -> None:
    rig = make_rig(start=False, **parameters)
    assert go(rig, "configure") == "FAILURE unconfigured"
    assert [level for level, text in rig.tracker.log.lines if why in text] == ["error"]
    assert tracker_threads() == [] and not rig.tracker._outputs.publishers
    assert go(rig, "configure") == "FAILURE unconfigured"  # and can be asked again


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that may have TensorRT, but no GPU."""
    monkeypatch.setattr("siamtrack.gpu.gpu_info", lambda device=0: None)


NO_TENSORRT = r"is not installed; install one|no NVIDIA GPU was found"


def test_tensorrt_is_refused_where_it_cannot_run(make_rig: Callable[..., Rig], no_gpu: None) -> None:
    rig = make_rig(start=False, backend="tensorrt")
    assert go(rig, "configure") == "FAILURE unconfigured"
    ((level, text),) = rig.tracker.log.lines
    assert level == "error"
    assert re.match(rf"cannot configure: .*({NO_TENSORRT})", text)
    assert tracker_threads() == []


def test_a_transition_that_is_not_valid_now_is_refused(make_rig: Callable[..., Rig]) -> None:
    """As asked for by a manager that does not know that the node has started by itself."""
    rig = make_rig()
    client = rig.world.create_client(ChangeState, f"{rig.namespace}/siamtrack/change_state")
    assert client.wait_for_service(timeout_sec=20)

    def change(transition: int) -> bool:
        future = client.call_async(ChangeState.Request(transition=Transition(id=transition)))
        until(future.done)
        return future.result().success

    assert not change(Transition.TRANSITION_CONFIGURE)
    assert rig.tracker.log.count("transition refused: ") == 1
    rig.follow(0, 1)
    rig.state("TRACKING")
    assert change(Transition.TRANSITION_DEACTIVATE)


def test_a_warning_and_an_error_reach_the_log() -> None:
    """rclpy knows a line by its place in the code, and takes one severity from it."""
    logger = get_logger("bridge")
    bridge = LogBridge(lambda: logger)
    bridge.open()
    try:
        for level in (logging.WARNING, logging.ERROR, logging.WARNING):
            bridge.emit(logging.LogRecord("siamtrack", level, "file", 1, "text", None, None))
    finally:
        bridge.close()


def test_auto_warns_once_and_runs_on_onnx_runtime(make_rig: Callable[..., Rig], no_gpu: None) -> None:
    rig = make_rig(backend="auto", precision="int8")
    warnings = [text for level, text in rig.tracker.log.lines if "TensorRT" in text and level == "warning"]
    assert len(warnings) == 1
    assert re.match(rf"running on the CPU with ONNX Runtime, because .*({NO_TENSORRT})", warnings[0])
    assert rig.tracker.log.count("configured: siamcan-mobilenetv2 on onnxruntime") == 1
    rig.follow(0, 1)
    rig.state("TRACKING")
    rig.diagnosis(backend="onnxruntime", state="TRACKING")
    assert len([text for _, text in rig.tracker.log.lines if "TensorRT" in text]) == 1
    logging.getLogger("siamtrack.elsewhere").error("of another thread")
    assert go(rig, "deactivate") == "SUCCESS inactive"
    assert go(rig, "cleanup") == "SUCCESS unconfigured"
    assert rig.tracker.log.count("of another thread") == 0
    assert rig.tracker._log_bridge not in logging.getLogger("siamtrack").handlers


def test_the_engine_parameters_reach_the_runner_and_its_facts_the_diagnostics(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, default_bundle: Bundle, tmp_path: Path
) -> None:
    asked: list[Any] = []
    key = tmp_path / "engine.key"
    key.write_bytes(b"k" * 32)

    def open_runner(
        bundle: Bundle, backend: str, threads: int, engines: EngineOptions, precision: str
    ) -> OnnxRuntimeRunner:
        asked.append((backend, engines, precision, threading.current_thread().name))
        runner = OnnxRuntimeRunner(bundle, threads)
        runner.facts = {"backend": "tensorrt", "precision": "int8", "binding": "pycuda 1"}
        return runner

    monkeypatch.setattr("ros2_siamtrack.tracker_node.open_runner", open_runner)
    rig = make_rig(backend="tensorrt", precision="int8", build_engines="auto", engine_key_file=str(key))
    assert asked == [("tensorrt", EngineOptions(key_file=key, build="auto"), "int8", "siamtrack")]
    assert rig.tracker.log.count("configured: siamcan-mobilenetv2 on tensorrt, precision int8, binding pycuda 1") == 1
    rig.show(0)
    rig.diagnosis(backend="tensorrt", precision="int8", binding="pycuda 1")


def test_the_precision_reaches_the_cpu(make_rig: Callable[..., Rig], tmp_path: Path, default_bundle: Bundle) -> None:
    for graph in default_bundle.manifest.graphs.values():
        shutil.copy(default_bundle.path / graph.file, tmp_path)
    write_manifest(tmp_path, dataclasses.replace(default_bundle.manifest, int8={}))
    rig = make_rig(start=False, model=str(tmp_path), precision="int8")
    assert go(rig, "configure") == "FAILURE unconfigured"
    assert rig.tracker.log.count("has no INT8 graphs; make them: siamtrack-export precision") == 1
    rig = make_rig(model=str(tmp_path))
    rig.show(0)
    rig.diagnosis(backend="onnxruntime", precision="fp32 (the bundle has no INT8 graphs)")


def test_a_damaged_model_is_told(make_rig: Callable[..., Rig], tmp_path: Path, default_bundle: Bundle) -> None:
    for file in default_bundle.path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[:-1] if file.suffix == ".onnx" else file.read_bytes())
    rig = make_rig(start=False, model=str(tmp_path))
    assert go(rig, "configure") == "FAILURE unconfigured"
    assert rig.tracker.log.count("cannot configure") == 1


@pytest.mark.parametrize(("topic", "state"), [("siamtrack/roi", "unconfigured"), ("image", "inactive")])
def test_a_bad_qos_override_is_told(make_rig: Callable[..., Rig], topic: str, state: str) -> None:
    kind = "subscription" if topic == "image" else "publisher"
    override = {f"qos_overrides__/bad_{state}/{topic}__{kind}__reliability": "sometimes"}
    rig = make_rig(start=False, namespace=f"/bad_{state}", **override)
    assert go(rig, "configure") == ("SUCCESS inactive" if state == "inactive" else "FAILURE unconfigured")
    if state == "inactive":
        assert go(rig, "activate") == "FAILURE inactive"
    assert rig.tracker.log.count("sometimes") == 1
    assert not rig.tracker._held_subscriptions and "siamtrack debug image" not in tracker_threads()


def test_an_error_in_a_transition_leads_back_to_the_start(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig()
    drop = rig.tracker._drop_inputs

    def fail_once() -> None:
        rig.tracker._drop_inputs = drop
        raise RuntimeError("out of luck")

    rig.tracker._drop_inputs = fail_once
    assert go(rig, "deactivate") == "ERROR unconfigured"
    assert tracker_threads() == [] and not rig.tracker._outputs.publishers
    rig.start()
    rig.follow(0, 1)
    rig.state("TRACKING")


@pytest.mark.parametrize("missing", [{"message_lost"}, {"message_lost", "incompatible_qos"}])
def test_a_middleware_without_these_events_will_do(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, missing: set[str]
) -> None:
    real = image_input.SubscriptionEventCallbacks

    def refuse(**events: object) -> object:
        if missing & set(events):
            raise image_input.UnsupportedEventTypeError("not here")
        return real(**events)

    monkeypatch.setattr(image_input, "SubscriptionEventCallbacks", refuse)
    rig = make_rig()
    rig.follow(0, 1)
    rig.state("TRACKING")


@pytest.mark.skipif(find_spec("rclpy.event_handler") is None, reason="this is Humble, or older")
def test_it_imports_on_humble() -> None:
    code = (
        "import rclpy.lifecycle, rclpy.executors, rclpy.event_handler, sys\n"
        "sys.modules['rclpy.qos_event'] = rclpy.event_handler\n"
        "sys.modules['rclpy.event_handler'] = None\n"
        "import ros2_siamtrack.tracker_node"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def test_fifty_cycles_without_growth() -> None:
    node = ListeningTracker(namespace="/cycles", parameter_overrides=[Parameter("threads", value=1)])

    def cycle() -> tuple[int, int, float]:
        for name in ("configure", "activate", "deactivate", "cleanup"):
            assert str(getattr(node, f"trigger_{name}")()).endswith("SUCCESS")
        gc.collect()
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir())), resident_mb()

    try:
        figures = [cycle() for _ in range(50)]
    finally:
        node.destroy_node()
    threads, files, memory = zip(*figures, strict=True)
    assert threads[-1] == threads[0]
    assert files[-1] <= files[2] + 2
    assert memory[-1] < memory[9] + 40  # a leaked model would be 40 times its 10 MB or more
    assert not node._managed_entities
    until(lambda: tracker_threads() == [])
