"""Export: what the bundle says and holds, that verification can fail, and that no checkpoint runs code."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from model_export import cli, verify
from model_export.onnx_export import export_bundle
from model_export.verify import Difference, compare_with_onnxruntime, random_pairs, real_pairs
from siamtrack.bundle import SCHEMA_VERSION, Bundle, BundleError, TrackingSpec, load_bundle, sha256
from siamtrack.crop import Window
from siamtrack.nets.checkpoint import load_checkpoint
from siamtrack.nets.correlation import depthwise_grouped
from siamtrack.nets.decode import is_adaptive, normalise
from siamtrack.nets.edge import covered_cells
from siamtrack.nets.siamcan import SiamCAN, SiamCANEdge, SiamCANEdgeConfig
from siamtrack.runners.cuda.runner import CudaRunner
from siamtrack.runners.onnxruntime import OnnxRuntimeRunner
from tests.host_cuda import HostDevice, onnx_engines

Exported = tuple[Any, Bundle]


def lively(net: nn.Module) -> nn.Module:
    """Weights that keep activations alive, so that different crops give different answers."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return net.eval()


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    net: Any = lively(SiamCANEdge())
    with torch.no_grad():
        net.loc.predict.weight.mul_(0.02)  # or every distance is at its upper or lower end, whatever the weights
    out = tmp_path_factory.mktemp("edge") / "bundle"
    tracking = TrackingSpec(penalty_k=0.1, window_influence=0.3)
    return net, export_bundle("siamcan-mobilenetv2", net, out, "CC0-1.0", {"data": "none"}, tracking)


