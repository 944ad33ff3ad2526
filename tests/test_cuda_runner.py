"""The GPU runner without a GPU: on a device of host memory that runs late and checks every address."""

from __future__ import annotations

import dataclasses
import gc
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from siamtrack import Bundle, BundleError, SiamTracker
from siamtrack.bundle import GraphSpec, TensorSpec, UpdateSpec
from siamtrack.crop import Window, crop, mean_bgr
from siamtrack.runners import Features
from siamtrack.runners.cuda.device import CudaError, OutOfMemory
from siamtrack.runners.cuda.runner import CudaRunner
from siamtrack.runners.onnxruntime import OnnxRuntimeRunner
from siamtrack.scene import SceneFrame
from tests.host_cuda import HostDevice, HostEngine, failing_engine, onnx_engines

TUNING = (0.06, 0.4, 0.0)
FRAME = ["upload", "siamtrack_crop", "engine", "download", "synchronize"]
REPLAY = ["launch graph", "synchronize"]


@pytest.fixture
def device() -> HostDevice:
    return HostDevice()


@pytest.fixture
def runner(default_bundle: Bundle, device: HostDevice) -> Iterator[CudaRunner]:
    with CudaRunner(default_bundle, device, onnx_engines(default_bundle, device), max_batch=3) as runner:
        yield runner


def target(runner: CudaRunner, frame: SceneFrame, offset: int = 0) -> Features:
    x, y, w, _ = (int(v) for v in frame.box_xywh)
    return runner.template(frame.image, Window(x + offset, y, 2 * w, 2 * w), mean_bgr(frame.image), (w, w - offset))


def copies(runner: CudaRunner, targets: int) -> list[str]:
    """The calls that put so many targets where the engine takes them."""
    return ["copy"] * targets * len(runner.bundle.manifest.template_tensors)


def sizes(count: int) -> np.ndarray:
    return np.array([[50, 30], [60, 60], [30, 55]], np.float32)[:count]


def search(runner: Any, frame: SceneFrame, features: list[Features], side: int = 200) -> Any:
    x, y = (int(v) for v in frame.box_xywh[:2])
    windows = [Window(x - 60 + 30 * i, y - 70 - 10 * i, side, side) for i in range(len(features))]
    return runner.search(frame.image, windows, features, sizes(len(features)), TUNING)


def test_closed_loop_follows_what_onnx_runtime_follows(default_bundle: Bundle, scene: list[SceneFrame]) -> None:
    device = HostDevice()
    ours = SiamTracker(CudaRunner(default_bundle, device, onnx_engines(default_bundle, device)))
    theirs = SiamTracker(OnnxRuntimeRunner(default_bundle, threads=1))
    for tracker in (ours, theirs):
        tracker.init(scene[0].image, scene[0].box_xywh)
    for frame in scene[1:]:
        a, b = ours.update(frame.image), theirs.update(frame.image)
        np.testing.assert_allclose(a.box_xywh, b.box_xywh, atol=0.5)
        assert a.score == pytest.approx(b.score, abs=0.05)
        assert a.state is b.state
    ours.close()
    theirs.close()


def test_a_frame_gives_what_the_graph_gives_for_the_same_crop(
    runner: CudaRunner, default_bundle: Bundle, scene: list[SceneFrame]
) -> None:
    # A window of the crop's own size is copied exactly by both crops, so nothing may differ.
    frame, t, s = scene[0], default_bundle.manifest.crop.template_px, default_bundle.manifest.crop.search_px
    with OnnxRuntimeRunner(default_bundle, threads=1) as other:
        results = []
        for each in (runner, other):
            features = each.template(frame.image, Window(-20, 90, t, t), (9.0, 8.0, 7.0), (70, 45))
            results.append(each.search(frame.image, [Window(-30, 40, s, s)], [features], sizes(1), TUNING))
    for name in ("box_cxcywh", "score", "penalty", "response"):
        np.testing.assert_array_equal(getattr(results[0], name), getattr(results[1], name))


