"""Engine files: which are taken and which refused, signatures."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from siamtrack import Bundle, engines, load_bundle
from siamtrack.bundle import Int8Graph, write_manifest
from siamtrack.engine_files import (
    EngineManifest,
    engine_folders,
    engine_key,
    read_engine_manifest,
    sign,
    write_engine_manifest,
)
from siamtrack.engines import open_engines, why_unfit
from siamtrack.gpu import EngineError, GpuInfo, RuntimeInfo
from tests.made_engines import RTX, RUNTIME, flip, key_file, put_engines, writable


@pytest.fixture
def bundle(default_bundle: Bundle, tmp_path: Path) -> Bundle:
    return writable(default_bundle, tmp_path)


# --- what is taken ----------------------------------------------------------------------------------------------------


def test_engines_that_fit_are_opened_and_read(bundle: Bundle) -> None:
    folder = put_engines(bundle)
    opened = open_engines(bundle, RUNTIME)
    assert opened.folder == folder
    assert opened.read("search") == (folder / "search.engine").read_bytes()
    assert set(opened.manifest.graphs) == {"template", "search", "update"}
    assert opened.manifest.graphs["search"].inputs == bundle.manifest.graphs["search"].inputs


def test_int8_graphs_beside_change_nothing_for_engines(bundle: Bundle) -> None:
    folder = put_engines(bundle, precision="int8")
    (bundle.path / "search.int8.onnx").write_bytes(b"for CPUs")
    source = bundle.manifest.graphs["search"].sha256
    beside = {"search": Int8Graph("search.int8.onnx", hashlib.sha256(b"for CPUs").hexdigest(), source)}
    write_manifest(bundle.path, dataclasses.replace(bundle.manifest, int8=beside))
    added = load_bundle(bundle.path)
    assert added.int8_paths
    assert open_engines(added, RUNTIME, "int8").folder == folder


def test_portable_engines_run_on_their_compute_capabilities_only(bundle: Bundle) -> None:
    put_engines(bundle, RTX)
    assert open_engines(bundle, RTX).manifest.gpu == ""
    other = dataclasses.replace(RTX, gpu=GpuInfo("NVIDIA GeForce RTX 3080", "8.6", 1))
    assert open_engines(bundle, other).manifest.compute_capabilities == ("8.6", "8.9")
    hopper = dataclasses.replace(RTX, gpu=GpuInfo("NVIDIA H200", "9.0", 1))
    with pytest.raises(EngineError, match=r"built for compute capability 8\.6, 8\.9; the NVIDIA H200 has 9\.0"):
        open_engines(bundle, hopper)


def test_each_precision_has_engines_of_its_own(bundle: Bundle) -> None:
    put_engines(bundle, precision="fp16")
    put_engines(bundle, precision="int8")
    assert open_engines(bundle, RUNTIME, "int8").manifest.precision == "int8"
    with pytest.raises(EngineError, match="precision"):
        open_engines(bundle, RUNTIME, "fp32")


def test_unfinished_builds_are_not_seen(bundle: Bundle) -> None:
    folder = put_engines(bundle)
    folder.rename(folder.with_name(f".{folder.name}.1234"))
    assert engine_folders(bundle) == []
    with pytest.raises(EngineError, match=r"no fp16 engines for tensorrt 10\.3\.0 on Orin have been built"):
        open_engines(bundle, RUNTIME)


@pytest.mark.parametrize(("batch", "profile"), [(1, 0), (2, 1), (4, 1), (5, 2), (8, 2)])
def test_profile_of_a_batch(bundle: Bundle, batch: int, profile: int) -> None:
    put_engines(bundle)
    assert open_engines(bundle, RUNTIME, max_batch=8).manifest.profile(batch) == profile


@pytest.mark.parametrize("batch", [0, 9])
def test_no_profile_for_a_batch(bundle: Bundle, batch: int) -> None:
    put_engines(bundle)
    with pytest.raises(ValueError, match=f"a batch of {batch} was asked for; this engine takes 1 to 8"):
        open_engines(bundle, RUNTIME).manifest.profile(batch)


@pytest.mark.parametrize(
    ("runtime", "precision", "capabilities", "key"),
    [
        (RUNTIME, "fp16", (), "tensorrt-10.3.0-orin-sm87-fp16"),
        (RTX, "fp32", (), "tensorrt-rtx-1.7.1.116-nvidia_geforce_rtx_4090-sm89-fp32"),
        (RTX, "int8", ("8.6", "12.0"), "tensorrt-rtx-1.7.1.116-any-sm86+120-int8"),
    ],
)
def test_key(runtime: RuntimeInfo, precision: str, capabilities: tuple[str, ...], key: str) -> None:
    assert engine_key(runtime, precision, capabilities) == key


def test_key_needs_a_target() -> None:
    with pytest.raises(ValueError, match="got neither"):
        engine_key(dataclasses.replace(RUNTIME, gpu=None), "fp16")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"flavour": "tensorrt-rtx"}, "foreign: it was built for TensorRT flavour tensorrt-rtx, and this is tensorrt"),
        ({"version": "10.2.0"}, "foreign: it was built for TensorRT version 10.2.0, and this is 10.3.0"),
        ({"gpu": "Xavier"}, "foreign: it was built for GPU Xavier, and this is Orin"),
        ({"compute_capabilities": ("7.2",)}, "foreign: it was built for compute capability 7.2; the Orin has 8.7"),
        ({"precision": "int8"}, "foreign: it was built for precision int8, and this is fp16"),
        ({"batches": (1, 2)}, "too small: it takes up to 2 windows at once, and 3 are wanted"),
        ({"schema_version": 2}, "foreign: schema version 2, this siamtrack reads 1"),
        ({"flavour": "onnxruntime"}, "damaged: .*unknown flavour 'onnxruntime'"),
        ({"precision": "fp8"}, "damaged: .*unknown precision 'fp8'"),
        ({"batches": ()}, "damaged: .*batches must be ascending"),
        ({"batches": (4, 1)}, "damaged: .*batches must be ascending"),
        ({"batches": (0, 1)}, "damaged: .*batches must be ascending"),
    ],
)
def test_manifest_that_does_not_fit(bundle: Bundle, change: dict[str, Any], reason: str) -> None:
    folder = put_engines(bundle)
    file = folder / "engine.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(EngineError, match=reason) as caught:
        open_engines(bundle, RUNTIME, max_batch=3)
    command = f"siamtrack-export engine '{bundle.path}' --runtime tensorrt --precision fp16 --batch 1,3"
    assert str(caught.value).endswith(f"build it: {command}")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b'{"schema_version": 1}', b'{"schema_version": 1, "x": 2}', b"[" * 100_000],
)
def test_garbage_manifest(bundle: Bundle, content: bytes) -> None:
    (put_engines(bundle) / "engine.json").write_bytes(content)
    with pytest.raises(EngineError, match=r"damaged|foreign"):
        open_engines(bundle, RUNTIME)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def lengthen(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


@pytest.mark.parametrize("harm", [truncate, flip, lengthen])
@pytest.mark.parametrize("graph", ["template", "search"])
def test_damaged_engine_is_refused(bundle: Bundle, graph: str, harm: Callable[[Path], None]) -> None:
    harm(put_engines(bundle) / f"{graph}.engine")
    with pytest.raises(EngineError, match=rf"{graph}\.engine: damaged or changed: .* build it: siamtrack-export"):
        open_engines(bundle, RUNTIME)


def test_engine_changed_after_opening_is_refused(bundle: Bundle) -> None:
    folder = put_engines(bundle)
    opened = open_engines(bundle, RUNTIME)
    flip(folder / "search.engine")
    assert opened.read("template")
    with pytest.raises(EngineError, match="damaged or changed"):
        opened.read("search")


def test_missing_engine_is_refused(bundle: Bundle) -> None:
    (put_engines(bundle) / "search.engine").unlink()
    with pytest.raises(EngineError, match=r"search\.engine: cannot be read"):
        open_engines(bundle, RUNTIME)


def test_stale_engine_is_refused(bundle: Bundle) -> None:
    def older(manifest: EngineManifest) -> EngineManifest:
        search = dataclasses.replace(manifest.graphs["search"], onnx_sha256="0" * 64)
        return dataclasses.replace(manifest, graphs={**manifest.graphs, "search": search})

    put_engines(bundle, change=older)
    with pytest.raises(EngineError, match=r"stale: search\.engine was made from a search graph with SHA-256 0000"):
        open_engines(bundle, RUNTIME)


def test_engines_of_other_graphs_are_refused(bundle: Bundle) -> None:
    put_engines(bundle, change=lambda m: dataclasses.replace(m, graphs={"search": m.graphs["search"]}))
    with pytest.raises(EngineError, match=r"it holds \['search'\], the bundle \['search', 'template', 'update'\]"):
        open_engines(bundle, RUNTIME)


@pytest.mark.parametrize("file", ["../search.engine", "/tmp/search.engine", "sub/search.engine", "..", "s\0", ""])
def test_engines_outside_the_folder_are_refused(bundle: Bundle, file: str) -> None:
    def outside(manifest: EngineManifest) -> EngineManifest:
        search = dataclasses.replace(manifest.graphs["search"], file=file)
        return dataclasses.replace(manifest, graphs={**manifest.graphs, "search": search})

    folder = put_engines(bundle, change=outside)
    (folder / "sub").mkdir()
    shutil.copy(folder / "search.engine", folder / "sub" / "search.engine")
    shutil.copy(folder / "search.engine", folder.parent / "search.engine")
    with pytest.raises(EngineError, match=r"is not a plain file inside the engine folder|Is a directory"):
        open_engines(bundle, RUNTIME)


def test_links_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    folder = put_engines(bundle)
    (folder / "search.engine").rename(tmp_path / "elsewhere.engine")
    (folder / "search.engine").symlink_to(tmp_path / "elsewhere.engine")
    with pytest.raises(EngineError, match="is not a plain file inside the engine folder"):
        open_engines(bundle, RUNTIME)
    (folder / "search.engine").unlink()
    (tmp_path / "elsewhere.engine").rename(folder / "search.engine")
    assert open_engines(bundle, RUNTIME)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="foreign: it is a link"):
        open_engines(bundle, RUNTIME)
    folder.unlink()
    (tmp_path / "elsewhere").rename(folder)
    for name in ("engine.json", "engine.json.hmac"):
        sign(folder, key_file(tmp_path / "key"))
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
        with pytest.raises(EngineError, match=f"'{name}' is not a plain file"):
            open_engines(bundle, RUNTIME, key_file=tmp_path / "key")
        (folder / name).unlink()
        (tmp_path / name).rename(folder / name)
    assert open_engines(bundle, RUNTIME, key_file=tmp_path / "key")
    folder.parent.rename(tmp_path / "elsewhere")
    folder.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="foreign: it is a link"):
        open_engines(bundle, RUNTIME)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
@pytest.mark.parametrize("name", ["engine.json", "search.engine"])
def test_pipes_are_refused(bundle: Bundle, name: str) -> None:
    """Reading one would wait for ever."""
    folder = put_engines(bundle)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(EngineError, match=f"'{name}' is not a plain file"):
        open_engines(bundle, RUNTIME)


def test_sound_engines_are_taken_beside_unsound_ones(bundle: Bundle, tmp_path: Path) -> None:
    """A folder that fits and comes first, but is damaged, stale or not signed, hides no other."""
    key = key_file(tmp_path / "key")
    sound = put_engines(bundle)
    sign(sound, key)
    other = sound.with_name("a")
    shutil.copytree(sound, other)
    (other / "engine.json.hmac").unlink()
    assert open_engines(bundle, RUNTIME).folder == other
    assert open_engines(bundle, RUNTIME, key_file=key).folder == sound
    flip(other / "search.engine")
    assert open_engines(bundle, RUNTIME).folder == sound
    flip(sound / "search.engine")
    with pytest.raises(EngineError) as caught:
        open_engines(bundle, RUNTIME)
    assert str(caught.value).count("damaged or changed") == 2


def test_what_fits_is_the_signed_manifest(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that fits is shown first; then the signed one of another GPU is put in its place."""
    folder, key = put_engines(bundle), key_file(tmp_path / "key")
    shown = read_engine_manifest(folder)
    write_engine_manifest(folder, dataclasses.replace(shown, gpu="Xavier"))
    sign(folder, key)
    monkeypatch.setattr(engines, "read_engine_manifest", lambda _: shown)
    with pytest.raises(EngineError, match="foreign: it was built for GPU Xavier"):
        open_engines(bundle, RUNTIME, key_file=key)


