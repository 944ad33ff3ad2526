"""Engine files: which are taken and which refused, signatures, the trial in a child process, building on demand."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from siamtrack import Bundle, doctor, engines, load_bundle
from siamtrack.bundle import Int8Graph, write_manifest
from siamtrack.engine_files import (
    EngineGraph,
    EngineManifest,
    EngineSet,
    engine_folders,
    engine_key,
    read_engine_manifest,
    sign,
    write_engine_manifest,
)
from siamtrack.engines import build_arguments, open_engines, trial_load, why_unfit
from siamtrack.gpu import FLAVOURS, EngineError, GpuInfo, RuntimeInfo, gpu_info, load_tensorrt, runtime_info

ORIN = GpuInfo("Orin", "8.7", 8 << 30)
RUNTIME = RuntimeInfo("tensorrt", "10.3.0", ORIN)
ADA = GpuInfo("NVIDIA GeForce RTX 4090", "8.9", 24 << 30)
RTX = RuntimeInfo("tensorrt-rtx", "1.7.1.116", ADA)
Change = Callable[[EngineManifest], EngineManifest]


@pytest.fixture
def bundle(default_bundle: Bundle, tmp_path: Path) -> Bundle:
    """The default bundle where engines may be written."""
    folder = tmp_path / "a bundle"  # with a space, so that commands must be quoted
    folder.mkdir()
    for file in default_bundle.path.glob("*"):
        if file.is_file():
            shutil.copy(file, folder)
    return load_bundle(folder)


def put_engines(
    bundle: Bundle, runtime: RuntimeInfo = RUNTIME, precision: str = "fp16", change: Change = lambda manifest: manifest
) -> Path:
    """A folder of engines as the builder leaves it, made of arbitrary bytes; `change` alters the manifest."""
    assert runtime.gpu is not None
    portable = runtime.flavour == "tensorrt-rtx"
    capabilities = ("8.6", "8.9") if portable else ()
    folder = bundle.path / "engines" / engine_key(runtime, precision, capabilities)
    folder.mkdir(parents=True)
    graphs = {}
    for name, spec in bundle.manifest.graphs.items():
        content = f"{name} engine".encode() * 100
        (folder / f"{name}.engine").write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        graphs[name] = EngineGraph(f"{name}.engine", digest, spec.sha256, spec.inputs, spec.outputs)
    manifest = EngineManifest(
        schema_version=1,
        model=bundle.manifest.model,
        flavour=runtime.flavour,
        version=runtime.version,
        gpu="" if portable else runtime.gpu.name,
        compute_capabilities=capabilities or (runtime.gpu.compute_capability,),
        precision=precision,
        batches=(1, 4, 8),
        graphs=graphs,
    )
    write_engine_manifest(folder, change(manifest))
    return folder


def key_file(path: Path, content: bytes = b"0123456789abcdef") -> Path:
    path.write_bytes(content)
    return path


# --- what is taken -------------------------------------------------------------------------------------------------


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


# --- what is refused -----------------------------------------------------------------------------------------------


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


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


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


# --- signatures ----------------------------------------------------------------------------------------------------


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


# --- building on demand --------------------------------------------------------------------------------------------


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


# --- TensorRT, and the trial in a child process ---------------------------------------------------------------------

FAKE = """
import os
from pathlib import Path
__version__ = "10.3.0"
class Logger:
    WARNING = 1
    def __init__(self, level): ...
class ExecutionContextAllocationStrategy:
    STATIC, USER_MANAGED = 0, 2
class Engine:
    def __init__(self, content): self.content = content
    def create_execution_context(self, strategy=ExecutionContextAllocationStrategy.STATIC):
        # Engines that insist on memory from outside, as ours for TensorRT-RTX, have no context that brings its own.
        return None if b"no context" in self.content or strategy != 2 else self
class Runtime:
    def __init__(self, logger): ...
    def deserialize_cuda_engine(self, content):
        with open(Path(__file__).with_name("loaded"), "ab") as file: file.write(content[:8] + b";")
        if b"crash" in content: os.abort()
        if b"hang" in content:
            import time; time.sleep(60)
        return None if b"no engine" in content else Engine(content)
