"""Finds sequences in a folder and reads the layouts of the public benchmarks.

`find_sequences` only lists: a `SequenceRef` is a name and two paths, cheap to hold by the thousand and to send to
another process. Its `load` reads the boxes (and the masks, where boxes come from masks) when the sequence's turn comes;
images are decoded while it plays. What each benchmark's folder looks like stands in ``docs/evaluation.md``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaluation import attributes
from evaluation.masks import boxes_of_masks, object_ids, read_mask
from evaluation.sequences import (
    IMAGE_SUFFIXES,
    OTB_TRUTH,
    VIDEO_TRUTH,
    Sequence,
    check_counts,
    image_paths,
    images_folder,
    read_otb,
    read_rows,
    read_video_folder,
    without_empty,
)
from evaluation.uav123_cuts import UAV123_CUTS

MASKS = ("mask", "masks")
OCCLUDED, OUT_OF_VIEW, COVER = LABELS = ("full_occlusion.txt", "out_of_view.txt", "cover.label")


@dataclass(frozen=True)
class SequenceRef:
    """A sequence that has not been read yet.

    Attributes:
        name: unique within a data set; what tables and result files call it.
        layout: a name in `LAYOUTS`.
        root: the data set's folder, where attribute files are looked for.
        images: folder of its images.
        truth: file of its boxes, or folder of its masks.
        target: object id in the masks; None for all that is not background, and where there are no masks.
    """

    name: str
    layout: str
    root: Path
    images: Path
    truth: Path
    target: int | None = None

    def load(self) -> Sequence:
        """Read it.

        Raises:
            FileNotFoundError: images or truth are missing.
            ValueError: the truth cannot be read, does not match the images, or holds no box.
        """
        sequence = LAYOUTS[self.layout].load(self)
        return dataclasses.replace(sequence, name=self.name, attributes=self.attributes())

    def attributes(self) -> tuple[str, ...]:
        """What it is an example of; () where the data set does not say. Raises ValueError where that is unreadable."""
        return LAYOUTS[self.layout].attributes(self)

    def digest(self) -> str:
        """Hash of its truth and visibility, and of the names of its images: what a result must have been made from.

        Raises:
            OSError: something is missing.
        """
        digest = hashlib.sha256()
        labels = (self.truth.parent / name for name in LABELS)
        truth = sorted(self.truth.iterdir()) if self.truth.is_dir() else [self.truth, *filter(Path.is_file, labels)]
        for path in truth:
            digest.update(path.name.encode() + path.read_bytes())
        for path in image_paths(self.images):
            digest.update(path.name.encode())
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Layout:
    """How one kind of data set is found and read.

    Attributes:
        find: sequences below a data set's folder; nothing where the folder is of another kind.
        load: reads one of them; name and attributes are put in afterwards.
        attributes: what one of them is an example of.
        scoring: name in `evaluation.official.SCORINGS` of the benchmark's own numbers; None where there are none.
        looks_like: what a folder of this kind holds, for messages.
    """

    find: Callable[[Path], Iterator[SequenceRef]]
    load: Callable[[SequenceRef], Sequence]
    attributes: Callable[[SequenceRef], tuple[str, ...]]
    scoring: str | None
    looks_like: str


def find_sequences(root: str | Path, layout: str = "auto") -> list[SequenceRef]:
    """All sequences below `root`, sorted by name; none is read.

    Args:
        root: the data set's folder, or the folder of one sequence.
        layout: a name in `LAYOUTS`, or "auto", which also takes a folder that mixes sequences of several layouts.

    Raises:
        FileNotFoundError: `root` is missing or holds no sequence of that layout.
        ValueError: no such layout, or two sequences of one name.
    """
    root = Path(root)
    if layout != "auto" and layout not in LAYOUTS:
        raise ValueError(f"unknown layout {layout!r}; expected auto or one of {', '.join(LAYOUTS)}")
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; expected a folder of sequences")
    refs: list[SequenceRef] = []
    for name, kind in LAYOUTS.items():
        if layout in ("auto", name):
            known = {ref.images for ref in refs}
            refs += [ref for ref in kind.find(root) if ref.images not in known]
    if not refs:
        kinds = LAYOUTS if layout == "auto" else {layout: LAYOUTS[layout]}
        wanted = "; ".join(f"{name}: {kind.looks_like}" for name, kind in kinds.items())
        raise FileNotFoundError(f"no sequence in {root}; expected {wanted}")
    refs.sort(key=lambda ref: ref.name)
    for ref, following in itertools.pairwise(refs):
        if ref.name == following.name:
            raise ValueError(f"two sequences are called {ref.name}: {ref.truth} and {following.truth}; move one away")
    return refs


def read_sequences(root: str | Path, layout: str = "auto") -> list[Sequence]:
    """All sequences below `root`, read; for data sets that are known to be small. Raises as `find_sequences`."""
    return [ref.load() for ref in find_sequences(root, layout)]


def _folders(root: Path) -> Iterator[Path]:
    """`root`, its folders and theirs: as deep as benchmarks nest their sequences (LaSOT: a class, then a sequence)."""
    yield root
    for folder in _children(root):
        yield folder
        yield from _children(folder)


def _children(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _find_otb(root: Path) -> Iterator[SequenceRef]:
    """A folder with two targets (Jogging, Skating2) is two sequences, named as pysot names them: Jogging-1."""
    for folder in _folders(root):
        for truth in sorted(folder.glob("groundtruth_rect*.txt")):
            if truth.stat().st_size and (folder / "img").is_dir():  # Human4's first target is an empty file
                number = truth.stem.removeprefix(Path(OTB_TRUTH).stem).strip(".")
                name = f"{folder.resolve().name}-{number}" if number else folder.resolve().name
                yield SequenceRef(name, "otb", root, folder / "img", truth)


def _load_otb(ref: SequenceRef) -> Sequence:
    return read_otb(ref.truth.parent, ref.truth.name)


def _otb_attributes(ref: SequenceRef) -> tuple[str, ...]:
    places = tuple(folder / part for folder in (ref.root, ref.root.parent) for part in ("anno/att", "att"))
    return attributes.read_flags(places, ref.name, attributes.OTB_ORDER) or attributes.read_pysot(ref.root, ref.name)


def _find_uav(root: Path, subset: str) -> Iterator[SequenceRef]:
    layout = subset.lower()
    for truth in sorted((root / "anno" / subset).glob("*.txt")):
        video, _, part = truth.stem.rpartition("_")
        folder = video if video in UAV123_CUTS and part.isdigit() and subset == "UAV123" else truth.stem
        yield SequenceRef(truth.stem, layout, root, root / "data_seq" / "UAV123" / folder, truth)


def _load_uav(ref: SequenceRef) -> Sequence:
    frames, truth = image_paths(ref.images), read_rows(ref.truth)
    first = 1
    if ref.images.name != ref.name:
        first = UAV123_CUTS[ref.images.name][int(ref.name.rpartition("_")[2]) - 1][0]
    # Sequences end where their truth does: some videos have images behind it.
    frames = frames[first - 1 : first - 1 + len(truth)]
    check_counts(ref.truth, len(frames), len(truth))
    return Sequence(ref.name, frames, without_empty(truth))


def _uav_attributes(ref: SequenceRef) -> tuple[str, ...]:
    places = (ref.truth.parent / "att",)
    return attributes.read_flags(places, ref.name, attributes.UAV_ORDER) or attributes.read_pysot(ref.root, ref.name)


def _find_lasot(root: Path) -> Iterator[SequenceRef]:
    for folder in _folders(root):
        truth = folder / VIDEO_TRUTH
        if truth.is_file() and (folder / OCCLUDED).is_file() and (folder / "img").is_dir():
            yield SequenceRef(folder.resolve().name, "lasot", root, folder / "img", truth)


def _load_lasot(ref: SequenceRef) -> Sequence:
    folder = ref.truth.parent
    frames, truth = image_paths(ref.images), read_rows(ref.truth)
    check_counts(ref.truth, len(frames), len(truth))
    absent = _labels(folder / OCCLUDED, len(frames)) | _labels(folder / OUT_OF_VIEW, len(frames))
    return Sequence(ref.name, frames, without_empty(truth), ~absent)


def _lasot_attributes(ref: SequenceRef) -> tuple[str, ...]:
    places = (ref.root / "att", ref.root / "annos" / "att")
    return attributes.read_flags(places, ref.name, attributes.LASOT_ORDER) or attributes.read_pysot(ref.root, ref.name)


def _find_got10k(root: Path) -> Iterator[SequenceRef]:
    for folder in _folders(root):
        truth = folder / VIDEO_TRUTH
        labelled = any((folder / name).is_file() for name in ("meta_info.ini", COVER, "absence.label"))
        if truth.is_file() and (labelled or folder.name.startswith("GOT-10k_")):
            yield SequenceRef(folder.resolve().name, "got10k", root, folder, truth)


def _load_got10k(ref: SequenceRef) -> Sequence:
    frames, truth = image_paths(ref.images), read_rows(ref.truth)
    truth = _first_box_only(ref.truth, truth, len(frames))
    cover = ref.images / COVER
    visible = _labels(cover, len(frames)) if cover.is_file() else None
    return Sequence(ref.name, frames, without_empty(truth), visible)


def _find_trackingnet(root: Path) -> Iterator[SequenceRef]:
    for chunk in [root, *_children(root)]:
        if (chunk / "frames").is_dir():
            for truth in sorted((chunk / "anno").glob("*.txt")):
                if (chunk / "frames" / truth.stem).is_dir():
                    yield SequenceRef(truth.stem, "trackingnet", root, chunk / "frames" / truth.stem, truth)


def _load_trackingnet(ref: SequenceRef) -> Sequence:
    frames, truth = image_paths(ref.images), read_rows(ref.truth)
    return Sequence(ref.name, frames, without_empty(_first_box_only(ref.truth, truth, len(frames))))


def _find_davis(root: Path) -> Iterator[SequenceRef]:
    """One sequence an object: DAVIS 2017 numbers them (dogs-jump-2), where there is only one the name stays plain."""
    sizes = {path.name: path for path in _children(root / "Annotations")}
    if not sizes:
        return
    masks_root = sizes.get("480p", next(iter(sizes.values())))
    for folder in _children(masks_root):
        images = root / "JPEGImages" / masks_root.name / folder.name
        if images.is_dir():
            ids = object_ids(read_mask(min(_masks(folder).values())))
            for target in ids:
                name = folder.name if len(ids) == 1 else f"{folder.name}-{target}"
                yield SequenceRef(name, "davis", root, images, folder, target)


def _load_masks(ref: SequenceRef) -> Sequence:
    frames = image_paths(ref.images)
    return Sequence(ref.name, frames, boxes_of_masks(_masks(ref.truth), frames, ref.target))


def _find_folder(root: Path) -> Iterator[SequenceRef]:
    for folder in _folders(root):
        name, images = folder.resolve().name, images_folder(folder)
        masks = next((folder / part for part in MASKS if (folder / part).is_dir()), None)
        if (folder / VIDEO_TRUTH).is_file():
            yield SequenceRef(name, "folder", root, images, folder / VIDEO_TRUTH)
        elif masks is not None and images != folder:
            yield SequenceRef(name, "folder", root, images, masks)


def _load_folder(ref: SequenceRef) -> Sequence:
    if ref.truth.is_dir():
        return _load_masks(ref)
    return read_video_folder(ref.truth.parent)


def _masks(folder: Path) -> dict[str, Path]:
    masks = {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES}
    if not masks:
        raise FileNotFoundError(f"no mask in {folder}; expected an image of object ids a frame, named like the frame")
    return masks


def _first_box_only(path: Path, truth: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Test sets publish the first box alone: the rest becomes NaN, to be tracked and not scored."""
    if len(truth) == 1:
        return np.concatenate([truth, np.full((count - 1, 4), np.nan)])
    check_counts(path, count, len(truth))
    return truth


