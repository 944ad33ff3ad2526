"""Image sequences with one ground-truth box a frame, and the two plainest folder layouts: OTB's and our own.

Every layout ends up as a `Sequence`: image paths in playing order and boxes in the continuous 0-based coordinates of
`siamtrack.boxes`, with a row of NaN where the target is absent or unlabelled. Images are decoded one at a time by
`read_frame`, so a sequence costs no memory until it is played. `evaluation.layouts` finds sequences in a folder and
reads the layouts of the public benchmarks.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from siamtrack.sources import natural_key

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
OTB_TRUTH = "groundtruth_rect.txt"
VIDEO_TRUTH = "groundtruth.txt"

# First and last image (1-based) of the OTB sequences whose truth covers a part of their images, from the benchmark's
# own notes (cvlab.hanyang.ac.kr/tracker_benchmark); only these may differ in length.
OTB_RANGES = {
    "david": (300, 770),
    "diving": (1, 215),
    "football1": (1, 74),
    "freeman3": (1, 460),
    "freeman4": (1, 283),
}


@dataclass(frozen=True, eq=False)
class Sequence:
    """One target followed through a list of images.

    Attributes:
        name: what tables call it, usually the folder's name.
        frames: paths of the F images in playing order.
        truth_xywh: float64 ``[F, 4]``, image pixels, 0-based; NaN rows where the target is absent or unlabelled.
        visible: ``[F]``, False where the data set says that the target cannot be seen (LaSOT, GOT-10k), whether or not
            the frame has a box; None where every labelled frame counts as visible.
        attributes: what the sequence is an example of, such as "occlusion"; () where the data set does not say.
    """

    name: str
    frames: tuple[Path, ...]
    truth_xywh: NDArray[np.float64]
    visible: NDArray[np.bool_] | None = None
    attributes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.truth_xywh.shape != (len(self.frames), 4):
            raise ValueError(
                f"sequence {self.name}: truth must have shape [{len(self.frames)}, 4], a row an image, "
                f"got {list(self.truth_xywh.shape)}"
            )
        if self.visible is not None and self.visible.shape != (len(self.frames),):
            raise ValueError(
                f"sequence {self.name}: visibility must have shape [{len(self.frames)}], a value an image, "
                f"got {list(self.visible.shape)}"
            )
        if not self.has_truth.any():
            raise ValueError(f"sequence {self.name}: no frame has a box, so no tracker can be started on it")

    @property
    def has_truth(self) -> NDArray[np.bool_]:
        """``[F]``: True where the frame has a box of some area."""
        return is_box(self.truth_xywh)

    @property
    def scorable(self) -> NDArray[np.bool_]:
        """``[F]``: True where the frame has a box and the target can be seen."""
        return self.has_truth if self.visible is None else self.has_truth & self.visible

    @property
    def start(self) -> int:
        """Index of the first frame with a box, where a one-pass run starts the tracker."""
        return int(np.argmax(self.has_truth))


def read_otb(folder: str | Path, truth_name: str = OTB_TRUTH, allow_prefix: bool = False) -> Sequence:
    """A sequence of the OTB layout: ``img/*.jpg`` and a text file of 1-based ``x,y,w,h`` rows.

    Numbers may be separated by commas, tabs or blanks. The boxes become 0-based by subtracting 1 from x and y. A row
    whose width or height is not positive marks an absent target.

    Args:
        folder: the sequence's folder; its name becomes the sequence's name.
        truth_name: the truth file in it, such as ``groundtruth_rect.2.txt`` where a folder holds two targets.
        allow_prefix: where images and rows differ in number, use as many as both have instead of refusing. Sequences in
            `OTB_RANGES` need no permission: the benchmark documents which of their images the truth covers.

    Raises:
        FileNotFoundError: the images or the truth file are missing.
        ValueError: a row cannot be read, or images and rows differ in number.
    """
    folder = Path(folder)
    frames = image_paths(folder / "img")
    truth = read_rows(folder / truth_name)
    if len(frames) != len(truth) and folder.name.lower() in OTB_RANGES:
        first, last = OTB_RANGES[folder.name.lower()]
        frames = frames[first - 1 : last]
    if len(frames) != len(truth) and allow_prefix:
        shared = min(len(frames), len(truth))
        frames, truth = frames[:shared], truth[:shared]
    check_counts(folder / truth_name, len(frames), len(truth), "; allow_prefix=True uses what both have")
    return Sequence(folder.name, frames, without_empty(truth - [1, 1, 0, 0]))


def read_video_folder(folder: str | Path) -> Sequence:
    """A sequence of images and ``groundtruth.txt``: 0-based ``x,y,w,h`` rows, ``nan`` where absent.

    The images lie in ``img/``, or beside the truth file where there is no such folder.

    Raises:
        FileNotFoundError: the images or the truth file are missing.
        ValueError: a row cannot be read, or images and rows differ in number.
    """
    folder = Path(folder)
    frames = image_paths(images_folder(folder))
    truth = read_rows(folder / VIDEO_TRUTH)
    check_counts(folder / VIDEO_TRUTH, len(frames), len(truth))
    return Sequence(folder.name, frames, without_empty(truth))


def read_frame(path: str | Path) -> NDArray[np.uint8]:
    """One image as uint8 ``[H, W, 3]`` BGR; raises ValueError where it cannot be decoded."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    if image is None:
        raise ValueError(f"cannot decode the image {path}")
    return image  # type: ignore[return-value]


def images_folder(folder: Path) -> Path:
    """Where a sequence's folder keeps its images: in ``img`` if there is one, else in itself."""
    return folder / "img" if (folder / "img").is_dir() else folder


def image_paths(images: Path) -> tuple[Path, ...]:
    """Image files of a folder in playing order.

    Raises:
        FileNotFoundError: the folder is missing or holds no image.
    """
    if not images.is_dir():
        raise FileNotFoundError(f"no folder {images}; expected the sequence's images there")
    paths = [path for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    if not paths:
        raise FileNotFoundError(f"no image in {images}; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return tuple(sorted(paths, key=natural_key))


def read_rows(path: Path) -> NDArray[np.float64]:
    """Boxes ``[F, 4]`` of a text file: four numbers a row, or ``nan``, with commas, tabs or blanks between them.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a row is not four numbers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; expected a row x,y,w,h an image")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        fields = [field for field in re.split(r"[,;\s]+", line.strip()) if field]
        if not fields:
            continue
        try:
            values = [float(field) for field in fields]
        except ValueError:
            values = []
        if len(values) == 1 and np.isnan(values[0]):
            values = values * 4
        if len(values) != 4:
            raise ValueError(f"{path}, line {number}: expected four numbers x,y,w,h or nan, got {line.strip()!r}")
        rows.append(values)
    return np.array(rows, dtype=np.float64).reshape(-1, 4)


def without_empty(truth_xywh: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows without a positive, finite size become NaN: several data sets write 0,0,0,0 for an absent target."""
    return np.where(is_box(truth_xywh)[:, None], truth_xywh, np.nan)


def is_box(boxes_xywh: NDArray[np.float64]) -> NDArray[np.bool_]:
    """``[F]``: True where a row of ``[F, 4]`` is finite and has a positive size."""
    finite = np.isfinite(boxes_xywh).all(axis=1)
    return np.logical_and(finite, (boxes_xywh[:, 2:] > 0).all(axis=1))


def check_counts(path: Path, images: int, rows: int, advice: str = "") -> None:
    """Refuse a truth file that has not one row an image; `advice` ends the message.

    Raises:
        ValueError: the numbers differ.
    """
    if images != rows:
        raise ValueError(f"{path} has {rows} rows for {images} images; expected one row an image{advice}")
