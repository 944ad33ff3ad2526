"""What of the GPU scripts can be held to account without a GPU."""

from __future__ import annotations

import argparse
import ast
import builtins
import csv
import importlib.util
import itertools
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import gpu_check, gpu_checks, gpu_latency, gpu_memory, gpu_setup, write_csv
from benchmarks.gpu_latency import Case, camera, format_totals, moving_windows, percentiles, time_frames
from benchmarks.gpu_table import Check, Table
from siamtrack import Bundle
from siamtrack.gpu import GpuInfo
from siamtrack.runners import Features
from siamtrack.runners.cuda.device import CudaError
from siamtrack.runners.cuda.runner import CudaRunner
from tests.host_cuda import HostDevice, HostEngine, onnx_engines

REPOSITORY = Path(__file__).resolve().parent.parent
WITHOUT_GPU = pytest.mark.skipif(not gpu_setup.no_gpu(), reason="there is a GPU")
OPTIONS = argparse.Namespace(clip_frames=5, sequence=[])


@WITHOUT_GPU
@pytest.mark.parametrize(
    ("command", "status"),
    [
        ([sys.executable, "benchmarks/gpu_setup.py", "--models", "x"], 2),
        ([sys.executable, "-m", "benchmarks.gpu_check"], 2),
        ([sys.executable, "-m", "benchmarks.gpu_latency"], 2),
        (["make", "gpu-check", f"PYTHON={sys.executable}"], 2),
    ],
    ids=["setup", "check", "latency", "make"],
)
def test_without_a_gpu_it_ends_at_once_and_says_so(command: list[str], status: int) -> None:
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status
    assert "needs an NVIDIA GPU" in done.stderr
    assert "Traceback" not in done.stderr


