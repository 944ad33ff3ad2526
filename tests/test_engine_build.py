"""Engines built for real by TensorRT-RTX, which needs no GPU: every graph of every model, and what goes wrong.

Every model is built with random weights in FP32, FP16 and INT8. Quantising a ResNet-50 takes half a minute, so of those
only one is built in INT8, unless SIAMTRACK_ALL_ENGINES is set.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import shutil
import signal
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from tqdm import tqdm

from model_export import cli, engine_build, plan
from model_export.engine_build import BuildSettings, build_engines, summary
from model_export.onnx_export import export_bundle
from model_export.plan import EngineBuildError, build_plan, target_capabilities
from model_export.precision import delicate_nodes
from siamtrack import Bundle, load_bundle
from siamtrack import cli as siamtrack_cli
from siamtrack.bundle import BundleError
from siamtrack.engine_files import EngineSet
from siamtrack.engines import open_engines
from siamtrack.gpu import EngineError, GpuInfo, RuntimeInfo, runtime_info
from siamtrack.nets import MODELS
from siamtrack.scene import SceneFrame

trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'siamtrack[engines]'")

ALL_ENGINES = bool(os.environ.get("SIAMTRACK_ALL_ENGINES"))
LARGE_BYTES = 100_000_000
LARGE_IN_INT8 = {"siamcan-r50"}
ADA = GpuInfo("NVIDIA GeForce RTX 4090", "8.9", 24 << 30)
ORIN = RuntimeInfo("tensorrt", "10.3.0", GpuInfo("Orin", "8.7", 8 << 30))


@pytest.fixture(scope="session")
def rtx() -> RuntimeInfo:
    """TensorRT-RTX as on a machine without a GPU."""
    return dataclasses.replace(runtime_info("tensorrt-rtx"), gpu=None)


@pytest.fixture
def bundle(default_bundle: Bundle, tmp_path: Path) -> Bundle:
    return copied(default_bundle, tmp_path / "bundle")


def copied(bundle: Bundle, folder: Path) -> Bundle:
    folder.mkdir()
    for file in bundle.path.glob("*"):
        if file.is_file():
            shutil.copy(file, folder)
    return load_bundle(folder)


# --- every model ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """A model's bundle: the shipped one, or one with random weights."""
    folder = tmp_path_factory.mktemp("model")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on shared cores threads mostly wait for each other
    torch.manual_seed(0)
    yield export_bundle(request.param, MODELS[request.param]().eval(), folder, "unspecified")
    torch.set_num_threads(threads)
    shutil.rmtree(folder)  # hundreds of megabytes each


def check_engines(bundle: Bundle, engines: EngineSet, precision: str) -> None:
    manifest = engines.manifest
    assert set(manifest.graphs) == set(bundle.manifest.graphs)
    assert (manifest.model, manifest.precision) == (bundle.manifest.model, precision)
    for name, graph in manifest.graphs.items():
        spec = bundle.manifest.graphs[name]
        assert graph.onnx_sha256 == spec.sha256
        assert sorted(graph.inputs, key=str) == sorted(spec.inputs, key=str)  # of the contract, in any precision
        assert sorted(graph.outputs, key=str) == sorted(spec.outputs, key=str)
        assert len(engines.read(name)) > 10_000


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_graph_builds(model: Bundle, rtx: RuntimeInfo, precision: str) -> None:
    large = model.size_bytes() > LARGE_BYTES
    if precision == "int8" and large and model.manifest.model not in LARGE_IN_INT8 and not ALL_ENGINES:
        pytest.skip("quantising takes long: set SIAMTRACK_ALL_ENGINES=1")
    settings = BuildSettings(precision, batches=(1, 2), calibration_crops=2)
    said: list[str] = []
    engines, built = build_engines(model, rtx, settings, said.append)
    assert said == []  # nothing had to stay FP32
    check_engines(model, engines, precision)
    layers: Counter[str] = Counter()
    for row in built:
        for (kind, computed), count in row.plan.layers.items():
            if kind == "CONVOLUTION":
                layers[computed] += count
    convolutions = sum(
        node.op_type == "Conv"
        for name in model.manifest.graphs
        for node in onnx.load(str(model.graph_path(name)), load_external_data=False).graph.node
    )
    assert layers.total() == convolutions
    if precision == "fp32":
        assert set(layers) == {"fp32"}
    else:
        assert layers["fp16" if precision == "fp16" else "int8"] > convolutions / 4
        assert layers["fp32"] < convolutions / 4
    gpu = dataclasses.replace(rtx, gpu=ADA)
    assert open_engines(model, gpu, precision, max_batch=2).folder == engines.folder


