"""Objects outlined in photos without annotations."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from siamtrack.boxes import iou_xywh
from training.data import read_stills
from training.left_out import LeftOut
from training.outline import OBJECT, main, outline

Image = NDArray[np.uint8]


def meadow(seed: int = 0) -> Image:
    """Green, with some texture, 300 x 400."""
    rng = np.random.default_rng(seed)
    coarse = np.clip(rng.normal((60, 140, 70), 8, (30, 40, 3)), 0, 255).astype(np.uint8)
    return np.asarray(cv2.resize(coarse, (400, 300), interpolation=cv2.INTER_CUBIC), np.uint8)


def with_ellipse(centre: tuple[int, int] = (210, 150), axes: tuple[int, int] = (80, 50)) -> tuple[Image, Image]:
    """A red thing on the meadow, and where it is."""
    photo, truth = meadow(), np.zeros((300, 400), np.uint8)
    cv2.ellipse(photo, centre, axes, 20, 0, 360, (40, 50, 200), -1)
    cv2.ellipse(truth, centre, axes, 20, 0, 360, 1, -1)
    return photo, truth


def test_one_thing_is_outlined() -> None:
    photo, truth = with_ellipse()
    mask = outline(photo)
    assert mask is not None and mask.shape == (300, 400) and set(np.unique(mask)) == {0, OBJECT}
    both, either = ((mask > 0) & (truth > 0)).sum(), ((mask > 0) | (truth > 0)).sum()
    assert both / either > 0.9
    np.testing.assert_array_equal(outline(photo), mask)  # nothing is left to chance


def test_what_is_no_single_whole_thing_is_left_out() -> None:
    two = meadow()
    for x in (120, 290):
        cv2.circle(two, (x, 150), 45, (40, 50, 200), -1)
    assert outline(two) is None, "two of equal size"
    tiny, _ = with_ellipse(axes=(12, 9))
    assert outline(tiny) is None, "too small"
    band = meadow()
    band[110:190] = (40, 50, 200)
    assert outline(band) is None, "cut off on two sides"
    assert outline(np.zeros((9, 300, 3), np.uint8)) is None, "a strip"


def test_a_folder_becomes_stills(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    photo, truth = with_ellipse()
    cv2.imwrite(str(photos / "thing.png"), photo)
    cv2.imwrite(str(photos / "grass.png"), meadow(1))
    (photos / "broken.jpg").write_bytes(b"no image")
    assert main([str(photos), "--out", str(tmp_path / "stills"), "--processes", "1"]) == 0
    seen = {str(track.sightings[0].image): track.sightings[0] for track in read_stills(tmp_path / "stills", LeftOut())}[
        str(photos / "thing.png")  # the photo itself: it must not count as another source
    ]
    assert seen.mask is not None and seen.mask.value == OBJECT
    assert iou_xywh(np.array(seen.box_xywh), np.array(cv2.boundingRect(truth), float)) > 0.9
    mask = np.asarray(cv2.imread(str(tmp_path / "stills" / "mask" / "thing.png"), cv2.IMREAD_GRAYSCALE))
    assert (mask == OBJECT).any()


@pytest.mark.parametrize(
    ("names", "message"), [((), "holds no images"), (("a.png", "a.jpg"), "differ only in their suffix")]
)
def test_folders_that_cannot_be_used(
    tmp_path: Path, names: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in names:
        cv2.imwrite(str(tmp_path / name), meadow())
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
