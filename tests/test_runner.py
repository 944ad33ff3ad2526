from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from pathlib import Path

import numpy as np
import pytest

from siamtrack import Bundle, BundleError
from siamtrack.bundle import TensorSpec, sha256
from siamtrack.crop import Window
from siamtrack.runners import BACKENDS, open_runner
from siamtrack.runners.onnxruntime import OnnxRuntimeRunner
from siamtrack.scene import SceneFrame

TUNING = (0.06, 0.4, 0.0)
WINDOWS = [Window(100, 60, 120, 120), Window(-30, -30, 160, 160), Window(200, 100, 255, 255)]
TEMPLATE_WINDOW = Window(150, 90, 60, 60)
SIZE = (30.0, 24.0)  # of the target


@pytest.fixture(scope="module")
def runner(default_bundle: Bundle) -> OnnxRuntimeRunner:
    return OnnxRuntimeRunner(default_bundle, threads=1)


def sizes(count: int) -> np.ndarray:
    return np.array([[50, 30], [60, 60], [30, 55]], np.float32)[:count]


def with_graph(bundle: Bundle, name: str, **changes: object) -> Bundle:
    graph = dataclasses.replace(bundle.manifest.graphs[name], **changes)
    graphs = {**bundle.manifest.graphs, name: graph}
    return dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, graphs=graphs))


def test_search_result_has_the_shapes_of_the_contract(runner: OnnxRuntimeRunner, scene: list[SceneFrame]) -> None:
    image, grid = scene[0].image, runner.bundle.manifest.grid.size
    features = runner.template(image, TEMPLATE_WINDOW, (1, 2, 3), SIZE)
    assert features.fill_bgr == (1, 2, 3)
    result = runner.search(image, WINDOWS, [features] * 3, sizes(3), TUNING)
    assert result.box_cxcywh.shape == (3, 4)
    assert result.score.shape == result.penalty.shape == (3,)
    assert result.response.shape == (3, grid, grid)
    assert (result.box_cxcywh[:, 2:] > 0).all()
    for values in (result.score, result.penalty, result.response):
        assert ((values >= 0) & (values <= 1)).all()
    # The score is that of a cell, raw: a score that no cell has would be one after penalty or window.
    assert all((response == score).any() for response, score in zip(result.response, result.score, strict=True))


def test_a_batch_equals_single_searches(runner: OnnxRuntimeRunner, scene: list[SceneFrame]) -> None:
    image = scene[5].image
    # Other targets and fills in each window: a batch that mixed up its rows would be seen.
    features = [
        runner.template(image, Window(100 + 40 * i, 80, 50 + 9 * i, 50 + 9 * i), (90 * i,) * 3, SIZE) for i in range(3)
    ]
    batch = runner.search(image, WINDOWS, features, sizes(3), TUNING)
    assert len({float(s) for s in batch.score}) == 3
    for i in range(3):
        single = runner.search(image, WINDOWS[i : i + 1], features[i : i + 1], sizes(3)[i : i + 1], TUNING)
        np.testing.assert_allclose(single.box_cxcywh[0], batch.box_cxcywh[i], atol=1e-2)
        np.testing.assert_allclose(single.score[0], batch.score[i], atol=1e-4)
        np.testing.assert_allclose(single.penalty[0], batch.penalty[i], atol=1e-4)
        np.testing.assert_allclose(single.response[0], batch.response[i], atol=1e-4)


def test_windows_and_features_must_pair_up(runner: OnnxRuntimeRunner, scene: list[SceneFrame]) -> None:
    features = runner.template(scene[0].image, TEMPLATE_WINDOW, (0, 0, 0), SIZE)
    with pytest.raises(ValueError):
        runner.search(scene[0].image, WINDOWS, [features] * 2, sizes(3), TUNING)


def test_last_timing_is_of_the_last_search(default_bundle: Bundle, scene: list[SceneFrame]) -> None:
    with OnnxRuntimeRunner(default_bundle, threads=1) as runner:
        assert runner.last_timing == {}
        features = runner.template(scene[0].image, TEMPLATE_WINDOW, (0, 0, 0), SIZE)
        runner.search(scene[0].image, WINDOWS[:1], [features], sizes(1), TUNING)
        first = runner.last_timing
        assert set(first) == {"crop", "network"}
        assert all(0 < seconds < 60 for seconds in first.values())
        runner.search(scene[0].image, WINDOWS[:1], [features], sizes(1), TUNING)
        assert runner.last_timing != first


