"""Pairs and triplets as they are drawn and labelled, and which process sees which."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from siamtrack.nets.decode import Grid
from tests.sequence_files import write_image
from tests.test_augment import NO_LIGHT
from training import pairs as pairs_module
from training.augment import LightConfig, rotate
from training.dataset import EpochSampler, LabelConfig, PairDataset, collate
from training.frames import pair_frames, triplet_frames
from training.images import ImageCache
from training.labels import Cells
from training.objects import Objects
from training.pairs import Pair, PairConfig, PairSampler
from training.tracks import Mask, Sighting, Track

CELLS = Cells(Grid(size=25, stride=8, origin=31.5).points().numpy(), stride=8)


TARGET_BGR = (40, 60, 220)
GREEN_BGR = (40, 200, 40)
BACKGROUND = 110


def painted(path: Path, box_xywh: tuple[int, int, int, int], colour: tuple[int, int, int] = TARGET_BGR) -> Sighting:
    """A plain photo with one solid rectangle, and its outline as a label image."""
    image = np.full((240, 320, 3), BACKGROUND, np.uint8)
    labels = np.zeros((240, 320), np.uint8)
    x, y, w, h = box_xywh
    image[y : y + h, x : x + w], labels[y : y + h, x : x + w] = colour, 255
    write_image(path, image)
    mask = write_image(path.parent / "mask" / path.name, labels)
    return Sighting(path, tuple(float(v) for v in box_xywh), Mask(mask))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def tracks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Track], list[Track], list[Path]]:
    """One video of six frames in which the target moves and grows, two stills, two photos without annotations."""
    root = tmp_path_factory.mktemp("pairs")
    frames = [painted(root / f"v{i}.png", (60 + 20 * i, 70 + 5 * i, 40 + 4 * i, 30 + 4 * i)) for i in range(6)]
    stills = [Track(f"s:{i}", (painted(root / f"s{i}.png", (100, 80, 60, 48)),), (0,)) for i in range(2)]
    photos = [write_image(root / f"p{i}.png", np.full((240, 320, 3), BACKGROUND, np.uint8)) for i in range(2)]
    return [Track("v", tuple(frames), tuple(range(6)))], stills, photos


@pytest.fixture(scope="module")
def green(tracks: Tracks) -> Track:
    """A still with an outlined green object to paste, which no other track shows."""
    return Track("g", (painted(tracks[2][0].parent / "green.png", (100, 80, 60, 48), GREEN_BGR),), (0,))


@pytest.fixture
def unlit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crops keep their colours."""
    monkeypatch.setattr(pairs_module, "photometric", lambda image, *_: image)


Tracks = tuple[list[Track], list[Track], list[Path]]
ALL = {"video": 0.4, "still": 0.2, "cutout": 0.3, "region": 0.1}
PLAIN: dict[str, Any] = {"negative": 0.0, "distractor": 0.0, "occluder": 0.0, "rotation": 0.0, "flip": 0.0}


def sampler(tracks: Tracks, **config: Any) -> PairSampler:
    return PairSampler(*tracks, PairConfig(**config), ImageCache(0.1), 127, 255)


def draw(pair_sampler: PairSampler, number: int) -> list[Pair]:
    return [pair_sampler.draw(np.random.default_rng([7, i])) for i in range(number)]


def dataset(pair_sampler: PairSampler, seed: int = 1, **labels: Any) -> PairDataset:
    return PairDataset(pair_sampler, CELLS, LabelConfig(**{"rule": "siamcan", **labels}), seed, 100)


def test_sample_depends_on_seed_and_index_alone(tracks: Tracks) -> None:
    first = dataset(sampler(tracks, mix=ALL, negative=0.3, distractor=0.5, occluder=0.5))
    again = dataset(sampler(tracks, mix=ALL, negative=0.3, distractor=0.5, occluder=0.5))
    first[0], first[1]  # what was drawn before must not matter
    for index in (5, 3, 1234):
        ours, theirs = first[index], again[index]
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])
    assert len({first[i]["search"].tobytes() for i in range(8)}) == 8
    other = dataset(first.sampler, seed=2)
    assert (first[5]["search"] != other[5]["search"]).any()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_batch_is_its_samples_on_any_number_of_threads(tracks: Tracks, threads: int) -> None:
    data = dataset(sampler(tracks, mix=ALL, negative=0.3, distractor=0.5, occluder=0.5))
    data.sampler.images.limit_bytes = 500_000  # two photos: threads push each other's out
    wanted = [data[index] for index in range(40)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = data.__getitems__(list(range(40)))
    finally:
        torch.set_num_threads(before)
    for ours, theirs in zip(found, wanted, strict=True):
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key])