def make_wheel(folder: Path, module: str, content: str, others: dict[str, str] | None = None) -> None:
    files = {
        f"{module}.py": content,
        **(others or {}),
        f"{module}-1.0.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n",
        f"{module}-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in files) + f"{module}-1.0.dist-info/RECORD,,\n"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in {**files, f"{module}-1.0.dist-info/RECORD": record}.items():
            wheel.writestr(name, text)


@pytest.fixture
def lacking(monkeypatch: pytest.MonkeyPatch) -> str:
    """A machine with a GPU that lacks one module."""
    monkeypatch.setattr(gpu_setup, "no_gpu", lambda: "")
    monkeypatch.setattr(gpu_setup, "NEEDED", {"siamtrack_is_lacking": "lacking-thing"})
    monkeypatch.setattr(sys, "path", list(sys.path))
    return "siamtrack_is_lacking"


def test_what_is_missing_is_named_with_the_command_that_mends_it(
    lacking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_setup.main(["--wheels", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert f"{lacking} missing; pip install lacking-thing, or put their wheels into {tmp_path}" in message


def test_wheels_beside_the_checkout_are_installed_for_the_run_alone(
    lacking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheels = tmp_path / "wheels"
    make_wheel(wheels, lacking, "import sys; sys.exit(0 if sys.argv[1:] == ['--models', 'a'] else 1)")
    assert gpu_setup.main(["--wheels", str(wheels), "--module", lacking, "--models", "a"]) == 0
    assert gpu_setup.main(["--wheels", str(wheels), "--module", lacking, "--models", "b"]) == 1  # its own exit status
    monkeypatch.undo()
    importlib.invalidate_caches()
    assert importlib.util.find_spec(lacking) is None


def test_libraries_in_wheels_are_found_by_the_loader(lacking: str, tmp_path: Path) -> None:
    looks = "import os, sys; sys.exit(not os.path.isfile(os.environ['LD_LIBRARY_PATH'].split(':')[0] + '/liba.so'))"
    make_wheel(tmp_path / "wheels", lacking, looks, {"nvidia/cuda_nvrtc/lib/liba.so": ""})
    assert gpu_setup.main(["--wheels", str(tmp_path / "wheels"), "--module", lacking]) == 0


def test_what_is_measured_for_comparison_may_fail(
    default_bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no capture")

    row = Case(default_bundle, "fp16", (640, 480), 1).row("tensorrt", "total", 1.0, 2.0, 3)
    monkeypatch.setattr(gpu_latency, "_engine_rows", lambda *_: [row])
    monkeypatch.setattr(gpu_latency, "_torch_rows", fail)
    monkeypatch.setattr(gpu_latency, "_floor_rows", fail)
    arguments = ["--models", str(default_bundle.path), "--precisions", "fp16", "--sizes", "640x480", "--targets", "1"]
    assert gpu_latency.measure_all(gpu_latency.parse(arguments)) == [row]
    assert capsys.readouterr().err.count("no capture") == 2


def test_a_table_fails_by_one_check_and_by_having_none(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table()
    assert not table.ok
    table.skip("engines", "model", "no TensorRT")
    assert not table.ok
    table.add("crop", "kernel", "1", "1", True)
    assert table.ok
    with table.attempt("memory", "model"):
        raise ValueError("it grew")
    assert not table.ok
    assert "| memory | model | ValueError: it grew | no error | FAIL |" in table.text()
    assert "skipped" in capsys.readouterr().out


@pytest.fixture
def opener(default_bundle: Bundle) -> Any:
    """Opens a runner that is none of a GPU."""

    def open_one(**settings: Any) -> CudaRunner:
        device = HostDevice()
        return CudaRunner(default_bundle, device, onnx_engines(default_bundle, device), **settings)

    return open_one


@pytest.fixture
def quick_opener(default_bundle: Bundle) -> Any:
    """The same with engines that only show a part of their crop."""
    grid = default_bundle.manifest.grid.size

    def template(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"feature": np.full((1, 49, 96), feeds["image"].mean(), np.float32)}

    def update(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"kernel": feeds["current"]}

    def search(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        count = len(feeds["image"])
        response = feeds["image"][:, :grid, :grid, 0] + feeds["kernel"][:, :1, :1]
        zeros = np.zeros(count, np.float32)
        return {"box": np.zeros((count, 4), np.float32), "score": zeros, "penalty": zeros, "response": response}

    def open_one(**settings: Any) -> CudaRunner:
        device, graphs = HostDevice(), default_bundle.manifest.graphs
        engines = {
            name: HostEngine(device, graphs[name].inputs, graphs[name].outputs, function)
            for name, function in (("template", template), ("update", update), ("search", search))
        }
        return CudaRunner(default_bundle, device, engines, **settings)

    return open_one


def results(table: Table) -> list[str]:
    return [check.result for check in table.checks]


def test_checks_pass_on_a_runner_that_is_right(default_bundle: Bundle, opener: Any, quick_opener: Any) -> None:
    table = Table()
    gpu_checks.check_parity(table, "host", "fp32", default_bundle, opener, OPTIONS)
    gpu_checks.check_replay(table, "host", quick_opener)
    gpu_memory.check_memory(table, "host", quick_opener, frames=30)
    gpu_checks.check_threads(table, "host", quick_opener)
    assert results(table) == ["pass"] * 4, table.text()


def test_replay_and_memory_renew_templates(quick_opener: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    renewed = []

    def update(runner: CudaRunner, *args: Any) -> Features:
        renewed.append(runner)
        return plain(runner, *args)

    plain = CudaRunner.update
    monkeypatch.setattr(CudaRunner, "update", update)
    table = Table()
    gpu_checks.check_replay(table, "host", quick_opener)
    assert len(set(renewed)) == 2
    assert len(renewed) == 2 * 30  # 10 in the 40 frames of each number of targets
    gpu_memory.check_memory(table, "host", quick_opener, frames=30)
    assert len(set(renewed)) == 3
    assert results(table) == ["pass"] * 2, table.text()


def test_what_is_interrupted_can_be_run() -> None:
    """A process of its own plays it, and only on a GPU: what it imports must be there."""
    nodes = list(ast.walk(ast.parse(gpu_checks.INTERRUPTED)))
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, name.name) for name in node.names), ast.unparse(node)
    made = {node.name for node in nodes if isinstance(node, ast.alias)} | set(dir(builtins))
    names = [node for node in nodes if isinstance(node, ast.Name)]
    made |= {name.id for name in names if isinstance(name.ctx, ast.Store)}
    assert {name.id for name in names} <= made


def test_parity_fails_where_boxes_are_off(default_bundle: Bundle, opener: Any) -> None:
    def open_wrong(**settings: Any) -> CudaRunner:
        runner = opener(**settings)
        engine = runner._engines["search"]
        right = engine.function

        def wrong(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            found = right(feeds)
            return {**found, "box": found["box"] + 2}

        engine.function = wrong
        return runner

    table = Table()
    gpu_checks.check_parity(table, "host", "fp32", default_bundle, open_wrong, OPTIONS)
    assert results(table) == ["FAIL"]


def test_replay_fails_where_capture_failed_or_results_differ(quick_opener: Any) -> None:
    def open_uncaptured(**settings: Any) -> CudaRunner:
        runner = quick_opener(**settings)
        runner.capture_error = "it would not" if settings.get("graphs", True) else ""
        return runner

    def open_off(**settings: Any) -> CudaRunner:
        runner = quick_opener(**settings)
        if not settings.get("graphs", True):
            runner._result = lambda name, count, right=runner._result: right(name, count) + 1e-6
        return runner

    table = Table()
    gpu_checks.check_replay(table, "host", open_uncaptured)
    gpu_checks.check_replay(table, "host", open_off)
    assert results(table) == ["FAIL", "FAIL"]


def test_memory_fails_where_it_grows(quick_opener: Any) -> None:
    def open_leaking(**settings: Any) -> CudaRunner:
        runner = quick_opener(**settings)
        queue = runner._wait

        def leak() -> None:
            queue()
            runner.device.allocate(1 << 16)

        runner._wait = leak
        return runner

    table = Table()
    gpu_memory.check_memory(table, "host", open_leaking, frames=30)
    assert results(table) == ["FAIL"]


def test_threads_fail_where_strangers_are_let_in(quick_opener: Any) -> None:
    def open_careless(**settings: Any) -> CudaRunner:
        runner = quick_opener(**settings)
        runner.device.owner.check = lambda: None
        return runner

    table = Table()
    with table.attempt("threads", "host"):
        gpu_checks.check_threads(table, "host", open_careless)
    assert results(table) == ["FAIL"]


def totals(**changes: float) -> list[dict[str, Any]]:
    """Rows of a run that keeps every promise, with changes."""
    ms = {
        "tensorrt 1280 1": 0.4, "tensorrt 3840 1": 0.42, "tensorrt 1280 8": 1.1, "tensorrt-naive 1280 1": 0.7,
        "torch-eager 1280 1": 2.0, "floor 1280 1": 0.01, **{key.replace("_", " "): v for key, v in changes.items()},
    }  # fmt: skip
    rows = []
    for key, value in ms.items():
        way, width, targets = key.split()
        height = {"1280": 720, "3840": 2160}[width]
        precision = "fp16"
        row = {"model": "siamcan-mobilenetv2", "precision": precision, "width": int(width), "height": height}
        rows.append({**row, "targets": int(targets), "way": way, "stage": "total", "p50_ms": value, "p99_ms": value})
    return rows


def failed(rows: list[dict[str, Any]]) -> list[str]:
    return [check.check for check in gpu_check.judge(rows) if check.result != "pass"]


def test_promises_that_are_kept() -> None:
    checks = gpu_check.judge(totals())
    assert [check.result for check in checks] == ["pass"] * 5


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"tensorrt_1280_8": 1.21}, ["latency: 8 targets against one"]),
        ({"tensorrt_3840_1": 0.45}, ["latency: 3840 x 2160 against 1280 x 720"]),
        ({"tensorrt-naive 1280 1": 0.59}, ["latency: tensorrt-naive against it"]),
        ({"torch-eager 1280 1": 1.1}, ["latency: torch-eager against it"]),
    ],
)
def test_promises_that_are_broken(change: dict[str, float], broken: list[str]) -> None:
    assert failed(totals(**change)) == broken


def test_a_slow_frame_is_judged_by_the_model() -> None:
    slow = {"tensorrt_1280_1": 2.5, "tensorrt_3840_1": 2.6, "tensorrt_1280_8": 7, "tensorrt-naive 1280 1": 4,
            "torch-eager 1280 1": 9}  # fmt: skip
    rows = totals(**slow)
    assert failed(rows) == ["latency: frame, ms"]  # an edge model has 0.5 ms
    assert failed([{**row, "model": "siamcan-r50"} for row in rows]) == []  # 350 frames a second take 2.86 ms


def test_without_engines_their_promises_are_left_out() -> None:
    rows = [{**row, "way": row["way"].replace("tensorrt", "torch-runner")} for row in totals()]
    assert [check.check for check in gpu_check.judge(rows)] == ["latency: 3840 x 2160 against 1280 x 720"]
    assert gpu_check.judge([row for row in rows if row["way"] == "floor"]) == []


def test_arguments_of_the_latency_benchmark() -> None:
    options = gpu_latency.parse([])
    assert options.sizes == ["1280x720", "3840x2160"]
    assert options.targets == [1, 4, 8, 16]
    for wrong in (["--targets", "0"], ["--frames", "many"], ["--precisions", "fp8"]):
        with pytest.raises(SystemExit):
            gpu_latency.parse(wrong)
    with pytest.raises(ValueError, match="expected an image size"):
        gpu_latency.measure_all(gpu_latency.parse(["--sizes", "large"]))


def test_an_unknown_model_is_refused_by_name(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"unknown model 'siamese-cat'; known: .*siamcan-r50"):
        gpu_latency.export_random("siamese-cat", tmp_path)


def test_windows_move_a_little_and_stay_near_their_size() -> None:
    windows = moving_windows((1280, 720), 3, 200, 50)
    assert len(windows) == 50
    assert len(set(windows)) == 50
    assert moving_windows((1280, 720), 3, 200, 50) == windows
    for before, after in itertools.pairwise(windows):
        for a, b in zip(before, after, strict=True):
            assert abs(a.left + a.width / 2 - b.left - b.width / 2) < 40
    assert {w.width for these in windows for w in these} <= set(range(159, 252))


def test_frames_are_timed_after_the_warm_up_on_changing_images(default_bundle: Bundle) -> None:
    case = Case(default_bundle, "fp16", (64, 48), 2)
    seen: list[tuple[int, int]] = []
    options = argparse.Namespace(window=10, warmup=3, frames=7)
    times = time_frames(lambda image, windows: seen.append((id(image), len(windows))), case, options)
    assert times.shape == (7,)
    assert (times > 0).all()
    assert len(seen) == 10
    assert len({image for image, _ in seen}) == gpu_latency.IMAGES
    assert {count for _, count in seen} == {2}


def test_rows_become_a_csv_and_a_table(default_bundle: Bundle, tmp_path: Path) -> None:
    case = Case(default_bundle, "fp16", (1280, 720), 4)
    rows = [case.row("tensorrt", "total", 0.5, 0.75, 10), case.row("tensorrt", "upload", 0.1, 0.2, 10)]
    rows.append(case.row("floor", "total", 0.01, 0.01, 0))
    write_csv(tmp_path / "table.csv", rows, "python -m benchmarks.gpu_latency")
    lines = (tmp_path / "table.csv").read_text().splitlines()
    found = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert found[0] == {
        "model": "siamcan-mobilenetv2", "precision": "fp16", "width": "1280", "height": "720", "targets": "4",
        "way": "tensorrt", "stage": "total", "p50_ms": "0.5000", "p99_ms": "0.7500", "frames": "10",
    }  # fmt: skip
    assert format_totals(rows).splitlines()[2:] == [
        "| siamcan-mobilenetv2 | fp16 | tensorrt | 0.500 / 0.750 |",
        "| siamcan-mobilenetv2 | fp16 | floor | 0.010 |",
    ]


def test_percentiles() -> None:
    assert percentiles(np.arange(101.0)) == (50.0, 99.0)


def test_camera_images_lie_in_memory_of_their_own() -> None:
    images = camera((32, 16), 3)
    assert [image.shape for image in images] == [(16, 32, 3)] * 3
    assert not np.array_equal(images[0], images[1])


def test_the_first_line_of_the_table_says_what_the_results_depend_on() -> None:
    pytest.importorskip("torch")
    row = gpu_check.facts(GpuInfo("NVIDIA Test", "9.0", 8 << 30))
    assert set(row) == set(vars(Check("", "", "", "", "")))
    assert row["subject"] == "NVIDIA Test, compute capability 9.0, 8 GiB"
    assert "torch" in row["measured"]


def test_work_and_floor() -> None:
    pytest.importorskip("torch")
    from benchmarks.gpu_torch import Rates, Work, floor_ms

    work = Work(flops=2e9, nbytes=4e6, upload_bytes=1e6)
    rates = Rates(flops_per_s=1e12, bytes_per_s=1e12, upload_bytes_per_s=1e10)
    assert floor_ms(work, rates) == pytest.approx(2.1)  # 2 ms of arithmetic, 0.1 ms of upload
    slow_memory = Rates(flops_per_s=1e12, bytes_per_s=1e9, upload_bytes_per_s=1e10)
    assert floor_ms(work, slow_memory) == pytest.approx(4.1)


def test_work_grows_with_targets_but_weights_are_read_once(default_bundle: Bundle) -> None:
    pytest.importorskip("torch")
    from benchmarks.gpu_torch import count_work
    from benchmarks.model_size import Size

    side = default_bundle.manifest.crop.search_px
    size = Size("siamcan-mobilenetv2", 0.5, 0.1, float("nan"), 0.2, side)
    one, eight = (count_work(default_bundle, size, targets, 2) for targets in (1, 8))
    assert one.flops == pytest.approx(4e8)
    assert eight.flops == 8 * one.flops
    assert one.upload_bytes == side * side * 3
    assert one.nbytes == 2 * (500_000 + 49 * 96) + one.upload_bytes
    assert eight.nbytes - one.nbytes == 7 * (2 * 49 * 96 + one.upload_bytes)


@pytest.mark.parametrize("model", ["siamcan-mobilenetv2", "dastsiam-mobilenetv2"])
def test_networks_in_fp16_give_nearly_what_they_give_in_fp32(model: str) -> None:
    torch = pytest.importorskip("torch")
    from benchmarks.gpu_torch import graph_modules
    from siamtrack.nets import MODELS

    torch.manual_seed(0)
    net: Any = MODELS[model]()
    generator = torch.Generator().manual_seed(1)
    template, search = (
        torch.randint(0, 256, (1, side, side, 3), dtype=torch.uint8, generator=generator)
        for side in (net.template_size, net.search_size)
    )
    responses = []
    for half in (False, True):
        modules = graph_modules(net, half)
        with torch.inference_mode():
            tensors = modules["template"](template)
            if "update" in modules:
                tensors = modules["update"](*[tensors[0]] * 3)
            assert all(tensor.dtype == (torch.float16 if half else torch.float32) for tensor in tensors)
            found = modules["search"](search, *tensors, torch.full((1, 2), 60.0), torch.zeros(3))
        assert all(tensor.dtype == torch.float32 for tensor in found)
        responses.append(found[3])
    assert float((responses[0] - responses[1]).abs().max()) < 0.02


def test_a_failed_copy_of_the_naive_loop_is_told() -> None:
    from benchmarks.gpu_naive import _check

    _check((0, "value"))
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        _check((1,))


def test_filling_memory_gives_it_back() -> None:
    device = HostDevice()
    device.limit = 1 << 20
    with gpu_memory._filled(device, spare=0):
        assert device.memory()[0] < 1 << 13
        with pytest.raises(CudaError):
            device.allocate(1 << 13)
    assert device.memory()[0] == 1 << 20