@pytest.fixture(scope="module")
def r50(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    torch.manual_seed(0)
    net = SiamCAN().eval()
    return net, export_bundle("siamcan-r50", net, tmp_path_factory.mktemp("r50"), "unspecified")


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The edge network that is told the target's size."""
    torch.manual_seed(0)
    net: Any = lively(SiamCANEdge(SiamCANEdgeConfig(takes_size=True)))
    with torch.no_grad():
        net.loc.predict.weight.mul_(0.02)
        torch.nn.init.normal_(net.shape.weight, std=0.1)
    return net, export_bundle("siamcan-mobilenetv2", net, tmp_path_factory.mktemp("sized") / "bundle", "CC0-1.0")


@pytest.fixture(params=["edge", "r50", "sized"])
def exported(request: pytest.FixtureRequest) -> Exported:
    return request.getfixturevalue(request.param)


# --- what is in a bundle -------------------------------------------------------------------------------------------


def tensors(
    template: list[tuple[str, list[int]]], search_px: int, response: int, sized: bool = False
) -> dict[str, list[tuple[str, str, list[Any]]]]:
    """The contract of `siamtrack.bundle` for given template tensors."""
    return {
        "template inputs": [("image", "uint8", [1, 127, 127, 3]), *([("size", "float32", [1, 2])] if sized else [])],
        "template outputs": [(name, "float32", [1, *shape]) for name, shape in template],
        "search inputs": [
            ("image", "uint8", ["N", search_px, search_px, 3]),
            *((name, "float32", ["N", *shape]) for name, shape in template),
            ("prev_size", "float32", ["N", 2]),
            ("tuning", "float32", [3]),
        ],
        "search outputs": [
            ("box", "float32", ["N", 4]),
            ("score", "float32", ["N"]),
            ("penalty", "float32", ["N"]),
            ("response", "float32", ["N", response, response]),
        ],
    }


KERNELS = [(f"{kind}_kernel{level}", [256, 5, 5]) for kind in ("cls", "loc") for level in range(3)]
CONTRACTS = {
    "siamcan-mobilenetv2": tensors([("kernel", [49, 96])], 209, 14),
    "siamcan-r50": tensors([*KERNELS, *((f"attention{level}", [256, 1, 1]) for level in range(3))], 255, 25),
}
SIZED = tensors([("kernel", [98, 96]), ("bias", [96, 1, 1])], 209, 14, sized=True)
FEATURE = ("feature", "float32", [1, 49, 96])
RENEWED = {
    "template outputs": [FEATURE],
    "update inputs": [(name, *FEATURE[1:]) for name in ("first", "history", "current")],
    "update outputs": [("kernel", *FEATURE[1:])],
}
CONTRACTS["siamcan-mobilenetv2"] |= RENEWED
GRIDS = {"siamcan-mobilenetv2": (14, 16, 0.5), "siamcan-r50": (25, 8, 31.5)}


def test_manifest_says_everything(exported: Exported) -> None:
    net, bundle = exported
    content = json.loads((bundle.path / "manifest.json").read_text())
    fields = {"schema_version", "model", "graphs", "crop", "grid", "score", "licence"}
    fields |= {"tracking", "precision", "int8", "provenance", "accuracy", "update"}
    assert set(content) == fields
    assert content["schema_version"] == SCHEMA_VERSION
    assert (content["crop"]["template_px"], content["crop"]["search_px"]) == (127, net.search_size)
    assert tuple(content["grid"].values()) == GRIDS[content["model"]]
    assert content["grid"] == dataclasses.asdict(net.grid)
    assert (content["precision"], content["int8"]) == ("fp32", {})
    assert ("update" in content["graphs"]) == (content["update"] is not None) == is_adaptive(net)
    for graph in content["graphs"]:
        entry = content["graphs"][graph]
        assert entry["file"] == f"{graph}.onnx"
        assert re.fullmatch(r"[0-9a-f]{64}", entry["sha256"])
        assert entry["sha256"] == sha256(bundle.path / entry["file"])
        for side in ("inputs", "outputs"):
            found = [(t["name"], t["dtype"], t["shape"]) for t in entry[side]]
            contract = SIZED if bundle.manifest.takes_size else CONTRACTS[content["model"]]
            assert found == contract[f"{graph} {side}"]


def test_manifest_agrees_with_the_graphs(exported: Exported) -> None:
    _, bundle = exported
    for name, graph in bundle.manifest.graphs.items():
        session = onnxruntime.InferenceSession(str(bundle.graph_path(name)), providers=["CPUExecutionProvider"])
        for specs, values in ((graph.inputs, session.get_inputs()), (graph.outputs, session.get_outputs())):
            assert [(s.name, list(s.shape)) for s in specs] == [(v.name, v.shape) for v in values]


def test_manifest_keeps_what_the_caller_knows(edge: Exported) -> None:
    manifest = edge[1].manifest
    assert (manifest.model, manifest.licence) == ("siamcan-mobilenetv2", "CC0-1.0")
    assert manifest.provenance["data"] == "none"
    assert manifest.tracking == TrackingSpec(penalty_k=0.1, window_influence=0.3)
    assert manifest.score.calibration == "uncalibrated"


def test_nothing_of_this_machine_leaks(exported: Exported) -> None:
    _, bundle = exported
    here = Path(__file__).resolve().parent.parent
    secrets = ["site-packages", "siamcan.py", str(here), str(Path.home()) + "/", sys.prefix, str(bundle.path)]
    for file in (*(graph.file for graph in bundle.manifest.graphs.values()), "manifest.json"):
        content = (bundle.path / file).read_bytes()
        found = [s for s in secrets if s.encode() in content]
        assert not found, f"{file} contains {found}"


def test_graphs_are_single_files_with_constant_kernels_only(exported: Exported) -> None:
    _, bundle = exported
    graphs = sorted(f"{name}.onnx" for name in bundle.manifest.graphs)
    assert sorted(p.name for p in bundle.path.iterdir()) == ["manifest.json", *graphs]
    model = onnx.load(str(bundle.graph_path("search")))
    constants = {i.name for i in model.graph.initializer} | {
        output for node in model.graph.node if node.op_type == "Constant" for output in node.output
    }
    inputs = {i.name for i in model.graph.input}
    for node in model.graph.node:
        # Some targets take convolution weights as initialisers only (algorithms 7).
        if node.op_type == "Conv":
            assert node.input[1] not in inputs
    assert len(constants) > 10
    casts = [node for node in model.graph.node if "image" in node.input]
    assert [node.op_type for node in casts] == ["Cast"]  # TensorRT takes uint8 nowhere else


def test_export_leaves_the_network_as_it_was(r50: Exported) -> None:
    # It correlates by matrix products while exporting; training goes on with the faster form.
    net, _ = r50
    assert all(branch.correlate is depthwise_grouped for branch in (*net.cls, *net.loc))


def test_second_export_replaces_the_first(edge: Exported, tmp_path: Path) -> None:
    net, first = edge
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.cls.predict.bias.add_(1.0)
    export_bundle("siamcan-mobilenetv2", other, tmp_path, "a")
    (tmp_path / "engines").mkdir()
    second = export_bundle("siamcan-mobilenetv2", net, tmp_path, "b")
    assert second.manifest.licence == "b"
    assert (tmp_path / "engines").is_dir()
    assert compare_with_onnxruntime(net, second, random_pairs(second, 2)).ok
    # The same network exports to the same bytes, so a hash tells whether a model changed.
    assert second.manifest.graphs["search"].sha256 == first.manifest.graphs["search"].sha256


def test_changed_graph_is_refused(edge: Exported, tmp_path: Path) -> None:
    for file in edge[1].path.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = bytearray((tmp_path / "search.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "search.onnx").write_bytes(bytes(content))
    with pytest.raises(BundleError, match=r"search\.onnx is damaged or was changed"):
        load_bundle(tmp_path)


# --- verification --------------------------------------------------------------------------------------------------


def test_edge_graphs_compute_the_network(edge: Exported) -> None:
    net, bundle = edge
    for pairs in (random_pairs(bundle, 8), real_pairs(bundle, 8)):
        difference = compare_with_onnxruntime(net, bundle, pairs)
        assert difference.ok, difference
        assert difference.crops == 8


def test_r50_graphs_compute_the_network(r50: Exported) -> None:
    net, bundle = r50
    difference = compare_with_onnxruntime(net, bundle, random_pairs(bundle, 2))
    assert difference.ok, difference


def test_pairs_repeat_and_differ(edge: Exported, tmp_path: Path) -> None:
    _, bundle = edge
    rng = np.random.default_rng(0)
    for i in range(2):
        cv2.imwrite(str(tmp_path / f"{i}.png"), rng.integers(0, 256, (120, 160, 3)).astype(np.uint8))
    sources: list[Callable[[int], Any]] = [
        lambda seed: random_pairs(bundle, 3, seed),
        lambda seed: real_pairs(bundle, 3, tmp_path, seed),
        lambda seed: real_pairs(bundle, 3, None, seed),
    ]
    for source in sources:
        first, again, other = (list(source(seed)) for seed in (0, 0, 1))
        assert [len(pairs) for pairs in (first, again, other)] == [3, 3, 3]
        for (t, s, size), (t2, s2, size2), (_, s3, _) in zip(first, again, other, strict=True):
            assert (t.shape, s.shape, size.shape) == ((127, 127, 3), (209, 209, 3), (2,))
            assert (size > 0).all()
            np.testing.assert_array_equal(t, t2)
            np.testing.assert_array_equal(s, s2)
            np.testing.assert_array_equal(size, size2)
            assert (s != s3).any()


@pytest.mark.parametrize(
    ("part", "value"),
    [("neck16.weight", 0.01), ("cls.predict.bias", 0.01), ("loc.predict.bias", 0.1)],
)
def test_verification_notices_a_changed_network(edge: Exported, part: str, value: float) -> None:
    net, bundle = edge
    changed = copy.deepcopy(net)
    with torch.no_grad():
        changed.get_parameter(part).add_(value)
    difference = compare_with_onnxruntime(changed, bundle, random_pairs(bundle, 2))
    assert not difference.ok
    assert "OUTSIDE TOLERANCE" in str(difference)


def test_verification_notices_nan(edge: Exported) -> None:
    net, bundle = edge
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken.loc.predict.bias.fill_(float("nan"))
    assert not compare_with_onnxruntime(broken, bundle, random_pairs(bundle, 2)).ok


def test_onnxruntime_answers_as_pytorch_when_told_the_size(sized: Exported) -> None:
    net, bundle = sized
    difference = compare_with_onnxruntime(net, bundle, random_pairs(bundle, 5))
    assert difference.ok, difference


def test_a_model_that_asks_for_the_size_gets_it_in_crop_pixels(sized: Exported) -> None:
    net, bundle = sized
    image = np.random.default_rng(0).integers(0, 256, (200, 300, 3)).astype(np.uint8)
    window = Window(50, 40, 254, 127)  # shrunk to half its width
    with OnnxRuntimeRunner(bundle) as runner:
        with pytest.raises(ValueError, match="the template of siamcan-mobilenetv2 needs the target's size"):
            runner.template(image, window, (0, 0, 0))
        _, bias = runner.template(image, window, (0, 0, 0), (100, 60)).tensors
    with torch.no_grad():
        wanted = net.shape(covered_cells(torch.tensor([[50.0, 60.0]]), 7))
    np.testing.assert_allclose(bias[0, :, 0, 0], wanted[0], rtol=1e-4, atol=1e-5)


def test_the_gpu_runner_tells_the_template_the_size(sized: Exported) -> None:
    """On a device of host memory: as ONNX Runtime does, and also after an upload that has outgrown its buffer."""
    _, bundle = sized
    device = HostDevice()
    rng = np.random.default_rng(0)
    image, large = (rng.integers(0, 256, (*side, 3)).astype(np.uint8) for side in ((240, 320), (2160, 3840)))
    side = bundle.manifest.crop.search_px  # windows of the crops' own sides: both runners copy them exactly
    windows, prev_size = [Window(40, 10, side, side)], np.array([[60, 40]], np.float32)

    def response(runner: Any, size: tuple[float, float]) -> Any:
        features = runner.template(image, Window(80, 50, 127, 127), (1.0, 2.0, 3.0), size)
        return runner.search(image, windows, [features], prev_size, (0.06, 0.3, 0.0)).response

    sizes = ((60.0, 40.0), (40.0, 90.0))
    with OnnxRuntimeRunner(bundle, threads=1) as reference:
        wanted = [response(reference, size) for size in sizes]
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-3
    with CudaRunner(bundle, device, onnx_engines(bundle, device), max_batch=1) as runner:
        with pytest.raises(ValueError, match="needs the target's size"):
            runner.template(image, Window(80, 50, 127, 127), (1.0, 2.0, 3.0))
        for size, answer in zip(sizes, wanted, strict=True):
            np.testing.assert_array_equal(response(runner, size), answer)
        features = runner.template(image, Window(80, 50, 127, 127), (1.0, 2.0, 3.0), sizes[0])
        device.take_calls()
        runner.search(large, [Window(0, -800, 3840, 3840)], [features], prev_size, (0.06, 0.3, 0.0))
        assert "free" in device.take_calls()
        for size, answer in zip(sizes, wanted, strict=True):
            np.testing.assert_array_equal(response(runner, size), answer)


@pytest.fixture
def plain_choice(edge: Exported) -> Exported:
    """The best score alone decides."""
    net, bundle = edge
    tracking = dataclasses.replace(bundle.manifest.tracking, penalty_k=0.0, window_influence=0.0)
    return net, dataclasses.replace(bundle, manifest=dataclasses.replace(bundle.manifest, tracking=tracking))


def choose_second(net: Any, monkeypatch: pytest.MonkeyPatch, gap: float, off_px: float = 0.0) -> None:
    """Far from the best cell, make another that is worse by `gap` in logits; ONNX Runtime's stand-in chooses that."""
    chosen: list[Any] = []

    def search(image: torch.Tensor, *template: torch.Tensor) -> Any:
        raw = type(net).search(net, image, *template)
        logits = (raw.logits - raw.logits.amax()).contiguous()  # 0 for the best: there a difference of 1e-6 shows
        target = logits.flatten(2)
        best = target[0, -1].argmax()
        second = (best + target.shape[2] // 2) % target.shape[2]
        target[0, :, second] = target[0, :, best]
        target[0, -1, second] -= gap
        raw = raw._replace(logits=logits)
        boxes, scores = net.decoder.candidates(raw)
        chosen[:] = [boxes[:, second].numpy() + np.float32(off_px), scores[:, second].numpy()]
        return raw

    class Session:
        def __init__(self, session: Any) -> None:
            self.session = session

        def run(self, names: Any, feeds: dict[str, Any]) -> list[Any]:
            if "prev_size" not in feeds:
                return list(self.session.run(names, feeds))
            image = net_image(net, feeds["image"])
            kernel, size, tuning = (torch.from_numpy(feeds[name]) for name in ("kernel", "prev_size", "tuning"))
            raw = search(image, kernel)
            _, _, penalty, response = (part.numpy() for part in net.decoder(raw, size, tuning))
            return [*chosen, penalty, response]

    real = OnnxRuntimeRunner.session
    monkeypatch.setattr(OnnxRuntimeRunner, "session", lambda self, name: Session(real(self, name)))
    monkeypatch.setattr(net, "search", search)


def net_image(net: Any, image: Any) -> torch.Tensor:
    return normalise(torch.from_numpy(image.copy()), net.normalisation)


def test_a_tie_is_no_difference(plain_choice: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    net, bundle = plain_choice
    choose_second(net, monkeypatch, gap=1e-6)
    difference = compare_with_onnxruntime(net, bundle, random_pairs(bundle, 3))
    assert (difference.ties, difference.other_cell) == (3, 0)
    assert difference.box_px < 1e-3
    assert difference.ok, difference
    assert "tied 3" in str(difference)


@pytest.mark.parametrize(("gap", "off_px"), [(0.1, 0.0), (1e-6, 0.2), (1e-6, 16.0)])
def test_a_worse_cell_or_another_box_is_no_tie(
    plain_choice: Exported, monkeypatch: pytest.MonkeyPatch, gap: float, off_px: float
) -> None:
    net, bundle = plain_choice
    choose_second(net, monkeypatch, gap, off_px)
    difference = compare_with_onnxruntime(net, bundle, random_pairs(bundle, 3))
    assert difference.ties == 0
    assert not difference.ok, difference


@pytest.mark.parametrize(
    ("change", "ok"),
    [
        ({}, True),
        ({"template": 2e-4}, False),
        ({"response": 2e-4}, False),
        ({"box_px": 0.06}, False),
        ({"other_cell": 1}, False),
        ({"template": float("nan")}, False),
        ({"crops": 0}, False),  # nothing compared proves nothing
    ],
)
def test_difference_is_judged_by_every_field(change: dict[str, float], ok: bool) -> None:
    good = Difference(crops=5, template=1e-5, response=1e-5, box_px=0.01, other_cell=0)
    assert dataclasses.replace(good, **change).ok is ok  # type: ignore[arg-type]


def test_batch_of_three_equals_singles(exported: Exported) -> None:
    _, bundle = exported
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)
    image = np.asarray(cv2.resize(coarse, (640, 480), interpolation=cv2.INTER_CUBIC), np.uint8)
    places = [Window(20, 30, 127, 127), Window(300, 200, 90, 90), Window(500, 320, 160, 160)]
    searched = [Window(-40, -30, 255, 255), Window(250, 150, 181, 181), Window(450, 250, 321, 321)]
    sizes = np.array([[64, 40], [30, 90], [50, 50]], np.float32)
    tuning = (0.06, 0.3, 0.0)
    with OnnxRuntimeRunner(bundle) as runner:
        features = [runner.template(image, window, (110.0, 120.0, 130.0), (60, 40)) for window in places]
        together = runner.search(image, searched, features, sizes, tuning)
        assert together.box_cxcywh.shape == (3, 4)
        for i in range(3):
            alone = runner.search(image, searched[i : i + 1], features[i : i + 1], sizes[i : i + 1], tuning)
            np.testing.assert_allclose(together.response[i], alone.response[0], atol=1e-5)
            np.testing.assert_allclose(together.box_cxcywh[i], alone.box_cxcywh[0], rtol=1e-4, atol=1e-2)
            np.testing.assert_allclose(together.score[i], alone.score[0], atol=1e-5)
            np.testing.assert_allclose(together.penalty[i], alone.penalty[0], atol=1e-5)
    # Different answers, or samples that were mixed up would pass.
    assert np.abs(together.response[0] - together.response[1]).max() > 1e-3
    assert np.abs(together.response[1] - together.response[2]).max() > 1e-3


# --- checkpoints and the command -----------------------------------------------------------------------------------


def state_dict_file(edge: Exported, path: Path) -> Path:
    torch.save(edge[0].state_dict(), path)
    return path


def test_command_exports_and_verifies(edge: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = state_dict_file(edge, tmp_path / "net.pth")
    out = tmp_path / "bundle"
    arguments = ["onnx", "--checkpoint", str(checkpoint), "--out", str(out), "--model", "siamcan-mobilenetv2"]
    arguments += ["--crops", "2", "--licence", "MIT", "--note", "data=made up = here", "--note", "by=test"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count(": ok") == 2
    manifest = load_bundle(out).manifest
    assert manifest.licence == "MIT"
    assert manifest.provenance["data"] == "made up = here"
    assert manifest.provenance["by"] == "test"
    assert manifest.provenance["checkpoint_sha256"] == sha256(checkpoint)


def test_command_says_when_outside_tolerance(
    edge: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(verify, "TENSOR_TOLERANCE", 0.0)
    checkpoint = state_dict_file(edge, tmp_path / "net.pth")
    arguments = ["onnx", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "b"), "--crops", "2"]
    assert cli.main([*arguments, "--model", "siamcan-mobilenetv2"]) == 1
    assert "OUTSIDE TOLERANCE" in capsys.readouterr().out


def training_checkpoint(recipe: Any, state: Any) -> dict[str, Any]:
    return {"hyper_parameters": {"recipe": recipe}, "state_dict": state, "epoch": 4, "global_step": 77}


@pytest.mark.parametrize(
    ("content", "model", "message"),
    [
        (None, "siamcan-mobilenetv2", "no such file"),
        (b"not a checkpoint at all", "siamcan-mobilenetv2", "not a file of tensors and plain values"),
        (b".", "siamcan-mobilenetv2", "not a file of tensors"),  # a pickle that ends before it begins
        (b"", "siamcan-mobilenetv2", "not a file of tensors"),
        (torch.zeros(3), "siamcan-mobilenetv2", "neither a checkpoint of training.train nor a state dict"),
        ([1, 2], "siamcan-mobilenetv2", "neither a checkpoint"),
        ({}, "siamnet", "unknown model 'siamnet'; known: siamfc, siamfc-st"),
        ({}, None, "does not say which model it is; name it with --model"),
        ({"neck.weight": torch.zeros(1)}, "siamcan-mobilenetv2", "does not fit siamcan-mobilenetv2"),
        (training_checkpoint([], 3), "siamcan-mobilenetv2", "does not fit siamcan-mobilenetv2"),
        (training_checkpoint({"model": "siamcan-r50"}, {}), "siamcan-mobilenetv2", "is a siamcan-r50, not a"),
        (training_checkpoint({"model": "siamnet"}, {}), None, "unknown model 'siamnet'"),
    ],
    ids=lambda value: None if isinstance(value, (bytes, torch.Tensor, dict, list)) else str(value)[:20],
)
def test_command_refuses(
    tmp_path: Path, content: Any, model: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = tmp_path / "net.ckpt"
    if isinstance(content, bytes):
        checkpoint.write_bytes(content)
    elif content is not None:
        torch.save(content, checkpoint)
    arguments = ["onnx", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "bundle")]
    assert cli.main(arguments + (["--model", model] if model else [])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "bundle").exists()


def test_command_refuses_a_note_without_a_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.pth").touch()
    arguments = ["onnx", "--checkpoint", str(tmp_path / "net.pth"), "--out", str(tmp_path / "b"), "--note", "text"]
    assert cli.main(arguments) == 2
    assert "--note expects KEY=TEXT, got 'text'" in capsys.readouterr().err


def test_training_checkpoint_says_where_it_comes_from(edge: Exported, tmp_path: Path) -> None:
    net, _ = edge
    recipe = {"model": "siamcan-mobilenetv2", "seed": 3, "epochs": 9, "pairs_per_epoch": 50}
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    # The module's graphs hold the same network under other names, and buffers of their own.
    state["search_graph.points"] = torch.zeros(256, 2)
    torch.save(training_checkpoint(recipe, state), tmp_path / "last.ckpt")
    checkpoint = load_checkpoint(tmp_path / "last.ckpt")
    assert checkpoint.model == "siamcan-mobilenetv2"
    assert not checkpoint.net.training
    for name, value in net.state_dict().items():
        torch.testing.assert_close(checkpoint.net.state_dict()[name], value)
    wanted = {"epoch": "4", "step": "77", "seed": "3", "epochs": "9", "pairs_per_epoch": "50"}
    assert checkpoint.provenance == {**wanted, "checkpoint_sha256": sha256(tmp_path / "last.ckpt")}


class Malicious:
    """Creates a file when unpickled, as a stranger's checkpoint might do worse."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.victim,)


@pytest.mark.parametrize("container", ["pickle", "torch"])
def test_malicious_checkpoint_runs_nothing(tmp_path: Path, container: str, capsys: pytest.CaptureFixture[str]) -> None:
    victim, file = tmp_path / "victim", tmp_path / "evil.ckpt"
    if container == "pickle":
        file.write_bytes(pickle.dumps({"state_dict": Malicious(victim)}))
        pickle.loads(file.read_bytes())
        assert victim.exists()  # the attack works on a reader that trusts its input
        victim.unlink()
    else:
        torch.save({"state_dict": Malicious(victim)}, file)
    arguments = ["onnx", "--checkpoint", str(file), "--out", str(tmp_path / "b"), "--model", "siamcan-mobilenetv2"]
    assert cli.main(arguments) == 2
    refused = {"pickle": "not a file of tensors and plain values", "torch": "is refused: reading it would run"}
    assert refused[container] in capsys.readouterr().err
    assert not victim.exists()