def test_sample_shapes_and_collate(tracks: Tracks) -> None:
    batch = collate([dataset(sampler(tracks, mix=ALL))[i] for i in range(3)])
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in batch.items()}
    assert shapes == {
        "template": ((3, 127, 127, 3), torch.uint8),
        "search": ((3, 255, 255, 3), torch.uint8),
        "box": ((3, 4), torch.float32),
        "size": ((3, 2), torch.float32),
        "labels": ((3, 625), torch.int8),
        "positive": ((3,), torch.bool),
    }


@pytest.mark.parametrize("kind", ["video", "still", "cutout", "region"])
def test_each_kind_alone_draws_valid_pairs(tracks: Tracks, kind: str) -> None:
    for pair in draw(sampler(tracks, mix={kind: 1.0}, negative=0.0), 12):
        cx, cy, w, h = pair.box_cxcywh
        assert pair.template.shape == (127, 127, 3)
        assert pair.search.shape == (255, 255, 3)
        assert pair.template.dtype == pair.search.dtype == np.uint8
        assert 255 / 2 - 66 <= cx <= 255 / 2 + 66
        assert 255 / 2 - 66 <= cy <= 255 / 2 + 66
        # By the context rule a target is about 63.5 px wide; jitter, growth in the video and rotation add to that.
        assert 63.5 * 0.4 < math.sqrt(w * h) < 63.5 * 1.8


@pytest.mark.usefixtures("unlit")
@pytest.mark.parametrize("kind", ["video", "still", "cutout"])
def test_box_is_where_the_target_is(tracks: Tracks, kind: str) -> None:
    for pair in draw(sampler(tracks, mix={kind: 1.0}, **PLAIN), 12):
        distance = np.abs(pair.search.astype(int) - TARGET_BGR).max(axis=2)
        target = distance < 40
        cx, cy, w, h = pair.box_cxcywh
        if kind == "cutout":  # may be rotated: only its bounding box is known
            rows, columns = np.flatnonzero(target.any(axis=1)), np.flatnonzero(target.any(axis=0))
            assert columns[0] == pytest.approx(cx - w / 2, abs=2)
            assert columns[-1] + 1 == pytest.approx(cx + w / 2, abs=2)
            assert rows[0] == pytest.approx(cy - h / 2, abs=2)
            assert rows[-1] + 1 == pytest.approx(cy + h / 2, abs=2)
        else:
            x, y = np.arange(255) + 0.5, np.arange(255) + 0.5
            outer = (np.abs(x - cx) < w / 2 + 2)[None] & (np.abs(y - cy) < h / 2 + 2)[:, None]
            inner = (np.abs(x - cx) < w / 2 - 2)[None] & (np.abs(y - cy) < h / 2 - 2)[:, None]
            assert target[inner].all()
            assert not target[~outer].any()
        middle = pair.template[63, 63].astype(int)
        assert np.abs(middle - TARGET_BGR).max() < 40  # the template shows the target, in its middle
        shown = np.abs(pair.template.astype(int) - TARGET_BGR).max(axis=2) < 40
        extent = [np.ptp(np.flatnonzero(shown.any(axis=axis))) + 1 for axis in (0, 1)]
        assert extent == pytest.approx(pair.size, abs=2)


@pytest.mark.usefixtures("unlit")
def test_a_mirrored_search_crop_takes_its_box_along(tracks: Tracks) -> None:
    for pair in draw(sampler(tracks, mix={"still": 1.0}, **{**PLAIN, "flip": 1.0}), 6):
        rows, columns = np.nonzero(np.abs(pair.search.astype(int) - TARGET_BGR).max(axis=2) < 40)
        cx, cy, _, _ = pair.box_cxcywh
        assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx((cx, cy), abs=2)