def test_a_frame_is_queued_once_then_captured_then_replayed(
    runner: CudaRunner, device: HostDevice, scene: list[SceneFrame]
) -> None:
    features = [target(runner, scene[0], 7 * i) for i in range(3)]
    device.take_calls()
    search(runner, scene[1], features[:1])
    assert device.take_calls() == [*copies(runner, 1), *REPLAY]  # one window was made ready when the runner was opened
    search(runner, scene[2], features[:1])
    assert device.take_calls() == REPLAY
    first = search(runner, scene[3], features)
    assert device.take_calls() == [*copies(runner, 2), *FRAME, "capture"]
    again = search(runner, scene[3], features)
    assert device.take_calls() == REPLAY
    for name in ("box_cxcywh", "score", "penalty", "response"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))


def test_replay_sees_each_frames_own_windows_sizes_and_tuning(
    runner: CudaRunner, default_bundle: Bundle, scene: list[SceneFrame]
) -> None:
    plain_device = HostDevice()
    plain = CudaRunner(default_bundle, plain_device, onnx_engines(default_bundle, plain_device), 3, graphs=False)
    pair = [(each, [target(each, scene[0], 9 * i) for i in range(2)]) for each in (runner, plain)]
    for number, frame in enumerate(scene[1:12]):
        side = (40, 223, 333, 700, 2000)[number % 5]
        results = [search(each, frame, features, side) for each, features in pair]
        for name in ("box_cxcywh", "score", "penalty", "response"):
            np.testing.assert_array_equal(getattr(results[0], name), getattr(results[1], name))
    image, window = scene[5].image, [Window(100, 50, 150, 150)]
    for size, tuning in (((20, 90), (0.9, 0.4, 0.0)), ((90, 20), (0.0, 0.9, 0.0))):
        results = [
            each.search(image, window, features[:1], np.array([size], np.float32), tuning) for each, features in pair
        ]
        np.testing.assert_array_equal(results[0].penalty, results[1].penalty)
        np.testing.assert_array_equal(results[0].box_cxcywh, results[1].box_cxcywh)
    assert "launch graph" not in plain_device.calls
    plain.close()


def test_a_thousand_frames_take_no_memory(runner: CudaRunner, device: HostDevice, scene: list[SceneFrame]) -> None:
    features = target(runner, scene[0])
    search(runner, scene[1], [features] * 2)
    before = device.allocations
    for number in range(1000):
        window = [Window(number % 300, number % 200, 20 + number % 426, 20 + number % 426)]
        runner.search(scene[number % 60].image, window, [features], sizes(1), TUNING)
    assert device.allocations == before


def test_template_tensors_stay_on_the_device_and_only_numbers_come_back(
    runner: CudaRunner, device: HostDevice, default_bundle: Bundle, scene: list[SceneFrame]
) -> None:
    device.downloads.clear()
    features = target(runner, scene[0])
    assert not device.downloads
    for _ in range(2):
        search(runner, scene[1], [features] * 2)
    grid = default_bundle.manifest.grid.size
    assert max(device.downloads) <= 5 * 256 + 3 * grid * grid * 4
    assert not any(isinstance(tensor, np.ndarray) for tensor in features.tensors)


def test_without_responses_less_comes_back(default_bundle: Bundle, device: HostDevice, scene: list[SceneFrame]) -> None:
    with CudaRunner(default_bundle, device, onnx_engines(default_bundle, device), response=False) as runner:
        result = search(runner, scene[1], [target(runner, scene[0])])
    assert result.response.shape == (1, 0, 0)
    assert result.score.shape == (1,)
    assert max(device.downloads) <= 4 * 256


def test_what_is_uploaded_follows_the_window(runner: CudaRunner, device: HostDevice, scene: list[SceneFrame]) -> None:
    features = target(runner, scene[0])
    large = np.zeros((2160, 3840, 3), np.uint8)
    for image in (scene[0].image, large):
        for side in (50, 200):
            runner.search(image, [Window(5, 5, side, side)], [features], sizes(1), TUNING)
    assert device.uploads[-4:-2] == device.uploads[-2:]
    assert device.uploads[-1] < 200 * 200 * 3 + 2 * (1 << 16)