def _labels(path: Path, count: int) -> NDArray[np.bool_]:
    values = attributes.label_values(path)
    if len(values) != count:
        raise ValueError(f"{path} has {len(values)} labels for {count} images; expected one an image")
    return np.array(values) > 0


def _no_attributes(ref: SequenceRef) -> tuple[str, ...]:
    return ()


# From the most to the least telling: "auto" gives a folder to the first that knows it.
LAYOUTS = {
    "davis": Layout(_find_davis, _load_masks, _no_attributes, None, "JPEGImages/480p/NAME and Annotations/480p/NAME"),
    "uav123": Layout(
        lambda root: _find_uav(root, "UAV123"), _load_uav, _uav_attributes, "pysot", "anno/UAV123 and data_seq/UAV123"
    ),
    "uav20l": Layout(
        lambda root: _find_uav(root, "UAV20L"), _load_uav, _uav_attributes, "pysot", "anno/UAV20L and data_seq/UAV123"
    ),
    "trackingnet": Layout(
        _find_trackingnet, _load_trackingnet, _no_attributes, "trackingnet", "frames/NAME and anno/NAME.txt"
    ),
    "otb": Layout(_find_otb, _load_otb, _otb_attributes, "pysot", f"NAME/img and NAME/{OTB_TRUTH} (1-based)"),
    "lasot": Layout(
        _find_lasot, _load_lasot, _lasot_attributes, "lasot", f"CLASS/NAME/img, {VIDEO_TRUTH} and {OCCLUDED}"
    ),
    "got10k": Layout(
        _find_got10k,
        _load_got10k,
        lambda ref: attributes.read_got10k(ref.images),
        "got10k",
        f"NAME/*.jpg, {VIDEO_TRUTH} and meta_info.ini",
    ),
    "folder": Layout(
        _find_folder,
        _load_folder,
        _no_attributes,
        None,
        f"NAME/img and NAME/{VIDEO_TRUTH} (0-based) or NAME/{MASKS[0]}",
    ),
}
