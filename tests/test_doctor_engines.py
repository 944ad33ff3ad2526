"""What `siamtrack doctor` says of TensorRT and of engines."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from siamtrack import Bundle, doctor, load_bundle
from siamtrack.engine_files import (
    engine_key,
)
from siamtrack.gpu import FLAVOURS, EngineError, RuntimeInfo
from tests.made_engines import RTX, RUNTIME, flip, put_engines, writable


@pytest.fixture
def bundle(default_bundle: Bundle, tmp_path: Path) -> Bundle:
    return writable(default_bundle, tmp_path)


@pytest.fixture
def shipped(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bundle:
    """The bundle as the only shipped model."""
    models = tmp_path / "models"
    models.mkdir()
    bundle.path.rename(models / "siamcan-mobilenetv2")
    monkeypatch.setattr("siamtrack.bundle.MODELS_DIR", models)
    return load_bundle("siamcan-mobilenetv2")


def with_runtimes(monkeypatch: pytest.MonkeyPatch, *here: RuntimeInfo) -> None:
    """These flavours are installed, and no other."""
    found = {runtime.flavour: runtime for runtime in here}

    def answer(flavour: str) -> RuntimeInfo:
        if flavour not in found:
            raise EngineError(f"{flavour} is not installed")
        return found[flavour]

    modules = {FLAVOURS[flavour] for flavour in found}
    real = doctor.importlib.util.find_spec
    monkeypatch.setattr(
        doctor.importlib.util,
        "find_spec",
        lambda name: (True if name in modules else None) if name in FLAVOURS.values() else real(name),
    )
    monkeypatch.setattr(doctor, "runtime_info", answer)


def findings(*names: str) -> list[tuple[str, bool | None, str, str]]:
    return [(f.name, f.ok, f.detail, f.remedy) for f in doctor.examine() if f.name in names]


def test_doctor_shows_every_flavour_and_its_gpu(shipped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with_runtimes(monkeypatch, RUNTIME, dataclasses.replace(RTX, gpu=None))
    assert findings("tensorrt", "tensorrt-rtx") == [
        ("tensorrt", True, "10.3.0, Orin, compute capability 8.7", ""),
        ("tensorrt-rtx", True, "1.7.1.116, no GPU to run on found", ""),
    ]


def test_doctor_says_how_to_install_tensorrt(shipped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with_runtimes(monkeypatch)
    ((_, ok, detail, remedy),) = findings("tensorrt", "tensorrt-rtx")
    assert (ok, detail) == (None, "not installed")
    assert "siamtrack[tensorrt-rtx]" in remedy


def test_doctor_judges_every_engine(shipped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with_runtimes(monkeypatch, RUNTIME)
    usable = put_engines(shipped)
    foreign = put_engines(shipped, dataclasses.replace(RUNTIME, version="10.2.0"), "int8")
    flip(put_engines(shipped, RUNTIME, "fp32") / "search.engine")
    absent = put_engines(shipped, RTX)
    found = {detail.split(": ")[1]: (ok, detail, remedy) for _, ok, detail, remedy in findings("engine") if detail}
    assert len(found) == 4
    assert found[usable.name][:2] == (True, f"siamcan-mobilenetv2: {usable.name}: usable, up to 8 windows")
    ok, detail, remedy = found[foreign.name]
    assert ok is None
    assert "built for TensorRT version 10.2.0" in detail
    assert remedy == "siamtrack-export engine siamcan-mobilenetv2 --precision int8"
    ok, detail, remedy = found[engine_key(RUNTIME, "fp32")]
    assert ok is None
    assert "damaged or changed" in detail
    assert remedy.startswith("siamtrack-export engine siamcan-mobilenetv2, or remove")
    assert "tensorrt-rtx is not installed" in found[absent.name][1]


def test_doctor_without_a_gpu_says_so(shipped: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with_runtimes(monkeypatch, dataclasses.replace(RTX, gpu=None))
    put_engines(shipped, RTX)
    ((_, ok, detail, _),) = findings("engine")
    assert ok is None
    assert detail.endswith("sound, but there is no GPU to run it on")