def test_several_targets_are_one_launch_and_do_not_mix(
    runner: CudaRunner, device: HostDevice, scene: list[SceneFrame]
) -> None:
    features = [
        runner.template(scene[5].image, Window(100 + 40 * i, 80, 50 + 9 * i, 50 + 9 * i), (90.0 * i,) * 3, (30, 25))
        for i in range(3)
    ]
    windows = [Window(100, 60, 120, 120), Window(-30, -30, 160, 160), Window(200, 100, 255, 255)]
    device.take_calls()
    batch = runner.search(scene[5].image, windows, features, sizes(3), TUNING)
    assert device.calls.count("siamtrack_crop") == device.calls.count("engine") == device.calls.count("upload") == 1
    for i in range(3):
        single = runner.search(scene[5].image, windows[i : i + 1], features[i : i + 1], sizes(3)[i : i + 1], TUNING)
        np.testing.assert_allclose(single.box_cxcywh[0], batch.box_cxcywh[i], atol=1e-2)
        np.testing.assert_allclose(single.response[0], batch.response[i], atol=1e-4)
    assert len({float(score) for score in batch.score}) == 3


def test_more_windows_than_a_launch_takes_are_searched_in_turns(runner: CudaRunner, scene: list[SceneFrame]) -> None:
    features = target(runner, scene[0])
    windows = [Window(20 * i, 10 * i, 150, 150) for i in range(7)]
    prev_size = np.full((7, 2), 40, np.float32)
    many = runner.search(scene[1].image, windows, [features] * 7, prev_size, TUNING)
    assert many.box_cxcywh.shape == (7, 4)
    for i, window in enumerate(windows):
        one = runner.search(scene[1].image, [window], [features], prev_size[:1], TUNING)
        np.testing.assert_allclose(one.box_cxcywh[0], many.box_cxcywh[i], atol=1e-2)


def test_memory_of_a_forgotten_target_is_used_again(
    runner: CudaRunner, device: HostDevice, scene: list[SceneFrame]
) -> None:
    kept = target(runner, scene[0], 0)
    before = search(runner, scene[1], [kept])
    other = target(runner, scene[0], 40)
    allocations = device.allocations
    for offset in range(20):
        other = target(runner, scene[0], offset)  # the one before is forgotten
    gc.collect()
    assert device.allocations <= allocations + 1
    changed = search(runner, scene[1], [other])
    assert not np.array_equal(changed.response, before.response)
    np.testing.assert_array_equal(search(runner, scene[1], [kept]).response, before.response)


def test_a_wide_window_of_a_large_image_grows_the_buffers_once(
    runner: CudaRunner, device: HostDevice, default_bundle: Bundle, scene: list[SceneFrame]
) -> None:
    features = target(runner, scene[0])
    image = np.random.default_rng(0).integers(0, 256, (2160, 3840, 3), dtype=np.uint8)
    windows = [Window(0, -800, 3840, 3840)] * 3
    before = search(runner, scene[1], [features])
    device.take_calls()
    result = runner.search(image, windows, [features] * 3, sizes(3), TUNING)
    grown = device.take_calls()
    assert grown[:2] == ["allocate", "allocate host"]
    assert grown.index("close graph") < grown.index("free") < grown.index("free host") < grown.index("upload")
    np.testing.assert_array_equal(runner.search(image, windows, [features] * 3, sizes(3), TUNING).score, result.score)
    assert device.take_calls() == REPLAY
    after = search(runner, scene[1], [features])  # bound and captured anew: the old buffer is gone
    np.testing.assert_array_equal(after.penalty, before.penalty)
    once_more = target(runner, scene[0])  # the template engine too has been bound to the old buffer
    np.testing.assert_array_equal(search(runner, scene[1], [once_more]).response, before.response)
    with OnnxRuntimeRunner(default_bundle, threads=1) as other:
        theirs = other.search(
            image, windows[:1], [other.template(scene[0].image, *_template_of(scene[0]))], sizes(1), TUNING
        )
    np.testing.assert_allclose(result.box_cxcywh[0], theirs.box_cxcywh[0], atol=2)


