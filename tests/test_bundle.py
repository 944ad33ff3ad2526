from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from siamtrack.bundle import (
    DEFAULT_MODEL,
    MANIFEST_NAME,
    PRECISIONS,
    SEARCH_OUTPUTS,
    Bundle,
    BundleError,
    CropSpec,
    GraphSpec,
    GridSpec,
    Int8Graph,
    Manifest,
    ScoreSpec,
    TensorSpec,
    TrackingSpec,
    UpdateSpec,
    load_bundle,
    sha256,
    shipped_models,
    write_manifest,
)
from siamtrack.plain import from_plain, to_plain
from siamtrack.state import Thresholds


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small complete bundle; its graphs are never opened here, only hashed."""
    path = tmp_path / "bundle"
    path.mkdir()
    kernel = TensorSpec("kernel", "float32", ("N", 49, 96))
    size, tuning = TensorSpec("prev_size", "float32", ("N", 2)), TensorSpec("tuning", "float32", (3,))
    tensors = {
        "template": ((TensorSpec("image", "uint8", (1, 127, 127, 3)),), (kernel,)),
        "search": (
            (TensorSpec("image", "uint8", ("N", 255, 255, 3)), kernel, size, tuning),
            tuple(TensorSpec(name, "float32", ("N",)) for name in SEARCH_OUTPUTS),
        ),
    }
    graphs = {}
    for name, (inputs, outputs) in tensors.items():
        (path / f"{name}.onnx").write_bytes(f"graph of {name}".encode())
        graphs[name] = GraphSpec(f"{name}.onnx", sha256(path / f"{name}.onnx"), inputs, outputs)
    score = ScoreSpec("probability", Thresholds(0.5, 0.4, 0.2, 10, 0.6))
    write_manifest(path, Manifest(1, "toy", graphs, CropSpec(127, 255), GridSpec(16, 16, 0.5), score, "Apache-2.0"))
    return path


def adaptive(folder: Path) -> None:
    """Turn the bundle into one of a model that renews its template."""
    (folder / "update.onnx").write_bytes(b"graph of update")
    shape = [1, 96, 7, 7]

    def change(m: dict[str, Any]) -> None:
        def tensor(name: str) -> dict[str, Any]:
            return {"name": name, "dtype": "float32", "shape": shape}

        m["graphs"]["template"]["outputs"] = [tensor("feature")]
        m["graphs"]["update"] = {
            "file": "update.onnx",
            "sha256": sha256(folder / "update.onnx"),
            "inputs": [tensor(name) for name in ("first", "history", "current")],
            "outputs": [tensor("fused"), tensor("kernel")],
        }
        m["update"] = {"min_score": 0.59}

    edit(folder, change)


def add_int8(folder: Path, name: str = "search", **changes: str) -> None:
    """Put an INT8 graph beside the FP32 graph of its name; `changes` are of its entry."""
    (folder / f"{name}.int8.onnx").write_bytes(f"INT8 graph of {name}".encode())
    entry = {"file": f"{name}.int8.onnx", "sha256": sha256(folder / f"{name}.int8.onnx")}

    def change(m: dict[str, Any]) -> None:
        source = m["graphs"].get(name, {}).get("sha256", "")
        m.setdefault("int8", {})[name] = {**entry, "source_sha256": source, **changes}

    edit(folder, change)


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / MANIFEST_NAME
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_default_bundle_by_no_name_by_name_and_by_path(default_bundle: Bundle) -> None:
    assert default_bundle.path.name == DEFAULT_MODEL
    assert DEFAULT_MODEL in shipped_models()
    assert load_bundle(DEFAULT_MODEL) == default_bundle
    assert load_bundle(default_bundle.path) == default_bundle
    assert load_bundle(str(default_bundle.path)) == default_bundle


def test_default_bundle_is_complete(default_bundle: Bundle) -> None:
    assert default_bundle.graph_path("search").is_file()
    assert default_bundle.size_bytes() == sum(len(file.read_bytes()) for file in default_bundle.path.glob("*.onnx"))


def test_write_and_load_is_a_round_trip(folder: Path) -> None:
    manifest = load_bundle(folder).manifest
    full = dataclasses.replace(
        manifest,
        tracking=TrackingSpec(0.1, 0.2, 0.3, 0.4, 0.5, 5.0, 3),
        precision="fp16",
        provenance={"git_commit": "abc", "data": "naïve ☂"},
        accuracy={"auc": 0.625},
    )
    write_manifest(folder, full)
    assert load_bundle(folder).manifest == full


def test_a_manifest_may_leave_out_what_has_a_default(folder: Path) -> None:
    edit(folder, lambda m: [m.pop(name) for name in ("tracking", "precision", "int8", "provenance", "accuracy")])
    manifest = load_bundle(folder).manifest
    assert manifest.tracking == TrackingSpec()
    assert (manifest.precision, manifest.int8) == ("fp32", {})


def test_a_copied_folder_is_a_bundle_and_needs_no_name(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "any name"))
    assert load_bundle(copy).graph_path("template") == copy / "template.onnx"


@pytest.mark.parametrize("name", ["no-such-model", Path("no/such/folder")])
def test_unknown_name_lists_what_is_shipped(name: str | Path) -> None:
    with pytest.raises(BundleError, match=rf"{name}: .*no such folder.*shipped: .*{DEFAULT_MODEL}"):
        load_bundle(name)


def test_folder_without_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no manifest\.json in it"):
        load_bundle(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{'schema_version': 1}", b'{"schema_version": 1', b"\xff\xfe\x00"])
def test_broken_json(folder: Path, content: bytes) -> None:
    (folder / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json: not JSON"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("content", "came"), [({"schema_version": 2}, "2"), ({"schema_version": "1"}, "'1'"), ({}, "None"), ([1], "None")]
)
def test_other_schema_version(folder: Path, content: object, came: str) -> None:
    (folder / MANIFEST_NAME).write_text(json.dumps(content))
    with pytest.raises(BundleError, match=rf"schema version is {came}, this siamtrack reads 1; export"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(colour="red"), r"manifest\.json: unknown field colour; known: .*licence"),
        (lambda m: m["crop"].update(colour="red"), r"manifest\.json\.crop: unknown field colour"),
        (lambda m: m.pop("licence"), r"manifest\.json: missing field licence"),
        (lambda m: m["grid"].pop("stride"), r"manifest\.json\.grid: missing field stride"),
        (lambda m: m["grid"].update(stride="16"), r"\.grid\.stride: expected a whole number, got '16'"),
        (lambda m: m["grid"].update(origin="left"), r"\.grid\.origin: expected a number, got 'left'"),
        (lambda m: m.update(score=[]), r"\.score: expected a mapping, got list"),
        (lambda m: m["graphs"]["search"].update(file=3), r"\.graphs\.search\.file: expected text, got 3"),
        (lambda m: m["graphs"]["search"]["inputs"][0].pop("dtype"), r"\.search\.inputs\[0\]: missing field dtype"),
        (lambda m: m["score"]["thresholds"].update(uncertain_below=0.9), r"\.thresholds: .*got 0\.2, 0\.9, 0\.5"),
        (lambda m: m["tracking"].update(window_influence=1.5), r"\.tracking: window_influence .*got 1\.5"),
        (lambda m: m["tracking"].update(penalty_k=-1), r"\.tracking: penalty_k .*got -1"),
        (lambda m: m["tracking"].update(min_size_px=0), r"\.tracking: min_size_px .*got 0"),
        (lambda m: m["tracking"].update(second_look=2.5), r"\.tracking: second_look .*got 2\.5"),
        (lambda m: m["tracking"].update(second_look=0.5), r"\.tracking: second_look .*0 or in \[1, 2\], got 0\.5"),
        (lambda m: m["tracking"].update(lost_windows=0), r"\.tracking: lost_windows .*got 0"),
        (lambda m: m["graphs"].pop("search"), "no search graph; export the model again"),
        (lambda m: m["graphs"].pop("template"), "no template graph; export the model again"),
        (lambda m: m["graphs"]["search"].update(file="../x.onnx"), r"'\.\./x\.onnx' is not a plain file name"),
        (lambda m: m["graphs"]["search"].update(file="/etc/passwd"), r"'/etc/passwd' is not a plain file name"),
        (lambda m: m["graphs"]["search"].update(file=".."), r"bundle: \.\. is missing"),
        (lambda m: m["graphs"]["search"].update(file="x.onnx"), r"x\.onnx is missing; copy the whole bundle"),
    ],
)
def test_refused_manifest(folder: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit(folder, change)
    # What the path leads to exists, so that it is the name that is refused and not an absent file.
    shutil.copy(folder / "search.onnx", folder.parent / "x.onnx")
    with pytest.raises(BundleError, match=message) as refusal:
        load_bundle(folder)
    assert str(folder) in str(refusal.value)  # among several bundles the user must learn which


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["crop"].update(template_px=64), "template inputs are"),
        (lambda m: m["crop"].update(search_px=287), "search image are"),
        (lambda m: m["graphs"]["template"]["outputs"][0].update(name="z"), "search inputs are"),
        (lambda m: m["graphs"]["search"]["inputs"].reverse(), "search inputs are"),
        (lambda m: m["graphs"]["search"]["outputs"].pop(), "search outputs are"),
        (lambda m: m["crop"].update(search_px=0), "crop sides must be at least 1 px"),
        (lambda m: m["crop"].update(fill="black"), "unknown fill 'black'"),
    ],
)
def test_graphs_that_break_the_contract(folder: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit(folder, change)
    with pytest.raises(BundleError, match=message):
        load_bundle(folder)


def test_update_graph_chains_template_and_search(folder: Path) -> None:
    adaptive(folder)
    manifest = load_bundle(folder).manifest
    assert manifest.update == UpdateSpec(min_score=0.59, interval=1)
    assert manifest.template_tensors == ("kernel",)  # search need not take the fused feature
    edit(folder, lambda m: m["graphs"]["search"]["inputs"].insert(1, m["graphs"]["update"]["outputs"][0]))
    assert load_bundle(folder).manifest.template_tensors == ("fused", "kernel")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.pop("update"), "there is an update graph without update parameters; export"),
        (lambda m: m["graphs"].pop("update"), "there is no update graph for the update parameters; export"),
        (
            lambda m: m["graphs"]["template"]["outputs"][0].update(name="z"),
            r"outputs before an update.*\('z',\)",
        ),
        (lambda m: m["graphs"]["template"]["outputs"].clear(), r"template outputs before an update.*are \(\)"),
        (lambda m: m["graphs"]["update"]["inputs"].reverse(), "update inputs are"),
        (lambda m: m["graphs"]["update"]["inputs"][1].update(shape=[1, 96, 8, 8]), "update inputs are .*8, 8"),
        (lambda m: m["graphs"]["update"]["inputs"][1].update(dtype="float16"), "update inputs are .*float16"),
        (lambda m: m["graphs"]["update"]["outputs"][0].update(shape=[1, 49, 96]), "first update output are .*49, 96"),
        (lambda m: m["graphs"]["update"]["outputs"][1].update(name="k"), "search inputs are"),
        (lambda m: m["update"].update(min_score=1.18), r"\.update: min_score must be in \[0, 1\], got 1\.18"),
        (lambda m: m["update"].update(interval=0), r"\.update: interval must be at least 1 frame, got 0"),
        (lambda m: m["update"].update(every=3), r"\.update: unknown field every"),
        (lambda m: m["update"].clear(), r"\.update: missing field min_score"),
    ],
)
def test_update_graphs_that_break_the_contract(
    folder: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    adaptive(folder)
    edit(folder, change)
    with pytest.raises(BundleError, match=message):
        load_bundle(folder)


def test_missing_graph_file(folder: Path) -> None:
    (folder / "search.onnx").unlink()
    with pytest.raises(BundleError, match=r"search\.onnx is missing; copy the whole bundle folder"):
        load_bundle(folder)


@pytest.mark.parametrize("place", [0, 3, -1])
def test_one_flipped_bit_in_a_graph(folder: Path, place: int) -> None:
    content = bytearray((folder / "template.onnx").read_bytes())
    content[place] ^= 1
    (folder / "template.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"template\.onnx is damaged or was changed: SHA-256 is [0-9a-f]{12}\.\.\."):
        load_bundle(folder)


def test_a_graph_beyond_the_two_is_verified_too(folder: Path) -> None:
    adaptive(folder)
    load_bundle(folder)
    (folder / "update.onnx").write_bytes(b"another graph")
    with pytest.raises(BundleError, match=r"update\.onnx is damaged"):
        load_bundle(folder)


# ------------------------------------------------------------------------------------------------------- INT8 graphs


def test_int8_graphs_lie_beside_those_they_were_made_from(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = load_bundle(folder)
    assert (plain.manifest.int8, plain.int8_paths) == ({}, {})
    add_int8(folder)
    bundle = load_bundle(folder)
    assert bundle.int8_paths == {"search": folder / "search.int8.onnx"}
    assert bundle.manifest.int8["search"].source_sha256 == bundle.manifest.graphs["search"].sha256
    assert bundle.graph_path("search") == folder / "search.onnx"  # what everything but the CPU runner takes
    assert bundle.size_bytes() == plain.size_bytes() + len("INT8 graph of search")
    write_manifest(folder, bundle.manifest)
    assert load_bundle(folder) == bundle
    add_int8(folder, "template")
    assert list(load_bundle(folder).int8_paths) == ["search", "template"]
    assert caplog.messages == []


@pytest.mark.parametrize("content", [b"another graph", None])
def test_a_stale_int8_graph_is_passed_over_with_a_warning(
    folder: Path, caplog: pytest.LogCaptureFixture, content: bytes | None
) -> None:
    add_int8(folder)
    add_int8(folder, "template")
    (folder / "search.onnx").write_bytes(b"exported anew")
    edit(folder, lambda m: m["graphs"]["search"].update(sha256=sha256(folder / "search.onnx")))
    if content is None:
        (folder / "search.int8.onnx").unlink()
    else:
        (folder / "search.int8.onnx").write_bytes(content)  # nothing is asked of what is not used
    bundle = load_bundle(folder)
    assert list(bundle.int8_paths) == ["template"]
    assert bundle.size_bytes() == sum((folder / f"{n}.onnx").stat().st_size for n in ("search", "template")) + len(
        "INT8 graph of template"
    )
    (said,) = caplog.messages
    assert "the INT8 search graph was made from another search graph than is here now, and is not used" in said
    assert said.endswith(f"siamtrack-export precision {folder} --precision int8 --add")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: (f / "search.int8.onnx").write_bytes(b"other"), r"search\.int8\.onnx is damaged or was changed"),
        (lambda f: (f / "search.int8.onnx").unlink(), r"search\.int8\.onnx is missing"),
        (lambda f: add_int8(f, file="../x.onnx"), r"'\.\./x\.onnx' is not a plain file name"),
        (lambda f: add_int8(f, "update"), r"INT8 graphs \['search', 'update'\] beside fp32 graphs .*of its name"),
        (lambda f: edit(f, lambda m: m.update(precision="fp16")), r"INT8 graphs \['search'\] beside fp16 graphs"),
        (
            lambda f: edit(f, lambda m: m["int8"]["search"].pop("source_sha256")),
            r"\.int8\.search: missing field source",
        ),
        (lambda f: edit(f, lambda m: m.update(int8=["search"])), r"\.int8: expected a mapping"),
    ],
)
def test_refused_int8_graphs(folder: Path, break_it: Callable[[Path], Any], message: str) -> None:
    add_int8(folder)
    load_bundle(folder)
    break_it(folder)
    with pytest.raises(BundleError, match=message) as refusal:
        load_bundle(folder)
    assert str(folder) in str(refusal.value)


def test_the_command_that_makes_int8_graphs_is_for_a_shell(folder: Path) -> None:
    spaced = folder.rename(folder.with_name("my bundle"))
    assert load_bundle(spaced).int8_command == f"siamtrack-export precision '{spaced}' --precision int8 --add"


def test_a_manifest_is_replaced_as_a_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_bundle(folder)
    int8 = {"search": Int8Graph("search.int8.onnx", "0" * 64, "0" * 64)}

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="disk full"):
        patched.setattr(Path, "replace", fail)
        write_manifest(folder, dataclasses.replace(before.manifest, int8=int8))
    assert load_bundle(folder) == before
    write_manifest(folder, dataclasses.replace(before.manifest, precision=PRECISIONS[1]))
    assert load_bundle(folder).manifest.precision == "fp16"


def test_a_bundle_error_is_a_value_error() -> None:
    assert issubclass(BundleError, ValueError)  # one except clause for whatever a user typed


# ------------------------------------------------------------------------------------------------------ plain values


@dataclass(frozen=True)
class Inner:
    size: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"size must be at least 0, got {self.size}")


@dataclass(frozen=True)
class Outer:
    inner: Inner
    items: tuple[Inner, ...] = ()
    shape: tuple[int | str, ...] = ()
    table: dict[str, float] = field(default_factory=dict)
    flag: bool = False
    note: str | None = None


@pytest.mark.parametrize(
    "value",
    [
        Outer(Inner(0)),
        Outer(Inner(1, 2.5), (Inner(3), Inner(4)), ("N", 3, 127), {"a": 0.5, "b": 1.0}, True, "text"),
    ],
)
def test_plain_round_trip_through_json(value: Outer) -> None:
    assert from_plain(Outer, json.loads(json.dumps(to_plain(value))), "file") == value


def test_to_plain_gives_what_a_parser_gives() -> None:
    plain = to_plain(Outer(Inner(1), shape=("N", 3)))
    assert plain == {
        "inner": {"size": 1, "scale": 1.0}, "items": [], "shape": ["N", 3], "table": {}, "flag": False, "note": None,
    }  # fmt: skip


@pytest.mark.parametrize(("written", "read"), [(3, 3.0), ("1e-4", 1e-4), (-0.5, -0.5)])
def test_numbers_as_json_and_yaml_write_them(written: object, read: float) -> None:
    scale = from_plain(Inner, {"size": 1, "scale": written}, "file").scale
    assert scale == read and isinstance(scale, float)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "f: missing field inner"),
        ("text", "f: expected a mapping, got str"),
        ({"inner": None}, r"f\.inner: expected a mapping, got NoneType"),
        ({"inner": {"size": 1, "sise": 2}}, r"f\.inner: unknown field sise; known: scale, size"),
        ({"inner": {"size": 1.5}}, r"f\.inner\.size: expected a whole number, got 1\.5"),
        ({"inner": {"size": True}}, r"f\.inner\.size: expected a whole number, got True"),
        ({"inner": {"size": -1}}, r"f\.inner: size must be at least 0, got -1"),
        ({"inner": {"size": 1, "scale": True}}, r"f\.inner\.scale: expected a number, got True"),
        ({"inner": {"size": 1, "scale": [2]}}, r"f\.inner\.scale: expected a number, got \[2\]"),
        ({"inner": {"size": 1}, "items": [{"size": 1}, {}]}, r"f\.items\[1\]: missing field size"),
        ({"inner": {"size": 1}, "items": {"size": 1}}, r"f\.items: expected a list"),
        ({"inner": {"size": 1}, "shape": [3, 2.5]}, r"f\.shape\[1\]: expected text, got 2\.5"),
        ({"inner": {"size": 1}, "table": {"a": "b"}}, r"f\.table\.a: expected a number, got 'b'"),
        ({"inner": {"size": 1}, "table": [1]}, r"f\.table: expected a mapping, got \[1\]"),
        ({"inner": {"size": 1}, "flag": 1}, r"f\.flag: expected true or false, got 1"),
        ({"inner": {"size": 1}, "note": 1}, r"f\.note: expected text, got 1"),
    ],
)
def test_a_refused_value_names_its_field(content: object, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}"):
        from_plain(Outer, content, "f")