def test_every_model_tracks(model: Bundle, scene: list[SceneFrame], tmp_path: Path) -> None:
    """From frames on disk to boxes, by the command; with random weights they are of no use, but whole."""
    for index, frame in enumerate(scene[:3]):
        cv2.imwrite(str(tmp_path / f"{index}.png"), frame.image)
    boxes, start = tmp_path / "boxes.csv", ",".join(str(value) for value in scene[0].box_xywh)
    options = ["--model", str(model.path), "--threads", "1", "--init", start, "--out", str(boxes)]
    assert siamtrack_cli.main(["track", str(tmp_path), *options]) == 0
    rows = list(csv.DictReader(boxes.open()))
    assert [int(row["frame"]) for row in rows] == [0, 1, 2]
    assert all(math.isfinite(float(row[name])) for row in rows for name in ("x", "y", "w", "h", "score"))
    assert all(0 <= float(row["score"]) <= 1 and float(row["w"]) > 0 and float(row["h"]) > 0 for row in rows)


# --- the default model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_shipped_model_builds(bundle: Bundle, rtx: RuntimeInfo, precision: str) -> None:
    engines, built = build_engines(bundle, rtx, BuildSettings(precision, calibration_crops=4))
    check_engines(bundle, engines, precision)
    assert engines.folder.parent == bundle.path / "engines"
    assert engines.manifest.gpu == ""
    assert "8.9" in engines.manifest.compute_capabilities
    assert engines.manifest.batches == (1, 4, 8)
    sizes = {row.name: len(row.plan.content) for row in built}
    assert sizes == {name: len(engines.read(name)) for name in sizes}
    lines = summary(built).splitlines()
    assert [line.split()[0] for line in lines] == ["graph", "template", "search", "update"]
    assert ("int8: 53 convolution" in lines[2]) is (precision == "int8")
    assert ("fp16: 39 convolution" in lines[1]) is (precision != "fp32")
    assert "fp32: " in lines[2]  # ranking and decode


def test_compute_capabilities_are_chosen(bundle: Bundle, rtx: RuntimeInfo) -> None:
    engines, _ = build_engines(bundle, rtx, BuildSettings(compute_capabilities=("8.6",)))
    assert engines.folder.name.endswith("-any-sm86-fp16")
    assert open_engines(bundle, dataclasses.replace(rtx, gpu=GpuInfo("RTX 3060", "8.6", 1)))
    with pytest.raises(EngineError, match=r"built for compute capability 8\.6; the NVIDIA GeForce RTX 4090 has 8\.9"):
        open_engines(bundle, dataclasses.replace(rtx, gpu=ADA))