def test_damage_is_said_even_beside_engines_that_do_not_fit(bundle: Bundle) -> None:
    put_engines(bundle, precision="int8")
    (put_engines(bundle, precision="fp32") / "engine.json").write_text("{")
    with pytest.raises(EngineError) as caught:
        open_engines(bundle, RUNTIME)
    assert "precision int8" in str(caught.value)
    assert "damaged: not JSON" in str(caught.value)


def test_no_gpu_is_said_first(bundle: Bundle) -> None:
    put_engines(bundle)
    with pytest.raises(EngineError, match="no NVIDIA GPU was found"):
        open_engines(bundle, dataclasses.replace(RUNTIME, gpu=None), build="auto")


def test_wrong_options_are_refused(bundle: Bundle) -> None:
    with pytest.raises(ValueError, match="build must be one of never, auto, got 'yes'"):
        open_engines(bundle, RUNTIME, build="yes")
    with pytest.raises(ValueError, match="precision must be one of fp32, fp16, int8, got 'half'"):
        open_engines(bundle, RUNTIME, precision="half")


def test_why_unfit_says_nothing_of_what_fits(bundle: Bundle) -> None:
    put_engines(bundle)
    manifest = open_engines(bundle, RUNTIME).manifest
    assert why_unfit(manifest, RUNTIME, "fp16", 8) == ""
    assert why_unfit(manifest, RUNTIME, "fp16", 9)


