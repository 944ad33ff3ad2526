"""What a benchmark's sequences are examples of: occlusion, fast motion, low resolution and so on.

The toolkits of OTB, UAV123 and LaSOT keep a text file a sequence with a 0 or 1 for each attribute, in an order that
only their plotting scripts tell; pysot keeps lists of short names in a JSON file beside the sequences. GOT-10k has
labels a frame and words a sequence.
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

# Orders as in each toolkit's plotting script.
OTB_ORDER = ("IV", "OPR", "SV", "OCC", "DEF", "MB", "FM", "IPR", "OV", "BC", "LR")
UAV_ORDER = ("SV", "ARC", "LR", "FM", "FOC", "POC", "OV", "BC", "IV", "VC", "CM", "SOB")
LASOT_ORDER = ("IV", "POC", "DEF", "MB", "CM", "ROT", "BC", "VC", "SV", "FOC", "FM", "OV", "LR", "ARC")
LONG_NAMES = {
    "ARC": "aspect ratio change",
    "BC": "background clutter",
    "CM": "camera motion",
    "DEF": "deformation",
    "FM": "fast motion",
    "FOC": "full occlusion",
    "IPR": "in-plane rotation",
    "IV": "illumination variation",
    "LR": "low resolution",
    "MB": "motion blur",
    "OCC": "occlusion",
    "OPR": "out-of-plane rotation",
    "OV": "out of view",
    "POC": "partial occlusion",
    "ROT": "rotation",
    "SOB": "similar object",
    "SV": "scale variation",
    "VC": "viewpoint change",
}
GOT10K_KEYS = ("root_class", "motion_class", "motion_adverb")


def read_flags(folders: tuple[Path, ...], name: str, order: tuple[str, ...]) -> tuple[str, ...]:
    """Attributes of a sequence from ``<name>.txt`` in the first of some folders that has it; () where none has.

    Raises:
        ValueError: the file has not one 0 or 1 for each attribute in `order`.
    """
    for folder in folders:
        path = folder / f"{name}.txt"
        if path.is_file():
            fields = [field for field in re.split(r"[,;\s]+", path.read_text().strip()) if field]
            if len(fields) != len(order) or not set(fields) <= {"0", "1"}:
                raise ValueError(f"{path}: expected {len(order)} flags of 0 or 1 ({', '.join(order)}), got {fields}")
            return tuple(LONG_NAMES[short] for short, flag in zip(order, fields, strict=True) if flag == "1")
    return ()


def read_pysot(root: Path, name: str) -> tuple[str, ...]:
    """Attributes of a sequence from pysot's ``<root>/<name of root>.json``; () where there is no such file or entry."""
    return _pysot_attributes(root / f"{root.resolve().name}.json").get(name, ())


def read_got10k(folder: Path) -> tuple[str, ...]:
    """Attributes of a GOT-10k sequence: its classes, and whether the target is ever absent, cut off or occluded."""
    found = []
    for flag, title in (("absence", "absent at times"), ("cut_by_image", "cut by the image")):
        if any(value > 0 for value in label_values(folder / f"{flag}.label")):
            found.append(title)
    cover = label_values(folder / "cover.label")
    if any(value < 8 for value in cover):  # 8 stands for at least 99 % visible
        found.append("occluded")
    meta = folder / "meta_info.ini"
    if meta.is_file():
        pairs = dict(re.findall(r"^(\w+):\s*(.+?)\s*$", meta.read_text(), re.MULTILINE))
        found += [f"{key.replace('_', ' ')}: {pairs[key]}" for key in GOT10K_KEYS if key in pairs]
    return tuple(found)


def label_values(path: Path) -> list[int]:
    """Whole numbers of a label file, one a frame, separated by blanks, commas or line ends; [] without the file.

    Raises:
        ValueError: something in it is not a number.
    """
    if not path.is_file():
        return []
    try:
        return [int(float(field)) for field in re.split(r"[,;\s]+", path.read_text().strip()) if field]
    except ValueError as error:
        raise ValueError(f"{path}: expected a whole number a frame ({error})") from error


@functools.lru_cache(maxsize=4)
def _pysot_attributes(path: Path) -> dict[str, tuple[str, ...]]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
        return {name: tuple(LONG_NAMES.get(a, a) for a in entry.get("attr") or ()) for name, entry in content.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: expected pysot's JSON, an object a sequence with a list 'attr' ({error})") from error