def test_new_engines_replace_the_old_when_they_are_done(
    bundle: Bundle, rtx: RuntimeInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = build_engines(bundle, rtx, BuildSettings(batches=(1,)))
    (first.folder / "rubbish").touch()
    monkeypatch.setattr(engine_build, "build_plan", failing)
    with pytest.raises(EngineBuildError):
        build_engines(bundle, rtx, BuildSettings(batches=(1, 3)))
    assert open_engines(bundle, dataclasses.replace(rtx, gpu=ADA)).manifest.batches == (1,)
    monkeypatch.undo()
    second, _ = build_engines(bundle, rtx, BuildSettings(batches=(1, 3)))
    assert second.folder == first.folder
    assert second.manifest.batches == (1, 3)
    engines = [f"{name}.engine" for name in ("search", "template", "update")]
    assert sorted(file.name for file in second.folder.iterdir()) == ["engine.json", *engines]
    assert [folder.name for folder in (bundle.path / "engines").iterdir()] == [second.folder.name]  # no scratch is left


def failing(*_: Any) -> Any:
    raise EngineBuildError("no", ["no reason"])


def test_engines_built_on_demand_by_a_child_process(bundle: Bundle, rtx: RuntimeInfo) -> None:
    gpu = dataclasses.replace(rtx, gpu=ADA)
    with pytest.raises(EngineError, match="have been built; build it: siamtrack-export engine"):
        open_engines(bundle, gpu)
    engines = open_engines(bundle, gpu, build="auto", max_batch=2)
    assert engines.manifest.batches == (1, 2)
    # A new export makes them stale; they are built again.
    net = MODELS["siamcan-mobilenetv2"]().eval()
    again = export_bundle("siamcan-mobilenetv2", net, bundle.path, "unspecified")
    with pytest.raises(EngineError, match="stale"):
        open_engines(again, gpu, max_batch=2)
    assert open_engines(again, gpu, build="auto", max_batch=2).manifest.graphs != engines.manifest.graphs


def flags_of(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configuration of every build from now on."""
    configurations: list[Any] = []
    add_profiles = plan._add_profiles

    def note(builder: Any, config: Any, *rest: Any) -> None:
        configurations.append(config)
        add_profiles(builder, config, *rest)

    monkeypatch.setattr(plan, "_add_profiles", note)
    return configurations


def test_engines_can_be_captured_and_are_exact(
    bundle: Bundle, rtx: RuntimeInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    configurations = flags_of(monkeypatch)
    build_plan(onnx.load(str(bundle.graph_path("template"))), rtx, (1,), ("8.9",))
    (config,) = configurations
    assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    assert not config.get_flag(trt.BuilderFlag.TF32)


def test_a_flag_that_tensorrt_has_not_is_left_out() -> None:
    calls: list[tuple[str, str]] = []
    config = types.SimpleNamespace(
        clear_flag=lambda flag: calls.append(("clear", flag)), set_flag=lambda flag: calls.append(("set", flag))
    )
    plan._set_flags(types.SimpleNamespace(BuilderFlag=types.SimpleNamespace(TF32="tf32")), config)
    assert calls == [("clear", "tf32")]


def test_engines_for_other_gpus_are_not_tried_on_this_one(
    bundle: Bundle, rtx: RuntimeInfo, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Path] = []
    monkeypatch.setattr(engine_build, "trial_load", lambda engines: tried.append(engines.folder))
    here = dataclasses.replace(rtx, gpu=ADA)
    engines, _ = build_engines(bundle, here, BuildSettings(batches=(1,), compute_capabilities=("8.6",)))
    assert engines.manifest.compute_capabilities == ("8.6",)
    assert tried == []
    build_engines(bundle, here, BuildSettings(batches=(1,), compute_capabilities=("8.9",)))
    assert len(tried) == 1


def test_a_graph_that_changed_meanwhile_is_not_built_from(bundle: Bundle, rtx: RuntimeInfo) -> None:
    net = MODELS["siamcan-mobilenetv2"]().eval()
    export_bundle("siamcan-mobilenetv2", net, bundle.path, "unspecified")  # `bundle` still has the hashes from before
    with pytest.raises(BundleError, match=r"\.onnx: changed while the bundle was in use"):
        build_engines(bundle, rtx, BuildSettings(batches=(1,)))
    assert not list((bundle.path / "engines").iterdir())


def test_ctrl_c_ends_a_build(bundle: Bundle, rtx: RuntimeInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT swallows what its callbacks raise: it must not look like a graph that cannot be built in FP16."""
    pressed: list[bool] = []

    class Bar(tqdm):  # type: ignore[type-arg]
        def update(self, n: float | None = 1) -> bool | None:
            if not pressed:
                pressed.append(True)
                signal.raise_signal(signal.SIGINT)
            return bool(super().update(n))

    monkeypatch.setattr(plan, "tqdm", Bar)
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, rtx, BuildSettings(batches=(1,)), said.append)
    assert pressed
    assert said == []
    assert not list((bundle.path / "engines").iterdir())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- what TensorRT refuses ------------------------------------------------------------------------------------------


def test_parse_error_is_said(rtx: RuntimeInfo) -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy")
    graph = helper.make_graph([helper.make_node("NoSuchThing", ["x"], ["y"], name="odd")], "test", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    with pytest.raises(EngineBuildError, match=r"engine: tensorrt-rtx .* cannot parse the ONNX graph: .*NoSuchThing"):
        build_plan(model, rtx, (1,))


def test_build_error_is_said_once_where_fp32_does_not_help(bundle: Bundle, rtx: RuntimeInfo) -> None:
    # TensorRT-RTX has no FP32 matrix products for Turing, and the decode has one.
    said: list[str] = []
    with pytest.raises(EngineBuildError, match=r"cannot build it: .*FP32 GEMM is not supported"):
        build_engines(bundle, rtx, BuildSettings(compute_capabilities=("7.5",)), said.append)
    assert said == []
    assert not list((bundle.path / "engines").iterdir())


def refuse_fp16(monkeypatch: pytest.MonkeyPatch, refused: set[str], names: bool) -> None:
    """Make TensorRT fail while one of these search nodes computes in FP16, with or without naming it."""

    def build(model: onnx.ModelProto, *rest: Any) -> Any:
        if rest[-1] != "search":
            return build_plan(model, *rest)
        inferred = onnx.shape_inference.infer_shapes(model)
        half = {v.name for v in inferred.graph.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT16}
        bad = [node.name for node in model.graph.node if node.name in refused and node.output[0] in half]
        if bad:
            text = (
                f"Could not find any implementation for node {{ForeignNode[{bad[0]} + PWN]}}." if names else "Internal"
            )
            raise EngineBuildError(f"search: {text}", [text])
        return build_plan(model, *rest)

    monkeypatch.setattr(engine_build, "build_plan", build)


@pytest.fixture
def nodes(bundle: Bundle) -> dict[str, onnx.NodeProto]:
    return {node.name: node for node in onnx.load(str(bundle.graph_path("search"))).graph.node}


def is_grouped(node: onnx.NodeProto) -> bool:
    return any(a.name == "group" and a.i > 1 for a in node.attribute)


def test_nodes_that_fail_in_fp16_stay_fp32(
    bundle: Bundle, rtx: RuntimeInfo, nodes: dict[str, onnx.NodeProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = set(sorted(name for name, node in nodes.items() if node.op_type == "Conv")[:2])
    refuse_fp16(monkeypatch, bad, names=True)
    said: list[str] = []
    engines, built = build_engines(bundle, rtx, BuildSettings(batches=(1,)), said.append)
    assert engines.manifest.fp32_nodes == tuple(f"search/{name}" for name in sorted(bad))
    assert [line.split("; ")[-1] for line in said] == [f"trying again with {name} in FP32" for name in sorted(bad)]
    assert built[1].plan.layers["CONVOLUTION", "fp32"] == 2
    assert built[1].plan.layers["CONVOLUTION", "fp16"] == 53


def test_grouped_convolutions_stay_fp32_where_tensorrt_names_nothing(
    bundle: Bundle, rtx: RuntimeInfo, nodes: dict[str, onnx.NodeProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    grouped = {name for name, node in nodes.items() if is_grouped(node)}
    refuse_fp16(monkeypatch, {min(grouped)}, names=False)
    said: list[str] = []
    _, built = build_engines(bundle, rtx, BuildSettings(batches=(1,)), said.append)
    assert set(built[1].fp32_nodes) == grouped
    assert len(said) == 1
    assert f"trying again with {len(grouped)} nodes in FP32" in said[0]


def test_everything_stays_fp32_as_the_last_resort(
    bundle: Bundle, rtx: RuntimeInfo, nodes: dict[str, onnx.NodeProto], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = next(name for name, node in nodes.items() if node.op_type == "Conv" and not is_grouped(node))
    refuse_fp16(monkeypatch, {plain}, names=False)
    _, built = build_engines(bundle, rtx, BuildSettings(batches=(1,)), lambda _: None)
    model = onnx.load(str(bundle.graph_path("search")))
    assert set(built[1].fp32_nodes) == set(nodes) - delicate_nodes(model)
    assert not [kind for kind, precision in built[1].plan.layers if precision == "fp16"]


def test_of_a_fused_run_only_the_ends_are_named(bundle: Bundle, nodes: dict[str, onnx.NodeProto]) -> None:
    model = onnx.load(str(bundle.graph_path("search")))
    delicate = sorted(delicate_nodes(model))
    grouped = {name for name, node in nodes.items() if is_grouped(node)}

    def next_after(text: str) -> frozenset[str]:
        return engine_build._next_in_fp32(model, [text], frozenset())

    assert next_after(f"no implementation for node {{ForeignNode[{delicate[0]}...{delicate[-1]}]}}") == grouped
    assert next_after(f"no implementation for node {delicate[0]}") == frozenset()
    conv = next(name for name, node in nodes.items() if node.op_type == "Conv")
    assert next_after(f"no implementation for node {{ForeignNode[{delicate[0]}...{conv}]}}") == {conv}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_fallback_ends(bundle: Bundle, rtx: RuntimeInfo, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    monkeypatch.setattr(engine_build, "build_plan", failing)
    said: list[str] = []
    with pytest.raises(EngineBuildError):
        build_engines(bundle, rtx, BuildSettings(precision), said.append)
    assert len(said) == {"fp32": 0, "fp16": 2}[precision]  # grouped convolutions, everything, and no more


# --- flavours ------------------------------------------------------------------------------------------------------


def test_tensorrt_builds_for_the_gpu_here(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same code with TensorRT-RTX in the place of TensorRT, whose API is the same."""
    tried: list[Path] = []
    monkeypatch.setattr(plan, "load_tensorrt", lambda flavour: {"tensorrt": trt}[flavour])
    monkeypatch.setattr(engine_build, "trial_load", lambda engines: tried.append(engines.folder))
    cache = tmp_path / "cache"
    with pytest.warns(DeprecationWarning, match="Timing cache"):
        engines, _ = build_engines(bundle, ORIN, BuildSettings(timing_cache=cache))
    manifest = engines.manifest
    assert (manifest.flavour, manifest.version, manifest.gpu) == ("tensorrt", "10.3.0", "Orin")
    assert manifest.compute_capabilities == ("8.7",)
    assert engines.folder.name == "tensorrt-10.3.0-orin-sm87-fp16"
    assert open_engines(bundle, ORIN).folder == engines.folder
    assert cache.stat().st_size > 0
    assert len(tried) == 1  # where there is a GPU, nothing is kept that does not load
    with pytest.warns(DeprecationWarning):
        build_engines(bundle, ORIN, BuildSettings(timing_cache=cache))  # and read again


@pytest.mark.parametrize("damaged", [None, "another"])
def test_a_timing_cache_that_cannot_be_used_starts_anew(tmp_path: Path, damaged: str | None) -> None:
    made: list[bytes] = []

    def create(content: bytes) -> str | None:
        made.append(content)
        return damaged if content else "new"

    config = types.SimpleNamespace(create_timing_cache=create, set_timing_cache=lambda cache, _: cache == "new")
    (tmp_path / "cache").write_bytes(b"odd")
    assert plan._load_timing_cache(config, tmp_path / "cache") == "new"
    assert made == [b"odd", b""]


def test_engines_that_do_not_load_are_not_kept(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: EngineSet) -> None:
        raise EngineError("the engines do not load here")

    monkeypatch.setattr(plan, "load_tensorrt", lambda _: trt)
    monkeypatch.setattr(engine_build, "trial_load", refuse)
    with pytest.raises(EngineError, match="do not load here"):
        build_engines(bundle, ORIN, BuildSettings())
    assert not list((bundle.path / "engines").iterdir())


@pytest.mark.parametrize(
    ("runtime", "asked", "answer"),
    [
        (ORIN, ("8.9",), "TensorRT builds for the GPU it runs on"),
        (dataclasses.replace(ORIN, gpu=None), (), "and none was found"),
        (
            RuntimeInfo("tensorrt-rtx", "1"),
            ("8.7", "8.9"),
            r"does not build for compute capability 8\.7; it knows 7\.5",
        ),
        (
            RuntimeInfo("tensorrt-rtx", "1", GpuInfo("H200", "9.0", 1)),
            (),
            r"does not run on H200 .*use --runtime tensorrt",
        ),
    ],
)
def test_targets_that_cannot_be_built_for(runtime: RuntimeInfo, asked: tuple[str, ...], answer: str) -> None:
    with pytest.raises(EngineError, match=answer):
        target_capabilities(runtime, asked)


@pytest.mark.parametrize(
    ("gpu", "asked", "expected"),
    [
        (None, (), {"8.0", "8.6", "8.9", "12.0"}),
        (ADA, (), {"8.0", "8.6", "8.9", "12.0"}),
        (GpuInfo("RTX 2080", "7.5", 1), (), {"7.5"}),
        (ADA, ("12.0",), {"12.0"}),
    ],
)
def test_targets(gpu: GpuInfo | None, asked: tuple[str, ...], expected: set[str]) -> None:
    found = set(target_capabilities(RuntimeInfo("tensorrt-rtx", "1", gpu), asked))
    assert expected <= found
    assert ("7.5" in found) is ("7.5" in expected)  # Turing takes engines of its own


# --- the command ---------------------------------------------------------------------------------------------------


def test_command_builds_and_signs(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"0123456789abcdef")
    arguments = ["engine", str(bundle.path), "--runtime", "tensorrt-rtx", "--precision", "fp32", "--batch", "3,1"]
    arguments += ["--compute-capability", "8.9", "--sign-key", str(key), "--timing-cache", str(tmp_path / "cache")]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "1 to 3 windows, tuned for 1, 3" in printed
    assert "for compute capability 8.9" in printed
    assert "--timing-cache is not used" in printed
    gpu = dataclasses.replace(runtime_info("tensorrt-rtx"), gpu=ADA)
    assert open_engines(bundle, gpu, "fp32", key_file=key).manifest.batches == (1, 3)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--batch", "0"], "whole numbers above 0"),
        (["--batch", "a"], "whole numbers above 0"),
        (["--compute-capability", "89"], "expected compute capabilities such as"),
        (["--precision", "fp8"], "invalid choice"),
        (["--runtime", "onnxruntime"], "invalid choice"),
        (["--calibration-crops", "0"], "above 0"),
    ],
)
def test_command_refuses_options(arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["engine", "siamcan-mobilenetv2", *arguments])
    assert answer in capsys.readouterr().err


def test_command_says_what_is_wrong(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build = ["engine", str(bundle.path), "--runtime", "tensorrt-rtx"]
    assert cli.main(["engine", str(tmp_path / "nothing")]) == 2
    assert "not a bundle" in capsys.readouterr().err
    assert cli.main([*build, "--compute-capability", "1.0"]) == 2
    assert "does not build for compute capability 1.0" in capsys.readouterr().err
    assert cli.main([*build, "--sign-key", str(tmp_path / "nothing")]) == 2
    assert "the signing key cannot be read" in capsys.readouterr().err
    assert cli.main([*build, "--timing-cache", str(tmp_path / "nothing" / "cache")]) == 2
    assert "--timing-cache: there is no folder" in capsys.readouterr().err
    assert not (bundle.path / "engines").exists()  # said before anything is built
    assert cli.main([*build, "--precision", "int8", "--calibration-images", str(tmp_path / "nothing")]) == 2
    assert "no such file or folder" in capsys.readouterr().err
    shutil.rmtree(bundle.path / "engines")
    (bundle.path / "engines").touch()  # as good as a folder that may not be written
    assert cli.main(build) == 2
    assert "copy it to a folder of yours (cp -r), build there" in capsys.readouterr().err