@pytest.mark.usefixtures("unlit")
def test_a_part_of_an_object_is_inside_it(tracks: Tracks) -> None:
    seen = np.random.default_rng(5)
    for pair in draw(sampler(tracks, mix={"still": 1.0}, part=1.0, **PLAIN), 12):
        target = np.abs(pair.search.astype(int) - TARGET_BGR).max(axis=2) < 40
        cx, cy, w, h = pair.box_cxcywh
        x, y = np.arange(255) + 0.5, np.arange(255) + 0.5
        inner = (np.abs(x - cx) < w / 2 - 2)[None] & (np.abs(y - cy) < h / 2 - 2)[:, None]
        assert target[inner].all()
        assert target.sum() > 1.5 * w * h  # the object goes on beyond it
        assert 63.5 * 0.4 < math.sqrt(w * h) < 63.5 * 1.8  # on the scale that it would be tracked at
    for side, smallest in ((200, 60), (20, 20)):  # a part of 20 px would be thinner than 16
        whole = Sighting(tracks[2][0], (30.0, 20.0, side, side))
        x0, y0, w, h = pairs_module.part_of(whole, seen).box_xywh
        assert min(w, h) >= smallest
        assert x0 >= 30
        assert y0 >= 20
        assert x0 + w <= 30 + side
        assert y0 + h <= 20 + side


def triplets(tracks: Tracks, **config: Any) -> PairSampler:
    return PairSampler(*tracks, PairConfig(**config), ImageCache(0.1), 127, 255, triplets=True)


@pytest.mark.parametrize("kind", ["video", "still", "cutout", "region"])
def test_each_kind_draws_triplets(tracks: Tracks, kind: str) -> None:
    for pair in draw(triplets(tracks, mix={kind: 1.0}, negative=0.0), 8):
        crops = [pair.template, pair.history, pair.current]
        assert all(crop is not None and crop.shape == (127, 127, 3) and crop.dtype == np.uint8 for crop in crops)
        assert len({crop.tobytes() for crop in crops if crop is not None}) == 3  # no copies of each other
        assert pair.search.shape == (255, 255, 3)


