"""Verification of precisions and runtimes side by side: that equal is equal, and that differences are noticed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from model_export import cli, compare, verify
from model_export.compare import Clip, Comparison, SubstituteRunner, folder_clip, scene_clip, table
from model_export.convert import convert_bundle
from model_export.crops import real_pairs
from model_export.onnx_export import export_bundle
from model_export.verify import compare_runtimes, torch_runner
from siamtrack import Bundle
from siamtrack.nets import MODELS
from siamtrack.runners import SearchResult
from siamtrack.runners.onnxruntime import OnnxRuntimeRunner
from siamtrack.scene import SceneFrame


@pytest.fixture(scope="module")
def pairs(default_bundle: Bundle) -> list[compare.Pair]:
    return list(real_pairs(default_bundle, 4))


@pytest.fixture(scope="module")
def clip(scene: list[SceneFrame]) -> Clip:
    return Clip(tuple(f.image for f in scene[:12]), tuple(f.box_xywh for f in scene[:12]))


@pytest.fixture(scope="module")
def reference(default_bundle: Bundle) -> Iterator[OnnxRuntimeRunner]:
    with OnnxRuntimeRunner(default_bundle, threads=1) as runner:
        yield runner


class Changed(OnnxRuntimeRunner):
    """Another answer to every search."""

    change: Callable[[SearchResult], SearchResult]

    def search(self, *arguments: Any) -> SearchResult:
        return self.change(super().search(*arguments))


def against(
    reference: OnnxRuntimeRunner,
    pairs: list[compare.Pair],
    clip: Clip,
    change: Callable[[SearchResult], SearchResult] = lambda result: result,
    precision: str = "fp32",
) -> Comparison:
    with Changed(reference.bundle, threads=1) as runner:
        runner.change = change  # type: ignore[method-assign]
        (found,) = compare.compare(reference, [("changed", precision, runner)], pairs, clip)
    return found


def test_the_same_is_the_same(reference: OnnxRuntimeRunner, pairs: list[compare.Pair], clip: Clip) -> None:
    found = against(reference, pairs, clip)
    assert (found.template, found.response, found.box_px, found.other_cell) == (0, 0, 0, 0)
    assert found.loop_px == (0, 0, 0)
    assert found.loop_iou == pytest.approx(1)
    assert 0 < found.shaken_px < 0.5
    assert found.overlap == found.reference_overlap > 0.6
    assert found.ok


def shifted(pixels: float) -> Callable[[SearchResult], SearchResult]:
    return lambda r: dataclasses.replace(r, box_cxcywh=r.box_cxcywh + np.float32(pixels))


def raised(by: float) -> Callable[[SearchResult], SearchResult]:
    return lambda r: dataclasses.replace(r, response=r.response + np.float32(by))


@pytest.mark.parametrize(
    ("change", "precision", "ok"),
    [
        (shifted(0.005), "fp32", True),
        (shifted(0.06), "fp32", False),
        (shifted(0.06), "fp16", True),
        (shifted(1.5), "fp16", False),
        (raised(0.3), "int8", True),
        (shifted(30), "int8", False),
        (raised(0.01), "fp32", False),
        (raised(0.01), "fp16", True),
        (raised(0.1), "fp16", False),
        (raised(float("nan")), "fp16", False),
        (shifted(float("nan")), "fp16", False),
    ],
)
def test_differences_are_judged_by_precision(
    reference: OnnxRuntimeRunner,
    pairs: list[compare.Pair],
    clip: Clip,
    change: Callable[[SearchResult], SearchResult],
    precision: str,
    ok: bool,
) -> None:
    found = against(reference, pairs, clip, change, precision)
    assert found.ok is ok, found


def test_shift_is_measured(reference: OnnxRuntimeRunner, pairs: list[compare.Pair], clip: Clip) -> None:
    found = against(reference, pairs, clip, shifted(0.5))
    assert found.box_px == pytest.approx(0.5, abs=1e-3)
    # Width grows by 0.5 and the centre moves, each frame anew: the loop feeds the error back.
    assert found.loop_px[0] > 0.1
    assert found.loop_iou < 1


def test_a_wrong_box_of_the_same_cell_is_a_box_error(
    reference: OnnxRuntimeRunner, pairs: list[compare.Pair], clip: Clip
) -> None:
    """Not another cell, although the score is not quite the same, as in FP16."""

    def change(result: SearchResult) -> SearchResult:
        moved = result.box_cxcywh + np.float32(5)
        by = np.float32(1e-3)
        return dataclasses.replace(result, box_cxcywh=moved, score=result.score + by, response=result.response + by)

    found = against(reference, pairs, clip, change, "fp16")
    assert found.other_cell == 0
    assert found.box_px == pytest.approx(5, abs=1e-3)


@pytest.mark.parametrize("tie", [False, True])
def test_another_cell_is_told_and_is_no_box_error(
    reference: OnnxRuntimeRunner, pairs: list[compare.Pair], clip: Clip, tie: bool
) -> None:
    turns = iter(range(10**6))

    def change(result: SearchResult) -> SearchResult:
        if next(turns) > 0 or not len(result.score):
            return result
        response = result.response.copy()
        other = 0 if response[0].argmax() else 1
        if tie:
            response[0].flat[other] = result.score[0]
        score = response[:, 0, other]
        return dataclasses.replace(result, box_cxcywh=result.box_cxcywh + 16, score=score, response=response)

    found = against(reference, pairs, clip, change, "int8")
    assert found.other_cell == pytest.approx(1 / len(pairs))
    assert found.box_px == 0


GOOD = Comparison("x", "fp16", 0.01, 0.01, 0.1, 0.0, (0.1, 0.2, 0.3), 0.99, 0.7, 0.7, 0.05)


@pytest.mark.parametrize(
    ("change", "ok"),
    [
        ({}, True),
        ({"response": 0.06}, False),
        ({"box_px": 1.1}, False),
        ({"loop_px": (0.6, 0.7, 0.8)}, False),
        ({"loop_px": (0.1, 7.0, 8.0)}, True),
        ({"loop_px": (0.6, 0.7, 0.8), "shaken_px": 0.31}, True),  # FP32 itself does no better
        ({"loop_px": (0.6, 0.7, 0.8), "shaken_px": math.nan}, False),
        ({"overlap": 0.694}, False),
        ({"overlap": 0.696}, True),
        ({"overlap": math.nan, "reference_overlap": math.nan}, True),  # no truth
        ({"template": math.nan}, True),  # on the GPU
        ({"overlap": math.nan}, False),
    ],
)
def test_comparison_is_judged_by_every_field(change: dict[str, Any], ok: bool) -> None:
    assert dataclasses.replace(GOOD, **change).ok is ok


def test_table_has_a_line_a_runner() -> None:
    bad = dataclasses.replace(GOOD, name="y", response=1.0, template=math.nan)
    lines = table([GOOD, bad]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split()[:2] == ["x", "1.0e-02"]
    assert lines[1].endswith("ok")
    assert lines[2].split()[:2] == ["y", "-"]
    assert lines[2].endswith("OUTSIDE TOLERANCE")


def test_nothing_to_compare_on_is_refused(reference: OnnxRuntimeRunner, pairs: list[compare.Pair], clip: Clip) -> None:
    with pytest.raises(ValueError, match="got 0 crops and 12 frames"):
        list(compare.compare(reference, [], [], clip))
    with pytest.raises(ValueError, match="got 4 crops and 1 frames"):
        list(compare.compare(reference, [], pairs, Clip(clip.frames[:1], clip.truth_xywh[:1])))


def test_scene_clip_has_its_truth() -> None:
    clip = scene_clip(3, 320, 180)
    assert (len(clip.frames), len(clip.truth_xywh)) == (3, 3)
    assert clip.frames[0].shape == (180, 320, 3)


def test_folder_clip_starts_at_its_first_box(tmp_path: Path) -> None:
    for i in range(3):
        cv2.imwrite(str(tmp_path / f"{i}.png"), np.full((60, 80, 3), i, np.uint8))
    with pytest.raises(ValueError, match="no four numbers in the first line; give the first box with --init"):
        folder_clip(tmp_path, 2)
    assert folder_clip(tmp_path, 2, (1.0, 2.0, 3.0, 4.0)).truth_xywh == ((1.0, 2.0, 3.0, 4.0),)
    for text in ("10,20,30,40\n11,21,31,41\n", "10\t20\t30\t40\n"):
        (tmp_path / "groundtruth_rect.txt").write_text(text)
        clip = folder_clip(tmp_path, 2)
        assert clip.truth_xywh == ((10.0, 20.0, 30.0, 40.0),)
        assert [int(frame[0, 0, 0]) for frame in clip.frames] == [0, 1]


@pytest.mark.parametrize("name", ["siamla-mobilenetv2", "siamcan-mobilenetv2"])
def test_torch_runner_computes_what_the_bundle_does(name: str, tmp_path: Path, clip: Clip) -> None:
    """One model without and one with an update graph."""
    torch.manual_seed(0)
    net = MODELS[name]().eval()
    bundle = export_bundle(name, net, tmp_path, "unspecified")
    pairs = list(real_pairs(bundle, 2))
    clip = Clip(clip.frames[:4], clip.truth_xywh[:4])
    with OnnxRuntimeRunner(bundle, threads=1) as exact, torch_runner(bundle, net) as runner:
        (found,) = compare.compare(exact, [("PyTorch", "fp32", runner)], pairs, clip)
        assert found.ok, found
        assert found.template < 1e-4
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(1.2)
    with OnnxRuntimeRunner(bundle, threads=1) as exact, torch_runner(bundle, net) as runner:
        (found,) = compare.compare(exact, [("PyTorch", "fp32", runner)], pairs, clip)
        assert found.template > 1e-3


def test_substitute_runs_what_it_was_given(reference: OnnxRuntimeRunner, pairs: list[compare.Pair]) -> None:
    asked = []

    class Session:
        def run(self, names: Any, feeds: Any) -> Any:
            asked.append(sorted(feeds))
            return reference.session("template").run(names, feeds)

    others = {name: reference.session(name) for name in ("update", "search")}
    runner = SubstituteRunner(reference.bundle, {"template": Session(), **others})
    image = pairs[0][0]
    runner.template(image, compare._whole(image), (0, 0, 0), (60, 50))
    assert asked == [["image"]]


def test_every_precision_is_compared_where_there_is_no_gpu(
    default_bundle: Bundle, pairs: list[compare.Pair], clip: Clip, capsys: pytest.CaptureFixture[str]
) -> None:
    found = compare_runtimes(default_bundle, pairs, clip, calibration_crops=8)
    names = [c.name for c in found if not c.name.startswith("TensorRT")]
    assert names == ["ONNX Runtime fp16", "ONNX Runtime int8", "ONNX Runtime int8, for CPUs"]
    assert found[0].loop_px[0] < 0.1, found[0]
    assert all(c.overlap > c.reference_overlap - 0.05 for c in found), found  # few crops to calibrate on
    assert all(c.response > 0 for c in found)  # or FP32 was compared with itself
    assert found[0].response < found[1].response
    if len(found) == len(names):
        assert "no fp16 engine to compare: " in capsys.readouterr().out


def test_only_fp32_bundles_are_verified(
    default_bundle: Bundle, tmp_path: Path, pairs: list[compare.Pair], clip: Clip
) -> None:
    with pytest.raises(ValueError, match="is fp16; verify the FP32 bundle"):
        compare_runtimes(convert_bundle(default_bundle, "fp16", tmp_path), pairs, clip)


def test_command_prints_the_table_and_judges(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["verify", "siamcan-mobilenetv2", "--precision", "fp16", "--crops", "2", "--frames", "8"]
    assert cli.main(command) == 0
    assert "ONNX Runtime fp16" in capsys.readouterr().out
    strict = dataclasses.replace(compare.TOLERANCES["fp16"], response=0.0)
    monkeypatch.setitem(compare.TOLERANCES, "fp16", strict)
    assert cli.main(command) == 1
    assert "OUTSIDE TOLERANCE" in capsys.readouterr().out
    assert cli.main(["verify", "siamcan-mobilenetv2", "--precision", "fp8"]) == 2
    assert "fp8 is none of fp32, fp16, int8" in capsys.readouterr().err
    assert cli.main(["verify", "siamcan-mobilenetv2", "--sequence", str(tmp_path)]) == 2
    assert "--init" in capsys.readouterr().err
    assert cli.main(["verify", "siamcan-mobilenetv2", "--frames", "2", "--checkpoint", str(tmp_path / "x.ckpt")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert verify.__all__
