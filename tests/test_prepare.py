"""Shards: pairs drawn from them are those of the raw data, work is resumed and verified, and Ray does it too."""

from __future__ import annotations

import importlib.util
import io
import json
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from siamtrack.nets.build import build_model
from training import prepare as prepare_module
from training.augment import jittered_window
from training.collect import collect, collect_raw
from training.images import ImageCache
from training.loading import crop_shape, make_samplers
from training.pairs import KINDS, Pair
from training.prepare import main, prepare
from training.recipe import Recipe, recipe_from_dict
from training.shards import _corners, reach_needed, read_shards
from training.tracks import Stored, StoredFrames

SHAPE = crop_shape(build_model("siamcan-mobilenetv2"))


def smooth(rng: np.random.Generator, size: tuple[int, int], detail: int = 16) -> np.ndarray:
    """A colourful image without fine detail, which JPEG keeps well."""
    noise = rng.integers(0, 256, (size[1] // detail, size[0] // detail, 3)).astype(np.uint8)
    return np.asarray(cv2.resize(noise, size, interpolation=cv2.INTER_CUBIC), np.uint8)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos, one with masks; two stills outlined by polygons and by a label image; two photos."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for v in range(2):
        folder = root / "videos" / f"clip{v}"
        (folder / "img").mkdir(parents=True)
        (folder / "mask").mkdir()
        rows = []
        for i in range(4):
            # Partly outside the image at the end; with a context under twice the template, so that none is shrunk.
            x, y, w, h = 40 + 90 * i, 60 + 40 * v, 60 + 4 * i, 48
            cv2.imwrite(str(folder / "img" / f"{i}.png"), smooth(rng, (384, 288)))
            if v:
                mask = np.zeros((288, 384), np.uint8)
                cv2.ellipse(mask, (x + w // 2, y + h // 2), (w // 2, h // 2), 0, 0, 360, 255, -1)
                cv2.imwrite(str(folder / "mask" / f"{i}.png"), mask)
            rows.append(f"{x},{y},{w},{h}")
        (folder / "groundtruth.txt").write_text("\n".join(rows))
    stills = root / "stills"
    (stills / "img").mkdir(parents=True)
    (stills / "mask").mkdir()
    outline = json.dumps([[100, 90, 160, 80, 150, 140, 105, 150]])
    for i in range(2):
        cv2.imwrite(str(stills / "img" / f"{i}.png"), smooth(rng, (320, 240)))
    labels = np.zeros((240, 320), np.uint8)
    labels[90:140, 120:180] = 7
    cv2.imwrite(str(stills / "mask" / "1.png"), labels)
    quoted = outline.replace('"', '""')
    (stills / "boxes.csv").write_text(
        f'image,x,y,w,h,label,mask\n0.png,100,80,60,70,a,"{quoted}"\n1.png,120,90,60,50,b,7\n'
    )
    (root / "photos").mkdir()
    for i in range(2):
        cv2.imwrite(str(root / "photos" / f"p{i}.jpg"), smooth(rng, (320, 240)))
    return root


def recipe(**data: Any) -> Recipe:
    content = {"videos": ["videos"], "stills": ["stills"], "photos": ["photos"], "cache_gb": 0.1, **data}
    return recipe_from_dict({"model": "siamcan-mobilenetv2", "data": content})


@pytest.fixture(scope="module")
def shards(data: Path) -> Path:
    prepare(recipe(), data, data / "shards", shard_mb=0.07)
    return data / "shards"


@pytest.fixture(scope="module")
def raw_shards(data: Path) -> Path:
    prepare(recipe(), data, data / "raw", shard_mb=0.5, quality=None)
    return data / "raw"


def sampler(plan: Recipe, root: Path) -> Any:
    return make_samplers(plan, collect(plan, root, SHAPE.template_px, SHAPE.search_px), SHAPE)[0]


def drawn(data: Path, kind: str, shards: str) -> Iterator[tuple[Pair, Pair]]:
    """Pairs of the raw data and of shards, with boxes and kinds held against each other."""
    pairs = {"mix": {kind: 1.0}, "distractor": 0.5, "occluder": 0.5, "negative": 0.3}
    raw, stored = sampler(recipe(pairs=pairs), data), sampler(recipe(pairs=pairs, shards=shards), data)
    for i in range(16):
        ours, theirs = (s.draw(np.random.default_rng([5, i])) for s in (raw, stored))
        assert ours.positive == theirs.positive
        np.testing.assert_allclose(ours.box_cxcywh, theirs.box_cxcywh, atol=1e-6)
        yield ours, theirs


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_from_shards_are_those_of_the_raw_data(data: Path, shards: Path, kind: str) -> None:
    for ours, theirs in drawn(data, kind, shards.name):
        for a, b in ((ours.template, theirs.template), (ours.search, theirs.search)):
            difference = np.abs(a.astype(int) - b)
            assert difference.mean() < 2.0  # JPEG, seen through light that is stretched by up to 1.3
            assert np.percentile(difference, 99) <= 12


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_from_raw_shards_are_those_of_the_raw_data_to_the_bit(data: Path, raw_shards: Path, kind: str) -> None:
    for ours, theirs in drawn(data, kind, raw_shards.name):
        np.testing.assert_array_equal(ours.template, theirs.template)
        np.testing.assert_array_equal(ours.search, theirs.search)


def test_raw_pixels_are_not_kept_twice(data: Path, raw_shards: Path) -> None:
    """The system keeps what was read of a file."""
    stored = sampler(recipe(shards="raw"), data)
    for i in range(16):
        stored.draw(np.random.default_rng(i))
    assert stored.images._held_bytes == 0


def test_an_image_that_is_not_where_the_index_says_is_refused(raw_shards: Path) -> None:
    image = read_shards(raw_shards, 0)[0][0].sightings[0].image
    assert isinstance(image, Stored)
    for wrong in (replace(image, size=image.size - 3), replace(image, offset=10**9)):
        with pytest.raises(ValueError, match=r"000000\.tar.* is no image of that size: run training.prepare again"):
            ImageCache().bgr(wrong)


def test_shards_that_were_written_anew_are_read_anew(data: Path, tmp_path: Path) -> None:
    """In the same process: what is mapped belongs to a cache."""
    photos = {"videos": [], "stills": [], "pairs": {"mix": {"region": 1.0}}}
    prepare(recipe(**photos), data, tmp_path, quality=None)
    first = read_shards(tmp_path, 0)[2][0]
    before = ImageCache().bgr(first).copy()
    prepare(recipe(), data, tmp_path, quality=None)
    assert read_shards(tmp_path, 0)[2][0] != first
    tracks = read_shards(tmp_path, 0)[0]
    assert ImageCache().bgr(tracks[0].sightings[0].image).shape != before.shape


def test_a_large_raw_photo_is_shrunk(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for name, size in (("large", (1600, 1200)), ("small", (300, 200))):
        cv2.imwrite(str(tmp_path / "photos" / f"{name}.jpg"), smooth(np.random.default_rng(0), size, 100))
    only = recipe(videos=[], stills=[], pairs={"mix": {"region": 1.0}})
    prepare(only, tmp_path, tmp_path / "shards", quality=None)
    kept = recipe(videos=[], stills=[], shards="shards", pairs={"mix": {"region": 1.0}})
    _, _, photos = read_shards(tmp_path / "shards", 0)
    images = sampler(kept, tmp_path).images
    assert [images.bgr(photo).shape for photo in photos] == [(1000, 1333, 3), (200, 300, 3)]


def test_large_targets_are_shrunk_and_stay_in_place(tmp_path: Path) -> None:
    """A target of 600 px, of which a 127 px template needs a fifth: stored at twice the template's scale."""
    folder = tmp_path / "videos" / "big"
    (folder / "img").mkdir(parents=True)
    for i in range(2):
        cv2.imwrite(str(folder / "img" / f"{i}.png"), smooth(np.random.default_rng(i), (1600, 1200), 100))
    (folder / "groundtruth.txt").write_text("500,300,600,500\n510,310,600,500\n")
    only = {"stills": [], "photos": [], "pairs": {"mix": {"video": 1.0}, "negative": 0.0}}
    prepare(recipe(**only), tmp_path, tmp_path / "shards")
    raw, stored = sampler(recipe(**only), tmp_path), sampler(recipe(**only, shards="shards"), tmp_path)
    seen = stored._videos[0][0].sightings[0]
    assert seen.box_xywh[2] == pytest.approx(600 * 254 / np.sqrt(1150 * 1050), rel=0.01)
    for i in range(6):
        ours, theirs = (s.draw(np.random.default_rng([5, i])) for s in (raw, stored))
        np.testing.assert_allclose(ours.box_cxcywh, theirs.box_cxcywh, atol=0.6)  # windows have whole pixels
        assert np.abs(ours.search.astype(int) - theirs.search).mean() < 4


def test_shards_are_in_webdataset_naming(shards: Path) -> None:
    manifest = json.loads((shards / "manifest.json").read_text())
    assert len(manifest["shards"]) > 2
    keys: dict[str, set[str]] = {}
    for shard in manifest["shards"]:
        with tarfile.open(shards / shard["name"]) as tar:
            for name in tar.getnames():
                key, suffix = name.split(".")
                keys.setdefault(key, set()).add(suffix)
    # 8 frames of video, 2 stills, 2 photos; four frames and one still have their outline as an image.
    assert sorted(keys) == [f"{i:09d}" for i in range(12)]
    assert sum(files == {"jpg", "json", "png"} for files in keys.values()) == 5
    assert sum(files == {"jpg", "json"} for files in keys.values()) == 7


def test_raw_pixels_are_numpy_files_in_webdataset_naming(raw_shards: Path) -> None:
    keys: dict[str, dict[str, NDArray[np.uint8]]] = {}
    for path in raw_shards.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                key, suffix = member.name.split(".", 1)
                content = tar.extractfile(member)
                assert content is not None
                if suffix != "json":
                    keys.setdefault(key, {})[suffix] = np.load(io.BytesIO(content.read()))
    assert sorted(keys) == [f"{i:09d}" for i in range(12)]
    assert all(files["npy"].dtype == np.uint8 and files["npy"].shape[2] == 3 for files in keys.values())
    outlined = [files for files in keys.values() if "mask.npy" in files]
    assert len(outlined) == 5
    for files in outlined:
        assert files["mask.npy"].shape == files["npy"].shape[:2]
        assert set(np.unique(files["mask.npy"])) == {0, 255}


def test_frames_of_a_video_are_arrays(data: Path, shards: Path) -> None:
    """Millions of objects would fill every process's memory."""
    tracks = {track.name: track for track in read_shards(shards, 0)[0]}
    raw = {track.name: track for track in collect_raw(recipe().data, data)[0]}
    assert sorted(tracks) == ["clip0", "clip1"]
    for name, track in tracks.items():
        frames = track.sightings
        assert isinstance(frames, StoredFrames)
        assert list(track.frames) == list(raw[name].frames) == [0, 1, 2, 3]
        assert sum(1 for _ in track.outlined()) == {"clip0": 0, "clip1": 4}[name]
        assert list(frames[1:3]) == [frames[1], frames[2]] == list(track.take(np.array([1, 2])).sightings)
        assert [seen.box_xywh[2:] for seen in frames] == [seen.box_xywh[2:] for seen in raw[name].sightings]
        arrays = (frames.shard, frames.image, frames.outline, frames.boxes_xywh, frames.fill_bgr)
        assert sum(array.nbytes for array in arrays) == 92 * len(frames)


def test_a_second_start_writes_only_what_is_missing_or_damaged(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    written, count = prepare(recipe(), data, out, shard_mb=0.07)
    assert written == count > 3
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir()}
    assert prepare(recipe(), data, out, shard_mb=0.07) == (0, count)
    (out / "000000.json").unlink()  # as if stopped while writing it
    damaged = bytearray((out / "000001.tar").read_bytes())
    damaged[700] ^= 1  # a bit of a picture: same size, other hash
    (out / "000001.tar").write_bytes(damaged)
    assert prepare(recipe(), data, out, shard_mb=0.07) == (2, count)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {name: content for name, (content, _) in before.items()}
    assert (out / "000002.tar").stat().st_mtime_ns == before["000002.tar"][1]
    wider = recipe(pairs={"search": {"shift_px": 80, "scale": 0.3, "stretch": 0.2}})
    reach = json.loads((out / "manifest.json").read_text())["reach"]
    written, count = prepare(wider, data, out, shard_mb=0.07)
    assert written == count  # another plan
    assert json.loads((out / "manifest.json").read_text())["reach"] > 1.1 * reach


def test_unfinished_shards_are_not_trained_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, done = prepare_module.write_shard, []

    def stop_at_the_third(job: Any) -> Any:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(job.number)
        return write(job)

    monkeypatch.setattr(prepare_module, "write_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare(recipe(), data, tmp_path, shard_mb=0.07)
    with pytest.raises(ValueError, match=r"no .*manifest.json: `python -m training.prepare` writes it"):
        collect(recipe(shards=str(tmp_path)), data, SHAPE.template_px, SHAPE.search_px)
    monkeypatch.undo()
    written, count = prepare(recipe(), data, tmp_path, shard_mb=0.07)
    assert written == count - 2
    (tmp_path / "000000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"000000.tar is missing or not \d+ bytes long"):
        collect(recipe(shards=str(tmp_path)), data, SHAPE.template_px, SHAPE.search_px)


def test_wider_jitter_than_the_shards_show_is_refused(data: Path, shards: Path) -> None:
    wide = recipe(shards="shards", pairs={"search": {"shift_px": 90, "scale": 0.3, "stretch": 0.2}})
    with pytest.raises(ValueError, match=r"the recipe's jitter needs .*: prepare shards with this recipe"):
        collect(wide, data, SHAPE.template_px, SHAPE.search_px)


def test_reach_is_what_the_widest_window_needs() -> None:
    pairs = recipe().data.pairs  # search: 64 px of 255, scale 0.25, stretch 0.12
    assert reach_needed(pairs.template, pairs.search, 127, 255) == pytest.approx(
        255 / 127 * np.exp(0.25 + 0.06) * (0.5 + 64 / 255)
    )


class Extreme:
    """Draws the lower or the upper end, by turns that the bits of `which` say."""

    def __init__(self, which: int) -> None:
        self.which = which

    def uniform(self, low: float, high: float) -> float:
        self.which, bit = divmod(self.which, 2)
        return high if bit else low


@pytest.mark.parametrize("which", range(16))
@pytest.mark.parametrize("size", [(40.0, 30.0), (11.5, 71.3)])
def test_no_window_looks_beyond_its_crop(which: int, size: tuple[float, float]) -> None:
    pairs = recipe().data.pairs
    reach = reach_needed(pairs.template, pairs.search, 127, 255)
    box = (400.3, 300.8, *size)
    left, top, right, bottom = _corners(box, 900, 800, reach)
    for jitter, side in ((pairs.template, 127), (pairs.search, 255)):
        middle = (box[0] + size[0] / 2, box[1] + size[1] / 2, *size)
        window = jittered_window(middle, 127, side, jitter, Extreme(which))  # type: ignore[arg-type]
        assert left <= window.left and window.left + window.width <= right
        assert top <= window.top and window.top + window.height <= bottom


def test_two_processes_write_the_same(data: Path, shards: Path, tmp_path: Path) -> None:
    prepare(recipe(), data, tmp_path, shard_mb=0.07, processes=2)
    for path in shards.glob("*.tar"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install siamtrack[cluster]")
def test_ray_writes_the_same(data: Path, shards: Path, tmp_path: Path) -> None:
    prepare(recipe(), data, tmp_path, shard_mb=0.07, processes=1, cluster="local")
    for path in shards.glob("*.tar"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="Ray is installed")
def test_missing_ray_is_said(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({"model": "siamcan-mobilenetv2", "data": {"videos": ["videos"]}}))
    arguments = [str(path), "--data", str(data), "--out", str(tmp_path / "out"), "--cluster", "ray://nowhere:10001"]
    assert main(arguments) == 2
    assert "--cluster needs Ray: pip install 'siamtrack[cluster]'" in capsys.readouterr().err


def test_a_relative_root_is_the_same_place(
    data: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of a cluster run in other folders, and the plan of a finished shard must not be another."""
    monkeypatch.chdir(data.parent)
    assert prepare(recipe(), Path(data.name), shards, shard_mb=0.07)[0] == 0
    assert prepare(recipe(), Path(data.name), tmp_path / "anew", shard_mb=0.2, processes=2)[0] > 0


def test_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({"model": "siamcan-mobilenetv2", "data": {"videos": ["videos"], "shards": "old"}}))
    arguments = [str(path), "--data", str(data), "--out", str(tmp_path / "out"), "--processes", "1"]
    assert main(arguments) == 0
    assert "1 shards in" in capsys.readouterr().out
    assert main([*arguments, "--raw"]) == 0
    assert "1 of them written now" in capsys.readouterr().out  # another plan than of JPEG
    with tarfile.open(tmp_path / "out" / "000000.tar") as tar:
        assert "000000000.npy" in tar.getnames()
    path.write_text(json.dumps({"model": "siamcan-mobilenetv2"}))
    assert main(arguments) == 2
    assert "the recipe names no data" in capsys.readouterr().err
