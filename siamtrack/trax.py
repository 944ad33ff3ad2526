"""``siamtrack-trax``: the tracker as a TraX server, which the VOT toolkit and other TraX clients drive.

    siamtrack-trax --write-ini trackers.ini      the registry entry for the vot-toolkit
    vot test siamtrack                           in that folder; then `vot evaluate`

The client starts this command and talks to it over standard input and output, or over a socket. It sends an image and
a region for each object, then image after image, and gets back rectangles with the property ``confidence`` (the raw
score) each time.
A polygon or mask becomes an axis-aligned box first (`region_box`).

The protocol is spoken by the ``trax`` module of the package vot-trax, which is not installed by default.
"""

from __future__ import annotations

import argparse
import configparser
import importlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from siamtrack.bundle import DEFAULT_MODEL, load_bundle
from siamtrack.runners import BACKENDS, Runner, open_runner
from siamtrack.tracker import SiamTracker, Track
from siamtrack.version import __version__

INSTALL = "pip install 'siamtrack[vot]'"
Box = tuple[float, float, float, float]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status: 0 the client said goodbye, 1 the session broke, 2 unusable arguments."""
    options = _parser().parse_args(arguments)
    try:
        if options.write_ini is not None:
            load_bundle(options.model)
            write_ini(options.write_ini, options.name, options.model, options.backend, options.threads)
            print(f"wrote {options.write_ini}: run `vot test {options.name}` beside it")
            return 0
        trax = _import_trax()
        runner = open_runner(load_bundle(options.model), options.backend, options.threads)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"siamtrack-trax: {error}", file=sys.stderr)
        return 2
    try:
        serve(trax, runner, options.name)
    except (ValueError, trax.TraxException) as error:
        print(f"siamtrack-trax: {error}", file=sys.stderr)
        return 1
    finally:
        runner.close()
    return 0


def serve(trax: ModuleType, runner: Runner, name: str) -> None:
    """Answer a client until it quits.

    A client may have several objects followed, and add more with any frame: one tracker each, all on one model.

    Args:
        trax: the module `trax`.
        runner: owns the model.
        name: what the client is told.

    Raises:
        ValueError: an image or a region cannot be used; the client is told why.
        trax.TraxException: the client broke off or does not keep to the protocol.
    """
    server = trax.Server(
        [trax.Region.RECTANGLE, trax.Region.POLYGON, trax.Region.MASK],
        [trax.Image.PATH, trax.Image.MEMORY, trax.Image.BUFFER],
        tracker_name=name,
        tracker_description=f"siamtrack {__version__}, {runner.bundle.manifest.model}",
        tracker_family="Siamese",
        multiobject=True,
    )
    trackers: list[SiamTracker] = []
    try:
        while True:
            request = server.wait()
            if request.type == trax.TraxStatus.QUIT:
                break
            if request.type == trax.TraxStatus.INITIALIZE:
                trackers = []
            image = decode_image(request.image["color"])
            tracks = [tracker.update(image) for tracker in trackers]
            for region, _ in request.objects or []:
                trackers.append(SiamTracker(runner))
                tracks.append(trackers[-1].init(image, region_box(region)))
            server.status([_status(trax, track) for track in tracks])
    except ValueError as error:
        server.quit(str(error))
        raise
    server.quit()


def _status(trax: ModuleType, track: Track) -> tuple[Any, dict[str, str]]:
    properties = {"confidence": f"{track.score:.6f}", "state": track.state.name}
    return trax.Rectangle.create(*track.box_xywh), properties


def region_box(region: Any) -> Box:
    """The axis-aligned box ``x, y, w, h`` of a TraX region.

    Raises:
        ValueError: an empty mask, or a kind of region other than rectangle, polygon and mask.
    """
    if region.type == "rectangle":
        x, y, w, h = region.bounds()
        return float(x), float(y), float(w), float(h)
    if region.type == "polygon":
        return polygon_box(np.array(list(region)))
    if region.type == "mask":
        left, top = region.offset()
        x, y, w, h = mask_box(region.array())
        return x + left, y + top, w, h
    raise ValueError(f"cannot start on a region of type {region.type}; expected rectangle, polygon or mask")


def polygon_box(corners_xy: NDArray[np.floating]) -> Box:
    """The axis-aligned box of a polygon's area, centred on the mean of its corners (VOT 2016 to 2019).

    Its aspect is that of the polygon's extent. For four corners the area is that of the parallelogram on the first two
    sides, as the VOT toolkits of that time computed it; for others the polygon's own.

    Args:
        corners_xy: ``[N, 2]`` in image pixels, N at least 3, in order around the polygon.

    Raises:
        ValueError: another shape, or a polygon of no area.
    """
    corners = np.asarray(corners_xy, dtype=np.float64)
    if corners.ndim != 2 or corners.shape[1] != 2 or len(corners) < 3:
        raise ValueError(f"a polygon needs three corners x, y or more, got shape {list(corners.shape)}")
    low, high = corners.min(axis=0), corners.max(axis=0)
    if len(corners) == 4:
        first, second = np.linalg.norm(corners[0] - corners[1]), np.linalg.norm(corners[1] - corners[2])
        area = float(first * second)
    else:
        x, y = corners.T
        area = abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
    extent = high - low
    if not (area > 0 and extent.min() > 0):
        raise ValueError(f"the polygon {corners.tolist()} has no area")
    w, h = (extent * np.sqrt(area / extent.prod())).tolist()
    cx, cy = corners.mean(axis=0).tolist()
    return cx - w / 2, cy - h / 2, w, h


def mask_box(mask: NDArray[np.generic]) -> Box:
    """The smallest box around the nonzero pixels of a mask ``[H, W]``; pixel i covers [i, i + 1).

    Raises:
        ValueError: no pixel is set.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        raise ValueError("the mask is empty; expected at least one pixel of the target")
    left, top = int(columns[0]), int(rows[0])
    return float(left), float(top), float(columns[-1] - left + 1), float(rows[-1] - top + 1)


