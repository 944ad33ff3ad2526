"""Engines that are built when they are missing, or not."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from siamtrack import Bundle, engines
from siamtrack.engines import build_arguments, open_engines
from siamtrack.gpu import EngineError
from tests.made_engines import RUNTIME, flip, put_engines, writable


@pytest.fixture
def bundle(default_bundle: Bundle, tmp_path: Path) -> Bundle:
    return writable(default_bundle, tmp_path)


def test_build_arguments_name_every_batch(bundle: Bundle, tmp_path: Path) -> None:
    start = ["engine", str(bundle.path), "--runtime", "tensorrt", "--precision", "int8", "--batch"]
    assert build_arguments(bundle, "tensorrt", "int8") == [*start, "1,4,8"]
    assert build_arguments(bundle, "tensorrt", "int8", max_batch=6) == [*start, "1,4,6"]
    assert build_arguments(bundle, "tensorrt", "int8", max_batch=16) == [*start, "1,4,8,16"]
    key = tmp_path / "key"
    assert build_arguments(bundle, "tensorrt", "int8", key, 4) == [*start, "1,4", "--sign-key", str(key)]


def child(monkeypatch: pytest.MonkeyPatch, run: Callable[[list[str]], int]) -> list[list[str]]:
    """In place of the child process that builds; returns the list of its commands."""
    commands: list[list[str]] = []

    def fake(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return types.SimpleNamespace(returncode=run(command))

    monkeypatch.setattr(engines.subprocess, "run", fake)
    return commands


@pytest.mark.parametrize("before", ["nothing", "damaged", "stale version"])
def test_auto_builds_what_is_missing_or_unfit(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, before: str
) -> None:
    if before == "damaged":
        flip(put_engines(bundle) / "search.engine")
    if before == "stale version":
        put_engines(bundle, dataclasses.replace(RUNTIME, version="10.2.0"))

    def build(_: list[str]) -> int:
        if before == "damaged":
            shutil.rmtree(bundle.path / "engines")
        put_engines(bundle)
        return 0

    commands = child(monkeypatch, build)
    assert open_engines(bundle, RUNTIME, build="auto").manifest.version == "10.3.0"
    assert commands == [[sys.executable, "-m", "model_export.cli", *build_arguments(bundle, "tensorrt", "fp16")]]
    assert "building it now" in caplog.text
    assert open_engines(bundle, RUNTIME, build="auto")  # and not again
    assert len(commands) == 1


def test_never_builds_nothing(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = child(monkeypatch, lambda _: 0)
    with pytest.raises(EngineError):
        open_engines(bundle, RUNTIME)
    assert commands == []


def test_failed_build_is_said(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, lambda _: 2)
    with pytest.raises(EngineError, match="ended with status 2; what went wrong is printed above"):
        open_engines(bundle, RUNTIME, build="auto")


def test_build_that_builds_nothing_is_said(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    child(monkeypatch, lambda _: 0)
    with pytest.raises(EngineError, match=r"ran without an error, and yet: .* have been built"):
        open_engines(bundle, RUNTIME, build="auto")