def _template_of(frame: SceneFrame) -> tuple[Window, tuple[float, float, float], tuple[float, float]]:
    x, y, w, _ = (int(v) for v in frame.box_xywh)
    return Window(x, y, 2 * w, 2 * w), mean_bgr(frame.image), (w, w)


def test_out_of_memory_in_flight_leaves_the_runner_as_it_was(
    runner: CudaRunner, device: HostDevice, scene: list[SceneFrame]
) -> None:
    features = target(runner, scene[0])
    before = search(runner, scene[1], [features])
    device.limit = 1
    image = np.zeros((2160, 3840, 3), np.uint8)
    with pytest.raises(OutOfMemory):
        runner.search(image, [Window(0, 0, 3840, 3840)] * 3, [features] * 3, sizes(3), TUNING)
    with pytest.raises(OutOfMemory):
        target(runner, scene[0], 3)
    device.limit, held = 1 << 40, set(device.memory_of)
    device.fails_at = device.allocations + 1  # there is room on the GPU, but none in page-locked memory
    with pytest.raises(OutOfMemory):
        runner.search(image, [Window(0, 0, 3840, 3840)] * 3, [features] * 3, sizes(3), TUNING)
    assert set(device.memory_of) == held
    np.testing.assert_array_equal(search(runner, scene[1], [features]).response, before.response)
    assert runner.search(image, [Window(0, 0, 3840, 3840)] * 3, [features] * 3, sizes(3), TUNING).score.shape == (3,)
    target(runner, scene[0], 3)


def test_out_of_memory_on_opening_gives_everything_back(default_bundle: Bundle) -> None:
    complete = HostDevice()
    CudaRunner(default_bundle, complete, onnx_engines(default_bundle, complete)).close()
    assert complete.allocations >= 6
    for number in range(complete.allocations):
        device = HostDevice()
        device.fails_at = number
        engines = onnx_engines(default_bundle, device)
        with pytest.raises(OutOfMemory):
            CudaRunner(default_bundle, device, engines)
        assert device.closed
        assert not device.memory_of
        assert not device.host_of
        assert all(engine.closed for engine in engines.values())