"""


@pytest.fixture
def fake_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `tensorrt` for child processes; the folder in which it notes what it was given."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "tensorrt.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
    return folder


def opened_with(bundle: Bundle, content: bytes) -> EngineSet:
    """Engines of which the search engine is `content`."""

    def swap(manifest: EngineManifest) -> EngineManifest:
        search = dataclasses.replace(manifest.graphs["search"], sha256=hashlib.sha256(content).hexdigest())
        return dataclasses.replace(manifest, graphs={**manifest.graphs, "search": search})

    folder = put_engines(bundle, change=swap)
    (folder / "search.engine").write_bytes(content)
    return open_engines(bundle, RUNTIME)


def test_trial_loads_every_engine(bundle: Bundle, fake_tensorrt: Path) -> None:
    trial_load(opened_with(bundle, b"a sound engine"))
    assert (fake_tensorrt / "loaded").read_bytes() == b"template;a sound ;update e;"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"crash", "the process that tried was ended by SIGABRT"),
        (b"no engine", r"TensorRT 10\.3\.0 does not deserialise it"),
        (b"no context", "no execution context, perhaps for want of GPU memory"),
    ],
)
def test_trial_survives_what_a_bad_engine_does(bundle: Bundle, fake_tensorrt: Path, content: bytes, said: str) -> None:
    with pytest.raises(EngineError, match=f"the engines do not load here, build them again: .*{said}"):
        trial_load(opened_with(bundle, content))


def test_trial_ends(bundle: Bundle, fake_tensorrt: Path) -> None:
    with pytest.raises(EngineError, match="did not load within 2 s"):
        trial_load(opened_with(bundle, b"hang"), timeout_s=2)


def test_trial_gives_tensorrt_nothing_that_changed(bundle: Bundle, fake_tensorrt: Path) -> None:
    opened = opened_with(bundle, b"a sound engine")
    (opened.folder / "search.engine").write_bytes(b"crash")
    with pytest.raises(EngineError, match="changed since it was checked"):
        trial_load(opened)
    assert (fake_tensorrt / "loaded").read_bytes() == b"template;"


def test_trial_starts_in_this_installation(
    bundle: Bundle, fake_tensorrt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder of the user's that happens to be the current one, with a module of that name.
    (tmp_path / "siamtrack").mkdir()
    (tmp_path / "siamtrack" / "trial.py").write_text("raise SystemExit('hostile')")
    monkeypatch.chdir(tmp_path)
    trial_load(opened_with(bundle, b"a sound engine"))


def test_runtime_info_takes_the_first_flavour(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, version in (("tensorrt", "10.3.0"), ("tensorrt_rtx", "1.7.1.116")):
        module = types.ModuleType(name)
        module.__version__ = version  # type: ignore[attr-defined]
        module.__spec__ = types.SimpleNamespace(name=name)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, module)
    found = runtime_info()
    assert (found.flavour, found.version) == ("tensorrt", "10.3.0")
    found = runtime_info("tensorrt-rtx")
    assert (found.flavour, found.version) == ("tensorrt-rtx", "1.7.1.116")


def test_missing_tensorrt_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"tensorrt nor tensorrt-rtx is not installed.*siamtrack\[tensorrt\]"):
        runtime_info()
    with pytest.raises(EngineError, match="unknown TensorRT flavour 'tensorrt-lite'; known: auto, tensorrt, "):
        runtime_info("tensorrt-lite")


def test_broken_tensorrt_is_said(fake_tensorrt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake_tensorrt / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: no such file')")
    monkeypatch.syspath_prepend(str(fake_tensorrt))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    with pytest.raises(EngineError, match=r"tensorrt does not import: libnvinfer\.so\.10: no such file; install"):
        load_tensorrt("tensorrt")


class FakeDriver(types.ModuleType):
    """cuda-python's driver API over one made-up GPU; each call gives a status and a value."""

    class CUdevice_attribute:
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76

    def __init__(self, status: int = 0) -> None:
        super().__init__("cuda.bindings.driver")
        self.status = status

    def cuInit(self, flags: int) -> tuple[int]:
        return (self.status,)

    def cuDeviceGet(self, number: int) -> tuple[int, int]:
        return 0, number

    def cuDeviceGetName(self, length: int, device: int) -> tuple[int, bytes]:
        return 0, b"Orin" + b"\0" * (length - 4)

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[int, int]:
        return 0, {75: 8, 76: 7}[attribute]

    def cuDeviceTotalMem(self, device: int) -> tuple[int, int]:
        return 0, 8 << 30


def with_driver(monkeypatch: pytest.MonkeyPatch, driver: types.ModuleType | None) -> None:
    bindings = types.ModuleType("cuda.bindings")
    if driver is not None:
        bindings.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)


def test_gpu_is_asked_of_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, FakeDriver())
    assert gpu_info() == ORIN


def test_no_gpu_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, FakeDriver(status=100))  # CUDA_ERROR_NO_DEVICE
    assert gpu_info() is None
    with_driver(monkeypatch, None)
    assert gpu_info() is None


# --- siamtrack doctor ----------------------------------------------------------------------------------------------


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