def decode_image(image: Any) -> NDArray[np.uint8]:
    """A TraX image as uint8 ``[H, W, 3]`` BGR.

    Raises:
        ValueError: it does not decode.
    """
    kind = image.type()
    decoded: Any = None
    if kind == "path":
        decoded = cv2.imread(image.path(), cv2.IMREAD_COLOR)
    elif kind == "buffer":
        decoded = cv2.imdecode(np.frombuffer(image.buffer(), np.uint8), cv2.IMREAD_COLOR)
    elif kind == "memory":
        pixels = image.array()
        if pixels.dtype == np.uint16:
            pixels = (pixels >> 8).astype(np.uint8)
        decoded = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR if pixels.shape[2] == 3 else cv2.COLOR_GRAY2BGR)
    if decoded is None:
        raise ValueError(f"cannot decode the image: {image}")
    return decoded


def write_ini(path: Path, name: str, model: str | None, backend: str, threads: int) -> None:
    """Put this tracker into a registry of the vot-toolkit; other trackers in the file stay as they are.

    Raises:
        ValueError: the file is not a registry.
    """
    registry = configparser.ConfigParser(interpolation=None)
    try:
        registry.read(path, encoding="utf-8")
    except configparser.Error as error:
        raise ValueError(f"{path} is not a registry of trackers: {error}") from error
    command = [sys.executable, "-m", "siamtrack.trax", "--name", name, "--backend", backend, "--threads", str(threads)]
    if model is not None:  # the toolkit starts trackers in a folder of its own
        command += ["--model", str(Path(model).resolve()) if Path(model).is_dir() else model]
    registry[name] = {"label": name, "protocol": "trax", "command": shlex.join(command)}
    with path.open("w", encoding="utf-8") as file:
        registry.write(file)


def _import_trax() -> ModuleType:
    try:
        trax = importlib.import_module("trax")
        for part in ("server", "region", "image"):
            importlib.import_module(f"trax.{part}")
    except (ImportError, OSError) as error:  # OSError: its library does not load on this machine
        raise ImportError(f"the TraX protocol needs the package vot-trax: {INSTALL} ({error})") from error
    return trax


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="siamtrack-trax", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--write-ini", type=Path, metavar="FILE", help="write the entry for the vot-toolkit and end")
    parser.add_argument("--name", default="siamtrack", help="name of the tracker (default siamtrack)")
    parser.add_argument("--model", help=f"shipped model or bundle folder (default {DEFAULT_MODEL})")
    parser.add_argument("--backend", choices=BACKENDS, default=BACKENDS[0], help="what runs the graphs")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: the cores, up to 4)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
