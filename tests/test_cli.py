"""The ``siamtrack`` command, through its entry point."""

from __future__ import annotations

import csv
from pathlib import Path

import cv2
import pytest

from siamtrack import SiamTracker, cli
from siamtrack.runners import EngineOptions
from siamtrack.runners.cuda.device import CudaError
from siamtrack.scene import Scene
from siamtrack.sources import ImageSource

FRAMES = 16


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder of frames, and the target's box in the first as an option."""
    folder = tmp_path_factory.mktemp("clip")
    frames = [Scene(320, 180, frames=60).render(i) for i in range(FRAMES)]
    for i, frame in enumerate(frames):
        cv2.imwrite(str(folder / f"{i}.png"), frame.image)
    return folder, "--init=" + ",".join(f"{v:.1f}" for v in frames[0].box_xywh)


def test_track_writes_what_it_was_asked_for(
    clip: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, init = clip
    paths = {o: tmp_path / n for o, n in (("--out", "b.csv"), ("--save-video", "v.mp4"), ("--sheet", "s.png"))}
    options = [part for option, path in paths.items() for part in (option, str(path))]
    assert cli.main(["track", str(folder), init, *options]) == 0
    rows = list(csv.reader(paths["--out"].open()))
    assert tuple(rows[0]) == cli.CSV_HEADER
    assert [row[0] for row in rows[1:]] == [str(i) for i in range(FRAMES)]
    assert rows[1][1:5] == [f"{float(v):.2f}" for v in init.partition("=")[2].split(",")]
    assert {row[6] for row in rows[1:]} <= {"TRACKING", "UNCERTAIN", "LOST"}
    video = cv2.VideoCapture(str(paths["--save-video"]))
    assert int(video.get(cv2.CAP_PROP_FRAME_COUNT)) == FRAMES
    assert cv2.imread(str(paths["--sheet"])) is not None
    said = capsys.readouterr().out
    assert f"{FRAMES} frames: " in said and "update: p50" in said
    assert all(f"wrote {path}" in said for path in paths.values())


def test_track_stops_after_so_many_frames(clip: tuple[Path, str], tmp_path: Path) -> None:
    folder, init = clip
    assert cli.main(["track", str(folder), init, "--frames", "5", "--out", str(tmp_path / "b.csv")]) == 0
    assert len((tmp_path / "b.csv").read_text().splitlines()) == 1 + 5


def test_ctrl_c_ends_a_track_with_its_results(
    clip: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = ImageSource.__iter__

    def interrupted(self: ImageSource):  # type: ignore[no-untyped-def]
        for index, frame in original(self):
            if index == 6:
                raise KeyboardInterrupt
            yield index, frame

    monkeypatch.setattr(ImageSource, "__iter__", interrupted)
    folder, init = clip
    sheet = tmp_path / "s.png"
    assert cli.main(["track", str(folder), init, "--sheet", str(sheet)]) == 130
    assert sheet.exists() and "6 frames: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["track", "no such file", "--init", "1,2,3,4"], "no such file or folder"),
        (["track", "CLIP"], "which target?"),
        (["track", "CLIP", "--init", "900,900,5,5"], "outside the 320x180 image"),
        (["track", "CLIP", "--init", "10,10,nan,5"], "must be finite"),
        (["track", "CLIP", "--init", "1,2,30,40", "--model", "nobody"], "not a shipped model"),
        (["track", "CLIP", "--init", "1,2,30,40", "--save-video", "v.avi"], "ends in .mp4"),
        (["track", "CLIP", "--init", "1,2,30,40", "--sheet", "sheet.nothing"], "cannot write sheet.nothing"),
    ],
)
def test_unusable_input_is_told(
    clip: tuple[Path, str],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(clip[0]) if a == "CLIP" else a for a in arguments]) == 2
    said = capsys.readouterr().err
    assert "siamtrack: error: " in said and message in said


@pytest.mark.parametrize("init", ["1,2,3", "1,2,3,x", ""])
def test_a_box_is_four_numbers(init: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["track", "x", "--init", init])
    assert "expected four numbers X,Y,W,H" in capsys.readouterr().err


def test_demo_leaves_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", "--out", str(tmp_path / "d"), "--frames", "12", "--size", "320x180"]) == 0
    assert {p.name for p in (tmp_path / "d").iterdir()} >= {"demo.mp4", "demo.png", "demo.csv", "demo.txt"}
    assert "mean IoU" in capsys.readouterr().out


def test_bench_models_and_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--iterations", "3", "--size", "320x180"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("crop", "network", "total", "p99", "resident memory"))
    assert cli.main(["models"]) == 0
    assert "siamcan-mobilenetv2" in capsys.readouterr().out
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("onnxruntime", "opencv", "ros2", "tensorrt", "models"))


@pytest.mark.parametrize(
    ("arguments", "backend", "engines", "precision"),
    [
        ([], "onnxruntime", EngineOptions(), "auto"),
        (
            ["--backend", "auto", "--precision", "int8", "--build-engines", "auto", "--engine-key", "k"],
            "auto",
            EngineOptions(key_file=Path("k"), build="auto"),
            "int8",
        ),
    ],
)
@pytest.mark.parametrize("command", [["track", "CLIP", "INIT"], ["demo"], ["bench"]])
def test_a_gpu_that_cannot_be_used_is_told_in_a_line(
    clip: tuple[Path, str],
    command: list[str],
    arguments: list[str],
    backend: str,
    engines: EngineOptions,
    precision: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []

    def refuse(*options: object) -> SiamTracker:
        asked.extend(options)
        raise CudaError("no CUDA driver")

    monkeypatch.setattr(SiamTracker, "from_pretrained", refuse)
    command = [{"CLIP": str(clip[0]), "INIT": clip[1]}.get(part, part) for part in command]
    assert cli.main([*command, *arguments]) == 2
    assert capsys.readouterr().err == "siamtrack: error: no CUDA driver\n"
    assert asked == [None, backend, 0, engines, precision]


def test_bench_names_the_backend_that_ran(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("siamtrack.gpu.gpu_info", lambda device=0: None)
    assert cli.main(["bench", "--backend", "auto", "--iterations", "2", "--size", "320x180"]) == 0
    assert capsys.readouterr().out.startswith("siamcan-mobilenetv2, onnxruntime, 320x180, ")