# --- signatures -------------------------------------------------------------------------------------------------------


def test_signed_engines_are_taken_with_the_key_only(bundle: Bundle, tmp_path: Path) -> None:
    folder = put_engines(bundle)
    key, other = key_file(tmp_path / "key"), key_file(tmp_path / "other", b"fedcba9876543210")
    with pytest.raises(EngineError, match="unsigned, and only engines signed with"):
        open_engines(bundle, RUNTIME, key_file=key)
    sign(folder, key)
    assert open_engines(bundle, RUNTIME, key_file=key).folder == folder
    assert open_engines(bundle, RUNTIME)  # who has no key does not look
    with pytest.raises(EngineError, match=r"was changed, or signed with another key .*--sign-key"):
        open_engines(bundle, RUNTIME, key_file=other)


def test_signature_covers_manifest_and_engines(bundle: Bundle, tmp_path: Path) -> None:
    folder, key = put_engines(bundle), key_file(tmp_path / "key")
    sign(folder, key)
    # Somebody puts in an engine of theirs, with a manifest that fits it.
    (folder / "search.engine").write_bytes(b"hostile")
    file = folder / "engine.json"
    content = json.loads(file.read_text())
    content["graphs"]["search"]["sha256"] = hashlib.sha256(b"hostile").hexdigest()
    file.write_text(json.dumps(content))
    assert open_engines(bundle, RUNTIME).read("search") == b"hostile"
    with pytest.raises(EngineError, match=r"engine\.json was changed, or signed with another key"):
        open_engines(bundle, RUNTIME, key_file=key)


def test_unusable_keys_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    folder = put_engines(bundle)
    with pytest.raises(EngineError, match=r"has at least 16 bytes, this one 15; make one: head -c 32"):
        sign(folder, key_file(tmp_path / "short", b"x" * 15))
    with pytest.raises(EngineError, match="the signing key cannot be read"):
        open_engines(bundle, RUNTIME, key_file=tmp_path / "nothing")