def test_closed_runner_says_so_and_closes_twice(default_bundle: Bundle, scene: list[SceneFrame]) -> None:
    image = scene[0].image
    with OnnxRuntimeRunner(default_bundle, threads=1) as runner:
        features = runner.template(image, TEMPLATE_WINDOW, (0, 0, 0), SIZE)
    runner.close()
    with pytest.raises(RuntimeError, match="is closed; open a new one"):
        runner.template(image, TEMPLATE_WINDOW, (0, 0, 0), SIZE)
    with pytest.raises(RuntimeError, match="is closed; open a new one"):
        runner.search(image, WINDOWS[:1], [features], sizes(1), TUNING)


@pytest.mark.parametrize("name", ["template", "search"])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("fault", ["renamed", "retyped", "left out", "added"])
def test_manifest_that_disagrees_with_its_graph_is_refused(
    default_bundle: Bundle, name: str, side: str, fault: str
) -> None:
    first, *rest = getattr(default_bundle.manifest.graphs[name], side)
    specs = {
        "renamed": (dataclasses.replace(first, name="picture"), *rest),
        "retyped": (dataclasses.replace(first, dtype="int64"), *rest),
        "left out": tuple(rest),
        "added": (first, *rest, TensorSpec("extra", "float32", (1,))),
    }[fault]
    with pytest.raises(BundleError, match=rf"{name}\.onnx: {side} are .*{first.name}.*the manifest says .*export"):
        OnnxRuntimeRunner(with_graph(default_bundle, name, **{side: specs}), threads=1)


@pytest.mark.parametrize("content", [b"", b"this is no graph", bytes(range(256)) * 8])
def test_a_file_that_is_no_graph_is_refused_though_its_hash_is_right(
    default_bundle: Bundle, tmp_path: Path, content: bytes
) -> None:
    for name in default_bundle.manifest.graphs:
        (tmp_path / f"{name}.onnx").write_bytes(default_bundle.graph_path(name).read_bytes())
    (tmp_path / "search.onnx").write_bytes(content)
    bundle = with_graph(default_bundle, "search", file="search.onnx", sha256=sha256(tmp_path / "search.onnx"))
    with pytest.raises(BundleError, match=r"search\.onnx: ONNX Runtime .* cannot load it"):
        OnnxRuntimeRunner(dataclasses.replace(bundle, path=tmp_path), threads=1)


def test_open_runner(default_bundle: Bundle) -> None:
    assert "onnxruntime" in BACKENDS
    with open_runner(default_bundle, "onnxruntime", threads=2) as runner:
        assert isinstance(runner, OnnxRuntimeRunner)
        assert runner.bundle is default_bundle
        assert runner.threads == 2
    with pytest.raises(ValueError, match=r"unknown backend 'abacus'; known: .*onnxruntime"):
        open_runner(default_bundle, "abacus")


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores cannot be told apart here")
def test_helper_threads_have_cores_of_their_own(default_bundle: Bundle) -> None:
    def bindings() -> dict[int, set[int]]:
        found = {}
        for thread in (int(task.name) for task in Path("/proc/self/task").iterdir()):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                found[thread] = os.sched_getaffinity(thread)
        return found

    cores = sorted(os.sched_getaffinity(0))
    with OnnxRuntimeRunner(default_bundle, threads=len(cores) + 1) as runner:
        assert runner.helper_cores == frozenset()  # too few cores: nobody is bound
    before = bindings()
    with OnnxRuntimeRunner(default_bundle, threads=len(cores)) as runner:
        assert runner.helper_cores == frozenset(cores[1:])
        wanted = sorted(cores[1:] * len(default_bundle.manifest.graphs))
        bound: list[int] = []
        for _ in range(200):  # a thread binds itself, once it gets to run
            added = [cores_of for thread, cores_of in bindings().items() if thread not in before]
            # What other tests left running may start threads too: those may use every core.
            bound = sorted(core for cores_of in added if cores_of != set(cores) for core in cores_of)
            if bound == wanted:
                break
            time.sleep(0.05)
    assert bound == wanted
    assert os.sched_getaffinity(0) == set(cores)  # the caller's own thread is left alone