@pytest.mark.parametrize("where", ["engine", "end of capture", "out of memory"])
def test_a_failed_capture_warns_once_and_frames_are_queued(
    default_bundle: Bundle, scene: list[SceneFrame], where: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = HostDevice()
    engines = onnx_engines(default_bundle, device)
    if where == "engine":
        failing_engine(engines["search"], "not while capturing")
    else:
        device.capture_error = {"end of capture": CudaError, "out of memory": OutOfMemory}[where]("it ended badly")
    with caplog.at_level(logging.WARNING), CudaRunner(default_bundle, device, engines, ready_for=(1, 2)) as runner:
        assert not runner.uses_graphs
        features = target(runner, scene[0])
        device.take_calls()
        search(runner, scene[1], [features] * 2)
        search(runner, scene[2], [features] * 2)
        assert device.take_calls() == [*copies(runner, 2), *FRAME, *FRAME]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "no CUDA graphs" in warnings[0]
    assert ("not while capturing" if where == "engine" else "it ended badly") in warnings[0]


def test_an_engine_with_graphs_of_its_own_is_not_captured(
    default_bundle: Bundle, device: HostDevice, scene: list[SceneFrame], caplog: pytest.LogCaptureFixture
) -> None:
    engines = onnx_engines(default_bundle, device)
    engines["search"].is_capturable = False
    with caplog.at_level(logging.WARNING), CudaRunner(default_bundle, device, engines) as runner:
        search(runner, scene[1], [target(runner, scene[0])])
    assert "capture" not in device.calls
    assert not caplog.records


def on_another_thread(work: Callable[[], Any]) -> Exception | None:
    raised: list[Exception | None] = [None]

    def run() -> None:
        try:
            work()
        except Exception as error:
            raised[0] = error

    thread = threading.Thread(target=run, name="stranger")
    thread.start()
    thread.join()
    return raised[0]


def test_another_thread_is_refused_and_does_no_harm(
    runner: CudaRunner, device: HostDevice, scene: list[SceneFrame]
) -> None:
    features = target(runner, scene[0])
    device.take_calls()
    for work in (
        lambda: target(runner, scene[0]),
        lambda: search(runner, scene[1], [features]),
        runner.close,
    ):
        error = on_another_thread(work)
        assert isinstance(error, RuntimeError)
        assert "belongs to thread 'MainThread'" in str(error)
        assert "called on 'stranger'" in str(error)
    assert device.take_calls() == []
    search(runner, scene[1], [features])


def test_features_may_be_dropped_on_any_thread(runner: CudaRunner, device: HostDevice, scene: list[SceneFrame]) -> None:
    held = [target(runner, scene[0])]
    device.take_calls()
    assert on_another_thread(held.clear) is None
    assert device.take_calls() == []
    allocations = device.allocations
    target(runner, scene[0])
    assert device.allocations == allocations


def test_everything_goes_back_in_order_and_closing_twice_is_safe(
    default_bundle: Bundle, device: HostDevice, scene: list[SceneFrame]
) -> None:
    runner = CudaRunner(default_bundle, device, onnx_engines(default_bundle, device))
    features = target(runner, scene[0])
    device.take_calls()
    runner.close()
    runner.close()
    assert device.take_calls() == ["synchronize", "close graph", *["close engine"] * 3, "close device"]
    with pytest.raises(RuntimeError, match="is closed; open a new one"):
        target(runner, scene[0])
    with pytest.raises(RuntimeError, match="is closed; open a new one"):
        search(runner, scene[1], [features])


def test_a_gpu_that_failed_does_not_keep_the_rest_from_being_given_back(
    default_bundle: Bundle, device: HostDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = onnx_engines(default_bundle, device)
    runner = CudaRunner(default_bundle, device, engines)

    def fail() -> None:
        raise CudaError("cuStreamSynchronize: an illegal memory access was encountered (700)")

    monkeypatch.setattr(device, "synchronize", fail)
    runner.close()
    assert device.closed
    assert all(engine.closed for engine in engines.values())


def test_a_forgotten_runner_gives_its_memory_back(default_bundle: Bundle, device: HostDevice) -> None:
    runner = CudaRunner(default_bundle, device, onnx_engines(default_bundle, device))
    del runner
    gc.collect()
    assert device.closed


def test_an_interrupted_frame_is_waited_for_by_the_next(
    runner: CudaRunner, device: HostDevice, scene: list[SceneFrame]
) -> None:
    features = target(runner, scene[0])
    expected = search(runner, scene[2], [features])
    device.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        search(runner, scene[1], [features])
    device.take_calls()
    result = search(runner, scene[2], [features])
    assert device.take_calls() == ["synchronize", *REPLAY]
    np.testing.assert_array_equal(result.response, expected.response)


def test_an_interrupted_runner_closes(runner: CudaRunner, device: HostDevice, scene: list[SceneFrame]) -> None:
    features = target(runner, scene[0])
    device.interrupt = True
    with pytest.raises(KeyboardInterrupt):
        search(runner, scene[1], [features])
    device.take_calls()
    runner.close()
    assert device.take_calls()[0] == "synchronize"


def test_features_of_another_runner_are_refused(
    runner: CudaRunner, default_bundle: Bundle, scene: list[SceneFrame]
) -> None:
    device = HostDevice()
    with CudaRunner(default_bundle, device, onnx_engines(default_bundle, device)) as other:
        for strange in (target(other, scene[0]), Features((np.zeros(3),), (0, 0, 0))):
            with pytest.raises(ValueError, match="features are of another runner"):
                search(runner, scene[1], [strange])


def test_windows_features_and_sizes_must_pair_up(runner: CudaRunner, scene: list[SceneFrame]) -> None:
    features = target(runner, scene[0])
    window = Window(0, 0, 100, 100)
    for windows, count, rows in (([window] * 3, 2, 3), ([window], 1, 2), ([], 0, 0)):
        with pytest.raises(ValueError, match="as many features and rows of prev_size as windows"):
            runner.search(scene[1].image, windows, [features] * count, np.zeros((rows, 2), np.float32), TUNING)


def test_last_timing_is_of_the_last_search(runner: CudaRunner, scene: list[SceneFrame]) -> None:
    assert runner.last_timing == {}
    search(runner, scene[1], [target(runner, scene[0])])
    assert set(runner.last_timing) == {"crop", "network"}
    assert all(0 < seconds < 60 for seconds in runner.last_timing.values())


@pytest.mark.parametrize("fault", ["missing", "shape", "score type", "tensor type"])
def test_engines_that_do_not_fit_the_bundle_are_refused(default_bundle: Bundle, device: HostDevice, fault: str) -> None:
    engines = onnx_engines(default_bundle, device)
    if fault == "missing":
        del engines["template"]
    else:
        search_engine = engines["search"]
        change: dict[str, Any] = {"shape": ("N", 5, 5)} if fault == "shape" else {"dtype": "float16"}
        name = {"score type": "score"}.get(fault, default_bundle.manifest.template_tensors[0])
        for side in ("inputs", "outputs"):
            specs = getattr(search_engine, side)
            setattr(search_engine, side, [dataclasses.replace(s, **change) if s.name == name else s for s in specs])
    with pytest.raises(BundleError, match="engine"):
        CudaRunner(default_bundle, device, engines)
    assert device.closed


def test_an_engine_may_lack_inputs_that_its_graph_ignores(
    default_bundle: Bundle, device: HostDevice, scene: list[SceneFrame]
) -> None:
    engines = onnx_engines(default_bundle, device)
    find, function = engines["search"], engines["search"].function
    find.inputs = [spec for spec in find.inputs if spec.name != "prev_size"]
    find.function = lambda feeds: function({**feeds, "prev_size": np.full((len(feeds["image"]), 2), 50, np.float32)})
    with CudaRunner(default_bundle, device, engines) as runner:
        assert search(runner, scene[1], [target(runner, scene[0])]).score.shape == (1,)


def updating_bundle(default_bundle: Bundle) -> Bundle:
    """A model with an update graph, of which there are no files: the template feature is the crop's mean colour."""
    manifest = default_bundle.manifest
    feature, kernel = TensorSpec("feature", "float32", (1, 3)), TensorSpec("kernel", "float32", (1, 5))
    t, s, grid = manifest.crop.template_px, manifest.crop.search_px, manifest.grid.size
    inputs = (
        TensorSpec("image", "uint8", ("N", s, s, 3)),
        TensorSpec("kernel", "float32", ("N", 5)),
        TensorSpec("prev_size", "float32", ("N", 2)),
        TensorSpec("tuning", "float32", (3,)),
    )
    shapes: dict[str, tuple[int | str, ...]] = {
        "box": ("N", 4), "score": ("N",), "penalty": ("N",), "response": ("N", grid, grid)
    }  # fmt: skip
    outputs = tuple(TensorSpec(name, "float32", shape) for name, shape in shapes.items())
    graphs = {
        "template": GraphSpec("template.onnx", "", (TensorSpec("image", "uint8", (1, t, t, 3)),), (feature,)),
        "update": GraphSpec(
            "update.onnx",
            "",
            tuple(dataclasses.replace(feature, name=name) for name in ("first", "history", "current")),
            (dataclasses.replace(feature, name="fused"), kernel),
        ),
        "search": GraphSpec("search.onnx", "", inputs, outputs),
    }
    return dataclasses.replace(
        default_bundle, manifest=dataclasses.replace(manifest, graphs=graphs, update=UpdateSpec(0.5))
    )


def updating_engines(bundle: Bundle, device: HostDevice) -> dict[str, HostEngine]:
    def template(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"feature": feeds["image"].mean(axis=(1, 2), dtype=np.float32)}

    def update(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        fused = 0.5 * feeds["history"] + 0.25 * feeds["first"] + 0.25 * feeds["current"]
        fused[fused > 200] = np.nan
        return {"fused": fused, "kernel": np.concatenate([fused, feeds["first"][:, :1], feeds["current"][:, :1]], 1)}

    def find(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        count, grid = len(feeds["image"]), bundle.manifest.grid.size
        zeros = np.zeros(count, np.float32)
        response = np.zeros((count, grid, grid), np.float32)
        response[:, 0, :5] = feeds["kernel"]
        return {"box": np.zeros((count, 4), np.float32), "score": zeros, "penalty": zeros, "response": response}

    functions = {"template": template, "update": update, "search": find}
    return {
        name: HostEngine(device, graph.inputs, graph.outputs, functions[name])
        for name, graph in bundle.manifest.graphs.items()
    }


def kernel_of(runner: CudaRunner, features: Features) -> np.ndarray:
    image = np.zeros((50, 50, 3), np.uint8)
    return runner.search(image, [Window(0, 0, 9, 9)], [features], sizes(1), TUNING).response[0, 0, :5]


def test_update_fuses_first_history_and_current_on_the_device(default_bundle: Bundle, device: HostDevice) -> None:
    bundle = updating_bundle(default_bundle)
    window = Window(0, 0, 8, 8)

    def flat(value: int) -> np.ndarray:
        return np.full((20, 20, 3), value, np.uint8)

    with CudaRunner(bundle, device, updating_engines(bundle, device)) as runner:
        start = runner.template(flat(40), window, (0, 0, 0))
        np.testing.assert_allclose(kernel_of(runner, start), [40] * 5)
        device.downloads.clear()
        once = runner.update(flat(80), window, start)
        assert device.downloads == [4]  # whether all is finite; the tensors stay
        assert 0 < runner.last_timing["update"] < 60
        np.testing.assert_allclose(kernel_of(runner, once), [50, 50, 50, 40, 80])
        twice = runner.update(flat(120), window, once)
        np.testing.assert_allclose(kernel_of(runner, twice), [65, 65, 65, 40, 120])
        # Earlier features are still themselves.
        np.testing.assert_allclose(kernel_of(runner, start), [40] * 5)
        np.testing.assert_allclose(kernel_of(runner, once), [50, 50, 50, 40, 80])
        bright = runner.template(flat(190), window, (0, 0, 0))
        assert runner.update(flat(250), window, bright) is bright  # not a number anywhere: nothing is renewed
        np.testing.assert_allclose(kernel_of(runner, bright), [190] * 5)
        np.testing.assert_allclose(kernel_of(runner, runner.update(flat(190), window, bright)), [190] * 5)


def test_a_model_without_update_graph_says_so(
    plain_bundle: Bundle, device: HostDevice, scene: list[SceneFrame]
) -> None:
    with CudaRunner(plain_bundle, device, onnx_engines(plain_bundle, device)) as runner:
        features = target(runner, scene[0])
        with pytest.raises(ValueError, match="has no update graph"):
            runner.update(scene[1].image, Window(0, 0, 9, 9), features)


def test_the_crop_on_the_device_is_the_cpu_crop(default_bundle: Bundle, device: HostDevice) -> None:
    bundle = updating_bundle(default_bundle)
    seen: list[np.ndarray] = []
    engines = updating_engines(bundle, device)
    original = engines["search"].function
    engines["search"].function = lambda feeds: (seen.append(feeds["image"]), original(feeds))[1]
    image = np.random.default_rng(1).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    with CudaRunner(bundle, device, engines) as runner:
        features = runner.template(image, Window(0, 0, 50, 50), (7.4, 90.6, 200.0), (25, 25))
        for window in (Window(-40, 200, 180, 180), Window(390, 290, 300, 300), Window(-300, -300, 1000, 1000)):
            runner.search(image, [window], [features], sizes(1), TUNING)
            expected = crop(image, window, bundle.manifest.crop.search_px, features.fill_bgr)
            assert np.abs(seen[-1][0].astype(int) - expected).max() <= 1