def test_triplets_show_the_target_in_every_template(tracks: Tracks, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("photometric", "corrupted"):
        monkeypatch.setattr(pairs_module, name, lambda image, *_: image)
    for kind in ("video", "still", "cutout"):
        for pair in draw(triplets(tracks, mix={kind: 1.0}, **PLAIN), 6):
            for crop in (pair.template, pair.history, pair.current):
                assert crop is not None
                assert np.abs(crop[63, 63].astype(int) - TARGET_BGR).max() < 40
                assert np.abs(crop[3, 3].astype(int) - BACKGROUND).max() < 40


def test_only_history_and_current_are_corrupted(tracks: Tracks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Section 2.3: noise is added to T_a and T_c."""
    monkeypatch.setattr(pairs_module, "corrupted", lambda image, rng: np.zeros_like(image))
    (pair,) = draw(triplets(tracks, mix={"video": 1.0}, **PLAIN), 1)
    assert pair.history is not None
    assert pair.current is not None
    assert (pair.template.any(), pair.search.any(), pair.history.any(), pair.current.any()) == (
        True,
        True,
        False,
        False,
    )


@pytest.mark.parametrize(
    ("frames", "length"),
    [(range(200), 50), (range(0, 400, 7), 50), ((0, 1, 2, 30, 31, 90, 200, 201, 202, 203), 20), (range(4), 50)],
    ids=["long", "sparse", "with gaps", "short"],
)
def test_triplet_frames(frames: tuple[int, ...], length: int) -> None:
    numbers = np.array(frames)
    drawn = [triplet_frames(numbers, length, np.random.default_rng(seed)) for seed in range(300)]
    order = []
    for first, history, current, later in drawn:
        used = numbers[[first, history, current, later]]
        assert np.ptp(used) < length
        assert current - history in (0, 1)
        assert history <= current <= later
        order.append((current > history, later > current, first < history, first > later))
    by_pattern = np.mean(order, axis=0)
    if frames in (range(200), range(4)):
        assert by_pattern[:2].tolist() == [1, 1]  # neighbours, and the search crop after them
        assert by_pattern[2] > 0.1  # T_i is any frame of the part
        assert {first for first, *_ in drawn} == set(range(len(frames))) or len(frames) > 4


def test_pair_frames_are_uniform_among_those_in_range() -> None:
    frames = np.array([0, 1, 5, 6, 7, 30])
    drawn = [pair_frames(frames, 5, np.random.default_rng(seed)) for seed in range(3000)]
    later = [second for first, second in drawn if first == 2]  # frame 5: from 0 to 7
    counts = np.bincount(later, minlength=6) / len(later)
    assert counts[5] == 0
    assert counts[:5] == pytest.approx([0.2] * 5, abs=0.06)
    assert {second for first, second in drawn if first == 5} == {5}


@pytest.mark.parametrize(("count", "wanted"), [(1, {(0, 0, 0)}), (2, {(0, 1, 1)}), (3, {(0, 1, 2)})])
def test_triplets_of_very_short_tracks(count: int, wanted: set[tuple[int, int, int]]) -> None:
    drawn = {triplet_frames(np.arange(count), 50, np.random.default_rng(seed))[1:] for seed in range(50)}
    assert drawn == wanted


def test_triplet_samples_collate_and_repeat(tracks: Tracks) -> None:
    first, again = (dataset(triplets(tracks, mix=ALL, negative=0.3)) for _ in range(2))
    first[0]
    for key, value in first[3].items():
        np.testing.assert_array_equal(value, again[3][key])
    batch = collate([first[i] for i in range(2)])
    assert {key: tuple(batch[key].shape) for key in ("template", "history", "current")} == dict.fromkeys(
        ("template", "history", "current"), (2, 127, 127, 3)
    )


@pytest.mark.parametrize(
    ("angle", "size"), [(0.0, (60, 20)), (90.0, (20, 60)), (-90.0, (20, 60)), (30.0, (52.92, 34.64))]
)
def test_rotation_turns_about_the_target(angle: float, size: tuple[float, float]) -> None:
    # A filled ellipse, for which the returned box is exact.
    image = np.zeros((255, 255, 3), np.uint8)
    cv2.ellipse(image, (110, 130), (30, 10), 0, 0, 360, (255, 255, 255), -1)
    turned, (cx, cy, w, h) = rotate(image, (110.5, 130.5, 60, 20), angle)
    assert (cx, cy, w, h) == pytest.approx((110.5, 130.5, *size), abs=0.05)
    rows, columns = np.nonzero(turned[:, :, 0] > 127)
    assert (columns.mean() + 0.5, rows.mean() + 0.5) == pytest.approx((cx, cy), abs=0.5)
    assert (np.ptp(columns) + 1, np.ptp(rows) + 1) == pytest.approx((w, h), abs=2.5)


def test_video_pairs_come_from_two_frames_in_range(tracks: Tracks, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    original = PairSampler._view

    def noted(self: PairSampler, sighting: Sighting, *rest: Any) -> Any:
        seen.append(int(sighting.image.stem[1:]))
        return original(self, sighting, *rest)

    monkeypatch.setattr(PairSampler, "_view", noted)
    draw(sampler(tracks, mix={"video": 1.0}, frame_range=2, **PLAIN), 60)
    gaps = np.abs(np.subtract(seen[::2], seen[1::2]))
    assert set(gaps.tolist()) == {0, 1, 2}


def test_negative_pairs_show_another_source(tracks: Tracks, monkeypatch: pytest.MonkeyPatch) -> None:
    sources: list[str] = []
    original = PairSampler._draw_kind

    def noted(self: PairSampler, kind: str, rng: np.random.Generator) -> Any:
        drawn = original(self, kind, rng)
        sources.append(drawn.source)
        return drawn

    monkeypatch.setattr(PairSampler, "_draw_kind", noted)
    always = sampler(tracks, mix=ALL, **{**PLAIN, "negative": 1.0})
    for i in range(40):
        sources.clear()
        always.draw(np.random.default_rng([3, i]))
        assert sources[0] != sources[-1]


def test_a_single_video_gives_no_negative_pairs(tracks: Tracks) -> None:
    videos, _, _ = tracks
    one = [t for t in videos if t.name.split(":")[0] == videos[0].name.split(":")[0]]
    with pytest.raises(ValueError, match="set `negative` to 0 or add data"):
        PairSampler(one, [], [], PairConfig(mix={"video": 1.0}, negative=0.1), ImageCache(0.1), 127, 255)


def test_negative_pairs_are_all_background(tracks: Tracks) -> None:
    samples = [dataset(sampler(tracks, mix=ALL, negative=1.0), positives=0, negatives=0)[i] for i in range(6)]
    assert not any(s["positive"] for s in samples)
    assert all((s["labels"] == 0).all() for s in samples)
    sampled = dataset(sampler(tracks, mix=ALL, negative=1.0), positives=16, negatives=48)[0]["labels"]
    assert ((sampled == 0).sum(), (sampled == 1).sum()) == (48, 0)


def test_positive_pairs_are_labelled_at_their_box(tracks: Tracks) -> None:
    sampled = dataset(sampler(tracks, mix=ALL, **PLAIN), positives=16, negatives=48)
    whole = dataset(sampler(tracks, mix=ALL, **PLAIN), positives=0, negatives=0)
    for i in range(6):
        item = whole[i]
        assert item["positive"]
        rows, columns = np.nonzero(item["labels"].reshape(25, 25) == 1)
        assert rows.size
        assert 31.5 + 8 * columns.mean() == pytest.approx(item["box"][0], abs=8)
        assert 31.5 + 8 * rows.mean() == pytest.approx(item["box"][1], abs=8)
        few = sampled[i]["labels"]
        assert (few == 1).sum() == min(16, rows.size)
        assert (few == 0).sum() == 48


def test_share_of_negatives(tracks: Tracks) -> None:
    share = np.mean([not p.positive for p in draw(sampler(tracks, mix={"region": 1.0}, negative=0.3), 150)])
    assert share == pytest.approx(0.3, abs=0.12)


@pytest.mark.usefixtures("unlit")
@pytest.mark.parametrize("extra", ["distractor", "occluder"])
def test_pasted_objects_spare_or_cover_the_target(tracks: Tracks, green: Track, extra: str) -> None:
    _, _, photos = tracks
    # Red targets without outlines.
    target = Track("t", (Sighting(photos[0].parent / "s0.png", (100.0, 80.0, 60.0, 48.0)),), (0,))
    config = PairConfig(mix={"video": 1.0}, **{**PLAIN, extra: 1.0})
    pair_sampler = PairSampler([target], [green], photos, config, ImageCache(0.1), 127, 255)
    greens, covered = 0, []
    for pair in draw(pair_sampler, 12):
        pasted = np.abs(pair.search.astype(int) - GREEN_BGR).max(axis=2) < 40
        greens += pasted.any()
        cx, cy, w, h = (int(v) for v in pair.box_cxcywh)
        inside = pasted[cy - h // 2 : cy + h // 2, cx - w // 2 : cx + w // 2]
        covered.append(inside.mean())
    if extra == "distractor":
        assert greens >= 6  # some fall on the target's place and are left out
        assert max(covered) < 0.2
    else:
        assert greens == 12
        assert 0.05 < np.mean(covered) < 0.5


@pytest.mark.usefixtures("unlit")
@pytest.mark.parametrize("extra", ["distractor", "occluder"])
def test_the_target_is_no_distractor_of_itself(
    tracks: Tracks, green: Track, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second copy of it would be labelled background; of a negative pair, neither object may come in again."""
    videos, _, photos = tracks

    def drawn(others: list[Track], negative: float) -> list[Pair]:
        config = PairConfig(mix={"video": 1.0}, **{**PLAIN, extra: 1.0, "negative": negative})
        return draw(PairSampler([*videos, *others], [green], photos, config, ImageCache(0.1), 127, 255), 25)

    def shows(pair: Pair, colour: tuple[int, int, int]) -> bool:
        close = (np.abs(pair.search.astype(int) - colour).max(axis=2) < 40).astype(np.uint8)
        return cv2.connectedComponentsWithStats(close)[2][1:, cv2.CC_STAT_AREA].max(initial=0) > 100

    def copies(pair: Pair) -> int:
        red = (np.abs(pair.search.astype(int) - TARGET_BGR).max(axis=2) < 40).astype(np.uint8)
        red = cv2.morphologyEx(red, cv2.MORPH_OPEN, np.ones((5, 5), np.uint8))
        return cv2.connectedComponents(red)[0] - 1

    pairs = drawn([], 0.0)
    assert sum(shows(pair, GREEN_BGR) for pair in pairs) > 5  # others are pasted
    if extra == "distractor":
        assert {copies(pair) for pair in pairs} == {1}
    pasted: list[tuple[Collection[str], str]] = []
    draw_one = Objects._draw

    def noted(self: Objects, rng: Any, without: Collection[str]) -> Any:
        drawn_one = draw_one(self, rng, without)
        pasted.append((set(without), drawn_one[1] if drawn_one else ""))
        return drawn_one

    monkeypatch.setattr(Objects, "_draw", noted)
    drawn([], 0.0)
    assert len(pasted) >= 25 and all("v" in without and source not in without for without, source in pasted)
    blue = Track("b", (painted(photos[0].parent / "blue.png", (100, 80, 60, 48), (200, 60, 40)),), (0,))
    for pair in drawn([blue], 0.5):
        if not pair.positive:  # of red and blue one is sought, the other is there
            assert not (shows(pair, TARGET_BGR) and shows(pair, (200, 60, 40)))


@pytest.mark.parametrize(
    ("mix", "data", "message"),
    [
        ({"video": 1.0}, "nothing", "the mix asks for video pairs but the data has none"),
        ({"video": 0.5, "still": 0.5}, "videos", "still"),
        ({"region": 1.0}, "videos", "region"),
        ({"cutout": 1.0}, "no outlines", "cutout"),
        ({"cutout": 1.0}, "videos", "cutout"),  # outlines, but no photo to paste them on
    ],
)
def test_mix_the_data_cannot_serve(tracks: Tracks, mix: dict[str, float], data: str, message: str) -> None:
    videos, _, photos = tracks
    bare = [Track("v", tuple(Sighting(s.image, s.box_xywh) for s in videos[0].sightings), videos[0].frames)]
    choices: dict[str, Any] = {
        "nothing": ([], [], []),
        "videos": (videos, [], []),
        "no outlines": (bare, [], photos),
    }
    with pytest.raises(ValueError, match=message):
        PairSampler(*choices[data], PairConfig(mix=mix), ImageCache(0.1), 127, 255)


@pytest.mark.parametrize("mix", [{}, {"video": 0.0}, {"film": 1.0}, {"video": -1.0}])
def test_mix_that_cannot_be(mix: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="mix must give positive shares"):
        PairConfig(mix=mix)


def test_ranks_partition_what_one_process_sees() -> None:
    for epoch in (0, 3):
        whole, *parts = EpochSampler(100), EpochSampler(100, 0, 2), EpochSampler(100, 1, 2)
        for s in (whole, *parts):
            s.set_epoch(epoch)
        drawn = [list(p) for p in parts]
        assert [len(p) for p in parts] == [len(d) for d in drawn] == [50, 50]
        assert sorted(drawn[0] + drawn[1]) == list(whole)
        # Step by step, not only in sum: the k-th pairs of both ranks are the k-th two of the single process.
        assert [i for both in zip(*drawn, strict=True) for i in both] == list(whole)


def test_a_run_resumed_within_an_epoch_goes_on_behind_its_last_step() -> None:
    """Two processes, three steps of two samples each an epoch; the run has made four steps."""
    seen = []
    for rank in range(2):
        sampler = EpochSampler(12, rank, world=2, batch_size=2, steps_done=lambda: 4)
        sampler.set_epoch(1)
        assert len(sampler) == 6  # a whole epoch: the trainer counts what it has behind it
        seen += list(sampler)
    assert sorted(seen) == list(range(16, 24))


def test_epochs_do_not_overlap() -> None:
    s = EpochSampler(101, 1, 2)
    seen: list[int] = []
    for epoch in range(4):
        s.set_epoch(epoch)
        assert len(list(s)) == len(s) == 50  # the odd one out is dropped: every rank must take equally many steps
        seen += list(s)
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("deferred", [False, True])
def test_each_crop_has_its_light(tracks: Tracks, deferred: bool) -> None:
    lights = {
        "template_light": LightConfig(**NO_LIGHT),
        "search_light": LightConfig(**{**NO_LIGHT, "grey": 1.0, "mildest": 1}),
    }
    config = PairConfig(mix={"video": 1.0}, **PLAIN, **lights)
    pair = PairSampler(*tracks, config, ImageCache(0.1), 127, 255, False, deferred).draw(np.random.default_rng(0))
    if deferred:
        assert not pair.effects["template"].light.grey and pair.effects["search"].light.grey
    else:
        colourful = [np.ptp(crop.astype(int), axis=2).max() > 0 for crop in (pair.template, pair.search)]
        assert colourful == [True, False]
